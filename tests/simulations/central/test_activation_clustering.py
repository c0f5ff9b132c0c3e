"""Activation Clustering: what is read, how it is split, and when a split is suspicious."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from simulations.central.baselines.activation_clustering import (
    ActivationClustering,
    last_hidden,
    reduced,
    suspicious,
)
from tests.simulations.central.toys import network, quadrants, toy


def two_groups(small: int, large: int, distance: float = 20.0) -> np.ndarray:
    points = np.random.default_rng(0).normal(size=(small + large, 3))
    points[:small, 1] += distance
    return points


def judge(points: np.ndarray, share: float = 0.35, silhouette: float = 0.1) -> np.ndarray:
    return suspicious(points, largest_share=share, least_silhouette=silhouette, seed=0)


def test_a_small_group_apart_is_suspicious() -> None:
    np.testing.assert_array_equal(np.flatnonzero(judge(two_groups(20, 80))), np.arange(20))


@pytest.mark.parametrize(("small", "found"), [(34, 34), (35, 0), (50, 0)])
def test_a_group_is_suspicious_below_the_share_alone(small: int, found: int) -> None:
    assert judge(two_groups(small, 100 - small)).sum() == found


def test_a_split_that_fits_badly_is_not_suspicious() -> None:
    points = two_groups(20, 80)
    apart, near = np.linalg.norm(points[:20].mean(0) - points[20:].mean(0)), points.std()
    assert apart > near  # the groups are there ...
    assert judge(points, silhouette=0.7).any()
    assert not judge(points, silhouette=0.95).any()  # ... but more was asked for


@pytest.mark.parametrize("points", [np.ones((30, 2)), np.zeros((30, 0)), np.eye(2)])
def test_points_that_cannot_be_split_are_not_suspicious(points: np.ndarray) -> None:
    assert not judge(points).any()


def test_components_are_independent_of_each_other_and_of_unit_variance() -> None:
    rng = np.random.default_rng(1)
    sources = rng.laplace(size=(500, 3))
    mixed = sources @ rng.normal(size=(3, 20))

    found = reduced(mixed, 10, seed=0)

    assert found.shape == (500, 3)  # it spreads in no other direction
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.eye(3), atol=1e-6)
    agreement = np.abs(np.corrcoef(sources.T, found.T)[:3, 3:])
    assert (agreement.max(1) > 0.98).all()  # each source is one component


def test_no_more_components_than_asked_for_and_none_without_spread() -> None:
    many = np.random.default_rng(2).normal(size=(60, 20))
    assert reduced(many, 10, seed=0).shape == (60, 10)
    assert reduced(np.ones((60, 20)), 10, seed=0).shape == (60, 0)


def test_the_last_hidden_layer_is_what_the_logits_are_made_of() -> None:
    model, (images, _) = network(batch_norm=True), quadrants(30, seed=4)

    found = last_hidden(model, images)

    assert found.shape == (30, 16)
    logits = torch.from_numpy(found).float() @ model.fc2.weight.T + model.fc2.bias
    torch.testing.assert_close(logits, model.eval()(images.float() / 255))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_convolution_at_the_end_is_averaged_over_positions() -> None:
    body = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU())
    model = nn.Sequential(body, nn.Conv2d(5, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images, _ = quadrants(10, seed=5)
    expected = body(images.float() / 255).mean((2, 3)).detach().double().numpy()
    np.testing.assert_allclose(last_hidden(model, images), expected, atol=1e-6)


def test_it_finds_planted_images_and_trains_without_them() -> None:
    scene = toy(batch_norm=True)

    outcome = ActivationClustering()(scene.setting)

    assert outcome.dropped is not None
    assert (np.diff(outcome.dropped) > 0).all()
    assert np.isin(scene.poisoned, outcome.dropped).mean() >= 0.95
    assert len(outcome.dropped) < 2 * len(scene.poisoned)
    assert scene.success(outcome.model) < 0.1  # 1.00 undefended
    assert scene.accuracy(outcome.model) > 0.95


def test_labels_with_few_images_are_not_judged() -> None:
    scene = toy(count=40, poisoned=4)
    everything = replace(ActivationClustering(), largest_share=0.5, least_silhouette=-1.0)
    model = network()
    assert len(everything.poisoned(model, scene.setting)) > 0
    few = replace(everything, dimensions=40)
    assert len(few.poisoned(model, scene.setting)) == 0
