"""What NONE has to know of the strategy that it is put around.

Aggregation is the wrapped strategy's own affair. Two things are not: a strategy with a memory has
to hear of a reset, and of clients that are left out of a round when it has been aggregated already.
"""

from __future__ import annotations

from collections.abc import Callable
from logging import WARNING
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.logger import log
from flwr.serverapp.strategy import FedAvgM, Strategy
from flwr.serverapp.strategy.fedopt import FedOpt
from numpy.typing import NDArray
from torch import Tensor

_Model = TypeVar("_Model")
_Metrics = TypeVar("_Metrics")
_Back = Callable[[], Any]  # puts back what was in a value, and returns the value
_DEEP = 3  # containers within containers that are looked into


class Rewind:
    """Lets a strategy aggregate the same round again, as if it had not done so before.

    Its attributes, and what is in arrays, tensors, records, lists, dicts and sets among them, are
    noted now, and put back by :meth:`back`. What else a strategy does (to objects of its own, or to
    files) it does twice.

    Parameters
    ----------
    strategy : object
    """

    def __init__(self, strategy: object) -> None:
        self._strategy = strategy
        self._noted = self._now()

    def back(self) -> Callable[[], None]:
        """Put the attributes back; returns how to undo that."""
        now = self._now()
        self._put(self._noted)
        return lambda: self._put(now)

    def _now(self) -> dict[str, _Back]:
        return {name: _noted(value) for name, value in vars(self._strategy).items()}

    def _put(self, noted: dict[str, _Back]) -> None:
        held = vars(self._strategy)
        for name in held.keys() - noted.keys():
            del held[name]
        for name, back in noted.items():
            held[name] = back()


def second_aggregation(
    rewind: Rewind, aggregate: Callable[[], tuple[_Model | None, _Metrics]]
) -> tuple[_Model, _Metrics] | None:
    """Aggregate a round again; None, and as if nothing had been tried, if that cannot be done.

    Whatever the strategy raises, the first result stands: who was named must not stop the run.
    """
    undo = rewind.back()
    try:
        model, metrics = aggregate()
    except Exception as error:  # a strategy may raise anything if it is left with too few
        log(WARNING, "NONE: the round was not aggregated again: %r", error)
        model = None
    if model is None:
        undo()
        return None
    return model, metrics


def _noted(value: Any, deep: int = _DEEP) -> _Back:
    """Note what is in a value."""
    if isinstance(value, np.ndarray):
        return _of_array(value, value.copy(), np.copyto) if value.flags.writeable else lambda: value
    if isinstance(value, Tensor):
        return _of_array(value, value.detach().clone(), _overwrite)
    if type(value) is set:
        members = value.copy()
        return lambda: _refilled(value, members)
    if not deep:
        return lambda: value
    if type(value) is list:
        items = [_noted(item, deep - 1) for item in value]
        return lambda: _relisted(value, [back() for back in items])
    if type(value) in (dict, ArrayRecord, MetricRecord, ConfigRecord):
        entries = {key: _noted(item, deep - 1) for key, item in value.items()}
        return lambda: _refilled(value, {key: back() for key, back in entries.items()})
    return lambda: value


def _of_array(value: Any, content: Any, put: Callable[[Any, Any], None]) -> _Back:
    def back() -> Any:
        put(value, content)
        return value

    return back


def _overwrite(tensor: Tensor, content: Tensor) -> None:
    tensor.data.copy_(content)


def _relisted(value: list[Any], items: list[Any]) -> list[Any]:
    value[:] = items
    return value


def _refilled(value: Any, content: Any) -> Any:
    value.clear()
    value.update(content)
    return value


def inner_of(strategy: object, kind: type) -> Any:
    """Return what a wrapper of Flower's own wraps, or None if the strategy is no wrapper."""
    inner = getattr(strategy, "strategy", None)
    return inner if isinstance(inner, kind) else None


def weighted_by(strategy: Strategy) -> str:
    """Metric by which a strategy weights its average; wrappers leave that to what they wrap."""
    inner = inner_of(strategy, Strategy)
    if inner is not None:
        return weighted_by(inner)
    return str(getattr(strategy, "weighted_by_key", "num-examples"))


def carry_over_reset(strategy: Strategy, before: ArrayRecord, after: ArrayRecord) -> None:
    """Let strategies that keep a momentum, or their own copy of the model, know of a reset.

    Otherwise FedAvgM's next round would start from the compromised weights again, and the momentum
    of FedAdam, FedYogi and FedAvgM would move the reset ones. The momentum of what was reset is
    dropped; everything else keeps its own.
    """
    inner = inner_of(strategy, Strategy)
    if inner is not None:  # we are around the wrapper
        carry_over_reset(inner, before, after)
    if isinstance(strategy, FedAvgM) and strategy.current_arrays is not None:
        strategy.current_arrays = after
        if strategy.momentum_vector is not None:
            strategy.momentum_vector = [
                without_reset(momentum, before[name], after[name])
                for name, momentum in zip(before, strategy.momentum_vector, strict=True)
            ]
    if isinstance(strategy, FedOpt) and strategy.m_t is not None:
        strategy.m_t = {
            name: without_reset(momentum, before[name], after[name])
            for name, momentum in strategy.m_t.items()
        }


def without_reset(momentum: NDArray[Any], before: Array, after: Array) -> NDArray[Any]:
    """Zero the momentum of the rows that a reset changed."""
    changed = np.atleast_1d(before.numpy() != after.numpy())
    rows = changed.reshape(len(changed), -1).any(1)
    kept = np.array(momentum)
    np.atleast_1d(kept)[rows] = 0
    return kept
