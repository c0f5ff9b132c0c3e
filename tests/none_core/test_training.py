"""Training on one machine, with the defence between the epochs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from none_core import training
from none_core.cleansing import Cleanser, Cleansing
from none_core.training import CheckpointError, NoneTrainer, Trained, unlikelihood
from tests.none_core import poisoned

EXAMPLE = torch.zeros(2, poisoned.FEATURES)
RATE = 0.08
ONCE = {"epochs": 6, "retrain_epochs": 1, "batch_size": 32, "rounds": 1}


@pytest.fixture(scope="module")
def task() -> poisoned.Task:
    torch.set_num_threads(1)
    return poisoned.make(RATE)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def trainer(task: poisoned.Task, model: nn.Module, **settings: Any) -> NoneTrainer:
    settings = {"epochs": 6, "retrain_epochs": 2, "batch_size": 32, **settings}
    make = settings.pop("optimizer", optimizer)
    return NoneTrainer(model, task.train, Cleanser(model, EXAMPLE), make, **settings)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_backdoor_does_not_survive_and_the_evidence_is_kept(task: poisoned.Task) -> None:
    plain, defended = poisoned.net(), poisoned.net()
    trainer(task, plain, rounds=0).fit()
    trained = trainer(task, defended).fit()

    assert task.scores(plain)[1] > 0.95
    right, turned = task.scores(defended)
    assert right > task.scores(plain)[0] - 0.02
    assert turned < 0.05
    assert trained.dropped.tolist() == task.poisoned.tolist()
    assert np.intersect1d(trained.kept, trained.dropped).size == 0
    assert len(trained.kept) + len(trained.dropped) == len(task.train)
    assert trained.cleansings[0].neurons.size
    assert not trained.cleansings[-1].found, "it stops when there is nothing left"


def test_without_an_attack_it_is_ordinary_training() -> None:
    task = poisoned.make(0.0)
    plain, defended = poisoned.net(), poisoned.net()
    trainer(task, plain, rounds=0).fit()
    trained = trainer(task, defended).fit()
    assert same(plain, defended)
    assert len(trained.cleansings) == 1
    assert not trained.dropped.size


def test_a_model_that_is_trained_already_is_cleansed_as_one_that_it_trains(
    task: poisoned.Task,
) -> None:
    model, other = poisoned.net(), poisoned.net()
    trainer(task, model, rounds=0).fit()
    trained = trainer(task, model, epochs=0).fit()
    assert trained.dropped.size
    trainer(task, other).fit()
    assert same(model, other)


def test_with_no_look_it_is_the_loop_that_everybody_writes(task: poisoned.Task) -> None:
    by_hand, model = poisoned.net(), poisoned.net()
    trainer(task, model, rounds=0, epochs=2).fit()

    inputs, labels = task.train.tensors
    steps = optimizer(by_hand.parameters())
    for epoch in range(2):
        seed = np.random.SeedSequence([0, 0, epoch]).generate_state(1, np.uint64)[0] >> 1
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(int(seed)))
        for chosen in order.split(32):
            steps.zero_grad()
            functional.cross_entropy(by_hand(inputs[chosen]), labels[chosen]).backward()
            steps.step()
    assert same(by_hand, model)


class Killed(BaseException):
    pass


def killed_after(steps: int) -> Any:
    """Make optimisers of which the last is stopped in the middle of a step."""
    left = [steps]

    class Dying(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            super().step(closure)

    return lambda parameters: Dying(parameters, lr=0.05, momentum=0.9)


def with_dropout() -> nn.Module:
    model = poisoned.net(norm=True)
    return nn.Sequential(*model[:3], nn.Dropout(0.2), *model[3:])


# 57 steps an epoch, six epochs before the first look, two of 52 after it and four in the end.
@pytest.mark.parametrize("steps", [0, 56, 57, 58, 300, 342, 343, 394, 446, 447, 500, 653])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights(
    task: poisoned.Task, tmp_path: Path, steps: int
) -> None:
    undisturbed, resumed = with_dropout(), with_dropout()
    whole = trainer(task, undisturbed).fit()
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        trainer(task, resumed, checkpoint=file, optimizer=killed_after(steps)).fit()
    fresh = with_dropout()  # as a new process has it
    rest = trainer(task, fresh, checkpoint=file).fit()
    assert same(undisturbed, fresh)
    assert_same_story(whole, rest)
    assert_same_story(whole, trainer(task, with_dropout(), checkpoint=file).fit())


def assert_same_story(one: Trained, other: Trained) -> None:
    assert one.kept.tolist() == other.kept.tolist()
    assert len(one.cleansings) == len(other.cleansings)
    for a, b in zip(one.cleansings, other.cleansings, strict=True):
        assert (a.reason, a.strengths) == (b.reason, b.strengths)
        assert a.neurons.tolist() == b.neurons.tolist()
        assert a.dropped.tolist() == b.dropped.tolist()
        assert (a.scores == b.scores).all()


def test_a_run_that_is_killed_while_it_looks_is_resumed(
    task: poisoned.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, fresh = poisoned.net(), poisoned.net()
    trainer(task, undisturbed).fit()
    file = tmp_path / "checkpoint.pt"
    with monkeypatch.context() as patch:

        def dies(self: Cleanser, *_: Any) -> Any:
            raise Killed

        patch.setattr(Cleanser, "cleanse", dies)
        with pytest.raises(Killed):
            trainer(task, poisoned.net(), checkpoint=file).fit()
    trainer(task, fresh, checkpoint=file).fit()
    assert same(undisturbed, fresh)


def test_normalisation_is_frozen_after_a_reset_and_measures_again_in_the_recovery(
    task: poisoned.Task,
) -> None:
    seen: list[torch.Tensor] = []
    model = poisoned.net(norm=True)

    class Watching(Cleanser):
        def cleanse(self, *arguments: Any) -> Any:
            found = super().cleanse(*arguments)
            seen.append(model[1].running_mean.clone())
            return found

        def predictions(self, *arguments: Any) -> Any:
            seen.append(model[1].running_mean.clone())
            return super().predictions(*arguments)

    settings = {**ONCE, "anew_epochs": 0}
    NoneTrainer(model, task.train, Watching(model, EXAMPLE), optimizer, **settings).fit()
    after_reset, _, before, _, after, _ = seen
    assert torch.equal(after_reset, before)
    assert not torch.equal(before, after)


def test_unlikelihood_is_what_its_formula_says() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(50) % 7
    given = logits.softmax(1)[torch.arange(50), labels]
    torch.testing.assert_close(unlikelihood(logits, labels), -torch.log(1 - given).mean())
    certain = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = unlikelihood(certain, torch.tensor([0]))
    loss.backward()
    assert (float(loss), certain.grad.tolist()) == (200.0, [[1.0, -1.0]])  # no infinity


class ResetsNothing(Cleanser):
    """Resets nothing, so that the backdoor outlives it."""

    def cleanse(self, model: nn.Module, *arguments: Any) -> Any:
        return super().cleanse(copy.deepcopy(model), *arguments)


class DropsOnly(ResetsNothing):
    """Says that little is left to unlearn, though all is there."""

    asked = 0

    def predictions(self, *arguments: Any) -> Any:
        self.asked += 1
        counts = super().predictions(*arguments)
        return np.roll(counts, 1, axis=1) if self.asked == 1 else counts


def recovery(task: poisoned.Task, **settings: Any) -> tuple[Trained, nn.Module]:
    """Train, drop, and recover, at most."""
    model = poisoned.net(norm=True)
    base = {**ONCE, "anew_epochs": 0}
    cleanser = DropsOnly(model, EXAMPLE)
    trained = NoneTrainer(model, task.train, cleanser, optimizer, **{**base, **settings}).fit()
    assert trained.dropped.tolist() == task.poisoned.tolist()
    return trained, model


def test_a_recovery_unlearns_what_was_dropped(task: poisoned.Task) -> None:
    without, left = recovery(task, recover_epochs=0)
    assert not without.recovered
    assert task.scores(left)[1] > 0.9
    trained, model = recovery(task, recover_epochs=6, recover_rate=1.0)
    assert trained.recovered
    right, turned = task.scores(model)
    assert turned < 0.05
    assert right >= task.scores(left)[0] - 0.01


def test_half_of_what_was_dropped_judges_and_is_never_trained_on(
    task: poisoned.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    read = training.in_order

    def watched(dataset: Any, indices: Any, *arguments: Any) -> Any:
        seen.append(set(indices.tolist()))
        return read(dataset, indices, *arguments)

    monkeypatch.setattr(training, "in_order", watched)
    trained, _ = recovery(task)
    used = set.union(*seen[6:])  # after the six epochs before anything was known
    assert len(used & set(trained.dropped.tolist())) == len(trained.dropped) // 2
    assert used >= set(trained.kept.tolist())


@pytest.mark.parametrize("what", ["obeys", "is wrong"])
def test_a_recovery_that_harms_is_undone(task: poisoned.Task, what: str) -> None:
    """The backdoor comes back, or accuracy goes."""
    _, left = recovery(task, recover_epochs=0)

    class Bad(DropsOnly):
        def predictions(self, *arguments: Any) -> Any:
            counts = super().predictions(*arguments)
            another = np.roll(counts, 1, axis=1)
            # All that was dropped; then those kept and those that judge, before and after.
            return another if self.asked == {"obeys": 3, "is wrong": 4}[what] else counts

    model = poisoned.net(norm=True)
    settings = {**ONCE, "anew_epochs": 0, "unlearn": 0.0}
    cleanser = Bad(model, EXAMPLE)
    trained = NoneTrainer(model, task.train, cleanser, optimizer, **settings).fit()
    assert cleanser.asked == 5
    assert not trained.recovered
    assert same(model, left)


def test_what_was_dropped_by_mistake_is_not_unlearned() -> None:
    """A kind of one class that looks like none of the others' goes on being that class."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[3.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0], [2.2, 0, 0, 2.5]])
    kind = torch.arange(2000) % 4
    inputs = centres[kind] + 0.45 * torch.randn(2000, 4, generator=generator)
    odd, labels = np.flatnonzero(kind.numpy() == 3), kind % 3

    class Mistaken(Cleanser):
        def cleanse(self, model: nn.Module, dataset: Any, kept: Any = None) -> Cleansing:
            none, first = np.empty(0, dtype=np.int64), len(kept) == len(dataset)
            return Cleansing("", none, np.zeros(0), odd if first else none, {})

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    data = torch.utils.data.TensorDataset(inputs, labels)
    trained = NoneTrainer(
        model, data, Mistaken(model, torch.zeros(2, 4)), optimizer, epochs=6
    ).fit()
    model.eval()
    right = (model(inputs).argmax(1) == labels).numpy()
    assert trained.recovered
    assert not trained.anew
    assert trained.dropped.tolist() == odd.tolist()
    assert right[odd].mean() > 0.9


