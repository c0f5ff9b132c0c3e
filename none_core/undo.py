"""What a reset changed in a model, small enough to keep and to send, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Undo:
    """The rows of a model's tensors as they were before a reset.

    Attributes
    ----------
    rows : dict of str to ndarray of int64
        For each changed tensor the changed positions of its first dimension; a tensor without
        dimensions (a counter, say) counts as a single row.
    values : dict of str to Tensor
        Their former values, (rows, ...).
    """

    rows: dict[str, NDArray[np.int64]]
    values: dict[str, Tensor]

    @classmethod
    def between(cls, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Undo:
        """Compare two state dicts of the same model, row by row."""
        rows, values = {}, {}
        for name, old in before.items():
            if torch.equal(old, after[name]):
                continue
            former = _at_least_1d(old)
            differs = former != _at_least_1d(after[name])
            changed = differs.reshape(len(differs), -1).any(1)
            rows[name] = changed.nonzero().flatten().cpu().numpy()
            values[name] = former[changed].clone()
        return cls(rows, values)

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy of the state dict with the former values put back."""
        restored = dict(state)
        for name, rows in self.rows.items():
            tensor = restored[name].clone()
            _at_least_1d(tensor)[torch.from_numpy(rows)] = self.values[name].to(tensor.device)
            restored[name] = tensor
        return restored


def _at_least_1d(tensor: Tensor) -> Tensor:
    """View a single number as one row."""
    return tensor.reshape(1) if tensor.ndim == 0 else tensor
