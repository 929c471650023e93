"""MNIST from disk, as pixels and labels in memory.

Reads torchvision's folder layout, `<data-dir>/MNIST/raw/*-ubyte`, packed
(`.gz`) or not, and downloads only what is not there. Knows nothing of features
or networks.
"""

from __future__ import annotations

import gzip
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digits.preprocessing import CLASSES, PIXELS, SIDE

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

DIGITS = tuple(str(digit) for digit in range(CLASSES))

DOWNLOAD_TIMEOUT = 30.0
"""Seconds without an answer from a download server."""

SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"


class DataError(Exception):
    """The data set is missing, damaged or cannot be read; the message says what to do."""


@dataclass(frozen=True)
class LabelledPixels:
    """Images of digits and what they show."""

    pixels: Tensor
    """`uint8[n, 784]`."""

    labels: Tensor
    """`int64[n]`, 0 to 9."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: slice | Tensor) -> LabelledPixels:
        return LabelledPixels(self.pixels[which], self.labels[which])


@dataclass(frozen=True)
class Data:
    """A data set with its two parts; the validation images are taken from the first."""

    train: LabelledPixels
    test: LabelledPixels
    name: str = "MNIST"
    labels: tuple[str, ...] = DIGITS
    """What each class means; empty texts where there are fewer than ten."""


def load_mnist(data_dir: Path, download: bool = True) -> Data:
    """Read MNIST from `data_dir`; files that are missing are downloaded first.

    Raises:
        DataError: torchvision does not work, files are missing and cannot be
            downloaded, or what is there is not MNIST.
    """
    mnist = torchvision_dataset("MNIST")
    raw = data_dir / "MNIST" / "raw"
    if missing := _missing(raw):
        if not download:
            raise DataError(_how_to_get(missing, raw, "downloading is switched off (--no-download)"))
        try:
            with download_limit():
                mnist(data_dir, download=True)
        except (RuntimeError, OSError) as error:
            raise DataError(_how_to_get(missing, raw, f"the download failed: {str(error).strip()}")) from error
    try:
        if all((raw / file).is_file() for file in FILES):
            return _read(mnist, data_dir)
        # Unpacked elsewhere: the user's folder may be read-only, and is the user's.
        with tempfile.TemporaryDirectory() as unpacked:
            _unpack(raw, Path(unpacked) / "MNIST" / "raw")
            return _read(mnist, Path(unpacked))
    except (OSError, EOFError, AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{raw}: the files are damaged or no MNIST: {str(error) or type(error).__name__}") from error


def split(images: LabelledPixels, validation_size: int, seed: int) -> tuple[LabelledPixels, LabelledPixels]:
    """Part images at random, the same way for the same seed, into training and validation images.

    Raises:
        DataError: fewer than one image would be left to train on.
    """
    if validation_size >= len(images):
        raise DataError(
            f"--validation-size is below the number of training images, {len(images)}, not {validation_size}"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_back, kept = order[:validation_size], order[validation_size:]
    return images[kept], images[held_back]


def torchvision_dataset(name: str) -> Any:
    """One of `torchvision.datasets`; imported here, so that all else works without.

    Raises:
        DataError: torchvision does not work beside this torch.
    """
    try:
        import torchvision.datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: "operator torchvision::nms does not exist"
        raise DataError(
            f"torchvision cannot be imported beside torch {torch.__version__}: {error}\n"
            "Install the torchvision that was built for this torch, from the index that this torch came from: "
            "pip install --upgrade torch torchvision"
        ) from error
    return getattr(torchvision.datasets, name)


@contextmanager
def download_limit() -> Iterator[None]:
    """Within it, a download that gets no answer ends; torchvision sets no time limit of its own."""
    limit = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(limit)


def _missing(raw: Path) -> list[str]:
    return [file for file in FILES if not (raw / file).is_file() and not (raw / f"{file}.gz").is_file()]


def _how_to_get(missing: list[str], raw: Path, reason: str) -> str:
    return "\n".join(
        [
            f"MNIST is not complete, and {reason}",
            "",
            f"Looked in {raw.absolute()} for its four files, each plain or with .gz. Missing:",
            *(f"  {file}" for file in missing),
            "",
            "Either point --data-dir to the folder that holds MNIST/raw, or put the files there:",
            *(f"  curl -fL --create-dirs -o {raw / file}.gz {SOURCE}{file}.gz" for file in missing),
        ]
    )


def _unpack(raw: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in FILES:
        if (raw / file).is_file():
            shutil.copyfile(raw / file, target / file)
        else:
            with gzip.open(raw / f"{file}.gz") as packed, open(target / file, "wb") as plain:
                shutil.copyfileobj(packed, plain)


def _read(mnist: Any, folder: Path) -> Data:
    return Data(train=_part(mnist(folder, train=True)), test=_part(mnist(folder, train=False)))


def _part(dataset: Any) -> LabelledPixels:
    images, labels = dataset.data, dataset.targets
    if images.dim() != 3 or images.shape[1:] != (SIDE, SIDE) or len(images) == 0:
        raise ValueError(f"images are uint8[n, {SIDE}, {SIDE}], these are {images.dtype}{list(images.shape)}")
    if len(images) != len(labels):
        raise ValueError(f"each image has a label, but there are {len(images)} images and {len(labels)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) < CLASSES:
        raise ValueError(f"labels are 0 to 9, these are {int(labels.min())} to {int(labels.max())}")
    return LabelledPixels(images.reshape(-1, PIXELS).contiguous(), labels)
