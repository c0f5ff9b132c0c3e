"""The paper's tables with our figures: a page, and a tidy file of all runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from simulations import pool, results
from simulations.central.plan import Block, Cell, Plan, Row

NOT_RUN = "not run"
COLUMNS = (
    *("tables", "task", "model", "attack", "method", "seed", "ba", "asr", "recovered"),
    *("poisoned", "dropped", "precision", "recall", "looks", "neurons_reset", "reasr"),
    *("device", "code", "seconds"),
)
Measured = Mapping[str, Any]


def write(plan: Plan, docs: Path) -> list[Path]:
    """Write the page and the file of all that is finished.

    Parameters
    ----------
    plan : Plan
    docs : Path
        Folder; made if it does not exist. The files are named after the plan's.

    Returns
    -------
    list of Path

    Raises
    ------
    ResultError
        When a finished run cannot be read, or none is finished.
    """
    found = _Found(plan)
    cells = [cell for number in plan.tables for cell in plan.cells(number)]
    if all(found.measured(cell) is None for cell in cells):
        raise results.ResultError("no run is finished, so there is nothing to write about")
    docs.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(["\n".join(_head(found)), *_missed(found), *_tables(found)])
    return [
        results.write_text(docs / f"{plan.path.stem}.md", text + "\n"),
        results.write_text(docs / f"{plan.path.stem}.csv", _csv(found)),
    ]


class _Found:
    """What the finished runs of a plan measured."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._read: dict[Path, Measured | None] = {}

    def measured(self, cell: Cell) -> Measured | None:
        if cell.folder not in self._read:
            done = pool.finished(cell.folder)
            self._read[cell.folder] = results.load(cell.folder) if done else None
        return self._read[cell.folder]

    @property
    def codes(self) -> set[str]:
        """Digests of the code that has made the finished runs."""
        cells = (cell for number in self.plan.tables for cell in self.plan.cells(number))
        runs = (self.measured(cell) for cell in cells)
        return {run["versions"].get("code", "") for run in runs if run is not None}

    def of(self, block: Block, row: Row, method: str) -> list[Measured]:
        """Return what the finished seeds of a method measured."""
        seeds = block.seeds or self.plan.file.seeds
        each = (self.measured(self.plan.cell(row, method, seed)) for seed in seeds)
        return [measured for measured in each if measured is not None]


def _head(found: _Found) -> Iterator[str]:
    plan = found.plan
    name, seeds = plan.path.stem, [", ".join(map(str, plan.file.seeds))]
    for block in plan.file.rows:
        if block.seeds:
            own = ", ".join(map(str, block.seeds))
            seeds.extend(f"for {row}: {own}" for row in plan.rows(block))
    yield f"# The paper's tables: {name}"
    yield ""
    yield (
        f"Written by `python -m simulations table N` from [{plan.path.name}]"
        f"(../simulations/experiments/{plan.path.name}); every run is a line of "
        f"[{name}.csv]({name}.csv). What is the paper's, and what differs: [paper.md](paper.md)."
    )
    yield ""
    yield (
        "BA is the share of test images that are classified correctly. ASR is the share of stamped "
        "test images, of those that the attacker wants anything of, that are given the answer "
        "that the attacker wants. Both in percent: means over the seeds "
        f"({'; '.join(seeds)}) that are finished, with the worst and their number in brackets if "
        "there are several."
    )
    if len(found.codes) > 1:
        yield ""
        yield (
            f"**{len(found.codes)} versions of the code have made these runs** (column `code` of "
            "the file)."
        )


# --- bars -----------------------------------------------------------------------------------------


