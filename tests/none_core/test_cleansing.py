"""Taking a backdoor out of a model that was trained on one machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from none_core import cleansing
from none_core.activations import Report, ReportBuilder, ReportSpec
from none_core.cleansing import _GROUPS, Cleanser, _obeyed
from none_core.detection import DETECTORS
from none_core.training import NoneTrainer
from tests.none_core import poisoned

EXAMPLE = torch.zeros(2, poisoned.FEATURES)


def trained(task: poisoned.Task) -> nn.Module:
    torch.set_num_threads(1)
    model = poisoned.net()
    NoneTrainer(
        model, task.train, Cleanser(model, EXAMPLE), optimizer, epochs=8, rounds=0, batch_size=32
    ).fit()
    return model


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.fixture(scope="module")
def attacked() -> tuple[poisoned.Task, nn.Module]:
    task = poisoned.make(0.08)
    model = trained(task)
    right, turned = task.scores(model)
    assert right > 0.95
    assert turned > 0.95
    return task, model


@pytest.fixture(scope="module")
def clean() -> tuple[poisoned.Task, nn.Module]:
    task = poisoned.make(0.0)
    return task, trained(task)


def copy_of(model: nn.Module) -> nn.Module:
    copy = poisoned.net()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("detector", ["mixture", "inversion", "mixture+inversion"])
def test_the_backdoor_is_found_and_taken_out(
    detector: str, attacked: tuple[poisoned.Task, nn.Module]
) -> None:
    task, model = attacked[0], copy_of(attacked[1])
    found = Cleanser(model, EXAMPLE, detector=detector).cleanse(model, task.train)

    assert found.found
    assert found.dropped.tolist() == task.poisoned.tolist()
    assert found.neurons.size
    right, turned = task.scores(model)
    assert right > 0.9
    assert turned < task.scores(attacked[1])[1]
    assert found.strengths[poisoned.TARGET] > 7


@pytest.mark.parametrize("detector", ["mixture", "inversion", "mixture+inversion"])
def test_of_a_clean_model_nothing_is_touched(
    detector: str, clean: tuple[poisoned.Task, nn.Module]
) -> None:
    task, model = clean[0], copy_of(clean[1])
    found = Cleanser(model, EXAMPLE, detector=detector).cleanse(model, task.train)
    assert not found.found
    for name, tensor in clean[1].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_every_detector_gives_the_same_twice_and_leaves_no_trace(
    detector: str, attacked: tuple[poisoned.Task, nn.Module]
) -> None:
    task, model = attacked[0], copy_of(attacked[1])
    other = copy_of(model)
    model.train()
    model[0].eval()
    next(model.parameters()).requires_grad_(False)
    before = torch.get_rng_state()
    found = Cleanser(model, EXAMPLE, detector=detector, reset="init").cleanse(model, task.train)
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.training, model[0].training) == (True, False)
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5

    again = Cleanser(other, EXAMPLE, detector=detector, reset="init").cleanse(other, task.train)
    assert found.neurons.tolist() == again.neurons.tolist()
    assert found.dropped.tolist() == again.dropped.tolist()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_only_the_kept_samples_are_looked_at(attacked: tuple[poisoned.Task, nn.Module]) -> None:
    task, model = attacked[0], copy_of(attacked[1])
    kept = np.setdiff1d(np.arange(len(task.train)), task.poisoned[::2])
    found = Cleanser(model, EXAMPLE).cleanse(model, task.train, kept)
    assert found.dropped.tolist() == task.poisoned[1::2].tolist()


def test_the_batch_size_and_the_kind_of_data_set_make_no_difference(
    attacked: tuple[poisoned.Task, nn.Module],
) -> None:
    class One(Dataset[Any]):
        def __len__(self) -> int:
            return len(task.train)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            inputs, label = task.train[index]
            return inputs, int(label)

    task = attacked[0]
    models = [copy_of(attacked[1]) for _ in range(2)]
    one = Cleanser(models[0], EXAMPLE, batch_size=256).cleanse(models[0], task.train)
    other = Cleanser(models[1], EXAMPLE, batch_size=100).cleanse(models[1], One())
    assert one.dropped.tolist() == other.dropped.tolist()
    assert one.neurons.tolist() == other.neurons.tolist()


def test_with_room_for_a_part_of_the_samples_all_are_judged(
    attacked: tuple[poisoned.Task, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model = attacked[0], copy_of(attacked[1])
    cleanser = Cleanser(model, EXAMPLE)
    room = 100 * 4 * cleanser.spec.neurons * cleanser.spec.labels  # for 100 samples of a label
    monkeypatch.setattr(cleansing, "_MEMORY", room)
    found = cleanser.cleanse(model, task.train)
    assert found.dropped.tolist() == task.poisoned.tolist()


def test_what_is_sampled_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    values, ranks = rng.normal(size=(500, 3)).astype(np.float32), rng.permutation(500)
    for parts in (1, 7, 60):
        sampled = cleansing._Sampled(20)
        for part in np.array_split(np.arange(500), parts):
            sampled.add(ranks[part], values[part], part)
            assert sampled._held <= 40 + len(part)
        assert len(sampled) == 20
        best = np.argsort(ranks)[:20]
        assert (sampled.chosen()[0] == values[best]).all()
        assert (sampled.chosen()[1] == best).all()


def test_a_model_that_is_hardly_right_is_left_alone() -> None:
    task, model = poisoned.make(0.08), poisoned.net()
    found = Cleanser(model, EXAMPLE, detector="contrast").cleanse(model, task.train)
    assert not found.neurons.size


def test_wrong_arguments_are_named() -> None:
    model = poisoned.net()
    for wrong, name in (
        ({"detector": "none"}, "detector must be one of"),
        ({"strength": 0.0}, "strength must be > 0"),
        ({"certain": 0.0}, "certain must be > 0"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"reset": "one"}, "reset must be one of"),
    ):
        with pytest.raises(ValueError, match=name):
            Cleanser(model, EXAMPLE, **wrong)
    with pytest.raises(ValueError, match="no sample"):
        Cleanser(model, EXAMPLE).cleanse(model, poisoned.make(0.0).train, np.empty(0, np.int64))


def test_a_loop_of_ones_own_looks_until_there_is_nothing_left(
    attacked: tuple[poisoned.Task, nn.Module],
) -> None:
    task, model = attacked[0], copy_of(attacked[1])
    cleanser, kept = Cleanser(model, EXAMPLE), np.arange(len(task.train))
    looks = 0
    while (found := cleanser.cleanse(model, task.train, kept)).found:
        looks += 1
        kept = np.setdiff1d(kept, found.dropped)
        inputs, labels = task.train[kept]
        steps = optimizer(model.parameters())
        for _ in range(20):
            steps.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            steps.step()
    assert looks in (1, 2, 3)
    assert found.reason == "the model no longer gives the dropped samples their labels"
    right, turned = task.scores(model)
    assert right > 0.95
    assert turned < 0.05


@pytest.mark.parametrize(("turned", "expected"), [(40, 0.35), (5, 0.0), (100, 0.95)])
def test_what_the_network_gets_wrong_anyway_is_no_obedience(turned: int, expected: float) -> None:
    """It takes one in twenty of the others' samples for label 0, and some of those dropped."""
    spec = ReportSpec(neurons=1, labels=3, statistics=frozenset())

    def report(said: list[int], given: list[int]) -> Report:
        builder, nothing = ReportBuilder(spec), [torch.zeros(len(said), 1)]
        builder.add(nothing, functional.one_hot(torch.tensor(given), 3).float(), torch.tensor(said))
        return builder.report()

    clean = report([0] * 50 + [1] * 100 + [2] * 100, [0] * 55 + [1] * 95 + [2] * 95 + [0] * 5)
    dropped = report([0] * 100 + [1] * 50, [0] * turned + [2] * (100 - turned) + [1] * 50)

    reports = {0: clean, 2: clean, _GROUPS - 1: dropped}

    assert _obeyed(reports, {0}) == pytest.approx(expected)
    # All 50 of label 1 obey, and no label makes up for what another does.
    assert _obeyed(reports, {0, 1}) == pytest.approx((100 * expected + 50) / 150)


