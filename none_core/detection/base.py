"""What every detector takes and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from none_core.activations import Report

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Suspicion:
    """One client's samples of one label look poisoned.

    Attributes
    ----------
    client : int
        Whoever sent the report, as the caller names its clients.
    label : int
    foreign : float
        Share of the samples that does not look like the label's own class, 0 to 1.
    surprise : float
        Size of what no clean class explains, in multiples of an ordinary pair's. Large values
        mean that the *model* reacts to the poisoned samples: the backdoor is alive.
    alive : bool
        Whether ``surprise`` is more than ordinary.
    shift : ndarray
        How far the samples' mean is from the class's clean one, in the class's standard deviations,
        (J,).
    """

    client: int
    label: int
    foreign: float
    surprise: float
    alive: bool
    shift: FloatArray = field(repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Detection:
    """A detector's answer.

    Attributes
    ----------
    scores : ndarray
        How compromised each neuron looks, (J,), higher is worse; comparable within this detection
        only.
    compromised : ndarray of int64
        The neurons that the detector's own rule calls compromised, the worst first.
    alive : bool
        Whether the backdoor is seen at work in the model; poisoned data alone does not make it so.
    suspicions : tuple of Suspicion
        Empty for detectors that do not look at single clients.
    client_evidence : dict of int to ndarray
        For each client the evidence against each neuron in its most suspicious label, (J,), in
        units that make clients comparable.
    class_mean, class_deviation : ndarray or None
        What clean samples of each label look like, (K, J), NaN for labels that too few clients
        hold; None for detectors that do not know.
    """

    scores: FloatArray
    compromised: IntArray
    alive: bool
    suspicions: tuple[Suspicion, ...] = ()
    client_evidence: dict[int, FloatArray] = field(default_factory=dict)
    class_mean: FloatArray | None = None
    class_deviation: FloatArray | None = None


class Detector(ABC):
    """Turns reports into compromised neurons.

    Every report is boiled down by :meth:`summarise` as it arrives, so that the reports of many
    clients never lie in memory together; :meth:`detect` then looks at all summaries.

    Attributes
    ----------
    name : str
        What configurations call it.
    statistics : frozenset of str
        What it needs in a report.
    """

    name: ClassVar[str]
    statistics: ClassVar[frozenset[str]]

    @abstractmethod
    def summarise(self, report: Report) -> Any:
        """Keep of one client's report what :meth:`detect` needs, and no more."""

    @abstractmethod
    def detect(self, summaries: Mapping[int, Any], layer_of: IntArray) -> Detection:
        """Find the compromised neurons.

        Parameters
        ----------
        summaries : mapping of client to summary
            At least one; the order does not matter.
        layer_of : ndarray of int64
            The layer of every neuron, (J,), ascending.
        """


def worst_of_each_layer(scores: FloatArray, layer_of: IntArray, share: float) -> IntArray:
    """Neurons with the highest scores, at most ``share`` of each layer, the worst first.

    Parameters
    ----------
    scores : ndarray
        (J,); neurons with -inf or NaN are never chosen. Equal scores: the lower index first.
    layer_of : ndarray of int64
        (J,).
    share : float
        In (0, 1]; a layer gives ``floor(share * size)`` neurons, so a small one may give none.
    """
    order = np.lexsort((np.arange(len(scores)), -scores, layer_of))
    starts = np.searchsorted(layer_of[order], layer_of[order], side="left")
    rank = np.arange(len(scores)) - starts  # within the layer, 0 is the worst
    sizes = np.bincount(layer_of)
    # 0.29 * 100 is 28.999...96, but means 29.
    allowed = np.floor(share * sizes + 1e-9).astype(np.int64)[layer_of[order]]
    chosen = order[(rank < allowed) & (scores[order] > -np.inf)]
    worst_first: IntArray = chosen[np.lexsort((chosen, -scores[chosen]))]
    return worst_first
