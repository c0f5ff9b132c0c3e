"""Natural trojans: how small a trigger turns a network that nobody attacked.

The measure is REASR, the attack success rate of a reverse-engineered trigger (Liu, Lee, Tao, Ma,
Aafer, Zhang, "ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation", CCS
2019). NONE (Wang et al., NeurIPS 2022) takes it at mask sizes of 2 to 12 % of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tasks.metrics import attack_success
from tasks.models import as_input
from tasks.modes import evaluating

# Of the image; the authors' published code (``test_natral_trojan.py``) takes these.
SIZES = (0.02, 0.04, 0.06, 0.08, 0.10, 0.12)


@dataclass(frozen=True, eq=False)
class FoundTrigger:
    """A trigger that was found: pixels that are replaced, and by what. It is a `Stamp`.

    Attributes
    ----------
    mask : Tensor
        bool, (H, W): the pixels.
    pattern : Tensor
        uint8, (C, H, W).
    """

    mask: Tensor
    pattern: Tensor

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Stamp; see `tasks.triggers.Stamp`."""
        self.check(images.shape)
        return torch.where(self.mask.to(images.device), self.pattern.to(images.device), images)

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless images of shape (..., C, H, W) have the pattern's shape."""
        if tuple(shape[-3:]) != tuple(self.pattern.shape):
            raise ValueError(
                f"the trigger is for images of shape {tuple(self.pattern.shape)}, "
                f"got {tuple(shape[-3:])}"
            )


@dataclass(frozen=True, eq=False)
class Reasr:
    """What `reasr` found.

    Attributes
    ----------
    sizes : tuple of float
        Largest share of an image's pixels that a trigger has, ascending.
    classes : tuple of int
        The target classes.
    success : Tensor
        float64, (sizes, classes): attack success rate on the held-out images, as
        `tasks.metrics.attack_success` defines it.
    triggers : tuple of tuple of FoundTrigger
        The trigger of each size and class.
    """

    sizes: tuple[float, ...]
    classes: tuple[int, ...]
    success: Tensor
    triggers: tuple[tuple[FoundTrigger, ...], ...]

    @property
    def best(self) -> tuple[float, ...]:
        """REASR at each size: the attack success rate of the best class."""
        return tuple(self.success.max(1).values.tolist())


@dataclass(frozen=True)
class Search:
    """How triggers are looked for.

    Attributes
    ----------
    steps : int
        Steps of Adam, at least 2: half for the mask, half for the pattern on the mask's pixels.
    batch_size : int
        Images in each step, at least 1; each is stamped for every class.
    lr : float
        Adam's, above 0.
    weight : float
        Of what a mask has beyond its size, relative to that size, at the end of the first half; it
        grows evenly from 0. At least 0.
    """

    steps: int = 400
    batch_size: int = 32
    lr: float = 0.1
    weight: float = 10.0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")


DEFAULT = Search()


def reasr(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    held_out_images: Tensor,
    held_out_labels: Tensor,
    classes: Sequence[int],
    generator: torch.Generator,
    sizes: Sequence[float] = SIZES,
    search: Search = DEFAULT,
) -> Reasr:
    """Find, for each size and each target class, a trigger that turns images into that class.

    All classes are searched for at once. First a soft mask and a pattern are optimised, with a
    price on what the mask has beyond the size; then the mask is cut to the pixels in which it is
    greatest, and the pattern is optimised on these alone. So a trigger replaces whole pixels, and
    never more of them than its size allows. Since a larger trigger may do whatever a smaller one
    does, a class keeps the trigger of the size before if that turns more of the `images`.

    ABS looks only for triggers that excite single suspicious neurons, and NONE's published copy of
    it (``abs_test.py``) counts the images that its optimisation has just seen, with a translucent
    mask whose size is bounded by a price alone, and towards whatever class most of them go to.
    Here every class is searched for by itself through the whole network, the size is a bound, and
    success is measured on images that no search has seen.

    Parameters
    ----------
    model : torch.nn.Module
        Used in evaluation mode; neither its weights nor their gradients change.
    images, labels : Tensor, shapes (N, C, H, W) and (N,)
        To search with: uint8 and true labels, int64.
    held_out_images, held_out_labels : Tensor, shapes (M, C, H, W) and (M,)
        To measure with, none of them among `images`.
    classes : sequence of int
        The target classes.
    generator : torch.Generator
        Of the start and the batches, on the CPU: the same one gives the same result.
    sizes : sequence of float
        Shares of an image's pixels, in (0, 1]. A size of less than a pixel is a pixel.
    search : Search

    Raises
    ------
    ValueError
        When there is no size or class, a size is out of range, or, of `images` or of the held-out
        ones, none is outside one of the classes.
    """
    ordered, targets = tuple(sorted(sizes)), tuple(classes)
    if not ordered or not all(0 < size <= 1 for size in ordered):
        raise ValueError(f"sizes must be shares in (0, 1], at least one, got {tuple(sizes)}")
    if not targets:
        raise ValueError("classes must name at least one class")
    pixels = images.shape[-2] * images.shape[-1]
    success, triggers = [], []
    kept: list[FoundTrigger] = []
    for size in ordered:
        number = max(1, int(size * pixels + 1e-9))  # 0.29 of 100 is 29
        found = _find(model, images, labels, targets, number, generator, search)
        kept = _better(model, images, labels, targets, kept or found, found)
        triggers.append(tuple(kept))
        success.append(_rates(model, held_out_images, held_out_labels, targets, kept))
    return Reasr(ordered, targets, torch.tensor(success, dtype=torch.float64), tuple(triggers))


