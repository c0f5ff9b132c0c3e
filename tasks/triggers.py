"""Triggers as data: what is stamped on an image, for images of any size and number of channels.

The four kinds of Figure 3 in Wang et al., "Training with More Confidence: Mitigating Injected and
Natural Backdoors During Training" (NONE), NeurIPS 2022, are `single_pixel`, `StaticPatch`,
`DynamicPatch` and `Watermark`. `Blended` and `Warp` that paper does not have. `Pixels` adapts the
trigger of the distributed attack. The authors' code comes with finished images and names neither
colours nor positions, so those are arguments here.

A trigger that is the same in every image never touches the generator that it is given. Of one that
is drawn for each image, the same generator gives the same stamps for the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tasks.poisoning import Pixel, Trigger, stamp

_BRIGHTEST = 255
# Images that are floating-point numbers at a time.
_CHUNK = 256


class Stamp(Protocol):
    """A trigger."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return a stamped copy of images, uint8, shape (N, C, H, W), on the same device.

        The generator is on the CPU. Raises ValueError where `check` does, and TypeError for images
        that are not uint8.
        """

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless images of shape (..., C, H, W) can carry the trigger."""


class Pattern(Protocol):
    """What a patch looks like."""

    def draw(self, side: int, channels: int) -> Tensor:
        """Return the patch: uint8, shape (channels, side, side), on the CPU."""


