"""The paper's rule against a loop over neurons and samples, and on a planted backdoor."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from none_core.detection import Linearity
from tests.none_core.detection.toys import (
    LAYER_OF,
    NEURONS,
    Values,
    detect,
    draw_values,
    federation,
    planted_net,
    without_planted,
)


def slow_shares(clients: list[Values]) -> list[float]:
    """P(A >= 0) of every neuron over all samples and positions of everybody."""
    shares = []
    for j in range(NEURONS):
        values: list[float] = []
        for client in clients:
            if j < 3:
                values += client.convolution[:, j].flatten().tolist()
            else:
                values += client.linear[:, j - 3].tolist()
        shares.append(sum(v >= 0 for v in values) / len(values))
    return shares


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.sampled_from([0.3, 0.5, 0.75, 1.0]),
)
def test_equals_the_rule_on_all_data_in_one_place(
    sizes: list[int], seed: int, theta: float
) -> None:
    clients = [draw_values(seed + i, n) for i, n in enumerate(sizes)]

    detection = detect(Linearity(theta), {i: c.report() for i, c in enumerate(clients)}, LAYER_OF)

    shares = slow_shares(clients)
    marked = [j for j in range(NEURONS) if shares[j] >= theta]
    assert detection.scores.tolist() == pytest.approx(shares, rel=1e-15)
    assert detection.compromised.tolist() == sorted(marked, key=lambda j: (-shares[j], j))
    assert detection.alive == bool(marked)
    assert detection.suspicions == ()


def test_a_share_of_exactly_theta_is_marked() -> None:
    values = draw_values(seed=0, n=20)
    values.linear[:, 0] = [-1.0] + [0.0] * 19

    scores = {}
    for theta in (0.95, 0.951):
        detection = detect(Linearity(theta), {0: values.report()}, LAYER_OF)
        scores[theta] = 3 in detection.compromised

    assert scores == {0.95: True, 0.951: False}


def test_huge_claims_do_not_wrap_around() -> None:
    honest = (np.full(NEURONS, 5), np.full(NEURONS, 10))
    liar = (np.full(NEURONS, 2**62), np.full(NEURONS, 2**62))

    detection = Linearity().detect({0: honest, 1: liar, 2: liar, 3: liar}, LAYER_OF)

    assert detection.scores.tolist() == pytest.approx([1.0] * NEURONS)


def test_it_does_not_see_neurons_that_fire_on_the_trigger_alone() -> None:
    model, planted = planted_net()
    reports, layer_of = federation(model, attacked=True)

    detection = detect(Linearity(), reports, layer_of)

    assert detection.compromised.size == 0
    # Their share is as small as the trigger is rare: 80 of 300 samples at four of ten clients.
    assert (detection.scores[planted] <= 0.11).all()


@pytest.mark.parametrize("attacked", [True, False])
def test_it_calls_neurons_linear_that_were_reset_to_zero(attacked: bool) -> None:
    _, planted = planted_net()
    reports, layer_of = federation(without_planted(), attacked=attacked)

    detection = detect(Linearity(), reports, layer_of)

    assert detection.compromised.tolist() == sorted(planted)
    assert detection.scores[planted].tolist() == [1.0] * len(planted)


@pytest.mark.parametrize("theta", [0.0, -0.1, 1.01, float("nan")])
def test_theta_out_of_range_is_an_error(theta: float) -> None:
    with pytest.raises(ValueError, match=r"theta must be in \(0, 1\]"):
        Linearity(theta)
