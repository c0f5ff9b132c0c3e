"""Ours: the attacked class is the one that a far smaller trigger leads to; honest clients suffice.

Sources: Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
Networks", IEEE S&P 2019 (trigger inversion, outliers by median absolute deviation), here looked for
by the clients (:mod:`none_core.trigger_inversion`) and pooled so that a minority of them may lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from none_core.activations import TRIGGER_SHIFT, Report
from none_core.detection.base import (
    MAD_TO_SIGMA,
    NOTHING_RECENT,
    Attack,
    Detection,
    Detector,
    FloatArray,
    IntArray,
    Recent,
    Standing,
    upper_breaks,
)
from none_core.order_statistics import (
    most_liars,
    some_honest_at_least,
)

_SMALLEST = 1e-4  # share of an input below which masks are not told apart


class Summary(NamedTuple):
    """One client's probes: which classes (K,), mask size and success (K,), shift (K, J)."""

    probed: NDArray[np.bool_]
    size: NDArray[np.float32]
    success: NDArray[np.float32]
    shift: NDArray[np.float32]


class Inversion(Detector):
    """Pool what the clients' trigger inversions found.

    1. For each client alone, a class is an outlier if the logarithm of its trigger's size is
       ``outlier`` robust standard deviations below that of its median class, the size at most
       ``ratio`` of that class's, and the trigger works.
    2. A class is attacked if it is an outlier for more clients than any minority has. Without such
       a class there is nothing to do: this is the stop rule as well.
    3. The neurons are ranked by the median over clients of how far the attacked class's trigger
       moves them; natural breaks (Jenks) separate the compromised ones in each layer.

    A *watched* class was attacked a short while ago. For it the clients report what the trigger
    that they found then still does, and the backdoor is alive as long as for as many clients that
    turns ``lasting`` of the images: far less than what makes a class an outlier again.

    So no minority can make up an attack, and what it says of other classes, large or small, changes
    nothing about what the honest clients see. An attack is *certified* against f liars if more than
    2f clients looked for it, and a neuron if its (f + 1)-th largest shift is still above the break.
    Neurons that are not certified are held back.

    Parameters
    ----------
    outlier : float
        Robust standard deviations below the median class, > 0.
    ratio : float
        Largest size of an attacked class's trigger relative to the median class's, in (0, 1).
    lasting : float
        Success of a watched class's old trigger from which the backdoor is still alive, in (0, 1).
    spread : float
        Least standard deviation of the logarithms of sizes, > 0: a few classes can be alike by
        chance.
    """

    name = "inversion"
    statistics = frozenset({TRIGGER_SHIFT})

    def __init__(
        self,
        outlier: float = 3.0,
        ratio: float = 0.5,
        lasting: float = 0.01,
        spread: float = 0.15,
    ) -> None:
        if not outlier > 0:
            raise ValueError(f"outlier must be > 0, got {outlier}")
        if not 0 < ratio < 1:
            raise ValueError(f"ratio must be in (0, 1), got {ratio}")
        if not spread > 0:
            raise ValueError(f"spread must be > 0, got {spread}")
        if not 0 < lasting < 1:
            raise ValueError(f"lasting must be in (0, 1), got {lasting}")
        self.outlier, self.ratio = outlier, ratio
        self.lasting, self.spread = lasting, spread

    def summarise(self, report: Report) -> Summary:
        """Keep sizes, successes and shifts."""
        return Summary(*report.trigger_shift())

    def detect(
        self,
        summaries: Mapping[int, Summary],
        layer_of: IntArray,
        bound: int | None = None,
        recent: Recent = NOTHING_RECENT,
    ) -> Detection:
        """Find attacked classes and the neurons that their triggers move."""
        found = [s for _, s in sorted(summaries.items()) if s.probed.any()]
        if not found:
            return Detection(
                scores=np.zeros(len(layer_of)),
                compromised=np.empty(0, dtype=np.int64),
                alive=False,
                standing=np.full(len(layer_of), Standing.CONTESTED, dtype=np.int8),
            )
        liars = most_liars(len(summaries), bound)
        probed = np.stack([s.probed for s in found])
        shifts = {
            int(k): np.median([s.shift[k] for s in found if s.probed[k]], axis=0)
            for k in np.flatnonzero(probed.any(0))
        }
        attacks, hints = self._attacks(found, probed, liars, recent.watched)
        confirmed = [a for a in attacks if a.label in recent.expected]
        scores = np.zeros(len(layer_of))
        for attack in confirmed or attacks:
            scores = np.maximum(scores, shifts[attack.label])
        compromised = upper_breaks(scores, layer_of)
        standing = np.full(len(layer_of), Standing.CONTESTED, dtype=np.int8)
        lowest = _lowest_of_each_layer(scores, compromised, layer_of)
        for attack in (a for a in confirmed or attacks if a.certified):
            mine = np.stack([s.shift[attack.label] for s in found if s.probed[attack.label]])
            supported = some_honest_at_least(mine, liars) >= lowest
            standing[supported] = Standing.CERTIFIED
        certain = standing[compromised] == Standing.CERTIFIED
        return Detection(
            scores=scores,
            compromised=compromised[certain],
            held_back=compromised[~certain],
            alive=bool(attacks),
            attacks=attacks,
            hints=hints,
            shifts=shifts,
            standing=standing,
        )

    def _attacks(
        self,
        found: list[Summary],
        probed: NDArray[np.bool_],
        liars: int,
        watched: frozenset[int],
    ) -> tuple[tuple[Attack, ...], dict[int, int]]:
        labels = np.flatnonzero(probed.any(0))
        if len(labels) < 3:  # an outlier among two is either of them
            return (), {}
        strength, witness = self.own_views(found)
        success = np.stack([s.success for s in found])
        typical = np.nanmedian(_log_sizes(found)[:, labels], axis=0)
        attacks: list[Attack] = []
        hints: dict[int, int] = {}
        for i, k in enumerate(labels):
            looked = probed[:, k]
            views = success[:, k] >= self.lasting if int(k) in watched else witness[:, k]
            if views[looked].sum() <= most_liars(int(looked.sum())):
                if witness[:, k].any():
                    hints[int(k)] = int(witness[:, k].sum())
                continue
            attacks.append(
                Attack(
                    label=int(k),
                    size=float(np.exp(typical[i])),
                    usual=float(np.exp(np.median(typical))),
                    strength=float(np.median(strength[looked, k])),
                    certified=int(looked.sum()) > 2 * liars,
                )
            )
        return tuple(attacks), hints

    def own_views(self, found: Sequence[Summary]) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Judge as each client alone would.

        Parameters
        ----------
        found : sequence of Summary
            Each of at least one class.

        Returns
        -------
        tuple of ndarray
            How many robust standard deviations each class's size is below the client's median
            class, (n, K), NaN for what it did not probe; and whether it calls the class attacked,
            (n, K). One that probed fewer than three classes says nothing.
        """
        probed, logs = np.stack([s.probed for s in found]), _log_sizes(found)
        centre = np.nanmedian(logs, axis=1, keepdims=True)
        deviation = MAD_TO_SIGMA * np.nanmedian(np.abs(logs - centre), axis=1, keepdims=True)
        strength = (centre - logs) / np.maximum(deviation, self.spread)
        strength[(probed.sum(1) < 3)[:, None] & probed] = -np.inf
        small = logs - centre <= np.log(self.ratio)
        works = np.stack([s.success for s in found]) > 0.5
        return strength, probed & (strength >= self.outlier) & small & works


def _log_sizes(found: Sequence[Summary]) -> FloatArray:
    """Logarithms of the sizes, (n, K), NaN for what was not probed."""
    size = np.stack([np.where(s.probed, s.size, np.nan) for s in found])
    logs: FloatArray = np.log(np.maximum(size.astype(np.float64), _SMALLEST))
    return logs


def _lowest_of_each_layer(scores: FloatArray, chosen: IntArray, layer_of: IntArray) -> FloatArray:
    """Lowest chosen score of each neuron's layer, (J,); infinity where none is chosen."""
    lowest = np.full(int(layer_of.max()) + 1, np.inf)
    np.minimum.at(lowest, layer_of[chosen], scores[chosen])
    each: FloatArray = lowest[layer_of]
    return each
