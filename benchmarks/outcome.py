"""What a benchmark found: figures, the bars they have to hold, and the machine they come from."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Bar:
    """A figure that must not exceed a limit."""

    figure: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether it does not."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes
    ----------
    case : str
        What was measured.
    figures : dict of str to number
        What came out; the same names in every row of an outcome. None where not measured.
    bars : tuple of Bar
    samples : dict of str to list of float
        What the figures were computed from.
    """

    case: str
    figures: dict[str, float | int | None]
    bars: tuple[Bar, ...] = ()
    samples: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """All rows of one benchmark and how they were measured."""

    name: str
    method: str
    rows: Sequence[Row]

    def to_json(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        rows = [asdict(row) for row in self.rows]
        for row, source in zip(rows, self.rows, strict=True):
            row["bars"] = [asdict(bar) | {"holds": bar.holds} for bar in source.bars]
        return {
            "benchmark": self.name,
            "method": self.method,
            "machine": machine(),
            "rows": rows,
            "holds": all(bar.holds for row in self.rows for bar in row.bars),
        }

    def write(self, file: Path) -> Path:
        """Write the JSON file, making its folder, and return it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return file

    def show(self) -> None:
        """Print a table."""
        console = Console()
        if not console.is_terminal:
            console = Console(width=150)
        table = Table(title=self.name, caption=self.method, title_justify="left")
        table.add_column("case")
        for name in self.rows[0].figures:
            table.add_column(name, justify="right")
        table.add_column("bar")
        for row in self.rows:
            figures = ["" if f is None else _short(f) for f in row.figures.values()]
            table.add_row(row.case, *figures, "\n".join(map(_verdict, row.bars)))
        console.print(table)


def machine() -> dict[str, Any]:
    """Return what figures from another machine may differ by."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _processor() -> str:
    """Name the processor; `platform.processor` is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _short(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.2f}"


def _verdict(bar: Bar) -> str:
    verdict = "[green]holds[/green]" if bar.holds else "[red]missed[/red]"
    return f"{bar.figure} <= {bar.limit:g}: {verdict}"
