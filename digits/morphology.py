"""Small image operations on `uint8[h, w]`: running extremes, smoothing, a threshold.

In NumPy and Pillow, so that the client needs nothing larger. A running extreme
over k pixels is taken in about log2(k) steps, each over the whole image, since
the extreme of 2k pixels is that of two times k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

Grey: TypeAlias = npt.NDArray[np.uint8]

_SMOOTHING = ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 4, 2, 1, 2, 1))


def dilate(image: Grey, size: int) -> Grey:
    """The brightest in a square of `size` (odd) pixels around each pixel."""
    return _running(_running(image, size, np.maximum), size, np.maximum, axis=1)


def erode(image: Grey, size: int) -> Grey:
    """The darkest in a square of `size` (odd) pixels around each pixel; outside of the image it is black."""
    return _running(_running(image, size, np.minimum), size, np.minimum, axis=1)


def open(image: Grey, size: int) -> Grey:
    """Without what is brighter than its surroundings and narrower than `size` pixels.

    The brightest that a square of that size can be filled with around each
    pixel. It lies wholly in the image, so that something bright at the edge is
    not taken to go on outside; where it does not fit in, it is as large as does.
    """
    height, width = (min(size, side) - 1 + min(size, side) % 2 for side in image.shape)
    eroded = _running(_running(image, height, np.minimum), width, np.minimum, axis=1)
    return _running(_running(eroded, height, np.maximum), width, np.maximum, axis=1)


def grow(image: Grey, radius: float) -> Grey:
    """Bright strokes made wider by `radius` pixels on each side; narrower, if it is negative.

    The radius need not be whole: the result is mixed from those of the whole
    numbers around it.
    """
    step = dilate if radius > 0 else erode
    whole, part = divmod(abs(radius), 1)
    less = step(image, 2 * int(whole) + 1) if whole else image
    if part == 0:
        return less
    more = step(image, 2 * int(whole) + 3)
    mixed: Grey = (less + np.float32(part) * (more.astype(np.float32) - less)).astype(np.uint8)
    return mixed


def smooth(image: Grey) -> Grey:
    """Averaged over 3x3 pixels with the weights 1-2-1; the outermost pixels stay."""
    return np.asarray(Image.fromarray(image).filter(_SMOOTHING)) if min(image.shape) >= 3 else image


def resize(image: Grey, width: int, height: int) -> Grey:
    """Averaged where it becomes smaller, interpolated where it becomes larger."""
    smaller = width <= image.shape[1]
    return resized(image, (width, height), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)


def resized(image: Grey, size: tuple[int, int], method: Image.Resampling) -> Grey:
    """To a width and height by one of Pillow's methods; with less around it than `fromarray` and `asarray` have."""
    height, width = image.shape
    scaled = Image.frombuffer("L", (width, height), image.tobytes(), "raw", "L", 0, 1).resize(size, method)
    return np.frombuffer(scaled.tobytes(), np.uint8).reshape(size[1], size[0])


def otsu(counts: npt.NDArray[Any]) -> int:
    """The threshold that parts the two classes of a histogram best; values above it are the upper class.

    N. Otsu, "A Threshold Selection Method from Gray-Level Histograms", IEEE
    Transactions on Systems, Man, and Cybernetics 9(1), 1979.
    """
    below = np.cumsum(counts, dtype=np.float64)
    mass = np.cumsum(counts * np.arange(len(counts)), dtype=np.float64)
    above = below[-1] - below
    apart = (mass * below[-1] - mass[-1] * below) ** 2
    return int(np.argmax(apart / np.maximum(below * above, 1)))


def percentile(values: npt.NDArray[np.uint8], percent: float) -> int:
    """The smallest value that at least `percent` of the values do not exceed; by counting, which is quick."""
    counts = np.bincount(values.ravel(), minlength=256)
    return int(np.searchsorted(np.cumsum(counts), values.size * percent / 100))


def stroke_width(strength: npt.NDArray[Any]) -> float:
    """The mean width in pixels of bright strokes on 0: twice their area by the length of their outline."""
    is_mask = strength.dtype == np.bool_
    values = np.zeros((strength.shape[0] + 2, strength.shape[1] + 2), np.bool_ if is_mask else np.float32)
    values[1:-1, 1:-1] = strength
    here, below, beside = values[:-1, :-1], values[1:, :-1], values[:-1, 1:]
    if is_mask:  # the differences are 0 or 1, and counting them is quicker
        down, across = here ^ below, here ^ beside
        corners = np.count_nonzero(down & across)
        outline = float(np.count_nonzero(down) + np.count_nonzero(across) - (2 - math.sqrt(2)) * corners)
        return 2 * np.count_nonzero(values) / max(outline, 1e-6)
    outline = float(np.hypot(below - here, beside - here).sum())
    return float(2 * values.sum()) / max(outline, 1e-6)


def _running(image: Grey, size: int, extreme: Callable[[Any, Any], Any], axis: int = 0) -> Grey:
    """The extreme of `size` (odd) pixels along one axis, those around each pixel, with 0 outside."""
    lines = image if axis == 0 else image.T
    half = size // 2
    padded = np.empty((len(lines) + 2 * half, lines.shape[1]), np.uint8)
    padded[:half] = 0
    padded[half : half + len(lines)] = lines
    padded[half + len(lines) :] = 0
    have = 1
    while have < size:
        step = min(have, size - have)
        padded = extreme(padded[step:], padded[:-step])
        have += step
    result: Grey = padded if axis == 0 else padded.T
    return result