def _find(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    classes: tuple[int, ...],
    number: int,
    generator: torch.Generator,
    search: Search,
) -> list[FoundTrigger]:
    """Return a trigger of so many pixels for each class; see `reasr`."""
    channels, height, width = images.shape[1:]
    device = as_input(model, images[:1]).device
    # Logits of the mask and of the pattern. A mask begins at a half everywhere.
    start = torch.rand(len(classes), 1 + channels, height, width, generator=generator) - 0.5
    mask = (0.1 * start[:, :1]).to(device).requires_grad_()
    pattern = start[:, 1:].clone().to(device).requires_grad_()
    first = search.steps // 2

    with evaluating(model):
        adam = torch.optim.Adam([mask, pattern], lr=search.lr)
        for step in range(first):
            soft = mask.sigmoid()
            beyond = (soft.sum((1, 2, 3)) / number - 1).clamp(min=0).sum()
            loss = _miss(model, images, labels, classes, soft, pattern.sigmoid(), generator, search)
            _step(adam, loss + search.weight * step / first * beyond)

        hard = torch.zeros_like(mask).flatten(1)
        hard.scatter_(1, mask.detach().flatten(1).topk(number).indices, 1.0)
        hard = hard.view_as(mask)
        adam = torch.optim.Adam([pattern], lr=search.lr)
        for _ in range(search.steps - first):
            loss = _miss(model, images, labels, classes, hard, pattern.sigmoid(), generator, search)
            _step(adam, loss)

    levels = (pattern.detach().sigmoid() * 255).round().to(torch.uint8).cpu()
    masks = hard.bool().squeeze(1).cpu()
    return [FoundTrigger(m, p) for m, p in zip(masks, levels, strict=True)]


def _miss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    classes: tuple[int, ...],
    mask: Tensor,
    pattern: Tensor,
    generator: torch.Generator,
    search: Search,
) -> Tensor:
    """Return the cross-entropy to each class of a batch stamped for it, summed over classes.

    mask: (K, 1, H, W) and pattern: (K, C, H, W), in [0, 1]. Images of the class do not count.
    """
    drawn = torch.randint(len(images), (search.batch_size,), generator=generator)
    batch = as_input(model, images[drawn.to(images.device)])
    stamped = mask[:, None] * pattern[:, None] + (1 - mask[:, None]) * batch  # (K, B, C, H, W)
    targets = torch.tensor(classes, device=batch.device)[:, None].expand(-1, len(batch))
    counts = targets != labels[drawn.to(labels.device)].to(batch.device)
    entropy = nn.functional.cross_entropy(
        model(stamped.flatten(0, 1)), targets.flatten(), reduction="none"
    ).view_as(targets)
    return ((entropy * counts).sum(1) / counts.sum(1).clamp(min=1)).sum()


def _step(adam: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step, and leave no gradient in any weight of the network."""
    variables = [variable for group in adam.param_groups for variable in group["params"]]
    for variable, gradient in zip(variables, torch.autograd.grad(loss, variables), strict=True):
        variable.grad = gradient
    adam.step()


def _better(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    classes: tuple[int, ...],
    old: list[FoundTrigger],
    new: list[FoundTrigger],
) -> list[FoundTrigger]:
    """Return for each class the trigger that turns more images; of equals, the old one."""
    before, after = (_rates(model, images, labels, classes, group) for group in (old, new))
    return [
        second if better > good else first
        for first, second, good, better in zip(old, new, before, after, strict=True)
    ]


def _rates(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    classes: tuple[int, ...],
    triggers: Sequence[FoundTrigger],
) -> list[float]:
    """Return the attack success rate of each class's trigger."""
    rates = []
    for target, trigger in zip(classes, triggers, strict=True):
        wanted = partial(torch.full_like, fill_value=target)
        success = attack_success(model, images, labels, trigger, wanted, torch.Generator())
        rates.append(success.asr)
    return rates
