"""Twenty digits of which every sound model reads at least 18: asked before it is served.

`digits.png` is a sheet of 28x28 tiles, two rows of ten, column i showing the
digit i. Written by people, not by us: from the UCI "Optical Recognition of
Handwritten Digits" data set (E. Alpaydin, C. Kaynak, 1998; CC BY 4.0), brought
to canonical pixels by `digits.preprocessing.to_pixels`.
"""

from __future__ import annotations

from importlib import resources

import numpy as np
import numpy.typing as npt
from PIL import Image

from digits.preprocessing import CLASSES, PIXELS, SIDE


def golden_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return pixels, `uint8[20, 784]`, and their labels, `uint8[20]`."""
    with resources.files(__name__).joinpath("digits.png").open("rb") as file, Image.open(file) as sheet:
        pixels = np.array(sheet, np.uint8)
    tiles = pixels.reshape(-1, SIDE, CLASSES, SIDE).swapaxes(1, 2)  # (rows, 10, 28, 28)
    return tiles.reshape(-1, PIXELS), np.tile(np.arange(CLASSES, dtype=np.uint8), len(tiles))
