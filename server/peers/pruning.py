"""Federated pruning: after training, neurons that are dormant on the clients' data are removed.

Wu, Yang, Zhu, Mitra, "Mitigating Backdoor Attacks in Federated Learning", 2020,
https://arxiv.org/abs/2011.01767: the clients rank the neurons of the last convolutional layer by
their mean activation, the server prunes in the order of the mean rank while accuracy holds, and
then adjusts extreme weights of that layer. Training itself is plain federated averaging, by number
of examples; in the votes all clients count the same.

What differs from the paper:

- Clients send the activation reports that they answer our queries with, and the server ranks for
  them. A neuron's activation is therefore the maximum over space, behind a ReLU and as fine as the
  report's histograms, rather than the mean over space.
- Accuracy is that of the median client on its own data, since the server has none. Pruning and
  adjusting together may cost `guard`.
- Neurons are pruned in steps of some per cent of the layer, because every step is a query.
- Extreme weights are moved to the bounds, mean +- delta standard deviations of the unpruned ones.
- Majority voting, the paper's other vote, and its optional fine-tuning are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from logging import INFO, WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from numpy.typing import NDArray
from torch import Tensor, nn

from none_core.activations import LABEL_HISTOGRAMS, Report, ReportSpec
from none_core.decision import accuracy_loss
from none_core.flower import messages
from none_core.neurons import NeuronMap
from none_core.refusal import Refusal
from server.peers.base import Validated
from server.peers.dormancy import (
    furthest,
    last_convolution,
    mean_activations,
    pruning_order,
    without_extremes,
)

State = dict[str, Tensor]

MAX_SAMPLES = 10_000_000  # largest credible number of samples in a report


class Pruning(Validated, FedAvg):
    """Federated averaging, and federated pruning of what the last round aggregates.

    Parameters
    ----------
    model_fn : callable
        Builds the global model's architecture.
    example_input : Tensor
        One batch as the model takes it.
    guard : float
        Largest loss of the median client's accuracy, in [0, 1].
    step : float
        Share of the layer that is pruned between two measurements of accuracy, in (0, 1].
    deltas : sequence of float
        Bounds for extreme weights that are tried one after the other, in standard deviations.
    quorum : float
        Share of the clients whose valid reports are needed, in (0, 1].
    min_count : int
        Clients leave labels with fewer samples out of their reports.
    timeout : float
        Seconds to wait for reports.
    **settings
        Those of ``FedAvg``.
    """

    def __init__(
        self,
        model_fn: Callable[[], nn.Module],
        example_input: Tensor,
        *,
        guard: float = 0.02,
        step: float = 0.02,
        deltas: Sequence[float] = (5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0),
        quorum: float = 0.5,
        min_count: int = 5,
        timeout: float = 600.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not 0 <= guard <= 1:
            raise ValueError(f"guard must be in [0, 1], got {guard}")
        for name, share in (("step", step), ("quorum", quorum)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {share}")
        if any(delta <= 0 for delta in deltas):
            raise ValueError(f"deltas must be > 0, got {tuple(deltas)}")
        if min_count < 1:
            raise ValueError(f"min_count must be >= 1, got {min_count}")
        if not timeout > 0:
            raise ValueError(f"timeout must be > 0 seconds, got {timeout}")
        self.guard, self.step, self.deltas = guard, step, tuple(deltas)
        self.quorum, self.min_count, self.timeout = quorum, min_count, timeout
        self.last_round: int | None = None
        self._model = model_fn().eval()
        self.neurons = NeuronMap.trace(self._model, example_input)
        self.layer = last_convolution(self._model, self.neurons)
        with torch.inference_mode():
            self.labels = int(self._model(example_input).shape[1])

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, **kwargs: Any
    ) -> Result:
        """Run all rounds; see ``Strategy.start``."""
        self.last_round = num_rounds
        return super().start(grid, initial_arrays, num_rounds, **kwargs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure as ``FedAvg`` does."""
        self._grid = grid
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average, and prune the last model."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None and server_round == self.last_round:
            arrays = self._cleansed(arrays)
            log(INFO, "aggregate_train: %s", self.record.decision)
        return arrays, metrics

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> Pruning settings:")
        log(INFO, "\t│\t├── Layer: %s (%d neurons)", self.layer.name, self.layer.size)
        log(INFO, "\t│\t├── Guard: %.3f | step: %.3f", self.guard, self.step)
        log(INFO, "\t│\t└── Extreme weights: %s", ", ".join(f"{d:g}" for d in self.deltas))
        super().summary()

    # --- steps ------------------------------------------------------------------------------------

    def _cleansed(self, arrays: ArrayRecord) -> ArrayRecord:
        """Prune as many neurons, and adjust as many weights, as accuracy allows."""
        reports = self._ask(arrays, frozenset({LABEL_HISTOGRAMS}))
        record = self.record
        record.reports, record.missing = len(reports), record.asked - len(reports)
        needed = max(1, math.ceil(self.quorum * record.asked))
        if len(reports) < needed:
            record.decision = f"pruned nothing: {len(reports)} valid reports, quorum is {needed}"
            return arrays
        before = {client: report.accuracy for client, report in reports.items()}
        order = pruning_order(self._votes(list(reports.values())))
        original = messages.state_of(arrays)

        def loss(state: State) -> float:
            answers = self._ask(messages.record_of(state), frozenset())
            return accuracy_loss(before, {c: report.accuracy for c, report in answers.items()})

        step = max(1, round(self.step * len(order)))
        counts = [*range(step, len(order), step), len(order)]
        pruned = furthest(counts, lambda n: loss(self._pruned(original, order[:n])), self.guard)
        chosen = order[: pruned or 0]
        delta = furthest(self.deltas, lambda d: loss(self._pruned(original, chosen, d)), self.guard)
        record.neurons_reset = self._first + chosen
        record.decision = f"pruned {len(chosen)} of {len(order)} neurons of {self.layer.name}" + (
            "" if delta is None else f", moved weights beyond {delta:g} standard deviations"
        )
        return messages.record_of(self._pruned(original, chosen, delta))

    @property
    def _first(self) -> int:
        """Flat index of the layer's first neuron."""
        return int(self.neurons.offsets[self.neurons.layers.index(self.layer)])

    def _votes(self, reports: Sequence[Report]) -> NDArray[np.float64]:
        """Mean activations of the layer's neurons by client, (n, m)."""
        mine = slice(self._first, self._first + self.layer.size)
        return np.stack([mean_activations(report["histograms"][:, mine]) for report in reports])

    def _pruned(
        self, state: State, channels: NDArray[np.int64], delta: float | None = None
    ) -> State:
        """Return a copy without some channels and, with a delta, without extreme weights."""
        self._model.load_state_dict(state)
        self.neurons.reset(self._model, self._first + channels, "zero")
        if delta is not None:
            kept = np.setdiff1d(np.arange(self.layer.size), channels)
            for source in self.layer.sources if kept.size else ():
                weight = self._model.get_submodule(source.module).get_parameter("weight").data
                weight[kept] = without_extremes(weight[kept], delta)
        new = self._model.state_dict()
        return {name: new[name].clone() for name in state}

    def _ask(self, arrays: ArrayRecord, statistics: frozenset[str]) -> dict[int, Report]:
        """Ask this round's participants about a model; their valid reports, by node."""
        record = self.record
        spec = ReportSpec(self.neurons.size, self.labels, statistics)
        content = messages.query_content(arrays, spec, self.min_count, record.server_round)
        group = str(record.server_round)
        outgoing = [
            Message(content, node, messages.MESSAGE_TYPE, group_id=group)
            for node in sorted(self._asked)
        ]
        reports: dict[int, Report] = {}
        for reply in self._grid.send_and_receive(outgoing, timeout=self.timeout):
            node, sender = reply.metadata.src_node_id, messages.sender_of(reply)
            if reply.has_error():
                log(INFO, "\t> %s failed to report: %s", sender, reply.error.reason)
                continue
            try:
                if node not in self._asked or node in reports:
                    raise Refusal(sender, "report", "was not asked for, or is a second one")
                report = messages.read_report(
                    reply.content,
                    spec,
                    sender=sender,
                    server_round=record.server_round,
                    max_samples=MAX_SAMPLES,
                )
                if not report.counts.any():
                    raise Refusal(sender, "report", "is about no sample")
            except Refusal as refusal:
                log(WARNING, "Pruning round %s: %s", group, refusal)
                record.refused.append(refusal)
            else:
                reports[node] = report
        record.asked = len(outgoing)
        return reports
