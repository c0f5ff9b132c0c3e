"""Whether the samples of one label are two kinds: the label's own, and others that were put there.

Wang et al. (NeurIPS 2022, Algorithm 1) separate the values of one neuron in two groups, by Otsu's
or Jenks's criterion, which for two groups is the same. Here many neurons are read at once: samples
that were poisoned alike move the same neurons the same way, so the mean over these is far clearer
than any of them.

The threshold of two groups of unequal size is that of Kittler and Illingworth ("Minimum error
thresholding", Pattern Recognition 1986) beside Otsu's ("A threshold selection method from
gray-level histograms", IEEE SMC 1979), which finds a few among many badly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from none_core.detection.base import MAD_TO_SIGMA, FloatArray, IntArray
from none_core.purification import SampleFilter

FEWEST = 4  # samples of either group: of fewer there is no spread to speak of
_NEURONS = 30  # by which the groups are told apart
_STARTS = (0.02, 0.05, 0.1, 0.3)  # shares of the samples that are taken for the others at first
_PASSES = 5
_FAR = 5.0  # deviations beyond which a neuron's value says no more
_FAINT = 0.25  # of a neuron's typical deviation: no less counts as one
_CHANCE = 6.0  # strength that one kind of samples reaches in a single one; less in more of them
_RATIO = 0.2  # logarithm of a ratio of variances from which on a group varies more ...
_BEYOND = 0.1  # ... and what it must be more than that of any other label
_MOTLEY = 3.0  # times the odds of the smaller group and of most labels, of a larger foreign group
_MOST = 0.9  # of the labels
_NEARLY = 0.01  # of the possible labels: so many fewer are as good as all
_ENOUGH = 10  # samples, to tell either
_EVEN = 0.475  # share of the smaller group from which on it says nothing that it is the smaller one

Values = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Split:
    """Two groups of samples, and what tells them apart.

    Attributes
    ----------
    apart : ndarray of bool
        Samples of the group that does not belong to the label, (n,): of the smaller one, unless the
        larger varies clearly more, or resembles clearly more other labels, than it does and than
        labels usually do. What is put under one label from several classes may well be more than
        the label's own.
    strength : float
        Distance of the groups' medians on the mean of the neurons below, in multiples of the
        groups' own deviation, less what a group of so few has by chance. Samples of one kind reach
        some 2 to 5, since what is measured is the best split of many. 0 where nothing tells which
        of two groups of nearly the same size is the label's own.
    neurons : ndarray of int64
        Those that tell the groups apart best, (m,), the best first.
    sign, mean, deviation : ndarray of float32
        Which way that group differs by each of them, and the mean from which that is counted; (m,).
    threshold : float
        Mean over the neurons of ``sign * (value - mean) / deviation`` above which a sample is
        apart.
    shift : ndarray
        How far the groups' means are apart by every neuron, in deviations, (J,).
    """

    apart: NDArray[np.bool_]
    strength: float
    neurons: IntArray
    sign: Values
    mean: Values
    deviation: Values
    threshold: float
    shift: FloatArray


@dataclass(frozen=True, eq=False)
class Usual:
    """What the samples of a label are like that nobody tampered with, as far as the others tell.

    Attributes
    ----------
    typical : ndarray
        Each neuron's deviation within the median label, (J,), >= 0.
    diversity : float
        The `diversity` that the other labels keep within.
    variety : float
        The `variety` that most other labels keep within; see `usual_variety`.
    possible : int
        How many other labels there are, >= 1.
    """

    typical: FloatArray
    diversity: float = 0.0
    variety: float = 1.0
    possible: int = 1


def diversity(values: Values, typical: FloatArray) -> float:
    """Say how much samples vary: by the median neuron, as a logarithm, 0 for the median label.

    Parameters
    ----------
    values : ndarray of float32
        Values of the neurons, (n, J).
    typical : ndarray
        Each neuron's deviation within the median label, (J,), >= 0.
    """
    floor = np.square(_FAINT * typical + 1e-6)
    return float(np.median(np.log((values.var(0) + floor) / (np.square(typical) + floor))))


def variety(labels: IntArray, possible: int) -> float:
    """Say over how many of the possible labels samples spread.

    That many labels, equally frequent, would have two samples share theirs as often: the Hill
    number of order 2, with the unbiased estimate of Simpson, "Measurement of diversity" (Nature
    1949), so that few samples and many can be compared.

    Parameters
    ----------
    labels : ndarray of int64
        One for each of at least two samples, >= 0, (n,).
    possible : int
        How many there can be, >= 1.

    Returns
    -------
    float
        From 1, of one label, to ``possible``.
    """
    number, counts = len(labels), np.bincount(labels)
    pairs = number * (number - 1)
    return min(float(possible), float(pairs / max(1, (counts * (counts - 1)).sum())))


def usual_variety(others: Sequence[IntArray], possible: int) -> float:
    """Return the `variety` that most labels keep within: nine in ten of those with enough samples.

    Parameters
    ----------
    others : sequence of ndarray of int64
        For each label, what its samples would be given otherwise.
    possible : int
    """
    found = [variety(each, possible) for each in others if len(each) >= _ENOUGH]
    return float(np.quantile(found or [1.0], _MOST))


def _odds(spread: float, possible: int) -> float:
    """Put a variety on a scale on which the last label counts as much as the first."""
    return spread / max(possible - spread, _NEARLY * possible)


def separate(values: Values, usual: Usual, otherwise: IntArray | None = None) -> Split | None:
    """Find the two groups of one label's samples that stand apart most.

    The samples farthest from their median are taken for one group; the neurons by which it
    differs most give every sample a score, a threshold on the scores gives the groups anew, and so
    on until they stay the same. That from several sizes, and by two criteria; the strongest counts.

    Parameters
    ----------
    values : ndarray of float32
        Values of the neurons, (n, J).
    usual : Usual
        Of the same neurons.
    otherwise : ndarray of int64, optional
        The label that the network would give each sample if it could not give it this one, (n,).

    Returns
    -------
    Split or None
        None if there are no two groups of at least four samples.
    """
    if len(values) < 2 * FEWEST:
        return None
    floor = _FAINT * usual.typical + 1e-6
    centre = np.median(values, axis=0)
    deviation = np.maximum(MAD_TO_SIGMA * np.median(np.abs(values - centre), axis=0), floor)
    far = np.minimum(np.square((values - centre) / deviation), _FAR**2).mean(1)
    farthest = np.argsort(-far, kind="stable")
    found = [
        split
        for share in _STARTS
        for threshold in (_otsu, _minimum_error)
        for split in _settled(
            values, farthest[: max(FEWEST, int(share * len(far)))], floor, threshold
        )
    ]
    best = max(found, key=lambda split: split.strength, default=None)
    if best is None:
        return None
    if 2 * best.apart.sum() > len(values):
        best = _turned(best)
    if best.apart.sum() < _ENOUGH:
        return best
    if _is_motley(values, otherwise, ~best.apart, usual):
        return _turned(best)
    if best.apart.mean() > _EVEN and not _is_motley(values, otherwise, best.apart, usual):
        return replace(best, strength=0.0)
    return best


def _is_motley(
    values: Values, otherwise: IntArray | None, group: NDArray[np.bool_], usual: Usual
) -> bool:
    """Whether a group looks as if it were gathered from several classes, and the rest does not."""
    return _varies_more(values, group, usual) or (
        otherwise is not None and _resembles_more(otherwise, group, usual)
    )


def _varies_more(values: Values, group: NDArray[np.bool_], usual: Usual) -> bool:
    """Whether a group varies clearly more than the rest, and than any label does."""
    floor = np.square(_FAINT * usual.typical + 1e-6)
    one, other = (np.log(values[part].var(0) + floor) for part in (group, ~group))
    most = max(_RATIO, usual.diversity + _BEYOND)
    return bool(np.median(one - other) > _RATIO) and diversity(values[group], usual.typical) > most


def _resembles_more(otherwise: IntArray, group: NDArray[np.bool_], usual: Usual) -> bool:
    """Whether a group would be given clearly more labels than the rest, and than most labels."""
    rest = max(usual.variety, variety(otherwise[~group], usual.possible))
    found = variety(otherwise[group], usual.possible)
    return _odds(found, usual.possible) > _MOTLEY * _odds(rest, usual.possible)


def _turned(split: Split) -> Split:
    """Take the other group for the one that is apart."""
    return replace(
        split,
        apart=~split.apart,
        sign=-split.sign,
        threshold=float(np.nextafter(np.float32(-split.threshold), np.float32(-np.inf))),
        shift=-split.shift,
    )


def as_filter(splits: Mapping[int, Split]) -> SampleFilter:
    """Make the filter that flags the group that is apart of each label, by label."""
    labels = sorted(splits)
    found = [splits[k] for k in labels]
    number = len(found[0].neurons) if found else 0

    def rows(arrays: Sequence[NDArray[Any]], kind: type) -> NDArray[Any]:
        return np.array(arrays, dtype=kind).reshape(len(labels), number)

    return SampleFilter(
        labels=np.array(labels, dtype=np.int64),
        neurons=rows([split.neurons for split in found], np.int64),
        sign=rows([split.sign for split in found], np.float32),
        mean=rows([split.mean for split in found], np.float32),
        deviation=rows([split.deviation for split in found], np.float32),
        threshold=np.array([split.threshold for split in found], dtype=np.float32),
    )


def _settled(
    values: Values, start: IntArray, floor: FloatArray, threshold: Callable[[FloatArray], float]
) -> Iterator[Split]:
    """Yield the two groups that a start leads to, if it leads to any."""
    apart = np.zeros(len(values), dtype=bool)
    apart[start] = True
    for _ in range(_PASSES):
        split = _resplit(values, apart, floor, threshold)
        if not FEWEST <= split.apart.sum() <= len(values) - FEWEST:
            return
        if (split.apart == apart).all():
            break
        apart = split.apart
    yield split


def _resplit(
    values: Values,
    apart: NDArray[np.bool_],
    floor: FloatArray,
    threshold: Callable[[FloatArray], float],
) -> Split:
    """Score the samples by what tells two groups apart, and cut the scores in two."""
    few, many = values[apart], values[~apart]
    mean = many.mean(0)
    deviation = np.sqrt((few.var(0) + many.var(0)) / 2 + np.square(floor))
    shift = (few.mean(0) - mean) / deviation
    neurons = np.argsort(-np.abs(shift), kind="stable")[:_NEURONS]
    sign = np.sign(shift[neurons])
    scores = (sign * (values[:, neurons] - mean[neurons]) / deviation[neurons]).mean(1)
    cut = threshold(np.sort(scores))
    above = scores > cut
    return Split(
        apart=above,
        strength=_strength(scores, above),
        neurons=neurons,
        sign=sign.astype(np.float32),
        mean=mean[neurons].astype(np.float32),
        deviation=deviation[neurons].astype(np.float32),
        threshold=cut,
        shift=shift,
    )


def _strength(scores: FloatArray, above: NDArray[np.bool_]) -> float:
    if not 0 < above.sum() < len(above):
        return 0.0
    few, many = scores[above], scores[~above]
    within = np.sqrt((few.var() + many.var()) / 2)
    distance = (np.median(few) - np.median(many)) / max(within, 1e-9)
    return float(distance - _CHANCE / np.sqrt(min(len(few), len(many))))


def _moments(ordered: FloatArray, lower: IntArray) -> tuple[FloatArray, ...]:
    """Mean and variance of the lowest so many scores, and of the rest."""
    number = len(ordered)
    ordered = ordered.astype(np.float64)
    sums, squares = np.cumsum(ordered), np.cumsum(np.square(ordered))
    first, second = sums[lower - 1] / lower, squares[lower - 1] / lower
    upper = number - lower
    third, fourth = (sums[-1] - sums[lower - 1]) / upper, (squares[-1] - squares[lower - 1]) / upper
    return first, second - first**2, third, fourth - third**2


def _otsu(ordered: FloatArray) -> float:
    """Cut where the groups' means are farthest apart, weighed by their sizes; ascending scores."""
    lower = np.arange(1, len(ordered))
    mean, _, other, _ = _moments(ordered, lower)
    return _between(ordered, lower[np.argmax(lower * (len(ordered) - lower) * (other - mean) ** 2)])


def _minimum_error(ordered: FloatArray) -> float:
    """Cut where two normal distributions of unequal width and size fit best; ascending scores."""
    lower = np.arange(FEWEST, len(ordered) - FEWEST + 1)
    share = lower / len(ordered)
    _, variance, _, other = _moments(ordered, lower)
    variance, other = np.maximum(variance, 1e-9), np.maximum(other, 1e-9)
    entropy = share * np.log(share) + (1 - share) * np.log(1 - share)
    misfit = share * np.log(variance) + (1 - share) * np.log(other) - 2 * entropy
    return _between(ordered, lower[np.argmin(misfit)])


def _between(ordered: FloatArray, lower: int) -> float:
    return float((ordered[lower - 1] + ordered[lower]) / 2)
