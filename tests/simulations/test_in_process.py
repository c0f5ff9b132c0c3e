"""The in-process engine, with toy apps."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from simulations.engines import run_in_process

CLIENTS = 4


def make_client() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        calls = context.state.setdefault("calls", MetricRecord({"n": 0}))
        calls["n"] += 1
        partition = context.node_config["partition-id"]
        time.sleep(0.02 * (CLIENTS - partition))  # the first one to be asked answers last
        answer = {"partition": partition, "calls": calls["n"], "thread": threading.get_ident()}
        answer["torch-threads"] = torch.get_num_threads()
        return Message(RecordDict({"answer": MetricRecord(answer)}), reply_to=message)

    @app.query("sleepy")
    def sleepy(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == message.content["config"]["who"]:
            time.sleep(0.4)
        message.content["config"]["who"] = -1  # must not be seen by anybody else
        return Message(RecordDict(), reply_to=message)

    @app.query("broken")
    def broken(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("no such thing")
        return "not a message" if context.node_config["partition-id"] == 2 else message_to(message)

    return app


def message_to(message: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def in_run(main, **options) -> None:
    """Run `main` as the body of a ServerApp; what it asserts is raised here."""
    server = ServerApp()
    server.main()(main)
    run_in_process(server, make_client(), {"a.b": 1}, clients=CLIENTS, **options)


def messages(grid: Grid, kind: str = "train", who: int = 0) -> list[Message]:
    shared = RecordDict({"config": ConfigRecord({"who": who})})
    return [Message(shared, node, kind) for node in grid.get_node_ids()]


def test_replies_come_in_the_order_of_the_messages_and_name_them() -> None:
    def main(grid: Grid, context: Context) -> None:
        sent = messages(grid)[::-1]
        replies = grid.send_and_receive(sent)
        assert [r.content["answer"]["partition"] for r in replies] == [3, 2, 1, 0]
        assert [r.metadata.reply_to_message_id for r in replies] == [
            m.metadata.message_id for m in sent
        ]
        assert [r.metadata.src_node_id for r in replies] == grid.get_node_ids()[::-1]
        assert len({m.metadata.message_id for m in [*sent, *replies]}) == 2 * CLIENTS

    in_run(main)


def test_state_persists_in_a_run_and_not_beyond_it() -> None:
    def main(grid: Grid, context: Context) -> None:
        for turn in (1, 2, 3):
            replies = grid.send_and_receive(messages(grid))
            assert {r.content["answer"]["calls"] for r in replies} == {turn}

    in_run(main)
    in_run(main)


def test_state_that_is_kept_in_a_folder_outlives_the_process(tmp_path: Path) -> None:
    def turn(number: int) -> None:
        def main(grid: Grid, context: Context) -> None:
            replies = grid.send_and_receive(messages(grid))
            assert {r.content["answer"]["calls"] for r in replies} == {number}

        in_run(main, nodes=tmp_path / "nodes")

    turn(1)
    turn(2)
    assert len(list((tmp_path / "nodes").iterdir())) == CLIENTS
    (tmp_path / "nodes" / "2.state").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"2\.state holds no node's state"):
        turn(3)


def test_state_that_cannot_be_kept_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    def main(grid: Grid, context: Context) -> None:
        assert not any(reply.has_error() for reply in grid.send_and_receive(messages(grid)))

    monkeypatch.setattr("none_core.files.os.replace", full)
    in_run(main, nodes=tmp_path / "nodes")
    assert list((tmp_path / "nodes").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_clients_work_on_so_many_threads_with_one_torch_thread_each(workers: int) -> None:
    def main(grid: Grid, context: Context) -> None:
        answers = [r.content["answer"] for r in grid.send_and_receive(messages(grid))]
        assert len({a["thread"] for a in answers}) == workers
        assert threading.get_ident() not in {a["thread"] for a in answers}
        assert {a["torch-threads"] for a in answers} == {1}

    in_run(main, workers=workers)


def test_a_client_that_raises_gives_an_error_reply_with_the_reason() -> None:
    def main(grid: Grid, context: Context) -> None:
        replies = grid.send_and_receive(messages(grid, "query.broken"))
        assert [r.has_error() for r in replies] == [False, True, True, False]
        assert replies[1].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert "ValueError: no such thing" in replies[1].error.reason
        assert "returned str" in replies[2].error.reason
        unknown = grid.send_and_receive(messages(grid, "query.unknown"))
        assert all(r.has_error() for r in unknown)

    in_run(main)


def test_late_replies_are_dropped_and_do_not_hold_up_the_next_round() -> None:
    def main(grid: Grid, context: Context) -> None:
        nodes = grid.get_node_ids()
        start = time.monotonic()
        replies = grid.send_and_receive(messages(grid, "query.sleepy", who=0), timeout=0.15)
        assert time.monotonic() - start < 0.3
        assert [r.metadata.src_node_id for r in replies] == nodes[1:]
        # The late node is still busy; the others have a free thread again.
        replies = grid.send_and_receive(messages(grid, "query.sleepy", who=-1), timeout=0.15)
        assert [r.metadata.src_node_id for r in replies] == nodes
        assert replies[0].error.code == ErrorCode.NODE_UNAVAILABLE
        assert not any(r.has_error() for r in replies[1:])
        time.sleep(0.4)
        replies = grid.send_and_receive(messages(grid, "query.sleepy", who=-1))
        assert not any(r.has_error() for r in replies)

    in_run(main, workers=2)


def test_messages_that_were_pushed_are_pulled_once() -> None:
    def main(grid: Grid, context: Context) -> None:
        ids = grid.push_messages(messages(grid))
        assert grid.pull_messages(ids) == []
        time.sleep(0.5)
        assert len(grid.pull_messages(ids)) == CLIENTS
        assert grid.pull_messages(ids) == []
        with pytest.raises(ValueError, match="there is no node 7"):
            grid.push_messages([Message(RecordDict(), 7, "train")])

    in_run(main)


def test_node_ids_repeat_and_are_not_partitions() -> None:
    seen = []

    def main(grid: Grid, context: Context) -> None:
        seen.append((grid.get_node_ids(), random.sample(grid.get_node_ids(), 3)))
        assert context.run_config == {"a.b": 1}
        assert grid.run.run_id == context.run_id

    in_run(main, seed=5)
    in_run(main, seed=5)

    assert seen[0] == seen[1]
    assert set(seen[0][0]).isdisjoint(range(CLIENTS))


def test_what_was_changed_for_the_run_is_put_back() -> None:
    torch.set_num_threads(2)
    random.seed(3)
    before = random.getstate()

    def main(grid: Grid, context: Context) -> None:
        assert torch.get_num_threads() == 1
        random.random()
        raise RuntimeError("the app failed")

    with pytest.raises(RuntimeError, match="the app failed"):
        in_run(main)

    assert torch.get_num_threads() == 2
    assert random.getstate() == before
    with pytest.raises(RuntimeError, match="not set"):
        _ = TaskIdentity.run_id
