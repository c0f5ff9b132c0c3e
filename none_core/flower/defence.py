"""One defended round on the server: admit replies, query, decide, reset, guard, record."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor, nn

from none_core.activations import TRIGGER_SHIFT, ReportSpec
from none_core.attribution import Part, Scene, distances, scene_of
from none_core.decision import (
    Decision,
    Policy,
    Reputation,
    accuracy_loss,
    decide,
    finish,
    halve,
    share_out,
    weigh,
)
from none_core.detection import DETECTORS, Detection, Detector, Standing
from none_core.detection.base import IntArray, Recent
from none_core.flower import messages
from none_core.flower.inquiry import Answers, Question, ask
from none_core.flower.rounds import RoundRecord, audit_entry
from none_core.flower.validation import Template, admit, template_of
from none_core.neurons import HOWS, NeuronMap
from none_core.order_statistics import most_liars
from none_core.purification import SampleFilter, build_filter
from none_core.refusal import Refusal
from none_core.repair import FEWEST, repaired, touched
from none_core.snapshot import SnapshotError, plain, restored
from none_core.trail import digest_of_model
from none_core.trigger_inversion import Probe
from none_core.undo import Undo

_FEWEST_HINTING = 2  # clients to whom a class must look attacked for the others to look harder
_MOST_HINTS = 3  # classes that clients are asked to look harder at, since some of them may lie

AuditSink = Callable[[dict[str, Any]], None]
Again = Callable[[Collection[int]], ArrayRecord | None]  # aggregate without some nodes' replies


@dataclass(frozen=True)
class _Sighting:
    """A class that looked attacked in a probe.

    Attributes
    ----------
    label : int
    server_round : int
    apart : tuple of int
        Clients whose updates stood out there, and who were not in quarantine.
    certified : bool
        Whether no minority can have made it up.
    """

    label: int
    server_round: int
    apart: tuple[int, ...]
    certified: bool


@dataclass(frozen=True)
class _Probed:
    """What the last probe saw.

    Attributes
    ----------
    labels : frozenset of int
        Attacked classes.
    hints : tuple of int
        Classes that look attacked to some, those first to whom most say so.
    news : bool
        Whether there is one among them that the probe before did not have.
    """

    labels: frozenset[int] = frozenset()
    hints: tuple[int, ...] = ()
    news: bool = False


# What a defence knows at the end of a round and needs in the next. Everything else that it keeps is
# a setting, or of one round only.
_SURVIVES = (
    *("_reputation", "_accuracy", "_probed", "_sightings", "_generator"),
    *("_scene", "_scene_certified", "_watched_until", "_resets"),
    *("_filter", "_filter_undo", "_filter_suspicions", "_left_over", "_spoken_of"),
)
_CLASSES = (Reputation, Scene, Part, _Probed, _Sighting, SampleFilter, Undo)


class Defence:
    """NONE's server half, to be driven by a strategy; see :class:`~none_core.flower.NoneStrategy`.

    Parameters
    ----------
    model_fn : callable
        Builds the global model's architecture; its weights do not matter.
    example_input : Tensor
        One batch as the model takes it, to trace the model with; its values do not matter.
    detector : str or Detector
        A name in ``none_core.detection.DETECTORS``, or an instance.
    reset : {"zero", "init"}
        What reset weights become. Zeroed units of a ReLU network stay out of use, so an attacker
        cannot use them again; re-drawn ones can learn anew, also for the attacker.
    policy : Policy, optional
    memory : int
        Rounds for which it is remembered that a class looked attacked, >= 0: seen again by then, it
        is confirmed if one client's update stood out there both times. Two probes in a row that see
        it confirm it whoever stands out.
    purify : bool
        Send suspected clients (and, with a laxer threshold, all others) a filter for their samples.
    purify_threshold : float
        Lambda for suspected clients, in standard deviations. At 0 half of their clean samples of
        the label go too: most samples there are poisoned, and a missed one costs far more.
    purify_others : float
        Lambda for the other clients.
    repair : bool
        Where reports or triggers speak of a backdoor, aggregate by the clients' median.
    repair_share : float
        Share of each layer's neurons whose incoming weights a repair takes the median of, (0, 1].
    quarantine : bool
        Leave out the updates of clients that were named repeatedly.
    reaggregate : bool
        Leave out those of clients that a round's own reports name, by aggregating it again; only
        with `quarantine`.
    reputation : Reputation, optional
        How evidence against clients accumulates and fades.
    liars : int, optional
        Known bound on the number of malicious clients, for certificates; without one any minority
        may be. One that is no minority of those asked in round 1 is refused there.
    probe_steps, probe_images : int
        Cost of a client's trigger inversion, for detectors that ask for one.
    share_probes : bool
        Have each class looked at by 2f + 1 clients only, ``f`` being ``liars``, in turn: cheaper if
        that is known and small.
    min_count : int
        Clients leave labels with fewer samples out of their reports.
    timeout : float
        Seconds to wait for reports.
    max_samples : int
        Largest credible number of samples in a report.
    max_weight_ratio : float
        Largest credible multiple of the median number of examples: replies that claim more are
        refused.
    full_weight_ratio : float
        Multiple of it that a client is weighed by at most, >= 1, whatever it claims below that.
    layers : sequence of str, optional
        Restrict the defence to these layers of the model.
    neuron_map : NeuronMap, optional
        For models that cannot be traced: a map by ``NeuronMap.from_modules``.
    seed : int
        For ``reset="init"``.
    audit : callable, optional
        Called with one JSON-ready dict per decision; a ``none_core.trail.Trail``, say.
    """

    def __init__(
        self,
        model_fn: Callable[[], nn.Module],
        example_input: Tensor,
        *,
        detector: str | Detector = "mixture+inversion",
        reset: Literal["zero", "init"] = "zero",
        policy: Policy | None = None,
        memory: int = 6,
        purify: bool = True,
        purify_threshold: float = 0.0,
        purify_others: float = 3.0,
        repair: bool = True,
        repair_share: float = 0.4,
        quarantine: bool = True,
        reaggregate: bool = True,
        reputation: Reputation | None = None,
        liars: int | None = None,
        probe_steps: int = 30,
        probe_images: int = 8,
        share_probes: bool = False,
        min_count: int = 5,
        timeout: float = 600.0,
        max_samples: int = 10_000_000,
        max_weight_ratio: float = 10.0,
        full_weight_ratio: float = 3.0,
        layers: list[str] | None = None,
        neuron_map: NeuronMap | None = None,
        seed: int = 0,
        audit: AuditSink | None = None,
    ) -> None:
        if isinstance(detector, str):
            if detector not in DETECTORS:
                raise ValueError(f"detector must be one of {sorted(DETECTORS)}, got {detector!r}")
            detector = DETECTORS[detector]()
        if reset not in HOWS:
            raise ValueError(f"reset must be one of {HOWS}, got {reset!r}")
        if min_count < 1:
            raise ValueError(f"min_count must be >= 1, got {min_count}")
        if memory < 0:
            raise ValueError(f"memory must be >= 0 rounds, got {memory}")
        if timeout <= 0:
            raise ValueError(f"timeout must be > 0 seconds, got {timeout}")
        if liars is not None and liars < 0:
            raise ValueError(f"liars must be >= 0, got {liars}")
        if not 0 < repair_share <= 1:
            raise ValueError(f"repair_share must be in (0, 1], got {repair_share}")
        if max_weight_ratio <= 1:
            raise ValueError(f"max_weight_ratio must be > 1, got {max_weight_ratio}")
        if not full_weight_ratio >= 1:
            raise ValueError(f"full_weight_ratio must be >= 1, got {full_weight_ratio}")
        self.detector, self.how, self.policy = detector, reset, policy or Policy()
        self.memory = memory
        self.purify, self.purify_threshold, self.purify_others = (
            purify,
            purify_threshold,
            purify_others,
        )
        self.repair, self.repair_share = repair, repair_share
        self.quarantine, self.reaggregate, self.liars = quarantine, reaggregate, liars
        self.share_probes = share_probes
        self.min_count, self.timeout = min_count, timeout
        self.max_samples, self.max_weight_ratio = max_samples, max_weight_ratio
        self.full_weight_ratio = full_weight_ratio
        self.audit = audit
        self.last_round: int | None = None
        self.record = RoundRecord(0)

        self._model = model_fn().eval()
        self.neurons = neuron_map or NeuronMap.trace(self._model, example_input, layers)
        self.layer_of = self.neurons.layer_of(np.arange(self.neurons.size))
        self._shape = tuple(example_input.shape[1:])
        with torch.inference_mode():
            labels = int(self._model(example_input).shape[1])
        self.spec = ReportSpec(self.neurons.size, labels, detector.statistics)
        self.probe = Probe(tuple(range(labels)), steps=probe_steps, images=probe_images)
        self._fresh_reputation = reputation or Reputation()
        self._reputation = _fresh(self._fresh_reputation)
        self._accuracy = 0.0  # the median client's at the last query
        self._probed = _Probed()
        self._sightings: tuple[_Sighting, ...] = ()  # of the last rounds
        self._scene: Scene | None = None  # where the last confirmed attack was seen ...
        self._scene_certified = False  # ... whether no minority can have made it up ...
        self._watched_until = 0  # ... and the last round in which all are compared there
        self._resets = 0  # that this attack has led to
        self._left_over: IntArray = np.empty(0, dtype=np.int64)  # compromised, not reset yet
        self._spoken_of: frozenset[int] = frozenset()  # classes with a backdoor, some say
        self._trained: dict[int, ArrayRecord] = {}  # this round's valid models ...
        self._let_in: set[int] = set()  # ... and whose of them are aggregated
        self._generator = torch.Generator().manual_seed(seed)
        self._grid: Grid | None = None
        self._nodes: list[int] = []
        self._template: Template = {}
        self._filter: SampleFilter | None = None
        self._filter_undo = Undo({}, {})
        self._filter_suspicions: dict[int, set[int]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what the next round needs of the ones before, as a tree of plain values.

        Taken after a round and given to :meth:`load_state_dict` of a defence with the same
        settings, in whatever process, that one goes on as this one would have.
        ``none_core.snapshot`` writes it to a file and reads it.
        """
        return {name: plain(getattr(self, name), _CLASSES) for name in _SURVIVES}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another defence was.

        Raises
        ------
        SnapshotError
            If this is not the state of a defence.
        """
        if state.keys() != set(_SURVIVES):
            differing = sorted(state.keys() ^ set(_SURVIVES))
            raise SnapshotError(f"this is not what a defence keeps: {differing} differ")
        values = {name: restored(state[name], _CLASSES) for name in _SURVIVES}
        for name, value in values.items():
            setattr(self, name, value)

    # --- the three moments of a round, in the order in which a strategy meets them ---------------

    def configured(
        self, server_round: int, arrays: ArrayRecord, outgoing: Iterable[Message], grid: Grid
    ) -> list[Message]:
        """Remember who trains what, and put the filter on the train messages."""
        self.record = RoundRecord(server_round)
        if server_round == 1:  # a new run knows nothing
            self._filter, self._scene, self._accuracy = None, None, 0.0
            self._probed, self._sightings, self._watched_until = _Probed(), (), 0
            self._scene_certified, self._resets = False, 0
            self._left_over, self._spoken_of = self._left_over[:0], frozenset()
            self._reputation = _fresh(self._fresh_reputation)
        if self.quarantine:  # also in rounds that do not query, or not with success
            self.record.quarantined = sorted(self._reputation.quarantined)
        self._grid = grid
        self._check_model(arrays)
        self._template = template_of(arrays)
        outgoing = list(outgoing)
        self._nodes = list(dict.fromkeys(message.metadata.dst_node_id for message in outgoing))
        if server_round == 1:
            self._check_liars(len(self._nodes))
        if self._filter is not None:
            for message in outgoing:
                message.content = self._with_filter(message, self._filter, server_round)
        self._filter = None  # it describes this model and no later one
        return outgoing

    def admitted(self, replies: Iterable[Message], weighted_by: str) -> list[Message]:
        """Let in the train replies that the inner strategy can safely aggregate."""
        valid, refused = admit(
            replies,
            self._template,
            asked=set(self._nodes),
            weighted_by=weighted_by,
            max_weight_ratio=self.max_weight_ratio,
            full_weight_ratio=self.full_weight_ratio,
        )
        self._refuse(refused)
        for message in valid:
            if message.has_content() and messages.PURIFIED in message.content.config_records:
                dropped = message.content.config_records[messages.PURIFIED].get("dropped")
                if isinstance(dropped, int) and 0 <= dropped <= self.max_samples:
                    self.record.purified[message.metadata.src_node_id] = dropped
        self._trained = {
            message.metadata.src_node_id: next(
                iter(messages.copied(message.content).array_records.values())
            )
            for message in valid
            if message.has_content()
        }
        out = self._excluded
        self._let_in = self._trained.keys() - out
        return [message for message in valid if message.metadata.src_node_id not in out]

    def defended(self, arrays: ArrayRecord, again: Again | None = None) -> ArrayRecord:
        """Give the aggregated model its old dtypes back, and reset what must be reset.

        Parameters
        ----------
        arrays : ArrayRecord
            The aggregated model.
        again : callable, optional
            Aggregates this round again without some nodes' replies; None if it cannot.
        """
        arrays = self._with_dtypes(arrays)
        server_round = self.record.server_round
        if not self.policy.queries(server_round, self.last_round):
            return arrays
        answers = self._ask(arrays, self._spec_now())
        record, reports = self.record, answers.reports
        record.asked, record.reports = answers.asked, len(reports)
        record.missing, record.declined = answers.missing, answers.declined
        record.patterns = answers.patterns
        needed = self.policy.needed(record.asked)
        if len(reports) < needed:
            decision = (
                f"kept the aggregated model: {len(reports)} valid reports of "
                f"{record.asked} asked, quorum is {needed}"
            )
            log(WARNING, "NONE round %s: %s", server_round, decision)
            self._close(decision, arrays, arrays, arrays)
            return arrays
        summaries = {client: answer.summary for client, answer in reports.items()}
        recent = self._recent
        detection = self._detect(summaries, recent)
        sightings = self._seen(detection)
        if again_seen := self._remembered(sightings) - recent.expected:
            recent = replace(recent, sighted=recent.sighted | again_seen)
            detection = self._detect(summaries, recent)
        record.detection = detection
        accuracy = {c: a.accuracy for c, a in reports.items() if c not in self._excluded}
        self._accuracy = float(np.median(list(accuracy.values()) or [0.0]))
        confirmed, named = self._attribute(detection, sightings, recent)
        asked_about, judged = arrays, messages.state_of(arrays)
        arrays = self._without(named, arrays, again)
        planned = decide(
            detection, self.layer_of, self.policy, accuracy=self._accuracy, confirmed=confirmed
        )
        if not planned.neurons.size and self._accuracy >= self.policy.min_accuracy:
            planned = finish(planned, self._left_over, self.layer_of, self.policy)
        before, aggregated = messages.state_of(arrays), arrays
        after, neurons, decision = self._guarded(
            before, self._repaired(before, detection), planned, accuracy
        )
        self._resets += bool(neurons.size) and confirmed
        if confirmed:
            self._left_over = detection.compromised[
                detection.certainty[detection.compromised] == Standing.CERTIFIED
            ]
        self._left_over = self._left_over[~np.isin(self._left_over, neurons)]
        if not neurons.size or server_round > self._watched_until:
            self._left_over = self._left_over[:0]
        if record.left_out:
            decision = f"aggregated again without {len(record.left_out)} clients; {decision}"
        if after is not before:
            record.neurons_reset, record.before = neurons, before
            arrays = messages.record_of(after)
        if self.purify:
            self._filter = build_filter(detection, self.layer_of, threshold=self.purify_others)
            self._filter_undo = Undo.between(judged, after)  # to the model that it was made with
        digests = {client: answer.digest for client, answer in reports.items()}
        self._close(decision, asked_about, aggregated, arrays, digests)
        return arrays

    def skipped(self) -> None:
        """Record that no model came out of this round, so that there was none to ask about."""
        self._close("kept the previous model: no train reply could be aggregated")

    def metrics(self) -> MetricRecord:
        """Figures of the round under names that start with ``none-``, for existing dashboards."""
        record = self.record
        alive = record.detection is not None and record.detection.alive
        return MetricRecord(
            {
                "none-reports": record.reports,
                "none-missing": record.missing,
                "none-declined": len(record.declined),
                "none-refused": len(record.refused),
                "none-suspected": len(record.suspected),
                "none-alive": int(alive),
                "none-neurons-reset": int(record.neurons_reset.size),
                "none-left-out": len(record.left_out),
                "none-quarantined": len(record.quarantined),
                "none-samples-dropped": sum(record.purified.values()),
            }
        )

    def summary(self) -> None:
        """Log the settings as a tree, as Flower's strategies do."""
        policy = self.policy
        log(INFO, "\t├──> NONE:")
        log(INFO, "\t│\t├── Detector: %s | reset: %s", self.detector.name, self.how)
        log(INFO, "\t│\t├── Neurons: %s in %s layers", self.neurons.size, len(self.neurons.layers))
        log(INFO, "\t│\t├── Query: every %s from round %s", policy.every, policy.start_round)
        log(INFO, "\t│\t├── Quorum: %.2f | guard: %.3f", policy.quorum, policy.guard)
        log(INFO, "\t│\t├── Budget: %.2f of a layer per round", policy.budget)
        log(INFO, "\t│\t├── Quarantine: %s", "ON" if self.quarantine else "OFF")
        at_once = self.quarantine and self.reaggregate
        log(INFO, "\t│\t├── Leaving out at once: %s", "ON" if at_once else "OFF")
        log(INFO, "\t│\t└── Sample filter: %s", "ON" if self.purify else "OFF")

    # --- steps ------------------------------------------------------------------------------------

    def _spec_now(self) -> ReportSpec:
        """Choose what to ask for: triggers now and then, and of a model that knows something."""
        due = self.policy.probes(self.record.server_round, self.last_round)
        mature = self._accuracy >= self.policy.min_accuracy
        others = self.spec.statistics - {TRIGGER_SHIFT}
        called_for = due or self._recent.expected or self._probed.news
        if (mature and called_for) or not others:
            return self.spec
        return replace(self.spec, statistics=others)

    @property
    def _recent(self) -> Recent:
        """What earlier queries saw."""
        over = self.record.server_round > self._watched_until
        if self._scene is None or over or self._resets > self.policy.follow_ups:
            return Recent(self._probed.labels)
        return Recent(self._probed.labels, frozenset({self._scene.label}))

    @property
    def _excluded(self) -> frozenset[int]:
        """Clients whose updates are left out, and who have no say in what is reset."""
        return self._reputation.quarantined if self.quarantine else frozenset()

    def _detect(self, summaries: dict[int, Any], recent: Recent) -> Detection:
        """Look at the reports; what quarantined clients say speaks against themselves alone."""
        trusted = {c: s for c, s in summaries.items() if c not in self._excluded}
        if not trusted or len(trusted) == len(summaries):
            return self.detector.detect(summaries, self.layer_of, self.liars, recent)
        everyone = self.detector.detect(summaries, self.layer_of, self.liars, recent)
        detection = self.detector.detect(trusted, self.layer_of, self.liars, recent)
        return replace(
            detection,
            suspicions=everyone.suspicions,
            client_evidence=everyone.client_evidence,
        )

    def _seen(self, detection: Detection) -> tuple[_Sighting, ...]:
        """Which classes look attacked, and whose updates stand out there."""
        return tuple(
            _Sighting(
                attack.label,
                self.record.server_round,
                tuple(
                    client
                    for client in self._apart(self._scene_where(detection, attack.label))
                    if client not in self._excluded
                ),
                attack.certified,
            )
            for attack in detection.attacks
        )

    def _remembered(self, sightings: Iterable[_Sighting]) -> frozenset[int]:
        """Classes that looked attacked a few rounds ago, when the same client stood out there.

        A probe can miss a backdoor that the one before has seen, so that two in a row never see it.
        Whoever stands out both times is a second witness to it, and one that reports alone cannot
        make up: an attacker who lends his update to a framed class is named for it.
        """
        since = self.record.server_round - self.memory
        return frozenset(
            now.label
            for now in sightings
            for then in self._sightings
            if then.label == now.label
            and then.server_round >= since
            and not set(then.apart).isdisjoint(now.apart)
        )

    def _attribute(
        self, detection: Detection, sightings: tuple[_Sighting, ...], recent: Recent
    ) -> tuple[bool, list[int]]:
        """Hold this round's evidence against the clients.

        Returns whether an attack is confirmed, and whom of those that were let in this round's
        evidence names.

        Updates are compared where a confirmed attack was seen, and some rounds longer. What they
        showed when it was first seen counts as soon as it is confirmed. Clients in quarantine are
        compared there for ever: so they are cleared once they stop.
        """
        record, reputation = self.record, self._reputation
        excluded = self._excluded
        expected = [a for a in detection.attacks if a.label in recent.expected]
        stood_out = self._stood_out({attack.label for attack in expected})
        confirmed = bool(expected)
        if confirmed:
            worst = max(expected, key=lambda attack: attack.strength)
            self._scene = self._scene_where(detection, worst.label)
            self._scene_certified = any(attack.certified for attack in expected)
            self._watched_until = record.server_round + self.policy.watch
        watching = record.server_round <= self._watched_until
        apart = self._apart(self._scene) if self._scene else []
        named = [client for client in apart if watching or client in excluded]
        suspected: dict[int, bool] = {}
        for s in detection.suspicions:
            suspected[s.client] = s.certified or suspected.get(s.client, False)
        found = weigh(self._nodes, suspected, named, self._scene_certified)
        now = [client for client, weight in found.items() if weight and client in self._let_in]
        for client in found.keys() & stood_out:
            found[client] += reputation.decay
        reputation.update(found)
        if detection.shifts:  # this query looked for triggers
            hints = {k: n for k, n in detection.hints.items() if n >= _FEWEST_HINTING}
            ranked = sorted(
                hints, key=lambda k: (-hints[k], (k - record.server_round) % self.spec.labels)
            )
            news = not hints.keys() <= set(self._probed.hints)
            seen = frozenset(attack.label for attack in detection.attacks)
            self._probed = _Probed(seen, tuple(ranked), news)
        since = record.server_round - self.memory
        self._sightings = tuple(s for s in self._sightings if s.server_round > since) + sightings
        record.named = named
        record.evidence = {client: reputation.evidence[client] for client in sorted(found)}
        if self.quarantine:
            record.quarantined = sorted(reputation.quarantined)
            for client in sorted(reputation.quarantined - excluded):
                log(WARNING, "NONE round %s: node %s is quarantined", record.server_round, client)
            for client in sorted(excluded - reputation.quarantined):
                log(INFO, "NONE round %s: node %s is cleared", record.server_round, client)
        return confirmed, now

    def _stood_out(self, labels: Collection[int]) -> set[int]:
        """Clients that stood out when these classes last looked attacked, and no attack was known.

        That is not held against them yet; what they do while one is known has been, every time.
        """
        earlier = [
            then
            for then in self._sightings
            if then.label in labels and then.certified and then.server_round > self._watched_until
        ]
        last = max((then.server_round for then in earlier), default=0)
        return {client for then in earlier if then.server_round == last for client in then.apart}

    def _without(self, named: list[int], arrays: ArrayRecord, again: Again | None) -> ArrayRecord:
        """Aggregate this round again without those whom its own evidence names.

        Quarantine takes two namings and begins with the next round; what a backdoor gets into the
        model before that, training does not soon take out again. The update of an honest client
        that is named by mistake is missed in one round. Fewer than half are ever left out.
        """
        if again is None or not (self.quarantine and self.reaggregate):
            return arrays
        already = len(self._trained) - len(self._let_in)
        most = max(0, (len(self._trained) - 1) // 2 - already)
        evidence = self._reputation.evidence
        left_out = sorted(sorted(named, key=lambda client: (-evidence[client], client))[:most])
        second = again(left_out) if left_out else None
        if second is None:
            return arrays
        self.record.left_out = left_out
        log(WARNING, "NONE round %s: left out %s", self.record.server_round, left_out)
        return self._with_dtypes(second)

    def _scene_where(self, detection: Detection, label: int) -> Scene:
        """Find where the backdoor to a class lives."""
        shapes = {name: shape for name, (_, shape) in self._template.items()}
        return scene_of(self.neurons, detection.shifts[label], label, shapes)

    def _apart(self, scene: Scene) -> list[int]:
        """Clients whose updates stand out in a scene, ascending."""
        clients = sorted(self._trained)
        if len(clients) < 3:
            return []
        names = {part.name for part in (*scene.entrances, *scene.exits)}
        states = [
            {n: messages.read_array(self._trained[c][n], *self._template[n]) for n in names}
            for c in clients
        ]
        far = distances(states, scene) >= self.policy.apart
        return [client for client, is_far in zip(clients, far, strict=True) if is_far]

    def _ask(self, arrays: ArrayRecord, spec: ReportSpec) -> Answers:
        """Ask this round's participants about a model."""
        assert self._grid is not None
        probes = self._probes() if TRIGGER_SHIFT in spec.statistics else {}
        answers = ask(
            self._grid,
            self._nodes,
            Question(arrays, spec, self.min_count, self.record.server_round, self.max_samples),
            self.detector,
            timeout=self.timeout,
            probes=probes,
            shape=self._shape,
            unheard=self._excluded,
        )
        self._refuse(answers.refused)
        return answers

    def _check_liars(self, clients: int) -> None:
        """Refuse a bound that leaves no honest majority; later rounds may well have fewer clients.

        Raises
        ------
        ValueError
            If it does not.
        """
        most = most_liars(clients)
        if self.liars is not None and self.liars > most:
            raise ValueError(
                f"liars must be at most {most} of {clients} clients, got {self.liars}: the defence "
                "needs an honest majority"
            )

    def _scenes(self, detection: Detection) -> list[Scene]:
        """Find where any backdoor lives that is spoken of twice in a row, however uncertain."""
        shifts = {a.label: detection.shifts[a.label] for a in detection.attacks}
        for s in detection.suspicions:
            if s.client not in self._excluded:
                known = shifts.get(s.label, np.full(len(self.layer_of), -np.inf))
                shifts[s.label] = np.fmax(known, s.shift)
        again, self._spoken_of = shifts.keys() & self._spoken_of, frozenset(shifts)
        shapes = {name: shape for name, (_, shape) in self._template.items()}
        return [
            scene_of(self.neurons, shifts[k], k, shapes, self.repair_share) for k in sorted(again)
        ]

    def _repaired(self, before: dict[str, Tensor], detection: Detection) -> dict[str, Tensor]:
        """Put the clients' median where a backdoor may live; ``before`` itself if nowhere."""
        out = self._excluded.union(self.record.left_out)
        trained = [arrays for c, arrays in self._trained.items() if c not in out]
        scenes = self._scenes(detection) if self.repair else []
        if not scenes or len(trained) < FEWEST:
            return before
        self.record.repaired = [scene.label for scene in scenes]
        self.record.repaired_rows = touched(scenes)
        states = [
            {n: messages.read_array(arrays[n], *self._template[n]) for n in touched(scenes)}
            for arrays in trained
        ]
        return repaired(before, states, scenes)

    def _probes(self) -> dict[int, Probe]:
        """Choose what each of this round's participants looks for."""
        hard, watched = self._probed.hints[:_MOST_HINTS], tuple(sorted(self._recent.watched))
        probe = replace(self.probe, hard=hard, watched=watched)
        if not self.share_probes:
            return dict.fromkeys(self._nodes, probe)
        # Whom nobody listens to looks at everything: only its own evidence is read.
        heard = [node for node in self._nodes if node not in self._excluded] or self._nodes
        each = 2 * most_liars(len(heard), self.liars) + 1
        shares = share_out(probe.labels, heard, each, self.record.server_round)
        everybody = {*hard, *watched, *self._recent.expected}
        return {
            node: replace(probe, labels=tuple(sorted(everybody.union(shares[node]))))
            if node in shares
            else probe
            for node in self._nodes
        }

    def _guarded(
        self,
        before: dict[str, Tensor],
        repaired_state: dict[str, Tensor],
        planned: Decision,
        accuracy: dict[int, float],
    ) -> tuple[dict[str, Tensor], IntArray, str]:
        """Repair, and reset as much as the median client's accuracy allows; ``before`` if nothing.

        Returns
        -------
        tuple
            The state dict, the neurons that were reset, and a sentence on what was done.
        """
        neurons, reason = planned.neurons, planned.reason
        if repaired_state is before and not neurons.size:
            return before, neurons, reason
        record, tried = self.record, []
        if record.left_out:  # what was asked about is another model
            accuracy = self._accuracies(before)
        while True:
            after = self._reset(repaired_state, neurons)
            loss = accuracy_loss(accuracy, self._accuracies(after))
            if loss <= self.policy.guard:
                did = [f"reset {len(neurons)}"] if neurons.size else []
                if record.repaired:
                    did.insert(0, f"took the median for class {_listed(record.repaired)}")
                reason += f"; {' and '.join(did)} at {100 * loss:.1f} points of accuracy"
                break
            if math.isnan(loss):
                reason += "; nobody said what a change would cost, so none was made"
            elif neurons.size:
                tried.append(f"{len(neurons)} would have cost {100 * loss:.1f} points")
                neurons = halve(neurons, self.layer_of)
                if neurons.size or repaired_state is not before:
                    continue
            else:
                tried.append(f"the median alone would have cost {100 * loss:.1f} points")
            after, neurons, record.repaired = before, neurons[:0], []
            break
        if tried:
            reason += f" ({', '.join(tried)})"
        return after, neurons, reason

    def _accuracies(self, state: dict[str, Tensor]) -> dict[int, float]:
        """Ask this round's participants how many of their samples a model is right about."""
        predictions = ReportSpec(self.spec.neurons, self.spec.labels)
        answers = self._ask(messages.record_of(state), predictions).reports
        return {c: a.accuracy for c, a in answers.items() if c not in self._excluded}

    def _reset(self, before: dict[str, Tensor], neurons: IntArray) -> dict[str, Tensor]:
        self._model.load_state_dict(before)
        if neurons.size:
            self.neurons.reset(self._model, neurons, self.how, self._generator)
        state = self._model.state_dict()
        return {name: state[name].clone() for name in before}  # in the order that strategies know

    def _with_filter(
        self, message: Message, sample_filter: SampleFilter, server_round: int
    ) -> RecordDict:
        node = message.metadata.dst_node_id
        suspicions = self._filter_suspicions
        mine = sample_filter.for_client(suspicions.get(node, set()), self.purify_threshold)
        content = RecordDict(dict(message.content))
        content.update(messages.filter_content(mine, self._filter_undo, server_round))
        return content

    def _check_model(self, arrays: ArrayRecord) -> None:
        state = self._model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        sent = {name: tuple(array.shape) for name, array in arrays.items()}
        if shapes != sent:
            differing = sorted(
                name for name in shapes.keys() | sent.keys() if shapes.get(name) != sent.get(name)
            )
            raise ValueError(
                f"model_fn builds another model than the one that is trained: {differing[:5]} "
                f"differ in name or shape. NONE needs the whole state_dict in the ArrayRecord."
            )

    def _with_dtypes(self, arrays: ArrayRecord) -> ArrayRecord:
        """Undo what Flower does to integer arrays, whose averages come back as float64."""
        for name, (dtype, _) in self._template.items():
            if arrays[name].dtype != str(dtype):
                values = arrays[name].numpy()
                if dtype.kind in "iu":
                    values = np.rint(values)
                # numpy turns an array without dimensions into a scalar.
                arrays[name] = Array(np.asarray(values, dtype))
        return arrays

    def _refuse(self, refused: list[Refusal]) -> None:
        for refusal in refused:
            log(WARNING, "NONE round %s: %s", self.record.server_round, refusal)
        self.record.refused += refused

    def _close(
        self,
        decision: str,
        asked_about: ArrayRecord | None = None,
        aggregated: ArrayRecord | None = None,
        released: ArrayRecord | None = None,
        digests: dict[int, str] | None = None,
    ) -> None:
        record, detection = self.record, self.record.detection
        record.decision = decision
        suspicions = detection.suspicions if detection else ()
        self._filter_suspicions = {}
        for suspicion in suspicions:
            self._filter_suspicions.setdefault(suspicion.client, set()).add(suspicion.label)
        log(INFO, "NONE round %s: %s", record.server_round, decision)
        if self.audit is None:
            return
        before = _model_digest(aggregated)
        about = before if asked_about is aggregated else _model_digest(asked_about)
        reset = [
            (self.neurons.label(int(j)), self.neurons.rows(self._model, int(j)))
            for j in record.neurons_reset
        ]
        self.audit(
            {
                **audit_entry(record, reset),
                "reports": {str(node): digest for node, digest in (digests or {}).items()},
                "budget": self.policy.budget,
                "how": self.how,
                "asked_about": about,
                "aggregated": before,
                "released": before if released is aggregated else _model_digest(released),
            }
        )


def _fresh(reputation: Reputation) -> Reputation:
    """Return one with the same settings that knows nobody."""
    return replace(reputation, evidence={}, quarantined=frozenset())


def _listed(labels: list[int]) -> str:
    return " and ".join(str(label) for label in labels)


def _model_digest(arrays: ArrayRecord | None) -> str | None:
    return None if arrays is None else digest_of_model(messages.state_of(arrays))
