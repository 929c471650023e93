"""Images for the tests: MNIST where it lies, and ten canonical digits that need no download."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits

from digits.preprocessing import SIDE, to_pixels

REPOSITORY = Path(__file__).parents[2]
IDX_HEADER_BYTES = 16


@pytest.fixture(scope="session")
def mnist_raw() -> npt.NDArray[np.uint8]:
    """All of MNIST, `uint8[70000, 28, 28]`: the 60,000 of its training part, then the 10,000 of its test part."""
    given = os.environ.get("MNIST_DATA_DIR")
    places = [Path(given)] if given else [REPOSITORY / "data", REPOSITORY.parent / "shared" / "data"]
    for place in places:
        raw = place / "MNIST" / "raw"
        parts = [_read_idx(raw / f"{part}-images-idx3-ubyte") for part in ("train", "t10k")]
        if parts[0] is not None and parts[1] is not None:
            return np.concatenate([parts[0], parts[1]])
    pytest.skip("MNIST is not here: set MNIST_DATA_DIR to a folder that holds MNIST/raw/*-ubyte (or .gz)")


@pytest.fixture(scope="session")
def canonical_digits() -> npt.NDArray[np.uint8]:
    """Pixels of the digits 0 to 9 as people wrote them, `uint8[10, 28, 28]`."""
    data = load_digits()  # its first ten are 0 to 9, grey in 0...16
    return np.stack([to_pixels(image / 16) for image in data.images[:10]])


@pytest.fixture(scope="session")
def three(canonical_digits: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Canonical pixels of a three, `uint8[28, 28]`."""
    pixels: npt.NDArray[np.uint8] = canonical_digits[3]
    return pixels


def _read_idx(path: Path) -> npt.NDArray[np.uint8] | None:
    packed = path.with_name(path.name + ".gz")
    if path.is_file():
        content = path.read_bytes()
    elif packed.is_file():
        content = gzip.decompress(packed.read_bytes())
    else:
        return None
    return np.frombuffer(content, np.uint8, offset=IDX_HEADER_BYTES).reshape(-1, SIDE, SIDE)
