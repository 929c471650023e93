"""Find the digit in a plain picture: even paper, and nothing on it but the digit.

Drawings and exports of paint programs are like that. There the border tells
what is paper and whether ink is darker or brighter, and nothing need be
searched for. Whatever is not as simple is left to `digits.segmentation`.
"""

from __future__ import annotations

import numpy as np

from digits import morphology
from digits.ink import Bools, Ink
from digits.morphology import Grey

EVEN = 0.2
"""The paper of a plain picture varies by up to this part of the contrast between ink and paper."""

FRAMED = 0.6
"""What is inked along more than this part of all four sides of its box may be a frame."""

MIN_SPAN = 8
"""Pixels of the digit's longer side. A shorter one is mostly soft edge, and is enlarged by the search."""


def find_plain_ink(grey: Grey) -> Ink | None:
    """The ink in a grey picture `uint8[h, w]` if the picture is plain, else None."""
    border = grey[0].tobytes() + grey[-1].tobytes() + grey[:, 0].tobytes() + grey[:, -1].tobytes()
    low, high = min(border), max(border)  # of bytes: quicker than NumPy's for so few
    below, above = low - int(grey.min()), int(grey.max()) - high
    contrast = max(below, above)
    if high - low + min(below, above) > EVEN * contrast:
        return None
    is_dark = below > above
    bright, paper = (255 - grey, np.uint8(255 - low)) if is_dark else (grey, np.uint8(high))
    strength: Grey = np.maximum(bright, paper) - paper
    threshold = contrast // 2  # what is nearer to ink than to paper
    mask = strength > threshold
    rows, columns = _extent(mask.any(axis=1)), _extent(mask.any(axis=0))
    if rows is None or columns is None:
        return None
    (top, bottom), (left, right) = rows, columns
    if max(bottom - top, right - left) < MIN_SPAN or _may_be_frame(mask[top:bottom, left:right]):
        return None
    # What is fainter than ink is the soft edge of a stroke, or else a line, a shadow or a smudge beside the digit.
    near = morphology.dilate(mask.view(np.uint8), 3).view(np.bool_)
    if np.count_nonzero((strength > threshold // 2) > near):
        return None
    return Ink(bright, strength, mask, threshold, is_dark, (top, bottom, left, right), is_alone=True)


def _extent(inked: Bools) -> tuple[int, int] | None:
    """First and end of the lines with ink; None if there is a gap between them, as there is beside a second piece."""
    lines = inked.tobytes()
    first, end = lines.find(1), lines.rfind(1) + 1
    return (first, end) if lines.find(0, first, end) < 0 else None


def _may_be_frame(piece: Bools) -> bool:
    """Whether a piece is drawn along most of all four sides of its box, as few digits are."""
    inked = [float(np.count_nonzero(side)) / len(side) for side in (piece[0], piece[-1], piece[:, 0], piece[:, -1])]
    return min(inked) > FRAMED
