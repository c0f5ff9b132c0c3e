"""Runs that were made elsewhere: rows of tables that this very code has written.

So several machines share a matrix, and one that has only an hour goes on where another stopped.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from simulations import results, sources

Row = dict[str, Any]
_TEXT = frozenset({"first_quarantined", "code"})
_PLACE = frozenset(
    ("task", "partition", "attack", "reporter", "malicious", "defense", "seed", "run", "state")
)


def read(docs: Path) -> dict[str, Row]:
    """Read the finished runs of all tables of a folder that matrices have written into.

    Parameters
    ----------
    docs : Path
        With the tables of ``[report]``'s ``cells`` and ``timing`` of one matrix or more.

    Returns
    -------
    dict of str to Row
        By the name of a run's folder, what `matrix_report.measured` returns; runs of other code
        are left out.

    Raises
    ------
    ResultError
        When the folder cannot be read, or holds no row that today's code has made.
    """
    measured: dict[str, Row] = {}
    seconds: dict[str, float] = {}
    others = 0
    try:
        files = sorted(docs.glob("*.csv"))
        tables = [list(csv.DictReader(f.read_text(encoding="utf-8").splitlines())) for f in files]
    except (OSError, ValueError) as error:
        raise results.ResultError(f"cannot read the tables of {docs}: {error}") from None
    for line in (line for table in tables for line in table if line.get("state") == "finished"):
        if "seconds" in line and "code" not in line:
            seconds[line["run"]] = float(line["seconds"])
        elif line.get("code") == sources.digest():
            measured[line["run"]] = {k: _value(k, v) for k, v in line.items() if k not in _PLACE}
        else:
            others += "code" in line
    found = {
        run: row | {"seconds": seconds[run]} for run, row in measured.items() if run in seconds
    }
    if not found:
        raise results.ResultError(
            f"{docs} holds no run that this code ({sources.digest()}) has made; runs of other code "
            f"there: {others}"
        )
    return found


def _value(column: str, text: str) -> Any:
    if column in _TEXT:
        return text
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)
