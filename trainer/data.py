"""MNIST and its kin from disk, as pixels and labels in memory.

Reads torchvision's folder layout, for MNIST `<data-dir>/MNIST/raw/*-ubyte`,
packed (`.gz`) or not, and has torchvision download only what is not there. Each
file is checked: header, size and range of labels. Knows nothing of features or
networks.
"""

from __future__ import annotations

import gzip
import math
import shlex
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from digits.preprocessing import DIGITS, PIXELS, SIDE

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


DOWNLOAD_TIMEOUT = 30.0
"""Seconds without an answer from a download server."""

_Numbers: TypeAlias = npt.NDArray[np.integer[Any]]


class DataError(Exception):
    """The data set is missing, damaged or cannot be read; the message says what to do."""


@dataclass(frozen=True)
class LabelledPixels:
    """Images of digits and what they show."""

    pixels: Tensor
    """`uint8[n, 784]`."""

    labels: Tensor
    """`int64[n]`: classes, from 0 on; of digits, 0 to 9."""

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
    """What each of the 10 to 100 classes means; empty texts where there are fewer than ten."""


@dataclass(frozen=True)
class Source:
    """A data set of MNIST's form: what its files are called, and where they come from."""

    address: str
    """Where each file lies, packed; or, if it ends in `.zip`, an archive that holds them all."""

    name: str = "MNIST"
    """What torchvision calls it, and the folder that it lies in."""

    files: tuple[str, str, str, str] = FILES
    """Images and labels of the training, images and labels of the test; the end of each name tells its form."""

    labels: tuple[str, ...] = DIGITS
    """What each class means."""

    first_label: int = 0
    """How the files number the first class."""

    title: str = ""
    """What reports and manifests call it, if torchvision's name stands for several."""

    in_columns: bool = False
    """Whether the images are written column by column."""

    options: Mapping[str, str] = field(default_factory=dict)
    """What torchvision takes beside the folder."""


MNIST = Source("https://ossci-datasets.s3.amazonaws.com/mnist/")

FORMS: dict[str, tuple[bytes, str, tuple[int, ...]]] = {
    "idx3-ubyte": (b"\0\0\x08\3", "u1", (SIDE, SIDE)),
    "idx1-ubyte": (b"\0\0\x08\1", "u1", ()),
    "idx2-int": (b"\0\0\x0c\2", ">i4", (8,)),  # QMNIST: the label, and seven numbers on who wrote it where
}
"""By the end of a file's name: how it begins, of what numbers it is, and the shape of what it has of each image."""


def load_mnist(data_dir: Path, download: bool = True) -> Data:
    """Read MNIST from `data_dir`, as `load_source` does."""
    return load_source(MNIST, data_dir, download)


def load_source(source: Source, data_dir: Path, download: bool = True) -> Data:
    """Read a data set of MNIST's form from `data_dir`; files that are missing are downloaded first.

    Raises:
        DataError: files are missing and cannot be downloaded, torchvision, which
            downloads them, does not work, or what is there is damaged or something else.
    """
    raw = data_dir / source.name / "raw"
    if missing := _missing(source, raw):
        reason = "downloading is switched off (--no-download)"
        if download:
            reason = f"the download failed: {_download(source, data_dir)}"
            missing = _missing(source, raw)
        if missing:
            raise DataError(_missing_message(source, raw, missing, reason))
    train_images, train_labels, test_images, test_labels = source.files
    return Data(
        _part(source, raw, train_images, train_labels),
        _part(source, raw, test_images, test_labels),
        _title(source),
        source.labels,
    )


def _title(source: Source) -> str:
    return source.title or source.name


