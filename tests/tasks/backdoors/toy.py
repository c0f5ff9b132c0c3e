"""Two or three classes of noisy 8x8 images, and small networks that tell them apart."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from tasks.training import train


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bars(number: int, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) with a bright bar of two rows, which one says the class; none at 255."""
    source = generator(seed)
    labels = torch.randint(classes, (number,), generator=source)
    images = torch.randint(0, 120, (number, 1, 8, 8), generator=source, dtype=torch.uint8)
    rows = torch.arange(8)
    lit = (rows // 2 == labels[:, None])[:, None, :, None]
    return images + 90 * lit.to(torch.uint8), labels


def network(classes: int = 3, seed: int = 0) -> nn.Sequential:
    """A linear layer of 32 neurons, named "relu" behind its rectifier, and another one."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            flatten=nn.Flatten(),
            hidden=nn.Linear(64, 32),
            relu=nn.ReLU(),
            drop=nn.Dropout(0.1),
            out=nn.Linear(32, classes),
        )
        return nn.Sequential(layers)


def fit(images: Tensor, labels: Tensor, epochs: int = 15, model: nn.Module | None = None):
    """Train a network, a fresh one by default, and return it in training mode."""
    model = network() if model is None else model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # dropout
        train(
            model,
            images,
            labels,
            epochs=epochs,
            batch_size=32,
            lr=0.1,
            momentum=0.9,
            weight_decay=0.0,
            generator=generator(5),
        )
    return model
