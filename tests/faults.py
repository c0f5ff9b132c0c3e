"""The table of faults in docs/reliability.md, written by the tests that try them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
SEEDS = range(5)  # with each of which a fault is tried

_TABLE = re.compile(r"(?<=<!-- faults -->\n).*(?=<!-- /faults -->)", re.DOTALL)
_ROW = re.compile(r"^\| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)


@contextmanager
def tried(fault: str) -> Iterator[list[str]]:
    """Put what the block leaves in a list, what was tried and what became of it, into the table.

    A block that fails leaves the table without a row for this fault; other rows stay.
    """
    cells: list[str] = []
    try:
        yield cells
        what, outcome = cells
    except BaseException:
        _write(fault, None)
        raise
    _write(fault, (what, outcome))


def _write(fault: str, cells: tuple[str, str] | None) -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = _TABLE.search(text)
    assert table, f"{PAGE} has no table of faults"
    rows = {name: (what, outcome) for name, what, outcome in _ROW.findall(table[0])[1:]}
    if cells:
        rows[fault] = cells
    else:
        rows.pop(fault, None)
    lines = ["| fault | tried | what became of it |", "|---|---|---|"]
    lines += [f"| {name} | {what} | {outcome} |" for name, (what, outcome) in rows.items()]
    PAGE.write_text(_TABLE.sub(lambda _: "\n".join(lines) + "\n", text), encoding="utf-8")
