"""Ours: poisoned samples make a client's class look like a mixture of classes, plus a remainder.

A client that relabels images of other classes to class k reports, for k, mean activations that are
a blend of several classes. What the blend cannot explain is what the *trigger* does to the model:
that remainder points at the compromised neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from none_core.activations import LABEL_HISTOGRAMS, Report
from none_core.detection.base import (
    MAD_TO_SIGMA,
    NOTHING_RECENT,
    Detection,
    Detector,
    FloatArray,
    IntArray,
    Recent,
    Suspicion,
    upper_breaks,
)
from none_core.order_statistics import most_liars


class Summary(NamedTuple):
    """One client's samples of each label: their number (K,), mean and variance (K, J)."""

    counts: NDArray[np.int64]
    mean: NDArray[np.float32]
    variance: NDArray[np.float32]


class Unmixing(NamedTuple):
    """Every (client, label) pair as a mixture of the clean classes; NaN where there is no pair.

    Attributes
    ----------
    foreign : ndarray
        One minus the weight on the pair's own class, (clients, K).
    error : ndarray
        Standard error of that weight by sampling noise alone, (clients, K).
    noise : ndarray
        Length that the remainder would have by sampling noise alone, (clients, K).
    surprise : ndarray
        Length of the remainder over that, (clients, K).
    weights : ndarray
        Weights on the classes, (clients, K, K).
    """

    foreign: FloatArray
    error: FloatArray
    noise: FloatArray
    surprise: FloatArray
    weights: FloatArray


