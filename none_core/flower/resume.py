"""Going on with a run that was stopped, from what its last complete round left behind.

A round counts once it is kept; the one in progress is repeated. Server, around any strategy::

    file = Path("resume.npz")
    done, arrays = recall(file, strategy)[:2] if file.exists() else (None, initial_arrays)

    def evaluate_fn(server_round, arrays):  # Flower calls it after every round
        keep(file, strategy, server_round, arrays)

    Continued(strategy, done).start(grid, arrays, num_rounds=40, evaluate_fn=evaluate_fn)

With the same replies from the clients, the models are those of a run that nobody stopped, bit for
bit. What clients keep is theirs: a :class:`~none_core.flower.NoneClient` answers a round that is
repeated as it did the first time, as long as it still has its context.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from none_core import snapshot
from none_core.snapshot import SnapshotError, plain, restored

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


def keep(
    file: Path,
    strategy: Strategy,
    server_round: int,
    arrays: ArrayRecord,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write what the rounds to come need of those that are done.

    Parameters
    ----------
    file : Path
        Replaced whole or not at all.
    strategy : Strategy
        See `strategy_state`.
    server_round : int
        The last complete one; 0 for the initial model.
    arrays : ArrayRecord
        The model that it released.
    more : mapping, optional
        A tree of the caller's own.

    Raises
    ------
    OSError
        If the disk is full, say.
    """
    tree = {
        "round": server_round,
        "arrays": _tree_of_arrays(arrays),
        "strategy": strategy_state(strategy),
        "random": _random_state(),
        "more": dict(more or {}),
    }
    snapshot.write(file, tree)


def recall(file: Path, strategy: Strategy) -> tuple[int, ArrayRecord, dict[str, Any]]:
    """Give a strategy the state that was kept, and the global generators of random numbers theirs.

    Parameters
    ----------
    file : Path
        As `keep` wrote it.
    strategy : Strategy
        Made with the same settings as the one that was kept.

    Returns
    -------
    tuple of int, ArrayRecord and dict
        The last complete round, the model that it released, and the caller's own tree.

    Raises
    ------
    SnapshotError
        If the file holds something else, or the state of another strategy.
    """
    tree = snapshot.read(file)
    try:
        done, arrays = int(tree["round"]), _arrays_of_tree(tree["arrays"])
        load_strategy_state(strategy, tree["strategy"])
        _set_random_state(tree["random"])
        return done, arrays, dict(tree["more"])
    except (KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"{file} is no snapshot of a run: {error!r}") from None


