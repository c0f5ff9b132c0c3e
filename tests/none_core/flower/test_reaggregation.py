"""Left out at once, in whole federations: the filter, Flower's strategies, both ways to plug in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedAvgM

from none_core.flower import NoneMixin, NoneStrategy
from none_core.flower.conformance import DefenceConformance
from none_core.flower.toy_federation import (
    EXAMPLE_INPUT,
    ToyFederation,
    attack_success,
    attackers,
    benign_accuracy,
    toy_model,
)

CLIENTS = 10
EVERYBODY = DefenceConformance.everybody(CLIENTS)


def scaled(factor: float) -> Callable[[RecordDict], RecordDict]:
    """Move so many times as far from the model that every run begins with."""
    base = {name: tensor.numpy() for name, tensor in toy_model().state_dict().items()}

    def corrupt(content: RecordDict) -> RecordDict:
        if "arrays" in content.array_records:
            content["arrays"] = ArrayRecord(
                {
                    name: Array((base[name] + factor * (array.numpy() - base[name])).astype("f4"))
                    for name, array in content.array_records["arrays"].items()
                }
            )
        return content

    return corrupt


class Diary(list[dict[str, Any]]):
    """What each round decided, by client."""

    def __init__(self, federation: ToyFederation, strategy: Any) -> None:
        super().__init__()
        self.clients = federation.node_ids()
        defence, aggregate = strategy.defence, strategy.aggregate_train

        def noted(server_round: int, replies: Any) -> Any:
            result = aggregate(server_round, replies)
            record = defence.record
            self.append(
                {
                    "left out": [self.clients[node] for node in record.left_out],
                    "dropped": {self.clients[n]: k for n, k in record.purified.items() if k},
                }
            )
            return result

        strategy.aggregate_train = noted


@pytest.mark.parametrize("malicious", [2, 4])
def test_a_filter_is_read_with_the_model_that_it_was_made_with(malicious: int) -> None:
    """An attacker whose update is gigantic is left out; honest samples look as they did."""
    federation = ToyFederation(CLIENTS, malicious, corrupt=scaled(10))
    strategy = NoneStrategy(FedAvg(**EVERYBODY), toy_model, EXAMPLE_INPUT)
    diary = Diary(federation, strategy)
    models = federation.run(strategy, 4)
    bad = set(attackers(CLIENTS, malicious))
    assert bad & set(diary[0]["left out"])
    assert not set(diary[0]["left out"]) - bad
    dropped = {client for entry in diary for client in entry["dropped"]}
    assert dropped
    assert dropped <= bad
    assert benign_accuracy(models[-1]) > 0.9
    assert attack_success(models[-1]) < 0.3


@pytest.mark.parametrize("malicious", [2, 4])
def test_quarantine_alone_comes_too_late_for_gigantic_updates(malicious: int) -> None:
    federation = ToyFederation(CLIENTS, malicious, corrupt=scaled(10))
    late = NoneStrategy(FedAvg(**EVERYBODY), toy_model, EXAMPLE_INPUT, reaggregate=False)
    assert attack_success(federation.run(late, 4)[-1]) > 0.4


class Mine(NoneMixin, FedAvgM):
    """A strategy of one's own."""


def test_a_strategy_of_ones_own_leaves_out_as_a_wrapped_one_does() -> None:
    def run(strategy: Any) -> tuple[Diary, list[Any]]:
        federation = ToyFederation(CLIENTS, 4)
        diary = Diary(federation, strategy)
        return diary, federation.run(strategy, 3)

    mine = Mine(**EVERYBODY, server_momentum=0.5)
    mine.defend(toy_model, EXAMPLE_INPUT)
    diary, models = run(mine)
    wrapped = NoneStrategy(FedAvgM(**EVERYBODY, server_momentum=0.5), toy_model, EXAMPLE_INPUT)
    other, others = run(wrapped)
    assert diary[0]["left out"]
    assert list(diary) == list(other)
    for one, two in zip(models, others, strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in one)
