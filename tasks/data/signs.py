"""Synthetic traffic signs over made-up scenes: a data set of any size that needs no files.

As Karra, Ashcraft, Fendley, "The TrojAI Software Framework: An Open Source tool for Embedding
Trojans into Deep Learning Models", 2020 (arXiv:2003.07233), describe its traffic signs: a class is
a polygon of one colour with a symbol in it, shown at a random place, in a random size and slightly
turned, under changing light, over a background. Its backgrounds are photographs of roads; here they
are made as well: a sky, a ground, and clouds of noise from coarse to fine.

An image depends on the seed, the split and its own number alone: asking for more adds images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tasks.data.dataset import Data, Images, Labels, Source, assemble

# A result is only comparable with another one on the same images, so it is a constant.
SEED = 20221130
CLASSES = 10

_T = TypeVar("_T")
_Array = npt.NDArray[np.float32]
_Polygon = tuple[tuple[float, float], ...]  # convex; (x, y), y downwards

# How many of each there are shares no factor with the others', so that counting through all three
# at once gives 5 * 6 * 7 different classes.
_SIDES = {3: "triangle", 4: "square", 5: "pentagon", 6: "hexagon", 8: "octagon"}
_COLOURS = {
    "red": (200, 30, 40),
    "blue": (30, 70, 180),
    "yellow": (235, 200, 30),
    "green": (30, 140, 70),
    "white": (235, 235, 235),
    "orange": (235, 120, 20),
}


def _box(left: float, top: float, right: float, bottom: float) -> _Polygon:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


# Convex parts in a sign of radius 1, all within 0.5 of its centre.
_SYMBOLS: dict[str, tuple[_Polygon, ...]] = {
    "bar": (_box(-0.42, -0.12, 0.42, 0.12),),
    "cross": (_box(-0.4, -0.1, 0.4, 0.1), _box(-0.1, -0.4, 0.1, 0.4)),
    "arrow": (((-0.34, 0.0), (0.0, -0.44), (0.34, 0.0)), _box(-0.11, -0.02, 0.11, 0.42)),
    "diamond": (((0.0, -0.42), (0.36, 0.0), (0.0, 0.42), (-0.36, 0.0)),),
    "two posts": (_box(-0.34, -0.34, -0.12, 0.34), _box(0.12, -0.34, 0.34, 0.34)),
    "corner": (_box(-0.3, -0.36, -0.08, 0.34), _box(-0.3, 0.12, 0.36, 0.34)),
    "hourglass": (
        ((-0.32, -0.38), (0.32, -0.38), (0.0, 0.02)),
        ((-0.32, 0.38), (0.0, -0.02), (0.32, 0.38)),
    ),
}
MOST_CLASSES = len(_SIDES) * len(_COLOURS) * len(_SYMBOLS)

_RADIUS = (0.2, 0.4)  # of a sign, as a share of the image's side
_TURN = np.pi / 12  # at most, either way
_LIGHT = (0.6, 1.1)  # factor on all of an image's pixels
_OCTAVES = (2, 4, 8, 16)  # cells of noise across an image


def names(classes: int) -> tuple[str, ...]:
    """Name the first so many classes, "red triangle with a bar" and so on.

    Raises
    ------
    ValueError
        For fewer than 2, or more than `MOST_CLASSES`.
    """
    if not 2 <= classes <= MOST_CLASSES:
        raise ValueError(f"classes must be in 2..{MOST_CLASSES}, got {classes}")
    sides, colours, symbols = list(_SIDES.values()), list(_COLOURS), list(_SYMBOLS)
    return tuple(
        f"{_nth(colours, label)} {_nth(sides, label)} with {_article(_nth(symbols, label))}"
        for label in range(classes)
    )


def generate(
    train: int, test: int, side: int, classes: int = CLASSES, seed: int = SEED, name: str = "signs"
) -> Data:
    """Draw a data set; its classes are equally frequent, but for what does not divide evenly.

    Parameters
    ----------
    train, test : int
        Number of images in each split.
    side : int
        Height and width of an image, at least 16: below, symbols cannot be told apart.
    classes : int
        At most `MOST_CLASSES`.
    seed : int
        Fixes all images.
    name : str
        Of the data set.

    Raises
    ------
    ValueError
        For a number out of range.
    """
    known = names(classes)
    if side < 16:
        raise ValueError(f"side must be at least 16, got {side}")
    if min(train, test) < 0:
        raise ValueError(f"numbers of images must be at least 0, got {train} and {test}")
    parts = [_split(number, side, classes, [seed, i]) for i, number in enumerate((train, test))]
    return assemble(name, parts[0], parts[1], known)


def _split(number: int, side: int, classes: int, seed: list[int]) -> tuple[Images, Labels]:
    images = np.empty((number, 3, side, side), dtype=np.uint8)
    labels = np.arange(number) % classes
    for index, label in enumerate(labels):
        images[index] = _image(int(label), side, np.random.default_rng([*seed, index]))
    return images, labels


def _image(label: int, side: int, rng: np.random.Generator) -> Images:
    """Draw one image, (3, side, side)."""
    radius = rng.uniform(*_RADIUS) * side
    centre = rng.uniform(radius, side - radius, size=2)
    turn, light = rng.uniform(-_TURN, _TURN), rng.uniform(*_LIGHT)
    scene = _background(side, rng)

    # Only where the sign is; (x, y) of each pixel as the sign, upright and of radius 1, has them.
    first = np.floor(centre - radius).astype(int)
    last = np.ceil(centre + radius).astype(int)
    x, y = ((np.arange(first[i], last[i]) + 0.5 - centre[i]) / radius for i in (0, 1))
    across, down = np.meshgrid(x, y)
    cos, sin = np.cos(turn), np.sin(turn)
    across, down = cos * across + sin * down, cos * down - sin * across

    face = np.array(_nth(list(_COLOURS.values()), label), dtype=np.float32)
    ink = np.full(3, 20 if face.mean() > 128 else 240, dtype=np.float32)
    window = scene[:, first[1] : last[1], first[0] : last[0]]
    _paint(window, face, _coverage(_regular(_nth(list(_SIDES), label)), across, down, radius))
    for part in _nth(list(_SYMBOLS.values()), label):
        _paint(window, ink, _coverage(part, across, down, radius))

    grain = rng.normal(scale=4.0, size=scene.shape)
    return np.clip(scene * light + grain, 0, 255).astype(np.uint8)


def _background(side: int, rng: np.random.Generator) -> _Array:
    """Draw a scene without a sign, (3, side, side), values 0 to 255."""
    horizon = rng.uniform(0.3, 0.7)
    sky, ground = rng.uniform(90, 230, size=3), rng.uniform(30, 150, size=3)
    rows = (np.arange(side) + 0.5) / side
    share = np.clip((rows - horizon) * 8 + 0.5, 0, 1)  # of the ground, with a soft border
    scene = sky[:, None] * (1 - share) + ground[:, None] * share
    clouds = np.zeros((3, side, side))
    for cells in _OCTAVES:
        coarse = rng.normal(scale=60 / cells**0.5, size=(3, cells + 1, cells + 1))
        stretch = _stretch(cells, side)
        clouds += stretch @ coarse @ stretch.T
    return (scene[:, :, None] + clouds).clip(0, 255).astype(np.float32)


def _stretch(cells: int, side: int) -> npt.NDArray[np.float64]:
    """Return the matrix (side, cells + 1) that interpolates linearly between the cells' corners."""
    at = (np.arange(side) + 0.5) / side * cells
    return np.clip(1 - np.abs(at[:, None] - np.arange(cells + 1)), 0, 1)


