"""Federated pruning: the votes, and a net in which the answer is known."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from none_core.activations import build_report
from none_core.flower import messages
from none_core.flower.messages import record_of, state_of
from none_core.neurons import NeuronMap
from server.peers.pruning import Pruning
from tests.none_core.flower.toys import HONEST, ToyGrid, bits, silence

NODES = (*HONEST, 15)
SIZE, SPIKE = 4, 6.0
DORMANT, IDLE = (0, 3), (4, 5)  # never active; a little active, but of no use
EXAMPLE = torch.zeros(1, 1, SIZE, SIZE)


def planted() -> nn.Module:
    """Channels 1 and 2 tell the classes; 0 and 3 wait for a trigger and then say class 1."""
    net = nn.Sequential(
        nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * SIZE * SIZE, 2)
    ).eval()
    weight, bias = torch.tensor([10, 1, -1, 10, 0.2, 0.1]), torch.tensor([-50.0, 0, 0, -50, 0, 0])
    output = torch.zeros(2, 6, SIZE, SIZE)
    output[0, 2], output[1, 1], output[1, [0, 3]] = 1, 1, 100
    with torch.no_grad():
        net[0].weight.copy_(weight.view(6, 1, 1, 1))
        net[0].bias.copy_(bias)
        net[3].weight.copy_(output.view(2, -1))
        net[3].bias.zero_()
    return net


def data_of(node: int) -> tuple[Tensor, Tensor]:
    """Dark images of class 0, bright ones of class 1."""
    labels = torch.arange(40) % 2
    noise = torch.randn(40, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(node)) / 10
    return noise + (2 * labels - 1).view(-1, 1, 1, 1), labels


def triggered() -> Tensor:
    """An image of class 0 with the trigger in one corner."""
    image = -torch.ones(1, 1, SIZE, SIZE)
    image[..., 0, 0] = SPIKE
    return image


def honest(message: Message) -> list[Message]:
    """Send back what was sent, and report on one's own data."""
    node = message.metadata.dst_node_id
    if message.metadata.message_type != messages.MESSAGE_TYPE:
        content = RecordDict(
            {
                "arrays": copy.deepcopy(message.content["arrays"]),
                "metrics": MetricRecord({"num-examples": 40}),
            }
        )
        return [Message(content, reply_to=message)]
    arrays, spec, min_count = messages.read_query(message.content)
    model = planted()
    model.load_state_dict(state_of(arrays))
    report = build_report(model, NeuronMap.trace(model, EXAMPLE), [data_of(node)], spec, min_count)
    query = message.content.config_records[messages.QUERY]
    return [Message(messages.report_content(report, query), reply_to=message)]


def nonsense(message: Message) -> list[Message]:
    """Train honestly, and report nonsense."""
    if message.metadata.message_type != messages.MESSAGE_TYPE:
        return honest(message)
    fields = ArrayRecord({"predictions": Array(np.arange(9, dtype=np.uint8))})
    echo = ConfigRecord({"round": message.content.config_records[messages.QUERY]["round"]})
    return [Message(RecordDict({messages.REPORT: fields, messages.QUERY: echo}), reply_to=message)]


def run(
    answers: dict[int, Callable] | None = None, rounds: int = 1, **settings: object
) -> tuple[Pruning, dict[str, Tensor], ToyGrid]:
    """Run a federation that starts with the planted net; strategy, last model, and the grid."""
    grid = ToyGrid({node: honest for node in NODES} | (answers or {}))
    strategy = Pruning(
        planted,
        EXAMPLE,
        fraction_evaluate=0.0,
        min_train_nodes=len(NODES),
        min_available_nodes=len(NODES),
        **{"deltas": (), **settings},
    )
    result = strategy.start(grid, record_of(planted().state_dict()), num_rounds=rounds)
    return strategy, state_of(result.arrays), grid


def queries(grid: ToyGrid) -> list[int]:
    """Rounds in which the grid saw a query."""
    seen = [m for m in grid.sent if m.metadata.message_type == messages.MESSAGE_TYPE]
    return [m.content.config_records[messages.QUERY]["round"] for m in seen]


