"""Ordinary training with nothing done against poisoned images, for defences to be held against."""

from __future__ import annotations

from dataclasses import dataclass

from simulations.central.baselines.base import Baseline, undefended
from simulations.central.setting import Outcome, Setting


@dataclass(frozen=True)
class Plain(Baseline):
    """SGD with the cross-entropy over all images."""

    def validate(self) -> None:
        """Nothing to check: there are no fields."""

    def train(self, setting: Setting) -> Outcome:
        """Follow the schedule."""
        return Outcome(undefended(setting))
