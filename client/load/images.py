"""The images that are sent."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from client.testing._answers import samples
from digits.preprocessing import CLASSES, PIXELS

IMAGES = 256
"""Distinct requests go round these, so that an answer to another request is noticed."""

SAMPLES = 20


def images() -> npt.NDArray[np.uint8]:
    """Pixels, `uint8[256, 784]`: twenty digits with a little noise, all different."""
    tiled = samples()[_samples_shown()].astype(np.int16)
    noise = np.random.default_rng(0).integers(0, 32, (IMAGES, PIXELS))
    pixels: npt.NDArray[np.uint8] = np.clip(tiled + noise, 0, 255).astype(np.uint8)
    return pixels


def labels() -> list[int]:
    """What the images show."""
    return [int(sample) % CLASSES for sample in _samples_shown()]


def _samples_shown() -> npt.NDArray[np.intp]:
    """Which digit each image shows: shuffled, so that an answer that is some places off is another digit."""
    return np.random.default_rng(1).permutation(np.arange(IMAGES) % SAMPLES)


def rows_of(message: int, count: int) -> npt.NDArray[np.intp]:
    """Which of the images the i-th message carries."""
    return (message * (1 if count == 1 else 7) + np.arange(count)) % IMAGES


def fixed_digits(count: int) -> list[int]:
    """What a server that computes nothing answers to so many images."""
    return [index % CLASSES for index in range(count)]
