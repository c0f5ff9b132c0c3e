"""Every strategy that a configuration can name, with its settings in the right place."""

from __future__ import annotations

from typing import get_args

import pytest
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, MultiKrum
from torch import nn

from none_core.flower import NoneStrategy
from server import strategies
from server.config import DefenseConfig

CLIENTS = 9
TYPES = {
    "undefended": FedAvg,
    "none-strategy": NoneStrategy,
    "fedmedian": FedMedian,
    "trimmed-avg": FedTrimmedAvg,
    "multikrum": MultiKrum,
}
LINES: list[dict] = []


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))


def build(name: str, **settings: object):
    config = DefenseConfig(name=name, **settings)
    return strategies.build(config, CLIENTS, net, (1, 4, 4), 5, LINES.append)


def test_every_name_has_a_strategy() -> None:
    assert set(get_args(DefenseConfig.model_fields["name"].annotation)) == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_a_name_gives_its_strategy_in_which_everybody_trains_and_nobody_evaluates(
    name: str,
) -> None:
    built = build(name)
    assert type(built) is TYPES[name]
    inner = built.strategy if isinstance(built, NoneStrategy) else built
    assert inner.fraction_train == 1.0
    assert inner.min_train_nodes == inner.min_available_nodes == CLIENTS
    assert inner.fraction_evaluate == 0.0
    assert inner.min_evaluate_nodes == 0


def test_the_robust_ones_get_their_settings() -> None:
    assert build("trimmed-avg", trim_beta=0.3).beta == 0.3
    krum = build("multikrum", f=2)
    assert (krum.num_malicious_nodes, krum.num_nodes_to_select) == (2, CLIENTS - 2)
    assert build("multikrum", f=40).num_nodes_to_select == 1


@pytest.mark.parametrize("detector", ["mixture", "linearity", "contrast"])
def test_the_defence_gets_its_settings(detector: str) -> None:
    defence = build(
        "none-strategy",
        detector=detector,
        reset="init",
        every=3,
        start_round=4,
        budget=0.11,
        quorum=0.7,
        guard=0.05,
        filter=False,
        min_count=9,
        timeout=12.0,
    ).defence
    policy = defence.policy
    assert (policy.every, policy.start_round, policy.budget) == (3, 4, 0.11)
    assert (policy.quorum, policy.guard) == (0.7, 0.05)
    assert (defence.detector.name, defence.how, defence.purify) == (detector, "init", False)
    assert (defence.min_count, defence.timeout) == (9, 12.0)
    assert (defence.spec.neurons, defence.spec.labels) == (6, 3)
    assert defence._generator.initial_seed() == 5
    assert defence.audit is not None
    defence.audit({"round": 1})
    assert LINES.pop() == {"round": 1}


def test_the_defaults_of_the_configuration_are_those_of_the_library() -> None:
    """Whoever leaves a setting out gets the same defence from both."""
    configured = build("none-strategy").defence
    plain = NoneStrategy(FedAvg(), net, configured._model[1].weight.new_zeros(1, 1, 4, 4)).defence
    assert configured.policy == plain.policy
    for name in ("how", "purify", "min_count", "timeout", "purify_threshold"):
        assert getattr(configured, name) == getattr(plain, name), name
    assert configured.detector.name == plain.detector.name
