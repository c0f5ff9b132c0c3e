"""What holds for every method: it repeats, it learns, and it refuses what it cannot use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from none_core.neurons import NeuronMap
from simulations.central.baselines.abl import AntiBackdoorLearning
from simulations.central.baselines.activation_clustering import ActivationClustering
from simulations.central.baselines.base import Baseline, accuracy, over_batches
from simulations.central.baselines.dp_sgd import DpSgd
from simulations.central.baselines.fine_pruning import FinePruning
from simulations.central.baselines.nad import NeuralAttentionDistillation
from simulations.central.baselines.plain import Plain
from simulations.central.methods import METHODS, NoneDefense
from simulations.central.setting import Setting
from tasks.training import train
from tests.simulations.central.toys import network, predicted, quadrants, toy, weights


def small(seed: int = 0) -> Setting:
    return toy(count=80, poisoned=8, epochs=2, trusted=40, seed=seed).setting


def with_dropout() -> nn.Module:
    layers = list(network(batch_norm=True))
    return nn.Sequential(*layers[:-1], nn.Dropout(0.3), layers[-1])


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bits_whatever_the_global_state(name: str) -> None:
    if name.startswith("dp-sgd"):
        pytest.importorskip("opacus")
    setting = replace(small(), model_fn=with_dropout)

    def run(global_seed: int, seed: int) -> tuple[torch.Tensor, np.ndarray | None]:
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        outcome = METHODS[name](replace(setting, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        assert not outcome.model.training
        return weights(outcome.model), outcome.dropped

    (one, dropped), (same, again), (other, _) = run(1, 3), run(2, 3), run(1, 4)

    assert torch.isfinite(one).all()
    assert torch.equal(one, same)
    np.testing.assert_array_equal(dropped, again)
    assert not torch.equal(one, other)


def test_undefended_training_is_plain_training() -> None:
    setting = small()
    model = network()
    train(
        model, setting.images, setting.labels, generator=setting.generator(0),
        epochs=2, batch_size=40, lr=0.05, momentum=0.9, weight_decay=0.0,
    )  # fmt: skip

    assert torch.equal(weights(METHODS["undefended"](setting).model), weights(model))


@pytest.mark.parametrize("rounds", [0, 1])
def test_none_that_finds_nothing_ends_with_the_undefended_model(rounds: int) -> None:
    setting = small()
    outcome = NoneDefense(rounds=rounds)(setting)
    assert torch.equal(weights(outcome.model), weights(METHODS["undefended"](setting).model))
    assert len(outcome.looks) == rounds
    assert outcome.dropped is not None
    assert not outcome.dropped.size


@pytest.mark.parametrize("anew", [False, True])
def test_none_begins_again_where_the_backdoor_outlives_everything(
    monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    monkeypatch.setattr(NeuronMap, "reset", lambda *_: None)
    scene = toy()
    method = NoneDefense(rounds=1, retrain_rate=1e-9, recover_epochs=0, anew=anew)
    outcome = method(scene.setting)
    assert outcome.looks[-1]["anew"] == anew
    assert outcome.dropped is not None
    assert outcome.dropped.tolist() == scene.poisoned.tolist()
    assert scene.accuracy(outcome.model) > 0.95
    assert (scene.success(outcome.model) > 0.9) == (not anew)


def test_undefended_training_learns_the_task_and_the_backdoor() -> None:
    scene = toy()
    outcome = Plain()(scene.setting)
    assert scene.accuracy(outcome.model) > 0.95
    assert scene.success(outcome.model) > 0.95
    assert outcome.dropped is None


def test_reading_in_batches_keeps_order_and_mode() -> None:
    model = network(batch_norm=True).train()
    images, labels = quadrants(70, seed=3)
    state = weights(model)

    logits = over_batches(model, images, model, batch_size=32)

    assert model.training
    assert torch.equal(weights(model), state)  # batch normalisation has learned nothing
    assert torch.equal(logits.argmax(1), predicted(model, images))
    hits = sum(int(predicted(model, image[None])) == label for image, label in zip(images, labels))  # noqa: B905
    assert accuracy(model, images, labels) == pytest.approx(hits / 70)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DpSgd(clip=0, noise=1), "clip must be > 0, got 0"),
        (DpSgd(clip=1, noise=-0.1), "noise must be >= 0, got -0.1"),
        (DpSgd(clip=float("nan"), noise=1), "clip must be > 0, got nan"),
        (NeuralAttentionDistillation(beta=-1), "beta must be >= 0, got -1"),
        (NeuralAttentionDistillation(first_beta=-1), "first_beta must be >= 0, got -1"),
        (NeuralAttentionDistillation(power=0), "power must be >= 1, got 0"),
        (NeuralAttentionDistillation(teacher_epochs=0), "teacher_epochs must be >= 1, got 0"),
        (NeuralAttentionDistillation(epochs=0), "epochs must be >= 1, got 0"),
        (NeuralAttentionDistillation(fast_epochs=-1), "fast_epochs must be >= 0, got -1"),
        (NeuralAttentionDistillation(layers=()), "layers must be None or at least one name"),
        (ActivationClustering(dimensions=0), "dimensions must be >= 1, got 0"),
        (ActivationClustering(largest_share=0.6), r"largest_share must be in \[0, 0.5\], got 0.6"),
        (ActivationClustering(least_silhouette=2), r"least_silhouette must be in \[-1, 1\], got 2"),
        (AntiBackdoorLearning(gamma=-1), "gamma must be >= 0, got -1"),
        (AntiBackdoorLearning(turning=1), r"turning must be in \(0, 1\), got 1"),
        (AntiBackdoorLearning(isolation=0), r"isolation must be in \(0, 1\), got 0"),
        (AntiBackdoorLearning(unlearning_steps=-1), "unlearning_steps must be >= 0, got -1"),
        (AntiBackdoorLearning(unlearning_lr=0), "unlearning_lr must be > 0, got 0"),
        (FinePruning(drop=1.5), r"drop must be in \[0, 1\], got 1.5"),
        (FinePruning(step=0), "step must be >= 1, got 0"),
        (FinePruning(epochs=-1), "epochs must be >= 0, got -1"),
        (FinePruning(rate=0), "rate must be > 0, got 0"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(method: Baseline, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(small())


@pytest.mark.parametrize("name", ["nad", "fine-pruning"])
def test_a_method_that_needs_trusted_images_says_so(name: str) -> None:
    setting = small()
    with pytest.raises(ValueError, match="trusted_images must be at least 2 for this method"):
        METHODS[name](replace(setting, trusted_images=setting.trusted_images[:1]))
