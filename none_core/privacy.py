"""Reports under differential privacy: what is sent hardly depends on any single sample.

Two data sets are neighbours if one holds a sample that the other does not (add or remove one). A
sample's contribution is bounded before anything is added up, and Gaussian noise in proportion to
that bound is added to all that leaves the client: Dwork and Roth, "The Algorithmic Foundations of
Differential Privacy", 2014, appendix A. What a run spends in all is the business of
:mod:`none_core.accounting`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from none_core.activations import (
    LABEL_HISTOGRAMS,
    HistogramGrid,
    Report,
    ReportBuilder,
    ReportSpec,
    spatial_maximum,
)
from none_core.neurons import Reader

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: Statistics that are sent under differential privacy; of all others the empty form is.
PRIVATE = frozenset({LABEL_HISTOGRAMS})

# Shares of one answer's privacy that its parts are released with; they add up to 1.
_COUNTS, _SCALES, _MEANS, _SQUARES = 0.1, 0.1, 0.64, 0.16

_ROOM = 1.2  # bound on a layer's length, in multiples of the noisy median sample's
_FLOOR = 0.05  # least share of a layer's mean square that counts as variance within the class
_CHUNK = 4096  # synthetic samples at a time


class Samples(NamedTuple):
    """One client's samples as a report sees them.

    Attributes
    ----------
    values : ndarray of float32
        Spatial maxima, (n, J).
    labels : ndarray of int64
        Local labels, (n,).
    right : ndarray of bool
        Whether the model predicts the label, (n,).
    """

    values: NDArray[np.float32]
    labels: IntArray
    right: NDArray[np.bool_]


@dataclass
class Gaussian:
    """The Gaussian mechanism, for an answer that is released in several parts.

    Releasing parts with shares s of the privacy, each with the noise multiplier ``noise /
    sqrt(s)``, costs as much as one release with ``noise`` if the shares add up to 1, also when the
    later parts depend on what the earlier ones showed (the Renyi divergences of Gaussians, which
    are proportional to 1 / noise**2, add up).

    Parameters
    ----------
    noise : float
        Standard deviation in multiples of the sensitivity, > 0.
    rng : numpy.random.Generator
    """

    noise: float
    rng: np.random.Generator

    def deviation(self, sensitivity: float, share: float) -> float:
        """Return the standard deviation of what :meth:`released` adds."""
        return self.noise * sensitivity / math.sqrt(share)

    def released(self, exact: FloatArray, sensitivity: float, share: float) -> FloatArray:
        """Add noise to sums to which no sample contributes a longer vector than ``sensitivity``."""
        noisy: FloatArray = exact + self.rng.normal(
            scale=self.deviation(sensitivity, share), size=exact.shape
        )
        return noisy


def read_samples(reader: Reader, batches: Iterable[tuple[Tensor, Tensor]]) -> Samples:
    """Run a model over ``batches`` once; all values are held in memory, 4 J bytes a sample.

    Parameters
    ----------
    reader : callable
        ``neuron_map.reader(model)``, of a model in evaluation mode.
    batches : iterable of (inputs, labels)
        At least one.
    """
    values, labels, right = [], [], []
    with torch.inference_mode():
        for inputs, targets in batches:
            logits, reads = reader(inputs)
            values.append(spatial_maximum(reads).cpu())
            labels.append(targets.cpu())
            right.append((logits.argmax(1) == targets).cpu())
    return Samples(torch.cat(values).numpy(), torch.cat(labels).numpy(), torch.cat(right).numpy())


def private_report(
    samples: Samples,
    layer_of: IntArray,
    spec: ReportSpec,
    mechanism: Gaussian,
    min_count: int = 1,
) -> Report:
    """Report samples so that the answer as a whole is one Gaussian mechanism.

    1. *Counts.* A sample is one of the 2K cells (label, predicted rightly or not): sensitivity 1.
    2. *Scales.* In each of the L layers the length of a sample's vector of values falls into one
       bin of the common grid: sensitivity sqrt(L). The noisy median, and some room, becomes the
       layer's bound.
    3. *Means and squares.* Each layer's vector is clipped to its bound and divided by it, so that a
       sample adds at most 1 for each layer to the sums of vectors of its label, and likewise to the
       sums of squared lengths: sensitivity sqrt(L) each.

    Everything else follows from these alone: the report is that of *synthetic* samples, as many as
    the noisy counts say, with the noisy means and, in equal shares for a layer's neurons, the noisy
    variances (in which the noise of the mean is included, so that a mean's standard error can be
    told from it as usual). Wrong predictions are said to be of the next class. Statistics outside
    of :data:`PRIVATE` have their empty form: maxima have no bounded sensitivity, and a trigger is
    optimised on the samples themselves.

    Parameters
    ----------
    samples : Samples
    layer_of : ndarray of int64
        (J,).
    spec : ReportSpec
    mechanism : Gaussian
    min_count : int
        Labels with a smaller noisy count are left out.

    Returns
    -------
    Report
        Its total can be 0.
    """
    sent = replace(spec, statistics=spec.statistics & PRIVATE)
    cells = np.zeros((spec.labels, 2))
    np.add.at(cells, (samples.labels, (~samples.right).astype(np.int64)), 1)
    share = _COUNTS if sent.statistics else 1.0
    cells = np.rint(np.maximum(mechanism.released(cells, 1.0, share), 0))
    counts = cells.astype(np.int64)
    counts[counts.sum(1) < min_count] = 0
    if sent.statistics:
        mean, variance = _moments(samples, layer_of, counts.sum(1), mechanism)
    else:
        mean = variance = np.zeros((spec.labels, spec.neurons))
    builder = ReportBuilder(sent)
    for values, logits, labels in _synthetic(counts, mean, variance):
        builder.add([values], logits, labels)
    return Report(spec, ReportBuilder(spec).report().arrays | builder.report().arrays)


def _moments(
    samples: Samples, layer_of: IntArray, counts: IntArray, mechanism: Gaussian
) -> tuple[FloatArray, FloatArray]:
    """Noisy mean and variance of every neuron per label, (K, J); 0 for labels without samples."""
    layers = int(layer_of.max()) + 1
    limit = float(HistogramGrid.EDGES[-1])
    # Nothing that is not a number may get past the bound.
    values = np.nan_to_num(samples.values.astype(np.float64), nan=0, posinf=limit, neginf=-limit)
    values = values.clip(-limit, limit)
    lengths = _lengths(values, layer_of)
    bounds = _ROOM * _noisy_medians(lengths, mechanism, _SCALES)
    clipped = np.minimum(lengths, bounds)
    factors = np.divide(clipped, lengths * bounds, out=np.zeros_like(clipped), where=lengths > 0)
    units = values * factors[:, layer_of]

    of_label = np.eye(len(counts))[samples.labels].T  # (K, n)
    sensitivity = math.sqrt(layers)
    sums = mechanism.released(of_label @ units, sensitivity, _MEANS)
    squares = mechanism.released(of_label @ (clipped / bounds) ** 2, sensitivity, _SQUARES)

    number = np.maximum(counts, 1)[:, None]
    error = (mechanism.deviation(sensitivity, _MEANS) / number) ** 2  # of a mean, (K, 1)
    mean, square = sums / number, np.maximum(squares / number, 0)
    sizes = np.bincount(layer_of)
    lengths_of_means = _lengths(mean, layer_of) ** 2 - sizes * error
    within = np.maximum(square - np.maximum(lengths_of_means, 0), _FLOOR * square) / sizes
    variance = within[:, layer_of] + number * error
    scale = bounds[layer_of]
    held = (counts > 0)[:, None]
    return np.where(held, mean * scale, 0.0), np.where(held, variance * scale**2, 0.0)


def _lengths(values: FloatArray, layer_of: IntArray) -> FloatArray:
    """Euclidean length of each layer's part of each row, (n, L)."""
    starts = np.flatnonzero(np.diff(layer_of, prepend=-1))
    lengths: FloatArray = np.sqrt(np.add.reduceat(values**2, starts, axis=1))
    return lengths


