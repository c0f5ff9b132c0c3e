"""Local training as every participant does it: plain SGD over its own images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tasks.models import as_input


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    generator: torch.Generator,
) -> float:
    """Train a model in place with SGD and cross-entropy.

    Parameters
    ----------
    model : torch.nn.Module
        Put into training mode, and left in it.
    images : Tensor, shape (N, C, H, W)
        uint8; converted to float32 in [0, 1] batch by batch.
    labels : Tensor, shape (N,)
        int64.
    epochs : int
        Passes over the images, at least 1.
    batch_size : int
        Images per step, at least 1.
    lr, momentum, weight_decay : float
        As in `torch.optim.SGD`. The momentum starts at zero on each call.
    generator : torch.Generator
        Source of the order of the images, on the CPU; the global random state is not used.

    Returns
    -------
    float
        Mean loss per image over all passes, each image as the model was when it came to it.

    Raises
    ------
    ValueError
        When there are no batches to train on, or `epochs` or `batch_size` is below 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    model.train()
    total, seen = torch.zeros(()), 0
    for _ in range(epochs):
        for chosen in batches(len(images), batch_size, generator):
            logits = model(as_input(model, images[chosen]))
            loss = nn.functional.cross_entropy(logits, labels[chosen].to(logits.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = total.to(loss.device) + loss.detach() * len(chosen)
            seen += len(chosen)
    return float(total) / seen


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices 0..count-1 once, in random order, `batch_size` at a time.

    The last batch may be smaller. One left-over sample alone is skipped in this pass, since batch
    normalisation cannot be trained on it.

    Parameters
    ----------
    count : int
        Number of samples: at least 1, and at least 2 unless `batch_size` is 1.
    batch_size : int
        At least 1.
    generator : torch.Generator
        Source of the order, on the CPU.

    Raises
    ------
    ValueError
        For a count or a batch size out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if count < min(batch_size, 2):
        raise ValueError(f"{count} sample(s) are too few to train on")
    for batch in torch.randperm(count, generator=generator).split(batch_size):
        if len(batch) > 1 or batch_size == 1:
            yield batch
