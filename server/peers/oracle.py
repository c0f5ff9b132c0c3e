"""No defence, but what defences that leave clients out are measured against: it knows who attacks.

Plain averaging of those replies that were not trained on poisoned images, which only a simulation
can tell. What it loses against a run without an attacker is the attackers' clean samples, and no
defence that leaves the attackers out gets these back.
"""

from __future__ import annotations

from flwr.app import Message
from flwr.serverapp.strategy import FedAvg

from server.peers.base import Aggregate, Validated


class Oracle(Validated, FedAvg):
    """Average what was not trained on poisoned images, and say in ``record.decision`` how many."""

    def aggregate_valid(self, server_round: int, replies: list[Message]) -> Aggregate:
        """Leave out replies whose truth says so; there has to be one."""
        clean = [message for message in replies if not _poisoned(message)]
        self.record.decision = f"left out {len(replies) - len(clean)} of {len(replies)}"
        return super().aggregate_valid(server_round, clean)


def _poisoned(message: Message) -> bool:
    truth = message.content.config_records.get("truth") if message.has_content() else None
    if truth is None:
        return False
    used, dropped = truth.get("poisoned", 0), truth.get("dropped-poisoned", 0)
    return isinstance(used, int) and isinstance(dropped, int) and used > dropped