class Mixture(Detector):
    """Unmix each client's class means into clean classes and follow the remainder to the neurons.

    1. The clean mean of class k is the median, neuron by neuron, of what the clients report for
       label k: right as long as fewer than half of the label's holders poison it.
    2. Each client's mean for each label is written as a non-negative combination of the clean means
       (each layer first divided by its spread). A clean pair puts nearly all weight on its own
       class; *foreign* is the rest.
    3. A pair is suspected if its foreign share exceeds ``foreign`` and, in multiples of its own
       standard error, stands out from the pairs by ``outlier`` robust standard deviations; or if
       half of that share is exceeded and its remainder is ``loud`` times the ordinary one. (The
       share alone says little of a pair of a dozen samples, or where classes resemble each other;
       the remainder says little before the model reacts to the trigger. No pair's samples count
       as varying less than the median client's of the label: near duplicates do, and still say no
       more about their class. Where it is known which samples were told apart before, only their
       pairs are suspected, and if their remainder is ``strange`` times the ordinary one: poisoned
       samples may still look like their label, and odd ones not be poisoned. Such samples count as
       varying no less than all the others of their label.)
    4. The backdoor is alive if a suspected pair's remainder is ``alive`` times what sampling noise
       leaves in the ordinary pairs: while the model does not react to the trigger, poisoned data
       are an ordinary blend.
    5. The neurons are ranked by the largest positive remainder over the pairs that are alive, as
       far as it exceeds ``significant`` standard errors; natural breaks (Jenks) separate the
       compromised ones in each layer. (One break over all layers would follow the first layers,
       which see the trigger's pixels always, once the backdoor has been pushed out of the others.)

    It needs honest reports, also from the attackers, and at least ``min_clients`` holders of a
    label.

    Parameters
    ----------
    foreign : float
        Smallest suspicious foreign share, in (0, 1).
    outlier : float
        Robust standard deviations above the median pair, > 0.
    loud : float
        Remainder from which a pair with a suspicious foreign share is suspected, in multiples of
        the ordinary pair's, > 1.
    alive : float
        Remainder of a live backdoor in multiples of the median pair's, > 1.
    significant : float
        Standard errors of the mean below which a neuron's remainder counts as noise, >= 0.
    min_clients : int
        Labels held by fewer clients have no clean mean and are left out, >= 3.
    strange : float
        Remainder from which a pair that was told apart before is suspected, in multiples of the
        median of the others, > 1.
    """

    name = "mixture"
    statistics = frozenset({LABEL_HISTOGRAMS})

    def __init__(
        self,
        foreign: float = 0.2,
        outlier: float = 7.0,
        alive: float = 1.5,
        significant: float = 1.0,
        min_clients: int = 3,
        strange: float = 7.0,
        loud: float = 4.0,
    ) -> None:
        if not 0 < foreign < 1:
            raise ValueError(f"foreign must be in (0, 1), got {foreign}")
        if not outlier > 0:
            raise ValueError(f"outlier must be > 0, got {outlier}")
        if not alive > 1:
            raise ValueError(f"alive must be > 1, got {alive}")
        if not significant >= 0:
            raise ValueError(f"significant must be >= 0, got {significant}")
        if min_clients < 3:
            raise ValueError(f"min_clients must be >= 3, got {min_clients}")
        if not strange > 1:
            raise ValueError(f"strange must be > 1, got {strange}")
        if not loud > 1:
            raise ValueError(f"loud must be > 1, got {loud}")
        self.foreign, self.outlier, self.alive, self.strange = foreign, outlier, alive, strange
        self.significant, self.min_clients, self.loud = significant, min_clients, loud

    def summarise(self, report: Report) -> Summary:
        """Keep counts, means and variances."""
        mean, variance = report.moments()
        return Summary(report.counts, mean, variance)

    def detect(
        self,
        summaries: Mapping[int, Summary],
        layer_of: IntArray,
        bound: int | None = None,
        recent: Recent = NOTHING_RECENT,
    ) -> Detection:
        """Find suspected pairs, whether the backdoor is alive, and the neurons behind it."""
        clients = sorted(summaries)
        counts = np.stack([summaries[c].counts for c in clients])
        labels = range(counts.shape[1])
        means = [summaries[c].mean for c in clients]
        variances = [summaries[c].variance for c in clients]
        clean_mean = robust_class_statistic(means, counts, self.min_clients)
        clean_variance = robust_class_statistic(variances, counts, self.min_clients)
        deviation = np.sqrt(clean_variance)
        apart, least = None, clean_variance
        if recent.apart is not None:
            apart = np.array([[(c, k) in recent.apart for k in labels] for c in clients])
            variances, least = _no_less(variances, counts, apart), np.zeros_like(clean_variance)

        scale = layer_scale(clean_mean, layer_of)
        unmixed = unmix(means, variances, counts, clean_mean, scale, least)
        suspected = self._suspected(unmixed) if apart is None else apart
        ordinary = _median(unmixed.surprise[~suspected])
        if apart is not None:
            suspected = apart & (unmixed.surprise > self.strange * ordinary)
        alive = suspected & (unmixed.surprise > self.alive * ordinary)

        def remainder(i: int, k: int) -> FloatArray:
            blend = unmixed.weights[i, k] @ np.nan_to_num(clean_mean)
            positive: FloatArray = np.maximum(np.nan_to_num(means[i][k] - blend) / scale, 0)
            return positive

        scores = np.zeros(len(layer_of))
        for i, k in np.argwhere(alive):
            variance = np.fmax(variances[i][k], least[k])
            found, error = remainder(i, k), np.sqrt(variance / counts[i, k]) / scale
            scores = np.maximum(scores, np.where(found > self.significant * error, found, 0))
        holders = (counts > 0).sum(0)
        suspicions = tuple(
            Suspicion(
                client=clients[i],
                label=int(k),
                foreign=float(unmixed.foreign[i, k]),
                surprise=float(unmixed.surprise[i, k] / ordinary),
                alive=bool(alive[i, k]),
                shift=_standardised(means[i][k] - clean_mean[k], deviation[k]),
                certified=bool(holders[k] > 2 * most_liars(len(clients), bound)),
            )
            for i, k in np.argwhere(suspected)
        )
        most_foreign = np.nan_to_num(unmixed.foreign, nan=-1.0).argmax(1)
        evidence = {
            client: remainder(i, k) / np.nan_to_num(unmixed.noise[i, k], nan=np.inf)
            for i, (client, k) in enumerate(zip(clients, most_foreign, strict=True))
        }
        return Detection(
            scores=scores,
            compromised=upper_breaks(scores, layer_of),
            alive=bool(alive.any()),
            suspicions=suspicions,
            client_evidence=evidence,
            class_mean=clean_mean,
            class_deviation=deviation,
        )

    def _suspected(self, unmixed: Unmixing) -> NDArray[np.bool_]:
        """Pairs that are a blend beyond doubt, and blends that leave much over."""
        doubtless = unmixed.foreign / unmixed.error
        known = doubtless[np.isfinite(doubtless)]
        if not known.size:
            return np.zeros(doubtless.shape, dtype=bool)
        centre = np.median(known)
        spread = MAD_TO_SIGMA * np.median(np.abs(known - centre))
        blended = np.nan_to_num(doubtless) > centre + self.outlier * spread
        loud = np.nan_to_num(unmixed.surprise) > self.loud * _median(unmixed.surprise)
        foreign = np.nan_to_num(unmixed.foreign)
        suspected: NDArray[np.bool_] = blended & (foreign > self.foreign)
        suspected |= loud & (foreign > self.foreign / 2)
        return suspected


def robust_class_statistic(
    statistic: list[NDArray[np.float32]], counts: NDArray[np.int64], min_clients: int
) -> FloatArray:
    """Median over clients of a per-label statistic, each client counting once.

    Parameters
    ----------
    statistic : list of ndarray
        One (K, J) array per client.
    counts : ndarray of int64
        Samples per client and label, (clients, K); pairs without samples are left out.
    min_clients : int
        Labels held by fewer clients are NaN.

    Returns
    -------
    ndarray
        (K, J) float64.
    """
    result: FloatArray = np.full(statistic[0].shape, np.nan)
    for k in range(counts.shape[1]):
        holders = np.flatnonzero(counts[:, k])
        if len(holders) >= min_clients:
            # Neurons first: the median then runs along contiguous memory.
            values = np.stack([statistic[i][k] for i in holders], axis=1)
            result[k] = np.median(values, axis=1, overwrite_input=True)
    return result


