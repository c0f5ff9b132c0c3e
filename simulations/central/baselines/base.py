"""What the methods share: repeatable runs, steps on any loss, and reading a trained network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from simulations.central.setting import Outcome, Schedule, Setting
from tasks.models import as_input
from tasks.training import batches, train

# Streams of the setting's seed. All that begin with ordinary training here begin with the same one.
TRAINING, REPAIR, NOISE, CLUSTERING, LAYERS = range(5)

Loss = Callable[[Tensor, Tensor], Tensor]  # of inputs (n, C, H, W) and labels (n,); a scalar


class Baseline(ABC):
    """A method that a table compares: a `Method` with the hyperparameters of its paper as fields.

    Subclasses are frozen dataclasses, so that `dataclasses.replace` makes another setting of them.
    """

    def __call__(self, setting: Setting) -> Outcome:
        """Train on the setting's images.

        The same setting gives the same bits on the same machine, on CUDA as far as cuDNN has
        deterministic kernels. The global random state is left as it was.

        Raises
        ------
        ValueError
            If a field is out of range, or the setting lacks what the method needs.
        """
        self.validate()
        with repeatable(setting):
            outcome = self.train(setting)
        outcome.model.eval()
        return outcome

    @abstractmethod
    def validate(self) -> None:
        """Raise a ValueError that names the field that is out of range."""

    @abstractmethod
    def train(self, setting: Setting) -> Outcome:
        """Do what the paper says."""


def require(legal: bool, name: str, value: object, rule: str) -> None:
    """Raise a ValueError that names a field, the rule for it, and its value, unless it is legal."""
    if not legal:
        raise ValueError(f"{name} must be {rule}, got {value}")


@contextmanager
def repeatable(setting: Setting) -> Iterator[None]:
    """Seed what layers such as dropout draw from, and keep cuDNN to deterministic kernels."""
    with (
        torch.random.fork_rng(),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.manual_seed(setting.generator(LAYERS).initial_seed())
        yield


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
) -> nn.Module:
    """Train a model in place with the cross-entropy, as `tasks.training.train` does."""
    train(model, images, labels, **asdict(schedule), generator=generator)
    return model


def undefended(setting: Setting) -> nn.Module:
    """Train a fresh model on all images."""
    return fit(
        setting.model_fn(),
        setting.images,
        setting.labels,
        setting.schedule,
        setting.generator(TRAINING),
    )


def descend(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    schedule: Schedule,
    generator: torch.Generator,
) -> None:
    """Train a model in place with SGD on a loss of one's own.

    Parameters
    ----------
    model : torch.nn.Module
        Put into training mode, and left in it.
    images, labels : Tensor
        uint8 (N, C, H, W) and int64 (N,).
    loss : callable
        Takes a batch as the model takes it, and its labels on the same device.
    schedule : Schedule
        With `epochs` 0, nothing is done.
    generator : torch.Generator
        Draws the order of the images.
    """
    optimizer = sgd(model.parameters(), schedule)
    model.train()
    for _ in range(schedule.epochs):
        for chosen in batches(len(images), schedule.batch_size, generator):
            inputs = as_input(model, images[chosen])
            optimizer.zero_grad()
            loss(inputs, labels[chosen].to(inputs.device)).backward()
            optimizer.step()


def sgd(parameters: Iterable[nn.Parameter], schedule: Schedule) -> torch.optim.SGD:
    """Make the optimizer of a schedule."""
    return torch.optim.SGD(
        parameters,
        lr=schedule.lr,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
    )


def require_trusted(setting: Setting) -> None:
    """Raise a ValueError if there are too few trusted images to train on."""
    count = len(setting.trusted_images)
    if count < 2:
        raise ValueError(f"trusted_images must be at least 2 for this method, got {count}")


@torch.no_grad()
def over_batches(
    model: nn.Module,
    images: Tensor,
    function: Callable[[Tensor], Tensor],
    batch_size: int = 500,
) -> Tensor:
    """Apply a function to all images in evaluation mode, batch by batch, in their order.

    Parameters
    ----------
    model : torch.nn.Module
        What the function reads; its mode is left as it was.
    images : Tensor
        uint8 (N, C, H, W).
    function : callable
        Of a batch as the model takes it, (n, C, H, W); returns (n, ...).

    Returns
    -------
    Tensor
        (N, ...), on the CPU.
    """
    training = model.training
    model.eval()
    parts = [function(as_input(model, batch)).cpu() for batch in images.split(batch_size)]
    model.train(training)
    return torch.cat(parts)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that a model in evaluation mode gives their label, in [0, 1]."""
    predicted = over_batches(model, images, lambda batch: model(batch).argmax(1))
    return float((predicted == labels.cpu()).double().mean())
