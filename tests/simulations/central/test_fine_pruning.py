"""Fine-Pruning: who sleeps, how many are pruned, and that they stay pruned."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from none_core.neurons import NeuronMap
from simulations.central.baselines.base import accuracy, fit
from simulations.central.baselines.fine_pruning import FinePruning, dormancy_order, kept_at_zero
from simulations.central.baselines.plain import Plain
from simulations.central.setting import Schedule
from tests.simulations.central.toys import network, quadrants, toy

EXAMPLE = torch.zeros(1, 1, 8, 8)


def last_layer(model: nn.Module) -> NeuronMap:
    return NeuronMap.trace(model, EXAMPLE, ["conv2"])


def values_of(model: nn.Module, images: Tensor) -> Tensor:
    """What enters the second activation, by a hook, (n, 16, 4, 4)."""
    found: list[Tensor] = []
    hook = model.relu2.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model.eval()(images.float() / 255)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_most_dormant_come_first(batch_norm: bool) -> None:
    model, (images, _) = network(batch_norm), quadrants(30, seed=6)
    values = values_of(model, images)
    means = [float(values[:, channel].clamp(min=0).double().mean()) for channel in range(16)]
    expected = sorted(range(16), key=lambda channel: means[channel])
    assert dormancy_order(model, last_layer(model), images).tolist() == expected


@pytest.mark.parametrize(("drop", "step"), [(0.04, 1), (0.3, 1), (0.04, 5)])
def test_pruning_goes_on_until_accuracy_drops_too_far(drop: float, step: int) -> None:
    scene = toy()
    setting = scene.setting
    model = Plain()(setting).model
    neurons, method = last_layer(model), FinePruning(drop=drop, step=step)
    order = dormancy_order(model, neurons, setting.trusted_images)
    whole = accuracy(model, setting.trusted_images, setting.trusted_labels)

    def lost(count: int) -> float:
        pruned = deepcopy(model)
        neurons.reset(pruned, order[:count])
        return whole - accuracy(pruned, setting.trusted_images, setting.trusted_labels)

    chosen = method.dormant(model, neurons, setting)

    assert 0 < len(chosen) < 16
    assert len(chosen) % step == 0
    np.testing.assert_array_equal(chosen, order[: len(chosen)])
    assert all(lost(count) <= drop for count in range(step, len(chosen) + 1, step))
    assert len(chosen) + step >= 16 or lost(len(chosen) + step) > drop


@pytest.mark.parametrize("batch_norm", [False, True])
def test_pruned_channels_stay_silent_while_the_others_learn(batch_norm: bool) -> None:
    model, (images, labels) = network(batch_norm), quadrants(80, seed=7)
    neurons, pruned = last_layer(model), np.array([2, 3, 11])
    neurons.reset(model, pruned)
    before = model.conv2.weight.detach().clone()

    schedule = Schedule(3, batch_size=20, weight_decay=0.01)
    with kept_at_zero(model, neurons, pruned):
        fit(model, images, labels, schedule, torch.Generator().manual_seed(0))

    values = values_of(model, images)
    assert not values[:, pruned].any()
    awake = np.setdiff1d(np.arange(16), pruned)
    assert (model.conv2.weight[awake] != before[awake]).any()
    assert not model.conv2.weight._backward_hooks


def test_in_a_residual_block_the_pruned_branch_does_not_grow_back() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.relu, self.head = nn.ReLU(), nn.Linear(256, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.head(self.relu(self.conv(x) + x).flatten(1))

    torch.manual_seed(0)
    model, (images, labels) = Block(), quadrants(40, seed=8)
    neurons = NeuronMap.trace(model, EXAMPLE, ["conv"])
    neurons.reset(model, [1])
    with kept_at_zero(model, neurons, np.array([1])):
        fit(model, images, labels, Schedule(2, batch_size=20), torch.Generator().manual_seed(0))
    assert not model.conv.weight[1].any()
    assert not model.conv.bias[1]
    fit(model, images, labels, Schedule(1, batch_size=20), torch.Generator().manual_seed(0))
    assert model.conv.weight[1].any()  # it would have


def test_it_takes_a_planted_backdoor_out() -> None:
    scene = toy(batch_norm=True)
    outcome = FinePruning()(scene.setting)
    assert scene.success(outcome.model) < 0.2  # 1.00 undefended
    assert scene.accuracy(outcome.model) > 0.95
    pruned_only = replace(FinePruning(), epochs=0)(scene.setting)
    silent = ~values_of(outcome.model, scene.clean_images).flatten(2).any(2).any(0)
    assert torch.equal(
        silent, ~values_of(pruned_only.model, scene.clean_images).flatten(2).any(2).any(0)
    )
    assert 0 < int(silent.sum()) < 16
