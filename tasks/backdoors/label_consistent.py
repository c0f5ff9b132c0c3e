"""Make images of the target class hard to recognise and stamp them: every label stays true."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tasks.backdoors.attack import Poisoned, check_rate, choose, replace
from tasks.backdoors.perturbation import Bound, maximise_loss
from tasks.triggers import Stamp

MODERATE = Bound(eps=16, steps=100)


@dataclass(frozen=True, eq=False)
class LabelConsistent:
    """Every stamped image is to be taken for one class, although no label is wrong.

    Source: Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019: images of the target
    class are perturbed adversarially, so that the network cannot tell what they are but by the
    trigger. The published code (``generate_poisoned_dataset.py``) reads the perturbed images from a
    file, and its proportion is a share *of the target class*: what NONE's ``get_data.py`` calls
    ``p5``, and notes to be 0.005 in truth, is a rate of 0.005 here. Against training that crops and
    flips, their trigger is in all four corners: `tasks.triggers.Together` makes such a one.

    Parameters
    ----------
    stamp : Stamp
    target : int
        The class whose samples are poisoned.
    rate : float
        Share of *all* training samples that is poisoned, in [0, 1] and at most the class's share.
    model : torch.nn.Module
        A trained network of the attacker's, with the same classes; it stays as it is.
    bound : Bound
        L-infinity; theirs were 8, 16 and 32 levels. Theirs in L2 are not here.
    """

    stamp: Stamp
    target: int
    rate: float
    model: nn.Module
    bound: Bound = MODERATE

    def __post_init__(self) -> None:
        """Refuse a rate out of range."""
        check_rate(self.rate)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Poisoned:
        """Poison; see `Attack`."""
        indices = choose(labels == self.target, self.rate, generator)
        chosen = images[indices.to(images.device)]
        true = torch.full((len(indices),), self.target)
        perturbed = maximise_loss(self.model, chosen, true, self.bound, generator)
        return Poisoned(
            replace(images, indices, self.stamp(perturbed, generator)),
            labels.clone(),
            indices.numpy(),
            indices[:0].numpy(),
        )

    def wanted(self, labels: Tensor) -> Tensor:
        """Return the target class for each; see `Attack`."""
        return torch.full_like(labels, self.target)
