"""Data sets beside MNIST: torchvision's, scikit-learn's, folders of pictures."""

from __future__ import annotations

import gzip
import logging
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from digits.preprocessing import DIGITS, to_pixels
from server.golden import golden_digits
from trainer.cli import main
from trainer.data import DataError
from trainer.datasets import (
    EMNIST_DIGITS,
    EMNIST_LETTERS,
    FASHION,
    FASHION_MNIST,
    KMNIST,
    LETTERS,
    QMNIST,
    load_data,
    load_folder,
)

WriteMnist = Callable[..., dict[str, npt.NDArray[np.uint8]]]


def write_idx(path: Path, array: npt.NDArray[np.integer]) -> None:
    """Write an array of bytes or of 32-bit numbers in MNIST's file format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = 0x08 if array.dtype == np.uint8 else 0x0C
    big_endian = array if array.dtype == np.uint8 else array.astype(">i4")
    path.write_bytes(struct.pack(f">{1 + array.ndim}i", kind << 8 | array.ndim, *array.shape) + big_endian.tobytes())


@pytest.mark.parametrize(
    ("dataset", "folder", "label"), [("fashion-mnist", "FashionMNIST", "Bag"), ("kmnist", "KMNIST", "ya")]
)
def test_mnists_kin_is_read_with_its_labels(
    tmp_path: Path, write_mnist: WriteMnist, dataset: str, folder: str, label: str
) -> None:
    written = write_mnist(tmp_path)
    (tmp_path / "MNIST").rename(tmp_path / folder)
    data = load_data(dataset, tmp_path, download=False)
    assert np.array_equal(data.train.pixels, written["train-images-idx3-ubyte"].reshape(40, 784))
    assert np.array_equal(data.test.labels, written["t10k-labels-idx1-ubyte"])
    assert (data.name, data.labels[8 if label == "Bag" else 7]) == (folder, label)


def test_emnists_columns_become_rows(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part in ("train", "test"):
        write_idx(tmp_path / f"EMNIST/raw/emnist-digits-{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"EMNIST/raw/emnist-digits-{part}-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    data = load_data("emnist-digits", tmp_path, download=False)
    assert np.array_equal(data.train.pixels.reshape(20, 28, 28), images.transpose(0, 2, 1))
    assert data.labels == DIGITS


def test_emnists_letters_are_numbered_from_one(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (52, 28, 28), dtype=np.uint8)
    for part in ("train", "test"):
        write_idx(tmp_path / f"EMNIST/raw/emnist-letters-{part}-images-idx3-ubyte", images)
        write_idx(
            tmp_path / f"EMNIST/raw/emnist-letters-{part}-labels-idx1-ubyte", np.arange(52, dtype=np.uint8) % 26 + 1
        )
    data = load_data("emnist-letters", tmp_path, download=False)
    assert np.array_equal(data.test.pixels.reshape(52, 28, 28), images.transpose(0, 2, 1))
    assert data.train.labels.tolist() == data.test.labels.tolist() == [*range(26)] * 2
    assert data.labels == LETTERS == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert data.name == "EMNIST Letters"


def test_of_qmnists_labels_the_first_is_the_digit(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.stack([np.arange(20) % 10, *[np.full(20, 99)] * 7], axis=1).astype(np.int32)
    for part in ("train", "test"):
        write_idx(tmp_path / f"QMNIST/raw/qmnist-{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"QMNIST/raw/qmnist-{part}-labels-idx2-int", labels)
    data = load_data("qmnist", tmp_path, download=False)
    assert np.array_equal(data.test.pixels.reshape(20, 28, 28), images)
    assert data.test.labels.tolist() == [*range(10)] * 2


KIN = {
    "fashion-mnist": (FASHION_MNIST, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
    "kmnist": (KMNIST, "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"),
    "emnist-digits": (EMNIST_DIGITS, "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"),
    "emnist-letters": (EMNIST_LETTERS, "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"),
    "qmnist": (QMNIST, "https://raw.githubusercontent.com/facebookresearch/qmnist/master/"),
}


@pytest.mark.parametrize("dataset", KIN)
def test_what_is_missing_is_named_with_the_folder_and_where_it_comes_from(tmp_path: Path, dataset: str) -> None:
    source, address = KIN[dataset]
    raw = tmp_path / source.name / "raw"
    write_idx(raw / source.files[0], np.zeros((1, 28, 28), np.uint8))
    title = source.title or source.name
    with pytest.raises(DataError, match=rf"^{title} is not complete, and .*--no-download") as caught:
        load_data(dataset, tmp_path, download=False)
    message = str(caught.value)
    assert str(raw) in message
    assert all(f"  {file}\n" in message for file in source.files[1:])
    assert source.files[0] not in message
    assert f"--data-dir to the folder that holds {source.name}/raw" in message
    if address.endswith(".zip"):
        assert f"  curl -fL --create-dirs -o {raw}/gzip.zip {address}" in message
        members = " ".join(f"'*/{file}.gz'" for file in source.files[1:])
        assert f"  unzip -j {raw}/gzip.zip {members} -d {raw}" in message
    else:
        for file in source.files[1:]:
            assert f"  curl -fL --create-dirs -o {raw / file}.gz {address}{file}.gz" in message


EMNIST_FILES = ("images-idx3-ubyte", "labels-idx1-ubyte")


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("dataset", KIN)
def test_the_files_and_addresses_are_torchvisions(dataset: str) -> None:
    import torchvision.datasets

    source, address = KIN[dataset]
    kind = getattr(torchvision.datasets, source.name)
    if source.name == "EMNIST":
        assert address == kind.url
        split = source.options["split"]
        assert source.files == tuple(
            f"emnist-{split}-{part}-{content}" for part in ("train", "test") for content in EMNIST_FILES
        )
        named = [*map(str.upper, kind.classes_split_dict[split])]  # of letters, the first is "N/A"
        assert source.labels == tuple(named[source.first_label :])
    elif dataset == "qmnist":
        assert [f"{address}{file}.gz" for file in source.files] == [
            url for part in ("train", "test") for url, _ in kind.resources[part]
        ]
    else:
        assert address in kind.mirrors
        assert [f"{file}.gz" for file in source.files] == [file for file, _ in kind.resources]
    if dataset in ("fashion-mnist", "kmnist"):
        assert source.labels == tuple(kind.classes)
    elif dataset != "emnist-letters":
        assert source.labels == DIGITS


@pytest.mark.parametrize("dataset", KIN)
def test_packed_files_will_do_for_mnists_kin_too_and_are_checked_as_well(tmp_path: Path, dataset: str) -> None:
    source, address = KIN[dataset]
    raw = tmp_path / source.name / "raw"
    first, last = source.first_label, source.first_label + len(source.labels) - 1
    labels = np.append(np.arange(19) % 10, last - first)
    for images_file, labels_file in (source.files[:2], source.files[2:]):
        write_idx(raw / images_file, np.ones((20, 28, 28), np.uint8))
        long = np.stack([labels] * 8, axis=1).astype(np.int32)
        write_idx(raw / labels_file, long if dataset == "qmnist" else (labels + first).astype(np.uint8))
        (raw / f"{images_file}.gz").write_bytes(gzip.compress((raw / images_file).read_bytes()))
        (raw / images_file).unlink()
    data = load_data(dataset, tmp_path, download=False)
    assert data.train.labels.tolist() == data.test.labels.tolist() == labels.tolist()
    assert data.test.labels.dtype == torch.int64
    assert data.test.pixels.dtype == torch.uint8

    for outside, span in ((last + 1, f"{first} to {last + 1}"), (first - 1, f"{first - 1} to {last}")):
        if outside < 0 and dataset != "qmnist":
            continue  # a byte is never below 0
        wrong = long.copy() if dataset == "qmnist" else (labels + first).astype(np.uint8)
        wrong[4] = outside
        write_idx(raw / source.files[3], wrong)
        told = rf"{source.files[3]}: .* labels are {first} to {last}, these are {span}\n"
        with pytest.raises(DataError, match=told) as caught:
            load_data(dataset, tmp_path, download=False)
        assert address in str(caught.value)
    title = source.title or source.name
    write_idx(raw / source.files[3], wrong[:7])
    with pytest.raises(DataError, match="there are 20 images and 7 labels"):
        load_data(dataset, tmp_path, download=False)
    (raw / f"{source.files[0]}.gz").write_bytes(gzip.compress(b"<html>"))
    with pytest.raises(DataError, match=rf"{source.files[0]}.gz: damaged or no part of {title}: .*page of the web"):
        load_data(dataset, tmp_path, download=False)


def test_scikit_learns_scans_need_no_files(tmp_path: Path) -> None:
    data = load_data("sklearn", tmp_path, download=False)
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.train.pixels.shape == (1438, 784)
    assert data.train.pixels.dtype == torch.uint8


def test_an_unknown_name_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--dataset is one of mnist, fashion-mnist, .* or folder:PATH, not svhn"):
        load_data("svhn", tmp_path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of golden digits, dark on white and enlarged, ten of each."""
    pixels, labels = golden_digits()
    for number in range(100):
        index = number % len(pixels)
        image = Image.fromarray(255 - pixels[index].reshape(28, 28)).resize((56 + number, 56 + number))
        folder = tmp_path / "pictures" / str(labels[index])
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    (tmp_path / "pictures" / "read me.txt").write_text("not a class")
    return tmp_path / "pictures"


