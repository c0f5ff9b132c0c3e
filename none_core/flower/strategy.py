"""NONE as a Flower strategy: around any strategy, or mixed into one's own.

Source: Wang et al., "Training with More Confidence: Mitigating Injected and Natural Backdoors
During Training", NeurIPS 2022, section 5.4 (the federated defence).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from none_core.decision import Policy
from none_core.flower import messages
from none_core.flower.defence import Defence
from none_core.flower.wrapped import (
    Rewind,
    carry_over_reset,
    inner_of,
    second_aggregation,
    weighted_by,
)

_POLICY = tuple(field.name for field in fields(Policy))


class NoneStrategy(Strategy):
    """Defend any Flower strategy with NONE.

    The wrapped strategy samples, configures and aggregates as it always does. In between, replies
    are validated before it sees them; after it has aggregated, the clients are asked for activation
    reports about the aggregated model, compromised neurons are identified and reset, and the model
    that is evaluated and broadcast next is the reset one. Before ``start_round`` the result equals
    the wrapped strategy's bit for bit.

    Where a round's own reports incriminate clients beyond doubt, the wrapped strategy aggregates
    it a second time, without them; its attributes are put back before. One that changes objects of
    its own or writes files in ``aggregate_train`` does so twice: ``reaggregate=False`` spares it
    that. Wrappers (differential privacy) are never asked twice.

    Wrapping replaces the wrapped strategy's own ``start``; if it overrides that (to save
    checkpoints, say), use :class:`NoneMixin` instead.

    Parameters
    ----------
    strategy : Strategy
        Any Flower strategy that aggregates whole models.
    model_fn : callable
        Builds the global model's architecture.
    example_input : Tensor
        One batch as the model takes it.
    **settings
        Those of :class:`~none_core.decision.Policy` (every, start_round, budget, guard, ...) and of
        :class:`~none_core.flower.Defence` (detector, reset, purify, quarantine, audit, ...).

    Examples
    --------
    >>> strategy = NoneStrategy(FedAvg(), Net, torch.zeros(1, 1, 28, 28))  # doctest: +SKIP
    >>> strategy.start(grid, initial_arrays, num_rounds=40)  # doctest: +SKIP
    """

    def __init__(
        self,
        strategy: Strategy,
        model_fn: Callable[[], nn.Module],
        example_input: Tensor,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.strategy = strategy
        self.defence = make_defence(model_fn, example_input, **settings)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure as the wrapped strategy does, and add the sample filter."""
        outgoing = self.strategy.configure_train(server_round, arrays, config, grid)
        return self.defence.configured(server_round, arrays, outgoing, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate, aggregate as the wrapped strategy does, then query, decide and reset."""
        return _defended(self.defence, self.strategy, replies, self.strategy.aggregate_train)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure as the wrapped strategy does."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate as the wrapped strategy does."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the settings of both."""
        self.defence.summary()
        self.strategy.summary()

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Result:
        """Run all rounds; see ``Strategy.start``."""
        self.defence.last_round = _num_rounds(args, kwargs)
        return super().start(grid, initial_arrays, *args, **kwargs)


class NoneMixin:
    """NONE for a strategy class of one's own, whose ``start`` and state stay as they are.

    Put it first among the bases, and call :meth:`defend` once::

        class Mine(NoneMixin, FedAvg):
            ...

        strategy = Mine(fraction_train=0.5)
        strategy.defend(Net, torch.zeros(1, 1, 28, 28), budget=0.05)

    Without :meth:`defend` it changes nothing.
    """

    defence: Defence | None = None

    def defend(
        self, model_fn: Callable[[], nn.Module], example_input: Tensor, **settings: Any
    ) -> None:
        """Switch the defence on; takes what :class:`NoneStrategy` takes."""
        self.defence = make_defence(model_fn, example_input, **settings)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure as the other base does, and add the sample filter."""
        outgoing = cast(Strategy, super()).configure_train(server_round, arrays, config, grid)
        if self.defence is None:
            return outgoing
        return self.defence.configured(server_round, arrays, outgoing, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate, aggregate as the other base does, then query, decide and reset."""
        aggregate = cast(Strategy, super()).aggregate_train
        if self.defence is None:
            return aggregate(server_round, replies)
        return _defended(self.defence, cast(Strategy, self), replies, aggregate)

    def summary(self) -> None:
        """Log the settings of both."""
        if self.defence is not None:
            self.defence.summary()
        cast(Strategy, super()).summary()

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Result:
        """Run all rounds as the other base does."""
        if self.defence is not None:
            self.defence.last_round = _num_rounds(args, kwargs)
        return cast(Strategy, super()).start(grid, initial_arrays, *args, **kwargs)


def make_defence(
    model_fn: Callable[[], nn.Module], example_input: Tensor, **settings: Any
) -> Defence:
    """Build a defence from flat settings, those of the policy among them."""
    policy = Policy(**{name: settings.pop(name) for name in _POLICY if name in settings})
    return Defence(model_fn, example_input, policy=policy, **settings)


def _defended(
    defence: Defence,
    strategy: Strategy,
    replies: Iterable[Message],
    aggregate: Callable[[int, Iterable[Message]], tuple[ArrayRecord | None, MetricRecord | None]],
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    valid = defence.admitted(replies, weighted_by(strategy))
    server_round, rewind = defence.record.server_round, Rewind(strategy)
    contents = {id(m): messages.copied(m.content) for m in valid if m.has_content()}
    aggregated, metrics = aggregate(server_round, valid)
    if aggregated is None:  # nobody's reply was usable, or the strategy refused to aggregate
        defence.skipped()
        return None, metrics

    def again(without: Collection[int]) -> ArrayRecord | None:
        nonlocal aggregated, metrics
        kept = [message for message in valid if message.metadata.src_node_id not in without]
        for message in kept:
            if message.has_content():  # of which FedMedian, for one, leaves nothing
                message.content = contents[id(message)]
        second = second_aggregation(rewind, lambda: aggregate(server_round, kept))
        if second is None:
            return None
        aggregated, metrics = second
        return aggregated

    # A wrapper may add noise to its one release, or have changed the replies.
    alone = inner_of(strategy, Strategy) is None
    arrays = defence.defended(aggregated, again if alone else None)
    if arrays is not aggregated:
        carry_over_reset(strategy, aggregated, arrays)
    metrics = MetricRecord() if metrics is None else metrics
    metrics.update(defence.metrics())
    return arrays, metrics


def _num_rounds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Find ``num_rounds`` among the arguments of ``Strategy.start`` after ``initial_arrays``."""
    return int(kwargs.get("num_rounds", args[0] if args else 3))