def split(images: LabelledPixels, validation_size: int, seed: int) -> tuple[LabelledPixels, LabelledPixels]:
    """Part images at random, the same way for the same seed, into training and validation images.

    Raises:
        DataError: fewer than one image would be left to train on.
    """
    if validation_size >= len(images):
        raise DataError(
            f"--validation-size is below the number of training images, {len(images)}, not {validation_size}: "
            "give a smaller one, or more images"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_back, kept = order[:validation_size], order[validation_size:]
    return images[kept], images[held_back]


# Downloads --------------------------------------------------------------------


def _download(source: Source, data_dir: Path) -> str:
    """Have torchvision download what is missing; return what it says if it fails.

    It also reads the files, to no purpose; what it thinks of them is not asked.
    """
    kind = _torchvision_dataset(source.name)
    try:
        with _download_limit():
            for train in (True, False):  # QMNIST's parts are downloaded one by one
                kind(data_dir, train=train, download=True, **source.options)
    except Exception as error:  # of a damaged file, torchvision raises nearly anything
        return str(error).strip() or type(error).__name__
    return "torchvision left files out"


def _torchvision_dataset(name: str) -> Any:
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
def _download_limit() -> Iterator[None]:
    """Within it, a download that gets no answer ends; torchvision sets no time limit of its own."""
    limit = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(limit)


def _missing(source: Source, raw: Path) -> list[str]:
    return [file for file in source.files if not (raw / file).is_file() and not (raw / f"{file}.gz").is_file()]


def _missing_message(source: Source, raw: Path, missing: Sequence[str], reason: str) -> str:
    return "\n".join(
        [
            f"{_title(source)} is not complete, and {reason}",
            "",
            f"Looked in {raw.absolute()} for its four files, each plain or with .gz. Missing:",
            *(f"  {file}" for file in missing),
            "",
            f"Either point --data-dir to the folder that holds {source.name}/raw, or put the files there:",
            *_commands(source, raw, missing),
        ]
    )


def _damaged(source: Source, raw: Path, files: Sequence[str], reason: str) -> DataError:
    paths = [str(_path(raw, file)) for file in files]
    return DataError(
        "\n".join(
            [
                f"{' and '.join(paths)}: damaged or no part of {_title(source)}: {reason}",
                "",
                f"Either point --data-dir to another folder that holds {source.name}/raw, or put the right ones there:",
                f"  rm {shlex.join(paths)}",
                *_commands(source, raw, files),
            ]
        )
    )


def _commands(source: Source, raw: Path, files: Sequence[str]) -> list[str]:
    """How to get files by hand."""
    if not source.address.endswith(".zip"):
        return [f"  {_curl(raw / f'{file}.gz', f'{source.address}{file}.gz')}" for file in files]
    archive = raw / source.address.rpartition("/")[2]
    members = shlex.join(f"*/{file}.gz" for file in files)
    return [
        f"  {_curl(archive, source.address)}",
        f"  unzip -j {shlex.quote(str(archive))} {members} -d {shlex.quote(str(raw))}",
    ]


def _curl(path: Path, address: str) -> str:
    return f"curl -fL --create-dirs -o {shlex.quote(str(path))} {address}"


# Files ------------------------------------------------------------------------


def _part(source: Source, raw: Path, images_file: str, labels_file: str) -> LabelledPixels:
    """Read the images and the labels of one part.

    Raises:
        DataError: a file is damaged, or the two do not belong together.
    """
    read: list[_Numbers] = []
    for file in (images_file, labels_file):
        try:
            read.append(_idx(_content(_path(raw, file)), file))
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise _damaged(source, raw, [file], str(error) or type(error).__name__) from error
    images, labels = read
    if len(images) != len(labels):
        reason = f"each image has a label, but there are {len(images)} images and {len(labels)} labels"
        raise _damaged(source, raw, [images_file, labels_file], reason)
    told = labels.reshape(len(labels), -1)[:, 0]
    first, last = source.first_label, source.first_label + len(source.labels) - 1
    if not first <= told.min() <= told.max() <= last:
        reason = f"labels are {first} to {last}, these are {told.min()} to {told.max()}"
        raise _damaged(source, raw, [labels_file], reason)
    rows = images.transpose(0, 2, 1) if source.in_columns else images
    return LabelledPixels(
        torch.from_numpy(rows.astype(np.uint8).reshape(-1, PIXELS)), torch.from_numpy(told.astype(np.int64) - first)
    )


def _path(raw: Path, file: str) -> Path:
    return raw / file if (raw / file).is_file() else raw / f"{file}.gz"


def _content(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    with gzip.open(path) as packed:
        return packed.read()


def _idx(content: bytes, file: str) -> _Numbers:
    """The numbers of a file in MNIST's format, with an entry for each image; not to be written to.

    Raises:
        ValueError: it has not the header, the shape or the size that a file of this name has.
    """
    begin, kind, shape = next(form for end, form in FORMS.items() if file.endswith(end))
    if not content:
        raise ValueError("the file is empty")
    if content[:4] != begin:
        looks = " (packed, without .gz in its name)" if content[:2] == b"\x1f\x8b" else ""
        looks = " (a page of the web)" if content.lstrip()[:1] == b"<" else looks
        raise ValueError(
            f"a file of this name begins with the bytes {begin.hex(' ')}, this one with {content[:4].hex(' ')}{looks}"
        )
    header = len(begin) + 4 * begin[3]
    if len(content) < header:
        raise ValueError(f"its header has {header} bytes, but there are {len(content)} in all")
    found = [int(size) for size in np.frombuffer(content, ">u4", begin[3], len(begin))]
    if found[0] == 0 or tuple(found[1:]) != shape:
        rule = " x ".join(["n", *map(str, shape)])
        raise ValueError(
            f"a file of this name holds {rule} numbers, n being 1 or more, this one {' x '.join(map(str, found))}"
        )
    size = header + math.prod(found) * np.dtype(kind).itemsize
    if len(content) != size:
        raise ValueError(f"by its header it has {size} bytes, but there are {len(content)}")
    numbers: _Numbers = np.frombuffer(content, kind, offset=header)
    return numbers.reshape(found)
