"""Pruning's votes, where it stops, and extreme weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from none_core.activations import HistogramGrid, ReportSpec, build_report
from none_core.neurons import NeuronMap
from server.peers.dormancy import furthest, mean_activations, pruning_order, without_extremes


def test_the_mean_activation_is_that_behind_a_relu() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -2, 0.1]).view(3, 1, 1, 1))
        model[0].bias.copy_(torch.tensor([0.0, 0, -9]))  # the last one sleeps
    inputs = torch.randn(40, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(40) % 2
    neurons = NeuronMap.trace(model, inputs[:1])
    spec = ReportSpec(neurons.size, 2, frozenset({"label-histograms"}))
    report = build_report(model, neurons, [(inputs, labels)], spec)

    found = mean_activations(report["histograms"])

    values = model[0](inputs).relu().amax((2, 3)).mean(0).detach().numpy()
    assert np.all(np.abs(found - values) <= np.maximum(HistogramGrid.SMALLEST, values / 4))
    assert found[:2].all()
    assert not found[2]


def test_the_order_is_that_of_the_mean_rank() -> None:
    activations = np.array([[0.1, 5, 3, 0.2], [0, 9, 8, 7], [100, 2, 3, 1]])
    # Ranks: 1 4 3 2 / 1 4 3 2 / 4 2 3 1
    assert pruning_order(activations).tolist() == [3, 0, 2, 1]
    ties = np.array([[0, 0, 1.0], [0, 0, 1]])
    assert pruning_order(ties).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("losses", "reached"),
    [([0, 0.01, 0.02], 2), ([0, 0.03, 0], 0), ([0.5], None), ([], None), ([0, np.nan, 0], 0)],
)
def test_attempts_end_with_the_first_that_costs_too_much(losses: list, reached: object) -> None:
    assert furthest(range(len(losses)), losses.__getitem__, 0.02) == reached


def test_weights_beyond_some_deviations_are_moved_there() -> None:
    weights = torch.tensor([[-1.0, 1], [-1, 1], [0, 6]])
    mean, deviation = 1.0, np.sqrt(np.mean([4, 0, 4, 0, 1, 25]))
    expected = weights.clamp(mean - deviation, mean + deviation)
    torch.testing.assert_close(without_extremes(weights, 1.0), expected)
    assert torch.equal(without_extremes(weights, 5.0), weights)
