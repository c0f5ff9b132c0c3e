"""A defended round against a round of plain federated averaging, side by side."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.outcome import Bar, Outcome, Row
from simulations import config, results, runner
from simulations.__main__ import EXPERIMENTS

METHOD = (
    "mnist5k, 10 clients, one local epoch, in-process engine on all cores; seconds by the clock, "
    "from the run's own history.json. The runs alternate. Of each run the median over its rounds "
    "but the first, and of these the median over repetitions; a ratio is the median of those of "
    "runs that followed each other. A round is training, queries and deciding; central evaluation, "
    "which plain averaging has as well, is given apart and added in the last column. quiet: no "
    "attacker, a query in each round. reset: a reset and the guard's query in each round, forced "
    "by the detector contrast, which always finds something. attacked: DBA, with the sample filter."
)
RATIO = 1.35
PLAIN, QUIET = "plain FedAvg", "defended, quiet"

# `guard = 1` accepts every reset: exactly one more query each time.
RUNS: dict[str, tuple[str, ...]] = {
    PLAIN: ('defense.name="undefended"',),
    QUIET: (),
    "defended, reset": ('defense.detector="contrast"', "defense.guard=1.0"),
    "defended, attacked": ('attack.name="dba"',),
}
COMMON = ("train.local_epochs=1", "defense.start_round=1", "defense.every=1")
PHASES = ("train", "query", "decide", "evaluate")


def run(data_root: Path | None, rounds: int = 8, repeats: int = 3) -> Outcome:
    """Run everything `repeats` times in turn."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for _ in range(repeats):
        for name, overrides in RUNS.items():
            measured[name].append(median_round(_history(overrides, rounds, data_root)))
    return Outcome("round", METHOD, [_row(name, measured) for name in RUNS])


def median_round(history: Mapping[str, Any]) -> dict[str, float]:
    """Median seconds of each phase, of the round without evaluation ("round") and with it ("all").

    The initial model's entry and the first round are left out: that one loads data and traces.
    """
    seconds = [entry["seconds"] for entry in history["rounds"][2:]]
    medians = {phase: statistics.median(s[phase] for s in seconds) for phase in PHASES}
    whole = [sum(s[phase] for phase in PHASES) for s in seconds]
    without = [total - s["evaluate"] for total, s in zip(whole, seconds, strict=True)]
    resets = [float(entry["neurons_reset"] > 0) for entry in history["rounds"][2:]]
    return medians | {
        "round": statistics.median(without),
        "all": statistics.median(whole),
        "resets": statistics.mean(resets),
    }


def _history(overrides: tuple[str, ...], rounds: int, data_root: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = [*COMMON, f"experiment.rounds={rounds}", f"run.output='{folder}'", *overrides]
        if data_root is not None:
            settings.append(f"run.data_root='{data_root}'")
        experiment = config.load(EXPERIMENTS / "clean-mnist5k.toml", settings)
        runner.execute(experiment, Console(quiet=True))
        return results.read(Path(folder), results.HISTORY)


def _row(name: str, measured: Mapping[str, list[dict[str, float]]]) -> Row:
    runs, plain = measured[name], measured[PLAIN]
    ratio, with_evaluation = (
        statistics.median(r[what] / p[what] for r, p in zip(runs, plain, strict=True))
        for what in ("round", "all")
    )
    middle = {what: statistics.median(r[what] for r in runs) for what in runs[0]}
    return Row(
        name,
        {f"{phase} s": middle[phase] for phase in PHASES}
        | {
            "rounds with a reset": middle["resets"],
            "round s": middle["round"],
            "ratio": ratio,
            "ratio of minima": min(r["round"] for r in runs) / min(p["round"] for p in plain),
            "ratio with evaluation": with_evaluation,
        },
        (Bar("ratio", ratio, RATIO),) if name == QUIET else (),
        {what: [r[what] for r in runs] for what in ("round", "all")},
    )
