"""What `to_pixels` costs, beside what Pillow needs to decode, grey and resize the same input.

Processor time of this process, both in turn, so that what else the machine does
falls on both.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from digits.preprocessing import SIDE, to_pixels

ROUNDS = 15
ROUND_SECONDS = 0.02


class Cost(TypedDict):
    """Medians over the rounds."""

    to_pixels_us: float
    pillow_us: float
    ratio: float


def measure_cost() -> dict[str, Cost]:
    """The cost for each kind of input."""
    costs: dict[str, Cost] = {}
    for name, image in _inputs().items():
        ours = _calls(lambda image=image: to_pixels(image))  # type: ignore[misc]
        theirs = _calls(lambda image=image: _plain(image))  # type: ignore[misc]
        pairs = [(_us(*ours), _us(*theirs)) for _ in range(ROUNDS)]
        costs[name] = {
            "to_pixels_us": statistics.median(a for a, _ in pairs),
            "pillow_us": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(a / b for a, b in pairs),
        }
    return costs


def _inputs() -> dict[str, Any]:
    """A photo of 1000x1000 as files and as an array, a drawing, and images of 28x28."""
    photo = _photo(1000)
    drawing = 255 - _seven(400)
    small = 255 - _seven(SIDE)
    return {
        "photo 1000x1000, JPEG": _file(photo, "JPEG", quality=90),
        "photo 1000x1000, PNG": _file(photo, "PNG"),
        "photo 1000x1000, array of RGB": photo,
        "photo 1000x1000, array of grey": photo[:, :, 1].copy(),
        "drawing 400x400, PNG": _file(drawing, "PNG"),
        "drawing 400x400, array": drawing,
        "28x28, array": small,
        "28x28, canonical, PNG": _file(to_pixels(small), "PNG"),
        "28x28, canonical, array": to_pixels(small),
    }


def _seven(side: int) -> Any:
    """A seven with soft edges, ink 255 on 0: `uint8[side, side]`."""
    rows, columns = (np.mgrid[0:side, 0:side] + 0.5) / side
    bar = np.maximum(np.abs(rows - 0.25) - 0.0, np.abs(columns - 0.5) - 0.2)
    leg = np.maximum(np.abs(columns - (0.7 - (rows - 0.25) * 0.45)), np.abs(rows - 0.52) - 0.27)
    return (np.clip((0.045 - np.minimum(bar, leg)) * side + 0.5, 0, 1) * 255).astype(np.uint8)


def _photo(side: int) -> Any:
    """The same on paper, in uneven light and with noise, in colours: `uint8[side, side, 3]`."""
    ink = _seven(side)[:, :, None] / 255
    light = np.linspace(235, 170, side)[:, None, None] * np.array([1.0, 0.98, 0.93])
    noise = np.random.default_rng(0).normal(0, 4, (side, side, 3))
    return np.clip(light * (1 - ink) + np.array([40, 45, 90]) * ink + noise, 0, 255).astype(np.uint8)


def _file(pixels: Any, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def _plain(image: Any) -> Any:
    opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image)
    return np.asarray(opened.convert("L").resize((SIDE, SIDE)))


def _calls(call: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """With how many of them fill a round."""
    call()
    return call, max(1, int(ROUND_SECONDS * 1e6 / max(_us(call, 3), 1)))


def _us(call: Callable[[], object], count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count * 1e6
