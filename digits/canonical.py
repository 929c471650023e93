"""Whether pixels already are as MNIST's images are; knows nothing about how they are made so.

MNIST's makers scaled the ink, aspect kept, so that its longer side is 20
pixels, and placed it with its centre of mass in the middle of 28x28. All 70,000
images fit the rules below; the constants beside them say how closely.

The decision is exact and needs no tolerance: sums and moments of 784 bytes are
whole numbers that float32 holds without rounding, in whatever order they are
added, so that one image and a thousand are judged by the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SIDE = 28
PIXELS = SIDE * SIDE  # 784, the network's inputs

CANONICAL_CENTER = (13.4, 14.6)
"""Centre of mass on both axes, in pixel indices; measured on MNIST's 70,000 images: 13.48 to 14.50."""

CANONICAL_SIDES = (19, 20)
"""The longer side of the ink's box; measured: 20, and 19 in 16 images."""

CANONICAL_PEAK = 254
"""The brightest pixel is this or brighter; measured: 254 or 255."""

_SHAPE = (SIDE, SIDE)
_BYTE, _FLOAT = np.dtype(np.uint8), np.dtype(np.float32)
_BLOCK = 64  # images: their floats stay in the cache, and so small a product is computed in the calling thread
_MOMENTS = np.stack(  # ink, ink times its row, ink times its column
    [np.ones(PIXELS), np.arange(PIXELS) // SIDE, np.arange(PIXELS) % SIDE], axis=1
).astype(np.float32)


def is_canonical(grey: npt.NDArray[np.uint8]) -> bool:
    """Whether a grey image, `uint8[h, w]`, already is as MNIST's images are."""
    return canonical_bytes(grey) is not None


def canonical_bytes(grey: npt.NDArray[np.uint8]) -> bytes | None:
    """The 784 bytes of a grey image, `uint8[h, w]`, that already is as MNIST's images are; else None."""
    if grey.shape != _SHAPE:
        return None
    # The methods of bytes find what NumPy needs several times as long for in so small an array.
    by_row = grey.tobytes()
    if not (b"\xff" in by_row or b"\xfe" in by_row):  # CANONICAL_PEAK or brighter
        return None
    if max(_extent(by_row), _extent(grey.tobytes("F"))) not in CANONICAL_SIDES:
        return None
    y, x = center_of_mass(np.frombuffer(by_row, _BYTE))
    low, high = CANONICAL_CENTER
    return by_row if low <= y <= high and low <= x <= high else None


def center_of_mass(pixels: npt.NDArray[np.uint8]) -> tuple[float, float]:
    """Row and column, in pixel indices, of the ink in 784 pixels, of which one or more are not 0."""
    ink, rows, columns = np.dot(pixels.ravel().astype(_FLOAT), _MOMENTS).tolist()
    return rows / ink, columns / ink


def may_be_canonical(grey: npt.NDArray[np.uint8]) -> bytes | None:
    """As `canonical_bytes`, but at a glance: the bytes of all that are canonical and of few others."""
    if grey.shape != _SHAPE:
        return None
    by_row = grey.tobytes()
    bright = b"\xff" in by_row or b"\xfe" in by_row
    return by_row if bright and _extent(by_row) <= CANONICAL_SIDES[-1] else None


def are_canonical(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which of the grey images `uint8[n, 28, 28]` are as MNIST's; decides as `is_canonical`. `bool[n]`."""
    count = len(pixels)
    flat = pixels.reshape(count, PIXELS)
    bright = flat.max(axis=1, initial=0) >= CANONICAL_PEAK
    longer = np.maximum(_extents(np.logical_or.reduce(pixels, axis=2)), _extents(np.logical_or.reduce(pixels, axis=1)))
    moments = np.empty((count, 3))
    for start in range(0, count, _BLOCK):
        moments[start : start + _BLOCK] = flat[start : start + _BLOCK].astype(np.float32) @ _MOMENTS
    centers = moments[:, 1:] / np.maximum(moments[:, :1], 1)  # blank images are not bright
    low, high = CANONICAL_CENTER
    centered = ((centers >= low) & (centers <= high)).all(axis=1)
    decided: npt.NDArray[np.bool_] = bright & np.isin(longer, CANONICAL_SIDES) & centered
    return decided


def _extent(lines: bytes) -> int:
    """From the first to the last of 28 lines of 28 bytes in which a byte is not 0; there is one."""
    end = (len(lines.rstrip(b"\0")) + SIDE - 1) // SIDE
    return end - (PIXELS - len(lines.lstrip(b"\0"))) // SIDE


def _extents(inked: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """From the first to the last true of each row of `bool[n, 28]`; 28 where none is."""
    extents: npt.NDArray[Any] = SIDE - inked.argmax(axis=1) - inked[:, ::-1].argmax(axis=1)
    return extents
