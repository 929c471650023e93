"""What can be learnt from: MNIST and its kin, scikit-learn's digits, folders of pictures.

Everything becomes pixels, `uint8[n, 784]`, and labels; pictures that are not of
MNIST's kind go through the same `to_pixels` as those that clients hand in.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import string
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from digits.checkpoint import MAX_LABEL, is_label
from digits.preprocessing import CLASSES, DIGITS, MAX_CLASSES, PIXELS, InvalidImage, to_pixels
from trainer.data import MNIST, Data, DataError, LabelledPixels, Source, load_source

logger = logging.getLogger(__name__)

FOLDER = "folder:"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TEST_SHARE = 0.2
"""Of a folder that has no part for the test."""

PARTS = ("train", "test")
"""The folders in a folder that was parted by others."""

Progress: TypeAlias = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps so many things that are gone through."""

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
LETTERS = tuple(string.ascii_uppercase)
"""Capital and small ones are one class, as EMNIST has them."""

KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


def load_data(
    dataset: str,
    data_dir: Path,
    download: bool = True,
    progress: Progress = lambda files, count: files,
) -> Data:
    """Read a data set by its name in `DATASETS`, or a folder of pictures, `folder:PATH`.

    Args:
        data_dir: where MNIST and its kin lie, each in a folder of the name that torchvision gives it.
        progress: wraps the files of a folder, for example in a progress bar.

    Raises:
        DataError: there is no such data set, or it is missing, damaged or empty;
            the message says what to do.
    """
    if dataset.startswith(FOLDER):
        if dataset == FOLDER:
            raise DataError(f"--dataset {FOLDER}PATH names a folder after the colon, and there is nothing")
        return load_folder(Path(dataset.removeprefix(FOLDER)), progress)
    if dataset not in DATASETS:
        raise DataError(f"--dataset is one of {', '.join(DATASETS)} or {FOLDER}PATH, not {dataset}")
    return DATASETS[dataset](data_dir, download)


# MNIST's kin ------------------------------------------------------------------

FASHION_MNIST = Source("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", "FashionMNIST", labels=FASHION)
KMNIST = Source("http://codh.rois.ac.jp/kmnist/dataset/kmnist/", "KMNIST", labels=KUZUSHIJI)
EMNIST = "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"
EMNIST_DIGITS = Source(
    EMNIST,
    "EMNIST",
    (
        "emnist-digits-train-images-idx3-ubyte",
        "emnist-digits-train-labels-idx1-ubyte",
        "emnist-digits-test-images-idx3-ubyte",
        "emnist-digits-test-labels-idx1-ubyte",
    ),
    in_columns=True,
    options={"split": "digits"},
)
EMNIST_LETTERS = Source(
    EMNIST,
    "EMNIST",
    (
        "emnist-letters-train-images-idx3-ubyte",
        "emnist-letters-train-labels-idx1-ubyte",
        "emnist-letters-test-images-idx3-ubyte",
        "emnist-letters-test-labels-idx1-ubyte",
    ),
    labels=LETTERS,
    first_label=1,
    title="EMNIST Letters",
    in_columns=True,
    options={"split": "letters"},
)
QMNIST = Source(
    "https://raw.githubusercontent.com/facebookresearch/qmnist/master/",
    "QMNIST",
    (
        "qmnist-train-images-idx3-ubyte",
        "qmnist-train-labels-idx2-int",
        "qmnist-test-images-idx3-ubyte",
        "qmnist-test-labels-idx2-int",
    ),
)


# scikit-learn -----------------------------------------------------------------


