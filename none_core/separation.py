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
_MOTLEY = 1.5  # times the variety of the smaller group and of most labels: a larger foreign one's
_ENOUGH = 10  # samples of the smaller group, to tell its variety


Values = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Split:
    """Two groups of samples, and what tells them apart.

    Attributes
    ----------
    apart : ndarray of bool
        Samples of the group that does not belong to the label, (n,): of the smaller one, unless the
        larger resembles clearly more other labels than it does, and than labels usually do. What is
        put under one label from several classes does, and may well be more than the label's own.
    strength : float
        Distance of the groups' medians on the mean of the neurons below, in multiples of the
        groups' own deviation, less what a group of so few has by chance. Samples of one kind reach
        some 2 to 5, since what is measured is the best split of many.
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


def variety(labels: IntArray) -> float:
    """Say how many labels samples spread over: one over the chance that two of them share theirs.

    The Hill number of order 2, with the unbiased estimate of Simpson, "Measurement of diversity"
    (Nature 1949), so that few samples and many can be compared.

    Parameters
    ----------
    labels : ndarray of int64
        One for each of at least two samples, >= 0, (n,).

    Returns
    -------
    float
        From 1, of one label, to n (n - 1), where no two are the same: no more could be told.
    """
    number, counts = len(labels), np.bincount(labels)
    pairs = number * (number - 1)
    return float(pairs / max(1, (counts * (counts - 1)).sum()))


def separate(
    values: Values, typical: FloatArray, otherwise: IntArray | None = None, usual: float = 1.0
) -> Split | None:
    """Find the two groups of one label's samples that stand apart most.

    The samples farthest from their median are taken for one group; the neurons by which it
    differs most give every sample a score, a threshold on the scores gives the groups anew, and so
    on until they stay the same. That from several sizes, and by two criteria; the strongest counts.

    Parameters
    ----------
    values : ndarray of float32
        Values of the neurons, (n, J).
    typical : ndarray
        Each neuron's deviation within the median label, (J,), >= 0.
    otherwise : ndarray of int64, optional
        The label that the network would give each sample if it could not give it this one, (n,).
        Without it, the smaller group is taken for the one that does not belong.
    usual : float
        The `variety` of that which most labels keep within.

    Returns
    -------
    Split or None
        None if there are no two groups of at least four samples.
    """
    if len(values) < 2 * FEWEST:
        return None
    floor = _FAINT * typical + 1e-6
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
    if otherwise is None or best.apart.sum() < _ENOUGH:
        return best
    own = max(usual, variety(otherwise[best.apart]))
    return _turned(best) if variety(otherwise[~best.apart]) > _MOTLEY * own else best


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
