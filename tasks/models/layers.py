"""What several networks share: the shape of an image, its normalisation, and the first weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]  # channels, height, width

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
MNIST_MEAN = (0.1307,)
MNIST_STD = (0.3081,)

# Up to this side an image is small: the stems made for ImageNet (large strides, then pooling) would
# leave too few positions.
SMALL_IMAGE = 64
# Under this side nothing is left of an image after the poolings of AlexNet.
_LEAST = 8


class Normalise(nn.Module):
    """Subtract a mean from each channel and divide by a standard deviation.

    The two are constants, not parameters: they stay out of the state dict, so that they are neither
    sent nor averaged, and no client can change them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images (N, C, H, W)."""
        return (images - self.mean) / self.std


def normalisation(channels: int) -> Normalise:
    """Return CIFAR-10's normalisation for three channels, MNIST's for one."""
    if channels == 1:
        return Normalise(MNIST_MEAN, MNIST_STD)
    return Normalise(CIFAR10_MEAN, CIFAR10_STD)


def is_small(shape: Shape) -> bool:
    """Whether a network gets the stem and the head for small images."""
    return max(shape[1:]) <= SMALL_IMAGE


def check_shape(name: str, shape: Shape) -> None:
    """Raise ValueError unless the images are grey or coloured, and 8x8 or more."""
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f'model "{name}" takes images of 1 or 3 channels, got {channels}')
    if min(height, width) < _LEAST:
        raise ValueError(
            f'model "{name}" takes images of {_LEAST}x{_LEAST} or more, got {height}x{width}'
        )


def draw(model: nn.Module) -> None:
    """Give every layer its first weights.

    Those of convolutions are normal and scaled for rectifiers by the number of inputs, so that the
    values keep their size from layer to layer: He et al., "Delving Deep into Rectifiers", ICCV
    2015. Scaled by the number of outputs, as in torchvision's VGG, they shrink twentyfold in its
    first layer, and without batch normalisation nothing is learned for many passes over a small
    data set. Biases of convolutions are 0; what other layers start with is torch's.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
