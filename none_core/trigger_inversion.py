"""The client half of ``inversion``: find the smallest trigger that turns clean images into a class.

Sources: Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
Networks", IEEE S&P 2019 (mask, pattern and a penalty on the mask's size that adapts to the success)
and, for looking at the neurons under what was found, Wang et al., NeurIPS 2022, section 4.

A class whose trigger is much smaller than those of the others is under attack. Nothing but clean
images is needed, so every honest client can look for itself and outvote the attackers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from none_core.activations import MOST_SHIFT, spatial_maximum
from none_core.neurons import Reader

_LEARNING_RATE = 0.3
_CLOSED = -2.0  # logit of a mask before anything was learned: sigmoid(-2) = 0.12
_EASE, _LEAST_PENALTY, _MOST_PENALTY = 1.15, 1e-5, 1.0
_FIRST_PENALTY = 1e-3
_LOOK_EVERY = 10  # steps between two looks at whether a class is settled
_SETTLED = 0.01  # relative gain in size between two looks below which a class is settled
_SMALL = 0.8  # of the median class's size: masks below are looked at harder ...
_FEW, _ONE_OF = 2, 5  # ... so many of them at most, or one of so many classes if that is more ...
_HARDER = 3  # ... for so many times the steps
_SHOWN = 128  # images on which the success and the shift of what was found are measured
_FAINT = 0.1  # of a layer's mean deviation: added, so that a neuron at rest does not divide by zero


@dataclass(frozen=True)
class Probe:
    """What a client is asked to look for, and how hard.

    Attributes
    ----------
    labels : tuple of int
        Classes to look for triggers to.
    steps : int
        Largest number of optimiser steps, >= 1; doubled when there is nothing to start from. A
        fifth of the classes, but at least two, those with the smallest masks, may get five times as
        many in addition.
    images : int
        Images per class and step, >= 1; twice as many in the last part of those additional steps.
        The cost is at most about ``2.6 * labels * steps * images`` forward and backward passes of
        one image for ten classes or more, less for classes that settle early.
    success : float
        Share of the images that a trigger has to turn, in (0, 1].
    hard : tuple of int
        Classes to look at as hard as at those with the smallest masks: others found them small.
    watched : tuple of int
        Classes that were attacked a short while ago. For them it is reported what the trigger that
        was found then still does, in place of what a new one does.
    """

    labels: tuple[int, ...]
    steps: int = 30
    images: int = 8
    success: float = 0.9
    hard: tuple[int, ...] = ()
    watched: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, value in (("steps", self.steps), ("images", self.images)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 < self.success <= 1:
            raise ValueError(f"success must be in (0, 1], got {self.success}")
        if not self.labels:
            raise ValueError("a probe needs at least one label")


@dataclass(frozen=True, eq=False)
class Triggers:
    """One trigger for every class: where (mask) and what (pattern), as the optimiser left them.

    Attributes
    ----------
    mask : Tensor
        Logits, (K, 1, *positions), or (K, features) for inputs without positions.
    pattern : Tensor
        Logits of the values between the inputs' lowest and highest, (K, *input).
    penalty : Tensor
        What a full mask costs, (K,).
    known : Tensor
        Whether the class was looked for before, bool (K,).
    kept_mask, kept_pattern : Tensor
        For watched classes the triggers that were found when the attack was seen.
    kept : Tensor
        Whether there is one, bool (K,).
    """

    mask: Tensor
    pattern: Tensor
    penalty: Tensor
    known: Tensor
    kept_mask: Tensor
    kept_pattern: Tensor
    kept: Tensor

    @classmethod
    def unknown(cls, labels: int, sample: Tensor) -> Triggers:
        """Triggers of a client that has never looked; ``sample`` is one input, (C, ...)."""
        positions = (1, *sample.shape[1:]) if sample.ndim > 1 else sample.shape
        return cls(
            mask=torch.full((labels, *positions), _CLOSED),
            pattern=torch.zeros(labels, *sample.shape),
            penalty=torch.full((labels,), _FIRST_PENALTY),
            known=torch.zeros(labels, dtype=torch.bool),
            kept_mask=torch.full((labels, *positions), _CLOSED),
            kept_pattern=torch.zeros(labels, *sample.shape),
            kept=torch.zeros(labels, dtype=torch.bool),
        )

    def keeping(self, watched: tuple[int, ...]) -> Triggers:
        """Keep the present triggers of newly watched classes, and forget those of others."""
        wanted = torch.zeros_like(self.kept)
        wanted[list(watched)] = True
        mask, pattern = self.kept_mask.clone(), self.kept_pattern.clone()
        new = wanted & ~self.kept & self.known
        mask[new], pattern[new] = self.mask[new], self.pattern[new]
        kept = wanted & (self.kept | new)
        return replace(self, kept_mask=mask, kept_pattern=pattern, kept=kept)


@dataclass(frozen=True, eq=False)
class Finding:
    """What the triggers do to a model.

    Attributes
    ----------
    size : ndarray of float64
        Mask as a share of the positions, (K,); 1 where no trigger reached the wanted success.
    success : ndarray of float64
        Share of images of other classes that the trigger turns, (K,); for a watched class without
        those that are taken for it anyway.
    shift : ndarray of float64
        How far the trigger moves each neuron's mean, in the neuron's standard deviations, (K, J).
    probed : ndarray of bool
        Classes that were looked for, (K,); the others' entries are 0.
    triggers : Triggers
        To start from next time.
    """

    size: NDArray[np.float64]
    success: NDArray[np.float64]
    shift: NDArray[np.float64]
    probed: NDArray[np.bool_]
    triggers: Triggers


def probe_model(
    model: nn.Module,
    reader: Reader,
    inputs: Tensor,
    labels: Tensor,
    probe: Probe,
    start: Triggers,
    generator: torch.Generator,
) -> Finding:
    """Invert the triggers of a model and look at its neurons under them.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, on the device of the inputs.
    reader : callable
        ``neuron_map.reader(model)``.
    inputs : Tensor
        Clean samples as the model takes them, (N, C, ...) or (N, features), float.
    labels : Tensor
        (N,) int64.
    probe : Probe
    start : Triggers
        Of the last round, or ``Triggers.unknown``.
    generator : torch.Generator
        Draws the images of each step.

    Returns
    -------
    Finding
        The same for the same arguments.
    """
    bounds = _bounds(inputs)
    start = start.keeping(probe.watched)
    others = {k: (labels != k).nonzero().flatten() for k in probe.labels}
    classes = [k for k in probe.labels if len(others[k])]
    triggers, reached = invert(model, inputs, others, classes, probe, start, bounds, generator)
    share = torch.sigmoid(triggers.mask).flatten(1).mean(1)
    number = len(start.penalty)
    size, success = np.zeros(number), np.zeros(number)
    shift: NDArray[np.float64] = np.zeros((0, 0))
    with torch.no_grad():
        for k in classes:
            watched = bool(triggers.kept[k])
            shown = inputs[others[k] if watched else _spread(others[k], _SHOWN)]
            unstamped, reads = reader(shown)
            clean = spatial_maximum(reads)
            ends = np.cumsum([read.shape[1] for read in reads])[:-1].tolist()
            scale = torch.cat([_scale(values) for values in torch.tensor_split(clean, ends, 1)])
            mask, pattern = triggers.mask[k], triggers.pattern[k]
            if watched:
                mask, pattern = triggers.kept_mask[k], triggers.kept_pattern[k]
            logits, reads = reader(_stamped(shown, mask.to(shown), pattern.to(shown), bounds))
            moved = (spatial_maximum(reads) - clean).mean(0) / scale
            if not shift.size:
                shift = np.zeros((number, len(moved)))
            shift[k] = moved.nan_to_num(0).clamp(-MOST_SHIFT, MOST_SHIFT).double().cpu().numpy()
            success[k] = float((logits.argmax(1) == k).double().mean())
            if watched:
                success[k] = max(
                    0.0, success[k] - float((unstamped.argmax(1) == k).double().mean())
                )
            size[k] = float(share[k]) if reached[k] else 1.0
    probed = np.isin(np.arange(number), classes)
    return Finding(size, success, shift, probed, triggers)


def invert(
    model: nn.Module,
    inputs: Tensor,
    others: dict[int, Tensor],
    classes: list[int],
    probe: Probe,
    start: Triggers,
    bounds: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> tuple[Triggers, NDArray[np.bool_]]:
    """Look for the smallest mask and pattern for each class, all classes in the same passes.

    Then once more, harder and from nothing, for those that decide: the few classes whose masks came
    out smallest, here or with others.

    Parameters
    ----------
    others : dict of int to Tensor
        For each class the indices of samples of other classes.
    bounds : tuple of Tensor
        Lowest and highest value of an input, each broadcastable to one.

    Returns
    -------
    tuple
        The smallest triggers that reached the wanted success (or the last ones, if none did), and
        whether one did, (K,).
    """

    def search_from(triggers: Triggers) -> _Search:
        return _Search(model, inputs, others, probe.success, triggers, bounds, generator)

    search = search_from(start)
    active = torch.tensor(classes, dtype=torch.int64)
    fresh = ~start.known
    fresh[search.restarted(active[start.known[active]], probe.images)] = True
    search.run(active[fresh[active]], probe.steps, probe.images)
    search.run(active, probe.steps, probe.images)
    deciding = torch.unique(torch.cat([search.few(active), active[np.isin(active, probe.hard)]]))
    # What an old trigger shrinks to is often far larger than what is found from nothing.
    anew = search_from(Triggers.unknown(len(search.penalty), inputs[0]))
    anew.run(deciding[~fresh[deciding]], 2 * probe.steps, probe.images)
    anew.run(deciding[~fresh[deciding]], _HARDER * probe.steps, 2 * probe.images)
    search.run(deciding[fresh[deciding]], _HARDER * probe.steps, 2 * probe.images)
    search.adopt(anew)
    known = start.known.clone()
    known[active] = True
    mask, pattern = search.found(active)
    triggers = replace(start, mask=mask, pattern=pattern, penalty=search.penalty, known=known)
    return triggers, search.smallest.isfinite().numpy()


class _Search:
    """Gradient descent on masks and patterns; what was smallest so far is kept.

    The loss of a class is the cross-entropy towards it, plus its penalty times the number of
    positions that the mask opens. The penalty rises while the wanted success is reached and falls
    while it is not.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        others: dict[int, Tensor],
        success: float,
        start: Triggers,
        bounds: tuple[Tensor, Tensor],
        generator: torch.Generator,
    ) -> None:
        self.model, self.inputs, self.others = model, inputs, others
        self.success, self.bounds, self.generator = success, bounds, generator
        self.mask, self.pattern = (
            tensor.to(inputs.device, copy=True).requires_grad_()
            for tensor in (start.mask, start.pattern)
        )
        self.penalty = start.penalty.clone()
        self.smallest = torch.full((len(self.penalty),), torch.inf)
        self.best = self.mask.detach().clone(), self.pattern.detach().clone()

    def run(self, active: Tensor, steps: int, images: int) -> None:
        """Take up to so many steps; a class whose smallest mask no longer shrinks drops out."""
        optimiser = torch.optim.Adam([self.mask, self.pattern], lr=_LEARNING_RATE, betas=(0.5, 0.9))
        before = self.smallest.clone()
        for step in range(steps):
            if not len(active):
                break
            self._step(active, images)
            optimiser.step()
            if (step + 1) % _LOOK_EVERY == 0:
                moving = ~(self.smallest > (1 - _SETTLED) * before) | self.smallest.isinf()
                before = self.smallest.clone()
                active = active[moving[active]]

    def restarted(self, classes: Tensor, images: int) -> Tensor:
        """Forget triggers that hardly work any more, after a reset for instance, and name them.

        What was shrunk onto neurons that are no longer there is a bad place to start from.
        """
        if not len(classes):
            return classes
        with torch.no_grad():
            hits, _, _ = self._tried(classes, images)
        gone = classes[hits < self.success / 2]
        unknown = Triggers.unknown(len(self.penalty), self.inputs[0])
        with torch.no_grad():
            self.mask[gone], self.pattern[gone] = unknown.mask[gone], unknown.pattern[gone]
        self.penalty[gone] = unknown.penalty[gone]
        return gone

    def few(self, classes: Tensor) -> Tensor:
        """Name the classes with the smallest masks so far."""
        sizes = self.smallest[classes]
        if not sizes.isfinite().any():
            return classes[:0]
        small = classes[sizes < _SMALL * sizes[sizes.isfinite()].median()]
        most = max(_FEW, len(classes) // _ONE_OF)
        return small[self.smallest[small].argsort()[:most]]

    def adopt(self, other: _Search) -> None:
        """Take over what another search found smaller."""
        better = other.smallest < self.smallest
        self.smallest[better], self.penalty[better] = other.smallest[better], other.penalty[better]
        for mine, theirs in zip(self.best, other.best, strict=True):
            mine[better] = theirs[better]

    def _step(self, active: Tensor, images: int) -> None:
        """Leave the gradients of the active classes in place, and keep what is smaller."""
        hits, loss, size = self._tried(active, images)
        hit = hits >= self.success
        total = loss + (self.penalty[active].to(size.device) * size).sum()
        self.mask.grad, self.pattern.grad = torch.autograd.grad(total, (self.mask, self.pattern))
        with torch.no_grad():
            better = hit & (size.cpu() < self.smallest[active])
            smaller = active[better]
            self.smallest[smaller] = size.cpu()[better]
            self.best[0][smaller], self.best[1][smaller] = self.mask[smaller], self.pattern[smaller]
            factor = torch.where(hit, _EASE, 1 / _EASE)
            self.penalty[active] = (self.penalty[active] * factor).clamp(
                _LEAST_PENALTY, _MOST_PENALTY
            )

    def _tried(self, active: Tensor, images: int) -> tuple[Tensor, Tensor, Tensor]:
        """Stamp some images of other classes: share that is turned, summed loss, open positions."""
        drawn = [_draw(self.others[int(k)], images, self.generator) for k in active]
        mask, pattern = self.mask[active], self.pattern[active]
        stamped = _stamped(
            self.inputs[torch.stack(drawn)], mask[:, None], pattern[:, None], self.bounds
        )
        logits = self.model(stamped.flatten(0, 1)).view(len(active), images, -1)
        wanted = active.to(logits.device)[:, None].expand(-1, images)
        hits = (logits.argmax(-1) == wanted).float().mean(1).cpu()
        loss = functional.cross_entropy(logits.flatten(0, 1), wanted.reshape(-1), reduction="none")
        size = torch.sigmoid(mask).flatten(1).sum(1)
        return hits, loss.view(len(active), -1).mean(1).sum(), size

    def found(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest that were found or, of a class for which none was, the last."""
        mask, pattern = self.best
        missed = classes[self.smallest[classes].isinf()]
        mask[missed], pattern[missed] = self.mask.detach()[missed], self.pattern.detach()[missed]
        return mask.cpu(), pattern.cpu()


def _stamped(x: Tensor, mask: Tensor, pattern: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
    low, high = bounds
    values = low + (high - low) * torch.sigmoid(pattern)
    return x + torch.sigmoid(mask) * (values - x)


def _bounds(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each channel, (C, 1, ...), or of each feature.

    What never varies, like the border of flattened images, may take any value that the others do:
    it would be an attacker's first choice.
    """
    dims = [0, *range(2, inputs.ndim)]
    shape = (-1, *[1] * (inputs.ndim - 2))
    low, high = inputs.amin(dims), inputs.amax(dims)
    constant = low == high
    low, high = (
        torch.where(constant, inputs.amin(), low),
        torch.where(constant, inputs.amax(), high),
    )
    return low.view(shape), high.view(shape)


def _draw(indices: Tensor, number: int, generator: torch.Generator) -> Tensor:
    return indices[torch.randint(len(indices), (number,), generator=generator)]


def _spread(indices: Tensor, number: int) -> Tensor:
    """At most ``number`` of the indices, evenly spread over them."""
    if len(indices) <= number:
        return indices
    return indices[torch.linspace(0, len(indices) - 1, number).long()]


def _scale(values: Tensor) -> Tensor:
    """Return the standard deviation of each neuron of a layer, (n, C) -> (C,), never 0."""
    deviation = values.std(0, unbiased=False)
    return deviation + _FAINT * deviation.mean() + 1e-6
