"""What benign accuracy and attack success rate mean: the only place that computes either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tasks.models import as_input
from tasks.poisoning import Trigger, stamp


@dataclass(frozen=True)
class Scores:
    """How well a model does its task, and how well the attack on it works.

    Attributes
    ----------
    ba : float
        Benign accuracy: the share of test images that are classified correctly.
    asr : float
        Attack success rate: the share of the test images *not of the target class* that, stamped
        with the *whole* trigger, are classified as the target class.
    recovered : float
        Recovered accuracy: the share of the same stamped images that are given their true class.
    """

    ba: float
    asr: float
    recovered: float


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    trigger: Trigger,
    target: int,
    batch_size: int = 500,
) -> Scores:
    """Score a model on clean and on stamped test images.

    Parameters
    ----------
    model : torch.nn.Module
        Evaluated in evaluation mode; the mode of each of its modules is then put back.
    images : Tensor, shape (N, C, H, W)
        Test images, uint8.
    labels : Tensor, shape (N,)
        True labels, int64.
    trigger : Trigger
        Stamped whole. A run without an attacker is scored with the trigger it is compared with.
    target : int
        The target class.
    batch_size : int
        Images per forward pass.

    Raises
    ------
    ValueError
        When there is no image, none outside the target class, or a trigger pixel outside the image.
    """
    attacked = labels != target
    if not attacked.any():
        raise ValueError(f"ASR is undefined: no test image has a label other than target {target}")
    with _evaluating(model):
        predicted = _predict(model, images, batch_size)
        stamped = _predict(model, stamp(images[attacked], trigger.whole()), batch_size)
    return Scores(
        ba=_share(predicted == labels),
        asr=_share(stamped == target),
        recovered=_share(stamped == labels[attacked]),
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Enter evaluation mode without gradients; afterwards put back the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _predict(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Return the predicted class of each image, on the images' device."""
    batches = images.split(batch_size)
    return torch.cat([model(as_input(model, batch)).argmax(1) for batch in batches]).to(
        images.device
    )


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)
