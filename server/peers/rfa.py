"""RFA: the geometric median of the clients' models.

Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", IEEE Transactions on
Signal Processing 2022, https://arxiv.org/abs/1912.13445. As in the paper, clients count by their
number of examples (up to the three times the median that validation leaves them), and few steps of
the smoothed Weiszfeld algorithm are taken from the mean; how many, and nu, are the defaults of the
authors' published code.

Few steps shrink a gigantic update and do not remove it: of models from far away with a share a of
all examples, each step multiplies the odds by a / (1 - a).
"""

from __future__ import annotations

from collections.abc import Sequence
from logging import INFO
from typing import Any

import numpy as np
from flwr.common.logger import log

from server.peers.base import FloatArray, VectorRule, distances, mean


def geometric_median(
    points: FloatArray, shares: FloatArray, iterations: int = 4, nu: float = 1e-6
) -> FloatArray:
    """Approximate the point with the least weighted sum of Euclidean distances to all points.

    The paper's smoothed Weiszfeld algorithm, from the weighted mean.

    Parameters
    ----------
    points : ndarray
        (n, d).
    shares : ndarray
        How much each point counts, (n,), positive; their sum does not matter.
    iterations : int
        Steps, >= 1. Each costs a secure average where clients keep their models to themselves.
    nu : float
        Smallest distance that is divided by, > 0.

    Returns
    -------
    ndarray
        (d,).
    """
    median = mean(points, shares)
    for _ in range(iterations):
        median = mean(points, shares / np.maximum(nu, distances(points, median)))
    return median


class RFA(VectorRule):
    """Average by the geometric median.

    Parameters
    ----------
    iterations : int
        Steps of the Weiszfeld algorithm, >= 1.
    nu : float
        Smoothing, > 0.
    **settings
        Those of ``FedAvg``.
    """

    def __init__(self, *, iterations: int = 4, nu: float = 1e-6, **settings: Any) -> None:
        super().__init__(**settings)
        if iterations < 1:
            raise ValueError(f"iterations must be >= 1, got {iterations}")
        if not nu > 0:
            raise ValueError(f"nu must be > 0, got {nu}")
        self.iterations, self.nu = iterations, nu

    def combine(
        self, before: FloatArray, after: FloatArray, examples: FloatArray, nodes: Sequence[int]
    ) -> FloatArray:
        """Return the geometric median of the clients' models."""
        return geometric_median(after, examples, self.iterations, self.nu)

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> RFA settings:")
        log(INFO, "\t│\t├── Weiszfeld iterations: %d", self.iterations)
        log(INFO, "\t│\t└── Smoothing (nu): %g", self.nu)
        super().summary()
