"""What benign accuracy and attack success rate mean: the only place that computes either."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tasks.models import as_input
from tasks.modes import evaluating
from tasks.poisoning import Trigger
from tasks.triggers import Pixels, Stamp


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


@dataclass(frozen=True)
class Success:
    """How well an attack works.

    Attributes
    ----------
    asr : float
        Attack success rate: the share of the stamped test images *whose wanted answer is not their
        true label* that are given the wanted answer.
    recovered : float
        Recovered accuracy: the share of the same images that are given their true class.
    """

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
    if (labels == target).all():
        raise ValueError(f"ASR is undefined: no test image has a label other than target {target}")
    ba = benign_accuracy(model, images, labels, batch_size)
    attacked = attack_success(
        model,
        images,
        labels,
        Pixels(trigger),
        lambda true: torch.full_like(true, target),
        torch.Generator(),  # the stamp is the same for every image
        batch_size,
    )
    return Scores(ba=ba, asr=attacked.asr, recovered=attacked.recovered)


def benign_accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500
) -> float:
    """Return the share of test images that are classified correctly; see `evaluate`.

    Raises
    ------
    ValueError
        When there is no image.
    """
    if not len(images):
        raise ValueError("BA is undefined: there is no test image")
    return _share(_predict(model, images.split(batch_size)) == labels)


def attack_success(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    stamp: Stamp,
    wanted: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    batch_size: int = 500,
) -> Success:
    """Score any attack: any trigger, and any answers that the attacker wants.

    Only images whose wanted answer is not their true label are stamped and counted: an attack whose
    answers are those of the healthy model has not succeeded at anything.

    Parameters
    ----------
    model, images, labels, batch_size
        As in `evaluate`.
    stamp : Stamp
        The trigger.
    wanted : callable
        Takes true labels (M,), int64, and returns the answers that the attacker wants for these
        images once they are stamped: (M,), int64, on the same device.
    generator : torch.Generator
        Of stamps that are drawn for each image, on the CPU. They depend on `batch_size` as well.

    Raises
    ------
    ValueError
        When the attacker wants nothing but true labels, or the images cannot carry the trigger.
    """
    answers = wanted(labels)
    attacked = answers != labels
    if not attacked.any():
        raise ValueError("ASR is undefined: of no test image is another than its true label wanted")
    batches = images[attacked].split(batch_size)
    predicted = _predict(model, (stamp(batch, generator) for batch in batches))
    return Success(
        asr=_share(predicted == answers[attacked]),
        recovered=_share(predicted == labels[attacked]),
    )


def _predict(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return the predicted class of each image of the batches, on the images' device."""
    with evaluating(model), torch.inference_mode():
        return torch.cat(
            [model(as_input(model, batch)).argmax(1).to(batch.device) for batch in batches]
        )


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)
