"""The tables that are printed after a run and a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from simulations.results import SCORES, left_out, suspects

Result = Mapping[str, Any]


def summary(runs: Sequence[tuple[str, Result]]) -> Table:
    """Make a table with a row for each run.

    Parameters
    ----------
    runs : sequence of (str, mapping)
        A label, and a result as `results.load` returns it.
    """
    table = Table(
        title="BA / ASR / recovered accuracy in %, and neurons reset",
        title_justify="left",
        box=None,
    )
    table.add_column("run", style="bold", no_wrap=True)
    for heading in ("final", "worst of last 5"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("reset", "suspected", "left out", "malicious", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, result in runs:
        table.add_row(label, *cells(result))
    return table


def cells(result: Result) -> list[str]:
    """Write what the table says of one run."""
    named, malicious = suspects(result)
    return [
        triple(result["final"]),
        triple(result["worst_last5"]),
        str(sum(entry["neurons_reset"] for entry in result["rounds"])),
        clients(named),
        clients(left_out(result)),
        clients(malicious),
        f"{result['timing']['seconds']:.0f}",
    ]


def triple(scores: Mapping[str, float]) -> str:
    """Write BA, ASR and recovered accuracy in percent."""
    return " / ".join(f"{100 * scores[score]:.2f}" for score in SCORES)


def clients(partitions: Sequence[int]) -> str:
    """Write a sorted list of clients, "0-3, 7"; a dash for none."""
    runs: list[list[int]] = []
    for partition in partitions:
        if runs and partition == runs[-1][-1] + 1:
            runs[-1].append(partition)
        else:
            runs.append([partition])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) or "-"
