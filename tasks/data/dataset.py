"""What a data set is once it is loaded, and what all loaders need: checks, errors, downloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.integer]
Shape = tuple[int, int, int]  # channels, height, width


class DataError(RuntimeError):
    """The files of a data set are missing or not what they should be."""


@dataclass(frozen=True, eq=False)
class Data:
    """One image-classification data set.

    Attributes
    ----------
    name : str
        The name that `load` knows it by.
    train_images, test_images : Tensor
        uint8, shape (N, C, H, W).
    train_labels, test_labels : Tensor
        int64, shape (N,), each in 0..len(classes) - 1.
    classes : tuple of str
        The name of each class, in label order.
    train_groups : ndarray of int64, shape (N,), optional
        Training images of one class and one number are of one thing (frames of one drive), and are
        not held out apart.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    train_groups: npt.NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class Source:
    """What has to be known of a data set before it is loaded, and how it is.

    Attributes
    ----------
    classes : tuple of str
        The name of each class, in label order.
    shape : tuple of int
        Channels, height and width of an image.
    load : callable
        Takes the data set's name, the data root or None, and whether missing files may be
        downloaded; returns the `Data`.
    """

    classes: tuple[str, ...]
    shape: Shape
    load: Callable[[str, Path | None, bool], Data]


def require_root(name: str, data_root: Path | None) -> Path:
    """Return the data folder, or say that one is needed."""
    if data_root is None:
        raise DataError(
            f'data set "{name}" is read from a data folder: pass one with --data-root '
            '(the data sets "mnist5k" and "signs" need none)'
        )
    return Path(data_root)


def not_found(name: str, root: Path, expected: str) -> str:
    """Say what was looked for, and what to do."""
    return (
        f'data set "{name}" was not found in {root.absolute()}: expected {expected}. '
        "Pass the folder that holds it with --data-root, or allow the download."
    )


def fetch(name: str, dataset: str, root: Path, **options: str) -> None:
    """Let torchvision fetch, check and unpack a data set into the folder `root`."""
    from tasks.torchvision_import import torchvision

    try:
        getattr(torchvision.datasets, dataset)(root, download=True, **options)
    except (OSError, RuntimeError) as error:  # no network, no space; all mirrors failed, bad MD5
        raise DataError(f'data set "{name}" could not be downloaded to {root}: {error}') from error


def assemble(
    name: str,
    train: tuple[Images, Labels],
    test: tuple[Images, Labels],
    classes: tuple[str, ...],
    train_groups: Labels | None = None,
) -> Data:
    """Check that images, labels and classes belong together, and make tensors that own memory."""
    for split, (images, labels) in (("train", train), ("test", test)):
        if len(images) != len(labels):
            raise DataError(
                f'data set "{name}" has {len(images)} {split} images but {len(labels)} labels'
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
            raise DataError(
                f'data set "{name}" has {split} labels outside 0..{len(classes) - 1}: '
                f"{labels.min()}..{labels.max()}"
            )
    if train_groups is not None and train_groups.shape != (len(train[1]),):
        raise DataError(
            f'data set "{name}" has {len(train[1])} training images but groups of shape '
            f"{train_groups.shape}"
        )
    (train_images, train_labels), (test_images, test_labels) = train, test
    return Data(
        name,
        torch.from_numpy(_owned(train_images)),
        torch.from_numpy(train_labels.astype(np.int64)),
        torch.from_numpy(_owned(test_images)),
        torch.from_numpy(test_labels.astype(np.int64)),
        classes,
        None if train_groups is None else train_groups.astype(np.int64),
    )


def _owned(images: Images) -> Images:
    """Copy images unless they have their memory to themselves already: there may be gigabytes."""
    return np.require(images, requirements=["C", "O", "W"])