def _missed(found: _Found) -> Iterator[str]:
    """Yield the bars that a run does not keep."""
    lines, kept, unjudged = [], 0, 0
    for block in found.plan.file.rows:
        seeds = block.seeds or found.plan.file.seeds
        for row in found.plan.rows(block):
            for name, bound in block.bars.items():
                values = _VALUES[name](found, block, row)
                broken = [v for v in values if (v < bound if name.endswith("_min") else v > bound)]
                if broken:
                    worst = min(broken) if name.endswith("_min") else max(broken)
                    tables = ", ".join(map(str, block.tables))
                    label = name.rpartition("_")[0].replace("_", " ")
                    cells = (tables, str(row), label, f"{worst:.2f}", _bound(name, bound))
                    lines.append(f"| {' | '.join(cells)} |")
                elif len(values) == len(seeds):
                    kept += 1
                else:
                    unjudged += 1
    yield (
        f"## Bars\n\n{kept} are kept in every run, {len(lines)} are missed by at least one, and "
        f"for {unjudged} a run is not finished."
    )
    if lines:
        yield "\n".join(["| table | row | what | worst | bar |", "|---|---|---|---|---|", *lines])


def _bound(name: str, bound: float) -> str:
    return f"{'>=' if name.endswith('_min') else '<='} {bound:g}"


def _by_seed(
    found: _Found, block: Block, row: Row, measure: Callable[..., float], *methods: str
) -> list[float]:
    """Apply a measure to what some methods measured, seed by seed, where all are finished."""
    values = []
    for seed in block.seeds or found.plan.file.seeds:
        each = [found.measured(found.plan.cell(row, method, seed)) for method in methods]
        if all(measured is not None for measured in each):
            values.append(100 * measure(*each))
    return values


def _peers(found: _Found, block: Block) -> list[str]:
    return [m for m in found.plan.methods(block) if m not in ("none", "undefended")]


def _ba(measured: Measured) -> float:
    return float(measured["final"]["ba"])


def _asr(measured: Measured) -> float:
    return float(measured["final"]["asr"])


_VALUES: dict[str, Callable[[_Found, Block, Row], list[float]]] = {
    "undefended_asr_min": lambda f, b, r: _by_seed(f, b, r, _asr, "undefended"),
    "asr_max": lambda f, b, r: _by_seed(f, b, r, _asr, "none"),
    "ba_lost_max": lambda f, b, r: _by_seed(
        f, b, r, lambda plain, ours: _ba(plain) - _ba(ours), "undefended", "none"
    ),
    "precision_min": lambda f, b, r: _by_seed(
        f, b, r, lambda ours: ours["filter"]["precision"] or 0.0, "none"
    ),
    "recall_min": lambda f, b, r: _by_seed(
        f, b, r, lambda ours: ours["filter"]["recall"] or 0.0, "none"
    ),
    "asr_above_best_max": lambda f, b, r: _by_seed(
        *(f, b, r, lambda ours, *others: _asr(ours) - min(map(_asr, others))),
        *("none", *_peers(f, b)),
    ),
    "ba_below_best_max": lambda f, b, r: _by_seed(
        *(f, b, r, lambda ours, *others: max(map(_ba, others)) - _ba(ours)),
        *("none", *_peers(f, b)),
    ),
}


# --- tables ---------------------------------------------------------------------------------------


def _tables(found: _Found) -> Iterator[str]:
    for number in found.plan.tables:
        about = found.plan.file.tables[str(number)]
        yield f"## Table {number}: {about.title}"
        if about.note:
            yield about.note
        for methods, blocks in _alike(found, number):
            header = _HEADERS[about.shows](methods)
            lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
            for block in blocks:
                for row in found.plan.rows(block):
                    for cells in _LINES[about.shows](found, block, row, methods):
                        lines.append(f"| {row} | {' | '.join(cells)} |")
            yield "\n".join(lines)


def _alike(found: _Found, table: int) -> list[tuple[list[str], list[Block]]]:
    """Put the blocks of a table together that have the same methods."""
    alike: dict[tuple[str, ...], list[Block]] = {}
    for block in found.plan.blocks(table):
        alike.setdefault(tuple(found.plan.methods(block)), []).append(block)
    return [(list(methods), blocks) for methods, blocks in alike.items()]


