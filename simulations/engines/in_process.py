"""Runs the very same ServerApp and ClientApp objects in this process, without Flower's processes.

Clients work on threads; which thread answers, and how many there are, does not change any result.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from logging import ERROR, WARNING
from pathlib import Path

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import log
from flwr.supercore.run import Run
from google.protobuf.message import DecodeError

from none_core.files import replace
from none_core.flower.standalone import RUN_ID, random_seeded, task_identity
from tasks.config import RunConfigValue


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    run_config: Mapping[str, RunConfigValue],
    *,
    clients: int,
    seed: int = 0,
    workers: int | None = None,
    nodes: Path | None = None,
) -> None:
    """Run a ServerApp to its end against `clients` nodes; what it raises is raised here.

    Parameters
    ----------
    server_app, client_app
        The objects that `flwr run` would load.
    run_config : mapping
        Flat scalars, as in Flower.
    clients : int
        Number of nodes; node ``p`` has ``partition-id`` p of ``num-partitions``.
    seed : int
        Seeds `random`, from which Flower's strategies draw nodes. Its state is put back.
    workers : int, optional
        Clients that work at the same time; one for each core if not given.
    nodes : Path, optional
        As in `InProcessGrid`.
    """
    context = Context(RUN_ID, SUPERLINK_NODE_ID, {}, RecordDict(), dict(run_config))
    with (
        task_identity(),
        random_seeded(seed),
        _one_torch_thread(),
        InProcessGrid(
            client_app, run_config, clients=clients, workers=workers, nodes=nodes
        ) as grid,
    ):
        server_app(grid, context)


class InProcessGrid(Grid):
    """A grid whose messages go to a ClientApp in this process.

    Each node keeps one `Context`, and so its state, for as long as the grid lives, and answers one
    message at a time. Use it as a context manager, or call `close`.

    Parameters
    ----------
    client_app : ClientApp
        Answers for every node.
    run_config : mapping
        The run configuration that clients see.
    clients : int
        Number of nodes.
    workers : int, optional
        Threads; one for each core if not given.
    nodes : Path, optional
        Folder in which each node keeps the state of its context, as a SuperNode does in its memory.
        One that finds some there goes on with it: so it outlives the process of the ServerApp.
    """

    def __init__(
        self,
        client_app: ClientApp,
        run_config: Mapping[str, RunConfigValue],
        *,
        clients: int,
        workers: int | None = None,
        nodes: Path | None = None,
    ) -> None:
        if nodes is not None:
            nodes.mkdir(parents=True, exist_ok=True)
        self._client_app = client_app
        self._run = Run.create_empty(RUN_ID)
        self._nodes = {
            node.context.node_id: node
            for node in (_Node(p, clients, run_config, nodes) for p in range(clients))
        }
        self._workers = workers or os.cpu_count() or 1
        self._pool = self._new_pool()
        self._calls: dict[str, tuple[_Node, Future[Message]]] = {}
        self._numbers = itertools.count(1)

    def __enter__(self) -> InProcessGrid:
        """Return the grid itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the grid."""
        self.close()

    def close(self) -> None:
        """Take no more messages; calls that run are left to end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid operates in."""
        return Run(**vars(self._run))

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message, as the deprecated method of Flower's grids does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes, in the order of their partitions."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Start answering messages, and return the ids they were given."""
        message_ids = []
        for message in messages:
            node = self._nodes.get(message.metadata.dst_node_id)
            if node is None:
                raise ValueError(f"there is no node {message.metadata.dst_node_id}")
            message_id = self._number(message)
            self._calls[message_id] = node, self._pool.submit(self._answer, node, message)
            message_ids.append(message_id)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return those replies that are there, in the order asked for, and each once."""
        ready = [key for key in message_ids if key in self._calls and self._calls[key][1].done()]
        return [self._calls.pop(key)[1].result() for key in ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and wait for the replies, in the order of the messages.

        Replies later than `timeout` seconds are dropped, and their messages are not in the list. A
        node that is still busy with such a message answers others with an error.
        """
        message_ids = self.push_messages(messages)
        wait([self._calls[key][1] for key in message_ids], timeout)
        replies = self.pull_messages(message_ids)
        self._abandon([key for key in message_ids if key in self._calls])
        return replies

    def _answer(self, node: _Node, message: Message) -> Message:
        """Let a node's ClientApp answer, or answer for it with an error."""
        partition = node.context.node_config["partition-id"]
        if node.is_late:
            reason = f"the node of partition {partition} is busy with a message that timed out"
            reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)
        else:
            with node.lock:
                reply = _called(self._client_app, message, node.context)
                node.keep()
            if reply.has_error():
                *traced, what = str(reply.error.reason).strip().split("\n")
                log(ERROR, "\n".join([f"client of partition {partition}: {what}", *traced]))
        self._number(reply)
        return reply

    def _abandon(self, message_ids: list[str]) -> None:
        """Forget calls that are too late; threads cannot be stopped, so others take over."""
        if not message_ids:
            return
        for key in message_ids:
            node, call = self._calls.pop(key)
            if not call.cancel():
                node.late = call
        self._pool.shutdown(wait=False)
        self._pool = self._new_pool()

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(
            self._workers, "client", initializer=torch.set_num_threads, initargs=(1,)
        )

    def _number(self, message: Message) -> str:
        """Give a message an id, which only the SuperLink does otherwise."""
        message_id = f"{next(self._numbers):032x}"
        message.metadata.__dict__["_message_id"] = message_id
        return message_id


