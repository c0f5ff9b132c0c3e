"""GTSRB: photographs of 43 German traffic signs, from an npz file or as torchvision unpacks them.

Stallkamp, Schlipsing, Salmen, Igel, "Man vs. computer: Benchmarking machine learning algorithms for
traffic sign recognition", Neural Networks 32, 2012.
"""

from __future__ import annotations

import csv
from pathlib import Path

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
    "speed limit 20",
    "speed limit 30",
    "speed limit 50",
    "speed limit 60",
    "speed limit 70",
    "speed limit 80",
    "end of speed limit 80",
    "speed limit 100",
    "speed limit 120",
    "no passing",
    "no passing over 3.5 t",
    "right-of-way at next intersection",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no vehicles over 3.5 t",
    "no entry",
    "general caution",
    "dangerous curve left",
    "dangerous curve right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road work",
    "traffic signals",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "beware of ice/snow",
    "wild animals crossing",
    "end of all limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "go straight or right",
    "go straight or left",
    "keep right",
    "keep left",
    "roundabout mandatory",
    "end of no passing",
    "end of no passing over 3.5 t",
)
_SIDE = 32


def _load_gtsrb(name: str, data_root: Path | None, download: bool) -> Data:
    """Read ``gtsrb32.npz`` where there is one, and the images torchvision unpacks otherwise.

    Those are scaled to 32x32 as they are, with the border around the sign. Training images are
    frames of drives past a sign, whose number is in the file's name, or ``track_train`` in the npz.
    """
    root = require_root(name, data_root)
    folder = root / "gtsrb"
    table = folder / "gtsrb32.npz"
    if table.is_file():
        train, test = (_read_npz(table, split) for split in ("train", "test"))
        return assemble(name, train, test, _CLASSES, _drives(table))
    images = folder / "GTSRB" / "Training", folder / "GTSRB" / "Final_Test" / "Images"
    if not all(part.is_dir() for part in images):
        if not download:
            raise DataError(not_found(name, root, f"{table}, or {images[0]} and {images[1]}"))
        for split in ("train", "test"):
            fetch(name, "GTSRB", root, split=split)
    signs, labels, drives = _read_class_folders(images[0])
    test = _read_listed(images[1], folder)
    return assemble(name, (signs, labels), test, _CLASSES, drives)


def _read_npz(file: Path, split: str) -> tuple[Images, Labels]:
    """Read ``x_<split>``, uint8 (N, 32, 32, 3), and ``y_<split>``."""
    with np.load(file, allow_pickle=False) as arrays:
        missing = {f"x_{split}", f"y_{split}"} - set(arrays)
        if missing:
            raise DataError(f"{file} has no array {', '.join(sorted(missing))}")
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if images.dtype != np.uint8 or images.shape[1:] != (_SIDE, _SIDE, 3):
        raise DataError(
            f"{file}: x_{split} is {images.dtype} of shape {images.shape}, not uint8 images of "
            f"(N, {_SIDE}, {_SIDE}, 3)"
        )
    return images.transpose(0, 3, 1, 2), labels


def _drives(file: Path) -> Labels | None:
    """Read the number of each training image's drive, unless the file does not say."""
    with np.load(file, allow_pickle=False) as arrays:
        drives = arrays.get("track_train")
    if drives is not None and drives.dtype.kind not in "iu":
        raise DataError(f"{file}: track_train is {drives.dtype}, not whole numbers")
    return drives


def _read_class_folders(folder: Path) -> tuple[Images, Labels, Labels]:
    """Read ``00000/00001_00002.ppm``, ...: label, drive and frame; images, labels and drives."""
    files = sorted(folder.glob("[0-9]*/*.ppm"))
    labels = np.array([int(file.parent.name) for file in files])
    numbers = [file.stem.split("_")[0] for file in files]
    if not all(number.isdecimal() for number in numbers):
        raise DataError(f"{folder} holds images that are not named DRIVE_FRAME.ppm")
    drives = np.array([int(number) for number in numbers])
    return _read_signs(folder, files), labels, drives


def _read_listed(folder: Path, table_folder: Path) -> tuple[Images, Labels]:
    """Read the test images that ``GT-final_test.csv`` lists, with their labels."""
    table = table_folder / "GT-final_test.csv"
    if not table.is_file():
        raise DataError(f"{table} is missing: is the copy complete?")
    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter=";", skipinitialspace=True))
    files = [folder / row["Filename"] for row in rows]
    return _read_signs(folder, files), np.array([int(row["ClassId"]) for row in rows])


def _read_signs(folder: Path, files: list[Path]) -> Images:
    """Read photographs of 15 to 250 pixels a side, scaled to one size."""
    from PIL import Image

    if not files:
        raise DataError(f"{folder} holds no images: is the copy complete?")
    side = _SIDE
    images = np.empty((len(files), 3, side, side), dtype=np.uint8)
    for image, file in zip(images, files, strict=True):
        if not file.is_file():
            raise DataError(f"{file} is missing: is the copy complete?")
        with Image.open(file) as photo:
            scaled = photo.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        image[:] = np.asarray(scaled).transpose(2, 0, 1)
    return images


GTSRB = Source(_CLASSES, (3, _SIDE, _SIDE), _load_gtsrb)