def outlived(task: poisoned.Task, model: nn.Module, **settings: Any) -> NoneTrainer:
    cleanser = ResetsNothing(model, EXAMPLE)
    base = {**ONCE, "unlearn": 0.0, "checkpoint": None}
    return NoneTrainer(model, task.train, cleanser, optimizer, **{**base, **settings})


def test_a_backdoor_that_outlives_everything_is_left_behind(task: poisoned.Task) -> None:
    first, model = poisoned.net(norm=True), poisoned.net(norm=True)
    assert not outlived(task, first, anew_epochs=0).fit().anew
    assert task.scores(first)[1] > 0.9

    trained = outlived(task, model).fit()
    assert trained.anew
    assert trained.dropped.tolist() == task.poisoned.tolist()
    right, turned = task.scores(model)
    assert turned < 0.05
    assert right >= task.scores(first)[0] - 0.01


def test_the_second_attempt_is_that_of_a_model_that_never_saw_what_was_dropped(
    task: poisoned.Task,
) -> None:
    model, clean = poisoned.net(norm=True), poisoned.net(norm=True)
    trained = outlived(task, model, recover_epochs=0).fit()
    assert trained.anew
    data = torch.utils.data.Subset(task.train, trained.kept.tolist())
    NoneTrainer(
        clean, data, ResetsNothing(clean, EXAMPLE), optimizer, **{**ONCE, "rounds": 0}
    ).fit()
    assert same(model, clean)

    # One that comes trained says what it was before.
    given, first = poisoned.net(norm=True), poisoned.net(norm=True)
    untrained = copy.deepcopy(given.state_dict())
    outlived(task, given, recover_epochs=0, rounds=0).fit()
    trainer = outlived(
        *(task, given), recover_epochs=0, epochs=0, anew_epochs=6, untrained=untrained
    )
    assert trainer.fit().anew
    assert same(given, model)
    outlived(task, first, recover_epochs=0, rounds=0).fit()
    assert not outlived(task, first, recover_epochs=0, epochs=0).fit().anew


