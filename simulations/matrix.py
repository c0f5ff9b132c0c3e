"""Which experiments to run together: axes, and the blocks of cells that are chosen from them.

An axis gives names to settings (``[attacks.dba-t2]``). Each ``[[cells]]`` block is a product of
names; a cell is one name of each axis, a number of malicious clients and a seed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from simulations import config, identity
from simulations.config import ConfigError, Experiment

AXES = ("task", "partition", "attack", "reporter", "defense")
_TABLE = {axis: f"{axis}s" for axis in AXES}
MEASURES = (
    *("ba_final", "asr_final", "recovered_final", "ba_worst_last5", "asr_worst_last5"),
    *("neurons_reset", "suspected_precision", "suspected_recall"),
    *("quarantined_precision", "quarantined_recall", "honest_quarantined", "honest_left_out"),
    "attackers_late",
    *("filter_precision", "filter_recall", "certified", "supported", "contested"),
    *(
        f"{score}_{side}_{other}"
        for score in ("ba", "asr", "recovered", "ba_worst", "asr_worst")
        for side in ("above", "below")
        for other in ("clean", "undefended")
    ),
)


class Table(BaseModel):
    """A table of the file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _seeds(value: Any) -> Any:
    return list(range(value)) if isinstance(value, int) else value


Seeds = Annotated[list[int], BeforeValidator(_seeds), Field(min_length=1)]
Names = list[str] | Literal["all"] | None
Settings = dict[str, dict[str, Any]]


class Block(Table):
    """``[[cells]]``: a product of names; an axis that is left out takes its first name."""

    tasks: Names = None
    partitions: Names = None
    attacks: Names = None
    reporters: Names = None
    defenses: Names = None
    malicious: list[int] | Literal["all"] | None = None
    seeds: Seeds | None = None


class Bar(BaseModel):
    """``[[bars]]``: what cells have to reach; other keys are bounds, ``MEASURE_min`` or ``_max``.

    ``tried`` says what has been tried where it is missed.

    Scores are in percent. ``ba_below_clean_max = 1.0`` compares with the undefended run without an
    attacker, and ``asr_above_undefended_max`` with the undefended run under the same attack, seed
    by seed; ``ba_worst_...`` and ``asr_worst_...`` compare the worst of the last five rounds with
    the other run's worst.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str
    where: dict[str, str | int | list[str] | list[int]]
    tried: str = ""

    @property
    def bounds(self) -> dict[str, tuple[str, float]]:
        """Each measure with "min" or "max", and the bound; ordered as in the file."""
        return {
            measure: (side, float(bound))
            for key, bound in (self.model_extra or {}).items()
            for measure, _, side in [key.rpartition("_")]
        }


class Peers(Table):
    """``[peers]``: the defence that has to be the best of all, and by how much it may be not."""

    defense: str
    others: list[str]
    undefended_asr_above: float = 40.0
    asr_within: float = 0.5
    ba_within: float = 0.5


class Report(Table):
    """``[report]``: names of the files that are written into the folder of documents."""

    title: str = "Results"
    page: str = "results.md"
    cells: str = "results.csv"
    timing: str = "results-timing.csv"
    bars: str = "results-bars.csv"
    images: str = "matrix"
    benchmarks: list[str] = []  # JSON files that `python -m benchmarks` wrote: shown if they exist


class File(Table):
    """A whole file."""

    base: Settings = {}
    tasks: dict[str, Settings]
    partitions: dict[str, Settings]
    attacks: dict[str, Settings]
    reporters: dict[str, Settings]
    defenses: dict[str, Settings]
    malicious: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    seeds: Seeds
    cells: Annotated[list[Block], Field(min_length=1)]
    bars: list[Bar] = []
    peers: Peers | None = None
    report: Report = Report()


@dataclass(frozen=True)
class Point:
    """A place in the matrix, without the seed: a name of each axis."""

    task: str
    partition: str
    attack: str
    reporter: str
    malicious: int
    defense: str

    def __str__(self) -> str:
        """Write it as ``--only`` reads it."""
        return "/".join(str(value) for value in vars(self).values())


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes
    ----------
    point : Point
    seed : int
    experiment : Experiment
        What is run; its output folder is the cell's own.
    """

    point: Point
    seed: int
    experiment: Experiment = field(repr=False, compare=False)

    def __str__(self) -> str:
        """Write it as ``--only`` reads it."""
        return f"{self.point}/s{self.seed}"

    @property
    def folder(self) -> Path:
        """Where its result is, or will be. Cells that would run the same share it."""
        return Path(self.experiment.run.output)


