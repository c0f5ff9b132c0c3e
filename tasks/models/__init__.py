"""The networks that are trained, each built by name with weights that depend on the seed alone.

All take float32 images in [0, 1] of shape (N, C, H, W) and return logits (N, classes). What
normalisation a network needs is part of it, so that triggers can live in pixel space.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tasks.models import activation as functions
from tasks.models import cnn, published
from tasks.models.activation import ACTIVATIONS
from tasks.models.layers import CIFAR10_MEAN, CIFAR10_STD, Normalise, Shape
from tasks.models.nin import nin

__all__ = [
    "ACTIVATIONS",
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "DEFAULT_MODEL",
    "NAMES",
    "Normalise",
    "Shape",
    "as_input",
    "build",
]

# The model that each data set is trained with unless the configuration names another.
DEFAULT_MODEL = {
    "mnist5k": "mnist-cnn",
    "mnist": "mnist-cnn",
    "fashion-mnist": "mnist-cnn",
    "cifar10": "cifar-cnn-bn",
    "gtsrb": "cifar-cnn-bn",
    "imagenet10": "resnet18",
    "imagenet10-64": "cifar-cnn-bn",
    "signs": "cifar-cnn-bn",
    "signs224": "resnet18",
}

_BUILDERS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mnist-cnn": cnn.mnist_cnn,
    "cifar-cnn": cnn.cifar_cnn,
    "cifar-cnn-bn": cnn.cifar_cnn_bn,
    "resnet18": published.resnet18,
    "resnet18-small": partial(published.sized, "resnet18", divisor=4),
    "nin": nin,
    "nin-bn": partial(nin, batch_norm=True),
    "nin-small": partial(nin, divisor=4),
    "nin-small-bn": partial(nin, divisor=4, batch_norm=True),
    "alexnet": partial(published.sized, "alexnet"),
    "vgg11": partial(published.sized, "vgg11"),
    "vgg11-bn": partial(published.sized, "vgg11_bn"),
    "vgg11-small": partial(published.sized, "vgg11", divisor=4),
    "vgg16": partial(published.sized, "vgg16"),
    "vgg16-bn": partial(published.sized, "vgg16_bn"),
}
NAMES = tuple(_BUILDERS)


def build(name: str, shape: Shape, classes: int, seed: int, activation: str = "relu") -> nn.Module:
    """Build a network with fresh weights.

    Parameters
    ----------
    name : str
        One of `NAMES`: "mnist-cnn" (two 5x5 convolutions of 20 and 50 channels and a linear layer
        of 500, as in the published DBA experiments), "cifar-cnn" (three 3x3 convolutions of 32, 64
        and 128 channels and a linear layer of 256), "cifar-cnn-bn" (the same with batch
        normalisation behind each convolution, which learns in half the rounds); Network in Network
        ("nin"); or torchvision's "resnet18", "alexnet", "vgg11" and "vgg16", with the stem and the
        head for small images up to 64x64. "-bn" has batch normalisation, "-small" a quarter of the
        channels in every layer, for machines of few cores ("nin-small-bn" both).
    shape : tuple of int
        Channels, height and width of an image.
    classes : int
        Number of logits.
    seed : int
        Fixes the weights. The global random state is left as it was.
    activation : str
        One of `ACTIVATIONS`: the function in the place of every rectifier. The weights that a seed
        gives are the same for all.

    Raises
    ------
    ValueError
        For an unknown name, or an image shape that the network cannot take.

    Notes
    -----
    Dropout layers are there with rate 0: torch draws what they drop from the global random state,
    which participants on several threads share, so that a seed would no longer fix a run. Whoever
    trains alone may set their ``p`` (0.5 in the papers).
    """
    if name not in _BUILDERS:
        raise ValueError(f"model must be one of {', '.join(NAMES)}, got {name!r}")
    functions.check(activation)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the accelerators.
        torch.default_generator.manual_seed(seed)
        model = _BUILDERS[name](shape, classes)
    functions.exchange(model, activation)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    # A sixth to two fifths less time to train; the layout is the weights' own and changes no shape.
    return model.to(memory_format=torch.channels_last)


def as_input(model: nn.Module, images: Tensor) -> Tensor:
    """Turn uint8 images into what a model takes: float32 in [0, 1], on the model's device."""
    device = next((tensor.device for tensor in model.parameters()), images.device)
    return images.to(device).float().div_(255)
