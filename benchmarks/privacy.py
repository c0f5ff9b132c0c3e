"""What a report can give away, and what differential privacy costs `mixture`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict

from benchmarks.outcome import Outcome, Row
from client import network
from client.attacks import participant_of
from client.participant import Settings
from none_core.accounting import epsilon
from none_core.activations import (
    LABEL_HISTOGRAMS,
    STATISTICS,
    TRIGGER_SHIFT,
    Report,
    ReportSpec,
    build_report,
)
from none_core.detection import Detection, Mixture
from none_core.privacy import Gaussian, Samples, most_bits, private_report, read_samples
from simulations import results
from simulations.config import build as experiment_of
from tasks import data

METHOD = (
    "Replayed: the models of an undefended run are shown to its clients, malicious ones on their "
    "poisoned data, whose reports carry noise of each multiplier; `mixture` reads them. Means over "
    "the seeds of the noise. Epsilon, for the delta given, is that of one answer and of as many as "
    "the run has rounds. Neurons: of those that it would reset in a round without noise, the share "
    "that it names among as many with noise, where it says that the backdoor is alive at all."
)
EXPOSURE = (
    "One client's report on its samples, by the model of the run's last round, for each statistic "
    "alone (predictions are always sent). Bytes as sent; bits at most: what the numbers could say "
    "beside how many samples each label has, by `none_core.privacy.most_bits`. The numbers of "
    "trigger-shift are drawn at random here: their size does not depend on them."
)
MIN_COUNT = 5  # as the server's default
BATCH = 500


def run(
    folder: Path,
    rounds: Sequence[int],
    noises: Sequence[float],
    delta: float,
    seeds: int,
    data_root: Path | None = None,
) -> Outcome:
    """Replay some rounds of a run for each noise multiplier; 0 is no noise."""
    torch.set_num_threads(1)
    result = results.read(folder)
    configuration = result["configuration"]
    total = configuration["experiment"]["rounds"]
    rows = []
    for server_round in rounds:
        clients = Clients(folder, configuration, server_round, data_root)
        exact = clients.detection(0.0, 0)
        asr = 100 * result["rounds"][server_round]["asr"]
        for noise in noises:
            found = [clients.detection(noise, seed) for seed in range(seeds if noise else 1)]
            figures = _figures(found, exact, clients.malicious)
            spent = [epsilon(noise, n, delta) if noise else None for n in (1, total)]
            rows.append(
                Row(
                    f"round {server_round}, ASR {asr:.0f} %, noise {noise:g}",
                    {"epsilon of one": spent[0], f"epsilon of {total}": spent[1], **figures},
                )
            )
    name = f"privacy of {configuration['task']['dataset']}, delta {delta:g}"
    return Outcome(name, METHOD, rows)


def expose(folder: Path, data_root: Path | None = None) -> Outcome:
    """Measure the size of each statistic, and bound what it can say."""
    torch.set_num_threads(1)
    configuration = results.read(folder)["configuration"]
    clients = Clients(folder, configuration, configuration["experiment"]["rounds"], data_root)
    rows = []
    for names in ((), *((name,) for name in STATISTICS), STATISTICS):
        report = clients.report_of_first(frozenset(names))
        number = int(report.counts.sum())
        bits = sum(most_bits(report.spec, report.counts).values())
        size = sum(array.size for array in report.encode().values())
        rows.append(
            Row(
                f"{' + '.join(names) or 'predictions alone'}, {number} samples",
                {"bytes": size, "bits at most": round(bits), "a sample": bits / number},
            )
        )
    return Outcome(f"exposure by {configuration['task']['dataset']}", EXPOSURE, rows)


class Clients:
    """All participants of a run, asked about the model of one of its rounds."""

    def __init__(
        self,
        folder: Path,
        configuration: dict[str, Any],
        server_round: int,
        data_root: Path | None,
    ) -> None:
        where = {"run": {"data_root": str(data_root)}} if data_root else {}
        experiment = experiment_of(_without_none(configuration) | where)
        config = experiment.run_config()
        file = folder / "checkpoints" / f"round-{server_round:04d}.pt"
        settings = [
            Settings.of(Context(1, p, {"partition-id": p}, RecordDict(), config))
            for p in range(experiment.experiment.clients)
        ]
        task = settings[0].task
        self.malicious = frozenset(settings[0].malicious)
        model = network.build(task).eval()
        model.load_state_dict(torch.load(file, weights_only=True))
        neurons = network.neurons(task)
        reader = neurons.reader(model)
        self._layer_of = neurons.layer_of(np.arange(neurons.size))
        labels = data.CLASSES[task.dataset]
        self._spec = ReportSpec(neurons.size, labels, frozenset({LABEL_HISTOGRAMS}))
        self._exact: list[Report] = []
        self._samples: list[Samples] = []
        self._first: Callable[[ReportSpec], Report] | None = None
        for each in settings:
            local = participant_of(each).data(each.is_malicious)
            images = local.images.float().div_(255).split(BATCH)
            batches = list(zip(images, local.labels.split(BATCH), strict=True))
            build = partial(build_report, model, neurons, batches, min_count=MIN_COUNT)
            self._first = self._first or build
            self._exact.append(build(self._spec))
            self._samples.append(read_samples(reader, batches))

    def detection(self, noise: float, seed: int) -> Detection:
        """Return what `mixture` finds in everybody's reports."""
        detector = Mixture()
        summaries = {
            client: detector.summarise(self._report(client, noise, seed))
            for client in range(len(self._exact))
        }
        return detector.detect(summaries, self._layer_of)

    def report_of_first(self, statistics: frozenset[str]) -> Report:
        """Return what the first client reports if these statistics are asked for."""
        assert self._first is not None
        report = self._first(replace(self._spec, statistics=statistics))
        if TRIGGER_SHIFT not in statistics:
            return report
        rng, labels = np.random.default_rng(0), self._spec.labels
        shares = rng.uniform(size=(2, labels))
        shift = rng.normal(size=(labels, self._spec.neurons))
        return report.with_trigger_shift(np.ones(labels, dtype=bool), *shares, shift)

    def _report(self, client: int, noise: float, seed: int) -> Report:
        if not noise:
            return self._exact[client]
        mechanism = Gaussian(noise, np.random.default_rng([seed, client]))
        samples = self._samples[client]
        return private_report(samples, self._layer_of, self._spec, mechanism, MIN_COUNT)


def _figures(
    found: Sequence[Detection], exact: Detection, malicious: frozenset[int]
) -> dict[str, float | None]:
    suspects = [{s.client for s in each.suspicions} for each in found]
    number = len(exact.compromised)
    shares = [
        len(np.intersect1d(each.compromised[:number], exact.compromised)) / number
        for each in found
        if number and each.alive
    ]
    return {
        f"found of {len(malicious)}": float(np.mean([len(s & malicious) for s in suspects])),
        "honest suspected": float(np.mean([len(s - malicious) for s in suspects])),
        "alive": float(np.mean([each.alive for each in found])),
        "neurons": float(np.mean(shares)) if shares else None,
    }


def _without_none(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """TOML knows no null: what is left out is the default."""
    return {
        name: {key: value for key, value in keys.items() if value is not None}
        for name, keys in sections.items()
    }
