"""Ten canonical digits that need no download."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits

from digits.preprocessing import to_pixels


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
