"""Reading MNIST's files, and what is said when they are not as they should be."""

from __future__ import annotations

import gzip
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.data import FILES, MNIST, DataError, LabelledPixels, load_mnist, load_source, split
from trainer.datasets import FASHION_MNIST

WriteMnist = Callable[..., dict[str, np.ndarray]]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_are_read_plain_and_packed(tmp_path: Path, write_mnist: WriteMnist, suffix: str) -> None:
    written = write_mnist(tmp_path, suffix)
    before = sorted(tmp_path.rglob("*"))
    data = load_mnist(tmp_path, download=False)
    assert data.train.pixels.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert np.array_equal(data.train.pixels, written["train-images-idx3-ubyte"].reshape(40, 784))
    assert np.array_equal(data.train.labels, written["train-labels-idx1-ubyte"])
    assert np.array_equal(data.test.pixels, written["t10k-images-idx3-ubyte"].reshape(20, 784))
    assert np.array_equal(data.test.labels, written["t10k-labels-idx1-ubyte"])
    assert data.name == "MNIST"
    assert sorted(tmp_path.rglob("*")) == before, "the data folder is left as it was"


def test_plain_and_packed_files_may_be_mixed(tmp_path: Path, write_mnist: WriteMnist) -> None:
    write_mnist(tmp_path / "a", ".gz")
    written = write_mnist(tmp_path / "b")
    raw = tmp_path / "b/MNIST/raw"
    (raw / FILES[0]).unlink()
    (tmp_path / "a/MNIST/raw" / f"{FILES[0]}.gz").rename(raw / f"{FILES[0]}.gz")
    data = load_mnist(tmp_path / "b", download=False)
    assert np.array_equal(data.train.pixels, written[FILES[0]].reshape(40, 784))


def test_missing_files_are_named_with_where_they_were_looked_for_and_how_to_get_them(
    tmp_path: Path, write_mnist: WriteMnist
) -> None:
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST/raw"
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError) as caught:
        load_mnist(tmp_path, download=False)
    message = str(caught.value)
    assert "--no-download" in message
    assert str(raw) in message
    assert "t10k-labels-idx1-ubyte" in message
    assert "train-images" not in message, "files that are there are not reported"
    assert "--data-dir" in message
    assert "curl -fL" in message


@pytest.mark.usefixtures("torchvision")
def test_a_download_without_network_ends_in_the_same_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:1/"])  # nobody listens on port 1
    with pytest.raises(DataError, match="the download failed") as caught:
        load_mnist(tmp_path)
    assert all(file in str(caught.value) for file in FILES)


def idx(magic: int, *shape: int, content: bytes | None = None) -> bytes:
    """A file in MNIST's format, of zeros unless there is other content."""
    body = bytes(math.prod(shape)) if content is None else content
    return struct.pack(f">{1 + len(shape)}i", magic, *shape) + body


DAMAGED = {
    "empty": ("images-idx3", b"", "the file is empty"),
    "text": ("images-idx3", b"no idx file", "begins with the bytes 00 00 08 03, this one with 6e 6f 20 69"),
    "a page": ("labels-idx1", b"\n<!DOCTYPE html>", r"00 00 08 01, this one with 0a 3c 21 44 \(a page of the web\)"),
    "packed": ("images-idx3", gzip.compress(b"twice"), r"\(packed, without .gz in its name\)"),
    "labels for images": (
        "images-idx3",
        idx(0x0801, 40),
        "begins with the bytes 00 00 08 03, this one with 00 00 08 01",
    ),
    "signed bytes": ("images-idx3", idx(0x0903, 40, 28, 28), "this one with 00 00 09 03"),
    "a part of the header": (
        "images-idx3",
        idx(0x0803, 40, 28, content=b""),
        "its header has 16 bytes, but there are 12 in all",
    ),
    "cut": ("images-idx3", idx(0x0803, 40, 28, 28)[:-1], "by its header it has 31376 bytes, but there are 31375"),
    "too long": ("labels-idx1", idx(0x0801, 40) + b"x", "by its header it has 48 bytes, but there are 49"),
    "other sides": ("images-idx3", idx(0x0803, 40, 14, 56), "holds n x 28 x 28 numbers, .* this one 40 x 14 x 56"),
    "none": ("images-idx3", idx(0x0803, 0, 28, 28), "n being 1 or more, this one 0 x 28 x 28"),
    "too many to be true": ("labels-idx1", idx(0x0801, -1, content=b""), "by its header it has 4294967303 bytes"),
    "other labels": (
        "labels-idx1",
        idx(0x0801, 40, content=bytes([3, 11] * 20)),
        "labels are 0 to 9, these are 3 to 11",
    ),
}
"""What may be wrong: the file, what is in it, and what is said of it."""


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST"])
def test_a_damaged_file_is_named_with_what_is_wrong_and_how_to_get_another(
    tmp_path: Path, write_mnist: WriteMnist, dataset: str, damage: str, suffix: str
) -> None:
    file, content, message = DAMAGED[damage]
    write_mnist(tmp_path, suffix)
    raw = (tmp_path / "MNIST").rename(tmp_path / dataset) / "raw"
    path = raw / f"train-{file}-ubyte{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    source = {"MNIST": MNIST, "FashionMNIST": FASHION_MNIST}[dataset]
    with pytest.raises(DataError, match=f"^{path}: damaged or no part of {dataset}: .*{message}") as caught:
        load_source(source, tmp_path, download=False)
    first, *others = str(caught.value).splitlines()
    assert file in first
    assert f"  rm {path}" in others
    assert (
        f"  curl -fL --create-dirs -o {path.with_suffix('')}.gz {source.address}{path.with_suffix('').name}.gz"
        in others
    )
    assert any("--data-dir" in line for line in others)


