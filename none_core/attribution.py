"""Who did it: whose update differs where the backdoor lives.

A backdoor to class k enters through the incoming weights of the compromised neurons and leaves
through the output layer's row k. Attackers move those in another direction than the others, while
the label skew of an honest client moves all of its weights. What is compared is what the clients
have sent anyway, so nobody can lie about it without giving up the attack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from none_core.detection.base import FloatArray, IntArray
from none_core.neurons import NeuronMap

_TINY = 1e-12
_OF_A_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of one of the model's tensors.

    Attributes
    ----------
    name : str
        In the state dict.
    rows : ndarray of int64
    """

    name: str
    rows: IntArray


@dataclass(frozen=True, eq=False)
class Scene:
    """Where a backdoor lives in a model.

    Attributes
    ----------
    label : int
        The attacked class.
    entrances : tuple of Part
        Incoming weights of compromised neurons, one part per module.
    exits : tuple of Part
        The attacked class's weights in the output layer; empty if that is not known.
    companions : tuple of Part
        Biases and normalisation of both, which are not compared.
    """

    label: int
    entrances: tuple[Part, ...]
    exits: tuple[Part, ...]
    companions: tuple[Part, ...] = ()


def scene_of(
    neuron_map: NeuronMap,
    shift: FloatArray,
    label: int,
    shapes: Mapping[str, Sequence[int]],
    share: float = 0.05,
) -> Scene:
    """Find the weights that a trigger works through.

    Parameters
    ----------
    neuron_map : NeuronMap
    shift : ndarray
        How far the trigger moves each neuron, (J,); NaN where that is not known.
    label : int
        The class that it leads to.
    shapes : mapping of str to shape
        Of the state dict's tensors. The output layer is the consumer of the neurons that has
        as many rows as there are classes and is no layer of the map itself.
    share : float
        Share of each layer's neurons that count as compromised, at least one.
    """
    entrances, companions = [], []
    for layer, start in zip(neuron_map.layers, neuron_map.offsets, strict=False):
        here = np.nan_to_num(shift[start : start + layer.size], nan=-np.inf)
        rows = np.sort(np.argsort(-here, kind="stable")[: max(1, int(share * layer.size))])
        for source in layer.sources:
            entrances.append(Part(f"{source.module}.weight", rows))
            companions.append(Part(f"{source.module}.bias", rows))
            # A normalisation after a concatenation has the channels of the other layers as well.
            for name in (f"{source.norm}.{tensor}" for tensor in _OF_A_NORM):
                first = 0 if shapes.get(name) == (layer.size,) else layer.first_channel
                companions.append(Part(name, rows + first))
    mapped = {source.module for layer in neuron_map.layers for source in layer.sources}
    consumers = dict.fromkeys(c for layer in neuron_map.layers for c in layer.consumers)
    outputs = [
        c for c in consumers if c not in mapped and shapes.get(f"{c}.weight", (0,))[0] > label
    ]
    exits = [Part(f"{name}.weight", np.array([label])) for name in outputs]
    companions += [Part(f"{name}.bias", np.array([label])) for name in outputs]
    present = tuple(part for part in companions if part.name in shapes)
    return Scene(label, tuple(entrances), tuple(exits), present)


def distances(states: Sequence[Mapping[str, NDArray[np.floating]]], scene: Scene) -> FloatArray:
    """How far each client's model is from the others where the backdoor lives.

    For every part the Euclidean distance to the coordinate-wise median of the clients, in multiples
    of the median client's; entrances are averaged (geometrically), and so are they with the exits.
    A minority cannot move the median out of the others' range.

    Parameters
    ----------
    states : sequence of mapping
        The clients' state dicts, at least one.
    scene : Scene

    Returns
    -------
    ndarray
        (clients,), 1 for an ordinary client.
    """
    sides = [
        np.mean([_log_distance(states, part) for part in parts], axis=0)
        for parts in (scene.entrances, scene.exits)
        if parts
    ]
    result: FloatArray = np.exp(np.mean(sides, axis=0))
    return result


def _log_distance(states: Sequence[Mapping[str, NDArray[np.floating]]], part: Part) -> FloatArray:
    values = np.stack([state[part.name][part.rows].reshape(-1) for state in states])
    apart = np.linalg.norm(values - np.median(values, axis=0), axis=1)
    logs: FloatArray = np.log(np.maximum(apart, _TINY) / max(float(np.median(apart)), _TINY))
    return logs