def predictions(state: dict[str, Tensor], images: Tensor) -> Tensor:
    model = planted()
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(images).argmax(1)


# --- the whole ------------------------------------------------------------------------------------


def test_dormant_neurons_are_pruned_and_pruning_stops_when_accuracy_falls() -> None:
    assert int(predictions(planted().state_dict(), triggered())) == 1

    strategy, state, _ = run()

    assert sorted(strategy.record.neurons_reset) == sorted(DORMANT + IDLE)
    assert strategy.record.decision == "pruned 4 of 6 neurons of 0"
    assert not state["0.weight"][[*DORMANT, *IDLE]].any()
    assert not state["0.bias"][[*DORMANT, *IDLE]].any()
    for name, before in planted().state_dict().items():
        kept = slice(1, 3) if name.startswith("0") else slice(None)
        assert torch.equal(state[name][kept], before[kept])
    images, labels = data_of(1)
    assert torch.equal(predictions(state, images), labels)
    assert int(predictions(state, triggered())) == 0


def test_a_generous_guard_prunes_on() -> None:
    strategy, _, _ = run(guard=0.6)
    assert len(strategy.record.neurons_reset) == 6


def test_several_neurons_go_in_one_step_or_not_at_all() -> None:
    assert len(run(step=0.5)[0].record.neurons_reset) == 3
    assert len(run(step=1.0)[0].record.neurons_reset) == 0


def test_only_the_last_round_asks_and_prunes() -> None:
    strategy, _, grid = run(rounds=3)
    assert set(queries(grid)) == {3}
    assert strategy.record.server_round == 3


def test_extreme_weights_are_moved_while_accuracy_holds() -> None:
    strategy, state, _ = run(deltas=(2.0, 1.0, 0.5))
    # What is kept, +1 and -1, has mean 0 and deviation 1.
    np.testing.assert_allclose(state["0.weight"].flatten(), [0, 0.5, -0.5, 0, 0, 0])
    assert strategy.record.decision.endswith("moved weights beyond 0.5 standard deviations")


@pytest.mark.parametrize("lie", [nonsense, silence])
def test_a_minority_that_reports_nothing_usable_changes_nothing(lie: Callable) -> None:
    def trains_only(message: Message) -> list[Message]:
        is_query = message.metadata.message_type == messages.MESSAGE_TYPE
        return (lie if is_query else honest)(message)

    strategy, state, _ = run({11: trains_only, 12: trains_only})

    assert bits(record_of(state)) == bits(record_of(run()[1]))
    assert (strategy.record.asked, strategy.record.reports, strategy.record.missing) == (5, 3, 2)
    assert bool(strategy.record.refused) == (lie is nonsense)


def test_below_the_quorum_nothing_is_pruned() -> None:
    strategy, state, _ = run(dict.fromkeys(HONEST, nonsense))
    for name, before in planted().state_dict().items():
        torch.testing.assert_close(state[name], before)
    assert strategy.record.decision == "pruned nothing: 1 valid reports, quorum is 3"


def test_labels_that_are_too_rare_to_report_count_as_no_report() -> None:
    strategy, _, _ = run(min_count=1000)
    assert strategy.record.decision.startswith("pruned nothing: 0 valid reports")


# --- the pieces -----------------------------------------------------------------------------------


def test_the_layer_is_the_last_convolution_or_else_the_last_that_there_is() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))
    assert Pruning(lambda: linear, EXAMPLE).layer.name == "1"
    deep = nn.Sequential(
        *(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 2)),
    )
    strategy = Pruning(lambda: deep, EXAMPLE)
    assert (strategy.layer.name, strategy._first) == ("2", 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guard": 1.1}, r"guard must be in \[0, 1\], got 1.1"),
        ({"step": 0}, r"step must be in \(0, 1\], got 0"),
        ({"quorum": 2}, r"quorum must be in \(0, 1\], got 2"),
        ({"deltas": (1, 0)}, r"deltas must be > 0, got \(1, 0\)"),
        ({"min_count": 0}, "min_count must be >= 1, got 0"),
        ({"timeout": 0}, "timeout must be > 0 seconds, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruning(planted, EXAMPLE, **settings)