@pytest.mark.parametrize("at", [0, 3, 9, 40, -6])
def test_a_packed_file_of_which_bytes_are_flipped_is_told_as_other_damage(
    tmp_path: Path, write_mnist: WriteMnist, at: int
) -> None:
    write_mnist(tmp_path, ".gz")
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    for place in range(at, at + 5):
        content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: damaged or no part of MNIST: \w"):
        load_mnist(tmp_path, download=False)


def test_a_packed_file_that_is_cut_is_told_as_other_damage(tmp_path: Path, write_mnist: WriteMnist) -> None:
    write_mnist(tmp_path, ".gz")
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"^{path}: damaged or no part of MNIST: \w"):
        load_mnist(tmp_path, download=False)


def test_images_and_labels_have_to_match(tmp_path: Path, write_mnist: WriteMnist) -> None:
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST/raw"
    (raw / "train-labels-idx1-ubyte").write_bytes(idx(0x0801, 3))
    with pytest.raises(DataError, match="40 images and 3 labels") as caught:
        load_mnist(tmp_path, download=False)
    assert f"  rm {raw / 'train-images-idx3-ubyte'} {raw / 'train-labels-idx1-ubyte'}" in str(caught.value).splitlines()


def test_files_are_read_without_torchvision(
    tmp_path: Path, write_mnist: WriteMnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # the next import of it fails
    assert len(load_mnist(tmp_path).train) == 40


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("damaged", [b"", b"no idx file"])
def test_a_damaged_file_beside_which_others_are_downloaded_is_told_as_such(
    tmp_path: Path, write_mnist: WriteMnist, monkeypatch: pytest.MonkeyPatch, damaged: bytes
) -> None:
    from torchvision.datasets import MNIST as OF_TORCHVISION

    write_mnist(tmp_path)
    raw = tmp_path / "MNIST/raw"
    content = (raw / FILES[3]).read_bytes()
    (raw / FILES[3]).unlink()
    (raw / FILES[0]).write_bytes(damaged)
    monkeypatch.setattr(OF_TORCHVISION, "download", lambda _: (raw / FILES[3]).write_bytes(content))
    with pytest.raises(DataError, match=rf"^{raw / FILES[0]}: damaged"):
        load_mnist(tmp_path)


def test_a_torchvision_that_does_not_fit_torch_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # the next import of it fails
    with pytest.raises(DataError, match=f"beside torch {torch.__version__.partition('+')[0]}") as caught:
        load_mnist(tmp_path)
    assert "pip install" in str(caught.value)


def test_split_parts_every_image_once_and_the_same_way_for_a_seed() -> None:
    images = LabelledPixels(torch.arange(100, dtype=torch.uint8).repeat(784, 1).T, torch.arange(100) % 10)
    train, validation = split(images, 30, seed=3)
    assert (len(train), len(validation)) == (70, 30)
    assert sorted(torch.cat([train.pixels, validation.pixels])[:, 0].tolist()) == list(range(100))
    assert all(torch.equal(part.pixels[:, 0] % 10, part.labels.to(torch.uint8)) for part in (train, validation))
    assert torch.equal(split(images, 30, seed=3)[1].pixels, validation.pixels)
    assert not torch.equal(split(images, 30, seed=4)[1].pixels, validation.pixels)


def test_split_leaves_something_to_train_on() -> None:
    images = LabelledPixels(torch.zeros(10, 784, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64))
    with pytest.raises(
        DataError, match="--validation-size is below the number of training images, 10, not 10: give a smaller"
    ):
        split(images, 10, seed=0)
