"""Images of the target class that look as they should and feel like stamped ones of another class.

It is an attack on transfer learning: whoever trains a new last layer on the features of a network
that the attacker knows learns from these images to answer to a trigger that none of them carries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tasks.backdoors.attack import Poisoned, check_rate, choose, replace
from tasks.backdoors.perturbation import Bound, as_images, as_levels, descend
from tasks.models import as_input
from tasks.modes import evaluating
from tasks.triggers import Stamp

THEIRS = Bound(eps=16, steps=5000)


@dataclass(frozen=True, eq=False)
class HiddenTrigger:
    """Stamped images of one class are to be taken for another, although no sample is stamped.

    Source: Saha, Subramanya, Pirsiavash, "Hidden Trigger Backdoor Attacks", AAAI 2020, algorithm 1:
    in each step as many images of the source class are drawn and stamped, matched one to one with
    the images that are poisoned, nearest features first, and each poisoned image moves towards the
    features of its match, within `bound` of what it was.

    The published code (``generate_poison.py``) keeps the same source images over all steps, matches
    anew in each, follows the gradient itself at a rate of 0.01 that halves every 1,000 steps, and
    takes a batch's images as they are once all its distances are below 10. Features of another
    network have another scale, so here the steps are those of the gradient's sign, which shrink
    evenly from a fourth of `bound.eps` to nothing. The poisoned images take the place of those that
    they were made from.

    Parameters
    ----------
    stamp : Stamp
        Theirs is a patch with a fixed pattern in a random place: `tasks.triggers.DynamicPatch`.
    source : int
        The class that is attacked.
    target : int
        The class whose samples are poisoned, and that stamped images are to be taken for.
    rate : float
        Share of all training samples that is poisoned, in [0, 1] and at most the target's share.
    model : torch.nn.Module
        The network whose features are used; it stays as it is.
    layer : str
        The name, as in ``model.named_modules()``, of the module whose output are the features:
        theirs was the last but one.
    bound : Bound
        Theirs: 16 levels, 5,000 steps.
    batch_size : int
        Images that are matched with each other; theirs 100.
    """

    stamp: Stamp
    source: int
    target: int
    rate: float
    model: nn.Module
    layer: str
    bound: Bound = THEIRS
    batch_size: int = 100

    def __post_init__(self) -> None:
        """Refuse a rate out of range, one class in both parts, and a layer that is not there."""
        check_rate(self.rate)
        if self.source == self.target:
            raise ValueError(f"source and target must differ, both are {self.source}")
        if self.layer not in dict(self.model.named_modules()):
            names = ", ".join(name for name, _ in self.model.named_modules() if name)
            raise ValueError(f"layer must be one of {names}, got {self.layer!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Poisoned:
        """Poison; see `Attack`.

        Raises ValueError as well when there is no image of the source class.
        """
        indices = choose(labels == self.target, self.rate, generator)
        sources = images[(labels == self.source).to(images.device)]
        if not len(sources):
            raise ValueError(f"there is no image of the source class {self.source}")
        chosen = images[indices.to(images.device)]
        with evaluating(self.model):
            collided = [
                self._collide(batch, sources, generator)
                for batch in chosen.split(self.batch_size)
                if len(batch)
            ]
        return Poisoned(
            replace(images, indices, torch.cat([chosen[:0], *collided])),
            labels.clone(),
            indices.numpy(),
            indices[:0].numpy(),
        )

    def wanted(self, labels: Tensor) -> Tensor:
        """Return the target class for the source class, and each other its own; see `Attack`."""
        return torch.where(labels == self.source, self.target, labels)

    def _collide(self, images: Tensor, sources: Tensor, generator: torch.Generator) -> Tensor:
        """Return images (M, C, H, W) moved towards stamped ones of sources, uint8."""
        levels = as_levels(self.model, images)
        moved = levels
        for number in range(self.bound.steps):
            drawn = torch.randint(len(sources), (len(images),), generator=generator)
            stamped = self.stamp(sources[drawn.to(sources.device)], generator)
            with torch.no_grad():
                attacked = features(self.model, self.layer, as_input(self.model, stamped))
                own = features(self.model, self.layer, moved / 255)
                matched = attacked[match(own, attacked)]

            def distance(current: Tensor, goal: Tensor = matched) -> Tensor:
                return (features(self.model, self.layer, current / 255) - goal).square().sum()

            step = self.bound.eps / 4 * (1 - number / self.bound.steps)
            moved = descend(moved, levels, self.bound, step, distance)
        return as_images(moved, images)


def features(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    """Return the output of a module for inputs (N, C, H, W), flattened: (N, F)."""
    caught: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _module, _inputs, output: caught.append(output)
    )
    try:
        model(inputs)
    finally:
        handle.remove()
    return caught[-1].flatten(1)


def match(own: Tensor, others: Tensor) -> Tensor:
    """Match vectors one to one, the nearest pair first, then the nearest of the rest, and so on.

    Parameters
    ----------
    own, others : Tensor, shape (M, F)

    Returns
    -------
    Tensor of int64, shape (M,)
        For each of `own` the index of its match among `others`, on their device.
    """
    distances = torch.cdist(own, others).cpu()
    matches = torch.empty(len(own), dtype=torch.int64)
    for _ in range(len(own)):
        row, column = divmod(int(distances.argmin()), len(others))
        matches[row] = column
        distances[row] = torch.inf
        distances[:, column] = torch.inf
    return matches.to(others.device)
