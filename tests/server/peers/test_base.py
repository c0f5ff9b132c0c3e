"""What all peers owe: hostile replies have no effect, dtypes stay, and a seed repeats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp.strategy import Strategy
from torch import nn

from server.peers import base
from server.peers.flame import Flame
from server.peers.foolsgold import FoolsGold
from server.peers.pruning import Pruning
from server.peers.rfa import RFA
from server.peers.rlr import RobustLearningRate
from server.peers.stock import Bulyan, FedMedian, FedTrimmedAvg, MultiKrum
from tests.none_core.flower.toys import (
    HOSTILE,
    INPUTS,
    bits,
    net,
    silence,
    train_content,
    trained,
)
from tests.server.peers.rounds import EVERYBODY, NODES, play, sent

PEERS: dict[str, Callable[[], Strategy]] = {
    "fedmedian": lambda: FedMedian(**EVERYBODY),
    "trimmed-avg": lambda: FedTrimmedAvg(**EVERYBODY, beta=0.2),
    "multikrum": lambda: MultiKrum(**EVERYBODY, num_malicious_nodes=1, num_nodes_to_select=2),
    "bulyan": lambda: Bulyan(**EVERYBODY),
    "rfa": lambda: RFA(**EVERYBODY),
    "rlr": lambda: RobustLearningRate(**EVERYBODY, threshold=2),
    "foolsgold": lambda: FoolsGold(**EVERYBODY),
    "flame": lambda: Flame(np.random.default_rng(3), **EVERYBODY),
    "pruning": lambda: Pruning(net, torch.zeros(2, INPUTS), **EVERYBODY),
}
FLOAT, INTEGER = "0.weight", "1.num_batches_tracked"


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's Bulyan collects garbage for every reply, which takes seconds beside other tests."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def put(name: str, value: np.ndarray) -> Callable[[Message], list[Message]]:
    """Answer with a model in which one array is another."""

    def answer(message: Message) -> list[Message]:
        content = train_content(HOSTILE)
        content.array_records["arrays"][name] = Array(value)
        return [Message(content, reply_to=message)]

    return answer


def claim(examples: float) -> Callable[[Message], list[Message]]:
    """Answer with another number of examples."""

    def answer(message: Message) -> list[Message]:
        content = train_content(HOSTILE)
        content.metric_records["metrics"]["num-examples"] = examples
        return [Message(content, reply_to=message)]

    return answer


HOSTILES = {
    "NaN": put(FLOAT, np.full_like(trained(HOSTILE)[FLOAT], np.nan)),
    "a wrong shape": put(FLOAT, np.zeros((7, 7), np.float32)),
    "a wrong dtype": put(INTEGER, np.array(1.5)),
    "an extra array": put("extra", np.zeros(3, np.float32)),
    "all examples": claim(1e12),
    "negative examples": claim(-5),
}


@pytest.mark.parametrize("hostile", HOSTILES)
@pytest.mark.parametrize("name", PEERS)
def test_a_hostile_reply_is_refused_and_has_no_effect(name: str, hostile: str) -> None:
    strategy, without = PEERS[name](), PEERS[name]()

    arrays, metrics = play(strategy, HOSTILES[hostile])
    expected, expected_metrics = play(without, silence)

    assert arrays is not None
    assert expected is not None
    assert bits(arrays) == bits(expected)
    assert metrics == expected_metrics
    assert [refusal.sender for refusal in strategy.record.refused] == [f"node {HOSTILE}"]


@pytest.mark.parametrize("name", ["rfa", "flame", "fedmedian"])
def test_a_finite_but_gigantic_reply_leaves_the_aggregate_finite(name: str) -> None:
    """Validation lets it in: it is the rule that must withstand it."""
    gigantic = np.full_like(trained(HOSTILE)[FLOAT], 3e38)
    strategy = PEERS[name]()

    arrays, _ = play(strategy, put(FLOAT, gigantic))

    assert not strategy.record.refused
    assert np.isfinite(arrays[FLOAT].numpy()).all()
    if name != "rfa":  # whose few steps only shrink it
        assert np.abs(arrays[FLOAT].numpy() - sent()[FLOAT].numpy()).max() < 0.5


@pytest.mark.parametrize("name", PEERS)
def test_the_aggregate_is_finite_repeats_and_keeps_names_shapes_and_dtypes(name: str) -> None:
    arrays, _ = play(PEERS[name]())
    again, _ = play(PEERS[name]())

    assert bits(arrays) == bits(again)
    assert list(arrays) == list(sent())
    assert {n: (a.dtype, tuple(a.shape)) for n, a in arrays.items()} == {
        n: (a.dtype, tuple(a.shape)) for n, a in sent().items()
    }
    assert all(np.isfinite(a.numpy()).all() for a in arrays.values())


@pytest.mark.parametrize("name", PEERS)
def test_without_any_usable_reply_there_is_no_aggregate(name: str) -> None:
    strategy = PEERS[name]()
    strategy.sent, strategy._asked = sent(), frozenset(NODES)
    assert strategy.aggregate_train(1, []) == (None, None)


SETTINGS = {
    "multikrum": "Number of malicious nodes: 1",
    "bulyan": "Number of malicious nodes: 0",
    "rfa": "Weiszfeld iterations: 4",
    "rlr": "Threshold (theta): 2 votes",
    "foolsgold": "Indicative features: weights of the output layer",
    "flame": "Noise (lambda): 0.001",
    "pruning": "Layer: 0 (4 neurons)",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_logged_above_those_of_the_average(
    name: str, flower_log: list[str]
) -> None:
    PEERS[name]().summary()
    (own,) = (i for i, line in enumerate(flower_log) if line.endswith(SETTINGS[name]))
    (sampling,) = (i for i, line in enumerate(flower_log) if line.endswith("Sampling:"))
    assert own < sampling


@pytest.mark.parametrize("name", ["rfa", "rlr", "foolsgold", "flame"])
def test_statistics_and_integers_become_the_median(name: str) -> None:
    arrays, _ = play(PEERS[name]())
    for array in ("1.running_mean", "1.running_var", INTEGER):
        expected = np.median([trained(node)[array] for node in NODES], axis=0)
        np.testing.assert_array_equal(arrays[array].numpy(), expected.astype(arrays[array].dtype))


def test_the_median_of_integers_is_rounded() -> None:
    models = [ArrayRecord({"n": Array(np.array(n))}) for n in (1, 2)]
    medians = base._medians(models[0], models)
    assert medians["n"].dtype == "int64"
    assert int(medians["n"].numpy()) == 2


# --- vectors --------------------------------------------------------------------------------------


def test_weights_leave_out_statistics_and_come_back() -> None:
    arrays = sent()
    weights = base.weights_of(arrays)
    size = sum(p.numel() for p in net().parameters())
    assert weights.shape == (size,)
    assert weights.dtype == np.float32

    again = base.with_weights(arrays, weights, arrays)
    assert bits(again) == bits(arrays)
    changed = base.with_weights(arrays, weights + 1, arrays)
    for name, array in arrays.items():
        moved = 1 if name in dict(net().named_parameters()) else 0
        np.testing.assert_array_equal(changed[name].numpy(), array.numpy() + moved)


def test_products_of_many_blocks_equal_those_of_one(monkeypatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(4, 23)).astype(np.float32)
    monkeypatch.setattr(base, "_BLOCK", 5)
    wide = vectors.astype(np.float64)
    np.testing.assert_allclose(base.inner_products(vectors), wide @ wide.T, rtol=1e-12)


def test_cosines_of_zero_and_of_multiples() -> None:
    vectors = np.array([[3.0, 4.0], [0, 0], [6, 8], [-3, -4], [-4, 3]])
    expected = [[1, 0, 1, -1, 0], [0, 0, 0, 0, 0], [1, 0, 1, -1, 0], [-1, 0, -1, 1, 0]]
    np.testing.assert_allclose(base.cosines(vectors)[:4], expected, atol=1e-12)


def test_names_without_a_module_are_trained() -> None:
    arrays = nn.Linear(2, 1).state_dict()
    assert all(base.is_trained(name, Array(value.numpy())) for name, value in arrays.items())