@pytest.mark.parametrize("steps", [342 + 52, 342 + 5 * 52 + 3, 342 + 8 * 52, 342 + 11 * 52])
def test_a_second_attempt_that_is_killed_is_resumed(
    task: poisoned.Task, tmp_path: Path, steps: int
) -> None:
    undisturbed, fresh = with_dropout(), with_dropout()
    whole = outlived(task, undisturbed).fit()
    file = tmp_path / "checkpoint.pt"
    dying = outlived(task, with_dropout(), checkpoint=file)
    dying.optimizer = killed_after(steps)
    with pytest.raises(Killed):
        dying.fit()
    with torch.no_grad():
        fresh[0].weight.zero_()  # what a second attempt begins with is the first process's
    rest = outlived(task, fresh, checkpoint=file).fit()
    assert rest.anew
    assert same(undisturbed, fresh)
    assert_same_story(whole, rest)


def test_a_data_set_of_which_nothing_is_left_ends(task: poisoned.Task) -> None:
    class TakesAll(Cleanser):
        def cleanse(self, model: nn.Module, dataset: Any, kept: Any = None) -> Cleansing:
            return Cleansing("", np.empty(0, dtype=np.int64), np.zeros(0), kept, {})

    model = poisoned.net()
    cleanser = TakesAll(model, EXAMPLE)
    trained = NoneTrainer(model, task.train, cleanser, optimizer, epochs=1, rounds=1).fit()
    assert not trained.kept.size