class Matrix:
    """A file of axes and cells, and the experiments that they stand for.

    Parameters
    ----------
    path : Path
        The file.
    out : Path
        Folder of the cells' folders.
    data_root : Path, optional
        Folder that holds the data sets.

    Raises
    ------
    ConfigError
        When the file cannot be read, or names what it does not define.
    """

    def __init__(self, path: Path, out: Path, data_root: Path | None = None) -> None:
        self.path = path
        self.file = _validated(path, config.read(path))
        self._where: dict[str, Any] = {"workers": 1, "checkpoints": False}
        if data_root is not None:
            self._where["data_root"] = str(data_root)
        self._out = out
        self._built: dict[tuple[Point, int], Cell] = {}
        self.chosen = list(dict.fromkeys(self._chosen()))
        self._check_bars()

    def cells(self, *, everything: bool = False) -> list[Cell]:
        """Return the chosen cells, and with `everything` the product of all axes.

        The first seed of every place comes before the second of any. Of the product, a cell that
        would run what an earlier one does is left out.

        Raises
        ------
        ConfigError
            Of the first cell that cannot be run, with its place.
        """
        cells = [self.cell(*each) for each in sorted(self.chosen, key=lambda each: each[1])]
        if everything:
            seen = {cell.folder for cell in cells}
            for seed in self.file.seeds:
                for point in self._product(Block(**dict.fromkeys(_TABLE.values(), "all"))):
                    cell = self.cell(point, seed)
                    if cell.folder not in seen:
                        seen.add(cell.folder)
                        cells.append(cell)
        return cells

    def cell(self, point: Point, seed: int) -> Cell:
        """Return the cell at a place, whether it was chosen or not."""
        key = point, seed
        if key not in self._built:
            self._built[key] = Cell(point, seed, self._experiment(point, seed))
        return self._built[key]

    @property
    def no_attacker(self) -> str | None:
        """Name of the attack by nobody."""
        return self._named("attacks", "attack", "none")

    @property
    def undefended(self) -> str | None:
        """Name of plain averaging."""
        return self._named("defenses", "defense", "undefended")

    def first(self, axis: str) -> Any:
        """Return what an axis takes when nothing is said."""
        return next(iter(getattr(self.file, _TABLE.get(axis, axis))))

    def spelled(self, point: Point) -> str:
        """Name a place for people, without the defence."""
        words = [point.task, point.partition]
        if point.attack == self.no_attacker:
            words.append("no attacker")
        else:
            words += [point.attack, malicious_clients(point.malicious)]
            if point.reporter != self.first("reporter"):
                words.append(f"reports: {point.reporter}")
        return ", ".join(words)

    def matching(self, where: Mapping[str, Any]) -> list[Point]:
        """Return the chosen places whose names are, or are among, those given."""
        return [
            point
            for point in dict.fromkeys(point for point, _ in self.chosen)
            if all(
                getattr(point, axis) in (names if isinstance(names, list) else [names])
                for axis, names in where.items()
            )
        ]

    def _chosen(self) -> Iterator[tuple[Point, int]]:
        for block in self.file.cells:
            for point in self._product(block):
                for seed in block.seeds or self.file.seeds:
                    yield point, seed

    def _product(self, block: Block) -> Iterator[Point]:
        axes = [self._names(block, table) for table in (*_TABLE.values(), "malicious")]
        for task, partition, attack, reporter, defense, malicious in itertools.product(*axes):
            yield Point(task, partition, attack, reporter, malicious, defense)

    def _names(self, block: Block, table: str) -> list[Any]:
        names, defined = getattr(block, table), list(getattr(self.file, table))
        if names is None:
            return defined[:1]
        return defined if names == "all" else names

    def _experiment(self, point: Point, seed: int) -> Experiment:
        document: Settings = copy.deepcopy(self.file.base)
        for axis in AXES:
            merge(document, getattr(self.file, _TABLE[axis])[getattr(point, axis)])
        merge(document, {"attack": {"malicious": point.malicious}})
        merge(document, {"experiment": {"seed": seed, "name": "cell"}, "run": self._where})
        try:
            experiment = config.build(document)
        except ConfigError as error:
            raise ConfigError(f"{self.path}, cell {point}/s{seed}: {error}") from None
        what = experiment.identity()
        named = experiment.experiment.model_copy(update={"name": identity.label(what)})
        where = experiment.run.model_copy(
            update={"output": str((self._out / identity.folder(what)).absolute())}
        )
        return experiment.model_copy(update={"experiment": named, "run": where})

    def _named(self, table: str, section: str, name: str) -> str | None:
        settings: Mapping[str, Settings] = getattr(self.file, table)
        found = (key for key, each in settings.items() if each.get(section, {}).get("name") == name)
        return next(found, None)

    def _check_bars(self) -> None:
        for bar in self.file.bars:
            unknown = [axis for axis in bar.where if axis not in Point.__dataclass_fields__]
            if unknown:
                raise ConfigError(
                    f"{self.path}: bars.where.{unknown[0]} is not a known key: expected one of "
                    f"{', '.join(Point.__dataclass_fields__)}"
                )
            if not self.matching(bar.where):
                raise ConfigError(f'{self.path}: the bar "{bar.name}" matches none of [[cells]]')


def malicious_clients(number: int) -> str:
    """Write how many clients attack."""
    return f"{number} malicious client{'s' if number != 1 else ''}"


def merge(document: Settings, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Write settings over a document, key by key."""
    for section, values in settings.items():
        document.setdefault(section, {}).update(values)


def _validated(path: Path, document: Mapping[str, Any]) -> File:
    try:
        file = File.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where} is not legal: {first['msg']}") from None
    for number, block in enumerate(file.cells, start=1):
        for table in (*_TABLE.values(), "malicious"):
            chosen, defined = getattr(block, table), list(getattr(file, table))
            if isinstance(chosen, list):
                _check_names(f"{path}: {table} of [[cells]] {number}", chosen, defined)
    for bar in file.bars:
        _check_names(
            f'{path}: a bound of the bar "{bar.name}"',
            [key.rpartition("_")[0] for key in bar.model_extra or {}],
            MEASURES,
        )
        for key, bound in (bar.model_extra or {}).items():
            number = isinstance(bound, int | float) and not isinstance(bound, bool)
            if key.rpartition("_")[2] not in ("min", "max") or not number:
                raise ConfigError(
                    f'{path}: {key} = {bound} of the bar "{bar.name}" is not legal: expected a '
                    "number, and a key that ends with _min or _max"
                )
    if file.peers is not None:
        defences = [file.peers.defense, *file.peers.others]
        _check_names(f"{path}: peers", defences, list(file.defenses))
    return file


def _check_names(what: str, names: Sequence[Any], known: Sequence[Any]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{what}: {name} is not known: expected one of {', '.join(map(str, known))}"
            )
