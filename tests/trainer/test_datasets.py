"""Data sets beside MNIST: torchvision's, scikit-learn's, folders of pictures."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from digits.preprocessing import to_pixels
from server.golden import golden_digits
from trainer.cli import main
from trainer.data import DIGITS, DataError
from trainer.datasets import FASHION, load_data, load_folder

WriteMnist = Callable[..., dict[str, npt.NDArray[np.uint8]]]


def write_idx(path: Path, array: npt.NDArray[np.integer]) -> None:
    """Write an array of bytes or of 32-bit numbers in MNIST's file format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = 0x08 if array.dtype == np.uint8 else 0x0C
    big_endian = array if array.dtype == np.uint8 else array.astype(">i4")
    path.write_bytes(struct.pack(f">{1 + array.ndim}i", kind << 8 | array.ndim, *array.shape) + big_endian.tobytes())


@pytest.mark.usefixtures("torchvision")
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


@pytest.mark.usefixtures("torchvision")
def test_emnists_columns_become_rows(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part in ("train", "test"):
        write_idx(tmp_path / f"EMNIST/raw/emnist-digits-{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"EMNIST/raw/emnist-digits-{part}-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    data = load_data("emnist-digits", tmp_path, download=False)
    assert np.array_equal(data.train.pixels.reshape(20, 28, 28), images.transpose(0, 2, 1))
    assert data.labels == DIGITS


@pytest.mark.usefixtures("torchvision")
def test_of_qmnists_labels_the_first_is_the_digit(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.stack([np.arange(20) % 10, *[np.full(20, 99)] * 7], axis=1).astype(np.int32)
    for part in ("train", "test"):
        write_idx(tmp_path / f"QMNIST/raw/qmnist-{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"QMNIST/raw/qmnist-{part}-labels-idx2-int", labels)
    data = load_data("qmnist", tmp_path, download=False)
    assert np.array_equal(data.test.pixels.reshape(20, 28, 28), images)
    assert data.test.labels.tolist() == [*range(10)] * 2


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("dataset", ["fashion-mnist", "kmnist", "emnist-digits", "qmnist"])
def test_what_is_missing_is_named_with_the_folder(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(DataError, match=rf"is not complete in {tmp_path}/\w+.*--no-download.*\nPoint --data-dir"):
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
        (tmp_path / "both" / "test" / "7").mkdir(parents=True)
        some = next((tmp_path / "both" / "train" / "7").iterdir())
        some.rename(tmp_path / "both" / "test" / "7" / some.name)
        data = load_folder(tmp_path / "both")
        assert (len(data.train), data.test.labels.tolist()) == (99, [7])

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
            ([], r"2 to 10 classes, with the pictures in it, not 0"),
            (["a/x.png"], r"2 to 10 classes, with the pictures in it, not 1: a"),
            ([f"{letter}/x.png" for letter in "abcdefghijk"], r"not 11: a, b, c"),
            (["0/x.txt", "1/y.txt"], r"no class has a picture in it \(.png, .jpg"),
            (["0/broken.png", "1/y.png"], r"broken.png: .*no image file of a known format"),
        ],
    )
    def test_what_is_no_such_folder_is_refused_with_the_rule(
        self, tmp_path: Path, files: list[str], message: str
    ) -> None:
        for file in files:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_bytes(b"no picture")
        with pytest.raises(DataError, match=message):
            load_folder(tmp_path)

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
