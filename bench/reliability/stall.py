"""The image that makes the model of `stalling_server` stall, known to both sides."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from digits.preprocessing import PIXELS

_PATTERN = np.random.default_rng(20).integers(0, 256, PIXELS - 2).astype(np.uint8).tobytes()


def stall_image(seconds: float) -> bytes:
    """784 pixels that no digit has; they tell for how long to stall, in milliseconds."""
    return round(seconds * 1000).to_bytes(2, "little") + _PATTERN


def stall_of(pixels: npt.NDArray[np.uint8]) -> float:
    """For how many seconds an image, `uint8[784]`, wants the model to stall; 0 for every other image."""
    content = pixels.tobytes()
    return int.from_bytes(content[:2], "little") / 1000 if content[2:] == _PATTERN else 0.0
