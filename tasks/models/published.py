"""AlexNet, VGG and ResNet-18 as torchvision has them, with stems and heads that fit the images.

Images larger than 64x64 go through torchvision's network, with as many channels at its entry and
logits at its end as needed. Smaller ones would shrink to nothing on the way, so there the stem is
one 3x3 convolution of stride 1, as He et al., "Deep Residual Learning for Image Recognition", 2016,
have it for CIFAR-10 (section 4.2); poolings round up; and the head is an average over all positions
and one linear layer, as the published code of NONE has it for VGG. Names are torchvision's.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from tasks.models.layers import Shape, check_shape, draw, is_small, normalisation


def resnet18(shape: Shape, classes: int) -> nn.Module:
    """Build He et al.'s ResNet-18; the normalisation behind the stem does the image's too."""
    from tasks.torchvision_import import torchvision

    model: nn.Module = torchvision.models.resnet18(weights=None, num_classes=classes)
    _fit(model, shape, classes)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def sized(name: str, shape: Shape, classes: int, divisor: int = 1) -> nn.Module:
    """Build one of torchvision's networks.

    Parameters
    ----------
    name : str
        torchvision's: "alexnet", "vgg11", "vgg11_bn", "vgg16", "vgg16_bn" or "resnet18".
    shape : tuple of int
        Channels, height and width of an image.
    classes : int
        Number of logits.
    divisor : int
        By which the channels of every layer are divided.

    Raises
    ------
    ValueError
        For an image shape that the network cannot take.
    """
    from tasks.torchvision_import import torchvision

    check_shape(name.replace("_", "-"), shape)
    # Sizes only, until they are right: a head for large images has a hundred million weights.
    with torch.device("meta"):
        model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=classes)
        _fit(model, shape, classes)
        if divisor > 1:
            _narrow(model, divisor)
    model.to_empty(device="cpu")
    draw(model)
    if hasattr(model, "features"):
        named = model.features.named_children()
        model.features = nn.Sequential(
            OrderedDict([("normalise", normalisation(shape[0])), *named])
        )
    return model


def _fit(model: nn.Module, shape: Shape, classes: int) -> None:
    """Make stem and head fit the images: the one place that does."""
    small = is_small(shape)
    if hasattr(model, "conv1"):
        model.conv1 = _stem(model.conv1, shape)
        if small:
            model.maxpool = nn.Identity()  # its head averages over all positions as it is
        return
    model.features[0] = _stem(model.features[0], shape)
    if small:
        for pool in (layer for layer in model.features if isinstance(layer, nn.MaxPool2d)):
            pool.ceil_mode = True
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        channels = [
            layer.out_channels for layer in model.features if hasattr(layer, "out_channels")
        ]
        model.classifier = nn.Linear(channels[-1], classes)


def _stem(convolution: nn.Conv2d, shape: Shape) -> nn.Conv2d:
    """Return the convolution that images enter by."""
    size, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
    if is_small(shape):
        size, stride, padding = (3, 3), (1, 1), (1, 1)
    has_bias = convolution.bias is not None
    return nn.Conv2d(shape[0], convolution.out_channels, size, stride, padding, bias=has_bias)


def _narrow(model: nn.Module, divisor: int) -> None:
    """Divide the channels of all layers, but for those of the images and of the logits."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    }
    first, last = next(iter(layers)), next(reversed(layers))
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        narrower: nn.Module
        if isinstance(layer, nn.Conv2d):
            inputs = layer.in_channels if name == first else layer.in_channels // divisor
            narrower = nn.Conv2d(
                inputs,
                layer.out_channels // divisor,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                bias=layer.bias is not None,
            )
        elif isinstance(layer, nn.BatchNorm2d):
            narrower = nn.BatchNorm2d(layer.num_features // divisor)
        else:
            outputs = layer.out_features if name == last else layer.out_features // divisor
            narrower = nn.Linear(layer.in_features // divisor, outputs)
        setattr(model.get_submodule(parent), own, narrower)
