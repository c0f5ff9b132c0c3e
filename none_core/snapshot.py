"""Values as plain trees, and such trees as files: what survives a process, without pickle.

A tree holds None, truth values, numbers, text, arrays, lists, and dicts with text as keys. Whatever
else a value is made of (tuples, sets, tensors, generators of random numbers, dataclasses) becomes
a dict with one key that says what it was. Reading makes nothing but these, and of dataclasses only
those that the reader names: a file can at worst be refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from none_core.files import replace

_TREE = "tree"  # the entry of a file that holds all but the arrays
_PLACE = "$array"  # what stands there for one


class SnapshotError(ValueError):
    """A file or tree that does not hold what was asked for."""


def plain(value: Any, classes: Iterable[type] = ()) -> Any:
    """Turn a value into a tree.

    Parameters
    ----------
    value
    classes : iterable of type
        The dataclasses that it may hold.

    Raises
    ------
    TypeError
        Naming the type, if it is none of those above.
    """
    classes = tuple(classes)

    def inside(value: Any) -> Any:
        return plain(value, classes)

    match value:
        case np.generic():
            return {"scalar": np.asarray(value)}
        case None | bool() | int() | float() | str():
            return value
        case np.ndarray() if not value.dtype.hasobject:
            return value.copy()
        case list():
            return [inside(each) for each in value]
        case tuple():
            return {"tuple": [inside(each) for each in value]}
        case set() | frozenset():
            return {type(value).__name__: [inside(each) for each in sorted(value)]}
        case Mapping():
            return {"dict": [[inside(key), inside(each)] for key, each in value.items()]}
        case bytes():
            return {"bytes": np.frombuffer(value, np.uint8)}
        case Tensor():
            return {"Tensor": value.detach().cpu().numpy().copy()}
        case torch.Generator():
            return {"torch.Generator": value.get_state().numpy().copy()}
        case np.random.Generator() if isinstance(value.bit_generator, np.random.PCG64):
            return {"numpy.Generator": inside(value.bit_generator.state)}
    if type(value) in classes:
        fields = {f.name: inside(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {type(value).__name__: fields}
    raise TypeError(f"a {type(value).__qualname__} cannot be kept: {value!r:.60}")


def restored(tree: Any, classes: Iterable[type] = ()) -> Any:
    """Make the value that a tree was made of.

    Parameters
    ----------
    tree
        As `plain` returns it.
    classes : iterable of type
        The dataclasses that it may hold.

    Raises
    ------
    SnapshotError
        If it holds anything else.
    """
    return _Reader({cls.__name__: cls for cls in classes}).read(tree)


def write(file: Path, tree: Mapping[str, Any]) -> None:
    """Write a tree into one file, an uncompressed npz; it is there whole or not at all.

    Raises
    ------
    TypeError
        If it is no tree.
    OSError
        If the disk is full, say.
    """
    arrays: list[np.ndarray[Any, Any]] = []

    def without_arrays(node: Any) -> Any:
        if isinstance(node, np.ndarray):
            arrays.append(node)
            return {_PLACE: len(arrays) - 1}
        if isinstance(node, list):
            return [without_arrays(each) for each in node]
        if isinstance(node, Mapping):
            if _PLACE in node:
                raise TypeError(f"{_PLACE!r} is no key of a tree")
            return {key: without_arrays(each) for key, each in node.items()}
        return node

    text = json.dumps(without_arrays(tree))
    named = {str(number): array for number, array in enumerate(arrays)}
    named[_TREE] = np.frombuffer(text.encode(), np.uint8)
    replace(file, lambda stream: np.savez(stream, allow_pickle=False, **named))


def read(file: Path) -> dict[str, Any]:
    """Read what `write` wrote.

    Raises
    ------
    SnapshotError
        If the file holds anything else, or is damaged.
    OSError
        If it cannot be read at all.
    """
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except OSError:
        raise
    except Exception as error:  # damaged archives raise whatever their decoders do
        raise SnapshotError(f"{file} is no snapshot: {error}") from None

    def with_arrays(node: dict[str, Any]) -> Any:
        return arrays[str(node[_PLACE])] if node.keys() == {_PLACE} else node

    try:
        tree = json.loads(arrays[_TREE].tobytes(), object_hook=with_arrays)
    except (ValueError, KeyError, RecursionError) as error:
        raise SnapshotError(f"{file} is no snapshot: {error!r}") from None
    if not isinstance(tree, dict):
        raise SnapshotError(f"{file} is no snapshot: it holds a {type(tree).__name__}")
    return tree


class _Reader:
    """Reads trees that may hold some dataclasses."""

    def __init__(self, classes: Mapping[str, type]) -> None:
        self._classes = classes
        self._makers: dict[str, Callable[[Any], Any]] = {
            "tuple": lambda inner: tuple(self.read(each) for each in inner),
            "set": lambda inner: {self.read(each) for each in inner},
            "frozenset": lambda inner: frozenset(self.read(each) for each in inner),
            "dict": lambda inner: {self.read(key): self.read(each) for key, each in inner},
            "bytes": lambda inner: inner.tobytes(),
            "scalar": lambda inner: inner[()],
            "Tensor": lambda inner: torch.from_numpy(inner.copy()),
            "torch.Generator": _torch_generator,
            "numpy.Generator": lambda inner: _numpy_generator(self.read(inner)),
        }

    def read(self, tree: Any) -> Any:
        match tree:
            case None | bool() | int() | float() | str():
                return tree
            case np.ndarray():
                return tree.copy()
            case list():
                return [self.read(each) for each in tree]
        if not (isinstance(tree, dict) and len(tree) == 1):
            raise SnapshotError(f"no value is written as {tree!r:.60}")
        ((kind, inner),) = tree.items()
        try:
            if kind in self._classes:
                return self._classes[kind](**{name: self.read(v) for name, v in inner.items()})
            return self._makers[kind](inner)
        except SnapshotError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise SnapshotError(f"no {kind!r:.60} can be made: {error!r:.200}") from None


def _torch_generator(state: np.ndarray[Any, Any]) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(torch.from_numpy(state.copy()))
    return generator


def _numpy_generator(state: Any) -> np.random.Generator:
    bits = np.random.PCG64()
    bits.state = state
    return np.random.Generator(bits)
