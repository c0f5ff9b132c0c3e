"""CIFAR-10: photographs of ten kinds, as lossless WebP sheets or as torchvision unpacks them."""

from __future__ import annotations

import pickle  # nosec B403
from pathlib import Path
from typing import Any

import numpy as np

from tasks.data.dataset import (
    Data,
    DataError,
    Images,
    Labels,
    Source,
    assemble,
    fetch,
    not_found,
    require_root,
)

_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_SIDE = 32


def _load_cifar10(name: str, data_root: Path | None, download: bool) -> Data:
    """Read the WebP sheets where there are some, and torchvision's pickled batches otherwise."""
    root = require_root(name, data_root)
    sheets, batches = root / "cifar10", root / "cifar-10-batches-py"
    if (sheets / "labels.npz").is_file():
        train, test = (_read_sheets(sheets, split) for split in ("train", "test"))
        return assemble(name, train, test, _CLASSES)
    if not (batches / "test_batch").is_file():
        if not download:
            expected = f"{sheets / 'labels.npz'} with WebP sheets beside it, or {batches}"
            raise DataError(not_found(name, root, expected))
        fetch(name, "CIFAR10", root)
    train = _read_batches([batches / f"data_batch_{number}" for number in range(1, 6)])
    test = _read_batches([batches / "test_batch"])
    return assemble(name, train, test, _CLASSES)


def _read_sheets(folder: Path, split: str) -> tuple[Images, Labels]:
    """Cut ``<split>_00.webp``, ... into images, row by row; the labels are in ``labels.npz``."""
    from PIL import Image

    with np.load(folder / "labels.npz", allow_pickle=False) as arrays:
        labels: Labels = arrays[split]
    files = sorted(folder.glob(f"{split}_*.webp"))
    if not files:
        raise DataError(f"{folder} has labels.npz but no {split}_00.webp: is the copy complete?")
    images = []
    for file in files:
        with Image.open(file) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        if pixels.shape[0] % _SIDE or pixels.shape[1] % _SIDE:
            raise DataError(f"{file} of shape {pixels.shape} is not a sheet of 32x32 images")
        grid = pixels.reshape(-1, _SIDE, pixels.shape[1] // _SIDE, _SIDE, 3)
        # (row, y, column, x, channel) -> (row, column, channel, y, x)
        images.append(grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, _SIDE, _SIDE))
    return np.concatenate(images), labels


class ArraysOnly(pickle.Unpickler):  # nosec B301
    """Reads pickles of numbers, texts, containers and numpy arrays, and runs nothing else."""

    _HARMLESS = frozenset(
        {
            ("_codecs", "encode"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy._core.multiarray", "_reconstruct"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle asks for by name, if it may.

        Raises
        ------
        DataError
            For everything but what arrays are made of.
        """
        module = module.replace("numpy.core", "numpy._core")  # as it was called before numpy 2
        if (module, name) not in self._HARMLESS:
            raise DataError(f"a pickle asks for {module}.{name}, and holds more than arrays")
        return super().find_class(module, name)


def _read_batches(files: list[Path]) -> tuple[Images, Labels]:
    """Read the pickled batches that torchvision unpacks, each row one image as (3, 32, 32)."""
    images, labels = [], []
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is missing: is the copy complete?")
        with file.open("rb") as stream:
            # Written by Python 2, so that its strings need an encoding.
            batch = ArraysOnly(stream, encoding="latin1").load()
        images.append(np.asarray(batch["data"], dtype=np.uint8))
        labels.append(np.asarray(batch["labels"], dtype=np.int64))
    pixels = np.concatenate(images).reshape(-1, 3, _SIDE, _SIDE)
    return pixels, np.concatenate(labels)


CIFAR10 = Source(_CLASSES, (3, _SIDE, _SIDE), _load_cifar10)
