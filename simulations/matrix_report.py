"""What a matrix has found: a tidy table, the bars that were missed, and a page with all of it."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from simulations import matrix_peers, matrix_plots, pool, results
from simulations.matrix import Bar, Cell, Matrix, Peers, Point, malicious_clients

Row = dict[str, Any]
NOT_RUN = "not run"
SCORES = ("ba", "asr", "recovered")
LABELS = {
    "ba_final": "BA",
    "asr_final": "ASR",
    "recovered_final": "recovered accuracy",
    "ba_worst_last5": "worst BA of the last 5 rounds",
    "asr_worst_last5": "worst ASR of the last 5 rounds",
    "neurons_reset": "neurons reset",
    "honest_quarantined": "honest clients quarantined",
    "honest_left_out": "honest updates left out of one round",
    "attackers_late": "attackers not quarantined in time",
    "ba_below_clean": "BA lost",
    "asr_above_clean": "ASR above that without an attacker",
    "ba_worst_below_clean": "BA lost, worst of the last 5 rounds",
    "ba_below_undefended": "BA below the undefended run's",
    "ba_worst_below_undefended": "BA below the undefended run's, worst of the last 5 rounds",
    "asr_worst_above_clean": "ASR above that without an attacker, worst of the last 5 rounds",
}
# All else is in percent.
COUNTED = {"neurons_reset", "honest_quarantined", "honest_left_out", "attackers_late"}
# An attack takes effect in the first of two rounds in a row in which so many stamped images are
# misled by a model that is right about so many clean ones (a young one may take anything for the
# target), and an attacker is late if it is not quarantined so many rounds after that.
EFFECT, USEFUL, IN_TIME = 0.1, 0.5, 5


class Findings:
    """The rows of all cells of a matrix, and the rows that they are compared with.

    Parameters
    ----------
    matrix : Matrix
    cells : sequence of Cell
        What the page is about.
    known : mapping of str to Row, optional
        Rows of runs that were made elsewhere, by the names of their folders; see `known.read`.
    """

    def __init__(
        self, matrix: Matrix, cells: Sequence[Cell], known: Mapping[str, Row] | None = None
    ) -> None:
        self.matrix, self.cells, self.known = matrix, cells, known or {}
        self._read: dict[Path, Row | None] = {}
        self._seeds: dict[Point, list[int]] = {}
        for cell in cells:
            self._seeds.setdefault(cell.point, []).append(cell.seed)

    @property
    def points(self) -> list[Point]:
        """All places, in the order of the file."""
        return list(self._seeds)

    def row(self, cell: Cell) -> Row | None:
        """Return what a cell measured, or None if it is not finished."""
        if cell.folder not in self._read:
            done = pool.finished(cell.folder)
            elsewhere = self.known.get(cell.folder.name)
            self._read[cell.folder] = measured(results.load(cell.folder)) if done else elsewhere
        return self._read[cell.folder]

    def rows(self, point: Point) -> dict[int, Row]:
        """Return what the finished seeds of a place measured.

        A place that was not chosen has those of a place that would run the same: what lying
        reporters say makes no difference to a strategy that asks for no reports.
        """
        seeds = self._seeds.get(point) or self._all_seeds
        found = ((seed, self.row(self.matrix.cell(point, seed))) for seed in seeds)
        return {seed: row for seed, row in found if row is not None}

    @property
    def _all_seeds(self) -> list[int]:
        return sorted({seed for seeds in self._seeds.values() for seed in seeds})

    def wanted(self, point: Point) -> int:
        """Return the number of seeds that were chosen for a place."""
        return len(self._seeds.get(point, ()))

    def clean(self, point: Point) -> Point:
        """Return the place of the undefended run that nobody attacks."""
        undefended = self.undefended(point)
        attack = self.matrix.no_attacker or point.attack
        return replace(undefended, attack=attack, reporter=self.matrix.first("reporter"))

    def undefended(self, point: Point) -> Point:
        """Return the place of the undefended run under the same attack."""
        return replace(point, defense=self.matrix.undefended or point.defense)

    def measure(self, point: Point, name: str) -> dict[int, float]:
        """Return a measure of each finished seed, as the bounds of bars name them."""
        rows = self.rows(point)
        score, _, rest = name.partition("_")
        worst = rest.startswith("worst_") and rest != "worst_last5"
        side, _, other = rest.removeprefix("worst_").partition("_")
        if side not in ("above", "below"):
            return {s: row[name] for s, row in rows.items() if row[name] is not None}
        compared = f"{score}_worst_last5" if worst else f"{score}_final"
        against = self.rows(self.clean(point) if other == "clean" else self.undefended(point))
        sign = 1 if side == "above" else -1
        return {
            seed: sign * (row[compared] - against[seed][compared])
            for seed, row in rows.items()
            if seed in against
        }

    def mean(self, point: Point, name: str) -> float | None:
        """Return the mean of a measure over the finished seeds; None without any."""
        values = self.measure(point, name).values()
        return mean(values) if values else None


def measured(result: Mapping[str, Any]) -> Row:
    """Return what the tidy table says of a finished run; scores in percent."""
    rounds, malicious = result["rounds"], set(result["truth"]["malicious"])
    suspected = {client for entry in rounds for client in entry["suspected"]}
    first: dict[int, int] = {}
    for entry in rounds:
        for client in entry["quarantined"]:
            first.setdefault(client, entry["round"])
    row: Row = {"rounds": rounds[-1]["round"]}
    row |= {f"{score}_final": _percent(result["final"][score]) for score in SCORES}
    row |= {f"{score}_worst_last5": _percent(result["worst_last5"][score]) for score in SCORES[:2]}
    row["neurons_reset"] = sum(entry["neurons_reset"] for entry in rounds)
    for name, named in (("suspected", suspected), ("quarantined", set(first))):
        hits = len(named & malicious)
        row[f"{name}_precision"] = _percent(hits / len(named)) if named else None
        row[f"{name}_recall"] = _percent(hits / len(malicious)) if malicious else None
    row["first_quarantined"] = " ".join(
        f"{client}:{first[client]}" for client in sorted(malicious & set(first))
    )
    row["honest_quarantined"] = len(set(first) - malicious)
    row["honest_left_out"] = sum(
        len(set(entry.get("left_out", [])) - malicious) for entry in rounds
    )
    row["first_effective"], row["attackers_late"] = _late(rounds, malicious, first)
    for name in ("precision", "recall"):
        row[f"filter_{name}"] = _percent(result["filter"][name])
    certificates = result.get("certificates", {})
    decisions = sum(certificates.get(name, 0) for name in _CERTIFICATES)
    for name in _CERTIFICATES:
        row[name] = _percent(certificates.get(name, 0) / decisions) if decisions else None
    row["bytes"] = sum(sum(entry["bytes"].values()) for entry in rounds)
    row["code"] = result.get("versions", {}).get("code", "")
    row["seconds"] = result["timing"]["seconds"]
    return row


def _late(
    rounds: Sequence[Mapping[str, Any]], malicious: set[int], first: Mapping[int, int]
) -> tuple[int | None, int | None]:
    """Return when the attack first took effect, and how many attackers were not out in time.

    None are late if it never did, and if the run ended before they could be, nobody knows.
    """
    works = [bool(malicious) and e["asr"] >= EFFECT and e["ba"] >= USEFUL for e in rounds]
    effective = (e["round"] for e, *two in zip(rounds, works, works[1:], strict=False) if all(two))
    begin = next(effective, None)
    last = rounds[-1]["round"]
    if begin is None:
        return None, 0
    due = begin + IN_TIME
    if due > last:
        return begin, None if malicious - set(first) else 0
    return begin, sum(first.get(client, last + 1) > due for client in malicious)


_CERTIFICATES = ("certified", "supported", "contested")


def write(
    matrix: Matrix,
    cells: Sequence[Cell],
    docs: Path,
    known: Mapping[str, Row] | None = None,
) -> list[Path]:
    """Write the tables, the figures and the page.

    Parameters
    ----------
    matrix : Matrix
    cells : sequence of Cell
        All that the page is about, finished or not.
    docs : Path
        Folder of the files that ``[report]`` names.
    known : mapping of str to Row, optional
        Rows of runs that were made elsewhere.
    """
    found, names = Findings(matrix, cells, known), matrix.file.report
    (docs / "images").mkdir(parents=True, exist_ok=True)
    verdicts = [verdict for bar in matrix.file.bars for verdict in judge(found, bar)]
    tidy, timing = tidied(found)
    files = [results.write_text(docs / names.cells, _csv(tidy))]
    files.append(results.write_text(docs / names.timing, _csv(timing)))
    if verdicts:
        lines = [bar_line(found, verdict) for verdict in verdicts]
        files.append(results.write_text(docs / names.bars, _csv(lines)))
    figures = matrix_plots.draw(found, docs / "images", names.images)
    page = Page(found, verdicts, figures, [docs / name for name in names.benchmarks]).text()
    return [results.write_text(docs / names.page, page), *files, *figures.values()]


def tidied(found: Findings) -> tuple[list[Row], list[Row]]:
    """Return a row for each cell, finished or not, and apart from it one with its seconds."""
    tidy, timing = [], []
    columns = measured(_NOTHING)
    for cell in found.cells:
        row = found.row(cell)
        state = "failed" if pool.failed(cell.folder) else NOT_RUN if row is None else "finished"
        place = {**vars(cell.point), "seed": cell.seed, "run": cell.folder.name, "state": state}
        full = place | (row or dict.fromkeys(columns, ""))
        seconds = full.pop("seconds")
        tidy.append({k: "" if v is None else v for k, v in full.items()})
        timing.append({**place, "seconds": seconds})
    return tidy, timing


_NOTHING: Mapping[str, Any] = {
    "rounds": [
        {
            **{"round": 0, "suspected": [], "left_out": [], "quarantined": []},
            **{"neurons_reset": 0, "bytes": {}},
        }
    ],
    "truth": {"malicious": []},
    "final": dict.fromkeys(SCORES, 0),
    "worst_last5": dict.fromkeys(SCORES, 0),
    "filter": {"precision": None, "recall": None},
    "timing": {"seconds": 0},
}


@dataclass(frozen=True)
class Check:
    """One bound of a bar at one place: the values by seed, and how they compare."""

    measure: str
    side: str
    bound: float
    values: Mapping[int, float]

    def holds(self, value: float) -> bool:
        """Whether a value is within the bound."""
        return value <= self.bound if self.side == "max" else value >= self.bound

    @property
    def worst(self) -> float:
        """The value farthest on the wrong side."""
        return max(self.values.values()) if self.side == "max" else min(self.values.values())

    @property
    def missed_by(self) -> str:
        """Say what misses the bound: the mean, or single seeds; nothing if none does."""
        if not self.values:
            return ""
        if not self.holds(mean(self.values.values())):
            return "mean"
        seeds = [str(seed) for seed, value in self.values.items() if not self.holds(value)]
        return f"seed {', '.join(seeds)}" if seeds else ""

    @property
    def wanted(self) -> str:
        """Write the bound in words."""
        relative = "_below_" in self.measure or "_above_" in self.measure
        unit = "" if self.measure in COUNTED else " points" if relative else " %"
        sign = "<=" if self.side == "max" else ">="
        return f"{_label(self.measure)} {sign} {self.bound:g}{unit}"

    def text(self) -> str:
        """Write mean and worst."""
        return _mean_worst(self.values.values(), lambda _: self.worst) or NOT_RUN


@dataclass(frozen=True)
class Verdict:
    """A bar at one place."""

    bar: str
    name: str
    point: Point
    checks: Sequence[Check]
    seeds: int
    wanted: int
    tried: str = ""

    @property
    def state(self) -> str:
        """Say whether it holds: "held", "missed", "missed by seed 1", "not run", or nothing."""
        if any(not check.values for check in self.checks) or not self.seeds:
            return NOT_RUN
        missed = [check.missed_by for check in self.checks if check.missed_by]
        if "mean" in missed:
            return "**missed**"
        if missed:
            return f"missed by {missed[0]}"
        return "held" if self.checks else ""


def judge(found: Findings, bar: Bar) -> list[Verdict]:
    """Judge a bar at each place that it is for."""
    points = found.matrix.matching(bar.where)
    verdicts = []
    for point in points:
        differing = [
            str(value)
            for axis, value in vars(point).items()
            if len({getattr(each, axis) for each in points}) > 1
        ]
        name = f"{bar.name} ({', '.join(differing)})" if differing else bar.name
        checks = [
            Check(measure, side, bound, found.measure(point, measure))
            for measure, (side, bound) in bar.bounds.items()
        ]
        seeds, wanted = len(found.rows(point)), found.wanted(point)
        verdicts.append(Verdict(bar.name, name, point, checks, seeds, wanted, bar.tried))
    return verdicts


def bar_line(found: Findings, verdict: Verdict) -> Row:
    """Return a bar as a row: mean over the seeds and the worst in brackets, scores in percent."""
    rows = list(found.rows(verdict.point).values())
    lower = any(c.measure == "asr_final" and c.side == "min" for c in verdict.checks)

    def known(name: str, worst: Callable[..., Any], digits: int = 2) -> str:
        return _mean_worst((row[name] for row in rows), worst, digits)

    compared = any(check.measure == "ba_below_clean" for check in verdict.checks)
    lost = found.measure(verdict.point, "ba_below_clean").values() if compared else ()
    return {
        "run": verdict.name,
        "bar": ", ".join(check.wanted for check in verdict.checks),
        "verdict": verdict.state.strip("*"),
        "seeds": verdict.seeds,
        "BA final": known("ba_final", min),
        "ASR final": known("asr_final", min if lower else max),
        "BA worst of last 5": known("ba_worst_last5", min),
        "ASR worst of last 5": known("asr_worst_last5", max),
        "recovered final": known("recovered_final", min),
        "BA lost": _mean_worst(lost, max),
        "neurons reset": known("neurons_reset", max, digits=0),
        "filter precision": known("filter_precision", min, digits=1),
        "filter recall": known("filter_recall", min, digits=1),
        "seconds": round(mean(row["seconds"] for row in rows)) if rows else "",
    }


class Page:
    """The page of a matrix, as Markdown.

    Parameters
    ----------
    found : Findings
    verdicts : sequence of Verdict
    figures : mapping of str to Path
        Title and file of each figure, below the folder of the page.
    benchmarks : sequence of Path
        What ``python -m benchmarks`` wrote, below that folder, to be shown.
    """

    def __init__(
        self,
        found: Findings,
        verdicts: Sequence[Verdict],
        figures: Mapping[str, Path],
        benchmarks: Sequence[Path] = (),
    ) -> None:
        self._found, self._verdicts, self._figures = found, verdicts, figures
        self._benchmarks = benchmarks

    def text(self) -> str:
        """Write the page; what is missed comes first."""
        parts = [
            f"# {self._found.matrix.file.report.title}",
            self._head(),
            *self._missed(),
            *self._bars(),
            *self._tables(),
            *self._decisions(),
            *(part for file in self._benchmarks for part in _benchmark(file)),
            *self._plots(),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _head(self) -> str:
        found, names = self._found, self._found.matrix.file.report
        runs = {cell.folder: found.row(cell) for cell in found.cells}
        done = sum(row is not None for row in runs.values())
        broken = sum(pool.failed(folder) for folder in runs)
        state = f"{done} of {len(runs)} runs are finished"
        if broken:
            state += f", {broken} failed"
        codes = {row["code"] for row in map(found.row, found.cells) if row is not None}
        if len(codes) > 1:
            state += f" (**by {len(codes)} versions of the code**: column `code` of the table)"
        return (
            f"Written by `python -m simulations matrix {_shown(found.matrix.path)}`: {state}. "
            f"Scores are in percent of {self._images()}. BA: accuracy on clean images. ASR: "
            f"images not of the target class that carry the whole trigger and are taken for the "
            f"target class. Each run by itself: [{names.cells}]({names.cells}); seconds: "
            f"[{names.timing}]({names.timing})."
        )

    def _images(self) -> str:
        held_out = {cell.experiment.task.held_out for cell in self._found.cells}
        return {
            frozenset({True}): "training images that were held out",
            frozenset({False}): "test images",
        }.get(frozenset(held_out), "test images, or of training images that were held out")

    def _missed(self) -> list[str]:
        parts = []
        missed = [
            {
                "run": verdict.name,
                "wanted": check.wanted,
                "mean (worst)": check.text(),
                "seeds": verdict.seeds,
                "missed by": check.missed_by,
                "what was tried": verdict.tried,
            }
            for verdict in self._verdicts
            for check in verdict.checks
            if check.missed_by
        ]
        missed += [row for file in self._benchmarks for row in _missed_by_benchmark(file)]
        if not any(row["what was tried"] for row in missed):
            missed = [{k: v for k, v in row.items() if k != "what was tried"} for row in missed]
        judged = [v for v in self._verdicts if v.checks]
        unknown = sum(verdict.state == NOT_RUN for verdict in judged)
        if judged:
            held = [verdict for verdict in judged if verdict.state == "held"]
            early = sum(verdict.seeds < verdict.wanted for verdict in held)
            rest = f", {early} of them on the seeds so far" if early else ""
            rest += f"; {unknown} cannot be judged yet" if unknown else ""
            parts += [f"{len(held)} of {len(judged)} bars are held{rest}.", _table(missed)]
        if self._found.matrix.file.peers is not None:
            parts += self._peers(self._found.matrix.file.peers)
        return ["## Missed", *parts] if parts else []

    def _peers(self, peers: Peers) -> list[str]:
        rows, places, open_ = matrix_peers.beaten(self._found, peers)
        text = (
            f"**{peers.defense} beside its peers.** Where the undefended ASR is above "
            f"{peers.undefended_asr_above:g} %, no peer's ASR should be lower by more than "
            f"{peers.asr_within:g} points, and of the peers with the lowest ASR (and those within "
            f"{peers.asr_within:g} points of it) none's BA higher by more than "
            f"{peers.ba_within:g}: on the seeds that both were run with, in the last round and in "
            f"the worst of the last five. It is otherwise in {len(rows)} of {places} places; "
            f"{open_} cannot be judged yet."
        )
        return [text, _table(rows)]

    def _bars(self) -> list[str]:
        if not self._verdicts:
            return []
        begun = [verdict for verdict in self._verdicts if verdict.seeds]
        lines = [bar_line(self._found, verdict) for verdict in begun]
        for line, verdict in zip(lines, begun, strict=True):
            line["verdict"] = verdict.state
            if verdict.seeds < verdict.wanted:
                line["seeds"] = f"{verdict.seeds} of {verdict.wanted}"
            del line["seconds"]
        text = "Mean over the seeds, the worst in brackets."
        parts = ["## Bars", text, _table(lines)] if begun else ["## Bars"]
        places = Counter(verdict.bar for verdict in self._verdicts if not verdict.seeds)
        if places:
            each = (
                f"{bar} ({count} places)" if count > 1 else bar for bar, count in places.items()
            )
            parts.append(f"Not run yet: {'; '.join(each)}.")
        return parts

    def _tables(self) -> list[str]:
        """One table for each task, partition and number of malicious clients, split by reporter."""
        found, parts, waiting = self._found, ["## All defences"], list[str]()
        parts.append(
            "Each field: BA, below it ASR; mean over the seeds and their range in brackets."
        )
        honest = found.matrix.first("reporter")
        usual = found.matrix.first("malicious")
        for place, points in _grouped(found.points, "task", "partition", "malicious"):
            attacked = [p for p in points if p.attack != found.matrix.no_attacker]
            if not attacked and place[2] != usual:
                continue
            if not any(map(found.rows, points)):
                waiting.append(", ".join((*place[:2], malicious_clients(place[2]))))
                continue
            defenses = _in_order(found.matrix.file.defenses, (p.defense for p in points))
            lying = [p for p in attacked if p.reporter != honest]
            for what, chosen in (
                ("", [p for p in attacked if p not in lying]),
                (", attackers that lie in their reports", lying),
            ):
                if chosen or (not what and not lying):
                    title = f"### {place[0]}, {place[1]}, {malicious_clients(place[2])}{what}"
                    parts += [title, self._grid(points[0], chosen, defenses)]
        if waiting:
            parts.append(f"Nothing is finished yet of: {'; '.join(waiting)}.")
        return parts

    def _grid(self, any_point: Point, chosen: Sequence[Point], defenses: Sequence[str]) -> str:
        matrix, found = self._found.matrix, self._found
        if matrix.undefended and matrix.undefended not in defenses:
            defenses = [matrix.undefended, *defenses]
        columns: list[tuple[str, str]] = list(dict.fromkeys((p.attack, p.reporter) for p in chosen))
        if matrix.no_attacker:
            columns.insert(0, (matrix.no_attacker, matrix.first("reporter")))
        lines = []
        for defense in defenses:
            line: Row = {"defence": defense}
            for attack, reporter in columns:
                point = replace(any_point, attack=attack, reporter=reporter, defense=defense)
                if attack == matrix.no_attacker:
                    name = "no attacker"
                else:
                    name = (
                        attack if reporter == matrix.first("reporter") else f"{attack}, {reporter}"
                    )
                line[name] = field(list(found.rows(point).values()), found.wanted(point))
            lines.append(line)
        return _table(lines)

    def _decisions(self) -> list[str]:
        """Write what our defence decided: whom it named, and what it took from honest clients."""
        found = self._found
        peers = found.matrix.file.peers
        ours = peers.defense if peers else None
        lines = []
        for point in found.points:
            rows = list(found.rows(point).values())
            if point.defense != ours or not rows:
                continue
            pairs = {
                name: " / ".join(
                    _mean_worst((row[f"{kind}_{side}"] for row in rows), min, 1) or "-"
                    for side in ("precision", "recall")
                )
                for name, kind in (
                    ("suspects: precision / recall", "suspected"),
                    ("quarantine: precision / recall", "quarantined"),
                    ("filter: precision / recall", "filter"),
                )
            }
            shares = [_mean_worst((row[name] for row in rows), min, 1) for name in _CERTIFICATES]
            lines.append(
                {
                    "where": found.matrix.spelled(point),
                    "seeds": len(rows),
                    "neurons reset": _mean_worst((r["neurons_reset"] for r in rows), max, 0),
                    **pairs,
                    "honest quarantined": _mean_worst(
                        (row["honest_quarantined"] for row in rows), max
                    ),
                    "certified / supported / contested": " / ".join(s or "-" for s in shares),
                }
            )
        if not lines:
            return []
        text = "Mean over the seeds, the worst in brackets; over all rounds of a run."
        return [f"## What {ours} decided", self._left_out(ours), text, _table(lines)]

    def _left_out(self, ours: str | None) -> str:
        """Say over all runs of our defence whom quarantine met."""
        runs = {
            cell.folder: row
            for cell in self._found.cells
            if cell.point.defense == ours and (row := self._found.row(cell)) is not None
        }
        wrong = [row["honest_quarantined"] for row in runs.values()]
        attacked = [row for row in runs.values() if row["first_effective"] is not None]
        out = [row["quarantined_recall"] for row in attacked]
        text = (
            f"In {len(runs)} runs {sum(wrong)} honest clients were ever quarantined, in "
            f"{sum(map(bool, wrong))} of the runs any; "
            f"{sum(row['honest_left_out'] for row in runs.values())} updates of honest clients "
            "were left out of the one round whose reports named them."
        )
        if attacked:
            late = [row["attackers_late"] for row in attacked if row["attackers_late"] is not None]
            text += (
                f" In the {len(attacked)} runs in which the attack took effect (ASR of "
                f"{100 * EFFECT:g} % in two rounds in a row, BA of {100 * USEFUL:g} %), "
                f"{mean(out):.1f} % of the attackers were quarantined; {sum(late)} attackers, in "
                f"{sum(map(bool, late))} of the runs, were not within {IN_TIME} rounds."
            )
        return text

    def _plots(self) -> list[str]:
        shown = [f"![{title}](images/{file.name})" for title, file in self._figures.items()]
        return ["## Plots", *shown] if shown else []


def _benchmark(file: Path) -> list[str]:
    """Write a benchmark's method, and a line for each of its cases."""
    title = f"## Benchmark: {file.stem}"
    if not file.exists():
        return [title, f"{NOT_RUN}: `python -m benchmarks {file.stem} --out {_shown(file)}`"]
    content = results.read(file.parent, file.name)
    rows = [
        {content["benchmark"]: row["case"]}
        | {name: "" if value is None else f"{value:.3g}" for name, value in row["figures"].items()}
        | {
            "bar": "; ".join(
                f"{bar['figure']} <= {bar['limit']:g}: {'held' if bar['holds'] else '**missed**'}"
                for bar in row["bars"]
            )
        }
        for row in content["rows"]
    ]
    text = f"`python -m benchmarks {content['benchmark']}`. {content['method']}"
    return [title, text, _table(rows)]


