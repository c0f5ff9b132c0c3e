"""The poisoned-sample filter: which of its own samples a client had better not train on.

Source: Wang et al., "Training with More Confidence: Mitigating Injected and Natural Backdoors
During Training", NeurIPS 2022, Algorithm 1, lines 11 to 17, where one party holds all data. In its
federated form the server sends what clean samples look like (mean and deviation of some neurons,
and lambda) and the client, who alone sees the samples, drops those that exceed it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from none_core.detection import Detection
from none_core.detection.base import FloatArray, IntArray

_FEWEST_NEURONS = 5


@dataclass(frozen=True, eq=False)
class SampleFilter:
    """Drop samples of some labels whose neurons are too far from the clean reference.

    A sample of label ``labels[i]`` is dropped if the mean over m neurons of ``sign * (value - mean)
    / deviation`` exceeds ``threshold[i]`` (the paper's lambda). A value is a neuron's maximum over
    space in the model *before* the reset, since a reset neuron no longer tells anything.

    Attributes
    ----------
    labels : ndarray of int64
        (L,).
    neurons : ndarray of int64
        (L, m).
    sign, mean, deviation : ndarray of float32
        (L, m).
    threshold : ndarray of float32
        (L,), in standard deviations.
    """

    labels: IntArray
    neurons: IntArray
    sign: NDArray[np.float32]
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    threshold: NDArray[np.float32]

    def flagged(self, values: NDArray[np.float32], labels: IntArray) -> NDArray[np.bool_]:
        """Tell which samples to drop.

        Parameters
        ----------
        values : ndarray of float32
            Neuron values, (n, J).
        labels : ndarray of int64
            Local labels, (n,).

        Returns
        -------
        ndarray of bool
            (n,).
        """
        flagged = np.zeros(len(labels), dtype=bool)
        for i, label in enumerate(self.labels):
            mine = np.flatnonzero(labels == label)
            z = (values[np.ix_(mine, self.neurons[i])] - self.mean[i]) / self.deviation[i]
            flagged[mine] = (self.sign[i] * z).mean(1) > self.threshold[i]
        return flagged

    def for_client(self, suspected: set[int], strict: float) -> SampleFilter:
        """Use the threshold ``strict`` for the labels under which this client is suspected."""
        threshold = np.where(np.isin(self.labels, list(suspected)), strict, self.threshold)
        return replace(self, threshold=threshold.astype(np.float32))


def build_filter(
    detection: Detection, layer_of: IntArray, *, share: float = 0.05, threshold: float = 3.0
) -> SampleFilter | None:
    """Build the filter that a detection justifies, or None without a suspicion.

    The neurons are those of the last layer by which the suspected samples stand out of their class
    most: the compromised ones once the model reacts to the trigger, and before that the ones that
    show the poisoned images' true classes. So poisoned samples are found before they did any harm.

    Parameters
    ----------
    detection : Detection
        With clean class statistics.
    layer_of : ndarray of int64
        (J,).
    share : float
        Share of the last layer's neurons to use, in (0, 1].
    threshold : float
        Lambda for clients that are not suspected, in standard deviations, averaged over neurons.
    """
    if not detection.suspicions or detection.class_mean is None:
        return None
    assert detection.class_deviation is not None
    last = np.flatnonzero(layer_of == layer_of[-1])
    number = min(len(last), max(_FEWEST_NEURONS, round(share * len(last))))
    labels = sorted({s.label for s in detection.suspicions})
    neurons = np.empty((len(labels), number), dtype=np.int64)
    sign = np.empty((len(labels), number), dtype=np.float32)
    for i, label in enumerate(labels):
        shift = np.mean([s.shift for s in detection.suspicions if s.label == label], axis=0)
        order = np.lexsort((last, -np.abs(shift[last])))
        neurons[i] = last[order[:number]]
        sign[i] = np.sign(shift[neurons[i]])
    rows = np.array(labels)[:, None]
    deviation: FloatArray = np.maximum(detection.class_deviation[rows, neurons], 1e-6)
    return SampleFilter(
        labels=np.array(labels, dtype=np.int64),
        neurons=neurons,
        sign=sign,
        mean=detection.class_mean[rows, neurons].astype(np.float32),
        deviation=deviation.astype(np.float32),
        threshold=np.full(len(labels), threshold, dtype=np.float32),
    )
