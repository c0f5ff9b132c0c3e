"""From a detection to an action, against loops that say the same the long way."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from none_core.decision import Policy, accuracy_loss, decide, halve
from none_core.detection import Detection, Suspicion

LAYER_OF = np.repeat([0, 1, 2], [4, 10, 25])


def suspicion(alive: bool = False) -> Suspicion:
    return Suspicion(7, 2, 0.5, 3.0, alive, np.zeros(len(LAYER_OF)))


def detection(
    compromised: list[int], *, alive: bool = True, suspicions: tuple[Suspicion, ...] = ()
) -> Detection:
    scores = np.random.default_rng(0).random(len(LAYER_OF))
    ranked = sorted(compromised, key=lambda j: -scores[j])
    return Detection(scores, np.array(ranked, dtype=np.int64), alive, suspicions)


# --- decide ---------------------------------------------------------------------------------------


def test_nothing_is_reset_unless_the_backdoor_is_alive() -> None:
    for suspicions, reason in (
        ((), "nothing suspicious"),
        ((suspicion(),), "poisoned data seen, but the model does not react to them"),
    ):
        found = detection([3, 4, 20], alive=False, suspicions=suspicions)
        decision = decide(found, LAYER_OF, Policy(budget=1.0))
        assert decision.neurons.size == 0
        assert decision.neurons.dtype == np.int64
        assert decision.reason == reason


@given(
    compromised=st.sets(st.integers(0, len(LAYER_OF) - 1)).map(sorted),
    budget=st.floats(0.01, 1.0),
)
def test_each_layer_gives_its_worst_compromised_neurons_up_to_the_budget(
    compromised: list[int], budget: float
) -> None:
    found = detection(compromised)
    wanted = []
    for layer, size in enumerate(np.bincount(LAYER_OF)):
        mine = sorted(
            (j for j in compromised if LAYER_OF[j] == layer), key=lambda j: -found.scores[j]
        )
        wanted += mine[: math.floor(budget * size + 1e-9)]
    wanted.sort(key=lambda j: -found.scores[j])
    decision = decide(found, LAYER_OF, Policy(budget=budget))
    assert decision.neurons.tolist() == wanted
    assert f"{len(compromised)} neurons are compromised" in decision.reason
    left = len(compromised) - len(wanted)
    assert (f"{left} of them left for later rounds" in decision.reason) == bool(left)


def test_a_full_budget_resets_all_that_is_compromised_and_nothing_else() -> None:
    decision = decide(detection([0, 5, 30]), LAYER_OF, Policy(budget=1.0))
    assert sorted(decision.neurons) == [0, 5, 30]


def test_a_backdoor_that_comes_back_at_once_costs_the_whole_budget() -> None:
    found = detection([0, 5])
    ranked = np.flatnonzero(found.scores > 0)
    assert len(ranked) > 2
    decision = decide(found, LAYER_OF, Policy(budget=1.0), again=True)
    assert sorted(decision.neurons) == ranked.tolist()
    assert "did not last" in decision.reason
    quiet = replace(found, alive=False)
    assert decide(quiet, LAYER_OF, Policy(budget=1.0), again=True).neurons.size == 0


@pytest.mark.parametrize(("accuracy", "resets"), [(0.49, 0), (0.5, 2), (math.nan, 0)])
def test_a_model_that_knows_nothing_is_left_alone(accuracy: float, resets: int) -> None:
    decision = decide(detection([0, 5]), LAYER_OF, Policy(budget=1.0), accuracy=accuracy)
    assert decision.neurons.size == resets


# --- policy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        *[(name, value, ">= 1") for name in ("every", "start_round") for value in (0, -3)],
        *[
            (name, value, r"in \(0, 1\]")
            for name in ("quorum", "budget")
            for value in (0, -0.1, 1.01, math.nan, math.inf)
        ],
        *[
            (name, value, r"in \[0, 1\]")
            for name in ("guard", "min_accuracy")
            for value in (-0.01, 1.01, math.nan)
        ],
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: float, legal: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be {legal}, got {value}"):
        Policy(**{name: value})


def test_the_ends_of_the_ranges_are_legal() -> None:
    Policy(every=1, start_round=1, quorum=1.0, budget=1.0, guard=0.0)
    Policy(quorum=1e-9, budget=1e-9, guard=1.0)


@given(every=st.integers(1, 5), start=st.integers(1, 8), last=st.none() | st.integers(1, 12))
def test_it_queries_every_so_many_rounds_and_in_the_last(
    every: int, start: int, last: int | None
) -> None:
    policy = Policy(every=every, start_round=start)
    asking = set(range(start, 13, every)) | (
        {last} if last is not None and last >= start else set()
    )
    assert {r for r in range(1, 13) if policy.queries(r, last)} == asking


@given(quorum=st.floats(0.01, 1.0), asked=st.integers(0, 30))
def test_the_quorum_is_the_smallest_number_that_is_enough(quorum: float, asked: int) -> None:
    needed = Policy(quorum=quorum).needed(asked)
    assert needed >= 1
    assert needed >= quorum * asked
    assert needed == 1 or needed - 1 < quorum * asked


# --- the guard's figures --------------------------------------------------------------------------


def test_accuracy_loss_is_the_median_over_clients_that_answered_twice() -> None:
    before = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6, 5: 0.5}
    after = {1: 0.8, 2: 0.5, 3: 0.65, 9: 0.0}
    assert accuracy_loss(before, after) == pytest.approx(np.median([0.1, 0.3, 0.05]))


def test_one_liar_of_three_does_not_move_it_beyond_the_honest() -> None:
    before = {1: 0.9, 2: 0.9, 3: 0.9}
    for lie in (-1e9, 0.0, 1e9, math.nan, math.inf, -math.inf):
        assert 0.1 - 1e-9 <= accuracy_loss(before, {1: 0.8, 2: 0.7, 3: lie}) <= 0.2 + 1e-9


def test_without_anybody_to_compare_it_is_unknown() -> None:
    for before, after in (({}, {}), ({1: 0.5}, {2: 0.5}), ({1: math.nan}, {1: 0.5})):
        assert math.isnan(accuracy_loss(before, after))


@given(st.permutations(range(len(LAYER_OF))), st.integers(0, len(LAYER_OF)))
def test_halve_keeps_the_deepest_half_and_the_order(order: list[int], number: int) -> None:
    worst_first = np.array(order[:number], dtype=np.int64)
    kept = halve(worst_first, LAYER_OF)
    ranked = sorted(range(number), key=lambda i: (-LAYER_OF[order[i]], i))
    chosen = sorted(ranked[: number // 2])
    assert kept.tolist() == [order[i] for i in chosen]


def test_halving_ends() -> None:
    neurons = np.arange(39)
    sizes = [len(neurons)]
    while neurons.size:
        neurons = halve(neurons, LAYER_OF)
        sizes.append(len(neurons))
    assert sizes == [39, 19, 9, 4, 2, 1, 0]
