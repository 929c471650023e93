"""The loads that are measured, and the images they carry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from digits.preprocessing import CLASSES, PIXELS
from server.golden import golden_digits

IMAGES = 256
"""Distinct requests go round these, so that an answer to another request is noticed."""


@dataclass(frozen=True)
class Scenario:
    """A closed loop: `in_flight` messages are unanswered at any time."""

    name: str
    images: int
    """In each message."""
    in_flight: int
    stream: bool = False
    forward: int = 64
    """The batch size of the bare network that it is compared with."""


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("unary @1", images=1, in_flight=1, forward=1),
        Scenario("unary @64", images=1, in_flight=64),
        Scenario("256 images @4", images=256, in_flight=4, forward=256),
        Scenario("stream 1x64", images=1, in_flight=64, stream=True),
        Scenario("stream 64x8", images=64, in_flight=8, stream=True),
    )
}


def images() -> npt.NDArray[np.uint8]:
    """Pixels, `uint8[256, 784]`: the golden digits with a little noise, all different."""
    golden, _ = golden_digits()
    tiled = golden[np.arange(IMAGES) % len(golden)].astype(np.int16)
    noise = np.random.default_rng(0).integers(0, 32, (IMAGES, PIXELS))
    pixels: npt.NDArray[np.uint8] = np.clip(tiled + noise, 0, 255).astype(np.uint8)
    return pixels


def rows_of(message: int, count: int) -> npt.NDArray[np.intp]:
    """Which of the images the i-th message carries."""
    return (message * (1 if count == 1 else 7) + np.arange(count)) % IMAGES


def fixed_digits(count: int) -> list[int]:
    """What the no-op server answers to so many images."""
    return [index % CLASSES for index in range(count)]
