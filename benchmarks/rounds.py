"""A defended round against a round of plain federated averaging, side by side."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.outcome import Bar, Outcome, Row
from client.app import app as client_app
from server.app import app as server_app
from simulations import config, results
from simulations.__main__ import EXPERIMENTS
from simulations.engines import run_in_process

METHOD = (
    "mnist5k, 10 clients, one local epoch, in-process engine on all cores; seconds by the clock, "
    "from the run's own timing.json. The runs alternate. Of each run the median over its rounds "
    "but the first, and of these the median over repetitions; a ratio is the median of those of "
    "runs that followed each other. A round is training, queries and deciding; central evaluation, "
    "which plain averaging has as well, is given apart and added in the last column. quiet: no "
    "attacker, a query in each round, detector mixture. with probes: no attacker, the default "
    "detector, whose probes for triggers have the price of several local epochs as short as these; "
    "not the median round but the mean of all, since few have one. reset: the rounds with a reset "
    "and so with the guard's query as well, forced by the detector contrast, which finds something "
    "once the model is sure of some predictions. attacked: DBA, mixture with the sample filter."
)
RATIO = 1.35
PLAIN, QUIET, RESET = "plain FedAvg", "defended, quiet", "defended, reset"
PROBES = "defended, with probes"

# `guard = 1` accepts every reset: exactly one more query each time.
RUNS: dict[str, tuple[str, ...]] = {
    PLAIN: ('defense.name="undefended"',),
    QUIET: ('defense.detector="mixture"',),
    PROBES: (),
    RESET: ('defense.detector="contrast"', "defense.guard=1.0"),
    "defended, attacked": ('attack.name="dba"', 'defense.detector="mixture"'),
}
COMMON = ("train.local_epochs=1", "defense.start_round=1", "defense.every=1")
PHASES = ("train", "query", "decide", "evaluate")


def run(data_root: Path | None, rounds: int = 8, repeats: int = 5) -> Outcome:
    """Run everything `repeats` times in turn."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for _ in range(repeats):
        for name, overrides in RUNS.items():
            history, timing = _run(overrides, rounds, data_root)
            if name == RESET:
                resets = {entry["round"] for entry in history if entry["neurons_reset"]}
                timing = [entry for entry in timing if entry["round"] in resets]
            average = statistics.fmean if name == PROBES else statistics.median
            measured[name].append(typical_round(timing, average))
    return Outcome("round", METHOD, [_row(name, measured) for name in RUNS])


def typical_round(
    entries: Sequence[Mapping[str, Any]], average: Callable[[Iterable[float]], float]
) -> dict[str, float]:
    """Seconds of each phase, of the round without evaluation ("round") and with it ("all").

    Parameters
    ----------
    entries : sequence of dict
        Rounds of ``timing.json``, without the initial model's and the first: that one loads the
        data and traces the model.
    average : callable
        The median or the mean.
    """
    if not entries:
        raise RuntimeError("there is no round of the kind to measure; run more rounds")
    phases = {phase: average(entry[phase] for entry in entries) for phase in PHASES}
    whole = [sum(entry[phase] for phase in PHASES) for entry in entries]
    without = [total - entry["evaluate"] for total, entry in zip(whole, entries, strict=True)]
    return phases | {
        "round": average(without),
        "all": average(whole),
        "rounds": len(entries),
    }


def _run(
    overrides: tuple[str, ...], rounds: int, data_root: Path | None
) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Run once; history and timing of the rounds from the second on."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*COMMON, f"experiment.rounds={rounds}", f"run.output='{folder}'", *overrides]
        if data_root is not None:
            settings.append(f"run.data_root='{data_root}'")
        experiment = config.load(EXPERIMENTS / "clean-mnist5k.toml", settings)
        run_in_process(
            server_app,
            client_app,
            experiment.run_config(),
            clients=experiment.experiment.clients,
            seed=experiment.experiment.seed,
        )
        files = (results.HISTORY, results.TIMING)
        history, timing = (results.read(Path(folder), name)["rounds"][2:] for name in files)
        return history, timing


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
            "rounds": sum(r["rounds"] for r in runs),
            "round s": middle["round"],
            "ratio": ratio,
            "ratio of minima": min(r["round"] for r in runs) / min(p["round"] for p in plain),
            "ratio with evaluation": with_evaluation,
        },
        (Bar("ratio", ratio, RATIO),) if name == QUIET else (),
        {what: [r[what] for r in runs] for what in ("round", "all")},
    )
