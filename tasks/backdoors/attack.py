"""What every attack on training data is, and how it chooses what to poison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.triggers import Stamp


@dataclass(frozen=True, eq=False)
class Poisoned:
    """A poisoned training set, and the truth about it.

    Attributes
    ----------
    images : Tensor
        uint8, (N, C, H, W), in the order of the clean ones.
    labels : Tensor
        What the images are said to be, int64, (N,).
    indices : ndarray of int64
        The poisoned samples, ascending: those that make the network answer as the attacker wants.
    cover : ndarray of int64
        Samples, ascending, that were changed too but keep their labels and teach no wrong answer,
        only that nothing but the trigger itself is answered to; often none.
    """

    images: Tensor
    labels: Tensor
    indices: NDArray[np.int64]
    cover: NDArray[np.int64]


class Attack(Protocol):
    """An attack on training data."""

    @property
    def stamp(self) -> Stamp:
        """What is stamped on images at test time."""

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Poisoned:
        """Poison a copy of a clean training set.

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W)
            uint8.
        labels : Tensor, shape (N,)
            True labels, int64.
        generator : torch.Generator
            Source of every choice, on the CPU: the same one gives the same result.

        Raises
        ------
        ValueError
            When there are fewer samples to poison than the rate asks for, or the images cannot
            carry the trigger.
        """

    def wanted(self, labels: Tensor) -> Tensor:
        """Return the answers wanted for stamped images with these true labels.

        Where that is the true label itself, the attack has no use for the image.
        """


def choose(candidates: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Choose samples to poison.

    Parameters
    ----------
    candidates : Tensor, shape (N,)
        Whether each sample may be chosen, bool.
    rate : float
        Share of all N samples, not of the candidates, to choose: in [0, 1].
    generator : torch.Generator
        Source of the choice, on the CPU.

    Returns
    -------
    Tensor of int64
        ``round(rate * N)`` indices, ascending, on the CPU.

    Raises
    ------
    ValueError
        For a rate out of range, or one that asks for more than there are candidates.
    """
    check_rate(rate)
    eligible = candidates.cpu().nonzero().flatten()
    number = round(rate * len(candidates))
    if number > len(eligible):
        raise ValueError(
            f"rate must be at most {len(eligible) / len(candidates):g} (of {len(candidates)} "
            f"samples this attack can poison {len(eligible)}), got {rate}"
        )
    order = torch.randperm(len(eligible), generator=generator)
    return eligible[order[:number]].sort().values


def check_rate(rate: float) -> None:
    """Raise ValueError unless the rate is in [0, 1]."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")


def replace(images: Tensor, indices: Tensor, by: Tensor) -> Tensor:
    """Return a copy of images (N, C, H, W), those at the indices (M,) replaced by (M, C, H, W)."""
    replaced = images.clone()
    replaced[indices.to(images.device)] = by.to(images.device)
    return replaced
