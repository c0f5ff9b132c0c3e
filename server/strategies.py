"""The strategy that a configuration names: plain averaging, ours, and Flower's robust ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, MultiKrum, Strategy
from torch import nn

from none_core.flower import NoneStrategy
from none_core.flower.defence import AuditSink
from server.config import DefenseConfig


def build(
    config: DefenseConfig,
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
    clients : int
        Number of participants.
    model_fn : callable
        Builds the global model.
    shape : tuple of int
        One image, (C, H, W).
    seed : int
    audit : callable
        Where the defence's decisions go.
    """
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
                num_nodes_to_select=max(1, clients - config.f),
            )
        case "none-strategy":
            return NoneStrategy(
                FedAvg(**everybody),
                model_fn,
                torch.zeros(1, *shape),
                detector=config.detector,
                reset=config.reset,
                every=config.every,
                start_round=config.start_round,
                budget=config.budget,
                quorum=config.quorum,
                guard=config.guard,
                purify=config.filter,
                min_count=config.min_count,
                timeout=config.timeout,
                seed=seed,
                audit=audit,
            )