def _missed_by_benchmark(file: Path) -> list[Row]:
    if not file.exists():
        return []
    content = results.read(file.parent, file.name)
    return [
        {
            "run": f"benchmark {content['benchmark']}, {row['case']}",
            "wanted": f"{bar['figure']} <= {bar['limit']:g}",
            "mean (worst)": f"{bar['value']:.3g}",
            "seeds": "",
            "missed by": "",
            "what was tried": "",
        }
        for row in content["rows"]
        for bar in row["bars"]
        if not bar["holds"]
    ]


def field(rows: Sequence[Row], wanted: int) -> str:
    """Write BA and ASR of a place: means, ranges, and how many seeds where some are missing."""
    if not rows:
        return NOT_RUN
    lines = []
    for name in ("ba_final", "asr_final"):
        values = [row[name] for row in rows]
        spread = f" ({min(values):.1f}..{max(values):.1f})" if len(values) > 1 else ""
        lines.append(f"{mean(values):.2f}{spread}")
    if wanted:
        lines.append(f"n = {len(rows)}" + (f" of {wanted}" if wanted > len(rows) else ""))
    else:
        lines.append(f"n = {len(rows)}")
    return "<br>".join(lines)


def _label(measure: str) -> str:
    return LABELS.get(measure, measure.replace("_", " "))


def _shown(path: Path) -> str:
    """Write a path as it is from the current folder."""
    try:
        return path.absolute().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.name


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 4)


def _mean_worst(values: Iterable[float | None], worst: Callable[..., Any], digits: int = 2) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.{digits}f} ({worst(known):.{digits}f})" if known else ""


def _grouped(points: Iterable[Point], *axes: str) -> list[tuple[tuple[Any, ...], list[Point]]]:
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        groups.setdefault(tuple(getattr(point, axis) for axis in axes), []).append(point)
    return list(groups.items())


def _in_order(known: Iterable[str], used: Iterable[str]) -> list[str]:
    chosen = set(used)
    return [name for name in known if name in chosen]


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _table(rows: Sequence[Row]) -> str:
    """Write rows as a Markdown table; nothing for no rows."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
