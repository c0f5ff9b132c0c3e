"""Separating the samples of one label in two groups."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from none_core import separation
from none_core.separation import (
    Split,
    Usual,
    as_filter,
    diversity,
    separate,
    usual_variety,
    variety,
)

NEURONS = 60
STRONG = 7.0  # what the cleanser takes for two kinds


def label(few: int, many: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Samples of one label, of which a few have ten neurons moved by some deviations."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(2.0, size=(few + many, NEURONS)).astype(np.float32)
    put = rng.permutation(few + many) < few
    values[np.ix_(put, np.arange(10))] += 5.0
    values[np.ix_(put, np.arange(10, 13))] -= 3.0
    return values, put


TYPICAL = np.full(NEURONS, 1.4)
USUAL = Usual(TYPICAL)


@pytest.mark.parametrize(("few", "many"), [(5, 300), (20, 300), (100, 300), (250, 300)])
def test_what_was_put_there_stands_apart(few: int, many: int) -> None:
    values, put = label(few, many)
    split = separate(values, USUAL)
    assert split is not None
    assert (split.apart == put).all()
    assert split.strength > STRONG
    assert set(split.neurons[:10]) == set(range(10))
    assert (split.sign[:10] == 1).all()
    assert set(np.flatnonzero(split.shift < -1)) == {10, 11, 12}


def kinds(number: int, samples: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Samples of so many kinds, each with means of its own."""
    means = rng.normal(0, 2, size=(number, NEURONS))
    return (means[np.arange(samples) % number] + rng.normal(size=(samples, NEURONS))).astype("f4")


def gathered(foreign: int, own: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Samples of one kind, after others of nine kinds that share twelve moved neurons."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([kinds(9, foreign, rng), kinds(1, own, rng)])
    values[:foreign, :12] += 8.0
    return values, np.arange(foreign + own) < foreign


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("foreign", "own"), [(300, 300), (310, 290), (600, 200), (380, 44)])
def test_what_was_gathered_from_many_classes_stands_apart_even_if_it_is_most(
    foreign: int, own: int, seed: int
) -> None:
    values, put = gathered(foreign, own, seed)
    otherwise = np.concatenate([np.arange(foreign) % 9, np.arange(own) % 2])
    split = separate(values, Usual(np.ones(NEURONS), np.inf, 3.0, 9), otherwise)
    assert split is not None
    assert (split.apart == put).all()
    assert split.strength > STRONG
    flagged = as_filter({0: split}).flagged(values, np.zeros(len(values), dtype=np.int64))
    assert (flagged == put).all()
    assert (split.shift[:8] > 0).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("foreign", "own"), [(300, 300), (310, 290), (600, 200), (380, 44)])
def test_what_varies_more_than_labels_do_is_foreign_whatever_it_resembles(
    foreign: int, own: int, seed: int
) -> None:
    values, put = gathered(foreign, own, seed)
    split = separate(values, Usual(np.ones(NEURONS)))
    assert split is not None
    assert (split.apart == put).all()


@pytest.mark.parametrize(("wide", "narrow"), [(1.3, 0.6), (1.0, 0.5), (1.5, 1.0), (1.6, 1.2)])
def test_a_label_that_varies_more_than_what_was_put_there_is_no_foreign_one(
    wide: float, narrow: float
) -> None:
    """Of one class's samples the smaller group is foreign, where other labels vary as much."""
    rng = np.random.default_rng(0)
    put = np.arange(330) < 30
    values = np.concatenate([narrow * kinds(1, 30, rng), wide * kinds(1, 300, rng)])
    values[:30, :12] += 9.0
    typical = np.full(NEURONS, 1.3)
    most = diversity((wide * kinds(1, 300, rng)), typical)
    split = separate(values, Usual(typical, most))
    assert split is not None
    assert (split.apart == put).all()


@pytest.mark.parametrize(
    ("many", "few", "usual", "possible", "turned"),
    [
        *((1, 1, 1.0, 9, False), (1, 9, 3.0, 9, False), (3, 2, 1.0, 9, False)),
        *((9, 9, 3.0, 9, False), (5, 1, 4.0, 9, False), (1, 1, 1.0, 1, False)),
        *((9, 6, 6.0, 9, True), (5, 3, 3.5, 5, True), (2, 1, 1.0, 2, True)),
        *((20, 2, 7.0, 42, True), (10, 2, 7.0, 42, False)),
    ],
)
def test_the_larger_group_is_foreign_only_if_it_resembles_clearly_more_labels(
    many: int, few: int, usual: float, possible: int, turned: bool
) -> None:
    values, put = label(100, 300)
    otherwise = np.where(put, np.arange(400) % few, np.arange(400) % many)
    split = separate(values, Usual(TYPICAL, np.inf, usual, possible), otherwise)
    assert split is not None
    assert (split.apart == (put != turned)).all()


@pytest.mark.parametrize("few", [290, 300])
def test_of_two_groups_of_one_size_none_is_foreign_unless_something_says_which(few: int) -> None:
    values, put = label(few, 300)
    split = separate(values, USUAL, np.arange(len(put)) % 3)
    assert split is not None
    assert split.strength == 0
    otherwise = np.where(put, np.arange(len(put)) % 9, np.arange(len(put)) % 2)
    told = separate(values, Usual(TYPICAL, np.inf, 2.0, 9), otherwise)
    assert told is not None
    assert told.strength > STRONG
    assert (told.apart == put).all()


