"""FoolsGold: clients whose updates have looked alike over all rounds count less.

Fung, Yoon, Beschastnikh, "The Limitations of Federated Learning in Sybil Settings", RAID 2020,
https://www.usenix.org/conference/raid2020/presentation/fung (first as "Mitigating Sybils in
Federated Learning Poisoning", https://arxiv.org/abs/1808.04866). Algorithm 1 with confidence 1.

It assumes that honest clients hold different data: of clients with alike data it takes all for
sybils. The indicative features, which the paper leaves open, are the weights of the output layer,
as in the authors' published code for deep networks; they are not weighted by importance. From that
code is also that the weighted sum of updates is divided by the number of clients: Algorithm 1 adds
gradients, but here an update is a whole local training. Numbers of examples are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from logging import INFO
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.common.logger import log
from numpy.typing import NDArray

from server.peers.base import FloatArray, VectorRule, cosines, is_trained


def client_weights(histories: FloatArray) -> NDArray[np.float64]:
    """Weigh clients by how little their histories resemble each other.

    Algorithm 1 of the paper, from the similarities to the logit. As in the published code, the
    largest weight enters the logit as 0.99. Two cases that the paper leaves open: a client whose
    greatest similarity is negative is treated as if it were 0, and where everybody has a twin,
    nobody counts.

    Parameters
    ----------
    histories : ndarray
        Sums of each client's updates, (n, d).

    Returns
    -------
    ndarray
        (n,), in [0, 1].
    """
    if len(histories) < 2:
        return np.ones(len(histories))
    similarity = cosines(histories)
    np.fill_diagonal(similarity, -1)  # nobody's twin is itself
    greatest = np.maximum(similarity.max(1), 0)
    # Pardon: what resembles a client that resembles others more, is forgiven in part.
    ratio = np.divide(greatest[:, None], greatest, out=np.ones_like(similarity), where=greatest > 0)
    similarity *= np.minimum(ratio, 1)
    weights = np.clip(1 - similarity.max(1), 0, 1)
    # Twins differ by rounding alone.
    weights[weights < 1e-9] = 0
    if not weights.any():
        return weights
    weights = np.minimum(weights / weights.max(), 0.99)
    with np.errstate(divide="ignore"):
        return np.clip(np.log(weights / (1 - weights)) + 0.5, 0, 1)


class FoolsGold(VectorRule):
    """Add updates with weights that sybils lose.

    Parameters
    ----------
    **settings
        Those of ``FedAvg``.

    Attributes
    ----------
    histories : dict of int to ndarray
        Sum of each node's updates to the output layer. A node keeps its own over rounds in which
        it is not sampled.
    """

    survives = ("histories",)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.histories: dict[int, FloatArray] = {}

    def combine(
        self, before: FloatArray, after: FloatArray, examples: FloatArray, nodes: Sequence[int]
    ) -> FloatArray:
        """Add up histories, and the updates as far as their senders are trusted."""
        if self.record.server_round == 1:  # a new run
            self.histories = {}
        features = output_layer(self.sent)
        for node, weights in zip(nodes, after, strict=True):
            update = (weights[features] - before[features]).astype(np.float64)
            self.histories[node] = self.histories.get(node, 0) + update
        trusted = client_weights(np.stack([self.histories[node] for node in nodes]))
        self.record.decision = f"trusted clients with {', '.join(f'{w:.2f}' for w in trusted)}"
        shares = (trusted / len(nodes)).astype(after.dtype)
        return before + shares @ (after - before)

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> FoolsGold settings:")
        log(INFO, "\t│\t└── Indicative features: weights of the output layer")
        super().summary()


def output_layer(arrays: ArrayRecord) -> slice:
    """Find the last weight matrix of a model in the vector of its weights."""
    start, found = 0, slice(None)
    for name, array in arrays.items():
        if is_trained(name, array):
            size = int(np.prod(array.shape))
            if len(array.shape) > 1:
                found = slice(start, start + size)
            start += size
    return found
