"""Flower's robust strategies behind our validation: against slow references of their papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from server.peers.stock import Bulyan, FedMedian, FedTrimmedAvg, MultiKrum
from tests.none_core.flower.toys import ToyGrid

CLIENTS, WEIGHTS, FAR = 11, 7, 50.0
EVERYBODY: dict[str, Any] = {
    "fraction_evaluate": 0.0,
    "min_train_nodes": CLIENTS,
    "min_available_nodes": CLIENTS,
}
Vectors = np.ndarray  # (clients, weights)


def drawn(seed: int, far_away: int = 0) -> Vectors:
    """Models of all clients, of which the first so many are far from the others."""
    vectors = np.random.default_rng(seed).normal(size=(CLIENTS, WEIGHTS))
    vectors[:far_away] += FAR
    return vectors


def aggregated(strategy: Strategy, vectors: Vectors, counts: list[int] | None = None) -> Vectors:
    def answer(node: int) -> Callable[[Message], list[Message]]:
        def reply(message: Message) -> list[Message]:
            arrays = ArrayRecord({"w": Array(vectors[node])})
            metrics = MetricRecord({"num-examples": counts[node] if counts else 10})
            return [Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)]

        return reply

    grid = ToyGrid({node: answer(node) for node in range(CLIENTS)})
    sent = ArrayRecord({"w": Array(np.zeros(WEIGHTS))})
    outgoing = strategy.configure_train(1, sent, ConfigRecord(), grid)
    arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(outgoing))
    assert arrays is not None
    return arrays["w"].numpy()


def krum_order(vectors: Vectors, malicious: int) -> list[int]:
    """Order clients by the sum of squared distances to their n - f - 2 nearest neighbours."""
    scores = []
    for i in range(len(vectors)):
        distances = sorted(
            float(((vectors[i] - vectors[j]) ** 2).sum()) for j in range(len(vectors)) if j != i
        )
        scores.append(sum(distances[: len(vectors) - malicious - 2]))
    return sorted(range(len(vectors)), key=lambda i: scores[i])


@pytest.mark.parametrize("seed", range(3))
def test_the_median_is_that_of_each_weight(seed: int) -> None:
    vectors = drawn(seed)
    found = aggregated(FedMedian(**EVERYBODY), vectors)
    for k in range(WEIGHTS):
        assert found[k] == pytest.approx(sorted(vectors[:, k])[CLIENTS // 2])


@pytest.mark.parametrize(("beta", "cut"), [(0.1, 1), (0.2, 2), (0.4, 4)])
def test_the_trimmed_mean_leaves_out_so_many_on_either_side(beta: float, cut: int) -> None:
    vectors = drawn(1)
    found = aggregated(FedTrimmedAvg(**EVERYBODY, beta=beta), vectors)
    for k in range(WEIGHTS):
        kept = sorted(vectors[:, k])[cut : CLIENTS - cut]
        assert found[k] == pytest.approx(sum(kept) / len(kept))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("malicious", [0, 2, 4])
def test_multikrum_averages_those_with_the_nearest_neighbours_by_their_examples(
    seed: int, malicious: int
) -> None:
    vectors, counts = drawn(seed, far_away=malicious), [10 + node for node in range(CLIENTS)]
    strategy = MultiKrum(
        **EVERYBODY, num_malicious_nodes=malicious, num_nodes_to_select=CLIENTS - malicious
    )

    found = aggregated(strategy, vectors, counts)

    chosen = krum_order(vectors, malicious)[: CLIENTS - malicious]
    expected = sum(counts[i] * vectors[i] for i in chosen) / sum(counts[i] for i in chosen)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not set(range(malicious)) & set(chosen), "a far minority is never chosen"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("malicious", [1, 2])
def test_bulyan_averages_of_the_chosen_the_values_nearest_their_median(
    seed: int, malicious: int
) -> None:
    vectors = drawn(seed, far_away=malicious)
    found = aggregated(Bulyan(**EVERYBODY, num_malicious_nodes=malicious), vectors)

    theta = CLIENTS - 2 * malicious
    chosen = vectors[krum_order(vectors, malicious)[:theta]]
    for k in range(WEIGHTS):
        median = float(np.median(chosen[:, k]))
        nearest = sorted(chosen[:, k], key=lambda value: abs(value - median))
        kept = nearest[: theta - 2 * malicious]
        assert found[k] == pytest.approx(sum(kept) / len(kept), rel=1e-6)
    assert np.abs(found).max() < FAR / 5


@pytest.mark.parametrize("strategy", [FedMedian, FedTrimmedAvg, MultiKrum, Bulyan])
def test_a_minority_far_away_moves_none_of_them_far(strategy: Any) -> None:
    settings = {
        FedMedian: {},
        FedTrimmedAvg: {"beta": 0.2},
        MultiKrum: {"num_malicious_nodes": 2, "num_nodes_to_select": CLIENTS - 2},
        Bulyan: {"num_malicious_nodes": 2},
    }[strategy]
    assert np.abs(aggregated(strategy(**EVERYBODY, **settings), drawn(5, far_away=2))).max() < 3
