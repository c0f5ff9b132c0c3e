"""FLAME: outlying models are left out, large updates clipped, and noise is added.

Nguyen et al., "FLAME: Taming Backdoors in Federated Learning", USENIX Security 2022,
https://www.usenix.org/conference/usenixsecurity22/presentation/nguyen, Algorithm 1. Numbers of
examples are not used. The two-party computation that hides the models from the server is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from logging import INFO
from typing import Any

import numpy as np
from flwr.common.logger import log
from numpy.typing import NDArray

from server.peers.base import FloatArray, VectorRule, cosines, distances


def admitted(models: FloatArray) -> NDArray[np.bool_]:
    """Choose the models that point in the direction of the majority.

    Clusters of more than half of the models, by the cosine distances between whole models as in
    the paper (not between updates). Without any such cluster all models are admitted, which the
    paper leaves open.

    Parameters
    ----------
    models : ndarray
        (n, d).

    Returns
    -------
    ndarray of bool
        (n,).
    """
    n = len(models)
    if n < 3:
        return np.ones(n, dtype=bool)
    from sklearn.cluster import HDBSCAN  # which a server without this peer does not need

    labels = HDBSCAN(
        min_cluster_size=n // 2 + 1,
        # The paper's 1 leaves out the point itself, which scikit-learn counts.
        min_samples=2,
        metric="precomputed",
        allow_single_cluster=True,
        copy=True,
    ).fit_predict(1 - cosines(models))
    return labels >= 0 if (labels >= 0).any() else np.ones(n, dtype=bool)


def clipped(
    before: FloatArray, after: FloatArray, chosen: NDArray[np.bool_]
) -> tuple[FloatArray, float]:
    """Average the chosen models, with updates no longer than the median over all clients.

    Parameters
    ----------
    before : ndarray
        (d,).
    after : ndarray
        (n, d).
    chosen : ndarray of bool
        (n,), at least one.

    Returns
    -------
    tuple of ndarray and float
        The average, (d,), and the bound S on the norms.
    """
    norms = distances(after, before)
    bound = float(np.median(norms))
    scales = np.minimum(1, np.divide(bound, norms, out=np.ones_like(norms), where=norms > 0))
    shares = (chosen * scales / chosen.sum()).astype(after.dtype)
    return before + shares @ (after - before), bound


class Flame(VectorRule):
    """Leave out, clip and add noise.

    Parameters
    ----------
    generator : numpy.random.Generator
        Draws the noise.
    noise : float
        Lambda, >= 0: standard deviation of the noise in units of the median norm of the updates.
        The paper takes 0.001 for images.
    **settings
        Those of ``FedAvg``.
    """

    survives = ("generator",)

    def __init__(
        self, generator: np.random.Generator, *, noise: float = 0.001, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if not noise >= 0:
            raise ValueError(f"noise must be >= 0, got {noise}")
        self.generator, self.noise = generator, noise

    def combine(
        self, before: FloatArray, after: FloatArray, examples: FloatArray, nodes: Sequence[int]
    ) -> FloatArray:
        """Return the noisy average of clipped, admitted models."""
        chosen = admitted(after)
        average, bound = clipped(before, after, chosen)
        self.record.decision = f"admitted {chosen.sum()} of {len(nodes)}, clipped at {bound:.3g}"
        return average + self.generator.normal(0, self.noise * bound, len(average))

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> FLAME settings:")
        log(INFO, "\t│\t└── Noise (lambda): %g", self.noise)
        super().summary()
