"""The published rule against a loop over classes and neurons, and on a planted backdoor."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from none_core.detection import Contrast
from tests.none_core.detection.toys import (
    LABELS,
    LAYER_OF,
    NEURONS,
    Values,
    detect,
    draw_values,
    federation,
    planted_net,
)


def slow_scores(clients: list[Values], deviations: float) -> list[float]:
    """The rule for every neuron over everybody's samples; -inf where no class has both kinds."""
    rows, probabilities = [], []
    for client in clients:
        rows += client.maxima().tolist()
        for logits in client.logits.tolist():
            exps = [math.exp(z) for z in logits]
            probabilities.append([e / sum(exps) for e in exps])
    scores = []
    for j in range(NEURONS):
        best = -math.inf
        for k in range(LABELS):
            confident = [row[j] for row, p in zip(rows, probabilities, strict=True) if p[k] > 0.9]
            unlikely = [row[j] for row, p in zip(rows, probabilities, strict=True) if p[k] < 0.1]
            if confident and unlikely:
                mean = sum(unlikely) / len(unlikely)
                variance = sum((v - mean) ** 2 for v in unlikely) / len(unlikely)
                best = max(best, max(confident) - (mean + deviations * math.sqrt(variance)))
        scores.append(best)
    return scores


@given(
    st.lists(st.integers(1, 15), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.integers(1, LABELS),
    st.sampled_from([0.0, 1.0, 3.0]),
)
def test_equals_the_rule_on_all_data_in_one_place(
    sizes: list[int], seed: int, labels: int, deviations: float
) -> None:
    clients = [draw_values(seed + i, n, labels) for i, n in enumerate(sizes)]
    reports = {i: c.report() for i, c in enumerate(clients)}

    detection = detect(Contrast(1.0, deviations), reports, LAYER_OF)

    # A standard deviation of 0 comes out of two equal sums as the root of their rounding error.
    expected = slow_scores(clients, deviations)
    assert detection.scores.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert detection.alive == any(s > -math.inf for s in expected)


@pytest.mark.parametrize(("fraction", "in_each"), [(0.3, (0, 1)), (0.5, (1, 2)), (1.0, (3, 4))])
def test_marks_the_top_fraction_of_each_layer(fraction: float, in_each: tuple[int, int]) -> None:
    clients = [draw_values(seed, 50) for seed in range(3)]

    detection = detect(Contrast(fraction), {i: c.report() for i, c in enumerate(clients)}, LAYER_OF)

    scores = slow_scores(clients, 3.0)
    expected: list[int] = []
    for layer, number in enumerate(in_each):
        members = [j for j in range(NEURONS) if LAYER_OF[j] == layer]
        expected += sorted(members, key=lambda j: -scores[j])[:number]
    assert detection.compromised.tolist() == sorted(expected, key=lambda j: -scores[j])


def test_a_class_that_nobody_predicts_with_confidence_has_no_contrast() -> None:
    values = draw_values(seed=1, n=30)
    values.logits[:] = 0  # every probability is a third

    detection = detect(Contrast(), {0: values.report()}, LAYER_OF)

    assert detection.scores.tolist() == [-math.inf] * NEURONS
    assert detection.compromised.size == 0
    assert not detection.alive


def test_it_ranks_the_planted_neurons_first() -> None:
    model, planted = planted_net()
    reports, layer_of = federation(model, attacked=True)

    detection = detect(Contrast(fraction=4 / 24), reports, layer_of)

    assert set(detection.compromised) == set(planted)


def test_without_an_attacker_it_marks_just_as_many_neurons() -> None:
    model, planted = planted_net()
    reports, layer_of = federation(model, attacked=False)

    detection = detect(Contrast(fraction=4 / 24), reports, layer_of)

    assert len(detection.compromised) == len(planted)
    assert not set(detection.compromised) & set(planted)
    assert detection.alive


def test_one_liars_maximum_decides() -> None:
    reports = {i: draw_values(i, 40).report() for i in range(5)}
    reports[3]["confident_max"][1, 5] = 1e30

    detection = detect(Contrast(fraction=0.3), reports, LAYER_OF)

    assert detection.compromised.tolist() == [5]
    assert np.argmax(detection.scores) == 5


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_fraction_out_of_range_is_an_error(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
        Contrast(fraction)