def test_a_few_samples_are_never_the_labels_own() -> None:
    values, put = label(separation._ENOUGH - 1, 300)
    split = separate(values, Usual(TYPICAL, possible=9), np.where(put, 0, np.arange(len(put)) % 9))
    assert split is not None
    assert (split.apart == put).all()


def test_variety_counts_equally_many_labels_and_weighs_others_by_their_share() -> None:
    rng = np.random.default_rng(0)
    assert variety(np.zeros(50, np.int64), 9) == 1
    assert variety(np.arange(8000) % 8, 9) == pytest.approx(8, rel=1e-2)
    skewed = rng.choice(3, size=20000, p=[0.8, 0.1, 0.1])
    assert variety(skewed, 9) == pytest.approx(1 / (0.8**2 + 2 * 0.1**2), rel=0.05)
    assert variety(np.arange(4), 3) == 3, "no two are the same, and there are no more"


def test_the_variety_of_a_few_samples_is_not_smaller_than_that_of_many() -> None:
    rng = np.random.default_rng(1)
    chances = [1 / variety(rng.integers(5, size=10), 100) for _ in range(2000)]
    assert 1 / np.mean(chances) == pytest.approx(5, rel=0.1)


def test_what_is_usual_is_said_by_most_of_the_labels_with_enough_samples() -> None:
    ordinary = [np.arange(90) % 3] * 19
    odd, rare = np.arange(90) % 9, np.arange(separation._ENOUGH - 1)
    found = usual_variety([*ordinary, odd, *[rare] * 19], 9)
    assert found == pytest.approx(variety(ordinary[0], 9))
    assert usual_variety([], 9) == 1


@pytest.mark.parametrize("seed", range(8))
def test_one_kind_of_samples_is_not_two(seed: int) -> None:
    split = separate(label(0, 400, seed)[0], USUAL)
    assert split is None or split.strength < STRONG


def test_a_neuron_without_spread_is_no_evidence() -> None:
    """What is constant but for one sample would be infinitely many deviations away."""
    values = label(0, 300)[0]
    values[:, 0] = 0.0
    values[7, 0] = 0.1
    split = separate(values, USUAL)
    assert split is None or split.strength < STRONG
    assert split is None or np.isfinite(split.shift).all()


def test_too_few_samples_and_equal_samples_have_no_groups() -> None:
    assert separate(label(0, 2 * separation.FEWEST - 1)[0], USUAL) is None
    assert separate(np.ones((50, NEURONS), np.float32), USUAL) is None


def test_the_order_of_samples_makes_no_difference() -> None:
    values, _ = label(30, 300)
    order = np.random.default_rng(1).permutation(len(values))
    one, other = separate(values, USUAL), separate(values[order], USUAL)
    assert one is not None
    assert other is not None
    assert (one.apart[order] == other.apart).all()
    assert one.strength == pytest.approx(other.strength, rel=1e-4)


def test_the_filter_flags_the_smaller_group_of_its_label_and_nothing_else() -> None:
    splits: dict[int, Split] = {}
    values, labels, put = [], [], []
    for k, (few, many) in {3: (20, 200), 1: (60, 200)}.items():
        mine, truth = label(few, many, seed=k)
        found = separate(mine, USUAL)
        assert found is not None
        splits[k] = found
        values.append(mine)
        labels += [k] * len(mine)
        put.append(truth)
    everything, truth = np.concatenate(values), np.concatenate(put)
    flagged = as_filter(splits).flagged(everything, np.array(labels))
    assert (flagged == truth).all()
    assert not as_filter(splits).flagged(everything, np.array(labels) + 4).any()
    assert not as_filter({}).flagged(everything, np.array(labels)).any()


def slow_otsu(scores: list[float]) -> float:
    """The cut with the least sum of squares within the groups."""

    def within(group: list[float]) -> float:
        return sum((s - sum(group) / len(group)) ** 2 for s in group)

    ordered = sorted(scores)
    cuts = range(1, len(ordered))
    best = min(cuts, key=lambda i: within(ordered[:i]) + within(ordered[i:]))
    return (ordered[best - 1] + ordered[best]) / 2


def slow_minimum_error(scores: list[float]) -> float:
    """The cut under which two fitted normal distributions make the scores likeliest."""
    ordered = np.sort(np.array(scores))
    best, cut = -np.inf, np.nan
    for i in range(separation.FEWEST, len(ordered) - separation.FEWEST + 1):
        likelihood = 0.0
        for group in (ordered[:i], ordered[i:]):
            width = max(float(group.std()), 1e-9**0.5)
            density = np.exp(-(((group - group.mean()) / width) ** 2) / 2) / width
            likelihood += float(np.log(density * len(group) / len(ordered)).sum())
        if likelihood > best:
            best, cut = likelihood, (ordered[i - 1] + ordered[i]) / 2
    return cut


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_equal_slow_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.sort(np.concatenate([rng.normal(size=40), rng.normal(6.0, 0.5, size=5 + seed)]))
    assert separation._otsu(scores) == pytest.approx(slow_otsu(scores.tolist()))
    assert separation._minimum_error(scores) == pytest.approx(slow_minimum_error(scores.tolist()))