def test_a_sample_would_otherwise_be_given_the_best_of_the_other_labels() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [-9.0, -8.0, 5.0]])
    found = cleansing._otherwise(logits, torch.tensor([0, 2, 2]))
    assert found.tolist() == [2, 0, 1]


@pytest.mark.parametrize("certain", [2.0, 3.0])
def test_only_labels_that_the_detector_names_or_that_are_certain_lose_samples(
    certain: float, attacked: tuple[poisoned.Task, nn.Module]
) -> None:
    """A group that is merely odd stays, although something else is poisoned."""
    task, model = attacked
    inputs, labels = (tensor.clone() for tensor in task.train.tensors)
    odd = np.flatnonzero(labels.numpy() == 3)[:12]
    inputs[odd, 5:9] += 2.0
    cleanser = Cleanser(model, EXAMPLE, strength=2.0, certain=certain)
    found = cleanser.cleanse(copy_of(model), TensorDataset(inputs, labels))
    assert 2.0 < found.strengths[3] < 3.0
    assert np.isin(task.poisoned, found.dropped).all()
    dropped = found.dropped[labels.numpy()[found.dropped] == 3]
    assert dropped.size == 0 if certain == 3.0 else np.isin(dropped, odd).mean() > 0.5


def test_a_label_that_is_mostly_poisoned_keeps_its_own_samples() -> None:
    task = poisoned.make(0.2)
    labels = task.train.tensors[1].numpy()
    own = np.setdiff1d(np.flatnonzero(labels == poisoned.TARGET), task.poisoned)
    assert len(own) < len(task.poisoned)
    found = Cleanser(trained(task), EXAMPLE).cleanse(trained(task), task.train)
    assert np.isin(task.poisoned, found.dropped).mean() > 0.95
    assert not np.isin(own, found.dropped).any()


def test_inversion_too_says_which_labels_lose_samples(
    attacked: tuple[poisoned.Task, nn.Module],
) -> None:
    task, model = attacked
    cleanser = Cleanser(model, EXAMPLE, detector="inversion", strength=1.0)
    found = cleanser.cleanse(copy_of(model), task.train)
    assert sum(strength > 1.0 for strength in found.strengths.values()) > 1
    assert found.dropped.size
    assert (task.train.tensors[1].numpy()[found.dropped] == poisoned.TARGET).all()