# --- patterns ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solid:
    """One colour.

    Parameters
    ----------
    colour : tuple of int
        A level in 0..255 for each channel, or one for all.
    """

    colour: tuple[int, ...] = (_BRIGHTEST,)

    def __post_init__(self) -> None:
        """Refuse what is no colour."""
        if not self.colour or not all(0 <= level <= _BRIGHTEST for level in self.colour):
            raise ValueError(f"colour must be levels in 0..255, got {self.colour}")

    def draw(self, side: int, channels: int) -> Tensor:
        """Return the patch; see `Pattern`."""
        if len(self.colour) not in (1, channels):
            raise ValueError(f"colour must have 1 or {channels} levels, got {self.colour}")
        levels = torch.tensor(self.colour, dtype=torch.uint8)
        return levels.view(-1, 1, 1).repeat(channels // len(self.colour), side, side)


@dataclass(frozen=True)
class Checkerboard:
    """White squares of one pixel, beginning in the top left corner, and black ones.

    Source: Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning
    Model Supply Chain", 2017 (a pattern of bright pixels). The code that NONE's README names for
    poisoning, by Turner et al. (``poison_attack.py``), has the same 3x3 pixels in the bottom right
    corner of the image but for its top left one, which it makes black.
    """

    def draw(self, side: int, channels: int) -> Tensor:
        """Return the patch; see `Pattern`."""
        steps = torch.arange(side)
        white = (steps[:, None] + steps + 1) % 2
        return (white * _BRIGHTEST).to(torch.uint8).repeat(channels, 1, 1)


@dataclass(frozen=True)
class Noise:
    """Levels drawn uniformly, the same ones in every image.

    Parameters
    ----------
    seed : int
    """

    seed: int = 0

    def draw(self, side: int, channels: int) -> Tensor:
        """Return the patch; see `Pattern`."""
        return _levels((channels, side, side), torch.Generator().manual_seed(self.seed))


# --- patches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StaticPatch:
    """A square with a fixed pattern in a fixed place.

    Source: Gu et al., "BadNets", 2017.

    Parameters
    ----------
    side : int
        Rows and columns of the patch, at least 1; in NONE's tables 3 to 20.
    row, column : int
        The place of the patch: from the top (left) edge of the image to its own, or, if negative,
        from the bottom (right) edge of the image to its own, where -1 is flush with that edge.
    pattern : Pattern
    """

    side: int
    row: int = -1
    column: int = -1
    pattern: Pattern = Checkerboard()

    def __post_init__(self) -> None:
        """Refuse a patch without pixels."""
        _check_side(self.side)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Stamp; see `Stamp`."""
        _check_images(images, self)
        channels, height, width = images.shape[1:]
        top, left = _corner((self.row, self.column), self.side, height, width)
        stamped = images.clone()
        patch = self.pattern.draw(self.side, channels).to(images.device)
        stamped[:, :, top : top + self.side, left : left + self.side] = patch
        return stamped

    def check(self, shape: Sequence[int]) -> None:
        """Check; see `Stamp`."""
        self.pattern.draw(self.side, shape[-3])
        _check_place((self.row, self.column), self.side, shape)


def single_pixel(row: int = -1, column: int = -1, colour: tuple[int, ...] = (255,)) -> StaticPatch:
    """Return the trigger of one pixel; the arguments are those of `StaticPatch` and `Solid`.

    Source: Gu et al., "BadNets", 2017 (the single-pixel backdoor).
    """
    return StaticPatch(1, row, column, Solid(colour))


@dataclass(frozen=True)
class DynamicPatch:
    """A square whose place, and whose pattern unless it is fixed, is drawn for each image.

    Source: Salem, Wen, Backes, Ma, Zhang, "Dynamic Backdoor Attacks Against Machine Learning
    Models", EuroS&P 2022: the Random Backdoor, whose patterns are uniformly random and whose places
    come from a set. With a fixed pattern it is the trigger of Saha et al., "Hidden Trigger Backdoor
    Attacks", AAAI 2020.

    Parameters
    ----------
    side : int
        Rows and columns of the patch, at least 1.
    places : tuple of (int, int)
        The set, each as in `StaticPatch`; if empty, every place inside the image.
    pattern : Pattern, optional
        The same for every image; by default levels drawn uniformly for each.
    """

    side: int
    places: tuple[Pixel, ...] = ()
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        """Refuse a patch without pixels."""
        _check_side(self.side)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Stamp; see `Stamp`."""
        _check_images(images, self)
        number, channels, height, width = images.shape
        corners = self._corners(height, width)
        drawn = torch.randint(len(corners), (number,), generator=generator)
        tops, lefts = corners[drawn].to(images.device).T
        if self.pattern is None:
            patches = _levels((number, channels, self.side, self.side), generator)
        else:
            patches = self.pattern.draw(self.side, channels)
        steps = torch.arange(self.side, device=images.device)
        rows, columns = tops[:, None] + steps, lefts[:, None] + steps
        stamped = images.clone()
        stamped[
            torch.arange(number, device=images.device)[:, None, None, None],
            torch.arange(channels, device=images.device)[:, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ] = patches.to(images.device)
        return stamped

    def check(self, shape: Sequence[int]) -> None:
        """Check; see `Stamp`."""
        if self.pattern is not None:
            self.pattern.draw(self.side, shape[-3])
        for place in self.places or ((0, 0),):
            _check_place(place, self.side, shape)

    def _corners(self, height: int, width: int) -> Tensor:
        """Return the top left pixel of each place: (places, 2)."""
        places = self.places or tuple(
            product(range(height - self.side + 1), range(width - self.side + 1))
        )
        return torch.tensor([_corner(place, self.side, height, width) for place in places])


@dataclass(frozen=True)
class Together:
    """Several triggers on the same image, one after the other.

    Source: the trigger in all four corners of Turner, Tsipras, Madry, "Label-Consistent Backdoor
    Attacks", 2019 (``all-corners`` in ``poison_attack.py``), is four `StaticPatch`.

    Parameters
    ----------
    parts : tuple of Stamp
        At least one.
    """

    parts: tuple[Stamp, ...]

    def __post_init__(self) -> None:
        """Refuse a trigger that would leave no mark."""
        if not self.parts:
            raise ValueError("a trigger needs at least one part")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Stamp; see `Stamp`."""
        for part in self.parts:
            images = part(images, generator)
        return images

    def check(self, shape: Sequence[int]) -> None:
        """Check; see `Stamp`."""
        for part in self.parts:
            part.check(shape)


@dataclass(frozen=True)
class Pixels:
    """The whole trigger of the distributed attack: pixels at the maximum value in all channels.

    Source: Xie et al., "DBA", ICLR 2020; see `tasks.poisoning.Trigger`.

    Parameters
    ----------
    trigger : Trigger
    """

    trigger: Trigger

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Stamp; see `Stamp`. Floating-point images in [0, 1] are taken as well."""
        return stamp(images, self.trigger.whole())

    def check(self, shape: Sequence[int]) -> None:
        """Check; see `Stamp`."""
        self.trigger.check(shape)


# --- the whole image -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Watermark:
    """A translucent white symbol over the whole image: a ring and the two diagonals.

    Source: the watermark of NONE's Figure 3; its symbol is not published as a file. Whatever the
    symbol, it is blended as in Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems
    Using Data Poisoning", 2017.

    Parameters
    ----------
    opacity : float
        In [0, 1]; 0 leaves the images as they are.
    """

    opacity: float = 0.3

    def __post_init__(self) -> None:
        """Refuse an opacity out of range."""
        _check_share("opacity", self.opacity)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Stamp; see `Stamp`."""
        _check_images(images, self)
        opacity = self.opacity * symbol(*images.shape[-2:]).to(images.device)
        return _blend(images, torch.tensor(float(_BRIGHTEST), device=images.device), opacity)

    def check(self, shape: Sequence[int]) -> None:
        """Accept any shape; see `Stamp`."""


def symbol(height: int, width: int) -> Tensor:
    """Return the symbol of `Watermark`: float32, (height, width), 1 where it is and 0 elsewhere."""
    down, right = (torch.linspace(-1, 1, side) for side in (height, width))
    # A line is a tenth of the image wide, and at least a pixel.
    half_line = max(0.1, 1 / max(1, min(height, width) - 1))
    ring = (torch.hypot(down[:, None], right) - 0.75).abs() <= half_line
    diagonals = (down[:, None].abs() - right.abs()).abs() <= half_line
    return (ring | diagonals).float()


@dataclass(frozen=True)
class Blended:
    """A fixed image of noise blended with every image: ``(1 - alpha) image + alpha noise``.

    Source: Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data
    Poisoning", 2017, the blended injection strategy with a random pattern. They may blend more
    strongly at test time than in the poisoned samples; for that use two of these.

    Parameters
    ----------
    alpha : float
        Share of the noise, in [0, 1]; 0 leaves the images as they are.
    seed : int
        Of the noise, which also depends on the images' shape.
    """

    alpha: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a share out of range."""
        _check_share("alpha", self.alpha)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Stamp; see `Stamp`."""
        _check_images(images, self)
        noise = _levels(images.shape[1:], torch.Generator().manual_seed(self.seed))
        alpha = torch.tensor(self.alpha, device=images.device)
        return _blend(images, noise.to(images.device), alpha)

    def check(self, shape: Sequence[int]) -> None:
        """Accept any shape; see `Stamp`."""


@dataclass(frozen=True)
class Warp:
    """WaNet: every image is warped by the same smooth random field.

    Source: Nguyen, Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021. A field
    of `grid` x `grid` random vectors with a mean absolute coordinate of 1 is upsampled bicubically
    to the size of the image, scaled by ``strength / side``, added to the identity and clipped to
    the image; pixels are read there bilinearly. In coordinates that run from -1 to 1 a strength of
    1 moves a pixel by half a pixel on average.

    Their published code (``train.py``) takes square images only and warps while it trains, with
    unrounded results. Here the sides may differ and the result is rounded to uint8.

    Parameters
    ----------
    grid : int
        ``k`` in the paper, at least 2.
    strength : float
        ``s`` in the paper, at least 0; 0 leaves the images as they are.
    seed : int
        Of the field.
    """

    grid: int = 4
    strength: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no field."""
        if self.grid < 2:
            raise ValueError(f"grid must be at least 2, got {self.grid}")
        if self.strength < 0:
            raise ValueError(f"strength must be at least 0, got {self.strength}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Stamp; see `Stamp`."""
        _check_images(images, self)
        moved = self.positions(*images.shape[-2:]).clamp(-1, 1).to(images.device)
        chunks = [_sample(chunk, moved.expand(len(chunk), -1, -1, -1)) for chunk in _split(images)]
        return torch.cat([images[:0], *chunks])

    def check(self, shape: Sequence[int]) -> None:
        """Accept any shape; see `Stamp`."""

    def positions(self, height: int, width: int) -> Tensor:
        """Return where each pixel is read, unclipped: (1, height, width, 2), x before y, -1 to 1.

        The order and the range are those of `torch.nn.functional.grid_sample` with aligned corners.
        """
        generator = torch.Generator().manual_seed(self.seed)
        control = torch.rand(1, 2, self.grid, self.grid, generator=generator) * 2 - 1
        control = control / control.abs().mean()
        field = functional.interpolate(
            control, size=(height, width), mode="bicubic", align_corners=True
        ).permute(0, 2, 3, 1)
        down, right = (torch.linspace(-1, 1, side) for side in (height, width))
        identity = torch.stack(torch.meshgrid(right, down, indexing="xy"), dim=-1)
        return identity + self.strength * field / torch.tensor([width, height])


@dataclass(frozen=True)
class NoisyWarp:
    """WaNet's noise mode: the warp, with noise that is drawn for each image added to its field.

    Images warped so keep their labels, and teach a network to answer to `warp` alone (Nguyen, Tran,
    ICLR 2021; uniform in [-1, 1] divided by the side, as in ``train.py``).

    Parameters
    ----------
    warp : Warp
    """

    warp: Warp = Warp()

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Stamp; see `Stamp`."""
        _check_images(images, self)
        height, width = images.shape[-2:]
        positions = self.warp.positions(height, width)
        sides = torch.tensor([width, height])
        chunks = []
        for chunk in _split(images):
            noise = torch.rand(len(chunk), height, width, 2, generator=generator) * 2 - 1
            moved = (positions + noise / sides).clamp(-1, 1)
            chunks.append(_sample(chunk, moved.to(images.device)))
        return torch.cat([images[:0], *chunks])

    def check(self, shape: Sequence[int]) -> None:
        """Accept any shape; see `Stamp`."""


# --- what they share -----------------------------------------------------------------------------


def _check_images(images: Tensor, trigger: Stamp) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    trigger.check(images.shape)


def _check_side(side: int) -> None:
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _check_place(place: Pixel, side: int, shape: Sequence[int]) -> None:
    height, width = shape[-2:]
    top, left = _corner(place, side, height, width)
    if not (0 <= top <= height - side and 0 <= left <= width - side):
        raise ValueError(
            f"a patch of {side}x{side} at (row, column) {place} does not lie inside "
            f"the {height}x{width} image"
        )


def _corner(place: Pixel, side: int, height: int, width: int) -> Pixel:
    """Return the top left pixel of a patch at a place, which may count from the other edge."""
    row, column = place
    return (
        row if row >= 0 else height - side + 1 + row,
        column if column >= 0 else width - side + 1 + column,
    )


def _levels(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(256, tuple(shape), generator=generator, dtype=torch.uint8)


def _blend(images: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Return ``(1 - weight) images + weight other``, in levels, rounded to uint8."""
    blended = [
        ((1 - weight) * chunk + weight * other).round().to(torch.uint8) for chunk in _split(images)
    ]
    return torch.cat([images[:0], *blended])


def _split(images: Tensor) -> tuple[Tensor, ...]:
    return images.split(_CHUNK) if len(images) else ()


def _sample(images: Tensor, positions: Tensor) -> Tensor:
    """Read images (N, C, H, W) at positions (N, H, W, 2); see `Warp.positions`."""
    return (
        functional.grid_sample(images.float(), positions, align_corners=True)
        .round()
        .to(torch.uint8)
    )
