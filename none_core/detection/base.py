"""What every detector takes and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import jenkspy
import numpy as np
from numpy.typing import NDArray

from none_core.activations import Report

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.floating[Any]]

MAD_TO_SIGMA = 1.4826  # a normal distribution's standard deviation over its median deviation
_MOST_BREAKABLE = 2000  # natural breaks take time quadratic in the number of values


class Standing(IntEnum):
    """How far a decision can be trusted among clients that may lie."""

    #: A few liars could have forced it.
    CONTESTED = 0
    #: Two detectors that do not share a source agree.
    SUPPORTED = 1
    #: No f liars could have forced it.
    CERTIFIED = 2


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
    certified : bool
        Whether so many clients hold the label that liars cannot have moved its clean mean out of
        the honest clients' range, and so cannot have framed this client.
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
    certified: bool = False


@dataclass(frozen=True)
class Attack:
    """A class that a far smaller trigger leads to than to the others.

    Attributes
    ----------
    label : int
    size, usual : float
        Share of an input's positions that its trigger covers, and that the median class's does.
    strength : float
        Robust standard deviations between the two (of logarithms).
    certified : bool
        Whether it holds whatever a minority of the clients says.
    """

    label: int
    size: float
    usual: float
    strength: float
    certified: bool


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
    attacks : tuple of Attack
        Classes under attack, for detectors that look at classes.
    hints : dict of int to int
        For classes that look attacked to some clients, but to too few, to how many.
    shifts : dict of int to ndarray
        For each class that was looked at, how far its trigger moves every neuron, (J,).
    standing : ndarray of int8 or None
        :class:`Standing` of each neuron's score, (J,); None means that all are contested, as with
        detectors that believe the reports.
    held_back : ndarray of int64
        Neurons that look compromised, but not certainly enough to be reset.
    """

    scores: FloatArray
    compromised: IntArray
    alive: bool
    suspicions: tuple[Suspicion, ...] = ()
    client_evidence: dict[int, FloatArray] = field(default_factory=dict)
    class_mean: FloatArray | None = None
    class_deviation: FloatArray | None = None
    attacks: tuple[Attack, ...] = ()
    hints: dict[int, int] = field(default_factory=dict)
    shifts: dict[int, FloatArray] = field(default_factory=dict)
    standing: NDArray[np.int8] | None = None
    held_back: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def certainty(self) -> NDArray[np.int8]:
        """:class:`Standing` of each neuron, (J,), also where the detector gives none."""
        if self.standing is None:
            return np.full(len(self.scores), Standing.CONTESTED, dtype=np.int8)
        return self.standing


@dataclass(frozen=True)
class Recent:
    """What is known besides the reports: what earlier queries saw, and who stands out elsewhere.

    Attributes
    ----------
    sighted : frozenset of int
        Classes that looked attacked in the last probe, or not long before for a second reason.
    watched : frozenset of int
        Classes that a confirmed attack was for, a short while ago.
    apart : frozenset of (int, int) or None
        Pairs of client and label whose samples were told apart from all others of the label before,
        where that is known: no other pair is foreign then.
    """

    sighted: frozenset[int] = frozenset()
    watched: frozenset[int] = frozenset()
    apart: frozenset[tuple[int, int]] | None = None

    @property
    def expected(self) -> frozenset[int]:
        """Classes whose being attacked is confirmed if it is seen now."""
        return self.sighted | self.watched


NOTHING_RECENT = Recent()


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
    def detect(
        self,
        summaries: Mapping[int, Any],
        layer_of: IntArray,
        bound: int | None = None,
        recent: Recent = NOTHING_RECENT,
    ) -> Detection:
        """Find the compromised neurons.

        Parameters
        ----------
        summaries : mapping of client to summary
            At least one; the order does not matter.
        layer_of : ndarray of int64
            The layer of every neuron, (J,), ascending.
        bound : int, optional
            Known bound on the number of lying clients, for certificates; without one any minority
            may lie.
        recent : Recent, optional
            What earlier queries saw, for detectors that look at classes.
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


def upper_breaks(scores: FloatArray, layer_of: IntArray) -> IntArray:
    """Neurons above the natural break of their layer's positive scores, the worst first.

    The break is Jenks's for two groups. A zero, what an unaffected neuron scores, takes part in it:
    else neurons that are compromised alike would be split among themselves.
    """
    above = [upper_break(scores, np.flatnonzero(layer_of == n)) for n in np.unique(layer_of)]
    compromised = np.concatenate(above)
    worst_first: IntArray = compromised[np.lexsort((compromised, -scores[compromised]))]
    return worst_first


def upper_break(scores: FloatArray, among: IntArray) -> IntArray:
    """Those of the neurons ``among`` whose positive score is above the natural break."""
    positive = among[scores[among] > 0]
    ranked = positive[np.lexsort((positive, -scores[positive]))][:_MOST_BREAKABLE]
    if not len(ranked):
        return ranked
    boundary = jenkspy.jenks_breaks(np.append(scores[ranked], 0.0), n_classes=2)[1]
    compromised: IntArray = ranked[scores[ranked] > boundary]
    return compromised
