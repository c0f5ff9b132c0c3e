"""Which neurons are dormant, and how many of them a model can do without; knows nothing of Flower.

The algebra of :mod:`server.peers.pruning`, which names the paper; the one-machine baseline
Fine-Pruning stops by the same rule, at the same layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from none_core.activations import HistogramGrid
from none_core.neurons import Layer, NeuronMap

T = TypeVar("T")


def mean_activations(histograms: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Mean of every neuron's value behind a ReLU, (J,), over all labels and samples.

    Parameters
    ----------
    histograms : ndarray
        Samples by label, neuron and bin of ``HistogramGrid``, (K, J, BINS).
    """
    counts = histograms.sum(0, dtype=np.float64)
    return counts @ np.maximum(HistogramGrid.CENTRES, 0) / counts.sum(1)


def pruning_order(activations: NDArray[np.float64]) -> NDArray[np.int64]:
    """Order neurons by the mean of the clients' ranks, the most dormant first.

    Parameters
    ----------
    activations : ndarray
        Mean activations by client and neuron, (n, m). Equal ones share a rank.

    Returns
    -------
    ndarray of int64
        (m,).
    """
    return np.argsort(rankdata(activations, axis=1).mean(0), kind="stable")


def furthest(attempts: Iterable[T], loss: Callable[[T], float], most: float) -> T | None:
    """Return the last attempt before the first whose loss is above ``most``, or unknown (NaN)."""
    reached = None
    for attempt in attempts:
        if not loss(attempt) <= most:
            break
        reached = attempt
    return reached


def without_extremes(weights: Tensor, delta: float) -> Tensor:
    """Move weights beyond mean +- delta standard deviations to those bounds."""
    mean, deviation = weights.mean(), weights.std(correction=0)
    return weights.clamp(mean - delta * deviation, mean + delta * deviation)


def last_convolution(model: nn.Module, neurons: NeuronMap) -> Layer:
    """Find the last convolution that feeds an activation; without any, the last layer that does."""

    def convolves(layer: Layer) -> bool:
        module = model.get_submodule(layer.sources[0].module)
        return not isinstance(module, nn.Linear)

    return next(filter(convolves, reversed(neurons.layers)), neurons.layers[-1])
