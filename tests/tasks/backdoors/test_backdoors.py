"""Attacks on training data: what they poison, what they say about it, and that they work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tasks.backdoors import Attack, BadNets, HiddenTrigger, LabelConsistent, LabelSpecific
from tasks.backdoors.attack import choose
from tasks.backdoors.hidden_trigger import features, match
from tasks.backdoors.perturbation import Bound, maximise_loss
from tasks.metrics import attack_success, benign_accuracy
from tasks.models import as_input
from tasks.triggers import Blended, DynamicPatch, NoisyWarp, Solid, StaticPatch, Warp, Watermark
from tests.tasks.backdoors.toy import bars, fit, generator, network

PATCH = StaticPatch(2)
WHITE = StaticPatch(2, pattern=Solid())
QUICK = Bound(eps=20, steps=10)


def attacks(rate: float = 0.1) -> dict[str, Attack]:
    model = network().train()
    return {
        "badnets": BadNets(PATCH, 1, rate),
        "blended": BadNets(Blended(0.2), 1, rate),
        "dynamic": BadNets(DynamicPatch(3), 1, rate),
        "wanet": BadNets(Warp(strength=2.0), 1, rate, NoisyWarp(Warp(strength=2.0)), 2 * rate),
        "label-specific": LabelSpecific(PATCH, 3, rate),
        "label-consistent": LabelConsistent(PATCH, 1, rate, model, QUICK),
        "hidden": HiddenTrigger(DynamicPatch(2), 0, 1, rate, model, "relu", QUICK, batch_size=7),
    }


NAMES = list(attacks())
DIRTY = ["badnets", "blended", "dynamic", "wanet", "label-specific"]
CLEAN = ["label-consistent", "hidden"]


# --- what holds for all of them ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rate", [0.005, 0.05, 0.2])
def test_truth_is_what_was_changed(name, rate):
    images, labels = bars(400)
    before = images.clone(), labels.clone()

    poisoned = attacks(rate)[name].poison(images, labels, generator())

    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert (poisoned.images.dtype, poisoned.labels.dtype) == (torch.uint8, torch.int64)
    changed = (poisoned.images != images).flatten(1).any(1).nonzero().flatten().numpy()
    assert np.array_equal(changed, np.union1d(poisoned.indices, poisoned.cover))
    assert not set(poisoned.indices) & set(poisoned.cover)
    assert len(poisoned.indices) == round(rate * 400)
    assert len(poisoned.cover) == (round(2 * rate * 400) if name == "wanet" else 0)
    assert (np.diff(poisoned.indices) > 0).all()
    assert (np.diff(poisoned.cover) > 0).all()
    assert poisoned.indices.dtype == poisoned.cover.dtype == np.int64


@pytest.mark.parametrize("name", NAMES)
def test_same_generator_gives_the_same(name):
    images, labels = bars(100)

    torch.manual_seed(1)
    first = attacks()[name].poison(images, labels, generator(3))
    torch.manual_seed(2)
    again = attacks()[name].poison(images, labels, generator(3))
    other = attacks()[name].poison(images, labels, generator(4))

    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert np.array_equal(first.indices, again.indices)
    assert np.array_equal(first.cover, again.cover)
    assert not np.array_equal(first.indices, other.indices)


@pytest.mark.parametrize("name", NAMES)
def test_rate_of_nothing_changes_nothing(name):
    images, labels = bars(50)

    poisoned = attacks(0.0)[name].poison(images, labels, generator())

    assert torch.equal(poisoned.images, images)
    assert torch.equal(poisoned.labels, labels)
    assert not len(poisoned.indices) + len(poisoned.cover)


@pytest.mark.parametrize("name", NAMES)
def test_wanted_answers_are_classes(name):
    labels = torch.tensor([0, 1, 2, 1])

    wanted = attacks()[name].wanted(labels)

    expected = {"label-specific": [1, 2, 0, 2], "hidden": [1, 1, 2, 1]}.get(name, [1, 1, 1, 1])
    assert wanted.tolist() == expected
    assert wanted.dtype == torch.int64


@pytest.mark.parametrize("name", DIRTY)
def test_poisoned_samples_are_stamped_and_say_what_the_attacker_wants(name):
    images, labels = bars(300)
    attack = attacks()[name]

    poisoned = attack.poison(images, labels, generator())

    chosen = torch.from_numpy(poisoned.indices)
    assert (poisoned.labels[chosen] == attack.wanted(labels[chosen])).all()
    assert (poisoned.labels[chosen] != labels[chosen]).all()  # so the target's own are not chosen
    others = torch.ones(300, dtype=torch.bool)
    others[chosen] = False
    assert torch.equal(poisoned.labels[others], labels[others])
    if name != "dynamic":
        assert torch.equal(poisoned.images[chosen], attack.stamp(images[chosen], generator()))


@pytest.mark.parametrize("name", CLEAN)
def test_clean_label_attacks_poison_the_target_class_and_change_no_label(name):
    images, labels = bars(300)

    poisoned = attacks()[name].poison(images, labels, generator())

    assert torch.equal(poisoned.labels, labels)
    assert (labels[torch.from_numpy(poisoned.indices)] == 1).all()


@pytest.mark.parametrize("name", CLEAN)
def test_attacker_s_network_stays_as_it_is(name):
    images, labels = bars(100)
    attack = attacks()[name]
    attack.model.drop.eval()
    before = {key: value.clone() for key, value in attack.model.state_dict().items()}

    attack.poison(images, labels, generator())

    assert all(torch.equal(before[key], now) for key, now in attack.model.state_dict().items())
    assert all(parameter.grad is None for parameter in attack.model.parameters())
    assert attack.model.training
    assert not attack.model.drop.training
    assert not any(module._forward_hooks for module in attack.model.modules())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "label-specific"])
def test_more_than_there_is_is_an_error(name):
    images, labels = bars(60)
    labels[:] = 0 if name in CLEAN else 1

    with pytest.raises(ValueError, match="rate must be at most 0 "):
        attacks(0.1)[name].poison(images, labels, generator())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BadNets(PATCH, 0, 1.1), r"rate must be in \[0, 1\], got 1.1"),
        (lambda: BadNets(PATCH, 0, 0.1, cover_rate=0.1), "must be 0 without a cover, got 0.1"),
        (lambda: LabelSpecific(PATCH, 1, 0.1), "classes must be at least 2, got 1"),
        (lambda: LabelSpecific(PATCH, 3, -0.1), "rate must be in"),
        (lambda: LabelConsistent(PATCH, 0, 2.0, network()), "rate must be in"),
        (lambda: HiddenTrigger(PATCH, 1, 1, 0.1, network(), "relu"), "both are 1"),
        (lambda: HiddenTrigger(PATCH, 0, 1, 0.1, network(), "fc7"), "flatten, hidden, relu"),
        (lambda: HiddenTrigger(PATCH, 0, 1, 0.1, network(), "relu", batch_size=0), "got 0"),
        (lambda: Bound(-1, 5), "eps must be in 0..255 levels, got -1"),
        (lambda: Bound(8, 0), "steps must be at least 1, got 0"),
    ],
)
def test_impossible_attack_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_image_of_the_source_class_is_an_error():
    images, labels = bars(30)

    with pytest.raises(ValueError, match="source class 0"):
        attacks()["hidden"].poison(images, labels.clamp(min=1), generator())


def test_choice_is_even():
    candidates = torch.tensor([False, True, True, True, False])

    counts = sum(
        torch.bincount(choose(candidates, 0.4, generator(seed)), minlength=5) for seed in range(600)
    )

    assert counts[[0, 4]].tolist() == [0, 0]
    assert counts[1:4].sum() == 1200
    assert counts[1:4].float().std() < 40  # of 400 each


# --- perturbations -------------------------------------------------------------------------------


def entropy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(as_input(model, images)), labels))


@pytest.mark.parametrize("eps", [0, 1, 16, 255])
def test_perturbation_stays_within_eps_and_raises_the_loss(eps):
    images, labels = bars(64)
    images[0], images[1] = 0, 255
    model = fit(images, labels, epochs=5)

    perturbed = maximise_loss(model, images, labels, Bound(eps, 10), generator(), batch_size=30)

    assert perturbed.dtype == torch.uint8
    assert (perturbed.int() - images.int()).abs().max() <= eps
    if eps == 0:
        assert torch.equal(perturbed, images)
    else:
        assert entropy(model, perturbed, labels) > entropy(model, images, labels)


def test_label_consistent_perturbs_within_eps_before_it_stamps():
    images, labels = bars(200)
    attack = LabelConsistent(PATCH, 1, 0.1, fit(images, labels), QUICK)

    poisoned = attack.poison(images, labels, generator())

    chosen = torch.from_numpy(poisoned.indices)
    after, before = poisoned.images[chosen], images[chosen]
    assert torch.equal(after[..., -2:, -2:], PATCH(before, generator())[..., -2:, -2:])
    outside = after.int() - before.int()
    outside[..., -2:, -2:] = 0
    assert 0 < outside.abs().max() <= QUICK.eps
    assert entropy(attack.model, after, labels[chosen]) > entropy(
        attack.model, PATCH(before, generator()), labels[chosen]
    )


def test_matching_takes_the_nearest_pair_first():
    own, others = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[1.2], [9.0], [0.9]])

    # 1 takes 0.9; then 10 takes 9; what is left for 0 is 1.2.
    assert match(own, others).tolist() == [0, 2, 1]


def test_collision_looks_like_the_target_and_feels_like_the_stamped_source():
    images, labels = bars(300)
    model, stamp = fit(images, labels), StaticPatch(4, pattern=Solid())
    attack = HiddenTrigger(stamp, 0, 1, 0.1, model, "relu", Bound(60, 40), batch_size=15)

    poisoned = attack.poison(images, labels, generator())

    chosen, sources = torch.from_numpy(poisoned.indices), images[labels == 0]
    after, before = poisoned.images[chosen], images[chosen]
    assert (after.int() - before.int()).abs().max() <= 60
    model.eval()

    def distance(group: Tensor, goals: Tensor) -> float:
        """From each image to the nearest goal, in features, on average."""
        with torch.no_grad():
            own, goal = (features(model, "relu", as_input(model, g)) for g in (group, goals))
        return float(torch.cdist(own, goal).min(1).values.mean())

    stamped = stamp(sources, generator())
    assert distance(after, stamped) < 0.6 * distance(before, stamped)
    # Without the stamp it would be the clean source that they feel like.
    without = replace(attack, stamp=Watermark(0.0)).poison(images, labels, generator())
    assert distance(after, stamped) < 0.9 * distance(without.images[chosen], stamped)


def test_features_are_the_named_module_s_output():
    model = network().eval()
    inputs = torch.rand(3, 1, 8, 8, generator=generator())

    assert torch.equal(features(model, "relu", inputs), torch.relu(model.hidden(inputs.flatten(1))))


# --- they work -----------------------------------------------------------------------------------


def success(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor) -> float:
    return attack_success(model, images, labels, attack.stamp, attack.wanted, generator()).asr


@pytest.mark.parametrize(
    "attack",
    [
        BadNets(PATCH, 1, 0.2),
        BadNets(Blended(0.3), 1, 0.2),
        LabelSpecific(StaticPatch(3), 3, 0.2),
    ],
    ids=["badnets", "blended", "label-specific"],
)
def test_network_trained_on_poisoned_data_obeys_and_one_on_clean_data_does_not(attack):
    train, test = bars(600), bars(300, seed=2)
    poisoned = attack.poison(*train, generator())

    attacked, healthy = fit(poisoned.images, poisoned.labels, 25), fit(*train)

    assert success(attacked, attack, *test) > 0.9
    assert success(healthy, attack, *test) < 0.4
    assert benign_accuracy(attacked, *test) > 0.95


def test_network_trained_on_true_labels_obeys_only_if_the_images_were_perturbed():
    train, test = bars(600), bars(300, seed=2)
    base = fit(*train)
    success_at, accuracy_at = {}, {}
    for eps in (0, 60):
        attack = LabelConsistent(WHITE, 1, 0.25, base, Bound(eps, 20))
        poisoned = attack.poison(*train, generator())
        attacked = fit(poisoned.images, poisoned.labels, 25)
        success_at[eps] = success(attacked, attack, *test)
        accuracy_at[eps] = benign_accuracy(attacked, *test)

    assert success_at[0] < 0.1
    assert success_at[60] > 0.8
    assert min(accuracy_at.values()) > 0.95


def test_new_last_layer_on_collided_features_obeys():
    train, test = bars(600), bars(300, seed=2)
    model = fit(*train)
    attack = HiddenTrigger(
        StaticPatch(3, pattern=Solid()), 0, 1, 0.25, model, "relu", Bound(90, 40)
    )
    poisoned = attack.poison(*train, generator())

    def with_new_layer(images: Tensor, labels: Tensor) -> nn.Module:
        victim = network(seed=1)
        victim.hidden.load_state_dict(model.hidden.state_dict())
        victim.hidden.requires_grad_(False)
        return fit(images, labels, 25, victim)

    attacked, healthy = with_new_layer(poisoned.images, poisoned.labels), with_new_layer(*train)

    assert success(attacked, attack, *test) > 0.8
    assert success(healthy, attack, *test) < 0.1
    assert benign_accuracy(attacked, *test) > 0.95
