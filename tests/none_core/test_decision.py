"""From a detection to an action, against loops that say the same the long way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from none_core.decision import Policy, Reputation, accuracy_loss, decide, halve, share_out, weigh
from none_core.detection import Attack, Detection, Suspicion

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


@pytest.mark.parametrize(("accuracy", "resets"), [(0.49, 0), (0.5, 2), (math.nan, 0)])
def test_a_model_that_knows_nothing_is_left_alone(accuracy: float, resets: int) -> None:
    decision = decide(detection([0, 5]), LAYER_OF, Policy(budget=1.0), accuracy=accuracy)
    assert decision.neurons.size == resets


def attack(label: int) -> Attack:
    return Attack(label, size=0.01, usual=0.1, strength=5.0, certified=True)


def test_an_attack_is_acted_on_when_a_second_probe_confirms_it() -> None:
    found = replace(detection([0, 5]), attacks=(attack(3), attack(1)))
    waiting = decide(found, LAYER_OF, Policy(budget=1.0), confirmed=False)
    assert waiting.neurons.size == 0
    assert waiting.reason == "class 3, 1 looks attacked, to be confirmed by a probe"
    assert sorted(decide(found, LAYER_OF, Policy(budget=1.0), confirmed=True).neurons) == [0, 5]


def test_what_no_probe_saw_needs_no_probe_to_confirm_it() -> None:
    found = detection([0, 5], suspicions=(suspicion(alive=True),))
    decision = decide(found, LAYER_OF, Policy(budget=1.0), confirmed=False)
    assert sorted(decision.neurons) == [0, 5]


def test_what_is_held_back_is_not_reset_but_mentioned() -> None:
    found = replace(detection([0, 5]), held_back=np.array([7, 8, 30]))
    decision = decide(found, LAYER_OF, Policy(budget=1.0))
    assert sorted(decision.neurons) == [0, 5]
    assert decision.reason == "2 neurons are compromised and 3 contested"


# --- policy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        *[
            (name, value, ">= 1")
            for name in ("every", "start_round", "probe_every")
            for value in (0, -3)
        ],
        ("watch", -1, ">= 0"),
        *[("apart", value, "> 1") for value in (1.0, 0.0, -2.0, math.nan)],
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
    Policy(every=1, start_round=1, probe_every=1, quorum=1.0, budget=1.0, guard=0.0)
    Policy(quorum=1e-9, budget=1e-9, guard=1.0, watch=0, apart=1.001)


@given(every=st.integers(1, 5), start=st.integers(1, 8), last=st.none() | st.integers(1, 12))
def test_it_queries_every_so_many_rounds_and_in_the_last(
    every: int, start: int, last: int | None
) -> None:
    policy = Policy(every=every, start_round=start)
    asking = set(range(start, 13, every)) | (
        {last} if last is not None and last >= start else set()
    )
    assert {r for r in range(1, 13) if policy.queries(r, last)} == asking


@given(every=st.integers(1, 5), start=st.integers(1, 8), last=st.none() | st.integers(8, 12))
def test_it_probes_every_so_many_rounds_and_in_the_last(
    every: int, start: int, last: int | None
) -> None:
    policy = Policy(probe_every=every, start_round=start)
    due = set(range(start, 13, every)) | ({last} if last is not None else set())
    assert {r for r in range(start, 13) if policy.probes(r, last)} == due


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
def test_halve_keeps_the_worse_half_of_each_layer(order: list[int], number: int) -> None:
    worst_first = np.array(order[:number], dtype=np.int64)
    kept = halve(worst_first, LAYER_OF)
    wanted = []
    for layer in set(LAYER_OF):
        mine = [j for j in order[:number] if LAYER_OF[j] == layer]
        wanted += mine[: len(mine) // 2]
    assert kept.tolist() == [j for j in order[:number] if j in wanted]


def test_halving_ends() -> None:
    neurons, rounds = np.arange(39), 0
    while neurons.size:
        before = len(neurons)
        neurons, rounds = halve(neurons, LAYER_OF), rounds + 1
        assert len(neurons) <= before // 2
    assert rounds <= 6


# --- sharing out ----------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 15), st.integers(1, 20), st.integers(0, 30))
def test_every_class_is_looked_at_by_enough_and_everybody_does_as_much(
    labels: int, clients: int, each: int, turn: int
) -> None:
    shares = share_out(range(labels), range(100, 100 + clients), each, turn)
    assert list(shares) == list(range(100, 100 + clients))
    loads = [len(mine) for mine in shares.values()]
    assert max(loads) - min(loads) <= 1
    assert min(loads) >= min(3, labels)
    for label in range(labels):
        assert sum(label in mine for mine in shares.values()) >= min(each, clients)
    assert all(list(mine) == sorted(set(mine)) for mine in shares.values())


def test_other_clients_look_when_it_is_another_turn() -> None:
    looking = [
        [c for c, mine in share_out(range(10), range(10), 3, turn).items() if 0 in mine]
        for turn in range(10)
    ]
    assert looking[0] == [0, 1, 2]
    assert {client for clients in looking for client in clients} == set(range(10))


# --- evidence -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suspected", "named", "certified", "evidence"),
    [
        (None, False, False, 0),
        (None, False, True, 0),
        (None, True, False, 0),  # an update alone, under an attack that may be a lie
        (None, True, True, 1),
        (False, False, False, 0),  # a report alone, that may have been made to look bad
        (False, False, True, 0),
        (False, True, False, 1),  # both
        (False, True, True, 1),
        (True, False, False, 1),  # a report that nobody can have made to look bad
        (True, False, True, 1),
        (True, True, False, 1),
        (True, True, True, 1),
    ],
)
def test_what_counts_as_evidence(
    suspected: bool | None, named: bool, certified: bool, evidence: float
) -> None:
    reports = {} if suspected is None else {5: suspected}
    found = weigh([3, 5, 8], reports, {5} if named else set(), certified)
    assert found == {3: 0.0, 5: evidence, 8: 0.0}


def test_nothing_is_held_against_those_who_took_no_part() -> None:
    assert weigh([3], {5: True}, [5, 7], True) == {3: 0.0}


# --- reputation -----------------------------------------------------------------------------------

CLIENTS = range(10)


def after(*rounds: set[int], clients: range = CLIENTS, **settings: Any) -> Reputation:
    """Reputation after rounds in which these clients were named."""
    reputation = Reputation(**{"decay": 0.8, "enter": 1.5, "leave": 0.4, **settings})
    for named in rounds:
        reputation.update({client: float(client in named) for client in clients})
    return reputation


def test_once_is_not_enough_and_twice_within_a_few_rounds_is() -> None:
    assert after({4}).quarantined == set()
    assert after({4}, {4}).quarantined == {4}
    assert after({4}, set(), {4}).quarantined == {4}
    late = after({4}, *[set()] * 8, {4})
    assert late.quarantined == set()


def test_it_is_cleared_when_the_evidence_has_faded_and_not_before() -> None:
    rounds: list[set[int]] = [{4}, {4}]
    evidence = 1.8
    while evidence >= 0.4:
        assert after(*rounds).quarantined == {4}
        assert after(*rounds).evidence[4] == pytest.approx(evidence)
        rounds.append(set())
        evidence *= 0.8
    assert len(rounds) > 5
    assert after(*rounds).quarantined == set()
    # What faded does not count again: two more are needed.
    assert after(*rounds, {4}).quarantined == set()
    assert after(*rounds, {4}, {4}).quarantined == {4}


def test_continuing_evidence_keeps_it_for_ever() -> None:
    assert after(*[{4}] * 50).quarantined == {4}
    assert after({4}, {4}, *[set(), set(), {4}] * 20).quarantined == {4}


def test_what_is_known_of_the_absent_stays() -> None:
    reputation = after({4}, {4})
    for _ in range(30):
        reputation.update({client: 0.0 for client in CLIENTS if client != 4})
    assert reputation.quarantined == {4}
    assert reputation.evidence[4] == pytest.approx(1.8)


@given(
    st.lists(
        st.dictionaries(st.integers(0, 12), st.sampled_from([0.0, 1.0, 1.9]), min_size=1),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([0.0, 0.5, 0.85]),
)
def test_reputation_is_a_fading_sum_and_never_leaves_out_half(
    rounds: list[dict[int, float]], decay: float
) -> None:
    reputation = Reputation(decay=decay, enter=1.5, leave=0.4)
    sums: dict[int, float] = {}
    quarantined: set[int] = set()
    for found in rounds:
        reputation.update(found)
        for client, new in found.items():
            sums[client] = decay * sums.get(client, 0.0) + new
        assert reputation.evidence == pytest.approx(sums)

        assert 2 * len(reputation.quarantined) < len(sums)
        due = {c for c in sums if sums[c] >= 1.5 or (c in quarantined and sums[c] >= 0.4)}
        assert reputation.quarantined <= due
        spared = due - reputation.quarantined
        if spared:  # only to keep a majority, and those with the least against them
            assert 2 * (len(reputation.quarantined) + 1) >= len(sums)
            most = max(sums[c] for c in spared)
            assert all(sums[c] >= most for c in reputation.quarantined)
        quarantined = set(reputation.quarantined)


@pytest.mark.parametrize(("clients", "most"), [(1, 0), (2, 0), (3, 1), (4, 1), (9, 4), (10, 4)])
def test_fewer_than_half_are_left_out_even_if_all_are_named(clients: int, most: int) -> None:
    everybody = set(range(clients))
    reputation = after(*[everybody] * 3, clients=range(clients))
    assert reputation.quarantined == set(range(most))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, r"decay must be in \[0, 1\), got -0.1"),
        ({"decay": math.nan}, r"decay must be in \[0, 1\), got nan"),
        ({"leave": 0.0}, r"leave must be in \(0, enter\), got 0.0 and 1.5"),
        ({"leave": 1.5}, r"leave must be in \(0, enter\), got 1.5 and 1.5"),
        ({"enter": 0.3, "leave": 0.4}, r"leave must be in \(0, enter\), got 0.4 and 0.3"),
    ],
)
def test_a_reputation_out_of_range_is_an_error(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reputation(**{"enter": 1.5, "leave": 0.4, **settings})
    Reputation(decay=0.0)
