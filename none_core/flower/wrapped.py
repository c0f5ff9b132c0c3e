"""What NONE has to know of the strategy that it is put around.

Aggregation is the wrapped strategy's own affair. Two things are not: a strategy with a memory has
to hear of a reset, and of clients that are left out of a round when it has been aggregated already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvgM, Strategy
from flwr.serverapp.strategy.fedopt import FedOpt
from numpy.typing import NDArray

_Noted = tuple[Any, Any]  # an attribute, and what was in it if it is a container


class Rewind:
    """Lets a strategy aggregate the same round again, as if it had not done so before.

    Its attributes, and what is in lists, dicts and sets among them, are noted now, and put back by
    :meth:`back`. That is all: a strategy that changes arrays in place, or writes files, does so
    twice.

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

    def _now(self) -> dict[str, _Noted]:
        kinds = (list, dict, set)
        held = vars(self._strategy).items()
        return {n: (v, v.copy() if type(v) in kinds else None) for n, v in held}

    def _put(self, noted: dict[str, _Noted]) -> None:
        held = vars(self._strategy)
        held.clear()
        for name, (value, content) in noted.items():
            held[name] = value
            if isinstance(value, list) and content is not None:
                value[:] = content
            elif content is not None:
                value.clear()
                value.update(content)


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
