"""Reading MNIST's files, and what is said when they are not as they should be."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.data import FILES, DataError, LabelledPixels, load_mnist, split

WriteMnist = Callable[..., dict[str, np.ndarray]]


@pytest.mark.usefixtures("torchvision")
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


@pytest.mark.usefixtures("torchvision")
def test_plain_and_packed_files_may_be_mixed(tmp_path: Path, write_mnist: WriteMnist) -> None:
    write_mnist(tmp_path / "a", ".gz")
    written = write_mnist(tmp_path / "b")
    raw = tmp_path / "b/MNIST/raw"
    (raw / FILES[0]).unlink()
    (tmp_path / "a/MNIST/raw" / f"{FILES[0]}.gz").rename(raw / f"{FILES[0]}.gz")
    data = load_mnist(tmp_path / "b", download=False)
    assert np.array_equal(data.train.pixels, written[FILES[0]].reshape(40, 784))


@pytest.mark.usefixtures("torchvision")
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


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("content", [b"", b"no idx file", struct.pack(">4i", 0x0803, 40, 28, 28) + bytes(100)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_file_is_a_data_error(tmp_path: Path, write_mnist: WriteMnist, content: bytes, suffix: str) -> None:
    write_mnist(tmp_path, suffix)
    (tmp_path / "MNIST/raw" / f"train-images-idx3-ubyte{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=r"damaged or no MNIST: \w"):
        load_mnist(tmp_path, download=False)


@pytest.mark.usefixtures("torchvision")
def test_images_and_labels_have_to_match(tmp_path: Path, write_mnist: WriteMnist) -> None:
    write_mnist(tmp_path)
    labels = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">2i", 0x0801, 3) + bytes(3))
    with pytest.raises(DataError, match="40 images and 3 labels"):
        load_mnist(tmp_path, download=False)
    labels.write_bytes(struct.pack(">2i", 0x0801, 40) + bytes([17]) * 40)
    with pytest.raises(DataError, match="labels are 0 to 9, these are 17 to 17"):
        load_mnist(tmp_path, download=False)


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
    with pytest.raises(DataError, match="--validation-size is below the number of training images, 10, not 10"):
        split(images, 10, seed=0)