def _regular(sides: int) -> _Polygon:
    """Return a regular polygon that stands on one of its sides, clockwise on the screen."""
    angles = np.pi / 2 + np.pi * (2 * np.arange(sides) + 1) / sides
    return tuple(zip(np.cos(angles).tolist(), np.sin(angles).tolist(), strict=True))


def _coverage(
    polygon: _Polygon, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], scale: float
) -> npt.NDArray[np.float64]:
    """Return how much of each pixel a convex polygon covers, 0 to 1, soft over one pixel's width.

    Its corners go clockwise on the screen; `scale` is the number of pixels in a unit of length.
    """
    inside = np.full(x.shape, np.inf)
    for (ax, ay), (bx, by) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
        length = np.hypot(bx - ax, by - ay)
        inside = np.minimum(inside, ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / length)
    return np.clip(inside * scale + 0.5, 0, 1)


def _paint(scene: _Array, colour: _Array, coverage: npt.NDArray[np.float64]) -> None:
    """Lay a colour over a scene (3, H, W), in place."""
    scene += coverage * (colour[:, None, None] - scene)


def _nth(choices: Sequence[_T], number: int) -> _T:
    """Count through the choices, again and again."""
    return choices[number % len(choices)]


def _article(noun: str) -> str:
    if noun.startswith("two "):
        return noun
    return f"an {noun}" if noun in ("arrow", "hourglass") else f"a {noun}"


def _load(
    name: str, data_root: Path | None, download: bool, *, train: int, test: int, side: int
) -> Data:
    return generate(train, test, side, name=name)


def source(train: int, test: int, side: int) -> Source:
    """Return a data set of so many images of one size, in pixels."""
    load = partial(_load, train=train, test=test, side=side)
    return Source(names(CLASSES), (3, side, side), load)
