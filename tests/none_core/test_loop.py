"""The defence without Flower, on the planted toy net."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from none_core.activations import Report
from none_core.decision import Policy, Reputation
from none_core.detection import Inversion, Linearity
from none_core.loop import LoopDefence
from none_core.neurons import NeuronMap
from tests.none_core.detection.toys import (
    ATTACKERS,
    CLASSES,
    CLIENTS,
    PARTS,
    local_data,
    planted_net,
    without_planted,
)

EXAMPLE = torch.zeros(2, 2 * CLASSES + PARTS)


def reports(defence: LoopDefence, model: nn.Module, *, attacked: bool = True) -> dict[int, Report]:
    return {
        client: defence.report(model, [local_data(client, attacked and client in ATTACKERS)])
        for client in range(CLIENTS)
    }


def test_the_planted_neurons_are_reset_and_the_attackers_left_out_the_second_time() -> None:
    model, planted = planted_net()
    defence = LoopDefence(model, EXAMPLE, policy=Policy(budget=1.0))
    decision = defence.defend(model, reports(defence, model))
    assert sorted(decision.neurons) == sorted(planted)
    assert not model[0].weight[planted[:PARTS]].any()
    assert defence.quarantined == frozenset()  # one naming is not enough
    again, _ = planted_net()  # attackers plant again what was reset
    defence.defend(again, reports(defence, again))
    assert defence.quarantined == frozenset(ATTACKERS)


def test_a_clean_federation_loses_nothing() -> None:
    model = without_planted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    defence = LoopDefence(model, EXAMPLE)
    for _ in range(3):
        assert defence.defend(model, reports(defence, model, attacked=False)).neurons.size == 0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert defence.quarantined == frozenset()


def test_what_quarantined_clients_report_resets_nothing_but_keeps_them_out() -> None:
    model, _ = planted_net()
    evidence = dict.fromkeys(range(CLIENTS), 0.0) | dict.fromkeys(ATTACKERS, 2.0)
    reputation = Reputation(evidence=evidence, quarantined=frozenset(ATTACKERS))
    defence = LoopDefence(model, EXAMPLE, reputation=reputation)
    decision = defence.defend(model, reports(defence, model))
    assert decision.neurons.size == 0
    assert defence.quarantined == frozenset(ATTACKERS)


def test_the_policy_is_asked() -> None:
    model, planted = planted_net()
    defence = LoopDefence(model, EXAMPLE, policy=Policy(budget=0.1))
    found = defence.defend(model, reports(defence, model)).neurons
    assert 0 < len(found) < len(planted)
    useless = nn.Sequential(*planted_net()[0])
    useless[4].weight.data.neg_()
    defence = LoopDefence(useless, EXAMPLE, policy=Policy(budget=1.0))
    assert "too early" in defence.defend(useless, reports(defence, useless)).reason


def test_a_map_and_a_detector_of_ones_own() -> None:
    model, _ = planted_net()
    neuron_map = NeuronMap.from_modules(model, EXAMPLE, ["2"])
    defence = LoopDefence(model, EXAMPLE, detector=Linearity(), neuron_map=neuron_map)
    assert defence.spec.neurons == 2 * CLASSES + 1
    assert defence.spec.statistics == Linearity.statistics
    before = model[0].weight.clone()
    defence.defend(model, reports(defence, model))
    np.testing.assert_array_equal(model[0].weight.detach(), before.detach())


def test_a_detector_that_needs_triggers_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="'inversion' needs triggers"):
        LoopDefence(planted_net()[0], EXAMPLE, detector=Inversion())
