"""Runs a ServerApp and a ClientApp in this process, where `flwr run` would start Ray first."""

import copy
import logging
from collections.abc import Iterable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


def simulate(server_app: ServerApp, client_app: ClientApp, nodes: int) -> None:
    """Run the apps to their end; node p has the ``partition-id`` p."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    server_app(OneProcess(client_app, nodes), Context(1, 1, {}, RecordDict(), {}))


class OneProcess(Grid):
    """A grid whose messages reach the ClientApp at once, each node with a context of its own."""

    def __init__(self, client_app: ClientApp, nodes: int) -> None:
        self.client_app, self._run = client_app, Run.create_empty(1)
        self.contexts = {
            100 + p: Context(1, 100 + p, {"partition-id": p}, RecordDict(), {})
            for p in range(nodes)
        }
        self.replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Say which run this is."""
        self._run = run

    @property
    def run(self) -> Run:
        """Which run this is."""
        return self._run

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return list(self.contexts)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Have messages answered."""
        ids = []
        for message in messages:
            context = self.contexts[message.metadata.dst_node_id]
            reply = self.client_app(copy.deepcopy(message), context)
            ids.append(f"{id(reply)}")
            self.replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the answers."""
        return [self.replies.pop(key) for key in message_ids]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return the answers."""
        return self.pull_messages(self.push_messages(messages))