class Continued(Strategy):
    """The rounds of a strategy that are left; the wrapped one sees their true numbers.

    It replaces the wrapped strategy's own ``start``, of which it knows what
    :class:`~none_core.flower.NoneStrategy` does there. Flower's log counts the rounds from 1 again.

    Parameters
    ----------
    strategy : Strategy
    done : int or None
        Complete rounds, 0 if the initial model was kept and no more; None for a new run.
    """

    def __init__(self, strategy: Strategy, done: int | None) -> None:
        super().__init__()
        self.strategy, self.done = strategy, done or 0
        self._is_new = done is None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the true round."""
        return self.strategy.configure_train(server_round + self.done, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate in the true round."""
        return self.strategy.aggregate_train(server_round + self.done, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the true round."""
        return self.strategy.configure_evaluate(server_round + self.done, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate in the true round."""
        return self.strategy.aggregate_evaluate(server_round + self.done, replies)

    def summary(self) -> None:
        """Log where it goes on, and the settings."""
        if not self._is_new:
            log(INFO, "\t├──> Resumed after round %s, which Flower will call 0", self.done)
        self.strategy.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the rounds that are left, up to ``num_rounds``; see ``Strategy.start``.

        ``initial_arrays`` is the model that the last complete round released; ``evaluate_fn`` gets
        it in a new run alone, since it had it before.
        """
        _announce_last_round(self.strategy, num_rounds)

        def evaluated(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            assert evaluate_fn is not None
            if not (server_round or self._is_new):
                return None
            return evaluate_fn(server_round + self.done, arrays)

        result = super().start(
            grid,
            initial_arrays,
            num_rounds - self.done,
            timeout,
            train_config,
            evaluate_config,
            evaluated if evaluate_fn else None,
        )
        for field in fields(result):
            metrics = getattr(result, field.name)
            if isinstance(metrics, dict):
                shifted = {server_round + self.done: m for server_round, m in metrics.items()}
                setattr(result, field.name, shifted)
        return result


def _announce_last_round(strategy: Strategy, num_rounds: int) -> None:
    """Tell all that want to know which round is the last; their own ``start`` does it otherwise."""
    for each in (strategy, getattr(strategy, "defence", None)):
        if hasattr(each, "last_round"):
            setattr(each, "last_round", num_rounds)  # noqa: B010 (no type has it)
    inner = getattr(strategy, "strategy", None)
    if isinstance(inner, Strategy):
        _announce_last_round(inner, num_rounds)


# --- what strategies keep -------------------------------------------------------------------------


def strategy_state(strategy: Strategy) -> dict[str, Any]:
    """Return what a strategy keeps from round to round, as a tree.

    A strategy may say so itself with ``state_dict()`` and ``load_state_dict(state)``. Of any other
    (and Flower's have neither) every attribute is taken that has these two, as the defence and
    torch's modules and optimisers do, or is a plain value, an array or a container of such:
    momentum, moments, clipping norms, copies of the model. What is none of them and no function is
    named when the state is loaded.
    """
    if isinstance(strategy, _Stateful):
        return {"own": plain(strategy.state_dict())}
    kept: dict[str, Any] = {}
    lost = []
    for name, value in vars(strategy).items():
        if isinstance(value, Strategy):
            kept[name] = {"strategy": strategy_state(value)}
        elif isinstance(value, _Stateful):
            kept[name] = {"state": plain(value.state_dict())}
        elif isinstance(value, ArrayRecord):
            kept[name] = {"arrays": _tree_of_arrays(value)}
        elif not callable(value):
            try:
                kept[name] = {"value": plain(value)}
            except TypeError:
                lost.append(name)
    return {"kept": kept, "lost": lost}


def load_strategy_state(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Give a strategy the state of another one of its kind.

    Raises
    ------
    SnapshotError
        If it was of another kind.
    """
    if isinstance(strategy, _Stateful) != ("own" in state):
        raise SnapshotError(f"this is not the state of a {type(strategy).__name__}")
    if isinstance(strategy, _Stateful):
        strategy.load_state_dict(restored(state["own"]))
        return
    mine = vars(strategy)
    if unknown := sorted(set(state["kept"]) - set(mine)):
        raise SnapshotError(f"{type(strategy).__name__} has no {', '.join(unknown)}")
    for name in state["lost"]:
        log(WARNING, "%s.%s cannot be brought back", type(strategy).__name__, name)
    for name, tree in state["kept"].items():
        ((kind, inner),) = tree.items()
        if kind == "strategy":
            load_strategy_state(mine[name], inner)
        elif kind == "state":
            mine[name].load_state_dict(restored(inner))
        else:
            value = _arrays_of_tree(inner) if kind == "arrays" else restored(inner)
            setattr(strategy, name, value)


@runtime_checkable
class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def _tree_of_arrays(arrays: ArrayRecord) -> dict[str, Any]:
    return {name: np.array(array.numpy()) for name, array in arrays.items()}


def _arrays_of_tree(tree: Mapping[str, Any]) -> ArrayRecord:
    return ArrayRecord({name: Array(values) for name, values in tree.items()})


def _random_state() -> dict[str, Any]:
    """State of the global generators, from which Flower's strategies draw nodes and noise."""
    return {
        "random": plain(random.getstate()),
        "numpy": plain(np.random.get_state(legacy=True)),  # noqa: NPY002
        "torch": plain(torch.get_rng_state()),
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(restored(state["random"]))
    np.random.set_state(restored(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(restored(state["torch"]))
