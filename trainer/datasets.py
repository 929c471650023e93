"""What can be learnt from: MNIST and its kin through torchvision, scikit-learn's digits, folders of pictures.

Everything becomes pixels, `uint8[n, 784]`, and labels; pictures that are not of
MNIST's kind go through the same `to_pixels` as those that clients hand in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from digits.preprocessing import CLASSES, PIXELS, InvalidImage, to_pixels
from trainer.data import DIGITS, Data, DataError, LabelledPixels, download_limit, load_mnist, torchvision_dataset

FOLDER = "folder:"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TEST_SHARE = 0.2
"""Of a folder that has no part for the test."""

Progress: TypeAlias = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps so many things that are gone through."""

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


def load_data(
    dataset: str,
    data_dir: Path,
    download: bool = True,
    progress: Progress = lambda files, count: files,
) -> Data:
    """Read a data set by its name in `DATASETS`, or a folder of pictures, `folder:PATH`.

    Args:
        data_dir: where torchvision's data sets lie, each in a folder of its name.
        progress: wraps the files of a folder, for example in a progress bar.

    Raises:
        DataError: there is no such data set, or it is missing, damaged or empty;
            the message says what to do.
    """
    if dataset.startswith(FOLDER):
        return load_folder(Path(dataset.removeprefix(FOLDER)), progress)
    if dataset not in DATASETS:
        raise DataError(f"--dataset is one of {', '.join(DATASETS)} or {FOLDER}PATH, not {dataset}")
    return DATASETS[dataset](data_dir, download)


# torchvision ------------------------------------------------------------------


def _load_kin(name: str, labels: Sequence[str], **options: str) -> Callable[[Path, bool], Data]:
    """What reads one of torchvision's data sets of MNIST's form."""

    def load(data_dir: Path, download: bool) -> Data:
        kind = torchvision_dataset(name)
        try:
            with download_limit():
                parts = [kind(data_dir, train=train, download=download, **options) for train in (True, False)]
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            where = data_dir.absolute() / name
            how = "the download failed" if download else "downloading is switched off (--no-download)"
            reason = str(error).strip() or type(error).__name__
            raise DataError(
                f"{name} is not complete in {where}, or damaged, and {how}: {reason}\n"
                "Point --data-dir to the folder in which torchvision keeps it, or let it be downloaded there."
            ) from error
        train, test = (_of_torchvision(part, transposed=name == "EMNIST") for part in parts)
        return Data(train, test, name, tuple(labels))

    return load


def _of_torchvision(dataset: Any, transposed: bool) -> LabelledPixels:
    images: Tensor = dataset.data.transpose(1, 2) if transposed else dataset.data  # EMNIST's files hold columns
    labels: Tensor = dataset.targets
    if labels.dim() == 2:  # QMNIST: the label, and who wrote it where
        labels = labels[:, 0]
    return LabelledPixels(images.reshape(-1, PIXELS).contiguous(), labels.long())


# scikit-learn -----------------------------------------------------------------


def load_scans(_: Path, __: bool) -> Data:
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
    """Pictures of a digit each, in a folder for each class: `PATH/7/any name.png`.

    With `PATH/train` and `PATH/test`, each of them holds such folders; else a
    fifth of the files, chosen by their content, is the test.

    Raises:
        DataError: a class has no pictures, there are too few or too many
            classes, or a file is no picture of a digit.
    """
    if not folder.is_dir():
        raise DataError(f"--dataset {FOLDER}PATH takes a folder, and {folder} is none")
    parted = all((folder / part).is_dir() for part in ("train", "test"))
    roots = [folder / "train", folder / "test"] if parted else [folder]
    labels = sorted({path.name for root in roots for path in root.iterdir() if path.is_dir()})
    if not 2 <= len(labels) <= CLASSES:
        raise DataError(
            f"{folder} has a folder for each of 2 to {CLASSES} classes, with the pictures in it, not {len(labels)}"
            + (f": {', '.join(labels[:20])}" if labels else "")
        )
    if set(labels) <= set(DIGITS):
        labels = list(DIGITS)  # a digit without pictures keeps its place
    parts = [_pictures(root, labels, progress) for root in roots]
    if parted:
        train, test = parts[0][0], parts[1][0]
    else:
        images, is_test = parts[0]
        train, test = images[~is_test], images[is_test]
    for part, name in ((train, "train"), (test, "test")):
        if not len(part):
            raise DataError(f"{folder}: there is no picture for the {name} part")
    return Data(train, test, folder.resolve().name, tuple(labels) + ("",) * (CLASSES - len(labels)))


def _pictures(root: Path, labels: Sequence[str], progress: Progress) -> tuple[LabelledPixels, Tensor]:
    """The pictures below a folder, and which of them are for the test if they have to be parted."""
    files = sorted(path for path in root.glob("*/*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{root}: no class has a picture in it ({', '.join(SUFFIXES)})")
    pixels, is_test = [], []
    with ThreadPoolExecutor() as threads:  # Pillow decodes without Python's lock
        for path, found in progress(zip(files, threads.map(_picture, files), strict=True), len(files)):
            if isinstance(found, str):
                raise DataError(f"{path}: {found}")
            pixels.append(found[0])
            is_test.append(found[1])
    numbers = torch.tensor([labels.index(path.parent.name) for path in files])
    return LabelledPixels(torch.from_numpy(np.stack(pixels)), numbers), torch.tensor(is_test)


def _picture(path: Path) -> tuple[np.ndarray[Any, Any], bool] | str:
    """Pixels `uint8[784]`, and whether it is one of the fifth for the test; or what is wrong with the file."""
    try:
        content = path.read_bytes()
        return to_pixels(content).reshape(PIXELS), hashlib.sha256(content).digest()[0] < 256 * TEST_SHARE
    except (InvalidImage, OSError) as error:
        return str(error)


DATASETS: dict[str, Callable[[Path, bool], Data]] = {
    "mnist": load_mnist,
    "fashion-mnist": _load_kin("FashionMNIST", FASHION),
    "kmnist": _load_kin("KMNIST", KUZUSHIJI),
    "emnist-digits": _load_kin("EMNIST", DIGITS, split="digits"),
    "qmnist": _load_kin("QMNIST", DIGITS),
    "sklearn": load_scans,
}
"""By the name that --dataset takes."""
