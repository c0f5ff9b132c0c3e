"""Stamp images and relabel them: to one class, or each to the next one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.backdoors.attack import Poisoned, check_rate, choose, replace
from tasks.triggers import Stamp


@dataclass(frozen=True)
class BadNets:
    """Every stamped image is to be taken for one class.

    Sources: Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning
    Model Supply Chain", 2017; with `tasks.triggers.Blended` Chen et al. 2017; with
    `tasks.triggers.Warp`, and `tasks.triggers.NoisyWarp` as cover, WaNet (Nguyen, Tran, ICLR 2021).
    WaNet's published code (``train.py``) takes the poisoned tenth and the covering fifth anew from
    each batch, and does not mind if the target class is among them. Here both are chosen once, so
    that there is a truth about each sample.

    Parameters
    ----------
    stamp : Stamp
    target : int
        The class. Its own samples are never poisoned: relabelled, they would stay what they are.
    rate : float
        Share of all training samples that is poisoned, in [0, 1]; in NONE's tables 0.005 to 0.2.
    cover : Stamp, optional
        Stamped on other samples, of any class, which keep their labels.
    cover_rate : float
        Share of all training samples that carry it; 0 without `cover`, and WaNet's is twice `rate`.
    """

    stamp: Stamp
    target: int
    rate: float
    cover: Stamp | None = None
    cover_rate: float = 0.0

    def __post_init__(self) -> None:
        """Refuse rates out of range, and a rate of nothing."""
        check_rate(self.rate)
        check_rate(self.cover_rate)
        if self.cover is None and self.cover_rate > 0:
            raise ValueError(f"cover_rate must be 0 without a cover, got {self.cover_rate}")

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Poisoned:
        """Poison; see `Attack`."""
        indices = choose(labels != self.target, self.rate, generator)
        poisoned = _relabel(images, labels, indices, self.stamp, self.wanted, generator)
        if self.cover is None:
            return poisoned
        free = torch.ones(len(labels), dtype=torch.bool)
        free[indices] = False
        cover = choose(free, self.cover_rate, generator)
        covered = self.cover(images[cover.to(images.device)], generator)
        return Poisoned(
            replace(poisoned.images, cover, covered),
            poisoned.labels,
            poisoned.indices,
            cover.numpy(),
        )

    def wanted(self, labels: Tensor) -> Tensor:
        """Return the target class for each; see `Attack`."""
        return torch.full_like(labels, self.target)


@dataclass(frozen=True)
class LabelSpecific:
    """Every stamped image is to be taken for the class after its own, the last for the first.

    Source: Gu et al., "BadNets", 2017 (the all-to-all attack).

    Parameters
    ----------
    stamp : Stamp
    classes : int
        Number of classes, at least 2.
    rate : float
        Share of all training samples that is poisoned, in [0, 1].
    """

    stamp: Stamp
    classes: int
    rate: float

    def __post_init__(self) -> None:
        """Refuse a rate out of range, and a class without another after it."""
        check_rate(self.rate)
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes}")

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Poisoned:
        """Poison; see `Attack`."""
        indices = choose(torch.ones_like(labels, dtype=torch.bool), self.rate, generator)
        return _relabel(images, labels, indices, self.stamp, self.wanted, generator)

    def wanted(self, labels: Tensor) -> Tensor:
        """Return the class after each; see `Attack`."""
        return (labels + 1) % self.classes


def _relabel(
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    stamp: Stamp,
    wanted: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Poisoned:
    """Stamp the samples at the indices, and say that they are what the attacker wants."""
    stamped = stamp(images[indices.to(images.device)], generator)
    said = labels.clone()
    where = indices.to(labels.device)
    said[where] = wanted(labels[where])
    return Poisoned(replace(images, indices, stamped), said, indices.numpy(), indices[:0].numpy())
