"""The strategy that a configuration names: plain averaging, ours, and the peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from none_core.detection import DETECTORS, Agreement, Detector, Inversion, Mixture
from none_core.flower import NoneStrategy
from none_core.flower.defence import AuditSink
from server.config import DefenseConfig, ThresholdsConfig
from server.peers.flame import Flame
from server.peers.foolsgold import FoolsGold
from server.peers.oracle import Oracle
from server.peers.pruning import Pruning
from server.peers.rfa import RFA
from server.peers.rlr import RobustLearningRate
from server.peers.stock import Bulyan, FedMedian, FedTrimmedAvg, MultiKrum

_NOISE = 30  # stream of random numbers that the experiment's seed is split into


def build(
    config: DefenseConfig,
    thresholds: ThresholdsConfig,
    clients: int,
    model_fn: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    seed: int,
    audit: AuditSink,
) -> Strategy:
    """Build the configured strategy; all clients train in every round, none evaluates.

    Parameters
    ----------
    config : DefenseConfig
    thresholds : ThresholdsConfig
    clients : int
        Number of participants.
    model_fn : callable
        Builds the global model.
    shape : tuple of int
        One image, (C, H, W).
    seed : int
    audit : callable
        Where the defence's decisions go.

    Raises
    ------
    ConfigError
        If the settings do not go with the number of clients.
    """
    config.check(clients)
    everybody: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": clients,
        "min_available_nodes": clients,
    }
    match config.name:
        case "undefended":
            return FedAvg(**everybody)
        case "fedmedian":
            return FedMedian(**everybody)
        case "trimmed-avg":
            return FedTrimmedAvg(**everybody, beta=config.trim_beta)
        case "multikrum":
            return MultiKrum(
                **everybody,
                num_malicious_nodes=config.f,
                num_nodes_to_select=clients - config.f,
            )
        case "bulyan":
            return Bulyan(**everybody, num_malicious_nodes=config.f)
        case "rfa":
            return RFA(**everybody)
        case "rlr":
            return RobustLearningRate(**everybody, threshold=config.rlr_threshold)
        case "foolsgold":
            return FoolsGold(**everybody)
        case "flame":
            generator = np.random.default_rng([seed, _NOISE])
            return Flame(generator, **everybody, noise=config.flame_noise)
        case "oracle":
            return Oracle(**everybody)
        case "pruning":
            return Pruning(
                model_fn,
                torch.zeros(1, *shape),
                **everybody,
                guard=config.guard,
                quorum=config.quorum,
                min_count=config.min_count,
                timeout=config.timeout,
            )
        case "none-strategy":
            return NoneStrategy(
                FedAvg(**everybody),
                model_fn,
                torch.zeros(1, *shape),
                detector=_detector(config.detector, thresholds),
                reset=config.reset,
                every=config.every,
                start_round=config.start_round,
                budget=config.budget,
                quorum=config.quorum,
                guard=config.guard,
                min_accuracy=thresholds.min_accuracy,
                apart=thresholds.apart,
                purify=config.filter,
                purify_threshold=thresholds.filter_suspected,
                purify_others=thresholds.filter_others,
                repair=config.repair,
                repair_share=thresholds.repaired,
                quarantine=config.quarantine,
                reaggregate=config.reaggregate,
                liars=config.liars,
                probe_every=config.probe_every,
                probe_steps=config.probe_steps,
                probe_images=config.probe_images,
                share_probes=config.share_probes,
                min_count=config.min_count,
                timeout=config.timeout,
                seed=seed,
                audit=audit,
            )


def _detector(name: str, thresholds: ThresholdsConfig) -> Detector:
    """Build the named detector with the configured thresholds."""
    mixture = Mixture(
        foreign=thresholds.foreign,
        outlier=thresholds.outlier,
        alive=thresholds.alive,
        significant=thresholds.significant,
    )
    inversion = Inversion(ratio=thresholds.small)
    ours = {each.name: each for each in (mixture, inversion, Agreement(mixture, inversion))}
    return ours[name] if name in ours else DETECTORS[name]()
