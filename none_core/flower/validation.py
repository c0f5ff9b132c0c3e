"""Train replies from clients that may be hostile: let in what an inner strategy can safely aggregate.

Flower's stock strategies end the run, or let one client own the average, when a single reply has an
extra key, a wrong shape, NaN weights or an absurd number of examples. Everything is checked here
first, against the model that was sent and against what most other replies look like.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from none_core.flower.messages import read_array, sender_of
from none_core.refusal import Refusal

Template = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


class TrainReplyError(Refusal):
    """A train reply that was refused."""

    what = "train reply"


def template_of(arrays: ArrayRecord) -> Template:
    """Dtype and shape of every array of the model that was sent."""
    return {name: (np.dtype(a.dtype), tuple(a.shape)) for name, a in arrays.items()}


def admit(
    replies: Iterable[Message],
    template: Template,
    *,
    weighted_by: str = "num-examples",
    max_weight_ratio: float = 10.0,
) -> tuple[list[Message], list[Refusal]]:
    """Separate the train replies that may be aggregated from those that are refused.

    Parameters
    ----------
    replies : iterable of Message
        As the grid returned them. Replies that carry an error are neither admitted nor refused:
        the inner strategy gets them too, to log them.
    template : dict
        The model that was sent, by :func:`template_of`.
    weighted_by : str
        Metric by which the inner strategy weights its average.
    max_weight_ratio : float
        A reply that claims more than this multiple of the median claim is refused, > 1.

    Returns
    -------
    tuple of list
        Messages in their order, and one refusal per refused message.
    """
    admitted: list[Message] = []
    refused: list[Refusal] = []
    candidates: list[Message] = []
    seen: set[int] = set()
    for message in replies:
        if message.has_error():
            admitted.append(message)
            continue
        try:
            if message.metadata.src_node_id in seen:
                raise TrainReplyError(sender_of(message), "reply", "is its second one this round")
            _check_structure(message, template, weighted_by)
        except Refusal as refusal:
            refused.append(refusal)
        else:
            seen.add(message.metadata.src_node_id)
            candidates.append(message)
    layout = _commonest(_layout(message) for message in candidates)
    weights = [_weight(message, weighted_by) for message in candidates]
    limit = max_weight_ratio * float(np.median(weights)) if weights else 0.0
    for message, weight in zip(candidates, weights, strict=True):
        if _layout(message) != layout:
            reason = f"{_layout(message)} differ from what most replies carry, {layout}"
            refused.append(TrainReplyError(sender_of(message), "records and metrics", reason[:300]))
        elif weight > limit:
            reason = f"claims {weight:g}, more than {max_weight_ratio:g} times the median claim"
            refused.append(TrainReplyError(sender_of(message), f"metric '{weighted_by}'", reason))
        else:
            admitted.append(message)
    return admitted, refused


def _check_structure(message: Message, template: Template, weighted_by: str) -> None:
    sender = sender_of(message)
    if len(message.content.array_records) != 1:
        count = len(message.content.array_records)
        raise TrainReplyError(sender, "reply", f"holds {count} array records instead of one")
    if len(message.content.metric_records) != 1:
        count = len(message.content.metric_records)
        raise TrainReplyError(sender, "reply", f"holds {count} metric records instead of one")
    _check_arrays(sender, next(iter(message.content.array_records.values())), template)
    _check_metrics(sender, next(iter(message.content.metric_records.values())), weighted_by)


def _check_arrays(sender: str, record: ArrayRecord, template: Template) -> None:
    if missing := sorted(template.keys() - record.keys()):
        raise TrainReplyError(sender, f"array '{missing[0]}'", "is missing")
    if extra := sorted(record.keys() - template.keys()):
        raise TrainReplyError(sender, f"array {extra[0]!r:.60}", "is not part of the model")
    for name, (dtype, shape) in template.items():
        try:
            values = read_array(record[name], dtype, shape)
        except ValueError as error:
            raise TrainReplyError(sender, f"array '{name}'", str(error)) from None
        if dtype.kind in "fc" and not np.isfinite(values).all():
            raise TrainReplyError(sender, f"array '{name}'", "holds NaN or infinity")


def _check_metrics(sender: str, record: MetricRecord, weighted_by: str) -> None:
    for name, value in record.items():
        if not np.isfinite(_numbers(value)).all():
            raise TrainReplyError(sender, f"metric {name!r:.60}", "is NaN, infinite or too large")
    weight = record.get(weighted_by)
    if not isinstance(weight, int | float):
        raise TrainReplyError(sender, f"metric '{weighted_by}'", "is missing or not one number")
    if weight <= 0:
        raise TrainReplyError(sender, f"metric '{weighted_by}'", f"is {weight:g}, not positive")


def _numbers(value: Any) -> list[float]:
    try:
        return [float(v) for v in (value if isinstance(value, list) else [value])]
    except OverflowError:  # an int beyond float64
        return [math.inf]


def _layout(message: Message) -> tuple[Any, ...]:
    """Names of records and metrics, and the lengths of lists: what must agree to be averaged."""
    ((metric_name, metrics),) = message.content.metric_records.items()
    return (
        next(iter(message.content.array_records)),
        metric_name,
        tuple(sorted((k, len(v) if isinstance(v, list) else 0) for k, v in metrics.items())),
    )


def _commonest(layouts: Iterable[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    ranked = Counter(layouts).most_common()
    return ranked[0][0] if ranked else None


def _weight(message: Message, weighted_by: str) -> float:
    metrics: Mapping[str, Any] = next(iter(message.content.metric_records.values()))
    return float(metrics[weighted_by])
