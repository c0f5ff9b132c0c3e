"""Pooling what clients say about triggers: against loops, and against those who lie about them."""

from __future__ import annotations

import itertools
import math
from statistics import median
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from none_core.activations import TRIGGER_SHIFT, Report, ReportBuilder, ReportSpec, decode_report
from none_core.detection import Detection, Inversion, Standing
from none_core.detection.base import upper_breaks
from none_core.detection.inversion import Summary
from none_core.order_statistics import most_liars

LABELS, TARGET = 5, 2
LAYER_OF = np.repeat([0, 1], [8, 12])
NEURONS = len(LAYER_OF)
PLANTED = [3, 12, 15]
SETTINGS = {"outlier": 3.0, "ratio": 0.6, "spread": 0.15}

Summaries = dict[int, Summary]


def summary(
    size: np.ndarray,
    shift: np.ndarray,
    success: np.ndarray | None = None,
    probed: np.ndarray | None = None,
) -> Summary:
    """As the detector keeps it: NaN where nothing was probed."""
    labels = len(size)
    probed = np.ones(labels, dtype=bool) if probed is None else probed
    success = np.ones(labels) if success is None else success
    blank = np.where(probed, 0.0, np.nan)
    return Summary(
        probed,
        (size + blank).astype(np.float32),
        (success + blank).astype(np.float32),
        (shift + blank[:, None]).astype(np.float32),
    )