def load_scans() -> Data:
    """scikit-learn's 1,797 scans of 8x8 pixels, which lie inside the package; the last fifth, by others, is the test.

    E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("--dataset sklearn needs scikit-learn: pip install scikit-learn") from error
    scans = load_digits()
    pixels = np.stack([to_pixels(image / 16) for image in scans.images]).reshape(-1, PIXELS)
    every = LabelledPixels(torch.from_numpy(pixels), torch.from_numpy(scans.target).long())
    cut = round(len(every) * (1 - TEST_SHARE))
    return Data(every[:cut], every[cut:], "sklearn")


# Folders ----------------------------------------------------------------------


def load_folder(folder: Path, progress: Progress = lambda files, count: files) -> Data:
    """Pictures of a digit each, in a folder for each of 2 to 100 classes: `PATH/7/any name.png`.

    With `PATH/train` and `PATH/test`, each of them holds such folders; else a
    fifth of the files, chosen by their content, is the test, at least one of
    each class. Names that begin with a dot are passed over; of other files that
    are not read, a warning in the log tells.

    Raises:
        DataError: a class has too few pictures or is not in both parts, there
            are too few or too many classes, a name is none that a label can
            have, or a file is no picture of a digit.
    """
    if not folder.is_dir():
        raise DataError(f"--dataset {FOLDER}PATH takes a folder, and {folder} is none")
    name = folder.resolve().name
    if name and not is_label(name):
        raise DataError(f"{str(folder)!r}: the folder's name becomes the data set's, {_NAMES}")
    roots = [folder / part for part in PARTS] if _is_parted(folder) else [folder]
    labels = _labels(folder, roots)
    files = {root: [file for label in labels for file in _files(root / label)] for root in roots}
    for root, pictures in files.items():
        _check_classes(root, labels, pictures, needed=1 if len(roots) > 1 else 2)
    _tell_what_is_left_out(folder, [file for pictures in files.values() for file in pictures])
    if set(labels) <= set(DIGITS):
        labels = list(DIGITS)  # a digit without pictures keeps its place
    parts = [_pictures(pictures, labels, progress) for pictures in files.values()]
    if len(parts) == 2:
        (train, _), (test, _) = parts
    else:
        images, places = parts[0]
        is_test = _is_test(places, images.labels)
        train, test = images[~is_test], images[is_test]
    return Data(train, test, name, tuple(labels) + ("",) * (CLASSES - len(labels)))


_NAMES = f"and has at most {MAX_LABEL} printable characters"


def _is_parted(folder: Path) -> bool:
    """Whether the folder has parts, and not classes.

    Raises:
        DataError: it has one of the two.
    """
    there = [part for part in PARTS if (folder / part).is_dir()]
    if len(there) == 1 and _folders(folder / there[0]):  # else it is a class of that name
        (lacking,) = set(PARTS) - set(there)
        raise DataError(
            f"{folder} has the part {there[0]}, but no {folder / lacking} beside it: a folder in parts has "
            f"{' and '.join(PARTS)}, each with a folder for each class"
        )
    return len(there) == 2


def _labels(folder: Path, roots: Sequence[Path]) -> list[str]:
    """The names of the classes, sorted, which are the same in all parts."""
    classes = [{path.name for path in _folders(root)} for root in roots]
    labels = sorted(set().union(*classes))
    if not 2 <= len(labels) <= MAX_CLASSES:
        raise DataError(
            f"{folder} has a folder for each of 2 to {MAX_CLASSES} classes, with the pictures in it, not {len(labels)}"
            + (f": {', '.join(map(_shown, labels[:20]))}" if labels else "")
        )
    for label in labels:
        if not is_label(label):
            raise DataError(
                f"{folder}: a folder's name is that of its class, {_NAMES}, not {len(label)}: {_shown(label)}"
            )
        if lacking := [str(root) for root, names in zip(roots, classes, strict=True) if label not in names]:
            raise DataError(
                f"{folder}: each class is in {' and '.join(PARTS)}, but there is no {label} in {lacking[0]}"
            )
    return labels


def _check_classes(root: Path, labels: Sequence[str], pictures: Sequence[Path], needed: int) -> None:
    """Raise DataError if a class has fewer pictures than are needed."""
    for label in labels:
        count = sum(path.parent.name == label for path in pictures)
        if count < needed:
            why = "" if needed == 1 else ", one to learn from and one for the test"
            raise DataError(
                f"{root / label}: a class has {needed} pictures or more ({', '.join(SUFFIXES)}){why}, "
                f"and this one has {count}"
            )


def _tell_what_is_left_out(folder: Path, files: Sequence[Path]) -> None:
    every = [path for path in folder.rglob("*") if path.is_file()]
    seen = [path for path in every if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if left_out := sorted(set(seen) - set(files)):
        logger.warning(
            "%s: files that are not read: %d, such as %s; pictures lie in the folder of their class, and end in %s",
            folder,
            len(left_out),
            left_out[0].relative_to(folder),
            ", ".join(SUFFIXES),
        )


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _files(folder: Path) -> list[Path]:
    """The pictures that lie in a folder, sorted; those below it are no part of it."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def _shown(name: str) -> str:
    """A name as a message can show it."""
    return name if is_label(name) else f"{name[:20]!r}..."


def _is_test(places: Tensor, labels: Tensor) -> Tensor:
    """Which pictures are for the test, `bool[n]`: those of a low place, and one of each class at the least and most.

    Args:
        places: where each stands in an order by content, from 0 to 1, `float64[n]`.
        labels: `int64[n]`, each of them twice or more.
    """
    is_test = places < TEST_SHARE
    for label in set(labels.tolist()):
        rows = torch.nonzero(labels == label)[:, 0]
        order = rows[places[rows].argsort(stable=True)]
        is_test[order[0]], is_test[order[-1]] = True, False
    return is_test


def _pictures(files: Sequence[Path], labels: Sequence[str], progress: Progress) -> tuple[LabelledPixels, Tensor]:
    """Pictures, each with the label that its folder has, and their places in an order by content, `float64[n]`."""
    pixels, places = [], []
    with ThreadPoolExecutor() as threads:  # Pillow decodes without Python's lock
        for path, found in progress(zip(files, threads.map(_picture, files), strict=True), len(files)):
            if isinstance(found, str):
                raise DataError(f"{path}: {found}")
            pixels.append(found[0])
            places.append(found[1])
    numbers = torch.tensor([labels.index(path.parent.name) for path in files])
    return LabelledPixels(torch.from_numpy(np.stack(pixels)), numbers), torch.tensor(places, dtype=torch.float64)


def _picture(path: Path) -> tuple[np.ndarray[Any, Any], float] | str:
    """Pixels `uint8[784]`, and a place from 0 to 1 that its content gives it; or what is wrong with the file."""
    try:
        content = path.read_bytes()
        return to_pixels(content).reshape(PIXELS), hashlib.sha256(content).digest()[0] / 256
    except (InvalidImage, OSError) as error:
        return str(error)


DATASETS: dict[str, Callable[[Path, bool], Data]] = {
    "mnist": functools.partial(load_source, MNIST),
    "fashion-mnist": functools.partial(load_source, FASHION_MNIST),
    "kmnist": functools.partial(load_source, KMNIST),
    "emnist-digits": functools.partial(load_source, EMNIST_DIGITS),
    "emnist-letters": functools.partial(load_source, EMNIST_LETTERS),
    "qmnist": functools.partial(load_source, QMNIST),
    "sklearn": lambda data_dir, download: load_scans(),
}
"""By the name that --dataset takes."""