class TestFolder:
    def test_pictures_are_read_as_clients_would_and_a_fifth_is_for_the_test(self, pictures: Path) -> None:
        data = load_folder(pictures)
        assert len(data.train) + len(data.test) == 100
        assert 8 <= len(data.test) <= 32
        assert data.name == "pictures"
        found = {pixels.numpy().tobytes() for part in (data.train, data.test) for pixels in part.pixels}
        assert found == {to_pixels(path).tobytes() for path in pictures.glob("*/*.png")}

    def test_the_parts_are_the_same_wherever_the_folder_lies(self, pictures: Path, tmp_path: Path) -> None:
        first = load_folder(pictures)
        second = load_folder(pictures.rename(tmp_path / "elsewhere"))
        assert torch.equal(first.test.pixels, second.test.pixels)
        assert torch.equal(first.test.labels, second.test.labels)

    def test_parts_that_are_given_are_kept(self, pictures: Path, tmp_path: Path) -> None:
        (tmp_path / "both").mkdir()
        pictures.rename(tmp_path / "both" / "train")
        for digit in DIGITS:
            (tmp_path / "both" / "test" / digit).mkdir(parents=True)
            some = next((tmp_path / "both" / "train" / digit).iterdir())
            some.rename(tmp_path / "both" / "test" / digit / some.name)
        data = load_folder(tmp_path / "both")
        assert (len(data.train), data.test.labels.tolist()) == (90, [*range(10)])

    def test_other_classes_have_their_names(self, pictures: Path) -> None:
        for number, name in ((3, "three"), (4, "four")):
            (pictures / str(number)).rename(pictures / name)
        for other in "01256789":
            (pictures / other).rename(pictures.parent / other)
        data = load_folder(pictures)
        assert data.labels == ("four", "three", *[""] * 8)
        assert set(data.train.labels.tolist()) == {0, 1}

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ([], r"2 to 100 classes, with the pictures in it, not 0"),
            (["a/x.png"], r"2 to 100 classes, with the pictures in it, not 1: a"),
            ([f"{number:03}/x.png" for number in range(101)], r"2 to 100 classes, .* not 101: 000, 001, 002"),
            (["0/x.txt", "1/y.txt"], r"/0: a class has 2 pictures or more \(.png, .jpg.*, and this one has 0"),
            (["0/a.png", "0/b.png", "1/y.png"], r"/1: .* one to learn from and one for the test, and this one has 1"),
            (["0/a.png", "0/b.png", "1/.y.png", "1/sub"], r"/1: a class has 2 .*, and this one has 0"),
            (["0/broken.png", "0/a.png", "1/x.png", "1/y.png"], r"a.png: .*no image file of a known format"),
            (["train/0/a.png", "train/1/a.png"], r"has the part train, but no .*/test beside it"),
            (["train/0/a.png", "train/1/a.png", "valid/0/a.png"], r"has the part train, but no .*/test beside it"),
            (["test/0/a.png", "test/1/a.png"], r"has the part test, but no .*/train beside it"),
            (["train/0/a.png", "train/1/a.png", "test/0/a.png"], r"is in train and test, but there is no 1 in .*/test"),
            (["train/0/a.png", "test/1/a.png", "test/0/a.png"], r"is in train and test, but there is no 1 in .*/train"),
            (
                ["train/0/a.png", "train/1/a.png", "test/0/a.png", "test/1/a"],
                r"/test/1: a class has 1 pictures or more",
            ),
            (
                ["a" * 101 + "/x.png", "b/y.png"],
                r"has at most 100 printable characters, not 101: 'aaaaaaaaaaaaaaaaaaaa'",
            ),
            (["a\nb/x.png", "b/y.png"], r"that of its class, and has at most 100 printable characters, not 3: 'a\\nb'"),
            (["\udcff/x.png", "b/y.png"], r"at most 100 printable characters, not 1: '\\udcff'"),
        ],
    )
    def test_what_is_no_such_folder_is_refused_with_the_rule(
        self, tmp_path: Path, files: list[str], message: str
    ) -> None:
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(b"no picture")
        with pytest.raises(DataError, match=message):
            load_folder(tmp_path)

    def test_names_with_a_dot_before_them_are_passed_over(self, pictures: Path) -> None:
        (pictures / ".ipynb_checkpoints").mkdir()
        (pictures / "3" / ".hidden.png").write_bytes(b"no picture")
        data = load_folder(pictures)
        assert len(data.train) + len(data.test) == 100
        assert data.labels == DIGITS

    def test_files_that_are_not_read_are_told_in_one_line(
        self, pictures: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (pictures / "3" / "photo.heic").write_bytes(b"")
        (pictures / "4" / "more").mkdir()
        next((pictures / "4").glob("*.png")).rename(pictures / "4" / "more" / "four.png")
        (pictures / ".hidden").write_bytes(b"")
        with caplog.at_level(logging.WARNING):
            load_folder(pictures)
        (message,) = caplog.messages
        assert f"{pictures}: files that are not read: 3, such as 3/photo.heic; pictures lie in the folder of" in message

    def test_of_each_class_some_are_for_the_test_and_some_are_not(self, pictures: Path) -> None:
        for folder in pictures.glob("?"):
            for number, path in enumerate(sorted(folder.iterdir())):
                if number > 2:
                    path.unlink()
        data = load_folder(pictures)
        assert set(data.test.labels.tolist()) == set(data.train.labels.tolist()) == {*range(10)}
        assert len(data.test) + len(data.train) == 30

    def test_a_class_may_be_called_train(self, pictures: Path) -> None:
        (pictures / "7").rename(pictures / "train")
        assert "train" in load_folder(pictures).labels

    def test_a_training_on_few_digits_leaves_out_what_cannot_be_made_of_them(
        self, pictures: Path, tmp_path: Path
    ) -> None:
        for other in "23456789":
            (pictures / other).rename(pictures.parent / other)
        flags = ["--dataset", f"folder:{pictures}", "--out", str(tmp_path / "run"), "--epochs", "1"]
        assert main([*flags, "--teacher", "none", "--validation-size", "5"]) == 0

    def test_of_more_than_ten_classes_none_is_left_empty(self, pictures: Path) -> None:
        for number in range(10):
            (pictures / str(number)).rename(pictures / f"class {number:02}")
        for more in ("class 10", "class 11"):
            (pictures / more).mkdir()
            for path in [*(pictures / "class 03").iterdir()][:4]:
                path.rename(pictures / more / path.name)
        data = load_folder(pictures)
        assert data.labels == tuple(f"class {number:02}" for number in range(12))
        assert set(data.train.labels.tolist()) == set(data.test.labels.tolist()) == {*range(12)}

    def test_a_path_that_is_empty_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"--dataset folder:PATH names a folder after the colon, and there is"):
            load_data("folder:", tmp_path)

    def test_a_folders_name_becomes_the_data_sets(self, tmp_path: Path) -> None:
        (tmp_path / "a\nb").mkdir()
        with pytest.raises(DataError, match="the folder's name becomes the data set's, and has at most 100 printable"):
            load_folder(tmp_path / "a\nb")

    def test_a_folder_that_is_none_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"takes a folder, and .*none is none"):
            load_data(f"folder:{tmp_path / 'none'}", tmp_path)

    def test_a_training_on_it_gives_its_labels_to_the_manifest(self, pictures: Path, tmp_path: Path) -> None:
        for digit, name in enumerate(FASHION):
            (pictures / str(digit)).rename(pictures / name.replace("/", " or "))
        flags = ["--dataset", f"folder:{pictures}", "--out", str(tmp_path / "run"), "--epochs", "1"]
        assert main([*flags, "--validation-size", "10", "--learning-rate", "0.01"]) == 0
        from digits.checkpoint import load_checkpoint

        manifest = load_checkpoint(tmp_path / "run" / "mnist_model.pth").manifest
        assert manifest.labels == tuple(sorted(name.replace("/", " or ") for name in FASHION))
        assert manifest.dataset == "pictures"
