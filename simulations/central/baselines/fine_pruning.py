"""Fine-Pruning: channels that sleep on clean images are removed, and the rest is fine-tuned.

Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks", RAID 2018, https://arxiv.org/abs/1805.12185, sections 3.1 and 3.2. The channels of the
last convolution are pruned in the order of their mean activation on the trusted images, the most
dormant first, until the accuracy on those drops; then the network is trained on them.

How far accuracy may drop, the paper leaves to the defender; the default here, like the epochs and
the rate of the fine-tuning, is ours. What else differs:

- Activations are taken behind a ReLU whatever the network's own activation function is, and behind
  the pooling if that comes before it.
- Pruned channels stay at zero while fine-tuning: their incoming weights get no gradient.
- A network without convolutions is pruned in its last layer that feeds an activation function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from none_core.neurons import NeuronMap
from server.peers.dormancy import furthest, last_convolution
from simulations.central.baselines.base import (
    REPAIR,
    Baseline,
    accuracy,
    fit,
    over_batches,
    require,
    require_trusted,
    undefended,
)
from simulations.central.setting import Outcome, Setting
from tasks.models import as_input


def dormancy_order(model: nn.Module, neurons: NeuronMap, images: Tensor) -> NDArray[np.int64]:
    """Order a map's neurons by their mean activation over images and positions, ascending.

    Parameters
    ----------
    model : torch.nn.Module
    neurons : NeuronMap
        Of one layer.
    images : Tensor
        uint8 (N, C, H, W).

    Returns
    -------
    ndarray of int64
        (J,); equal ones in the order of their index.
    """
    model.eval()
    read = neurons.reader(model)

    def activations(batch: Tensor) -> Tensor:
        (values,) = read(batch)[1]
        return values.relu().reshape(*values.shape[:2], -1).mean(2)

    means = over_batches(model, images, activations).double().mean(0)
    return np.argsort(means.numpy(), kind="stable")


@contextmanager
def kept_at_zero(model: nn.Module, neurons: NeuronMap, pruned: NDArray[np.int64]) -> Iterator[None]:
    """Give the incoming weights of some neurons no gradient."""
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    for neuron in pruned:
        for name, row in neurons.rows(model, int(neuron)).items():
            if name in parameters:
                masks.setdefault(name, torch.ones_like(parameters[name]))[row] = 0
    hooks = [
        parameters[name].register_hook(lambda gradient, mask=mask: gradient * mask)
        for name, mask in masks.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class FinePruning(Baseline):
    """Prune what is dormant, and fine-tune.

    Attributes
    ----------
    drop : float
        Most accuracy on the trusted images that pruning may cost, in [0, 1].
    step : int
        Channels pruned between two measurements of the accuracy, >= 1; the paper's is 1.
    epochs : int
        Passes over the trusted images afterwards, >= 0.
    rate : float
        Their learning rate in units of the schedule's, > 0.
    """

    drop: float = 0.04
    step: int = 1
    epochs: int = 10
    rate: float = 0.1

    def validate(self) -> None:
        """Check the fields."""
        require(0 <= self.drop <= 1, "drop", self.drop, "in [0, 1]")
        require(self.step >= 1, "step", self.step, ">= 1")
        require(self.epochs >= 0, "epochs", self.epochs, ">= 0")
        require(self.rate > 0, "rate", self.rate, "> 0")

    def train(self, setting: Setting) -> Outcome:
        """Train, prune, and fine-tune."""
        require_trusted(setting)
        trained = undefended(setting).eval()
        example = as_input(trained, setting.trusted_images[:1])
        layer = last_convolution(trained, NeuronMap.trace(trained, example))
        neurons = NeuronMap.trace(trained, example, [layer.name])
        pruned = self.dormant(trained, neurons, setting)
        neurons.reset(trained, pruned)
        if self.epochs:
            rate = self.rate * setting.schedule.lr
            schedule = replace(setting.schedule, epochs=self.epochs, lr=rate)
            images, labels = setting.trusted_images, setting.trusted_labels
            with kept_at_zero(trained, neurons, pruned):
                fit(trained, images, labels, schedule, setting.generator(REPAIR))
        return Outcome(trained)

    def dormant(self, model: nn.Module, neurons: NeuronMap, setting: Setting) -> NDArray[np.int64]:
        """Find as many neurons of a map's one layer as can be pruned, the most dormant first."""
        images, labels = setting.trusted_images, setting.trusted_labels
        order = dormancy_order(model, neurons, images)
        before = accuracy(model, images, labels)
        trial = deepcopy(model)

        def loss(count: int) -> float:
            neurons.reset(trial, order[:count])
            return before - accuracy(trial, images, labels)

        counts = range(self.step, len(order), self.step)
        return order[: furthest(counts, loss, self.drop) or 0]
