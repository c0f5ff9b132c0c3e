"""Ten classes of ImageNet as a folder of photographs, in torchvision's ImageFolder layout.

``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg`` below one of `FOLDERS`. Imagenette, fast.ai's ten
classes (https://github.com/fastai/imagenette), is one such folder, and the one that is downloaded;
any other ten classes in that layout do as well.

Photographs are scaled until their shorter side fits, and cut to a square at the centre. They are
read one at a time into the uint8 tensors that they stay in: N * 3 * side * side bytes, which is 147
KiB an image at 224x224 (2.0 GB for all 13,394 of Imagenette) and 12 KiB at 64x64.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from PIL.Image import Image as Photo

# Where the photographs may lie below the data root; the first that is there is read.
FOLDERS = ("imagenet10", "imagenette2", "imagenette2-320", "imagenette2-160", "imagenette64")
# ImageNet's own names of Imagenette's classes, and what they mean.
_IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
_SPLITS = ("train", "val")


def _load(name: str, data_root: Path | None, download: bool, *, side: int) -> Data:
    root = require_root(name, data_root)
    folder = _find(root)
    if folder is None and download:
        fetch(name, "Imagenette", root, split="train", size="320px")
        folder = _find(root)
    if folder is None:
        parts = " and ".join(f"{split}/CLASS/*.jpg" for split in _SPLITS)
        expected = f"{parts} in a folder {', '.join(FOLDERS[:-1])} or {FOLDERS[-1]}"
        raise DataError(not_found(name, root, expected))
    (train, classes), (test, test_classes) = (_read(folder / split, side) for split in _SPLITS)
    if classes != test_classes:
        raise DataError(
            f"{folder}: {_SPLITS[0]} has the classes {', '.join(classes)}, "
            f"but {_SPLITS[1]} has {', '.join(test_classes)}"
        )
    return assemble(name, train, test, tuple(_IMAGENETTE.get(known, known) for known in classes))


def _find(root: Path) -> Path | None:
    folders = (root / name for name in FOLDERS)
    return next((f for f in folders if all((f / split).is_dir() for split in _SPLITS)), None)


def _read(folder: Path, side: int) -> tuple[tuple[Images, Labels], list[str]]:
    """Read a split, class by class in the order of their names; also return these."""
    from tasks.torchvision_import import torchvision

    try:
        found = torchvision.datasets.ImageFolder(str(folder), loader=partial(_square, side=side))
    except FileNotFoundError as error:
        raise DataError(f"{folder}: {error}: is the copy complete?") from None
    if len(found.classes) != len(_IMAGENETTE):
        raise DataError(
            f"{folder} has {len(found.classes)} classes, not {len(_IMAGENETTE)}: "
            f"{', '.join(found.classes)}"
        )
    images = np.empty((len(found), 3, side, side), dtype=np.uint8)
    for image, (pixels, _) in zip(images, found, strict=True):
        image[:] = pixels
    return (images, np.array(found.targets)), found.classes


def _square(file: str, side: int) -> Images:
    """Read a photograph as (3, side, side)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            photo: Photo = opened.convert("RGB")
    except OSError as error:  # also what Pillow raises for what is no image
        raise DataError(f"{file} is not a readable image: {error}") from error
    fitted = ImageOps.fit(photo, (side, side), Image.Resampling.BILINEAR)
    return np.asarray(fitted).transpose(2, 0, 1)


def source(side: int) -> Source:
    """Return the data set at one image size, in pixels."""
    return Source(tuple(_IMAGENETTE.values()), (3, side, side), partial(_load, side=side))