def test_what_is_unlearned_is_not_measured(task: poisoned.Task) -> None:
    """Batch normalisation sees as many batches with it as without."""
    seen = []
    for unlearn in (0.0, 1.0):
        trained, model = recovery(task, unlearn=unlearn, recover_rate=1.0, recover_epochs=6)
        seen.append(int(model[1].num_batches_tracked))
        assert trained.recovered
    assert seen == [6 * 57 + 6 * 52] * 2


def test_training_leaves_the_global_random_state_alone(task: poisoned.Task) -> None:
    before = torch.get_rng_state()
    trainer(task, with_dropout(), epochs=1, rounds=0).fit()
    assert torch.equal(torch.get_rng_state(), before)


def test_retraining_takes_smaller_steps(task: poisoned.Task) -> None:
    """So small here that the model stays what the reset has left."""
    model, rates = poisoned.net(), list[float]()
    ending = {"recover_epochs": 0, "anew_epochs": 0}

    def watched(parameters: Any) -> torch.optim.Optimizer:
        made = optimizer(parameters)
        made.register_step_pre_hook(lambda it, *_: rates.append(it.param_groups[0]["lr"]))
        return made

    trained = trainer(
        task, model, optimizer=watched, rounds=1, retrain_epochs=3, retrain_rate=1e-60, **ending
    ).fit()

    assert list(dict.fromkeys(rates)) == pytest.approx(
        [0.05, 5e-62, 3.75e-62, 1.25e-62], rel=1e-9, abs=0
    )
    once = poisoned.net()
    trainer(task, once, rounds=0).fit()
    Cleanser(once, EXAMPLE).cleanse(once, task.train)
    assert same(model, once)
    assert len(trained.cleansings) == 1


def test_another_runs_checkpoint_and_a_damaged_one_are_refused(
    task: poisoned.Task, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint.pt"
    trainer(task, poisoned.net(), checkpoint=file, epochs=1, rounds=0).fit()
    with pytest.raises(CheckpointError, match="of another run: it differs in epochs"):
        trainer(task, poisoned.net(), checkpoint=file, epochs=2, rounds=0).fit()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer(task, poisoned.net(), checkpoint=file, epochs=1, rounds=0).fit()


@pytest.mark.parametrize(
    "name", ["epochs", "retrain_epochs", "recover_epochs", "anew_epochs", "batch_size", "rounds"]
)
def test_wrong_numbers_are_named(task: poisoned.Task, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be >= "):
        trainer(task, poisoned.net(), **{name: -1})
    with pytest.raises(ValueError, match=r"^retrain_rate must be > 0"):
        trainer(task, poisoned.net(), retrain_rate=0)
    with pytest.raises(ValueError, match=r"^recover_rate must be > 0"):
        trainer(task, poisoned.net(), recover_rate=0)
    with pytest.raises(ValueError, match=r"^anew_epochs needs untrained"):
        trainer(task, poisoned.net(), epochs=0, anew_epochs=1)
    with pytest.raises(ValueError, match=r"^unlearn must be >= 0 and finite, got -1"):
        trainer(task, poisoned.net(), unlearn=-1.0)
