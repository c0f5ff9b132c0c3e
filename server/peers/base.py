"""What all peers share: validated replies, and models as vectors of their trained weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from none_core.flower import RoundRecord
from none_core.flower.validation import admit, template_of

FloatArray = NDArray[np.floating[Any]]
Aggregate = tuple[ArrayRecord | None, MetricRecord | None]

# Statistics of batch normalisation are measured, not trained: an update rule means nothing for
# them, and could make a variance negative.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_BLOCK = 1 << 20  # coordinates that are read as float64 at a time


class Validated:
    """Puts NONE's validation of train replies in front of a Flower strategy.

    Put it first among the bases. What could not be aggregated is dropped, logged and kept in
    `record`; the aggregate gets the dtypes of the model that was sent.

    Attributes
    ----------
    record : RoundRecord
        What happened in the round.
    sent : ArrayRecord
        The model that the round's clients were sent.
    survives : tuple of str
        Attributes that the next round needs of the ones before, for when a run is resumed.
    """

    survives: tuple[str, ...] = ()
    record = RoundRecord(0)
    sent: ArrayRecord
    _asked: frozenset[int] = frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next round needs of the ones before."""
        return {name: getattr(self, name) for name in self.survives}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was."""
        for name in self.survives:
            setattr(self, name, state[name])

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember who is asked to train what."""
        self.record, self.sent = RoundRecord(server_round), arrays
        outgoing = list(super().configure_train(server_round, arrays, config, grid))
        self._asked = frozenset(message.metadata.dst_node_id for message in outgoing)
        return outgoing

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Refuse what cannot be aggregated, and aggregate the rest."""
        template = template_of(self.sent)
        valid, refused = admit(
            replies, template, asked=self._asked, weighted_by=self.weighted_by_key
        )
        for refusal in refused:
            log(WARNING, "%s round %s: %s", type(self).__name__, server_round, refusal)
        self.record.refused += refused
        arrays, metrics = self.aggregate_valid(server_round, valid)
        if arrays is not None:
            arrays = ArrayRecord(
                {name: _cast(arrays[name], dtype) for name, (dtype, _) in template.items()}
            )
        return arrays, metrics

    def aggregate_valid(self, server_round: int, replies: list[Message]) -> Aggregate:
        """Aggregate replies that fit the model, as the next base does."""
        return super().aggregate_train(server_round, replies)


class VectorRule(Validated, FedAvg):
    """A Flower strategy around a rule that makes one vector of weights out of many.

    The rule sees the floating-point arrays of the model, flattened into one vector, without the
    statistics of batch normalisation. Those, and integers, become the median over the clients
    (rounded, for integers), whatever the rule.
    """

    @abstractmethod
    def combine(
        self, before: FloatArray, after: FloatArray, examples: FloatArray, nodes: Sequence[int]
    ) -> FloatArray:
        """Apply the rule, and say in ``record.decision`` what it did.

        Parameters
        ----------
        before : ndarray
            Weights of the model that was sent, (d,).
        after : ndarray
            Weights that the clients sent back, (n, d), n >= 1, all finite.
        examples : ndarray
            Numbers of examples that the clients claim, (n,), all positive.
        nodes : sequence of int
            Their node ids.

        Returns
        -------
        ndarray
            Weights of the new model, (d,).
        """

    def aggregate_valid(self, server_round: int, replies: list[Message]) -> Aggregate:
        """Apply the rule to the trained weights, and a median to everything else."""
        replies, _ = self._check_and_log_replies(replies, is_train=True)
        if not replies:
            return None, None
        contents = [message.content for message in replies]
        models = [next(iter(content.array_records.values())) for content in contents]
        claims = (next(iter(content.metric_records.values())) for content in contents)
        new = self.combine(
            weights_of(self.sent),
            np.stack([weights_of(model) for model in models]),
            np.array([float(claim[self.weighted_by_key]) for claim in claims]),
            [message.metadata.src_node_id for message in replies],
        )
        if self.record.decision:
            log(INFO, "aggregate_train: %s", self.record.decision)
        arrays = with_weights(self.sent, new, _medians(self.sent, models))
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)


def is_trained(name: str, array: Array) -> bool:
    """Whether an array holds trained weights, rather than integers or measured statistics."""
    return np.dtype(array.dtype).kind == "f" and name.rpartition(".")[2] not in _STATISTICS


def weights_of(arrays: ArrayRecord) -> FloatArray:
    """Flatten the trained weights of a model into one vector, (d,), in the record's order."""
    return np.concatenate([a.numpy().ravel() for name, a in arrays.items() if is_trained(name, a)])


def with_weights(arrays: ArrayRecord, weights: FloatArray, others: ArrayRecord) -> ArrayRecord:
    """Inverse of `weights_of`: a record like ``arrays`` with these weights, and other arrays."""
    filled, start = {}, 0
    for name, array in arrays.items():
        if is_trained(name, array):
            size = int(np.prod(array.shape))
            values = weights[start : start + size].reshape(array.shape)
            filled[name], start = Array(np.asarray(values, array.dtype)), start + size
        else:
            filled[name] = others[name]
    return ArrayRecord(filled)


def inner_products(vectors: FloatArray) -> NDArray[np.float64]:
    """Inner products of rows, (n, n), summed in double precision without a copy of (n, d)."""
    products = np.zeros((len(vectors), len(vectors)))
    for start in range(0, vectors.shape[1], _BLOCK):
        block = vectors[:, start : start + _BLOCK].astype(np.float64)
        products += block @ block.T
    return products


def cosines(vectors: FloatArray) -> NDArray[np.float64]:
    """Cosine similarities of rows, (n, n), in [-1, 1]; a zero vector is similar to none."""
    products = inner_products(vectors)
    norms = np.sqrt(np.diag(products))
    scale = np.outer(norms, norms)
    similar = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return np.clip(similar, -1, 1)


def distances(vectors: FloatArray, point: FloatArray) -> NDArray[np.float64]:
    """Euclidean distances of rows from a point, (n,); gigantic ones do not overflow float32."""
    return np.array([np.linalg.norm(row.astype(np.float64) - point) for row in vectors])


def mean(vectors: FloatArray, shares: FloatArray) -> FloatArray:
    """Mean of rows (n, d), weighted by shares (n,) of any sum; (d,), of the rows' dtype."""
    shares = np.asarray(shares, np.float64) / np.sum(shares)
    return shares.astype(vectors.dtype) @ vectors


def _medians(sent: ArrayRecord, models: Sequence[ArrayRecord]) -> ArrayRecord:
    names = [name for name, array in sent.items() if not is_trained(name, array)]
    return ArrayRecord(
        {
            name: _cast(
                Array(np.asarray(np.median([model[name].numpy() for model in models], axis=0))),
                np.dtype(sent[name].dtype),
            )
            for name in names
        }
    )


def _cast(array: Array, dtype: np.dtype[Any]) -> Array:
    """Undo what averaging does to integers, which come back as floats."""
    if array.dtype == str(dtype):
        return array
    values = array.numpy()
    # numpy turns an array without dimensions into a scalar.
    return Array(np.asarray(np.rint(values) if dtype.kind in "iu" else values, dtype))
