"""Values that survive a process come back as they were, and files from elsewhere are refused."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from none_core import snapshot
from none_core.snapshot import SnapshotError, plain, restored


@dataclass(frozen=True)
class Place:
    name: str
    rows: Any


def numbers() -> st.SearchStrategy[Any]:
    return st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none())


def arrays() -> st.SearchStrategy[np.ndarray]:
    shapes = st.lists(st.integers(0, 3), max_size=3)
    dtypes = st.sampled_from(["float32", "float64", "int64", "uint8", "bool"])
    return st.builds(
        lambda s, d: np.arange(np.prod(s, dtype=int)).reshape(s).astype(d), shapes, dtypes
    )


def values() -> st.SearchStrategy[Any]:
    keys = st.one_of(st.integers(), st.text(max_size=5))
    leaves = st.one_of(
        numbers(),
        st.text(max_size=8),
        st.binary(max_size=8),
        arrays(),
        arrays().map(torch.from_numpy),
        arrays().map(lambda a: a.dtype.type(1)),
        st.frozensets(st.integers(), max_size=3),
        st.sets(st.text(max_size=3), max_size=3),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(keys, inner, max_size=3),
            st.builds(Place, st.text(max_size=3), inner),
        ),
        max_leaves=8,
    )


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    match one:
        case np.ndarray() | np.generic():
            return (
                one.dtype == other.dtype and one.shape == other.shape and bool(np.all(one == other))
            )
        case torch.Tensor():
            return one.dtype == other.dtype and torch.equal(one, other)
        case list() | tuple():
            return len(one) == len(other) and all(map(same, one, other))
        case dict():
            return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
        case Place():
            return same(one.name, other.name) and same(one.rows, other.rows)
    return bool(one == other)


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values())
def test_a_value_comes_back_from_a_file_as_it_was(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "value.npz"
    snapshot.write(file, {"value": plain(value, [Place])})
    assert same(restored(snapshot.read(file)["value"], [Place]), value)


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(7), lambda g: torch.rand(3, generator=g).tolist()),
        (lambda: np.random.default_rng(7), lambda g: g.normal(size=3).tolist()),
    ],
)
def test_a_generator_goes_on_where_it_was(tmp_path: Path, make: Any, draw: Any) -> None:
    generator = make()
    draw(generator)
    snapshot.write(tmp_path / "g.npz", {"g": plain(generator)})
    again = restored(snapshot.read(tmp_path / "g.npz")["g"])
    assert draw(again) == draw(generator) != draw(make())


def test_what_is_kept_does_not_change_with_the_value() -> None:
    array, tensor = np.zeros(2), torch.zeros(2)
    kept = plain([array, tensor])
    array += 1
    tensor += 1
    back = restored(kept)
    back[0] += 5
    assert restored(kept)[0].tolist() == restored(kept)[1].tolist() == [0, 0]


@pytest.mark.parametrize(
    "value", [object(), np.array([object()]), Place("a", 1), lambda: 0, {1: [object()]}, Place]
)
def test_what_cannot_be_kept_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be kept"):
        plain(value)


@pytest.mark.parametrize(
    "tree",
    [
        {"Place": {"name": "a", "rows": 1}},  # not among the classes
        {"eval": "1"},
        {"tuple": 3},
        {"dict": [[1]]},
        {"dict": [[[1], 2]]},
        {"Tensor": "x"},
        {"torch.Generator": np.zeros(3, np.uint8)},
        {"numpy.Generator": {"dict": []}},
        {"tuple": [], "list": []},
        {},
    ],
)
def test_a_tree_that_holds_anything_else_is_refused(tree: Any) -> None:
    with pytest.raises(SnapshotError):
        restored(tree)


@pytest.mark.parametrize("fields", [{"name": "a"}, {"name": "a", "rows": 1, "more": 2}, [1], "x"])
def test_a_dataclass_needs_its_own_fields(fields: Any) -> None:
    with pytest.raises(SnapshotError):
        restored({"Place": fields}, [Place])


def test_a_file_that_would_need_pickle_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("it was unpickled",))

    file = tmp_path / "bomb.npz"
    np.savez(file, tree=np.array([Bomb()], dtype=object))
    with pytest.raises(SnapshotError, match="is no snapshot"):
        snapshot.read(file)
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SnapshotError, match="is no snapshot"):
        snapshot.read(file)


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path: Path, data: st.DataObject) -> None:
    tree = {"a": np.arange(20), "b": [1, 2.5, None, "text"]}
    file = tmp_path / "damaged.npz"
    snapshot.write(file, tree)
    whole = file.read_bytes()
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        place = data.draw(st.integers(0, len(whole) - 1))
        damaged = (
            whole[:place]
            + bytes([whole[place] ^ data.draw(st.integers(1, 255))])
            + whole[place + 1 :]
        )
    file.write_bytes(damaged)
    try:
        found = snapshot.read(file)
    except (SnapshotError, OSError):
        return
    assert found["b"] == tree["b"]  # what the archive does not need, such as a date
    assert found["a"].tolist() == tree["a"].tolist()


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": {"$array": 9}}', "[" * 100_000])
def test_a_file_without_a_tree_is_refused(tmp_path: Path, text: str) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, tree=np.frombuffer(text.encode(), np.uint8))
    (tmp_path / "x.npz").write_bytes(buffer.getvalue())
    with pytest.raises(SnapshotError, match="is no snapshot"):
        snapshot.read(tmp_path / "x.npz")


def test_a_tree_that_looks_like_a_place_for_an_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        snapshot.write(tmp_path / "x.npz", {"a": {"$array": 0}})
    assert list(tmp_path.iterdir()) == []


def test_the_tree_itself_is_json(tmp_path: Path) -> None:
    snapshot.write(tmp_path / "x.npz", {"a": plain({1: (2, None)})})
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert json.loads(arrays["tree"].tobytes()) == {"a": {"dict": [[1, {"tuple": [2, None]}]]}}