def honest(seed: int, *, attacked: bool = True) -> Summary:
    """Ordinary masks are 0.1 to 0.13 large, the attacked class's a tenth of that."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.1, 0.13, size=LABELS)
    shift = rng.uniform(-0.5, 0.5, size=(LABELS, NEURONS))
    if attacked:
        size[TARGET] /= 10
        shift[TARGET, PLANTED] = rng.uniform(4, 6, size=len(PLANTED))
    return summary(size, shift)


def found_by(summaries: Summaries, bound: int | None = None, **settings: float) -> Detection:
    return Inversion(**{**SETTINGS, **settings}).detect(summaries, LAYER_OF, bound)


# --- honest clients -------------------------------------------------------------------------------


def test_an_attacked_class_is_found_with_its_neurons() -> None:
    found = found_by({i: honest(i) for i in range(10)})
    (attack,) = found.attacks
    assert attack.label == TARGET
    assert 0.01 <= attack.size <= 0.013
    assert 0.1 <= attack.usual <= 0.13
    assert attack.strength > 5
    assert attack.certified
    assert found.alive
    assert sorted(found.compromised) == PLANTED
    assert (np.diff(found.scores[found.compromised]) <= 0).all(), "not the worst first"
    assert found.held_back.size == 0
    assert found.standing is not None
    assert np.flatnonzero(found.standing == Standing.CERTIFIED).tolist() == PLANTED
    assert found.suspicions == ()


def test_without_an_outlier_there_is_no_attack() -> None:
    found = found_by({i: honest(i, attacked=False) for i in range(10)})
    assert found.attacks == ()
    assert not found.alive
    assert found.compromised.size == found.held_back.size == 0
    assert not found.scores.any()
    assert sorted(found.shifts) == list(range(LABELS))


def test_a_trigger_that_does_not_work_is_no_attack() -> None:
    summaries = {i: honest(i) for i in range(10)}
    for client in range(6):
        weak = np.ones(LABELS)
        weak[TARGET] = 0.0
        summaries[client] = summaries[client]._replace(success=np.float32(weak))
    assert found_by(summaries).attacks == ()
    summaries[4] = honest(4)  # now it works for five of the ten, more than a minority
    assert [a.label for a in found_by(summaries).attacks] == [TARGET]


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"ratio": 0.05}, []),
        ({"ratio": 0.5}, [TARGET]),
        ({"outlier": 1000.0}, []),
        ({"spread": 2.0}, []),
        ({"spread": 1e-3}, [TARGET]),
    ],
)
def test_every_threshold_counts(settings: dict[str, float], labels: list[int]) -> None:
    found = found_by({i: honest(i) for i in range(10)}, **settings)
    assert [a.label for a in found.attacks] == labels


def test_two_classes_are_too_few_to_tell_an_outlier() -> None:
    def reduced(client: int) -> Summary:
        probed = np.isin(np.arange(LABELS), [TARGET, TARGET + 1])
        full = honest(client)
        return summary(full.size, full.shift, probed=probed)

    found = found_by({i: reduced(i) for i in range(10)}, outlier=0.1)
    assert found.attacks == ()
    assert sorted(found.shifts) == [TARGET, TARGET + 1]


def test_a_single_honest_client_is_enough() -> None:
    found = found_by({3: honest(3)})
    assert [(a.label, a.certified) for a in found.attacks] == [(TARGET, True)]
    assert sorted(found.compromised) == PLANTED


def test_nothing_probed_is_nothing_found() -> None:
    nothing = summary(
        np.zeros(LABELS), np.zeros((LABELS, NEURONS)), probed=np.zeros(LABELS, dtype=bool)
    )
    found = found_by(dict.fromkeys(range(4), nothing))
    assert (found.attacks, found.shifts, found.alive) == ((), {}, False)
    assert not found.scores.any()


# --- against loops --------------------------------------------------------------------------------


def slow_attacks(
    found: list[Summary], bound: int | None
) -> list[tuple[int, float, float, float, bool]]:
    """Label, size, usual size, strength and certificate, number by number."""
    liars = (len(found) - 1) // 2 if bound is None else min(bound, (len(found) - 1) // 2)
    sizes = [
        {k: math.log(max(float(s.size[k]), 1e-4)) for k in range(LABELS) if s.probed[k]}
        for s in found
    ]
    of_class = {k: [own[k] for own in sizes if k in own] for k in range(LABELS)}
    typical = {k: median(values) for k, values in of_class.items() if values}
    if len(typical) < 3:
        return []

    def strength(own: dict[int, float], k: int) -> float:
        if len(own) < 3:
            return -math.inf
        centre = median(own.values())
        deviation = 1.4826 * median(abs(x - centre) for x in own.values())
        return (centre - own[k]) / max(deviation, SETTINGS["spread"])

    attacks = []
    for k in typical:
        witnesses, strengths = 0, []
        for own, s in zip(sizes, found, strict=True):
            if k not in own:
                continue
            small = own[k] - median(own.values()) <= math.log(SETTINGS["ratio"])
            strengths.append(strength(own, k))
            witnesses += strengths[-1] >= SETTINGS["outlier"] and small and s.success[k] > 0.5
        if witnesses <= (len(strengths) - 1) // 2:
            continue
        size, usual = math.exp(typical[k]), math.exp(median(typical.values()))
        attacks.append((k, size, usual, median(strengths), len(strengths) > 2 * liars))
    return attacks


@st.composite
def anything(draw: st.DrawFn) -> Summaries:
    """Clients that probed some classes and agree more or less on how small their masks are."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    clients, noise = draw(st.integers(1, 7)), draw(st.sampled_from([0.01, 0.2, 1.0]))
    often = draw(st.sampled_from([0.3, 0.8, 1.0]))
    usual = rng.choice([0.003, 0.02, 0.1, 0.12, 0.3], size=LABELS)
    return {
        int(client): summary(
            np.minimum(usual * np.exp(noise * rng.normal(size=LABELS)), 1),
            rng.normal(size=(LABELS, NEURONS)) + 5 * (rng.random((LABELS, NEURONS)) < 0.1),
            rng.choice([0.2, 0.9, 1.0], size=LABELS, p=[0.1, 0.2, 0.7]),
            rng.random(LABELS) < often,
        )
        for client in rng.permutation(100)[:clients]
    }


