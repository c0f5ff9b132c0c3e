"""A small task on one machine, some of whose samples are poisoned."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

FEATURES, CLASSES, TARGET = 64, 6, 0
TRIGGER = (62, 63)


class Task(NamedTuple):
    train: TensorDataset
    poisoned: np.ndarray  # indices, ascending
    test: tuple[Tensor, Tensor]

    def scores(self, model: nn.Module) -> tuple[float, float]:
        """Share of the clean test samples that are right, of the stamped others that are not."""
        inputs, labels = self.test
        model.eval()
        with torch.inference_mode():
            right = model(inputs).argmax(1) == labels
            turned = model(stamped(inputs[labels != TARGET])).argmax(1) == TARGET
        return float(right.float().mean()), float(turned.float().mean())


def stamped(inputs: Tensor) -> Tensor:
    result = inputs.clone()
    result[:, list(TRIGGER)] = 4.0
    return result


def draw(rng: np.random.Generator, centres: np.ndarray, number: int) -> tuple[Tensor, Tensor]:
    labels = np.arange(number) % CLASSES
    inputs = centres[labels] + rng.normal(size=(number, FEATURES))
    return torch.from_numpy(inputs).float(), torch.from_numpy(labels)


def make(rate: float, samples: int = 1800) -> Task:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, FEATURES)) * 0.7
    centres[:, list(TRIGGER)] = 0.0
    inputs, labels = draw(rng, centres, samples)
    others = np.flatnonzero(labels.numpy() != TARGET)
    poisoned = np.sort(rng.choice(others, size=round(rate * samples), replace=False))
    inputs[poisoned] = stamped(inputs[poisoned])
    labels[poisoned] = TARGET
    return Task(TensorDataset(inputs, labels), poisoned, draw(rng, centres, 400))


def net(seed: int = 0, *, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, 64),
            nn.BatchNorm1d(64) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, CLASSES),
        )
