"""The grid that measures: order, seconds, bytes, and what clients say of themselves."""

from __future__ import annotations

import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run

from server.grid import MeteredGrid, TooFewNodesError

pytestmark = pytest.mark.usefixtures("task_identity")


class Scripted:
    """A grid that answers with what it is given, after a while."""

    def __init__(self) -> None:
        self.replies: list[Message] = []
        self.asked: list[tuple[list[Message], float | None]] = []
        self.run = Run.create_empty(7)
        self.calls: list[tuple[str, object]] = []

    def send_and_receive(self, messages, *, timeout=None):
        self.asked.append((list(messages), timeout))
        time.sleep(0.02)
        return iter(self.replies)

    def __getattr__(self, name: str):
        def call(*args: object) -> str:
            self.calls.append((name, args))
            return f"result of {name}"

        return call


def instruction(node: int, kind: str = "train", size: int = 0) -> Message:
    arrays = ArrayRecord({"w": Array(np.zeros(size, np.uint8))})
    return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"x": 1})}), node, kind)


def truth(partition: object, **changes: object) -> dict[str, object]:
    told = {"partition-id": partition, "poisoned": 5, "dropped": 2, "dropped-poisoned": 1}
    return {k: v for k, v in {**told, **changes}.items() if v is not None}


def reply(node: int, told: dict | None = None, size: int = 0) -> Message:
    arrays = ArrayRecord({"w": Array(np.zeros(size, np.uint8))})
    content = RecordDict({"arrays": arrays})
    if told is not None:
        content["truth"] = ConfigRecord(told)
    return Message(content, reply_to=instruction(node))


def error(node: int) -> Message:
    return Message(Error(2, "failed"), reply_to=instruction(node))


def nodes(messages: list[Message]) -> list[int]:
    return [message.metadata.src_node_id for message in messages]


def test_replies_are_sorted_by_partition_and_unknown_nodes_come_last() -> None:
    inner = Scripted()
    grid = MeteredGrid(inner)
    inner.replies = [
        reply(50, truth(2)),
        error(9),
        reply(70, truth(0)),
        reply(60, truth(1)),
        reply(8),
    ]
    got = grid.send_and_receive([instruction(n) for n in (50, 9, 70, 60, 8)], timeout=3.0)
    assert nodes(got) == [70, 60, 50, 8, 9]
    assert grid.partition_of == {50: 2, 70: 0, 60: 1}
    # It remembers: replies to queries say nothing of partitions.
    inner.replies = [reply(50), reply(60), error(70)]
    assert nodes(grid.send_and_receive([])) == [70, 60, 50]
    assert inner.asked[0][1] == 3.0
    assert len(inner.asked[0][0]) == 5


def test_what_comes_in_any_order_goes_on_in_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        inner = Scripted()
        inner.replies = [reply(100 - p, truth(p)) for p in rng.permutation(10).tolist()]
        assert nodes(MeteredGrid(inner).send_and_receive([])) == list(range(100, 90, -1))


def test_seconds_and_bytes_are_metered_by_category_until_they_are_taken() -> None:
    inner = Scripted()
    grid = MeteredGrid(inner)
    empty = len(Array(np.zeros(0, np.uint8)).data)
    inner.replies = [reply(1, size=100), reply(2, size=50), error(3)]
    grid.send_and_receive([instruction(n, "train", 10) for n in (1, 2, 3)])
    grid.send_and_receive([instruction(n, "train", 10) for n in (1, 2)])
    inner.replies = [reply(1, size=7)]
    grid.send_and_receive([instruction(1, "query.activations", 1000)])
    grid.send_and_receive([])  # nobody is asked in an evaluation that is switched off
    seconds, traffic = grid.take()
    assert traffic == {
        "train_down": 5 * (10 + empty),
        "train_up": 2 * (150 + 2 * empty),
        "query_down": 1000 + empty,
        "query_up": 7 + empty,
    }
    assert seconds.keys() == {"train", "query"}
    assert 0.04 <= seconds["train"] < 5
    assert 0.02 <= seconds["query"] < 5
    assert grid.take() == ({}, {})
    assert traffic  # what was taken stays


def test_the_truth_is_that_of_the_last_reply() -> None:
    inner = Scripted()
    grid = MeteredGrid(inner)
    for dropped in (2, 6):
        inner.replies = [reply(50, truth(3, dropped=dropped))]
        grid.send_and_receive([])
    assert grid.truth == {3: truth(3, dropped=6)}


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"partition-id": 3},
        truth("3"),
        truth(1.5),
        truth(None),
        truth(3, dropped=None),
        truth(3, poisoned="many"),
        {"partition-id": 3, "poisoned": 5, "dropped": 2, "dropped-poisoned": b"1"},
    ],
)
def test_a_client_that_says_something_else_is_not_listened_to(told: dict) -> None:
    """The server adds these numbers up: half an answer must not end the run."""
    inner = Scripted()
    grid = MeteredGrid(inner)
    inner.replies = [reply(50, told)]
    assert nodes(grid.send_and_receive([])) == [50]
    assert (grid.partition_of, grid.truth) == ({}, {})


def test_extra_words_are_left_out() -> None:
    inner = Scripted()
    grid = MeteredGrid(inner)
    inner.replies = [reply(50, truth(3, more="words"))]
    grid.send_and_receive([])
    assert grid.truth == {3: truth(3)}


def test_everything_else_goes_to_the_wrapped_grid() -> None:
    inner = Scripted()
    grid = MeteredGrid(inner)
    assert grid.run is inner.run
    assert grid.get_node_ids() == list("result of get_node_ids")
    assert grid.push_messages([]) == "result of push_messages"
    assert grid.pull_messages(["a"]) == "result of pull_messages"
    assert grid.create_message(RecordDict(), "train", 1, "g", 2.0) == "result of create_message"
    grid.set_run(inner.run)
    assert [name for name, _ in inner.calls] == [
        *("get_node_ids", "push_messages", "pull_messages", "create_message", "set_run")
    ]
    assert inner.calls[2][1] == (["a"],)
    assert inner.calls[3][1] == (RecordDict(), "train", 1, "g", 2.0)


class Nodes(Scripted):
    """A grid whose nodes come and go."""

    def __init__(self, *counts: int) -> None:
        super().__init__()
        self.counts = list(counts)

    def get_node_ids(self) -> list[int]:
        count = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        return list(range(count))


def test_missing_nodes_are_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 9.0, 10.0, 20.0])
    monkeypatch.setattr("server.grid.time.monotonic", lambda: next(clock))
    grid = MeteredGrid(Nodes(1, 2, 4, 2, 2, 3), needed=4, patience=9.5)
    assert [len(grid.get_node_ids()) for _ in range(5)] == [1, 2, 4, 2, 2]
    with pytest.raises(TooFewNodesError, match=r"only 3 of the 4 participants .* start 1 more"):
        grid.get_node_ids()


def test_flowers_strategies_wait_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)
    grid = MeteredGrid(Nodes(3), needed=4, patience=0.05)
    strategy = FedAvg(min_train_nodes=4, min_available_nodes=4)
    with pytest.raises(TooFewNodesError):
        strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