class _Node:
    """One participant: its context, where that is kept, and what it is still busy with."""

    def __init__(
        self,
        partition: int,
        clients: int,
        run_config: Mapping[str, RunConfigValue],
        folder: Path | None,
    ) -> None:
        node_config = {"partition-id": partition, "num-partitions": clients}
        self._file = None if folder is None else folder / f"{partition}.state"
        self._kept = b""
        state = RecordDict()
        if self._file is not None and self._file.exists():
            self._kept = self._file.read_bytes()
            try:
                state = recorddict_from_proto(ProtoRecordDict.FromString(self._kept))
            except DecodeError as error:
                raise ValueError(f"{self._file} holds no node's state: {error}") from None
        self.context = Context(RUN_ID, _node_id(partition), node_config, state, dict(run_config))
        self.lock = threading.Lock()
        self.late: Future[Message] | None = None

    def keep(self) -> None:
        """Write the state of the context, if it has changed."""
        if self._file is None:
            return
        state = recorddict_to_proto(self.context.state).SerializeToString(deterministic=True)
        if state == self._kept:
            return
        try:
            replace(self._file, lambda file: file.write(state))
            self._kept = state
        except OSError as error:
            log(WARNING, "cannot write %s: %s", self._file, error.strerror)

    @property
    def is_late(self) -> bool:
        """Whether a call that was given up is still running."""
        return self.late is not None and not self.late.done()


def _node_id(partition: int) -> int:
    """Return an id that looks like Flower's, so that nobody takes it for the partition."""
    digest = hashlib.sha256(f"partition {partition}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _called(client_app: ClientApp, message: Message, context: Context) -> Message:
    """Call a ClientApp; what it raises becomes an error reply, as in Flower.

    Both ways the other side gets a copy, as it would over the network: strategies send one content
    to all, and a client may keep what it replied. (Array data are bytes, which are not copied.)
    """
    try:
        reply = client_app(copy.deepcopy(message), context)
        if not isinstance(reply, Message):
            raise TypeError(f"the ClientApp returned {type(reply).__name__}, not a Message")
        return copy.deepcopy(reply)
    except Exception:
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, traceback.format_exc())
        return Message(error, reply_to=message)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread: clients share the cores, and sums do not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
