"""A run that goes on in another process is the run that nobody stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Strategy,
)

from none_core import snapshot
from none_core.detection import Detection
from none_core.flower import NoneMixin, NoneStrategy, defence
from none_core.flower.messages import record_of, round_of, state_of
from none_core.flower.resume import Continued, keep, recall
from none_core.flower.toy_federation import EXAMPLE_INPUT, ToyFederation, _ToyGrid, toy_model
from none_core.snapshot import SnapshotError
from tests.none_core.flower.test_quarantine import Game, attack, attacking_in, nothing

CLIENTS, MALICIOUS, ROUNDS = 10, 4, 4
EVERYBODY: dict[str, Any] = {
    "min_train_nodes": CLIENTS,
    "min_available_nodes": CLIENTS,
    "fraction_evaluate": 0.0,
}
BOLD: dict[str, Any] = {"budget": 0.2, "min_accuracy": 0.3, "probe_every": 2, "probe_steps": 10}


class Mixed(NoneMixin, FedAvg):
    """Both in one object, with a state of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen: list[int] = []

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        self.seen.append(server_round)
        return super().aggregate_train(server_round, replies)


def mixed() -> Mixed:
    strategy = Mixed(**EVERYBODY)
    strategy.defend(toy_model, EXAMPLE_INPUT, **BOLD)
    return strategy


def defended(inner: Strategy, **settings: Any) -> NoneStrategy:
    return NoneStrategy(inner, toy_model, EXAMPLE_INPUT, **{**BOLD, **settings})


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: defended(FedAvg(**EVERYBODY)),
    "reset by init": lambda: defended(FedAvg(**EVERYBODY), reset="init"),
    "half of the clients": lambda: defended(
        FedAvg(**EVERYBODY | {"min_train_nodes": 5, "fraction_train": 0.5})
    ),
    "FedAvgM": lambda: defended(FedAvgM(**EVERYBODY, server_momentum=0.5)),
    "FedAdam": lambda: defended(FedAdam(**EVERYBODY, eta=0.02, beta_1=0.9, beta_2=0.99)),
    "FedYogi": lambda: defended(FedYogi(**EVERYBODY, eta=0.02, beta_1=0.9, beta_2=0.99)),
    "FedAdagrad": lambda: defended(FedAdagrad(**EVERYBODY, eta=0.02)),
    "noise and a clipping norm": lambda: DifferentialPrivacyServerSideAdaptiveClipping(
        defended(FedAvg(**EVERYBODY)), 0.01, CLIENTS
    ),
    "mixin": mixed,
}


class StoppedError(Exception):
    """The server is killed."""


Stop = Callable[[str, int], bool]


class StoppingGrid(_ToyGrid):
    """A grid whose user is killed when the replies are there."""

    stop: Stop

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        messages = list(messages)
        replies = super().send_and_receive(messages, timeout=timeout)
        for message in messages[:1]:
            kind, content = message.metadata.message_type, message.content
            training = kind == "train"
            server_round = content["config"]["server-round"] if training else round_of(content)
            if self.stop(kind, int(server_round)):
                raise StoppedError
        return replies


