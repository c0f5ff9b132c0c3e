"""Measures what the project promises: every row of ``bars.toml`` for several seeds, as one table.

A run whose result file already holds the same configuration is not run again.
"""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from simulations import config, results, runner

FILE = Path(__file__).parent / "bars.toml"
EXPERIMENTS = Path(__file__).parent / "experiments"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes
    ----------
    name : str
    file : str
        Experiment file.
    overrides : tuple of str
        As for ``--set``.
    against : str or None
        Row whose BA this one's is compared with.
    bar : str
        What it must reach, in words.
    """

    name: str
    file: str
    overrides: tuple[str, ...]
    against: str | None = None
    bar: str = ""

    @property
    def folder(self) -> str:
        """Name of the folder that its runs go to."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower()).replace("--", "-")


def load(path: Path = FILE) -> list[Row]:
    """Read the rows."""
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        Row(r["name"], r["file"], tuple(r["set"]), r.get("against"), r.get("bar", ""))
        for r in document["row"]
    ]


def measure(
    rows: Sequence[Row], seeds: Sequence[int], out: Path, data_root: Path | None, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Run what has not been run; the results of each row, by seed."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        measured[row.name] = []
        for seed in seeds:
            folder = out / row.folder / f"seed-{seed}"
            overrides = [
                *row.overrides,
                f"experiment.seed={seed}",
                f"run.output={json.dumps(str(folder))}",
            ]
            if data_root is not None:
                overrides.append(f"run.data_root={json.dumps(str(data_root))}")
            experiment = config.load(EXPERIMENTS / row.file, overrides)
            measured[row.name].append(_finished(folder, experiment) or _run(experiment, console))
    return measured


def table(rows: Sequence[Row], measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict]:
    """One dict per row: mean and worst over the seeds, scores in percent."""
    return [_line(row, measured[row.name], measured.get(row.against or "")) for row in rows]


def write(lines: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """Write the table as ``bars.csv`` and ``bars.md``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    head = "| " + " | ".join(lines[0]) + " |\n|" + " --- |" * len(lines[0]) + "\n"
    body = "".join("| " + " | ".join(str(v) for v in line.values()) + " |\n" for line in lines)
    return [
        results.write_text(out / "bars.csv", text.getvalue()),
        results.write_text(out / "bars.md", head + body),
    ]


def _finished(folder: Path, experiment: config.Experiment) -> dict[str, Any] | None:
    if not (folder / results.RESULT).exists():
        return None
    result = results.read(folder)
    return result if result["configuration"] == experiment.identity() else None


def _run(experiment: config.Experiment, console: Console) -> dict[str, Any]:
    return runner.execute(experiment, console)


def _line(
    row: Row,
    mine: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    final = {score: [100 * r["final"][score] for r in mine] for score in ("ba", "asr", "recovered")}
    last5 = {score: [100 * r["worst_last5"][score] for r in mine] for score in ("ba", "asr")}
    resets = [sum(entry["neurons_reset"] for entry in r["rounds"]) for r in mine]
    line: dict[str, Any] = {
        "run": row.name,
        "bar": row.bar,
        "seeds": len(mine),
        "BA final": _mean_worst(final["ba"], min),
        "ASR final": _mean_worst(final["asr"], min if "ASR >=" in row.bar else max),
        "BA worst of last 5": _mean_worst(last5["ba"], min),
        "ASR worst of last 5": _mean_worst(last5["asr"], max),
        "recovered final": _mean_worst(final["recovered"], min),
        "BA lost": "",
        "neurons reset": _mean_worst(resets, max, digits=0),
        "filter precision": _known([r["filter"]["precision"] for r in mine]),
        "filter recall": _known([r["filter"]["recall"] for r in mine]),
        "seconds": round(mean(r["seconds"] for r in mine)),
    }
    if others:
        lost = [
            100 * (o["final"]["ba"] - r["final"]["ba"]) for o, r in zip(others, mine, strict=True)
        ]
        line["BA lost"] = _mean_worst(lost, max)
    return line


def _mean_worst(values: Sequence[float], worst: Any, digits: int = 2) -> str:
    return f"{mean(values):.{digits}f} ({worst(values):.{digits}f})"


def _known(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    return _mean_worst(known, min, digits=1) if known else ""
