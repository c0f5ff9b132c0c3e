"""Robust aggregation where a backdoor lives, and only there.

A reset takes a neuron out of use, so it has to be well founded. Replacing the *average* of the
clients' weights by their coordinate-wise *median* takes nothing out of use if it was not,
and keeps a minority from pushing these weights anywhere: so it is done on mere suspicion.

Source of the median: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", ICML 2018, there for all weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from none_core.attribution import Scene

FEWEST = 3  # clients that a median needs to outvote one of them


def touched(scenes: Iterable[Scene]) -> dict[str, NDArray[np.int64]]:
    """Name the tensors that a repair changes, and their rows, ascending."""
    rows: dict[str, set[int]] = {}
    for scene in scenes:
        for part in (*scene.entrances, *scene.exits, *scene.companions):
            rows.setdefault(part.name, set()).update(part.rows.tolist())
    return {name: np.array(sorted(found), dtype=np.int64) for name, found in rows.items()}


def repaired(
    state: Mapping[str, Tensor],
    states: Sequence[Mapping[str, NDArray[Any]]],
    scenes: Iterable[Scene],
) -> dict[str, Tensor]:
    """Give the weights of some scenes the clients' median, in a copy.

    Parameters
    ----------
    state : mapping of str to Tensor
        The aggregated model.
    states : sequence of mapping of str to ndarray
        At least the touched tensors of each client's model. With fewer than three clients nothing
        is changed: there is no majority to ask.
    scenes : iterable of Scene

    Returns
    -------
    dict of str to Tensor
        Shares the tensors that are not touched.
    """
    result = dict(state)
    if len(states) < FEWEST:
        return result
    for name, rows in touched(scenes).items():
        values = np.median(np.stack([theirs[name][rows] for theirs in states]), axis=0)
        tensor = state[name].clone()
        tensor[torch.from_numpy(rows)] = torch.from_numpy(values).to(tensor)
        result[name] = tensor
    return result
