"""The median where a backdoor lives, and not a bit elsewhere."""

from __future__ import annotations

from statistics import median

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from none_core.attribution import Part, Scene
from none_core.repair import repaired, touched

WEIGHTS = Scene(
    1,
    entrances=(Part("a.weight", np.array([0, 2])),),
    exits=(Part("b.weight", np.array([1])),),
    companions=(Part("a.bias", np.array([0, 2])), Part("b.bias", np.array([1]))),
)
LIES = [-1e30, -3.0, 0.0, 0.1, 2.0, 1e30]
SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4), "b.bias": (2,)}


def random_state(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def as_torch(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}


@given(st.integers(3, 7), st.integers(0, 10**6))
def test_a_repair_equals_a_median_number_by_number(clients: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    states, state = [random_state(rng) for _ in range(clients)], random_state(rng)
    result = repaired(as_torch(state), states, [WEIGHTS])
    rows = {"a.weight": {0, 2}, "a.bias": {0, 2}, "b.weight": {1}, "b.bias": {1}}
    for name, shape in SHAPES.items():
        for place in np.ndindex(*shape):
            wanted = state[name][place]
            if place[0] in rows[name]:
                wanted = median(float(theirs[name][place]) for theirs in states)
            assert float(result[name][place]) == pytest.approx(float(wanted), abs=1e-7)
        assert result[name].dtype == torch.float32


@given(
    st.permutations(range(7)),
    st.sampled_from([-1e30, -3.0, 0.0, 0.1, 2.0, 1e30]),
    st.integers(0, 10**6),
)
def test_a_minority_cannot_push_a_repaired_weight_out_of_the_others_range(
    order: list[int], value: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    honest = [random_state(rng) for _ in range(4)]
    lies = [{name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}] * 3
    everybody = [(honest + lies)[i] for i in order]
    result = repaired(as_torch(honest[0]), everybody, [WEIGHTS])
    for name, rows in touched([WEIGHTS]).items():
        theirs = np.stack([state[name][rows] for state in honest])
        assert (result[name][rows].numpy() <= theirs.max(0)).all()
        assert (result[name][rows].numpy() >= theirs.min(0)).all()


def test_scenes_are_repaired_together_and_the_model_that_was_given_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    state, states = as_torch(random_state(rng)), [random_state(rng) for _ in range(3)]
    before = {name: tensor.clone() for name, tensor in state.items()}
    other = Scene(0, (Part("a.weight", np.array([2, 3])),), ())
    assert touched([WEIGHTS, other])["a.weight"].tolist() == [0, 2, 3]
    result = repaired(state, states, [WEIGHTS, other])
    assert not torch.equal(result["a.weight"][3], state["a.weight"][3])
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_two_clients_have_no_majority_to_ask() -> None:
    rng = np.random.default_rng(0)
    state, states = as_torch(random_state(rng)), [random_state(rng) for _ in range(2)]
    result = repaired(state, states, [WEIGHTS])
    assert all(torch.equal(state[name], result[name]) for name in state)


def test_without_a_scene_nothing_is_touched() -> None:
    rng = np.random.default_rng(0)
    state = as_torch(random_state(rng))
    result = repaired(state, [random_state(rng) for _ in range(3)], [])
    assert all(result[name] is state[name] for name in state)
