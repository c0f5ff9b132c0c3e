"""NONE on one machine, for whoever has a training loop: find the backdoor, and take it out.

Source: Wang et al., "Training with More Confidence: Mitigating Injected and Natural Backdoors
During Training", NeurIPS 2022, Algorithm 1. Neurons, activations, detection, decision and the
sample filter are those of the federated defence: here groups of samples stand in for clients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from none_core.activations import (
    TRIGGER_SHIFT,
    Report,
    ReportBuilder,
    ReportSpec,
    spatial_maximum,
)
from none_core.batches import Batch, in_order, unchanged
from none_core.decision import Decision, Policy, decide
from none_core.detection import DETECTORS, Detector
from none_core.detection.base import Detection, FloatArray, IntArray, Recent
from none_core.modes import evaluating
from none_core.neurons import HOWS, NeuronMap, Reader
from none_core.separation import Split, Usual, as_filter, diversity, separate, usual_variety
from none_core.trigger_inversion import Probe, Triggers, probe_model

_GROUPS = 5  # pseudo-clients; samples that stand apart are the last one's
_PROBING = 3  # of them, those that look for triggers, where the detector wants that
_PROBED = 512  # samples that each looks at ...
_STEPS, _IMAGES = 60, 16  # ... in so many steps of so many a class
_BUDGET = 0.1  # of a layer
DEAD = 0.05  # of the dropped samples: if no more obey, the backdoor is gone
_MEMORY = 1 << 28  # bytes for the values of the samples that are compared


@dataclass(frozen=True, eq=False)
class Cleansing:
    """What one look at a model led to.

    Attributes
    ----------
    reason : str
        One sentence.
    neurons : ndarray of int64
        Reset, the worst first; indices of the neuron map.
    scores : ndarray
        How compromised each neuron looked, (J,).
    dropped : ndarray of int64
        Samples that are not to be trained on any more, ascending; indices of the data set.
    strengths : dict of int to float
        For each label how far its two groups of samples stand apart; see
        :class:`~none_core.separation.Split`.
    """

    reason: str
    neurons: IntArray
    scores: FloatArray = field(repr=False)
    dropped: IntArray = field(repr=False)
    strengths: dict[int, float]

    @property
    def found(self) -> bool:
        """Whether there was anything to remove."""
        return bool(self.neurons.size or self.dropped.size)


class Cleanser:
    """Looks at a model that was trained, and takes out what looks like a backdoor.

    Algorithm 1, lines 4 to 18, for whoever has a training loop of their own::

        cleanser = Cleanser(model, example_input)
        cleansing = cleanser.cleanse(model, dataset)
        keep_training_without(cleansing.dropped)

    1. The samples of each label are separated in the two groups that stand apart most.
    2. The samples are dealt to a few pseudo-clients. Where a label's groups stand apart further
       than one kind of samples does, the foreign one goes to a pseudo-client of its own.
    3. The detector looks at the pseudo-clients' reports as it looks at clients'. Only if it sees a
       backdoor alive in the model anything is done.
    4. The compromised neurons are reset, as far as the budget goes, and those groups dropped, or of
       them those that it suspects and those that stand apart beyond doubt, if it looks at groups
       one by one.

    Parameters
    ----------
    model : nn.Module
        Of the architecture that is trained; its weights do not matter, and it is not kept.
    example_input : Tensor
        One batch as the model takes it.
    detector : str or Detector
        A name in ``none_core.detection.DETECTORS``, or an instance.
    policy : Policy, optional
        Of which ``min_accuracy`` and the budgets are used; by default at most a tenth of a layer is
        reset at once, since training follows.
    strength : float
        From which on two groups stand apart further than samples of one kind do, > 0.
    certain : float
        From which on, and from `strength` on, the foreign group of a label is dropped although the
        detector names other labels only, > 0.
    reset : {"zero", "init"}
        What reset weights become.
    neuron_map : NeuronMap, optional
        For models that cannot be traced.
    prepare : callable
        Applied to each batch of inputs.
    batch_size : int
    seed : int
        Chooses which samples are compared where there are too many, and draws re-drawn weights.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> data = torch.utils.data.TensorDataset(torch.eye(4).repeat(9, 1), torch.arange(36) % 3)
    >>> Cleanser(model, torch.zeros(1, 4)).cleanse(model, data).dropped.size
    0
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        *,
        detector: str | Detector = "mixture",
        policy: Policy | None = None,
        strength: float = 7.0,
        certain: float = 10.0,
        reset: Literal["zero", "init"] = "zero",
        neuron_map: NeuronMap | None = None,
        prepare: Callable[[Tensor], Tensor] = unchanged,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        if isinstance(detector, str):
            if detector not in DETECTORS:
                raise ValueError(f"detector must be one of {sorted(DETECTORS)}, got {detector!r}")
            detector = DETECTORS[detector]()
        if reset not in HOWS:
            raise ValueError(f"reset must be one of {HOWS}, got {reset!r}")
        if not strength > 0:
            raise ValueError(f"strength must be > 0, got {strength}")
        if not certain > 0:
            raise ValueError(f"certain must be > 0, got {certain}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.detector, self.strength, self.certain = detector, strength, certain
        self.policy = policy or Policy(budget=_BUDGET, certified_budget=_BUDGET)
        self.how, self.prepare, self.batch_size, self.seed = reset, prepare, batch_size, seed
        self.neurons = neuron_map or NeuronMap.trace(model, example_input)
        with evaluating(model), torch.inference_mode():
            labels = int(model(example_input).shape[1])
        self.spec = ReportSpec(self.neurons.size, labels, detector.statistics)

    def cleanse(
        self, model: nn.Module, dataset: Dataset[Any], kept: IntArray | None = None
    ) -> Cleansing:
        """Reset the compromised neurons of a model in place, and name the samples behind them.

        Parameters
        ----------
        model : nn.Module
            The mode of its modules, and the weights of neurons that are not reset, stay as they
            are.
        dataset : Dataset
            Of (input, label), with a length and a fixed order, without random augmentation.
        kept : ndarray of int64, optional
            The samples that it was trained on, ascending; all, if not given. The others were
            dropped before: whether the model still reacts to them says if the backdoor lives.

        Raises
        ------
        ValueError
            If there is no sample.
        """
        samples = np.arange(len(dataset))  # type: ignore[arg-type]
        kept = samples if kept is None else kept
        if not len(kept):
            raise ValueError("there is no sample to look at")
        with evaluating(model):
            return self._cleansed(model, dataset, kept, np.setdiff1d(samples, kept))

    def predictions(self, model: nn.Module, dataset: Dataset[Any], indices: IntArray) -> IntArray:
        """Count, of some samples of each label, which label the model gives them, (K, K)."""
        labels, device = self.spec.labels, next(model.parameters()).device
        counts = np.zeros(labels * labels, dtype=np.int64)
        with evaluating(model), torch.inference_mode():
            for _, inputs, said in self._batches(dataset, indices):
                given = model(inputs.to(device)).argmax(1).cpu()
                counts += np.bincount((said * labels + given).numpy(), minlength=len(counts))
        return counts.reshape(labels, labels)

    def _cleansed(
        self, model: nn.Module, dataset: Dataset[Any], kept: IntArray, before: IntArray
    ) -> Cleansing:
        reader = self.neurons.reader(model)
        splits = self._separated(reader, dataset, kept)
        strong = {k: split for k, split in splits.items() if split.strength >= self.strength}
        dealt = self._dealt(reader, dataset, kept, before, strong)
        reports = dealt.reports
        if TRIGGER_SHIFT in self.spec.statistics:
            self._probe(model, reader, dataset, np.setdiff1d(kept, dealt.apart), reports)
        layer_of = self.neurons.layer_of(np.arange(self.neurons.size))
        summaries = {c: self.detector.summarise(report) for c, report in reports.items()}
        known = Recent(apart=frozenset((_GROUPS - 1, k) for k in dealt.labels))
        detection = self.detector.detect(summaries, layer_of, 0, known)  # 0: nobody can lie
        accuracy = float(np.median([report.accuracy for report in reports.values()]))
        decision = decide(detection, layer_of, self.policy, accuracy=accuracy)
        certain = {k for k, split in strong.items() if split.strength >= self.certain}
        if not dealt.apart.size and before.size and _obeyed(reports, dealt.labels) < DEAD:
            decision = Decision(
                decision.neurons[:0], "the model no longer gives the dropped samples their labels"
            )
        generator = torch.Generator().manual_seed(self.seed)
        if decision.neurons.size:
            self.neurons.reset(model, decision.neurons, self.how, generator)
        return Cleansing(
            reason=decision.reason,
            neurons=decision.neurons,
            scores=detection.scores,
            dropped=dealt.foreign(_named(detection, certain, dealt.labels)),
            strengths={k: split.strength for k, split in splits.items()},
        )

    def _separated(self, reader: Reader, dataset: Dataset[Any], kept: IntArray) -> dict[int, Split]:
        """Separate each label's samples, or as many of them as memory has room for."""
        most = max(1, _MEMORY // (4 * self.spec.neurons * self.spec.labels))
        priority = np.random.default_rng(self.seed).permutation(len(kept))
        chosen = {k: _Sampled(most) for k in range(self.spec.labels)}
        place = 0
        with torch.inference_mode():
            for _, inputs, labels in self._batches(dataset, kept):
                logits, reads = reader(inputs)
                values = spatial_maximum(reads).cpu().numpy()
                otherwise = _otherwise(logits, labels)
                ranks = priority[place : place + len(values)]
                place += len(values)
                for k in np.unique(labels.numpy()):
                    mine = labels.numpy() == k
                    chosen[int(k)].add(ranks[mine], values[mine], otherwise[mine])
        held = {k: sampled.chosen() for k, sampled in chosen.items() if len(sampled)}
        typical = np.sqrt(np.median([values.var(0) for values, _ in held.values()], axis=0))
        diverse = {k: diversity(values, typical) for k, (values, _) in held.items()}
        splits, possible = {}, max(1, self.spec.labels - 1)
        for k, (values, otherwise) in held.items():
            others = [j for j in held if j != k]
            usual = Usual(
                typical,
                max((diverse[j] for j in others), default=0.0),
                usual_variety([held[j][1] for j in others], possible),
                possible,
            )
            splits[k] = separate(values, usual, otherwise)
        return {k: split for k, split in splits.items() if split is not None}

    def _dealt(
        self,
        reader: Reader,
        dataset: Dataset[Any],
        kept: IntArray,
        before: IntArray,
        strong: dict[int, Split],
    ) -> _Dealt:
        """Deal the samples to the pseudo-clients, and report each one's."""
        foreign = as_filter(strong)
        builders = [ReportBuilder(self.spec) for _ in range(_GROUPS)]
        nothing = np.empty(0, dtype=np.int64)
        apart: list[tuple[IntArray, IntArray]] = [(nothing, nothing)]
        suspected = set(strong)
        # At random: a data set may well have its labels in turn.
        turns = np.random.default_rng(self.seed).permutation(len(kept))
        place = 0
        with torch.inference_mode():
            for _, inputs, labels in self._batches(dataset, before):
                logits, reads = reader(inputs)
                builders[-1].add(reads, logits, labels)
                suspected |= set(labels.tolist())
            for indices, inputs, labels in self._batches(dataset, kept):
                logits, reads = reader(inputs)
                values = spatial_maximum(reads).cpu().numpy()
                away = foreign.flagged(values, labels.numpy())
                apart.append((indices[away], labels.numpy()[away]))
                turn = turns[place : place + len(indices)]
                place += len(indices)
                # The last one's samples of a suspected label are those apart, and no others.
                own = np.isin(labels.numpy(), list(suspected))
                group = np.where(own, turn % (_GROUPS - 1), turn % _GROUPS)
                group[away] = _GROUPS - 1
                for number, builder in enumerate(builders):
                    mine = torch.from_numpy(np.flatnonzero(group == number))
                    if len(mine):
                        where = mine.to(logits.device)
                        builder.add([read[where] for read in reads], logits[where], labels[mine])
        reports = {number: builder.report() for number, builder in enumerate(builders)}
        return _Dealt(
            {number: report for number, report in reports.items() if report.counts.any()},
            np.concatenate([indices for indices, _ in apart]),
            np.concatenate([said for _, said in apart]),
            frozenset(suspected),
        )

    def _probe(
        self,
        model: nn.Module,
        reader: Reader,
        dataset: Dataset[Any],
        clean: IntArray,
        reports: dict[int, Report],
    ) -> None:
        """Have some of the pseudo-clients look for triggers, each on samples of its own."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = clean[torch.randperm(len(clean), generator=generator).numpy()]
        gradients = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(False)
        try:
            for number in range(min(_PROBING, len(reports))):
                share = np.sort(drawn[number::_PROBING][:_PROBED])
                batches = list(self._batches(dataset, share))
                inputs = torch.cat([x for _, x, _ in batches])
                labels = torch.cat([y for _, _, y in batches])
                nothing = Triggers.unknown(self.spec.labels, inputs[0].cpu())
                probe = Probe(tuple(range(self.spec.labels)), steps=_STEPS, images=_IMAGES)
                found = probe_model(model, reader, inputs, labels, probe, nothing, generator)
                reports[number] = reports[number].with_trigger_shift(
                    found.probed, found.size, found.success, found.shift
                )
        finally:
            for parameter, required in gradients:
                parameter.requires_grad_(required)

    def _batches(self, dataset: Dataset[Any], indices: IntArray) -> Iterable[Batch]:
        return in_order(dataset, indices, self.batch_size, self.prepare)


def _otherwise(logits: Tensor, labels: Tensor) -> IntArray:
    """Return the labels that samples would be given if they could not be given theirs."""
    where = labels.to(logits.device)[:, None]
    found: IntArray = logits.scatter(1, where, -torch.inf).argmax(1).cpu().numpy()
    return found


def _named(
    detection: Detection, certain: Collection[int], labels: Collection[int]
) -> Collection[int]:
    """Return the labels that the detector names and those that are certain; if none, all."""
    if not detection.alive:
        return ()
    suspected = {s.label for s in detection.suspicions if s.client == _GROUPS - 1 and s.alive}
    named = suspected | {attack.label for attack in detection.attacks}
    return named.union(certain) if named else labels


def _obeyed(reports: Mapping[int, Report], labels: Collection[int]) -> float:
    """Share of the last one's samples of some labels that obey the backdoor."""
    last = reports[_GROUPS - 1]["predictions"]
    others = [report for number, report in reports.items() if number != _GROUPS - 1]
    given = sum((report["predictions"] for report in others), np.zeros_like(last))
    rows = np.isin(np.arange(len(last)), list(labels))
    return obeyed(given, last * rows[:, None])


def obeyed(clean: IntArray, poisoned: IntArray) -> float:
    """Share of the poisoned samples that a model gives their label because of the backdoor.

    That is, beyond what it gives such labels to clean samples of any other label anyway.

    Parameters
    ----------
    clean, poisoned : ndarray of int64
        Samples by the label that they have and the one that they are given, (K, K).
    """
    rows = np.flatnonzero(poisoned.any(1))
    foreign = clean.sum() - clean[rows].sum(1)
    wrongly = (clean.sum(0)[rows] - clean[rows, rows]) / np.maximum(1, foreign)
    right = np.maximum(0, poisoned[rows, rows] - wrongly * poisoned[rows].sum(1))
    return float(right.sum() / max(1, poisoned.sum()))


class _Dealt(NamedTuple):
    """The pseudo-clients' reports, samples that newly stand apart, and labels with any such."""

    reports: dict[int, Report]
    apart: IntArray
    said: IntArray  # their labels
    labels: frozenset[int]

    def foreign(self, named: Collection[int]) -> IntArray:
        """Return the samples that stand apart in some labels, ascending."""
        return np.sort(self.apart[np.isin(self.said, list(named))])


class _Sampled:
    """What is known of at most so many samples, by priority whatever order they come in."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._parts: list[tuple[NDArray[Any], ...]] = []
        self._held = 0

    def __len__(self) -> int:
        return min(self._held, self._most)

    def add(self, ranks: IntArray, values: NDArray[np.float32], otherwise: IntArray) -> None:
        self._parts.append((ranks, values, otherwise))
        self._held += len(ranks)
        if self._held > 2 * self._most:
            self._cut()

    def chosen(self) -> tuple[NDArray[np.float32], IntArray]:
        """Return their values, and the labels that they would be given otherwise."""
        self._cut()
        _, values, otherwise = self._parts[0]
        return values, otherwise

    def _cut(self) -> None:
        joined = [np.concatenate(part) for part in zip(*self._parts, strict=True)]
        first = np.argsort(joined[0])[: self._most]
        self._parts, self._held = [tuple(each[first] for each in joined)], len(first)