class Run:
    """A run that is stopped where it is told to, on a grid whose clients stay."""

    def __init__(self, make: Callable[[], Strategy], file: Path) -> None:
        self.make, self.file = make, file
        self.grid = StoppingGrid(ToyFederation(CLIENTS, MALICIOUS))
        self.models: dict[int, dict[str, np.ndarray]] = {}

    def go(self, stop: Stop = lambda what, server_round: False) -> Strategy:
        """Start or resume in what could be a new process; ``stop`` says when it is killed."""
        strategy = self.make()
        random.seed(99)
        np.random.seed(98)  # noqa: NPY002
        torch.manual_seed(97)
        done, arrays = None, record_of(toy_model().state_dict())
        if self.file.exists():
            done, arrays, more = recall(self.file, strategy)
            assert more == {"note": done}

        def evaluated(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            assert server_round or done is None
            self.models[server_round] = {n: np.array(a.numpy()) for n, a in arrays.items()}
            if stop("before keeping", server_round):
                raise StoppedError
            keep(self.file, strategy, server_round, arrays, {"note": server_round})
            if stop("after keeping", server_round):
                raise StoppedError
            return MetricRecord({"round": server_round})

        self.grid.stop = stop
        continued = Continued(strategy, done)
        result = continued.start(self.grid, arrays, num_rounds=ROUNDS, evaluate_fn=evaluated)
        first = 0 if done is None else done + 1
        assert list(result.evaluate_metrics_serverapp) == list(range(first, ROUNDS + 1))
        return strategy


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    runs: dict[str, Run] = {}

    def of(name: str) -> Run:
        if name not in runs:
            runs[name] = Run(STRATEGIES[name], tmp_path_factory.mktemp("run") / "resume.npz")
            runs[name].go()
        return runs[name]

    return of


def assert_same(one: Run, other: Run) -> None:
    assert one.models.keys() == other.models.keys()
    for server_round, model in one.models.items():
        for name, array in model.items():
            assert array.dtype == other.models[server_round][name].dtype
            assert array.tobytes() == other.models[server_round][name].tobytes(), server_round


MOMENTS = [
    ("before keeping", 0),
    ("after keeping", 0),
    ("query.activations", 1),
    ("before keeping", 2),
    ("after keeping", 2),
    ("train", 4),
    ("query.activations", 4),
]


@pytest.mark.parametrize("name", STRATEGIES)
def test_stopped_in_every_phase_it_ends_with_the_same_models(
    tmp_path: Path, undisturbed: Callable[[str], Run], name: str
) -> None:
    run = Run(STRATEGIES[name], tmp_path / "resume.npz")
    for moment in MOMENTS:
        with pytest.raises(StoppedError):
            run.go(lambda what, server_round, at=moment: (what, server_round) == at)  # type: ignore[misc]
    run.go()
    assert_same(run, undisturbed(name))


@pytest.mark.parametrize("left_out", ["momentum_vector", "m_t", "v_t"])
def test_it_is_the_state_that_does_it(
    tmp_path: Path, undisturbed: Callable[[str], Run], left_out: str
) -> None:
    """Without what is kept, the models differ: so the tests above can fail."""
    name = "FedAvgM" if left_out == "momentum_vector" else "FedAdam"

    def forgetful() -> Strategy:
        strategy = STRATEGIES[name]()
        assert isinstance(strategy, NoneStrategy)
        inner, fresh = strategy.strategy, getattr(strategy.strategy, left_out)
        inner.state_dict = lambda: {}  # type: ignore[attr-defined]
        inner.load_state_dict = lambda state: setattr(inner, left_out, fresh)  # type: ignore[attr-defined]
        return strategy

    run = Run(forgetful, tmp_path / "resume.npz")
    with pytest.raises(StoppedError):
        run.go(lambda what, server_round: (what, server_round) == ("train", 2))
    run.go()
    with pytest.raises(AssertionError):
        assert_same(run, undisturbed(name))


# --- what the defence itself remembers ------------------------------------------------------------

# What a defence keeps for the length of a round, or works with.
OF_ONE_ROUND = {"record", "last_round", "_grid", "_nodes", "_template", "_trained", "_let_in"}


def whatever_is_probed(query: int, probed: bool) -> Detection:
    """An attack that every probe sees."""
    return attack(reset=True) if probed else nothing(False)


def game() -> Game:
    return Game(whatever_is_probed, attacking_in(range(1, 9)), watch=2, reset="init", probe_every=2)


def test_a_defence_goes_on_where_another_was_after_any_round(tmp_path: Path) -> None:
    undisturbed = game().play(6)
    assert any(record.quarantined for record in undisturbed.records)
    assert sum(bool(record.neurons_reset.size) for record in undisturbed.records) > 1
    for stopped in range(1, 6):
        first, second = game().play(stopped), game()
        snapshot.write(tmp_path / "state.npz", first.strategy.defence.state_dict())
        second.strategy.defence.load_state_dict(snapshot.read(tmp_path / "state.npz"))
        second.records = list(first.records)
        second.play(6 - stopped)
        assert first.models + second.models == undisturbed.models
        assert first.lines + second.lines == undisturbed.lines


def test_nothing_that_a_defence_learns_is_forgotten() -> None:
    """A new attribute that changes from round to round belongs into ``_SURVIVES``."""
    played = game()
    changed: set[str] = set()
    for _ in range(6):
        before = dict(vars(played.strategy.defence))
        played.play(1)
        changed |= {n for n, v in vars(played.strategy.defence).items() if before[n] is not v}
    assert {"_scene", "_probed", "_sightings", "_accuracy", "record"} <= changed
    assert changed - OF_ONE_ROUND <= set(defence._SURVIVES)


@pytest.mark.parametrize(
    ("name", "stopped"), [("_probed", 1), ("_sightings", 1), ("_reputation", 3)]
)
def test_what_a_defence_remembers_makes_a_difference(name: str, stopped: int) -> None:
    undisturbed = game().play(6)
    first, second = game().play(stopped), game()
    state = first.strategy.defence.state_dict()
    fresh = second.strategy.defence.state_dict()
    second.strategy.defence.load_state_dict(state | {name: fresh[name]})
    second.records = list(first.records)
    second.play(6 - stopped)
    assert first.lines + second.lines != undisturbed.lines


def test_a_new_run_knows_nothing_of_the_last_one(tmp_path: Path) -> None:
    strategy = defended(FedAvg(**EVERYBODY))
    first = Run(lambda: strategy, tmp_path / "first.npz")
    first.go()
    again = Run(lambda: strategy, tmp_path / "again.npz")
    again.go()
    assert_same(first, again)


def test_what_cannot_be_kept_is_said_when_it_is_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(FedAvg):
        def __init__(self) -> None:
            super().__init__()
            self.file = iter([])

    keep(tmp_path / "r.npz", Odd(), 3, ArrayRecord())
    with caplog.at_level("WARNING", "flwr"):
        recall(tmp_path / "r.npz", Odd())
    assert "Odd.file cannot be brought back" in caplog.text


def test_a_strategy_can_say_itself_what_it_keeps(tmp_path: Path) -> None:
    class Counting(FedAvg):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def state_dict(self) -> dict[str, Any]:
            return {"count": (self.count,)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            (self.count,) = state["count"]

    one, other = Counting(), Counting()
    one.count, one.fraction_train = 7, 0.25
    keep(tmp_path / "r.npz", one, 3, ArrayRecord())
    assert recall(tmp_path / "r.npz", other)[0] == 3
    assert (other.count, other.fraction_train) == (7, 1.0)


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        (FedAvgM, FedAvg),
        (FedAdam, FedAvgM),
        (lambda: defended(FedAvg()), FedAvg),
        (FedAvg, lambda: defended(FedAvg())),
    ],
)
def test_the_state_of_another_strategy_is_refused(
    tmp_path: Path, kept: Callable[[], Strategy], wanted: Callable[[], Strategy]
) -> None:
    keep(tmp_path / "r.npz", kept(), 3, ArrayRecord())
    with pytest.raises(SnapshotError):
        recall(tmp_path / "r.npz", wanted())


def test_a_defence_refuses_what_no_defence_keeps() -> None:
    strategy = defended(FedAvg())
    state = strategy.defence.state_dict()
    for wrong in ({}, state | {"_more": 1}, {n: v for n, v in state.items() if n != "_scene"}):
        with pytest.raises(SnapshotError, match="not what a defence keeps"):
            strategy.defence.load_state_dict(wrong)


def test_the_model_and_the_round_come_back(tmp_path: Path) -> None:
    arrays = record_of({"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)})
    random.seed(5)
    keep(tmp_path / "r.npz", FedAvg(), 7, arrays, {"more": [1, None]})
    drawn = random.random(), np.random.random(), torch.rand(2).tolist()  # noqa: NPY002
    done, back, more = recall(tmp_path / "r.npz", FedAvg())
    assert (done, more) == (7, {"more": [1, None]})
    assert list(back) == ["w", "n"]
    assert all(torch.equal(state_of(back)[n], t) for n, t in state_of(arrays).items())
    assert (random.random(), np.random.random(), torch.rand(2).tolist()) == drawn  # noqa: NPY002