@settings(max_examples=200)
@given(anything(), st.none() | st.integers(0, 6))
def test_pooling_equals_a_slow_reference(summaries: Summaries, bound: int | None) -> None:
    found, clients = found_by(summaries, bound), list(summaries.values())

    expected = slow_attacks(clients, bound)
    assert [(a.label, a.certified) for a in found.attacks] == [(a[0], a[-1]) for a in expected]
    for attack, (_, size, usual, strength, _) in zip(found.attacks, expected, strict=True):
        assert attack.size == pytest.approx(size)
        assert attack.usual == pytest.approx(usual)
        assert attack.strength == pytest.approx(strength)
    assert found.alive == bool(expected)

    for k in range(LABELS):
        shifts = [s.shift[k] for s in clients if s.probed[k]]
        assert (k in found.shifts) == bool(shifts)
        for j in range(NEURONS if shifts else 0):
            assert found.shifts[k][j] == pytest.approx(median(float(s[j]) for s in shifts))
    attacked = [found.shifts[k] for k, *_ in expected]
    scores = [max([0.0, *(s[j] for s in attacked)]) for j in range(NEURONS)]
    np.testing.assert_array_equal(found.scores, scores)
    chosen = upper_breaks(np.array(scores), LAYER_OF).tolist()
    assert sorted([*found.compromised, *found.held_back]) == sorted(chosen)

    # A neuron is certified if under a certified attack f liars could not have lifted it so high.
    liars = most_liars(len(clients), bound)
    assert found.standing is not None
    for j in range(NEURONS):
        mine = [scores[i] for i in chosen if LAYER_OF[i] == LAYER_OF[j]]
        certified = any(
            sure
            and sorted((s.shift[k][j] for s in clients if s.probed[k]), reverse=True)[liars]
            >= min(mine, default=math.inf)
            for k, *_, sure in expected
        )
        assert (found.standing[j] == Standing.CERTIFIED) == certified
        assert (j in found.compromised) == (j in chosen and certified)


@given(anything(), st.randoms(use_true_random=False))
def test_neither_names_nor_order_of_the_clients_matter(summaries: Summaries, random: Any) -> None:
    names = random.sample(range(1000), len(summaries))
    shuffled = dict(zip(names, random.sample(list(summaries.values()), len(names)), strict=True))
    one, other = found_by(summaries), found_by(shuffled)
    assert one.attacks == other.attacks
    assert one.scores.tobytes() == other.scores.tobytes()
    assert one.compromised.tolist() == other.compromised.tolist()
    assert one.held_back.tolist() == other.held_back.tolist()


@pytest.mark.parametrize("bound", [4, 5, 9, 100])
def test_a_bound_beyond_any_minority_changes_nothing(bound: int) -> None:
    summaries = {i: honest(i) for i in range(6)} | {i: honest(i, attacked=False) for i in (6, 7, 8)}
    summaries[9] = honest(9)
    one, other = found_by(summaries), found_by(summaries, bound)
    assert one.attacks == other.attacks
    assert one.attacks
    assert one.standing is not None
    assert other.standing is not None
    assert (one.standing == other.standing).all()


# --- classes that only some have probed -----------------------------------------------------------


def some_probed(client: int, label: int, whether: bool) -> Summary:
    full = honest(client)
    probed = np.ones(LABELS, dtype=bool)
    probed[label] = whether
    return summary(full.size, full.shift, probed=probed)


@pytest.mark.parametrize(("holders", "certified"), [(8, False), (9, True)])
def test_an_attack_is_certified_only_by_more_than_twice_as_many_as_may_lie(
    holders: int, certified: bool
) -> None:
    found = found_by({i: some_probed(i, TARGET, i < holders) for i in range(10)})
    assert [(a.label, a.certified) for a in found.attacks] == [(TARGET, certified)]
    assert sorted(found.compromised if certified else found.held_back) == PLANTED
    assert not (found.held_back if certified else found.compromised).size


def test_neurons_of_a_contested_attack_are_held_back_beside_those_of_a_certified_one() -> None:
    other, its_neurons = 4, [0, 19]
    summaries = {}
    for i in range(10):
        full = honest(i)
        size, shift = full.size.copy(), full.shift.copy()
        size[other] /= 10
        shift[other, its_neurons] = 5
        probed = np.ones(LABELS, dtype=bool)
        probed[other] = i < 6
        summaries[i] = summary(size, shift, probed=probed)
    found = found_by(summaries)
    assert [(a.label, a.certified) for a in found.attacks] == [(TARGET, True), (other, False)]
    assert sorted(found.compromised) == PLANTED
    assert sorted(found.held_back) == its_neurons


