"""What a reset changed, and the way back."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from none_core.neurons import NeuronMap
from none_core.undo import Undo

DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
State = dict[str, Tensor]


@st.composite
def pairs_of_states(draw: st.DrawFn) -> tuple[State, State]:
    """A state dict, and the same with some rows changed."""
    before, after = {}, {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        dtype = draw(st.sampled_from(DTYPES))
        rng = np.random.default_rng(draw(st.integers(0, 1000)))
        before[name] = torch.from_numpy(np.asarray(rng.integers(0, 3, size=shape))).to(dtype)
        after[name] = before[name].clone()
        if draw(st.booleans()):
            mask = torch.from_numpy(np.asarray(rng.random(shape) < 0.3))
            after[name][mask] = 0 if dtype == torch.bool else 5
    return before, after


def changed_rows(old: Tensor, new: Tensor) -> list[int]:
    """The obvious way."""
    if old.ndim == 0:
        return [] if bool(old == new) else [0]
    return [i for i in range(len(old)) if not torch.equal(old[i], new[i])]


@settings(deadline=None, max_examples=300)
@given(pairs_of_states())
def test_the_changed_rows_are_kept_and_put_back(states: tuple[State, State]) -> None:
    before, after = states
    untouched = {name: tensor.clone() for name, tensor in after.items()}
    undo = Undo.between(before, after)
    rows = {name: changed_rows(before[name], after[name]) for name in before}
    assert {name: r.tolist() for name, r in undo.rows.items()} == {
        n: r for n, r in rows.items() if r
    }
    assert all(r.dtype == np.int64 for r in undo.rows.values())

    restored = undo.apply(after)
    assert restored.keys() == before.keys()
    for name, tensor in before.items():
        assert restored[name].dtype == tensor.dtype
        assert restored[name].shape == tensor.shape
        assert torch.equal(restored[name], tensor)
        assert torch.equal(after[name], untouched[name])  # what was given is left alone


def test_a_changed_tensor_without_dimensions_is_one_row() -> None:
    before, after = {"n": torch.tensor(3)}, {"n": torch.tensor(8)}
    undo = Undo.between(before, after)
    assert undo.rows["n"].tolist() == [0]
    assert undo.values["n"].tolist() == [3]
    assert torch.equal(undo.apply(after)["n"], torch.tensor(3))


def test_it_keeps_copies() -> None:
    before, after = {"w": torch.ones(2, 2)}, {"w": torch.zeros(2, 2)}
    undo = Undo.between(before, after)
    before["w"].fill_(9)
    assert torch.equal(undo.apply(after)["w"], torch.ones(2, 2))


def test_a_row_of_nan_comes_back() -> None:
    before, after = {"w": torch.tensor([[torch.nan, 1], [2, 3]])}, {"w": torch.zeros(2, 2)}
    torch.testing.assert_close(
        Undo.between(before, after).apply(after)["w"], before["w"], equal_nan=True
    )


def test_equal_states_need_nothing() -> None:
    undo = Undo.between({"w": torch.ones(2)}, {"w": torch.ones(2)})
    assert (undo.rows, undo.values) == ({}, {})


@pytest.mark.parametrize("how", ["zero", "init"])
def test_a_reset_of_a_net_is_small_and_comes_back(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)
    ).eval()
    neurons = NeuronMap.trace(model, torch.zeros(2, 1, 4, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    neurons.reset(model, np.array([2, 5]), how, torch.Generator().manual_seed(0))
    undo = Undo.between(before, model.state_dict())
    # The normalisation's initial values are those of the reset: only the convolution has changed.
    assert {name: rows.tolist() for name, rows in undo.rows.items()} == {
        "0.weight": [2, 5],
        "0.bias": [2, 5],
    }
    restored = undo.apply(model.state_dict())
    assert all(torch.equal(restored[name], tensor) for name, tensor in before.items())
