"""DP-SGD: each image's gradient is clipped by itself, and the noise is as wide as it should be."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from simulations.central.baselines.dp_sgd import NARROW, WIDE, DpSgd
from simulations.central.baselines.plain import Plain
from simulations.central.setting import Schedule, Setting
from tests.simulations.central.toys import network, toy, weights

pytest.importorskip("opacus")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += x
        return self.head(self.relu(out).flatten(1))


def one_step(lr: float = 0.1, **changes: object) -> Setting:
    setting = toy(count=8, poisoned=0).setting
    return replace(setting, schedule=Schedule(1, batch_size=8, lr=lr, momentum=0.0), **changes)


def test_without_clipping_and_noise_it_is_plain_training() -> None:
    setting = toy(count=80, epochs=3).setting
    difference = weights(DpSgd(clip=1e6, noise=0)(setting).model) - weights(Plain()(setting).model)
    assert float(difference.abs().max()) < 1e-5


def test_a_step_is_the_mean_of_gradients_clipped_one_by_one() -> None:
    setting, clip = one_step(), 0.5
    model = network()
    total, norms = torch.zeros(()), []
    for image, label in zip(setting.images, setting.labels, strict=True):
        loss = nn.functional.cross_entropy(model(image[None].float() / 255), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        gradient = torch.cat([g.flatten() for g in gradients])
        norms.append(float(gradient.norm()))
        total = total + gradient * min(1, clip / norms[-1])
    assert max(norms) > clip  # it is clipping that is tested
    expected = nn.utils.parameters_to_vector(model.parameters()) - 0.1 * total / 8

    outcome = DpSgd(clip=clip, noise=0)(setting)

    actual = nn.utils.parameters_to_vector(outcome.model.parameters())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_noise_is_as_wide_as_the_multiplier_says() -> None:
    setting = one_step(lr=1.0)
    quiet, noisy = (weights(DpSgd(clip=0.5, noise=z)(setting).model) for z in (0, 3))
    noise = noisy - quiet
    assert float(noise.std()) == pytest.approx(3 * 0.5 / 8, rel=0.1)
    assert abs(float(noise.mean())) < 0.02


def test_batch_normalisation_gives_way() -> None:
    outcome = WIDE(one_step(model_fn=lambda: network(batch_norm=True)))
    kinds = {type(module) for module in outcome.model.modules()}
    assert nn.BatchNorm2d not in kinds
    assert nn.GroupNorm in kinds


def test_the_model_that_comes_back_is_an_ordinary_one() -> None:
    outcome = NARROW(one_step())
    assert outcome.model.state_dict().keys() == network().state_dict().keys()
    outcome.model(torch.zeros(3, 1, 8, 8)).sum().backward()
    assert not any(hasattr(parameter, "grad_sample") for parameter in outcome.model.parameters())


def test_residual_additions_and_activations_in_place_are_watched_rightly() -> None:
    setting = replace(toy(count=40, epochs=2).setting, model_fn=Block)
    difference = weights(DpSgd(clip=1e6, noise=0)(setting).model) - weights(Plain()(setting).model)
    assert float(difference.abs().max()) < 1e-5


def test_the_settings_are_the_papers() -> None:
    assert (WIDE.clip, WIDE.noise, NARROW.clip, NARROW.noise) == (4.0, 0.1, 1.0, 0.5)


def test_without_opacus_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ImportError, match=r"pip install none-defense\[privacy\]"):
        WIDE(one_step())