def layer_scale(clean_mean: FloatArray, layer_of: IntArray) -> FloatArray:
    """Give what each neuron's values are divided by, (J,), so that layers weigh about the same.

    It is the spread of the clean class means over a whole layer, its neurons and classes together,
    times the square root of its size. (Spread over classes alone would blow up the first layers,
    whose neurons hardly tell classes apart but see the trigger's pixels whether the model cares or
    not.)
    """
    known = clean_mean[~np.isnan(clean_mean).any(1)]
    if not len(known):
        return np.ones(len(layer_of))
    sizes = np.bincount(layer_of)
    mean = np.bincount(layer_of, weights=known.mean(0)) / sizes
    square = np.bincount(layer_of, weights=(known**2).mean(0)) / sizes
    spread = np.sqrt(np.maximum(square - mean**2, 1e-12))
    scale: FloatArray = (spread * np.sqrt(sizes))[layer_of]
    return scale


def unmix(
    means: list[NDArray[np.float32]],
    variances: list[NDArray[np.float32]],
    counts: NDArray[np.int64],
    clean_mean: FloatArray,
    scale: FloatArray,
    least: FloatArray | None = None,
) -> Unmixing:
    """Write every (client, label) mean as a non-negative combination of the clean class means.

    Parameters
    ----------
    means, variances : list of ndarray
        One (K, J) array per client.
    counts : ndarray of int64
        (clients, K).
    clean_mean : ndarray
        (K, J), NaN for unknown classes.
    scale : ndarray
        (J,).
    least : ndarray, optional
        Variances that no client's are taken to be below, (K, J); NaN is none.
    """
    labels = np.flatnonzero(~np.isnan(clean_mean).any(1))
    shape = counts.shape
    foreign, error, noise, surprise = (np.full(shape, np.nan) for _ in range(4))
    result = Unmixing(foreign, error, noise, surprise, weights=np.zeros((*shape, shape[1])))
    if len(labels) < 2:
        return result
    # |A w - z| and |R w - Q'z| differ by a constant: with A = QR every problem shrinks to K x K.
    basis = clean_mean[labels] / scale
    q, r = np.linalg.qr(basis.T)
    precision = 1 / scale**2
    # What each neuron's error adds to that of a class's weight, squared.
    leverage = (np.linalg.pinv(r) @ q.T / scale) ** 2
    for i, (mean, variance) in enumerate(zip(means, variances, strict=True)):
        if least is not None:
            variance = np.fmax(variance, least)
        mine = labels[counts[i, labels] > 0]
        scaled = mean[mine] / scale
        projected = scaled @ q
        weights = np.stack([nnls(r, b)[0] for b in projected]) if len(mine) else np.empty((0, 0))
        for row, k in enumerate(mine):
            total = weights[row].sum()
            place = np.searchsorted(labels, k)
            own = weights[row, place]
            result.error[i, k] = np.sqrt(max(leverage[place] @ variance[k] / counts[i, k], 1e-12))
            result.foreign[i, k] = 1 - own / total if total > 0 else 1.0
            result.weights[i, k, labels] = weights[row]
            remainder = scaled[row] - weights[row] @ basis
            noise = (variance[k] / counts[i, k]) @ precision
            result.noise[i, k] = np.sqrt(max(noise, 1e-12))
            result.surprise[i, k] = np.sqrt(remainder @ remainder) / result.noise[i, k]
    return result


def _no_less(
    variances: list[NDArray[np.float32]], counts: NDArray[np.int64], apart: NDArray[np.bool_]
) -> list[NDArray[np.float32]]:
    """Raise the variance of some pairs to that of their label within all other clients."""
    others = (counts > 0) & ~apart
    squares: FloatArray = np.zeros(variances[0].shape)
    for rest, number, variance in zip(others, counts, variances, strict=True):
        squares += np.where(rest[:, None], number[:, None] * variance, 0)
    freedom = np.where(others, counts - 1, 0).sum(0)[:, None]
    usual = np.divide(squares, freedom, out=np.zeros(squares.shape), where=freedom > 0)
    return [
        np.where(pairs[:, None], np.fmax(variance, usual), variance)
        for pairs, variance in zip(apart, variances, strict=True)
    ]


def _median(surprise: FloatArray) -> float:
    """Median of the known values; never 0, since it divides: reports can be alike."""
    known = surprise[np.isfinite(surprise)]
    return max(float(np.median(known)), 1e-6) if known.size else 1.0


def _standardised(difference: FloatArray, deviation: FloatArray) -> FloatArray:
    """Difference in standard deviations; 0 for neurons that do not vary within the class."""
    return np.divide(difference, deviation, out=np.zeros(len(difference)), where=deviation > 1e-6)
