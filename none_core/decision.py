"""From a detection to an action: when to ask, when to reset, how much, and when to take it back.

Attribution and quarantine of clients belong here too, as one more step after :func:`decide`; they
are not part of this version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from none_core.detection import Detection
from none_core.detection.base import IntArray, worst_of_each_layer


@dataclass(frozen=True)
class Policy:
    """How boldly the server acts on a detection.

    Attributes
    ----------
    every : int
        Query in every so-many-th round (and always in the last one), >= 1.
    start_round : int
        First round that queries, >= 1.
    quorum : float
        Share of the asked clients whose reports must be valid, in (0, 1].
    budget : float
        Largest share of one layer's neurons that one round may reset, in (0, 1], rounded down.
    guard : float
        Largest loss of the median client's accuracy that a reset may cost, in [0, 1].
    min_accuracy : float
        While the median client's accuracy is below, nothing is reset, in [0, 1]: a model that knows
        next to nothing has no backdoor worth the neurons.
    """

    every: int = 1
    start_round: int = 1
    quorum: float = 0.5
    budget: float = 0.04
    guard: float = 0.02
    min_accuracy: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, value in (("every", self.every), ("start_round", self.start_round)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name, share in (("quorum", self.quorum), ("budget", self.budget)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {share}")
        for name, share in (("guard", self.guard), ("min_accuracy", self.min_accuracy)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")

    def queries(self, server_round: int, last_round: int | None) -> bool:
        """Whether this round asks for reports; the last round always does, once started."""
        since = server_round - self.start_round
        return since >= 0 and (since % self.every == 0 or server_round == last_round)

    def needed(self, asked: int) -> int:
        """Return the number of valid reports that make the quorum among ``asked`` clients."""
        return max(1, math.ceil(self.quorum * asked))


@dataclass(frozen=True, eq=False)
class Decision:
    """What to reset and why.

    Attributes
    ----------
    neurons : ndarray of int64
        To be reset, the worst first; may be empty.
    reason : str
        One sentence.
    """

    neurons: IntArray
    reason: str


def decide(
    detection: Detection,
    layer_of: IntArray,
    policy: Policy,
    *,
    accuracy: float = 1.0,
    again: bool = False,
) -> Decision:
    """Apply the stop rule and the budget.

    Poisoned *data* look poisoned for ever; resetting because of them destroys a healthy model. So
    nothing is reset unless the backdoor is alive in the *model*.

    Parameters
    ----------
    detection : Detection
    layer_of : ndarray of int64
        (J,).
    policy : Policy
    accuracy : float
        The median client's.
    again : bool
        Whether the last query led to a reset as well. If the backdoor is alive again at once, that
        reset was too timid: then the whole budget is spent on whatever is ranked.
    """
    nothing = np.empty(0, dtype=np.int64)
    if not detection.alive:
        if detection.suspicions:
            return Decision(nothing, "poisoned data seen, but the model does not react to them")
        return Decision(nothing, "nothing suspicious")
    if not accuracy >= policy.min_accuracy:
        return Decision(nothing, f"the model is {100 * accuracy:.0f} % right, too early to reset")
    candidates = np.zeros(len(layer_of), dtype=bool)
    candidates[detection.compromised] = True
    reason = f"{len(detection.compromised)} neurons are compromised"
    if again:
        candidates |= detection.scores > 0
        reason += " and the last reset did not last"
    scores = np.where(candidates, detection.scores, -np.inf)
    neurons = worst_of_each_layer(scores, layer_of, policy.budget)
    held_back = len(np.setdiff1d(detection.compromised, neurons))
    if held_back:
        reason += f", {held_back} of them left for later rounds by the budget"
    return Decision(neurons, reason)


def accuracy_loss(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Median over clients of the accuracy that each lost; NaN if no client reported both.

    A median, because some of the clients may lie.
    """
    losses = [before[c] - after[c] for c in before.keys() & after.keys()]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return float(np.median(finite)) if finite else float("nan")


def halve(neurons: IntArray, layer_of: IntArray) -> IntArray:
    """Keep the half that lies deepest in the model, and of one layer the worse half.

    Early neurons serve all classes, so a reset that costs too much most likely does because of
    them. A single neuron becomes none.

    Parameters
    ----------
    neurons : ndarray of int64
        The worst first.
    layer_of : ndarray of int64
        (J,).
    """
    deepest_first = np.argsort(-layer_of[neurons], kind="stable")
    return neurons[np.sort(deepest_first[: len(neurons) // 2])]
