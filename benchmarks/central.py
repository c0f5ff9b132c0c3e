"""The published neuron test as a loop over channels, and as a report with `contrast` on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.outcome import Bar, Outcome, Row
from benchmarks.processes import alone, memory
from none_core.activations import CONFIDENT, UNLIKELY, ReportBuilder, ReportSpec
from none_core.detection import Contrast
from none_core.neurons import NeuronMap
from tasks import models

LABELS, BATCH = 10, 500
MODEL, SHAPE = "resnet18", (3, 32, 32)
SAMPLES = 50_000
SLOWEST = 1 / 50  # of the loop's time
MOST_GROWTH = 1.1  # of the memory for a quarter of the samples

METHOD = (
    "The values of all channels of a ResNet-18 that the map knows, drawn at random around a mean "
    "for each class, with outputs that are sure of some predictions. loop: the published rule "
    "(none/compromised_detection.py), channel by channel and class by class on arrays of all "
    "values. report: the statistics of prediction-extremes batch by batch, then the detector "
    "contrast. One thread, seconds of processor time without the drawing, each case in a process "
    "of its own. MB: its growth to its peak. differing: places of the two rankings of each layer, "
    "all layers together, that hold different channels."
)


def run(samples: int = SAMPLES, model: str = MODEL) -> Outcome:
    """Measure both, and ours for a quarter of the samples as well."""
    loop = alone(_loop, samples, model)
    part, whole = alone(_report, samples // 4, model), alone(_report, samples, model)
    rankings = zip(loop.pop("ranking"), whole.pop("ranking"), strict=True)
    differing = sum(int((one != other).sum()) for one, other in rankings)
    part.pop("ranking")
    unknown = {"of the loop": None, "differing": None}
    ratio = whole["seconds"] / loop["seconds"]
    return Outcome(
        "central",
        METHOD,
        [
            Row(f"loop, {samples:,} samples", loop | unknown),
            Row(f"report, {samples // 4:,} samples", part | unknown),
            Row(
                f"report, {samples:,} samples",
                whole | {"of the loop": ratio, "differing": differing},
                (
                    Bar("seconds of the loop's", ratio, SLOWEST),
                    Bar("MB of a quarter's", whole["MB"] / part["MB"], MOST_GROWTH),
                    Bar("differing", differing, 0),
                ),
            ),
        ],
    )


def _layers(model: str) -> np.ndarray:
    network = models.build(model, SHAPE, LABELS, seed=0)
    neurons = NeuronMap.trace(network, torch.zeros(1, *SHAPE))
    return neurons.layer_of(np.arange(neurons.size))


def _drawn(neurons: int, samples: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield values (BATCH, J) and logits (BATCH, LABELS)."""
    generator = torch.Generator().manual_seed(0)
    means = 1 + torch.randn(LABELS, neurons, generator=generator)
    for _ in range(samples // BATCH):
        labels = torch.randint(LABELS, (BATCH,), generator=generator)
        values = means[labels] + torch.randn(BATCH, neurons, generator=generator) / 2
        logits = torch.randn(BATCH, LABELS, generator=generator)
        logits[torch.arange(BATCH), labels] += 6.0
        yield values, logits


def _report(samples: int, model: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    layer_of = _layers(model)
    sizes = np.bincount(layer_of).tolist()
    detector = Contrast()
    seconds, before = 0.0, memory("VmRSS")
    builder = ReportBuilder(ReportSpec(len(layer_of), LABELS, detector.statistics))
    for values, logits in _drawn(len(layer_of), samples):
        reads, labels = values.split(sizes, dim=1), logits.argmax(1)
        begin = time.process_time()
        builder.add(reads, logits, labels)
        seconds += time.process_time() - begin
    begin = time.process_time()
    scores = detector.detect({0: detector.summarise(builder.report())}, layer_of).scores
    seconds += time.process_time() - begin
    return {
        "seconds": seconds,
        "MB": memory("VmHWM") - before,
        "ranking": _rankings(scores, layer_of),
    }


def _loop(samples: int, model: str) -> dict[str, Any]:
    """Do what the published code does, which holds the values of all samples as float64."""
    torch.set_num_threads(1)
    layer_of = _layers(model)
    before = memory("VmRSS")
    values = np.zeros((samples, len(layer_of)))
    outputs = np.zeros((samples, LABELS))
    for number, (some, logits) in enumerate(_drawn(len(layer_of), samples)):
        here = slice(number * BATCH, (number + 1) * BATCH)
        values[here], outputs[here] = some.numpy(), logits.softmax(1).numpy()
    begin = time.process_time()
    contrast = np.zeros((len(layer_of), LABELS))
    for j in range(len(layer_of)):
        for k in range(LABELS):
            strong = np.where(outputs[:, k] > CONFIDENT)
            weak = np.where(outputs[:, k] < UNLIKELY)
            if strong[0].shape[0] == 0:
                continue
            highest = values[strong, j].max()
            ordinary = np.mean(values[weak, j]) + 3 * np.std(values[weak, j])
            contrast[j, k] = highest - ordinary
    scores = contrast.max(1)
    return {
        "seconds": time.process_time() - begin,
        "MB": memory("VmHWM") - before,
        "ranking": _rankings(scores, layer_of),
    }


def _rankings(scores: np.ndarray, layer_of: np.ndarray) -> list[np.ndarray]:
    """Rank the channels of each layer, the highest score first."""
    return [np.argsort(-scores[layer_of == n], kind="stable") for n in np.unique(layer_of)]