def _scores(found: _Found, block: Block, row: Row, methods: Sequence[str]) -> Iterator[list[str]]:
    yield [_both(found.of(block, row, method)) for method in methods]


def _accuracy(found: _Found, block: Block, row: Row, methods: Sequence[str]) -> Iterator[list[str]]:
    yield [_spread([_ba(m) for m in found.of(block, row, method)], min) for method in methods]


def _filter(found: _Found, block: Block, row: Row, methods: Sequence[str]) -> Iterator[list[str]]:
    each = found.of(block, row, "none")
    filters = [measured["filter"] for measured in each]
    yield [
        ", ".join(str(one["poisoned"]) for one in filters) or NOT_RUN,
        ", ".join(str(one["dropped"]) for one in filters) or NOT_RUN,
        _spread([one["precision"] or 0.0 for one in filters], min),
        _spread([one["recall"] for one in filters if one["recall"] is not None], min),
    ]


def _reasr(found: _Found, block: Block, row: Row, methods: Sequence[str]) -> Iterator[list[str]]:
    for method in methods:
        each = found.of(block, row, method)
        sizes = list(each[0]["reasr"]) if each else []
        rates = [
            f"{float(size):.0%}: {100 * mean(m['reasr'][size] for m in each):.1f}" for size in sizes
        ]
        accuracy = _spread([_ba(measured) for measured in each], min)
        yield [method, accuracy, ", ".join(rates) or NOT_RUN]


_LINES: dict[str, Callable[[_Found, Block, Row, Sequence[str]], Iterator[list[str]]]] = {
    "scores": _scores,
    "accuracy": _accuracy,
    "filter": _filter,
    "reasr": _reasr,
}
_HEADERS: dict[str, Callable[[list[str]], list[str]]] = {
    "scores": lambda methods: ["BA / ASR", *methods],
    "accuracy": lambda methods: ["BA", *methods],
    "filter": lambda methods: ["dropped samples", "poisoned", "dropped", "precision", "recall"],
    "reasr": lambda methods: ["natural triggers", "method", "BA", "REASR by size"],
}


def _both(each: Sequence[Measured]) -> str:
    if not each:
        return NOT_RUN
    return f"{_spread([_ba(m) for m in each], min)} / {_spread([_asr(m) for m in each], max)}"


def _spread(shares: Sequence[float], worst: Callable[[Sequence[float]], float]) -> str:
    """Write the mean in percent, and the worst behind it if there are several."""
    if not shares:
        return NOT_RUN
    text = f"{100 * mean(shares):.2f}"
    return text if len(shares) == 1 else f"{text} ({100 * worst(shares):.2f}, n = {len(shares)})"


def _csv(found: _Found) -> str:
    """Write a line for each finished run."""
    tables: dict[Path, list[int]] = {}
    cells: dict[Path, Cell] = {}
    for number in found.plan.tables:
        for cell in found.plan.cells(number):
            tables.setdefault(cell.folder, []).append(number)
            cells[cell.folder] = cell
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for folder, cell in cells.items():
        measured = found.measured(cell)
        if measured is not None:
            writer.writerow(_line(cell, measured, tables[folder]))
    return stream.getvalue()


def _line(cell: Cell, measured: Measured, tables: Sequence[int]) -> dict[str, Any]:
    looks = measured["looks"]
    return {
        "tables": " ".join(map(str, tables)),
        **vars(cell.row),
        "method": cell.method,
        "seed": cell.run.seed,
        **measured["final"],
        **measured["filter"],
        "looks": len(looks),
        "neurons_reset": sum(look["reset"] for look in looks),
        "reasr": " ".join(f"{size}:{rate:.4f}" for size, rate in measured.get("reasr", {}).items()),
        "device": measured["device"],
        "code": measured["versions"].get("code", ""),
        "seconds": measured["timing"]["seconds"],
    }
