"""Averaging without those who trained on poisoned images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import FedAvg

from server.peers.oracle import Oracle
from tests.none_core.flower.toys import (
    HONEST,
    ToyGrid,
    answering,
    bits,
    honest_answer,
    train_content,
)
from tests.server.peers.rounds import EVERYBODY, play, sent


def telling(truth: dict[str, Any]) -> Any:
    """Train as usual, and tell the simulation this."""

    def train(message: Message) -> list[Message]:
        content = train_content(message.metadata.dst_node_id)
        content["truth"] = ConfigRecord(truth)
        return [Message(content, reply_to=message)]

    return answering(train=train)


def average_of_the_honest() -> Any:
    strategy = FedAvg(**EVERYBODY | {"min_train_nodes": 4, "min_available_nodes": 4})
    grid = ToyGrid(dict.fromkeys(HONEST, honest_answer))
    outgoing = strategy.configure_train(1, sent(), ConfigRecord(), grid)
    arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(outgoing))
    return arrays


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.values(), other.values(), strict=True)
    return all(np.allclose(a.numpy(), b.numpy(), atol=1) for a, b in pairs) and all(
        np.array_equal(one[n].numpy(), other[n].numpy()) for n in one if "weight" in n
    )


@pytest.mark.parametrize(
    ("truth", "left_out"),
    [
        ({"poisoned": 5, "dropped-poisoned": 0}, True),
        ({"poisoned": 5, "dropped-poisoned": 4}, True),
        ({"poisoned": 5, "dropped-poisoned": 5}, False),  # it obeyed
        ({"poisoned": 0, "dropped-poisoned": 0}, False),
        ({}, False),
        ({"poisoned": "many", "dropped-poisoned": 0}, False),
    ],
)
def test_who_trained_on_poisoned_images_is_left_out(truth: dict[str, Any], left_out: bool) -> None:
    strategy = Oracle(**EVERYBODY)
    arrays, _ = play(strategy, telling(truth))
    assert same(arrays, average_of_the_honest()) == left_out
    assert strategy.record.decision == f"left out {int(left_out)} of 5"
    everybody, _ = play(Oracle(**EVERYBODY))
    assert (bits(arrays) == bits(everybody)) == (not left_out)
