"""Train replies from clients that may be hostile: let in what an inner strategy can safely average.

Flower's stock strategies end the run, or let one client own the average, when a single reply has an
extra key, a wrong shape, NaN weights or an absurd number of examples. Everything is checked here
first, against the model that was sent and against what most other replies look like.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, Error, Message, MetricRecord
from numpy.typing import NDArray

from none_core.flower.messages import MOST_RECORDS, read_array, sender_of
from none_core.refusal import Refusal, shown

_MOST_METRICS = 1000  # in one reply ...
_MOST_NUMBERS = 100_000  # ... and numbers in all of them together
_MOST_REASON = 10_000  # characters of an error's reason
_CHUNK = 1 << 20  # numbers that are looked at in one go

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
    asked: Collection[int] | None = None,
    weighted_by: str = "num-examples",
    max_weight_ratio: float = 10.0,
    full_weight_ratio: float = 3.0,
) -> tuple[list[Message], list[Refusal]]:
    """Separate the train replies that may be aggregated from those that are refused.

    Parameters
    ----------
    replies : iterable of Message
        As the grid returned them. Replies that carry an error are neither admitted nor refused:
        the inner strategy gets them too, to log them.
    template : dict
        The model that was sent, by :func:`template_of`.
    asked : collection of int, optional
        Nodes that were asked to train; replies of others are refused.
    weighted_by : str
        Metric by which the inner strategy weights its average.
    max_weight_ratio : float
        A reply that claims more than this multiple of the median claim is refused, > 1.
    full_weight_ratio : float
        A claim of more than this multiple of the median claim counts as so much, >= 1: nobody can
        check it, and ten clients of which four claim ten times what they have would be theirs.

    Returns
    -------
    tuple of list
        Messages in their order, and one refusal per refused message. The arrays of admitted
        messages are put into the order of the model that was sent: some strategies compare them by
        position. A claim that does not count in full is lowered in the message.
    """
    admitted: list[Message] = []
    refused: list[Refusal] = []
    candidates: list[Message] = []
    seen: set[int] = set()
    for message in replies:
        if message.has_error():
            _shorten(message)
            admitted.append(message)
            continue
        node = message.metadata.src_node_id
        try:
            if asked is not None and node not in asked:
                raise TrainReplyError(sender_of(message), "reply", "was not asked for")
            if node in seen:
                raise TrainReplyError(sender_of(message), "reply", "is its second one this round")
            _check_structure(message, template, weighted_by)
        except Refusal as refusal:
            refused.append(refusal)
        else:
            seen.add(node)
            candidates.append(message)
    layouts = [_layout(message) for message in candidates]
    layout = _commonest(layouts)
    weights = [_weight(message, weighted_by) for message in candidates]
    median = float(np.median(weights)) if weights else 0.0
    limit, full = max_weight_ratio * median, full_weight_ratio * median
    for message, own, weight in zip(candidates, layouts, weights, strict=True):
        if own != layout:
            field, reason = _difference(own, layout)
            refused.append(TrainReplyError(sender_of(message), field, reason))
        elif weight > limit:
            reason = f"claims {weight:g}, more than {max_weight_ratio:g} times the median claim"
            refused.append(TrainReplyError(sender_of(message), f"metric '{weighted_by}'", reason))
        else:
            _sort_arrays(message, template)
            if weight > full:
                _lower_weight(message, weighted_by, full)
            admitted.append(message)
    return admitted, refused


def _shorten(message: Message) -> None:
    """Cut what a client says about its error: the inner strategy logs it."""
    error = message.error
    if error.reason is not None and len(error.reason) > _MOST_REASON:
        message.error = Error(error.code, error.reason[:_MOST_REASON])


def _check_structure(message: Message, template: Template, weighted_by: str) -> None:
    sender = sender_of(message)
    if len(message.content) > MOST_RECORDS:
        raise TrainReplyError(sender, "reply", f"holds {len(message.content)} records")
    arrays = list(message.content.array_records.values())  # Flower searches for them every time
    metrics = list(message.content.metric_records.values())
    if len(arrays) != 1:
        raise TrainReplyError(sender, "reply", f"holds {len(arrays)} array records instead of one")
    if len(metrics) != 1:
        raise TrainReplyError(
            sender, "reply", f"holds {len(metrics)} metric records instead of one"
        )
    _check_arrays(sender, arrays[0], template)
    _check_metrics(sender, metrics[0], weighted_by)


def _check_arrays(sender: str, record: ArrayRecord, template: Template) -> None:
    if missing := sorted(template.keys() - record.keys()):
        raise TrainReplyError(sender, f"array '{missing[0]}'", "is missing")
    if len(record) > len(template):
        extra = min(name for name in record if name not in template)
        raise TrainReplyError(sender, f"array {shown(extra)}", "is not part of the model")
    for name, (dtype, shape) in template.items():
        try:
            values = read_array(record[name], dtype, shape)
        except ValueError as error:
            raise TrainReplyError(sender, f"array '{name}'", str(error)) from None
        if dtype.kind in "fc" and not _finite(values):
            raise TrainReplyError(sender, f"array '{name}'", "holds NaN or infinity")


def _finite(values: NDArray[Any]) -> bool:
    """Whether an array holds neither NaN nor infinity, in little memory besides its own."""
    flat = values.ravel(order="K")  # a view, in either order that is read
    return all(
        bool(np.isfinite(flat[start : start + _CHUNK]).all())
        for start in range(0, len(flat), _CHUNK)
    )


def _check_metrics(sender: str, record: MetricRecord, weighted_by: str) -> None:
    if len(record) > _MOST_METRICS:
        raise TrainReplyError(sender, "metrics", f"are {len(record)}, not at most {_MOST_METRICS}")
    numbers = sum(len(value) if isinstance(value, list) else 1 for value in record.values())
    if numbers > _MOST_NUMBERS:
        raise TrainReplyError(sender, "metrics", f"hold {numbers} numbers, not {_MOST_NUMBERS}")
    for name, value in record.items():
        if not np.isfinite(_numbers(value)).all():
            raise TrainReplyError(sender, f"metric {shown(name)}", "is NaN, infinite or too large")
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


class _Layout(NamedTuple):
    """Names of records, and the lengths of metrics: what must agree to be averaged."""

    arrays: str
    metrics: str
    lengths: frozenset[tuple[str, int | None]]  # None for single numbers


def _layout(message: Message) -> _Layout:
    ((metric_name, metrics),) = message.content.metric_records.items()
    lengths = ((name, len(v) if isinstance(v, list) else None) for name, v in metrics.items())
    return _Layout(next(iter(message.content.array_records)), metric_name, frozenset(lengths))


def _commonest(layouts: Iterable[_Layout]) -> _Layout:
    ranked = Counter(layouts).most_common()
    return ranked[0][0] if ranked else _Layout("", "", frozenset())


def _difference(layout: _Layout, usual: _Layout) -> tuple[str, str]:
    """Field and reason of a reply that does not look like most others."""
    if layout.arrays != usual.arrays:
        called, usually = shown(layout.arrays), shown(usual.arrays)
        return "array record", f"is called {called}, others say {usually}"
    if layout.metrics != usual.metrics:
        called, usually = shown(layout.metrics), shown(usual.metrics)
        return "metric record", f"is called {called}, others say {usually}"
    name = min(name for name, _ in layout.lengths ^ usual.lengths)
    shape, wanted = (_length(name, dict(each.lengths)) for each in (layout, usual))
    return f"metric {shown(name)}", f"is {shape} here, but {wanted} in most replies"


def _length(name: str, lengths: Mapping[str, int | None]) -> str:
    if name not in lengths:
        return "missing"
    return "one number" if lengths[name] is None else f"a list of {lengths[name]}"


def _sort_arrays(message: Message, template: Template) -> None:
    ((name, record),) = message.content.array_records.items()
    if list(record) != list(template):
        message.content[name] = ArrayRecord({key: record[key] for key in template})


def _lower_weight(message: Message, weighted_by: str, weight: float) -> None:
    """Have a reply claim less, in a record of its own: the sender's may be used again."""
    ((name, metrics),) = message.content.metric_records.items()
    lower = int(weight) if isinstance(metrics[weighted_by], int) else weight
    message.content[name] = MetricRecord({**metrics, weighted_by: lower})


def _weight(message: Message, weighted_by: str) -> float:
    metrics: Mapping[str, Any] = next(iter(message.content.metric_records.values()))
    return float(metrics[weighted_by])
