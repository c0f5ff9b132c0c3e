"""A grid that measures what passes through it, and returns replies in a fixed order."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from none_core.flower.messages import read_declined, read_privacy


class TooFewNodesError(RuntimeError):
    """Participants that a run needs did not come: how many, and what to do."""


class MeteredGrid(Grid):
    """Wraps a grid; every message goes to the wrapped one.

    Replies are sorted by the partition that their sender says it holds, because sums of floats
    depend on their order and replies arrive in any: with this the same seed gives the same model on
    every engine. Partition ids are a device of simulations; no defence reads them.

    Parameters
    ----------
    grid : Grid
    needed : int
        Participants that the run needs.
    patience : float
        Seconds in which as many must be connected, whenever nodes are asked for: Flower's own
        strategies wait for ever.

    Attributes
    ----------
    partition_of : dict of int to int
        Node id to partition id, for every node that has said so.
    seconds, traffic : dict
        Since the last :meth:`take`: seconds by category of message ("train", "query"), and bytes of
        arrays by category and direction ("train_down", "train_up", ...).
    truth : dict of int to dict
        What each partition's last train reply says of its poisoned samples.
    privacy : dict of int to dict
        By node id: what its last answer says that all its answers cost in privacy ("answers",
        "noise", "delta", "epsilon", and which statistics are "withheld"), and in how many it
        declined. Nodes that never said either are not in it.
    """

    def __init__(self, grid: Grid, needed: int = 0, patience: float = math.inf) -> None:
        self._grid, self._needed, self._patience = grid, needed, patience
        self._missing_since: float | None = None
        self.partition_of: dict[int, int] = {}
        self.truth: dict[int, dict[str, int]] = {}
        self.privacy: dict[int, dict[str, Any]] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.traffic: defaultdict[str, int] = defaultdict(int)

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """Return seconds and traffic so far, and start again from zero."""
        taken = dict(self.seconds), dict(self.traffic)
        self.seconds.clear()
        self.traffic.clear()
        return taken

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send, wait, measure and sort."""
        messages = list(messages)
        begin = time.perf_counter()
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        if messages:
            category = messages[0].metadata.message_type.partition(".")[0]
            self.seconds[category] += time.perf_counter() - begin
            self.traffic[f"{category}_down"] += sum(map(_size, messages))
            self.traffic[f"{category}_up"] += sum(map(_size, replies))
        for reply in replies:
            self._learn(reply)
        return sorted(replies, key=self._order)

    def set_run(self, run: Run) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The wrapped grid's run."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Pass on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on.

        Raises
        ------
        TooFewNodesError
            When there have been too few for too long.
        """
        nodes = list(self._grid.get_node_ids())
        if len(nodes) >= self._needed:
            self._missing_since = None
            return nodes
        now = time.monotonic()
        if self._missing_since is None:
            self._missing_since = now
        if now - self._missing_since >= self._patience:
            raise TooFewNodesError(
                f"only {len(nodes)} of the {self._needed} participants were connected for "
                f"{self._patience:g} s: start {self._needed - len(nodes)} more, or set "
                f"experiment.clients lower or run.node_timeout higher"
            )
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._grid.pull_messages(message_ids)

    def _learn(self, reply: Message) -> None:
        if not reply.has_content():
            return
        truth = reply.content.config_records.get("truth", {})
        numbers = {name: truth.get(name) for name in _TRUTH}
        if all(isinstance(value, int) for value in numbers.values()):
            partition = numbers["partition-id"]
            self.partition_of[reply.metadata.src_node_id] = partition
            self.truth[partition] = numbers
        self._learn_privacy(reply)

    def _learn_privacy(self, reply: Message) -> None:
        node = reply.metadata.src_node_id
        said: dict[str, Any] = {}
        if (cost := read_privacy(reply.content)) is not None:
            said = cost
        if read_declined(reply.content) is not None:
            said = {**said, "declined": self.privacy.get(node, {}).get("declined", 0) + 1}
        if said:
            self.privacy[node] = {**self.privacy.get(node, {}), **said}

    def _order(self, reply: Message) -> tuple[bool, int]:
        node = reply.metadata.src_node_id
        return node not in self.partition_of, self.partition_of.get(node, node)


# What a participant of a simulation says of itself.
_TRUTH = ("partition-id", "poisoned", "dropped", "dropped-poisoned")


def _size(message: Message) -> int:
    """Bytes of all arrays in a message."""
    if not message.has_content():
        return 0
    return sum(
        len(array.data)
        for record in message.content.array_records.values()
        for array in record.values()
    )
