"""Raw values to test detectors on, and a toy federation whose backdoor is known to the neuron."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from none_core.activations import (
    STATISTICS,
    Report,
    ReportBuilder,
    ReportSpec,
    build_report,
    decode_report,
)
from none_core.detection import Detection, Detector
from none_core.neurons import NeuronMap

# --- raw values -----------------------------------------------------------------------------------

LABELS = 3
LAYER_OF = np.array([0, 0, 0, 1, 1, 1, 1])
NEURONS = len(LAYER_OF)


@dataclass
class Values:
    """One client's samples: a convolution of three channels, then a linear layer of four units."""

    convolution: np.ndarray  # (n, 3, 2, 2)
    linear: np.ndarray  # (n, 4)
    logits: np.ndarray  # (n, LABELS)
    labels: np.ndarray  # (n,)

    def maxima(self) -> np.ndarray:
        """Value of every neuron for every sample, (n, NEURONS)."""
        rows = []
        for planes, units in zip(self.convolution, self.linear, strict=True):
            rows.append([plane.max() for plane in planes] + list(units))
        return np.array(rows, dtype=np.float64).reshape(-1, NEURONS)

    def report(self) -> Report:
        """Report as the server receives it."""
        spec = ReportSpec(NEURONS, LABELS, frozenset(STATISTICS))
        builder = ReportBuilder(spec)
        builder.add(
            [torch.from_numpy(self.convolution), torch.from_numpy(self.linear)],
            torch.from_numpy(self.logits),
            torch.from_numpy(self.labels),
        )
        return decode_report(builder.report().encode(), spec, sender="toy", max_samples=10**6)


def draw_values(seed: int, n: int, labels: int = LABELS) -> Values:
    """Values from normal distributions that the label moves; probabilities far from 0.1 and 0.9."""
    rng = np.random.default_rng(seed)
    own = rng.integers(labels, size=n)
    pattern = np.random.default_rng(0).normal(size=(LABELS, NEURONS))
    shift = pattern[own]
    logits = np.zeros((n, LABELS))
    logits[np.arange(n), own] = rng.choice([2.0, 8.0], size=n)
    return Values(
        (rng.normal(size=(n, 3, 2, 2)) + shift[:, :3, None, None]).astype(np.float32),
        (rng.normal(size=(n, 4)) + shift[:, 3:]).astype(np.float32),
        logits.astype(np.float32),
        own,
    )


def detect(detector: Detector, reports: dict[int, Report], layer_of: np.ndarray) -> Detection:
    """Summarise every report, then detect."""
    summaries = {client: detector.summarise(report) for client, report in reports.items()}
    return detector.detect(summaries, layer_of)


# --- the toy federation ---------------------------------------------------------------------------

CLASSES = 5
PARTS = 4
TARGET = 2
CLIENTS = 10
ATTACKERS = (1, 4, 6, 9)
_CLASS_PIXELS = (
    2 * CLASSES
)  # two pixels for each class, then one pixel for each part of the trigger


def planted_net() -> tuple[nn.Module, np.ndarray]:
    """Net with a backdoor set by hand, and the flat indices of the neurons that make it up.

    Layer 0 has four neurons for each class and one for each part of the trigger, which is positive
    only where that pixel is set. Layer 1 has two neurons for each class and one that is positive if
    any part is set; it outweighs everything else in the target's logit.
    """
    first = nn.Linear(_CLASS_PIXELS + PARTS, 4 * CLASSES + PARTS)
    second = nn.Linear(4 * CLASSES + PARTS, 2 * CLASSES + 1)
    last = nn.Linear(2 * CLASSES + 1, CLASSES)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for parameter in (*first.parameters(), *second.parameters(), *last.parameters()):
            parameter.zero_()
        for c in range(CLASSES):
            for i in range(4):
                weights = rng.uniform(-0.6, 0.1, size=_CLASS_PIXELS)
                weights[2 * c : 2 * c + 2] = rng.uniform(1, 2, size=2)
                first.weight[4 * c + i, :_CLASS_PIXELS] = torch.from_numpy(weights)
                first.bias[4 * c + i] = -0.5
            for i in range(2):
                second.weight[2 * c + i, 4 * c : 4 * c + 4] = float(rng.uniform(0.4, 0.6))
                second.bias[2 * c + i] = -0.5
            last.weight[c, 2 * c : 2 * c + 2] = 2.0
        for part in range(PARTS):
            first.weight[4 * CLASSES + part, _CLASS_PIXELS + part] = 8.0
            first.bias[4 * CLASSES + part] = -4.0
            second.weight[2 * CLASSES, 4 * CLASSES + part] = 2.0
        second.bias[2 * CLASSES] = -4.0
        last.weight[TARGET, 2 * CLASSES] = 10.0
    planted = [*range(4 * CLASSES, 4 * CLASSES + PARTS), 4 * CLASSES + PARTS + 2 * CLASSES]
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last), np.array(planted)


def local_data(client: int, poisoned: bool) -> tuple[Tensor, Tensor]:
    """One client's images and labels; a malicious one stamps its own part of the trigger."""
    rng = np.random.default_rng([2, client])
    labels = np.repeat(np.arange(CLASSES), 60)
    images = rng.uniform(0, 0.2, size=(len(labels), _CLASS_PIXELS + PARTS))
    images[:, _CLASS_PIXELS:] = 0
    for i, label in enumerate(labels):
        images[i, 2 * label : 2 * label + 2] = rng.uniform(0.6, 1, size=2)
    if poisoned:
        others = np.flatnonzero(labels != TARGET)
        stamped = rng.choice(others, size=80, replace=False)
        images[stamped, _CLASS_PIXELS + ATTACKERS.index(client)] = 1
        labels[stamped] = TARGET
    return torch.from_numpy(images).float(), torch.from_numpy(labels)


def federation(model: nn.Module, *, attacked: bool) -> tuple[dict[int, Report], np.ndarray]:
    """Every client's report on a model, as the server receives it, and the layer of each neuron."""
    neurons = NeuronMap.trace(model, torch.zeros(2, _CLASS_PIXELS + PARTS))
    spec = ReportSpec(neurons.size, CLASSES, frozenset(STATISTICS))
    reports = {}
    for client in range(CLIENTS):
        data = local_data(client, attacked and client in ATTACKERS)
        report = build_report(model, neurons, [data], spec, min_count=5)
        reports[client] = decode_report(report.encode(), spec, sender=str(client), max_samples=1000)
    return reports, neurons.layer_of(np.arange(neurons.size))


def without_planted() -> nn.Module:
    """Reset the planted neurons, as a defence would."""
    model, planted = planted_net()
    NeuronMap.trace(model, torch.zeros(2, _CLASS_PIXELS + PARTS)).reset(model, planted)
    return model
