"""How long a run will take, from how long those like it have taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from statistics import mean
from typing import Protocol

from simulations import results
from tasks.data import SHAPES

START_SECONDS = 4.0  # what a process needs beside the run itself
# Seconds of one core for a training image, before anything has been measured.
_GUESS = 3.5e-4
_IMAGES = {
    "mnist5k": 4_000,
    "mnist": 60_000,
    "fashion-mnist": 60_000,
    "gtsrb": 13_069,
    "imagenet10": 9_469,
    "imagenet10-64": 9_469,
    "signs": 5_000,
    "signs224": 2_000,
}
_MANY = 50_000
_DEARER = {
    "mnist-cnn": 1.0,
    "cifar-cnn": 2.0,
    "cifar-cnn-bn": 2.0,
    "resnet18": 60.0,
    "resnet18-small": 7.0,
    "nin": 27.0,
    "nin-bn": 30.0,
    "nin-small": 3.0,
    "nin-small-bn": 4.0,
    "alexnet": 20.0,
    "vgg11": 23.0,
    "vgg11-bn": 25.0,
    "vgg11-small": 3.0,
    "vgg16": 45.0,
    "vgg16-bn": 50.0,
}
_PIXELS = 32 * 32  # of the images that these costs are for


class Job(Protocol):
    """Something that runs for a while, and leaves a ``timing.json``."""

    @property
    def effort(self) -> float:
        """How much there is to do, as `effort` counts it."""

    @property
    def likenesses(self) -> Sequence[Hashable]:
        """What it has in common with others, the most telling first."""


def effort(dataset: str, model: str, images: int | None, passes: float) -> float:
    """Return how much there is to train: images seen, weighed by what the network costs.

    Parameters
    ----------
    dataset, model : str
    images : int or None
        Of the training images, at most so many are used; None: all of them.
    passes : float
        How often each is seen.
    """
    there = _IMAGES.get(dataset, _MANY)
    _, height, width = SHAPES[dataset]
    larger = max(1.0, height * width / _PIXELS)
    return min(there, images or there) * passes * larger * _DEARER.get(model, 2.0)


class Durations:
    """What finished runs have taken, by what they have in common with others."""

    def __init__(self) -> None:
        self._rates: defaultdict[Hashable, list[float]] = defaultdict(list)

    def add(self, job: Job, folder: Path) -> None:
        """Learn from a finished run's ``timing.json``, if there is one."""
        try:
            seconds = float(results.read(folder, results.TIMING)["seconds"])
        except (results.ResultError, KeyError):
            return
        for likeness in (*job.likenesses, None):
            self._rates[likeness].append(seconds / job.effort)

    def expected(self, job: Job) -> float:
        """Return the seconds that a run will take, judged by the most alike."""
        for likeness in (*job.likenesses, None):
            if rates := self._rates.get(likeness):
                return START_SECONDS + mean(rates) * job.effort
        return START_SECONDS + _GUESS * job.effort


def together(seconds: Sequence[float], workers: int) -> float:
    """Return how long several runs take on so many cores, at best."""
    return max(sum(seconds) / workers, max(seconds, default=0.0))


def spell(seconds: float) -> str:
    """Write a duration as people say it, "2 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
