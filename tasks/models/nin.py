"""Network in Network: convolutions with small perceptrons over their channels, and no linear layer.

Lin, Chen, Yan, "Network In Network", ICLR 2014, with the widths of its CIFAR-10 model. What differs
from it: behind the maps of the classes there is no rectifier, so that logits may be negative and no
class can be reset as a neuron, and any image size ends in one value a class.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from tasks.models.layers import Shape, check_shape, draw, is_small, normalisation

_WIDTHS = ((192, 160, 96), (192, 192, 192), (192, 192))  # of each block; the classes come last


def nin(shape: Shape, classes: int, *, divisor: int = 1, batch_norm: bool = False) -> nn.Module:
    """Build the network, which has a million weights.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image.
    classes : int
        Number of logits.
    divisor : int
        By which the channels of every layer are divided.
    batch_norm : bool
        Normalise batches before every rectifier. Without, the network takes a learning rate of
        0.02 or less.

    Raises
    ------
    ValueError
        For an image shape that the network cannot take.
    """
    check_shape("nin", shape)
    blocks = [[width // divisor for width in widths] for widths in _WIDTHS]
    blocks[-1].append(classes)
    # The stem for large images is that of the paper's ImageNet model.
    stem = {"kernel_size": 5, "padding": 2}
    if not is_small(shape):
        stem = {"kernel_size": 11, "padding": 5, "stride": 4}
    spatial = (stem, {"kernel_size": 5, "padding": 2}, {"kernel_size": 3, "padding": 1})
    pools = (nn.MaxPool2d, nn.AvgPool2d)

    layers: OrderedDict[str, nn.Module] = OrderedDict(normalise=normalisation(shape[0]))
    channels = shape[0]
    for block, (widths, options) in enumerate(zip(blocks, spatial, strict=True), start=1):
        for step, (inputs, outputs) in enumerate(pairwise((channels, *widths)), start=1):
            kind = options if step == 1 else {"kernel_size": 1}
            layers[f"conv{block}_{step}"] = nn.Conv2d(inputs, outputs, **kind)
            if (block, step) == (len(blocks), len(widths)):
                break
            if batch_norm:
                layers[f"bn{block}_{step}"] = nn.BatchNorm2d(outputs)
            layers[f"relu{block}_{step}"] = nn.ReLU()
        channels = widths[-1]
        if block <= len(pools):
            layers[f"pool{block}"] = pools[block - 1](3, stride=2, padding=1)
            layers[f"dropout{block}"] = nn.Dropout(0.5)
    layers["pool3"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    model = nn.Sequential(layers)
    draw(model)
    return model
