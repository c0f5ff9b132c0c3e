"""The distributed backdoor attack: every malicious participant plants its own part of the trigger.

Source: Xie, Huang, Chen, Li, "DBA: Distributed Backdoor Attacks against Federated Learning", ICLR
2020.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tasks.poisoning import Trigger, poison, stamp


def poisoned(
    images: Tensor,
    labels: Tensor,
    trigger: Trigger,
    part: int,
    target: int,
    rate: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stamp one part of the trigger on some images and relabel them to the target class.

    Parameters
    ----------
    images : Tensor, shape (N, C, H, W)
        uint8.
    labels : Tensor, shape (N,)
        int64.
    trigger : Trigger
    part : int
        Which part; numbers beyond the last start again at the first.
    target : int
        The class to relabel to.
    rate : float
        Share of the images to poison, in [0, 1].
    rng : numpy.random.Generator
        Chooses them.

    Returns
    -------
    tuple of Tensor
        Images and labels with the poison in them, and a boolean mask of the poisoned ones.
    """
    chosen = torch.from_numpy(poison(labels.numpy(), target, rate, rng))
    images, labels = images.clone(), labels.clone()
    images[chosen] = stamp(images[chosen], trigger.part(part))
    labels[chosen] = target
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[chosen] = True
    return images, labels, mask


def scaled_update(
    sent: Mapping[str, Tensor], trained: Mapping[str, Tensor], factor: float
) -> dict[str, Tensor]:
    """Move ``factor`` times as far from the model that the server sent as training did.

    Integer tensors (counters) stay as trained.
    """
    return {
        name: sent[name] + factor * (tensor - sent[name]) if tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
    }
