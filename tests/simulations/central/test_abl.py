"""Anti-Backdoor Learning: the level of the loss, who is isolated, and what unlearning does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from simulations.central.baselines.abl import (
    AntiBackdoorLearning,
    isolated,
    local_gradient_ascent,
    losses,
)
from tests.simulations.central.toys import network, quadrants, toy


@pytest.mark.parametrize(("loss", "slope"), [(0.7, 1.0), (0.51, 1.0), (0.49, -1.0), (0.1, -1.0)])
def test_below_the_level_the_loss_is_ascended(loss: float, slope: float) -> None:
    value = torch.tensor(loss, requires_grad=True)
    levelled = local_gradient_ascent(value, gamma=0.5)
    levelled.backward()
    assert float(levelled) == pytest.approx(slope * loss)
    assert float(value.grad) == slope


def test_the_loss_stays_about_the_level() -> None:
    # Descent in one dimension on x**2 ends at 0; levelled, it ends where x**2 is 0.5.
    x = torch.tensor(2.0, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        local_gradient_ascent(x**2, gamma=0.5).backward()
        optimizer.step()
    assert float(x**2) == pytest.approx(0.5, abs=0.05)


def test_losses_are_those_of_single_images() -> None:
    model, (images, labels) = network().eval(), quadrants(6, seed=1)
    found = losses(model, images, labels)
    for value, image, label in zip(found, images, labels, strict=True):
        probabilities = model(image[None].float() / 255).softmax(1)
        assert float(value) == pytest.approx(-float(probabilities[0, label].log()), rel=1e-4)


def test_the_lowest_losses_are_isolated() -> None:
    values = torch.tensor([5.0, 0.1, 3.0, 0.2, 4.0, 0.2, 9.0, 8.0, 7.0, 6.0])
    np.testing.assert_array_equal(isolated(values, 0.39), [1, 3, 5])
    np.testing.assert_array_equal(isolated(values, 0.01), [1, 3])  # a batch is two at least


def test_planted_images_are_isolated_and_unlearned() -> None:
    # A task that is harder than the trigger, as the method assumes.
    scene = toy(batch_norm=True, contrast=15, epochs=8)
    method = AntiBackdoorLearning(turning=0.6, isolation=0.02, unlearning_lr=0.01)

    kept = replace(method, unlearning_steps=0)(scene.setting)
    unlearned = method(scene.setting)

    for outcome in (kept, unlearned):
        assert outcome.dropped is not None
        assert len(outcome.dropped) == 8  # 2 % of 400
        assert np.isin(outcome.dropped, scene.poisoned).all()
    assert scene.success(kept.model) > 0.9
    assert scene.success(unlearned.model) < 0.5 * scene.success(kept.model)
