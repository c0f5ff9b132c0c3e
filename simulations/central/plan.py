"""Which runs the paper's tables are made of, at one scale: a file of names and rows.

A name stands for settings (``[models.nin]``), and each ``[[rows]]`` block is a product of names in
one table, as in a matrix.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from simulations import config, durations
from simulations.central.config import Run, build
from simulations.matrix import Seeds, Settings, Table, merge
from tasks.config import ConfigError

AXES = ("task", "model", "attack", "method")
MEASURES = ("scores", "accuracy", "reasr", "filter")
_ATTACKER_PREPARES = {"label-consistent": 1.5, "hidden-trigger": 2.0}
# What a method costs in units of ordinary training, before anything has been measured.
_DEARER = {
    "dp-sgd-4.0-0.1": 3.0,
    "dp-sgd-1.0-0.5": 3.0,
    "nad": 1.3,
    "activation-clustering": 2.1,
    "abl": 1.2,
    "fine-pruning": 1.2,
    "none": 1.6,
}


class Block(Table):
    """``[[rows]]``: a product of names; an axis that is left out takes its first name.

    `bars` are bounds in percent that every run has to keep: ``undefended_asr_min`` of those by
    "undefended", and of those by "none" ``asr_max``, ``ba_lost_max`` (against undefended),
    ``precision_min`` and ``recall_min`` of the samples that were dropped, and against the other
    methods of the row ``asr_above_best_max`` and ``ba_below_best_max``.
    """

    tables: Annotated[list[Annotated[int, Field(ge=1, le=8)]], Field(min_length=1)]
    tasks: list[str] | None = None
    models: list[str] | None = None
    attacks: list[str] | None = None
    methods: list[str] | Literal["all"] | None = None
    seeds: Seeds | None = None
    bars: dict[
        Literal[
            *("undefended_asr_min", "asr_max", "ba_lost_max", "precision_min", "recall_min"),
            *("asr_above_best_max", "ba_below_best_max"),
        ],
        float,
    ] = Field({})


class TableOf(Table):
    """``[tables.N]``: what a table of the paper is about, and which of the measures it shows."""

    title: str
    shows: Literal[MEASURES]  # type: ignore[valid-type]
    note: str = ""


class File(Table):
    """A whole file."""

    seeds: Seeds
    base: Settings = Field({})
    tasks: dict[str, Settings]
    models: dict[str, Settings]
    attacks: dict[str, Settings]
    methods: dict[str, Settings]
    tables: dict[str, TableOf]
    rows: Annotated[list[Block], Field(min_length=1)]


@dataclass(frozen=True)
class Row:
    """A place in a table: a name of each axis but the method."""

    task: str
    model: str
    attack: str

    def __str__(self) -> str:
        """Write it as people read it."""
        return f"{self.task}, {self.model}, {self.attack}"


@dataclass(frozen=True)
class Cell:
    """One run of a table.

    Attributes
    ----------
    row : Row
    method : str
    run : Run
    folder : Path
        Where its result is, or will be. Cells that would run the same share it.
    data_root : Path or None
        Folder that holds the data sets.
    device : str
        "cpu" or "cuda".
    """

    row: Row
    method: str
    run: Run = field(repr=False)
    folder: Path = field(repr=False)
    data_root: Path | None = field(repr=False, default=None)
    device: str = field(repr=False, default="cpu")
    rounds: int = 1

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.row}: {self.method}, seed {self.run.seed}"

    def at(self, folder: Path) -> Cell:
        """Return the same run with another folder."""
        return replace(self, folder=folder)

    @property
    def effort(self) -> float:
        """How much there is to train; see `durations.effort`."""
        run = self.run
        passes = run.train.epochs * _DEARER.get(run.method.name, 1.0)
        passes += run.train.epochs * _ATTACKER_PREPARES.get(run.attack.name, 0.0)
        if run.measure.reasr:
            passes *= 3
        return durations.effort(run.task.dataset, run.model.name, run.task.train_images, passes)

    @property
    def likenesses(self) -> tuple[Hashable, ...]:
        """What it has in common with others that take about as long, the most telling first."""
        what = self.run.task.dataset, self.run.model.name, self.device
        return (*what, self.run.method.name, self.run.attack.name), (*what, self.run.method.name)


class Plan:
    """A file of tables, and the runs that they are made of.

    Parameters
    ----------
    path : Path
        The file.
    out : Path
        Folder of the runs' folders.
    data_root : Path, optional
        Folder that holds the data sets.
    device : str
        "cpu" or "cuda".

    Raises
    ------
    ConfigError
        When the file cannot be read, or names what it does not define.
    """

    def __init__(
        self, path: Path, out: Path, data_root: Path | None = None, device: str = "cpu"
    ) -> None:
        self.path = path
        self.file = _validated(path)
        self._out, self._data_root, self._device = out, data_root, device
        self._built: dict[tuple[Row, str, int], Cell] = {}

    @property
    def tables(self) -> list[int]:
        """The tables that have rows, ascending."""
        return sorted({number for block in self.file.rows for number in block.tables})

    def blocks(self, table: int) -> list[Block]:
        """Return the blocks of a table, in the order of the file."""
        return [block for block in self.file.rows if table in block.tables]

    def cells(self, table: int) -> list[Cell]:
        """Return the runs of a table, in the order of the file and once each.

        Raises
        ------
        ConfigError
            Of the first that cannot be run, with its place.
        """
        found = [
            self.cell(row, method, seed)
            for block in self.blocks(table)
            for row in self.rows(block)
            for method in self.methods(block)
            for seed in block.seeds or self.file.seeds
        ]
        shows = self.file.tables[str(table)].shows if found else ""
        for cell in found:
            where = f"{self.path}, {cell.row}: table {table} needs"
            if shows in ("scores", "filter") and cell.run.attack.name == "none":
                raise ConfigError(f"{where} an attack")
            if shows == "reasr" and not cell.run.measure.reasr:
                raise ConfigError(f"{where} measure.reasr = true")
        return list({cell.folder: cell for cell in found}.values())

    def rows(self, block: Block) -> Iterator[Row]:
        """Yield the places of a block."""
        names = [
            getattr(block, f"{axis}s") or list(getattr(self.file, f"{axis}s"))[:1]
            for axis in AXES[:-1]
        ]
        return itertools.starmap(Row, itertools.product(*names))

    def methods(self, block: Block) -> list[str]:
        """Return the names of a block's methods."""
        if block.methods == "all":
            return list(self.file.methods)
        return block.methods or list(self.file.methods)[:1]

    def cell(self, row: Row, method: str, seed: int) -> Cell:
        """Return the run at a place."""
        key = row, method, seed
        if key not in self._built:
            run = self._run(row, method, seed)
            self._built[key] = Cell(
                row,
                method,
                run,
                (self._out / _folder(run, self._device)).absolute(),
                self._data_root,
                self._device,
            )
        return self._built[key]

    def _run(self, row: Row, method: str, seed: int) -> Run:
        document: Settings = copy.deepcopy(self.file.base)
        for axis, name in zip(AXES, (row.task, row.model, row.attack, method), strict=True):
            merge(document, getattr(self.file, f"{axis}s")[name])
        try:
            return build(document, seed)
        except ConfigError as error:
            raise ConfigError(f"{self.path}, {row}: {method}: {error}") from None


