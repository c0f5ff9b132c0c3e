"""The trigger of a distributed backdoor attack as data, stamping it, and choosing what to poison.

A trigger is cut into parts, one per malicious client (client p stamps part p modulo their number);
at test time the whole trigger is stamped. Which client stamps what on which round, and to which
target class, is the business of whoever uses these functions.

Settings: Xie, Huang, Chen, Li, "DBA: Distributed Backdoor Attacks against Federated Learning",
ICLR 2020, published configuration (``utils/mnist_params.yaml``, ``utils/cifar_params.yaml``).
What that paper does not have carries CIFAR-10's trigger, in larger images so many times as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixel = tuple[int, int]  # row, column

# Keeps this choice apart from everything else that is drawn from an experiment's seed.
_MALICIOUS_STREAM = 1


@dataclass(frozen=True)
class Trigger:
    """Pixels set to the maximum value, cut into parts.

    Parameters
    ----------
    parts : tuple of tuple of (int, int)
        Each part a non-empty tuple of pixels (row, column), counted from the top left.

    Raises
    ------
    ValueError
        When there is no part, or a part has no pixel.

    Examples
    --------
    >>> trigger = Trigger(parts=(bar(0, 0, 2), bar(0, 4, 2)))
    >>> trigger.part(3)
    ((0, 4), (0, 5))
    >>> trigger.whole()
    ((0, 0), (0, 1), (0, 4), (0, 5))
    """

    parts: tuple[tuple[Pixel, ...], ...]

    def __post_init__(self) -> None:
        """Refuse a trigger that would poison without a mark."""
        if not self.parts or not all(self.parts):
            raise ValueError(f"a trigger needs parts with at least one pixel each: {self.parts}")

    def part(self, number: int) -> tuple[Pixel, ...]:
        """Return the pixels of a part; numbers beyond the last part start again at the first."""
        return self.parts[number % len(self.parts)]

    def whole(self) -> tuple[Pixel, ...]:
        """Return the pixels of all parts together, each once, row by row."""
        return tuple(sorted({pixel for part in self.parts for pixel in part}))

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless all pixels lie inside an image of shape (..., H, W)."""
        _check_inside(self.whole(), shape)


def bar(row: int, column: int, length: int) -> tuple[Pixel, ...]:
    """Return the pixels of a horizontal bar, one pixel high, from its left end."""
    return tuple((row, column + step) for step in range(length))


def _enlarged(trigger: Trigger, factor: int) -> Trigger:
    """Make a square of so many pixels a side of each pixel."""
    steps = [(down, across) for down in range(factor) for across in range(factor)]
    return Trigger(
        tuple(
            tuple(sorted((factor * r + i, factor * c + j) for r, c in part for i, j in steps))
            for part in trigger.parts
        )
    )


_MNIST_TRIGGER = Trigger((bar(0, 0, 4), bar(0, 6, 4), bar(3, 0, 4), bar(3, 6, 4)))
_CIFAR10_TRIGGER = Trigger((bar(0, 0, 6), bar(0, 9, 6), bar(4, 0, 6), bar(4, 9, 6)))

DEFAULT_TRIGGER = {
    "mnist5k": _MNIST_TRIGGER,
    "mnist": _MNIST_TRIGGER,
    "fashion-mnist": _MNIST_TRIGGER,
    "cifar10": _CIFAR10_TRIGGER,
    "gtsrb": _CIFAR10_TRIGGER,
    "imagenet10": _enlarged(_CIFAR10_TRIGGER, 224 // 32),
    "imagenet10-64": _enlarged(_CIFAR10_TRIGGER, 64 // 32),
    "signs": _CIFAR10_TRIGGER,
    "signs224": _enlarged(_CIFAR10_TRIGGER, 224 // 32),
}

# Share of a malicious client's images that it poisons.
DEFAULT_RATE = {
    "mnist5k": 20 / 64,
    "mnist": 20 / 64,
    "fashion-mnist": 20 / 64,
    "cifar10": 5 / 64,
    "gtsrb": 5 / 64,
    "imagenet10": 5 / 64,
    "imagenet10-64": 5 / 64,
    "signs": 5 / 64,
    "signs224": 5 / 64,
}


def stamp(images: Tensor, pixels: Sequence[Pixel]) -> Tensor:
    """Return a copy of images with some pixels set to the maximum value in all channels.

    Parameters
    ----------
    images : Tensor, shape (..., H, W)
        uint8 in 0..255, or floating point in [0, 1].
    pixels : sequence of (int, int)
        Row and column of each pixel.

    Raises
    ------
    ValueError
        When a pixel lies outside the images.
    TypeError
        For images that are neither uint8 nor floating point.
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    _check_inside(pixels, images.shape)
    stamped = images.clone()
    if pixels:
        rows, columns = (list(positions) for positions in zip(*pixels, strict=True))
        stamped[..., rows, columns] = 255 if images.dtype == torch.uint8 else 1.0
    return stamped


def poison(
    labels: npt.ArrayLike, target: int, rate: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Choose the samples that a malicious client poisons.

    Parameters
    ----------
    labels : array-like of int, shape (N,)
        The client's true labels.
    target : int
        The target class. Its own samples are never chosen: relabelled, they would stay what
        they are.
    rate : float
        Share of all N samples to poison, in [0, 1].
    rng : numpy.random.Generator
        Source of the choice.

    Returns
    -------
    ndarray of int64
        ``round(rate * N)`` indices, ascending, or all that are not of the target class when
        these are fewer.

    Raises
    ------
    ValueError
        For a rate out of range.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    values = np.asarray(labels)
    candidates = np.flatnonzero(values != target)
    number = min(round(rate * len(values)), len(candidates))
    return np.sort(rng.choice(candidates, size=number, replace=False))


def malicious_clients(clients: int, number: int, seed: int) -> tuple[int, ...]:
    """Choose which participants are malicious; the position in the tuple says whose part is whose.

    Parameters
    ----------
    clients : int
        Number of participants.
    number : int
        How many of them are malicious, at most ``clients``.
    seed : int
        The experiment's.

    Returns
    -------
    tuple of int
        Partition ids, ascending.
    """
    rng = np.random.default_rng([seed, _MALICIOUS_STREAM])
    return tuple(sorted(int(p) for p in rng.permutation(clients)[:number]))


def _check_inside(pixels: Sequence[Pixel], shape: Sequence[int]) -> None:
    height, width = shape[-2:]
    outside = [
        (row, column) for row, column in pixels if not (0 <= row < height and 0 <= column < width)
    ]
    if outside:
        raise ValueError(
            f"trigger pixels (row, column) must lie inside the {height}x{width} image, "
            f"these do not: {outside}"
        )
