"""What a trigger inversion costs, and how well it sees an attack for that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks.outcome import Bar, Outcome, Row
from benchmarks.stealth import averaged, everybody, start, update_of
from client import network
from client.attacks import participant_of
from client.participant import Settings, State
from none_core.detection.inversion import Inversion, Summary
from none_core.trigger_inversion import Finding, Probe, Triggers, probe_model
from tasks import data, metrics
from tasks.models import as_input

METHOD = (
    "{dataset}, {clients} clients, DBA by {malicious} of them, no defence, plain averaging: a "
    "probe of the averaged model in every third round by each of the honest clients, started from "
    "what it found before, as in a defended run. cost: steps x images of a probe. s: median "
    "seconds of a client's probe on one thread. strength: how many robust standard deviations the "
    "attacked class's mask is below the median class's, median over clients, in the rounds whose "
    "ASR lies in the range; it is an outlier from 3 on. seen: share of clients that call it one. "
    "false: share of the other classes that a client calls one, in all rounds."
)
BESIDE = (
    " The last row is a client of full MNIST, with the defaults: the probe beside one local epoch."
)
EVERY = 3
RANGES = {"5 to 30": (0.05, 0.3), "30 to 80": (0.3, 0.8), "over 80": (0.8, 1.01)}
COSTS = ((10, 8), (20, 8), (30, 8), (60, 8), (30, 4), (30, 16))  # through the defaults, 30 x 8
EPOCHS = 1.0  # a probe may take as long as so many local epochs of full MNIST


class Moment(NamedTuple):
    """The averaged model after a round, and its attack success rate."""

    server_round: int
    state: State
    asr: float


def run(
    data_root: Path | None,
    costs: Sequence[tuple[int, int]] = COSTS,
    rounds: int = 30,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Train once, and look at the same models at every cost (steps, images)."""
    torch.set_num_threads(1)
    clients = everybody(data_root, 0.0, rounds, ('attack.name="dba"', *overrides))
    one = clients[0]
    with_mnist = data_root is not None and (data_root / "MNIST").exists()
    beside = None
    if with_mnist and one.task.dataset == "mnist5k":
        beside = _beside_an_epoch(data_root)
    moments = list(_moments(clients, data_root))
    rows = [
        _row(cost, moments, clients)
        for cost in track(costs, "probes", console=Console(stderr=True))
    ]
    method = METHOD.format(
        dataset=one.task.dataset,
        clients=len(clients),
        malicious=sum(settings.is_malicious for settings in clients),
    )
    if beside is not None:
        rows.append(beside)
        method += BESIDE
    return Outcome("probes", method, rows)


def _moments(clients: Sequence[Settings], data_root: Path | None) -> Iterator[Moment]:
    one = clients[0]
    loaded = data.load(one.task.dataset, data_root, held_out=one.task.held_out)
    state = start(one)
    rounds = range(1, one.experiment.rounds + 1)
    for server_round in track(rounds, one.experiment.name, console=Console(stderr=True)):
        updates = [update_of(settings, state, server_round) for settings in clients]
        state = averaged(updates)
        if server_round % EVERY == 1:
            model = network.model_of_thread(one.task)
            model.load_state_dict(state)
            images, labels = loaded.test_images, loaded.test_labels
            scores = metrics.evaluate(model, images, labels, one.trigger, one.attack.target)
            yield Moment(server_round, state, scores.asr)


class Prober:
    """One honest client that probes model after model, as it would in a run."""

    def __init__(self, settings: Settings, steps: int, images: int) -> None:
        mine = participant_of(settings).data(False)
        self.task = settings.task
        self.inputs, self.labels = as_input(network.build(settings.task), mine.images), mine.labels
        classes = data.CLASSES[settings.task.dataset]
        self.probe = Probe(tuple(range(classes)), steps=steps, images=images)
        self.triggers = Triggers.unknown(classes, self.inputs[0])

    def look(self, moment: Moment) -> tuple[Finding, float]:
        """Probe a model; what was found, and the seconds that it took."""
        model = network.model_of_thread(self.task)
        model.load_state_dict(moment.state)
        model.eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(moment.server_round)
        began = time.perf_counter()
        found = probe_model(
            model,
            network.reader_of_thread(self.task),
            self.inputs,
            self.labels,
            self.probe,
            self.triggers,
            generator,
        )
        seconds = time.perf_counter() - began
        model.requires_grad_(True)
        self.triggers = found.triggers
        return found, seconds


def _row(cost: tuple[int, int], moments: Sequence[Moment], clients: Sequence[Settings]) -> Row:
    target = clients[0].attack.target
    strength: dict[str, list[float]] = {name: [] for name in RANGES}
    seen: dict[str, list[float]] = {name: [] for name in RANGES}
    wrong, seconds = [], []
    for settings in (s for s in clients if not s.is_malicious):
        prober = Prober(settings, *cost)
        for moment in moments:
            found, took = prober.look(moment)
            seconds.append(took)
            own, outlier = judged(found)
            wrong.append(float(np.delete(outlier, target).mean()))
            for name, (low, high) in RANGES.items():
                if low <= moment.asr < high:
                    strength[name].append(own[target])
                    seen[name].append(float(outlier[target]))
    figures: dict[str, float | int | None] = {"s": statistics.median(seconds)}
    for name in RANGES:
        figures[f"strength, ASR {name} %"] = _middle(strength[name])
        figures[f"seen, ASR {name} %"] = float(np.mean(seen[name])) if seen[name] else None
    figures |= {"false": float(np.mean(wrong)), "local epoch s": None, "ratio": None}
    steps, images = cost
    return Row(f"{steps} x {images}", figures, samples={"s": seconds})


def judged(found: Finding) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """Judge as the detector judges one client's sizes: strength and whether an outlier, (K,)."""
    summary = Summary(
        found.probed,
        found.size.astype(np.float32),
        found.success.astype(np.float32),
        found.shift.astype(np.float32),
    )
    strength, attacked = Inversion().own_views([summary])
    return strength[0], attacked[0]


def _middle(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _beside_an_epoch(data_root: Path | None) -> Row:
    """Time a warm probe beside a local epoch, both of the same model on one thread."""
    overrides = ('task.dataset="mnist"', "train.local_epochs=1", 'attack.name="dba"')
    clients = everybody(data_root, 0.0, 3, overrides)
    settings = next(s for s in clients if not s.is_malicious)
    state = start(settings)
    epochs, probes = [], []
    prober = Prober(settings, Probe((0,)).steps, Probe((0,)).images)
    for server_round in range(1, 6):
        began = time.perf_counter()
        state = update_of(settings, state, server_round)
        epochs.append(time.perf_counter() - began)
        probes.append(prober.look(Moment(server_round, state, 0.0))[1])
    warm, epoch = statistics.median(probes[1:]), statistics.median(epochs[1:])
    names = ("s", *(f"{what}, ASR {name} %" for name in RANGES for what in ("strength", "seen")))
    figures: dict[str, float | int | None] = dict.fromkeys((*names, "false"))
    figures |= {"s": warm, "local epoch s": epoch, "ratio": warm / epoch}
    bars = (Bar("ratio", warm / epoch, EPOCHS),)
    return Row("full MNIST, defaults", figures, bars, {"s": probes, "local epoch s": epochs})
