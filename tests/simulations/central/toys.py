"""A toy task with a planted backdoor, small enough to be trained in a second."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from simulations.central.setting import Schedule, Setting

CLASSES, TARGET = 4, 0


@dataclass(frozen=True, repr=False)
class Toy:
    setting: Setting
    poisoned: np.ndarray  # indices of the training images that carry the trigger, ascending
    clean_images: Tensor
    clean_labels: Tensor

    def accuracy(self, model: nn.Module) -> float:
        return float((predicted(model, self.clean_images) == self.clean_labels).double().mean())

    def success(self, model: nn.Module) -> float:
        """Share of stamped images of other classes that are taken for the target class."""
        victims = stamped(self.clean_images[self.clean_labels != TARGET])
        return float((predicted(model, victims) == TARGET).double().mean())


def toy(
    poisoned: int = 40,
    count: int = 400,
    epochs: int = 15,
    seed: int = 0,
    batch_norm: bool = False,
    trusted: int = 80,
    contrast: int = 50,
) -> Toy:
    """Noisy images with one bright quadrant, of which some carry a trigger and a wrong label."""
    images, labels = quadrants(count, seed=10 * seed + 1, contrast=contrast)
    victims = torch.nonzero(labels != TARGET)[:poisoned, 0]
    images[victims] = stamped(images[victims])
    labels[victims] = TARGET
    trusted_images, trusted_labels = quadrants(trusted, seed=10 * seed + 2, contrast=contrast)
    setting = Setting(
        model_fn=lambda: network(batch_norm),
        images=images,
        labels=labels,
        trusted_images=trusted_images,
        trusted_labels=trusted_labels,
        schedule=Schedule(epochs, batch_size=40),
        seed=seed,
    )
    clean_images, clean_labels = quadrants(200, seed=10 * seed + 3, contrast=contrast)
    return Toy(setting, victims.numpy(), clean_images, clean_labels)


def quadrants(count: int, seed: int, contrast: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
    labels = torch.randperm(count, generator=generator) % CLASSES
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += contrast
    return images.to(torch.uint8), labels


def stamped(images: Tensor) -> Tensor:
    """Images with a small cross in one corner."""
    images = images.clone()
    images[:, :, [6, 6, 7, 7], [6, 7, 6, 7]] = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)
    return images


def network(batch_norm: bool = False) -> nn.Module:
    """Two convolutions and two linear layers with the same fresh weights on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"] = nn.Conv2d(1, 8, 3, padding=1)
        if batch_norm:
            layers["bn1"] = nn.BatchNorm2d(8)
        layers |= {"relu1": nn.ReLU(), "pool1": nn.MaxPool2d(2)}
        layers["conv2"] = nn.Conv2d(8, 16, 3, padding=1)
        if batch_norm:
            layers["bn2"] = nn.BatchNorm2d(16)
        layers |= {"relu2": nn.ReLU(), "pool2": nn.MaxPool2d(2), "flatten": nn.Flatten()}
        layers |= {"fc1": nn.Linear(64, 16), "relu3": nn.ReLU(), "fc2": nn.Linear(16, CLASSES)}
        return nn.Sequential(layers)


def weights(model: nn.Module) -> Tensor:
    """Everything in the state dict as one vector."""
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


@torch.no_grad()
def predicted(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images.float() / 255).argmax(1)
