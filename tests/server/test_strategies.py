"""Every strategy that a configuration can name, with its settings in the right place."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

from none_core.detection import DETECTORS
from none_core.flower import NoneStrategy
from server import strategies
from server.config import DefenseConfig, ThresholdsConfig
from server.peers.base import Validated
from server.peers.flame import Flame
from server.peers.foolsgold import FoolsGold
from server.peers.oracle import Oracle
from server.peers.pruning import Pruning
from server.peers.rfa import RFA
from server.peers.rlr import RobustLearningRate
from server.peers.stock import Bulyan, FedMedian, FedTrimmedAvg, MultiKrum
from tasks.config import ConfigError

CLIENTS = 9
TYPES = {
    "undefended": FedAvg,
    "none-strategy": NoneStrategy,
    "fedmedian": FedMedian,
    "trimmed-avg": FedTrimmedAvg,
    "multikrum": MultiKrum,
    "bulyan": Bulyan,
    "rfa": RFA,
    "rlr": RobustLearningRate,
    "foolsgold": FoolsGold,
    "flame": Flame,
    "pruning": Pruning,
    "oracle": Oracle,
}
LINES: list[dict] = []


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))


def build(name: str, thresholds: ThresholdsConfig | None = None, **settings: object):
    config = DefenseConfig(name=name, **settings)
    thresholds = thresholds or ThresholdsConfig()
    return strategies.build(config, thresholds, CLIENTS, net, (1, 4, 4), 5, LINES.append)


def test_every_name_has_a_strategy() -> None:
    assert set(get_args(DefenseConfig.model_fields["name"].annotation)) == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_a_name_gives_its_strategy_in_which_everybody_trains_and_nobody_evaluates(
    name: str,
) -> None:
    built = build(name, f=1)
    assert type(built) is TYPES[name]
    inner = built.strategy if isinstance(built, NoneStrategy) else built
    assert inner.fraction_train == 1.0
    assert inner.min_train_nodes == inner.min_available_nodes == CLIENTS
    assert inner.fraction_evaluate == 0.0
    assert inner.min_evaluate_nodes == 0


def test_the_peers_get_their_settings() -> None:
    assert build("trimmed-avg", trim_beta=0.3).beta == 0.3
    krum = build("multikrum", f=2)
    assert (krum.num_malicious_nodes, krum.num_nodes_to_select) == (2, CLIENTS - 2)
    assert build("bulyan", f=1).num_malicious_nodes == 1
    assert build("rlr", rlr_threshold=4).threshold == 4
    flame = build("flame", flame_noise=0.5)
    assert flame.noise == 0.5
    assert flame.generator.random() == build("flame").generator.random()
    pruning = build("pruning", guard=0.1, quorum=0.7, min_count=9, timeout=12.0)
    assert (pruning.guard, pruning.quorum) == (0.1, 0.7)
    assert (pruning.min_count, pruning.timeout) == (9, 12.0)


def test_every_peer_sees_validated_replies_only() -> None:
    for name in set(TYPES) - {"undefended", "none-strategy"}:
        assert isinstance(build(name, f=1), Validated), name


def test_the_defaults_of_the_configuration_are_those_of_the_papers() -> None:
    assert build("rlr").threshold == RobustLearningRate().threshold
    assert build("flame").noise == 0.001
    assert build("pruning").guard == Pruning(net, torch.zeros(1, 1, 4, 4)).guard


@pytest.mark.parametrize(
    ("name", "clients", "most"), [("multikrum", 10, 3), ("multikrum", 11, 4), ("bulyan", 10, 1)]
)
def test_more_malicious_clients_than_a_rule_is_proven_for_are_refused(
    name: str, clients: int, most: int
) -> None:
    DefenseConfig(name=name, f=most).check(clients)
    with pytest.raises(ConfigError, match=f"defense.f = {most + 1} .*>= 0 and <= {most} "):
        DefenseConfig(name=name, f=most + 1).check(clients)
    with pytest.raises(ConfigError, match=r"experiment.clients = 2 .* >= 3"):
        DefenseConfig(name=name, f=0).check(2)
    with pytest.raises(ConfigError, match=r"defense.f = 40"):
        build(name, f=40)


@pytest.mark.parametrize("detector", sorted(DETECTORS))
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
        quarantine=False,
        liars=3,
        probe_every=4,
        probe_steps=17,
        probe_images=6,
        min_count=9,
        timeout=12.0,
    ).defence
    policy = defence.policy
    assert (policy.every, policy.start_round, policy.budget) == (3, 4, 0.11)
    assert (policy.quorum, policy.guard, policy.probe_every) == (0.7, 0.05, 4)
    assert (defence.quarantine, defence.liars) == (False, 3)
    assert (defence.probe.steps, defence.probe.images) == (17, 6)
    assert defence.probe.labels == (0, 1, 2)
    assert (defence.detector.name, defence.how, defence.purify) == (detector, "init", False)
    assert (defence.min_count, defence.timeout) == (9, 12.0)
    assert (defence.spec.neurons, defence.spec.labels) == (6, 3)
    assert defence._generator.initial_seed() == 5
    assert defence.audit is not None
    defence.audit({"round": 1})
    assert LINES.pop() == {"round": 1}


def test_the_defaults_of_the_configuration_are_those_of_the_library() -> None:
    """Whoever leaves a setting out gets the same defence from both, but for the detector."""
    configured = build("none-strategy").defence
    plain = NoneStrategy(FedAvg(), net, configured._model[1].weight.new_zeros(1, 1, 4, 4)).defence
    assert configured.policy == plain.policy
    same = ("how", "purify", "min_count", "timeout", "purify_threshold", "purify_others")
    for part in ("mixture", "inversion"):
        assert vars(getattr(configured.detector, part)) == vars(getattr(plain.detector, part))
    for name in (*same, "repair_share", "quarantine", "liars", "probe", "_reputation"):
        assert getattr(configured, name) == getattr(plain, name), name
    assert configured.detector.name == DefenseConfig().detector


def test_every_threshold_reaches_the_defence() -> None:
    other = ThresholdsConfig(
        foreign=0.3,
        outlier=5.0,
        alive=1.7,
        significant=0.5,
        small=0.4,
        apart=1.6,
        min_accuracy=0.6,
        filter_suspected=0.25,
        filter_others=2.5,
        repaired=0.3,
    )
    unchanged = ThresholdsConfig().model_dump().items() & other.model_dump().items()
    assert not unchanged, "set each to something else, so that this test sees it"

    def read(defence) -> dict[str, float]:
        return {
            **{
                name: getattr(defence.detector.mixture, name)
                for name in ("foreign", "outlier", "alive", "significant")
            },
            "small": defence.detector.inversion.ratio,
            "apart": defence.policy.apart,
            "min_accuracy": defence.policy.min_accuracy,
            "filter_suspected": defence.purify_threshold,
            "filter_others": defence.purify_others,
            "repaired": defence.repair_share,
        }

    for thresholds in (ThresholdsConfig(), other):
        assert read(build("none-strategy", thresholds).defence) == thresholds.model_dump()
    alone = build("none-strategy", other, detector="mixture").defence.detector
    assert (alone.foreign, alone.alive) == (0.3, 1.7)
    assert build("none-strategy", other, detector="inversion").defence.detector.ratio == 0.4
