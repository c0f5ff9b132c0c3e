"""Projected gradient descent on images: small changes that move a network a long way.

Images are floating-point levels in 0..255 here, and every bound and step is in levels: a bound that
is a whole number still holds when the result is rounded to uint8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tasks.models import as_input
from tasks.modes import evaluating


@dataclass(frozen=True)
class Bound:
    """How far and how long images are perturbed.

    Parameters
    ----------
    eps : int
        Largest change of a level, at least 0: L-infinity, in 0..255.
    steps : int
        At least 1.
    """

    eps: int
    steps: int

    def __post_init__(self) -> None:
        """Refuse what is no bound."""
        if not 0 <= self.eps <= 255:
            raise ValueError(f"eps must be in 0..255 levels, got {self.eps}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def project(self, moved: Tensor, images: Tensor) -> Tensor:
        """Return the nearest images that are within `eps` of images, and levels."""
        nearest = torch.minimum(torch.maximum(moved, images - self.eps), images + self.eps)
        return nearest.clamp(0, 255)


def descend(
    moved: Tensor, images: Tensor, bound: Bound, step: float, loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """Take one step down the sign of a loss's gradient, and project.

    Parameters
    ----------
    moved, images : Tensor, shape (N, C, H, W)
        The images as they are now and as they were, float32 levels.
    bound : Bound
    step : float
        Length of the step, in levels.
    loss : callable
        Takes images in levels and returns a number.
    """
    variable = moved.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(variable), variable)
    return bound.project(variable.detach() - step * gradient.sign(), images)


def maximise_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    bound: Bound,
    generator: torch.Generator,
    batch_size: int = 128,
) -> Tensor:
    """Perturb images so that a network errs on them.

    Source: Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to
    Adversarial Attacks", ICLR 2018: from a uniformly random start, steps of 2.5 eps / steps.

    Parameters
    ----------
    model : torch.nn.Module
        Used in evaluation mode; neither its weights nor their gradients change.
    images : Tensor, shape (N, C, H, W)
        uint8.
    labels : Tensor, shape (N,)
        The classes whose cross-entropy is maximised, int64.
    bound : Bound
    generator : torch.Generator
        Of the start, on the CPU.
    batch_size : int
        Images at a time.

    Returns
    -------
    Tensor, shape (N, C, H, W)
        uint8, on the device of the images.
    """
    perturbed = [images[:0]]
    with evaluating(model):
        for clean, classes in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            levels = as_levels(model, clean)
            answers = classes.to(levels.device)

            def loss(moved: Tensor, answers: Tensor = answers) -> Tensor:
                entropy = nn.functional.cross_entropy(model(moved / 255), answers, reduction="sum")
                return -entropy

            start = torch.rand(levels.shape, generator=generator) * 2 - 1
            moved = bound.project(levels + bound.eps * start.to(levels.device), levels)
            for _ in range(bound.steps):
                moved = descend(moved, levels, bound, 2.5 * bound.eps / bound.steps, loss)
            perturbed.append(as_images(moved, clean))
    return torch.cat(perturbed)


def as_levels(model: nn.Module, images: Tensor) -> Tensor:
    """Return uint8 images as float32 levels on the model's device."""
    return as_input(model, images) * 255


def as_images(levels: Tensor, like: Tensor) -> Tensor:
    """Return levels as uint8 images on another tensor's device."""
    return levels.round().to(torch.uint8).to(like.device)
