"""What every way of training on one machine is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Plain stochastic gradient descent.

    Attributes
    ----------
    epochs : int
        Passes over the training images, >= 1.
    batch_size : int
        Images per step, >= 1.
    lr, momentum, weight_decay : float
        As in `torch.optim.SGD`.
    """

    epochs: int
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0


@dataclass(frozen=True, eq=False)
class Setting:
    """A training run on data that somebody may have poisoned.

    Attributes
    ----------
    model_fn : callable
        Builds the network, with the same fresh weights on every call, on the device to train on.
    images : Tensor
        Training images, uint8, (N, C, H, W), on the CPU.
    labels : Tensor
        What the images are said to be, int64, (N,).
    trusted_images, trusted_labels : Tensor
        The few images, known to be clean, that some defences need: uint8 (M, C, H, W), int64 (M,).
        None of them is among the training images, and none is a test image.
    schedule : Schedule
    seed : int
        The same gives the same result on the same machine.
    """

    model_fn: Callable[[], nn.Module]
    images: Tensor
    labels: Tensor
    trusted_images: Tensor
    trusted_labels: Tensor
    schedule: Schedule
    seed: int = 0

    def generator(self, stream: int) -> torch.Generator:
        """Return a generator on the CPU; each stream of the seed is another."""
        state = np.random.SeedSequence([self.seed, stream]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)


@dataclass(frozen=True, eq=False)
class Outcome:
    """A trained network, and what was left out of its training.

    Attributes
    ----------
    model : nn.Module
    dropped : ndarray of int64 or None
        Training images that were taken for poisoned, ascending; None if the method names none.
    looks : sequence of mapping
        What the method found when it looked at the network, if it does; numbers and texts.
    """

    model: nn.Module
    dropped: NDArray[np.int64] | None = None
    looks: Sequence[Mapping[str, Any]] = ()


Method = Callable[[Setting], Outcome]
