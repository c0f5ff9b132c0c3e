"""NONE on one machine: train, find the backdoor, remove it, train on.

Source: Wang et al., "Training with More Confidence: Mitigating Injected and Natural Backdoors
During Training", NeurIPS 2022, Algorithm 1.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import Dataset

from none_core import files
from none_core.batches import Batch, in_order
from none_core.cleansing import DEAD, Cleanser, Cleansing, obeyed
from none_core.detection.base import IntArray

_LOG = logging.getLogger(__name__)

OptimizerFn = Callable[[Iterable[nn.Parameter]], Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or is of another training run."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training run ends with, besides the model.

    Attributes
    ----------
    kept : ndarray of int64
        Samples that the last round trained on, ascending.
    cleansings : tuple of Cleansing
        One for each look at the model; the last found nothing, unless the rounds were used up.
    recovered : bool
        Whether the model was trained on at larger steps in the end, and the backdoor stayed out.
    anew : bool
        Whether it is a model that was begun again with the samples that are kept.
    """

    kept: IntArray = field(repr=False)
    cleansings: tuple[Cleansing, ...]
    recovered: bool = False
    anew: bool = False

    @property
    def dropped(self) -> IntArray:
        """Samples that were taken for poisoned, ascending."""
        return _dropped(self.cleansings)


