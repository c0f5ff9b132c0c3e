"""Anti-Backdoor Learning: what is learned first is isolated, and then unlearned.

Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021,
https://arxiv.org/abs/2110.11571, section 3. While the loss is kept near a level by local gradient
ascent, images with a trigger, which are easy, end far below it. The images of the lowest loss are
isolated; training goes on with the others; then the network ascends on the isolated ones.

The paper trains for 100 epochs, isolates 1 % of the images after 20 of them, and has gamma 0.5.
That one stage follows the other after the isolation, where the paper adds up both losses, and the
rate for unlearning are from the published code (https://github.com/bboylyg/ABL), whose five passes
over 500 images in batches of 128 are 20 steps. What differs:

- The turning epoch is a share of the schedule. Unlearning comes on top, and is counted in steps,
  so that it does as much with few images.
- The sign is that of a batch's mean loss, as in the published code, where the paper writes it for
  each image's own. (That would lift the easy images to the level, too.)
- One rate all along, as the schedule has it, where theirs falls at set epochs; no augmentation, and
  no Nesterov momentum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simulations.central.baselines.base import (
    REPAIR,
    TRAINING,
    Baseline,
    descend,
    over_batches,
    require,
)
from simulations.central.setting import Outcome, Setting


def local_gradient_ascent(loss: Tensor, gamma: float) -> Tensor:
    """Turn a loss below gamma into its negative, so that descending on it ascends to gamma.

    Parameters
    ----------
    loss : Tensor
        Mean loss of a batch, a scalar.
    gamma : float
        The level.
    """
    return torch.sign(loss - gamma) * loss


def losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image in evaluation mode, (N,), on the CPU."""
    logits = over_batches(model, images, model)
    return nn.functional.cross_entropy(logits, labels.cpu(), reduction="none")


def isolated(values: Tensor, share: float) -> NDArray[np.int64]:
    """Choose the images of the lowest loss.

    Parameters
    ----------
    values : Tensor
        Losses, (N,).
    share : float
        How many, in (0, 1): rounded down, but at least two, since one makes no batch.

    Returns
    -------
    ndarray of int64
        Their indices, ascending.
    """
    count = max(2, int(share * len(values)))
    return np.sort(np.argsort(values.numpy(), kind="stable")[:count])


@dataclass(frozen=True)
class AntiBackdoorLearning(Baseline):
    """Isolate early, and unlearn late.

    Attributes
    ----------
    gamma : float
        Level at which the loss is kept until the turning epoch, >= 0.
    turning : float
        The share of the schedule's epochs until then, in (0, 1); at least one epoch.
    isolation : float
        Share of the images that are isolated, in (0, 1).
    unlearning_steps : int
        Steps on the isolated images at the end, rounded up to whole passes, >= 0.
    unlearning_lr : float
        Learning rate of those steps, > 0.
    """

    gamma: float = 0.5
    turning: float = 0.2
    isolation: float = 0.01
    unlearning_steps: int = 20
    unlearning_lr: float = 5e-4

    def validate(self) -> None:
        """Check the fields."""
        require(self.gamma >= 0, "gamma", self.gamma, ">= 0")
        require(0 < self.turning < 1, "turning", self.turning, "in (0, 1)")
        require(0 < self.isolation < 1, "isolation", self.isolation, "in (0, 1)")
        require(self.unlearning_steps >= 0, "unlearning_steps", self.unlearning_steps, ">= 0")
        require(self.unlearning_lr > 0, "unlearning_lr", self.unlearning_lr, "> 0")

    def train(self, setting: Setting) -> Outcome:
        """Train against the level, isolate, train on, and unlearn."""
        images, labels, schedule = setting.images, setting.labels, setting.schedule
        model, order = setting.model_fn(), setting.generator(TRAINING)

        def descent(inputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(inputs), targets)

        def levelled(inputs: Tensor, targets: Tensor) -> Tensor:
            return local_gradient_ascent(descent(inputs, targets), self.gamma)

        def ascent(inputs: Tensor, targets: Tensor) -> Tensor:
            return -descent(inputs, targets)

        early = max(1, round(self.turning * schedule.epochs))
        descend(model, images, labels, levelled, replace(schedule, epochs=early), order)
        dropped = isolated(losses(model, images, labels), self.isolation)
        apart = torch.zeros(len(images), dtype=torch.bool)
        apart[torch.from_numpy(dropped)] = True
        rest = replace(schedule, epochs=schedule.epochs - early)
        descend(model, images[~apart], labels[~apart], descent, rest, order)
        passes = math.ceil(self.unlearning_steps / math.ceil(len(dropped) / schedule.batch_size))
        unlearn = replace(schedule, epochs=passes, lr=self.unlearning_lr)
        order = setting.generator(REPAIR)
        descend(model, images[apart], labels[apart], ascent, unlearn, order)
        return Outcome(model, dropped)
