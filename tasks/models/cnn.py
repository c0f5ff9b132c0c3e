"""Two small networks that two cores train in minutes, for digits and for photographs.

Pooling comes before the rectifier: the function is the same, and there are four times fewer values
to rectify.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from tasks.models.layers import CIFAR10_MEAN, CIFAR10_STD, Normalise, Shape


def mnist_cnn(shape: Shape, classes: int) -> nn.Module:
    """Build the network of the published DBA experiments."""
    channels, height, width = shape
    # Each 5x5 convolution takes 4 off a side, each pooling halves it.
    rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
    if min(rows, columns) < 1:
        raise ValueError(f'model "mnist-cnn" takes images of 16x16 or more, got {height}x{width}')
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 20, 5),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(50 * rows * columns, 500),
            relu3=nn.ReLU(),
            fc2=nn.Linear(500, classes),
        )
    )


def cifar_cnn(shape: Shape, classes: int) -> nn.Module:
    """Build three convolutions and a linear layer."""
    return _three_convolutions("cifar-cnn", shape, classes, batch_norm=False)


def cifar_cnn_bn(shape: Shape, classes: int) -> nn.Module:
    """Build the same with batch normalisation."""
    return _three_convolutions("cifar-cnn-bn", shape, classes, batch_norm=True)


def _three_convolutions(name: str, shape: Shape, classes: int, batch_norm: bool) -> nn.Module:
    channels, height, width = shape
    rows, columns = height // 8, width // 8
    if channels != len(CIFAR10_MEAN):
        raise ValueError(f'model "{name}" takes colour images (3 channels), got {channels}')
    if min(rows, columns) < 1:
        raise ValueError(f'model "{name}" takes images of 8x8 or more, got {height}x{width}')
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalise=Normalise(CIFAR10_MEAN, CIFAR10_STD)
    )
    for number, (inputs, outputs) in enumerate(pairwise((channels, 32, 64, 128)), start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 3, padding=1)
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        if batch_norm:
            layers[f"bn{number}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{number}"] = nn.ReLU()
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(128 * rows * columns, 256)
    layers["relu4"] = nn.ReLU()
    layers["fc2"] = nn.Linear(256, classes)
    return nn.Sequential(layers)
