"""Defences that the paper compares NONE with on one machine, and ordinary training, by name.

One file a paper; each is a `Method` with that paper's hyperparameters as fields.
"""

from __future__ import annotations

from simulations.central.baselines.abl import AntiBackdoorLearning
from simulations.central.baselines.activation_clustering import ActivationClustering
from simulations.central.baselines.base import Baseline
from simulations.central.baselines.dp_sgd import NARROW, WIDE
from simulations.central.baselines.fine_pruning import FinePruning
from simulations.central.baselines.nad import NeuralAttentionDistillation
from simulations.central.baselines.plain import Plain

METHODS: dict[str, Baseline] = {
    "undefended": Plain(),
    "dp-sgd-4.0-0.1": WIDE,
    "dp-sgd-1.0-0.5": NARROW,
    "nad": NeuralAttentionDistillation(),
    "activation-clustering": ActivationClustering(),
    "abl": AntiBackdoorLearning(),
    "fine-pruning": FinePruning(),
}