def _noisy_medians(lengths: FloatArray, mechanism: Gaussian, share: float) -> FloatArray:
    """Upper edge of the bin that holds the median of each column, from noisy counts, (L,)."""
    grid = HistogramGrid
    bins = grid.bins(torch.from_numpy(lengths.astype(np.float32))).numpy() - grid.PER_SIGN
    layers = lengths.shape[1]
    cells = np.zeros((layers, grid.PER_SIGN))
    np.add.at(cells, (np.broadcast_to(np.arange(layers), bins.shape), bins), 1)
    cells = mechanism.released(cells, math.sqrt(layers), share)
    below = cells.cumsum(1)
    medians: FloatArray = grid.EDGES[grid.PER_SIGN + 1 :][(below >= below[:, -1:] / 2).argmax(1)]
    return medians


def _synthetic(
    counts: IntArray, mean: FloatArray, variance: FloatArray
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Make samples of each label: quantiles of normal distributions; values, logits and labels."""
    labels = len(counts)
    for k, (right, wrong) in enumerate(counts):
        number = int(right + wrong)
        quantiles = ndtri((np.arange(number) + 0.5) / max(number, 1))
        if number > 1:
            quantiles /= quantiles.std()
        for start in range(0, number, _CHUNK):
            index = np.arange(start, min(start + _CHUNK, number))
            values = mean[k] + np.sqrt(variance[k]) * quantiles[index, None]
            predicted = np.where(index < right, k, (k + 1) % labels)
            yield (
                torch.from_numpy(values.astype(np.float32)),
                torch.from_numpy(np.eye(labels, dtype=np.float32)[predicted]),
                torch.full((len(index),), k, dtype=torch.int64),
            )


def most_bits(spec: ReportSpec, counts: IntArray) -> dict[str, float]:
    """Bound what a report without noise can say beside how many samples each label has.

    A histogram of n samples over b bins is one of (n + b - 1 choose n); every other number has as
    many values as its wire form can hold.

    Parameters
    ----------
    spec : ReportSpec
    counts : ndarray of int64
        Samples of each label that is reported, (K,).

    Returns
    -------
    dict of str to float
        Bits for each field.
    """

    def ways(cells: int) -> float:
        """Bits to say how the samples of all labels fall into so many cells each."""
        logs = [
            math.lgamma(n + cells) - math.lgamma(n + 1) - math.lgamma(cells) for n in counts if n
        ]
        return sum(logs) / math.log(2)

    held = int((counts > 0).sum())
    bits = {}
    for name, (kind, shape) in spec.fields().items():
        numbers = math.prod(shape)
        if name == "predictions":
            bits[name] = ways(spec.labels)
        elif kind == "histogram":
            bits[name] = spec.neurons * ways(HistogramGrid.BINS)
        elif kind == "sum":
            bits[name] = held * spec.neurons * math.log2(255)
        else:
            bits[name] = float(numbers * {"count": 63, "real": 64, "half": 16}[kind])
    return bits
