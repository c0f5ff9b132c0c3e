"""Ours: ``mixture`` and ``inversion`` together, which share no source of evidence.

``mixture`` names attackers early but believes what they report; ``inversion`` needs a backdoor that
works but no more than honest clients. Neither a liar's report nor a chance outlier is then enough
to damage the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from none_core.activations import Report
from none_core.detection import inversion, mixture
from none_core.detection.base import (
    NOTHING_RECENT,
    Detection,
    Detector,
    IntArray,
    Recent,
    Standing,
    upper_breaks,
)

_SECONDED = 2  # clients whose probes point at a class that mixture suspects: one may err


class Summary(NamedTuple):
    """One client's report as either detector keeps it; None where it was not asked."""

    mixture: mixture.Summary
    inversion: inversion.Summary | None


class Agreement(Detector):
    """Reset what ``inversion`` certifies, or what both see; suspect whom ``mixture`` suspects.

    - A class is attacked, as ``inversion`` says: its certified neurons are compromised, and of the
      others those that ``mixture`` scores, too (*supported*).
    - No class is attacked yet, but ``mixture`` sees suspected samples that the model reacts to, and
      two clients or more find the suspected label's trigger small: of its compromised neurons those
      that this trigger moves as well.

    Everything else is held back. Rounds that ask no probe are left to ``mixture`` for suspicions,
    and reset nothing.

    Parameters
    ----------
    mixture_detector : Mixture, optional
    inversion_detector : Inversion, optional
    """

    name = "mixture+inversion"
    statistics = mixture.Mixture.statistics | inversion.Inversion.statistics

    def __init__(
        self,
        mixture_detector: mixture.Mixture | None = None,
        inversion_detector: inversion.Inversion | None = None,
    ) -> None:
        self.mixture = mixture_detector or mixture.Mixture()
        self.inversion = inversion_detector or inversion.Inversion()

    def summarise(self, report: Report) -> Summary:
        """Keep what either detector keeps of the statistics that the report has."""
        probed = self.inversion.statistics <= report.spec.statistics
        return Summary(
            self.mixture.summarise(report), self.inversion.summarise(report) if probed else None
        )

    def detect(
        self,
        summaries: Mapping[int, Summary],
        layer_of: IntArray,
        bound: int | None = None,
        recent: Recent = NOTHING_RECENT,
    ) -> Detection:
        """Combine what both find."""
        reported = {client: s.mixture for client, s in summaries.items()}
        blended = self.mixture.detect(reported, layer_of, bound, recent)
        probed = {c: s.inversion for c, s in summaries.items() if s.inversion is not None}
        if not probed:
            return replace(
                blended, compromised=blended.compromised[:0], held_back=blended.compromised
            )
        inverted = self.inversion.detect(probed, layer_of, bound, recent)
        if inverted.alive:
            return self._attacked(blended, inverted)
        return self._suspected(blended, inverted, layer_of)

    def _attacked(self, blended: Detection, inverted: Detection) -> Detection:
        """Act on an attacked class."""
        assert inverted.standing is not None
        standing = inverted.standing.copy()
        seen = blended.scores[inverted.held_back] > 0
        standing[inverted.held_back[seen]] = Standing.SUPPORTED
        agreed = np.concatenate([inverted.compromised, inverted.held_back[seen]])
        return replace(
            blended,
            scores=inverted.scores,
            compromised=agreed[np.argsort(-inverted.scores[agreed], kind="stable")],
            held_back=inverted.held_back[~seen],
            alive=True,
            attacks=inverted.attacks,
            hints=inverted.hints,
            shifts=inverted.shifts,
            standing=standing,
        )

    def _suspected(self, blended: Detection, inverted: Detection, layer_of: IntArray) -> Detection:
        """Act on live suspicions, as far as the trigger to the suspected label agrees."""
        seconded = {label for label, clients in inverted.hints.items() if clients >= _SECONDED}
        labels = {s.label for s in blended.suspicions if s.alive} & seconded
        moved = [upper_breaks(np.maximum(inverted.shifts[k], 0), layer_of) for k in sorted(labels)]
        agreed = np.isin(blended.compromised, np.concatenate(moved) if moved else [])
        standing = np.full(len(layer_of), Standing.CONTESTED, dtype=np.int8)
        standing[blended.compromised[agreed]] = Standing.SUPPORTED
        return replace(
            blended,
            compromised=blended.compromised[agreed],
            held_back=blended.compromised[~agreed],
            hints=inverted.hints,
            shifts=inverted.shifts,
            standing=standing,
        )
