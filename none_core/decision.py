"""From a detection to an action: when to ask, what to reset, whom to leave out, what to undo."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from none_core.detection import Detection, Standing
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
    probe_every : int
        Of the queries, those in every so-many-th round also look for triggers, where the detector
        wants that; so do the queries after one that saw an attack, and the last one. >= 1.
    watch : int
        Rounds after a confirmed attack in which every query looks for triggers, and updates are
        still compared where it was seen, >= 0: attackers plant again what was reset.
    follow_ups : int
        Resets after a confirmed attack that what the old trigger still does can lead to, >= 0: part
        of what it does, it may do in a clean model, too.
    quorum : float
        Share of the asked clients whose reports must be valid, in (0, 1].
    budget : float
        Largest share of one layer's neurons that one round may reset, in (0, 1], rounded down.
    certified_budget : float
        The same for neurons that no minority can have framed, if it is more, in (0, 1].
    guard : float
        Largest loss of the median client's accuracy that a reset may cost, in [0, 1].
    apart : float
        Distance of a client's update from the others, in multiples of the median client's and where
        the backdoor lives, from which it is named; > 1.
    min_accuracy : float
        While the median client's accuracy is below, nothing is reset, in [0, 1]: a model that knows
        next to nothing has no backdoor worth the neurons.
    """

    every: int = 1
    start_round: int = 1
    probe_every: int = 3
    watch: int = 5
    follow_ups: int = 4
    quorum: float = 0.5
    budget: float = 0.04
    certified_budget: float = 0.1
    guard: float = 0.02
    min_accuracy: float = 0.5
    apart: float = 1.5

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, value, least in (
            ("every", self.every, 1),
            ("start_round", self.start_round, 1),
            ("probe_every", self.probe_every, 1),
            ("watch", self.watch, 0),
            ("follow_ups", self.follow_ups, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        for name, share in (
            ("quorum", self.quorum),
            ("budget", self.budget),
            ("certified_budget", self.certified_budget),
        ):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {share}")
        for name, share in (("guard", self.guard), ("min_accuracy", self.min_accuracy)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        if not self.apart > 1:
            raise ValueError(f"apart must be > 1, got {self.apart}")

    def queries(self, server_round: int, last_round: int | None) -> bool:
        """Whether this round asks for reports; the last round always does, once started."""
        since = server_round - self.start_round
        return since >= 0 and (since % self.every == 0 or server_round == last_round)

    def probes(self, server_round: int, last_round: int | None) -> bool:
        """Whether this round's query looks for triggers even if nothing calls for it."""
        since = server_round - self.start_round
        return since % self.probe_every == 0 or server_round == last_round

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
    confirmed: bool = True,
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
    confirmed : bool
        Whether the classes that look attacked did so before, too. In a young model one class can be
        an outlier by chance.
    """
    nothing = np.empty(0, dtype=np.int64)
    if not detection.alive:
        if detection.suspicions:
            return Decision(nothing, "poisoned data seen, but the model does not react to them")
        return Decision(nothing, "nothing suspicious")
    if not accuracy >= policy.min_accuracy:
        return Decision(nothing, f"the model is {100 * accuracy:.0f} % right, too early to reset")
    if detection.attacks and not confirmed:
        labels = ", ".join(str(attack.label) for attack in detection.attacks)
        return Decision(nothing, f"class {labels} looks attacked, to be confirmed by a probe")
    candidates = np.zeros(len(layer_of), dtype=bool)
    candidates[detection.compromised] = True
    certified = candidates & (detection.certainty == Standing.CERTIFIED)
    reason = f"{len(detection.compromised)} neurons are compromised"
    if len(detection.held_back):
        reason += f" and {len(detection.held_back)} contested"
    chosen = np.concatenate(
        [
            worst_of_each_layer(np.where(which, detection.scores, -np.inf), layer_of, share)
            for which, share in (
                (certified, max(policy.budget, policy.certified_budget)),
                (candidates & ~certified, policy.budget),
            )
        ]
    )
    neurons = chosen[np.lexsort((chosen, -detection.scores[chosen]))]
    held_back = len(np.setdiff1d(detection.compromised, neurons))
    if held_back:
        reason += f", {held_back} of them left for later rounds by the budget"
    return Decision(neurons, reason)


def finish(decision: Decision, left_over: IntArray, layer_of: IntArray, policy: Policy) -> Decision:
    """Reset what the budget or the guard has left over of a certified attack.

    Parameters
    ----------
    decision : Decision
        To reset nothing.
    left_over : ndarray of int64
        The worst first.
    layer_of : ndarray of int64
        (J,).
    policy : Policy
    """
    if not left_over.size:
        return decision
    scores = np.full(len(layer_of), -np.inf)
    scores[left_over] = -np.arange(len(left_over), dtype=np.float64)
    neurons = worst_of_each_layer(scores, layer_of, max(policy.budget, policy.certified_budget))
    return Decision(neurons, f"{decision.reason}, but {len(left_over)} neurons are left to reset")


_OWN_VIEW = 3  # classes without which a client cannot tell an outlier


def share_out(
    labels: Sequence[int], clients: Sequence[int], each: int, turn: int = 0
) -> dict[int, tuple[int, ...]]:
    """Share the work of looking for triggers out among the clients.

    Parameters
    ----------
    labels : sequence of int
        Classes, K >= 1.
    clients : sequence of int
        n >= 1.
    each : int
        Clients that look at each class, at least; with 2f + 1 of them f liars cannot outvote the
        others. More if otherwise some client had fewer than three classes to compare.
    turn : int
        Another number gives the classes to other clients.

    Returns
    -------
    dict of client to tuple of int
        The classes of each, ascending; their numbers differ by at most one.
    """
    number = len(clients)
    each = min(number, max(each, math.ceil(_OWN_VIEW * number / len(labels))))
    shares: dict[int, list[int]] = {client: [] for client in clients}
    places = itertools.cycle([*clients[turn % number :], *clients[: turn % number]])
    for label in labels:
        for client in itertools.islice(places, each):
            shares[client].append(label)
    return {client: tuple(sorted(mine)) for client, mine in shares.items()}


def accuracy_loss(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Median over clients of the accuracy that each lost; NaN if no client reported both.

    A median, because some of the clients may lie.
    """
    losses = [before[c] - after[c] for c in before.keys() & after.keys()]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return float(np.median(finite)) if finite else float("nan")


def halve(neurons: IntArray, layer_of: IntArray) -> IntArray:
    """Keep the worse half of each layer's neurons, rounded down: one alone becomes none.

    Parameters
    ----------
    neurons : ndarray of int64
        The worst first.
    layer_of : ndarray of int64
        (J,).
    """
    layers = layer_of[neurons]
    by_layer = np.argsort(layers, kind="stable")
    rank = np.empty(len(neurons), dtype=np.int64)  # within the layer, 0 is the worst
    rank[by_layer] = np.arange(len(neurons)) - np.searchsorted(layers[by_layer], layers[by_layer])
    return neurons[rank < np.bincount(layers)[layers] // 2]


@dataclass
class Reputation:
    """What is held against each client, and who is quarantined for it.

    Evidence of a round, 0 or 1, is added to what is left of the evidence before it. One naming is
    not enough for quarantine, two within a few rounds are; a client that nothing more is found
    against is cleared about as many rounds after as its evidence needs to fade. A quarantined
    client's updates are left out, but it is still asked to train and to report, or it could never
    be cleared. Fewer than half of the known clients are ever quarantined, those with the most
    against them: the defence rests on an honest majority.

    Attributes
    ----------
    decay : float
        What is left of the evidence after a round, in [0, 1).
    enter : float
        Evidence from which a client is quarantined; above 1, so that one naming does not suffice.
    leave : float
        Evidence below which it is cleared, below ``enter``.
    """

    decay: float = 0.85
    enter: float = 1.5
    leave: float = 0.4
    evidence: dict[int, float] = field(default_factory=dict)
    quarantined: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if not 0 < self.leave < self.enter:
            raise ValueError(f"leave must be in (0, enter), got {self.leave} and {self.enter}")

    def update(self, found: Mapping[int, float]) -> None:
        """Take in the evidence of one round.

        Parameters
        ----------
        found : mapping of client to float
            At least 0, for every client that took part; what is known of the others stays.
        """
        for client, new in found.items():
            self.evidence[client] = self.decay * self.evidence.get(client, 0.0) + new
        grave = {c for c, e in self.evidence.items() if e >= self.enter}
        kept = {c for c in self.quarantined if self.evidence[c] >= self.leave}
        worst_first = sorted(grave | kept, key=lambda c: (-self.evidence[c], c))
        self.quarantined = frozenset(worst_first[: (len(self.evidence) - 1) // 2])


def weigh(
    participants: Iterable[int],
    suspected: Mapping[int, bool],
    named: Collection[int],
    certified: bool,
) -> dict[int, float]:
    """Evidence of one round against each participant, 0 or 1.

    A client counts as named if its own report incriminates it and no minority can have framed it,
    if its update does and the attack that it was compared under is certified, or if both do.

    Parameters
    ----------
    participants : iterable of int
    suspected : mapping of client to bool
        Whose reports look poisoned, and whether that is certified.
    named : collection of int
        Whose updates stand out where the backdoor lives.
    certified : bool
        Whether the attack that those were compared under is certified.
    """
    return {
        client: float(
            suspected.get(client, False) or (client in named and (certified or client in suspected))
        )
        for client in participants
    }
