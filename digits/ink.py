"""The ink of a digit, as it was found in a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from digits.morphology import Grey

Bools: TypeAlias = npt.NDArray[np.bool_]
Box: TypeAlias = tuple[int, int, int, int]
"""Top, bottom, left and right; bottom and right are the first beyond it."""


@dataclass(frozen=True)
class Ink:
    """The ink of a digit; all arrays show the same part of the picture."""

    picture: Grey
    """The part that was looked at, or its negative, at the scale of the arrays below: `uint8[h, w]`."""

    strength: Grey
    """By how much each pixel differs from the paper around it, towards the ink: `uint8[h, w]`."""

    mask: Bools
    """The pixels of the digit: `bool[h, w]`, at least one."""

    threshold: int
    """The strength above which a pixel was taken for ink."""

    is_dark: bool
    """Whether the ink is darker than the paper."""

    box: Box
    """Of the mask."""

    is_alone: bool = False
    """Whether it is known that nothing beside the digit is stronger than half of the threshold."""


def box_of(mask: Bools) -> Box:
    """Around what is true, of which there is something."""
    rows, columns = mask.any(axis=1).tobytes(), mask.any(axis=0).tobytes()
    return rows.find(1), rows.rfind(1) + 1, columns.find(1), columns.rfind(1) + 1
