"""Small data sets: one made of noise in MNIST's files, one of scikit-learn's digits."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from digits.preprocessing import to_pixels
from trainer.data import Data, LabelledPixels

Array = npt.NDArray[np.uint8]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from more, and tests that run side by side lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torchvision() -> None:
    """For tests of downloads, which torchvision does."""
    try:
        import torchvision.datasets  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported beside this torch: {error}")


@pytest.fixture
def write_mnist() -> Callable[..., dict[str, Array]]:
    """Write a tiny data set as MNIST's four files below a folder; return what is in each."""

    def write(folder: Path, suffix: str = "", train: int = 40, test: int = 20) -> dict[str, Array]:
        rng = np.random.default_rng(7)
        content: dict[str, Array] = {}
        for part, count in (("train", train), ("t10k", test)):
            content[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            content[f"{part}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
        raw = folder / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name, array in content.items():
            idx = struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.tobytes()
            (raw / f"{name}{suffix}").write_bytes(gzip.compress(idx) if suffix else idx)
        return content

    return write


@pytest.fixture(scope="session")
def digits_data() -> Data:
    """Scikit-learn's 1797 scanned digits, 8x8, as canonical pixels: 1500 to train on, 297 to test."""
    images, labels = load_digits(return_X_y=True)
    grey = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    pixels = torch.from_numpy(np.stack([to_pixels(image).reshape(784) for image in grey]))
    targets = torch.from_numpy(labels.astype(np.int64))
    return Data(
        LabelledPixels(pixels[:1500], targets[:1500]), LabelledPixels(pixels[1500:], targets[1500:]), "sklearn digits"
    )


def draw_bars(folder: Path, count: int) -> None:
    """Pictures of a bar, in a folder for each of ten classes, that differ a little."""
    for number in range(count):
        path = folder / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("L", (28, 28))
        picture.paste(200 + number // 2, (8, 4, 11 + number % 10, 24))
        picture.save(path)
