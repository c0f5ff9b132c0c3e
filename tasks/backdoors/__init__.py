"""Attacks on the training data of one machine: each poisons a training set and says what it wants.

`BadNets` (with any trigger: also Blended and WaNet) and `LabelSpecific` give poisoned samples wrong
labels; `LabelConsistent` and `HiddenTrigger` leave every label as it is. How well an attack works
is said by `tasks.metrics.attack_success`, which takes its `stamp` and its `wanted`.
"""

from __future__ import annotations

from tasks.backdoors.attack import Attack, Poisoned
from tasks.backdoors.badnets import BadNets, LabelSpecific
from tasks.backdoors.hidden_trigger import HiddenTrigger
from tasks.backdoors.label_consistent import LabelConsistent

__all__ = [
    "Attack",
    "BadNets",
    "HiddenTrigger",
    "LabelConsistent",
    "LabelSpecific",
    "Poisoned",
]