def test_a_class_that_one_client_alone_has_probed_does_not_disturb_the_others() -> None:
    found = found_by({i: some_probed(i, 0, i == 4) for i in range(10)})
    assert [(a.label, a.certified) for a in found.attacks] == [(TARGET, True)]
    np.testing.assert_array_equal(found.shifts[0], honest(4).shift[0])


# --- liars ----------------------------------------------------------------------------------------

EXTREMES = st.sampled_from([0.0, 1e-6, 0.002, 0.012, 0.1, 0.115, 0.3, 1.0])


@st.composite
def lies(draw: st.DrawFn) -> Summary:
    """Hide the attacked class, or frame another and its neurons, or say just anything."""
    kind = draw(st.sampled_from(["hide", "frame", "anything"]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    size, shift = np.full(LABELS, draw(EXTREMES)), np.zeros((LABELS, NEURONS))
    if kind == "anything":
        size = np.array(draw(st.lists(EXTREMES, min_size=LABELS, max_size=LABELS)))
        shift = rng.choice([-1000.0, -5.0, 0.0, 5.0, 1000.0], size=shift.shape)
    else:
        size[TARGET] = 1.0
    if kind == "frame":
        framed = draw(st.integers(0, LABELS - 1))
        size[framed] = 0.0
        shift[framed, rng.permutation(NEURONS)[:6]] = 1000.0
    success = np.array([1.0, 1.0, 0.0])[rng.integers(3, size=LABELS)]
    probed = rng.random(LABELS) < draw(st.sampled_from([0.5, 1.0, 1.0]))
    return summary(size, shift, success, probed)


@st.composite
def crowds(draw: st.DrawFn, liars: int) -> Summaries:
    """Ten clients, any so many of which lie."""
    lying = draw(st.permutations(range(10)))[:liars]
    return {i: draw(lies()) if i in lying else honest(i) for i in range(10)}


@given(crowds(4))
def test_four_liars_of_ten_neither_hide_an_attack_nor_frame_anything(summaries: Summaries) -> None:
    found = found_by(summaries)
    assert [attack.label for attack in found.attacks] == [TARGET]
    assert sorted([*found.compromised, *found.held_back]) == PLANTED


@given(crowds(3))
def test_three_liars_of_ten_cannot_even_contest_it(summaries: Summaries) -> None:
    everywhere = {
        i: s._replace(probed=np.ones(LABELS, dtype=bool), size=np.nan_to_num(s.size))
        for i, s in summaries.items()
    }
    whole = {
        i: s._replace(shift=np.nan_to_num(s.shift), success=np.nan_to_num(s.success))
        for i, s in everywhere.items()
    }
    found = found_by(whole, bound=3)
    assert [(attack.label, attack.certified) for attack in found.attacks] == [(TARGET, True)]
    assert sorted(found.compromised) == PLANTED


@given(st.permutations(range(10)), st.lists(lies(), min_size=4, max_size=4))
def test_nobody_can_be_framed_where_nothing_is_attacked(
    order: list[int], told: list[Summary]
) -> None:
    summaries = {i: honest(i, attacked=False) for i in range(10)}
    summaries |= dict(zip(order[:4], told, strict=True))
    found = found_by(summaries)
    assert found.attacks == ()
    assert found.compromised.size == found.held_back.size == 0


@pytest.mark.parametrize(("witnesses", "seen"), [(3, [TARGET]), (2, [])])
def test_an_attack_is_seen_by_more_clients_than_any_minority_has(
    witnesses: int, seen: list[int]
) -> None:
    """Those who do not see it say that all other masks are tiny, which changes nothing."""
    sizes = np.full((5, LABELS), 1e-3)
    sizes[:, TARGET] = 0.5
    sizes[:witnesses] = 0.1
    sizes[:witnesses, TARGET] = 0.01
    shift = np.zeros((LABELS, NEURONS))
    found = found_by({i: summary(row, shift) for i, row in enumerate(sizes)})
    assert [a.label for a in found.attacks] == seen
    assert all(a.certified for a in found.attacks)


ORDINARY = 0.4  # range of the logarithms of ordinary sizes: below outlier times spread


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clients", [3, 5])
def test_no_lie_makes_an_ordinary_class_certified(clients: int, seed: int) -> None:
    """All that a minority may say about the sizes is tried; the thresholds are laxer than usual."""
    labels, liars = 3, (clients - 1) // 2
    rng = np.random.default_rng(seed)
    sizes = 0.1 * np.exp(rng.uniform(0, ORDINARY, size=(clients - liars, labels)))
    detector = Inversion(outlier=3.0, ratio=0.99, spread=0.15)
    shift = np.zeros((labels, NEURONS))
    told = [1e-4, 0.095, 0.12, 1.0]
    of_class = list(itertools.combinations_with_replacement(told, liars))
    for columns in itertools.product(of_class, repeat=labels):
        rows = [*sizes, *np.array(columns).T]
        summaries = {i: summary(row, shift) for i, row in enumerate(rows)}
        found = detector.detect(summaries, LAYER_OF)
        assert found.attacks == ()


SOME_SIZES = st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.11, 0.2])