def _folder(run: Run, device: str) -> str:
    """Name the folder of a run: by what it is about, and a digest of everything that it reads."""
    what = {**run.identity(), "device": device}
    words = [run.task.dataset, run.model.name, run.attack.name, run.method.name, f"s{run.seed}"]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
    return "-".join([*words, digest])


def _validated(path: Path) -> File:
    document: dict[str, Any] = config.read(path)
    try:
        file = File.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where} is not legal: {first['msg']}") from None
    for number, block in enumerate(file.rows, start=1):
        for axis in AXES:
            chosen = getattr(block, f"{axis}s")
            known = getattr(file, f"{axis}s")
            for name in chosen if isinstance(chosen, list) else ():
                if name not in known:
                    raise ConfigError(
                        f"{path}: {axis}s of [[rows]] {number}: {name} is not known: expected one "
                        f"of {', '.join(known)}"
                    )
        _check_methods(f"{path}: [[rows]] {number}", block, file)
        for table in block.tables:
            if str(table) not in file.tables:
                raise ConfigError(
                    f"{path}: [[rows]] {number} names table {table}, which is not there"
                )
    return file


def _check_methods(where: str, block: Block, file: File) -> None:
    """Refuse bars, and tables, that are about methods which the rows do not have."""
    methods = list(file.methods) if block.methods == "all" else block.methods or []
    shown = [file.tables[str(n)].shows for n in block.tables if str(n) in file.tables]
    needed = {"none"} if "filter" in shown else set()
    for bar in block.bars:
        needed |= {"undefended"} if bar == "undefended_asr_min" else {"none"}
        needed |= {"undefended"} if bar == "ba_lost_max" else set()
        if "best" in bar and not set(methods) - {"none", "undefended"}:
            raise ConfigError(f"{where}: the bar {bar} needs another method to compare with")
    if missing := sorted(needed - set(methods)):
        raise ConfigError(f'{where} needs the method "{missing[0]}", for its bars or its tables')
