"""Some samples of a data set, batch by batch and always in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

Batch = tuple[NDArray[np.int64], Tensor, Tensor]


def unchanged(inputs: Tensor) -> Tensor:
    """Prepare nothing."""
    return inputs


def in_order(
    dataset: Dataset[Any],
    indices: NDArray[np.int64],
    batch_size: int,
    prepare: Callable[[Tensor], Tensor] = unchanged,
) -> Iterator[Batch]:
    """Yield (indices, inputs, labels) of the named samples, in the order in which they are named.

    Parameters
    ----------
    dataset : Dataset
        Of (input, label). A ``TensorDataset`` is read in slices, anything else sample by sample.
    indices : ndarray of int64
    batch_size : int
        >= 1.
    prepare : callable
        Applied to each batch of inputs, e.g. to turn bytes into floats.
    """
    parts = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    if isinstance(dataset, TensorDataset):
        for part in parts:
            chosen = torch.from_numpy(part)
            inputs, labels = (tensor[chosen] for tensor in dataset.tensors)
            yield part, prepare(inputs), labels
    else:
        loader = DataLoader(Subset(dataset, indices.tolist()), batch_size=batch_size)
        for part, (inputs, labels) in zip(parts, loader, strict=True):
            yield part, prepare(inputs), torch.as_tensor(labels)