@settings(max_examples=300)
@given(
    st.lists(st.lists(SOME_SIZES, min_size=4, max_size=4), min_size=3, max_size=3),
    st.lists(st.lists(EXTREMES, min_size=4, max_size=4), min_size=2, max_size=2),
    st.integers(0, 3),
)
def test_certified_means_that_an_honest_client_would_say_so_alone(
    truth: list[list[float]], told: list[list[float]], small: int
) -> None:
    for row in truth[1:]:
        row[small] /= 10
    shift = np.zeros((4, NEURONS))
    summaries = {i: summary(np.array(row), shift) for i, row in enumerate(truth + told)}
    alone = [{a.label for a in found_by({0: summaries[i]}).attacks} for i in range(len(truth))]
    for attack in found_by(summaries).attacks:
        assert not attack.certified or any(attack.label in labels for labels in alone)


def test_a_class_that_is_small_for_all_the_honest_is_certified_whatever_else_is_said() -> None:
    """The control of the test above: certificates are to be had."""
    sizes = np.array([[0.1, 0.11, 0.01], [0.12, 0.1, 0.012], [0.11, 0.13, 0.011]])
    shift = np.zeros((3, NEURONS))
    certified = 0
    for lie in itertools.product([1e-4, 0.12, 1.0], repeat=3):
        rows = [*sizes, np.array(lie)]
        found = found_by({i: summary(row, shift) for i, row in enumerate(rows)})
        assert [attack.label for attack in found.attacks] == [2]
        certified += found.attacks[0].certified
    assert certified == 27


# --- summaries and settings -----------------------------------------------------------------------


def test_a_summary_is_what_was_found_on_average() -> None:
    spec = ReportSpec(NEURONS, LABELS, frozenset({TRIGGER_SHIFT}))
    arrays = ReportBuilder(spec).report().arrays
    arrays["predictions"][0, 0] = 3
    arrays["probes"][1] = 4
    arrays["mask_size"][1], arrays["mask_success"][1] = 1.0, 3.0
    arrays["shift"][1] = 6.0
    sent = Report(spec, arrays).encode()
    report = decode_report(sent, spec, sender="x", max_samples=3)
    kept = Inversion().summarise(report)
    assert kept.probed.tolist() == [False, True, False, False, False]
    assert (kept.size[1], kept.success[1]) == (0.25, 0.75)
    assert (kept.shift[1] == 1.5).all()
    assert np.isnan(kept.size[[0, 2, 3, 4]]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outlier": 0.0}, "outlier must be > 0, got 0.0"),
        ({"outlier": math.nan}, "outlier must be > 0, got nan"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\), got 0.0"),
        ({"ratio": 1.0}, r"ratio must be in \(0, 1\), got 1.0"),
        ({"spread": 0.0}, "spread must be > 0, got 0.0"),
        ({"spread": -1.0}, "spread must be > 0, got -1.0"),
    ],
)
def test_thresholds_out_of_range_are_errors(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inversion(**settings)