class NoneTrainer:
    """Trains a classifier on samples that somebody may have poisoned.

    It trains, looks at the model, resets its compromised neurons, drops the samples behind them,
    and trains on, until there is nothing left to remove; then it lets the model recover. Should the
    backdoor outlive all that, the model is begun again with the samples that are left::

        trainer = NoneTrainer(model, dataset, Cleanser(model, example_input), optimizer)
        trained = trainer.fit()

    Whoever trains otherwise (Lightning, say) calls :class:`~none_core.cleansing.Cleanser` from
    there.

    Parameters
    ----------
    model : nn.Module
        Trained in place, on the device that it is on.
    dataset : Dataset
        Of (input, label), with a length and a fixed order.
    cleanser : Cleanser
        Its ``prepare`` is applied to the batches that are trained on, too.
    optimizer : callable
        ``parameters -> Optimizer``, called at the start and after each reset.
    retrain_rate : float
        What the learning rates are multiplied by after a reset, > 0; from there they fall along
        half a cosine. Batch normalisation keeps the statistics that it has, as in Algorithm 1, and
        a network that took a large step before would leave all that it has learned at the same
        step; the published code trains on at 1e-4.
    recover_epochs : int
        Passes in the end, >= 0, if samples were dropped: batch normalisation measures again, which
        allows larger steps, and the model is led away from the labels of half of what was dropped
        (`unlikelihood`), but for labels that it still gives to most of their dropped samples. If it
        then gives more of the other half their labels, and more than 5 % of them, or is right about
        fewer of the samples that are kept, it becomes again what it was before these passes.
    recover_rate : float
        What the learning rates are multiplied by for these, > 0; likewise falling.
    unlearn : float
        Weight of the dropped samples in these, >= 0; at 1 each counts as much as one that is kept.
    anew_epochs : int, optional
        Passes over the samples that are kept, >= 0, from `untrained` on, if more than 5 % of those
        that were dropped still get their labels in the end; all of the above follows once more. It
        counts if at most half as many of them get their labels then, and is undone otherwise: they
        are what they say they are. 0 is never; by default it is `epochs`.
    untrained : mapping of str to Tensor, optional
        State of the model before it was trained on anything; by default the one that it is in.
    loss : callable
        ``(logits, labels) -> mean loss``.
    epochs : int
        Passes over the samples before the first look, >= 0; at 0 the model is trained already.
    retrain_epochs : int
        Passes after each look that found something, >= 1.
    rounds : int
        Looks at most, >= 0; at 0 this is ordinary training.
    batch_size : int
    seed : int
        The same gives the same weights on the same machine.
    checkpoint : Path, optional
        File that is written after each epoch, and that a run which was stopped goes on from.

    Raises
    ------
    ValueError
        Naming the argument that is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        cleanser: Cleanser,
        optimizer: OptimizerFn,
        *,
        loss: Loss = functional.cross_entropy,
        epochs: int = 20,
        retrain_epochs: int = 8,
        retrain_rate: float = 0.05,
        recover_epochs: int = 4,
        recover_rate: float = 0.2,
        unlearn: float = 1.0,
        anew_epochs: int | None = None,
        untrained: Mapping[str, Tensor] | None = None,
        rounds: int = 3,
        batch_size: int = 64,
        seed: int = 0,
        checkpoint: Path | None = None,
    ) -> None:
        for name, value, least in (
            ("epochs", epochs, 0),
            ("retrain_epochs", retrain_epochs, 1),
            ("recover_epochs", recover_epochs, 0),
            ("anew_epochs", 0 if anew_epochs is None else anew_epochs, 0),
            ("rounds", rounds, 0),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        for name, rate in (("retrain_rate", retrain_rate), ("recover_rate", recover_rate)):
            if not rate > 0:
                raise ValueError(f"{name} must be > 0, got {rate}")
        if not 0 <= unlearn < math.inf:
            raise ValueError(f"unlearn must be >= 0 and finite, got {unlearn}")
        if anew_epochs and not epochs and untrained is None:
            raise ValueError(
                "anew_epochs needs untrained, since epochs = 0 says that the model is trained"
            )
        self.model, self.dataset, self.cleanser = model, dataset, cleanser
        self.optimizer, self.retrain_rate = optimizer, retrain_rate
        self.recover_epochs, self.recover_rate, self.unlearn = recover_epochs, recover_rate, unlearn
        self.loss, self.batch_size, self.seed = loss, batch_size, seed
        self.epochs, self.retrain_epochs, self.rounds = epochs, retrain_epochs, rounds
        self.anew_epochs = epochs if anew_epochs is None else anew_epochs
        self.untrained = untrained
        self.checkpoint = checkpoint

    def fit(self) -> Trained:
        """Train, or go on where a checkpoint was written.

        Raises
        ------
        CheckpointError
            If the checkpoint is damaged or of another run.
        """
        state = self._begun()
        while not state.done:
            self._trained(state)
            if state.before is not None:
                self._judge_recovery(state)
                self._end(state)
            elif state.round == self.rounds or not self._look(state):
                if self.recover_epochs and len(state.dropped) > 1:
                    self._begin_recovery(state)
                else:
                    self._end(state)
            state.epoch, state.optimizer = 0, None
            self._save(state, None)
        return Trained(state.kept, tuple(state.cleansings), state.recovered, state.anew)

    def _trained(self, state: _State) -> None:
        """Train as many epochs as are left before something is looked at."""
        optimizer = self._optimizer(state)
        while state.epoch < self._epochs(state):
            self._pace(state, optimizer)
            mean = self._train(state, optimizer)
            state.epoch += 1
            stage = f"round {state.round}" if state.before is None else "recovery"
            again = "" if state.first is None else "begun again, "
            _LOG.info("%s%s, epoch %d: loss %.4f", again, stage, state.epoch, mean)
            self._save(state, optimizer)

    def _epochs(self, state: _State) -> int:
        if state.before is not None:
            return self.recover_epochs
        if state.round:
            return self.retrain_epochs
        return self.epochs if state.first is None else self.anew_epochs

    def _look(self, state: _State) -> bool:
        """Look at the model and remove what is found; whether there was anything."""
        cleansing = self.cleanser.cleanse(self.model, self.dataset, state.kept)
        _LOG.info(
            "round %d: %s; %d neurons reset, %d samples dropped",
            *(state.round, cleansing.reason, cleansing.neurons.size, cleansing.dropped.size),
        )
        state.cleansings.append(cleansing)
        state.kept = np.setdiff1d(state.kept, cleansing.dropped)
        if cleansing.found:
            state.round += 1
        return cleansing.found

    def _begin_recovery(self, state: _State) -> None:
        """Keep the model to come back to, and what to judge a recovery by."""
        state.before = copy.deepcopy(self.model.state_dict())
        state.unlearned = self._unlearned(state)
        state.obeyed, state.right = self._standing(state)

    def _judge_recovery(self, state: _State) -> None:
        """Go back to where the recovery began if that brought the backdoor back."""
        assert state.before is not None
        obeyed_now, right_now = self._standing(state)
        state.recovered = obeyed_now <= max(DEAD, state.obeyed) and right_now >= state.right
        _LOG.info(
            "recovery: dropped samples that obey %.3f, before %.3f; kept ones that are right %.3f, "
            "before %.3f: %s",
            *(obeyed_now, state.obeyed, right_now, state.right),
            "kept" if state.recovered else "undone",
        )
        if not state.recovered:
            self.model.load_state_dict(state.before)
        state.before = None

    def _end(self, state: _State) -> None:
        """End, or begin again if the backdoor is still there and this is the first attempt."""
        state.done, untrained = True, state.untrained
        if not len(state.dropped) or (state.first is None and untrained is None):
            return
        clean = self.cleanser.predictions(self.model, self.dataset, state.kept)
        dropped = self.cleanser.predictions(self.model, self.dataset, state.dropped)
        left = obeyed(clean, dropped)
        if state.first is not None:
            self._judge_anew(state, left)
        elif untrained is not None and left > DEAD:
            _LOG.info("dropped samples that obey: %.3f; begun again without them", left)
            state.first = {
                "model": copy.deepcopy(self.model.state_dict()),
                "obeyed": left,
                "recovered": state.recovered,
            }
            self.model.load_state_dict(untrained)
            state.done, state.recovered, state.round = False, False, 0

    def _judge_anew(self, state: _State, left: float) -> None:
        """Go back to the first attempt's model unless far fewer of the dropped samples obey."""
        assert state.first is not None
        state.anew = 2 * left <= state.first["obeyed"]
        _LOG.info(
            "begun again: dropped samples that obey %.3f, before %.3f: %s",
            *(left, state.first["obeyed"], "kept" if state.anew else "undone"),
        )
        if not state.anew:
            self.model.load_state_dict(state.first["model"])
            state.recovered = state.first["recovered"]
        state.first = None

    def _standing(self, state: _State) -> tuple[float, float]:
        """Share of the dropped samples that obey, where unlearning does not see them; accuracy."""
        clean = self.cleanser.predictions(self.model, self.dataset, state.kept)
        judged = np.setdiff1d(state.dropped, state.unlearned)
        poisoned = self.cleanser.predictions(self.model, self.dataset, judged)
        return obeyed(clean, poisoned), float(np.trace(clean) / max(1, clean.sum()))

    def _unlearned(self, state: _State) -> IntArray:
        """Choose what is unlearned: half of the dropped samples, at random.

        But none of a label that the model still gives to most of those that were dropped from it:
        after all that was done against a backdoor, these are what they say they are.
        """
        given = self.cleanser.predictions(self.model, self.dataset, state.dropped)
        honest = np.flatnonzero(2 * np.diagonal(given) > given.sum(1))
        order = np.random.default_rng([self.seed, len(state.dropped)]).permutation(state.dropped)
        half = np.sort(order[: len(order) // 2])
        read = in_order(self.dataset, half, self.batch_size)
        said = [labels.numpy() for _, _, labels in read]
        return half[~np.isin(np.concatenate([half[:0], *said]), honest)]

    def _train(self, state: _State, optimizer: Optimizer) -> float:
        """Train one epoch; returns the mean loss.

        The order of the samples and whatever else is random in it (dropout) follow from the seed
        and the number of the epoch, so that a resumed run meets the same. The global random state
        is left as it was.
        """
        recovering = state.before is not None
        entropy = [self.seed, state.round, state.epoch, *([1] if recovering else [])]
        stream = np.random.SeedSequence(entropy)
        model, device = self.model, next(self.model.parameters()).device
        normalising = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        model.train()
        if state.round and not recovering:
            _set(normalising, training=False)
        total, seen = torch.zeros((), device=device), 0
        with torch.random.fork_rng():
            torch.manual_seed(int(stream.generate_state(1, np.uint64)[0] >> 1))
            order = state.kept[torch.randperm(len(state.kept)).numpy()]
            if len(order) > 1 and len(order) % self.batch_size == 1 and self.batch_size > 1:
                order = order[:-1]  # batch normalisation cannot be trained on one sample alone
            if not len(order):
                return 0.0
            kept = in_order(self.dataset, order, self.batch_size, self.cleanser.prepare)
            steps = math.ceil(len(order) / self.batch_size)
            for (_, inputs, labels), unwanted in zip(
                kept, self._unwanted(state, steps), strict=True
            ):
                loss = self.loss(model(inputs.to(device)), labels.to(device))
                total += loss.detach() * len(labels)
                seen += len(labels)
                if len(unwanted):
                    _, inputs, labels = self._at_once(unwanted)
                    _set(normalising, training=False)  # what was dropped is not to be measured
                    logits = model(inputs.to(device))
                    _set(normalising, training=True)
                    share = self.unlearn * len(unwanted) / self.batch_size
                    loss = loss + share * unlikelihood(logits, labels.to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return float(total) / max(seen, 1)

    def _unwanted(self, state: _State, steps: int) -> list[IntArray]:
        """Deal what is unlearned to the steps of an epoch, in a new order."""
        unlearned = state.unlearned if self.unlearn else state.unlearned[:0]
        return np.array_split(unlearned[torch.randperm(len(unlearned)).numpy()], max(1, steps))

    def _at_once(self, indices: IntArray) -> Batch:
        return next(in_order(self.dataset, indices, len(indices), self.cleanser.prepare))

    def _optimizer(self, state: _State) -> Optimizer:
        optimizer = self.optimizer(self.model.parameters())
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if state.optimizer is not None:
            optimizer.load_state_dict(state.optimizer)
        return optimizer

    def _pace(self, state: _State, optimizer: Optimizer) -> None:
        """Set the learning rates of an epoch after a reset, or of the recovery."""
        if not state.round:
            return
        rate = self.retrain_rate if state.before is None else self.recover_rate
        share = (1 + math.cos(math.pi * state.epoch / self._epochs(state))) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate * share

    def _begun(self) -> _State:
        samples = np.arange(len(self.dataset))  # type: ignore[arg-type]
        if self.checkpoint is None or not self.checkpoint.exists():
            return _State(kept=samples, untrained=self._untrained())
        try:
            read = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
            settings, model, state = read["settings"], read["model"], read["state"]
        except Exception as error:  # torch raises whatever unpickling does
            raise CheckpointError(f"{self.checkpoint} cannot be read: {error}") from error
        if settings != self._settings():
            differing = [k for k, v in self._settings().items() if settings.get(k) != v]
            raise CheckpointError(
                f"{self.checkpoint} is of another run: it differs in {', '.join(differing)}"
            )
        self.model.load_state_dict(model)
        return _State.read(state)

    def _untrained(self) -> dict[str, Tensor] | None:
        """Keep what a second attempt would begin with, if there may be one."""
        if not self.anew_epochs or not self.rounds:
            return None
        return copy.deepcopy(dict(self.untrained or self.model.state_dict()))

    def _save(self, state: _State, optimizer: Optimizer | None) -> None:
        if self.checkpoint is None:
            return
        tree = {
            "settings": self._settings(),
            "model": self.model.state_dict(),
            "state": state.written(optimizer),
        }
        files.replace(self.checkpoint, lambda stream: torch.save(tree, stream))

    def _settings(self) -> dict[str, Any]:
        """Return what a run that goes on must have in common with the one that was stopped."""
        names = (
            *("epochs", "retrain_epochs", "retrain_rate", "recover_epochs", "recover_rate"),
            *("unlearn", "anew_epochs", "rounds", "batch_size", "seed"),
        )
        return {
            **{name: getattr(self, name) for name in names},
            "pace": "cosine",  # of training on; a checkpoint without it has no rates to begin from
            "samples": len(self.dataset),  # type: ignore[arg-type]
            "detector": self.cleanser.detector.name,
            "strength": self.cleanser.strength,
            "certain": self.cleanser.certain,
            "policy": asdict(self.cleanser.policy),
        }


def unlikelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log(1 - p), p being the probability of the label that a sample must not be given.

    Source: Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020. Unlike
    the gradient ascent of Anti-Backdoor Learning, it ends where nothing is left to unlearn.

    Parameters
    ----------
    logits : Tensor
        (N, K), K >= 2.
    labels : Tensor
        (N,) int64.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (logits.logsumexp(1) - others.logsumexp(1)).mean()


def _set(modules: Iterable[nn.Module], training: bool) -> None:
    for module in modules:
        module.train(training)


def _dropped(cleansings: Iterable[Cleansing]) -> IntArray:
    nothing: list[IntArray] = [np.empty(0, dtype=np.int64)]
    return np.sort(np.concatenate(nothing + [each.dropped for each in cleansings]))


@dataclass
class _State:
    """How far a run has come."""

    kept: IntArray
    round: int = 0
    epoch: int = 0
    done: bool = False
    cleansings: list[Cleansing] = field(default_factory=list)
    optimizer: dict[str, Any] | None = None
    before: dict[str, Any] | None = None  # the recovery, while it goes on
    unlearned: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    obeyed: float = 0.0
    right: float = 0.0
    recovered: bool = False
    untrained: dict[str, Tensor] | None = None
    first: dict[str, Any] | None = None  # how the first attempt ended, while the second goes on
    anew: bool = False

    @property
    def dropped(self) -> IntArray:
        """What was dropped so far, ascending."""
        return _dropped(self.cleansings)

    def written(self, optimizer: Optimizer | None) -> dict[str, Any]:
        """Return it as a tree of tensors and plain values."""
        return {
            "kept": torch.from_numpy(self.kept),
            "round": self.round,
            "epoch": self.epoch,
            "done": self.done,
            "cleansings": [
                {
                    "reason": each.reason,
                    "neurons": torch.from_numpy(each.neurons),
                    "scores": torch.from_numpy(each.scores),
                    "dropped": torch.from_numpy(each.dropped),
                    "strengths": each.strengths,
                }
                for each in self.cleansings
            ],
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            **{
                name: getattr(self, name)
                for name in (
                    *("before", "obeyed", "right", "recovered"),
                    *("untrained", "first", "anew"),
                )
            },
            "unlearned": torch.from_numpy(self.unlearned),
        }

    @classmethod
    def read(cls, tree: dict[str, Any]) -> _State:
        """Read what :meth:`written` returned."""
        cleansings = [
            Cleansing(
                reason=each["reason"],
                neurons=each["neurons"].numpy(),
                scores=each["scores"].numpy(),
                dropped=each["dropped"].numpy(),
                strengths=each["strengths"],
            )
            for each in tree["cleansings"]
        ]
        samples = {name: tree[name].numpy() for name in ("kept", "unlearned")}
        return cls(**tree | samples | {"cleansings": cleansings})
