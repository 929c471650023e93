"""Find the digit in a picture: which pixels are its ink, and how strong it is there.

Paper is never even: it has shadows, a gradient, lines, an edge with a table
behind it; next to the digit there are specks and parts of other digits. So the
paper is taken away first, as it is around each pixel, then what is left is
parted into connected pieces, and those that make up the digit are chosen.

Whether the ink is darker or brighter than the paper, and above which strength
it begins, is not decided beforehand: each combination gives a choice of pieces,
and the choice that looks most like one written digit is taken. Plain pictures
need none of that (`digits.plain`).

Knows nothing of files, of canonical pixels or of what digits look like.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from digits import morphology
from digits.components import Components
from digits.ink import Bools, Box, Ink, box_of
from digits.morphology import Grey
from digits.plain import find_plain_ink

WORKING_SIDE = 144
"""Pixels of the longer side to which pictures are scaled before their ink is looked for."""

MAX_ENLARGEMENT = 4
"""Small pictures are enlarged by a whole number up to this, so that their strokes are several pixels wide."""

PAPER_WINDOWS = (0.3, 0.7)
"""What is narrower than this part of the picture's longer side is taken for ink, what is wider for paper.

The wider window is for strokes that are thick beside the picture, and sees more of shadows."""

THRESHOLDS = (1.0, 0.6)
"""How far the first threshold is trusted, and the second, above which there is strong ink only."""

MIN_STRENGTH = 5
"""Ink differs from the paper around it by more than this, of 255."""

MIN_WINDOW = 6
"""Pixels of the picture as it was given; in the smallest pictures strokes are up to three wide, and blurred."""

SCAN_SIDE = 16
"""A picture up to this long was cut out around a digit: it holds nothing else, and ink may touch its edges."""

CONVINCING = 0.6
"""A choice that is this much like a written digit is taken without a look at others."""

FINE = 0.06
"""Strokes of this part of the picture's longer side, and finer, are those of squared paper if they fill the picture."""

TRUSTED = 0.5
"""Strokes up to this part of the paper's window are seen whole."""

SMALL = 0.3
"""A digit that is shorter than this part of the working side is looked at again from nearer."""


@dataclass(frozen=True)
class _Choice:
    strength: Grey
    mask: Bools
    threshold: int
    is_dark: bool
    likeness: float
    """From 0 to 1: how much the pieces look like one written digit."""
    quality: float
    """The same times the mean strength of the ink."""
    is_convincing: bool


def find_ink(grey: Grey) -> Ink | None:
    """Find the digit in a grey picture `uint8[h, w]`; None if there is no ink in it."""
    # A small plain picture is not enlarged, which only the search needs.
    if max(grey.shape) <= WORKING_SIDE and (ink := find_plain_ink(grey)) is not None:
        return ink
    # Of a picture and its negative the one is looked at in which the ink seems bright, so that both give the same.
    if _seems_dark(grey):
        ink = _find_ink(255 - grey)
        return ink and dataclasses.replace(ink, is_dark=not ink.is_dark)
    return _find_ink(grey)


def _find_ink(grey: Grey) -> Ink | None:
    """The same, in which ink that is bright is looked for first."""
    scaled = to_working_side(grey)
    scale = max(grey.shape) / max(scaled.shape)
    small = SMALL * max(scaled.shape) if scale > 1.3 else 0
    if scale > 1 and (ink := find_plain_ink(scaled)) is not None:
        if _longer(ink.box) >= small:
            return ink
        nearer, _ = _around(grey, ink.box, scaled.shape, margin=0.1)
        if (ink := find_plain_ink(to_working_side(nearer))) is not None:
            return ink
    choice = _best_choice(scaled, scale)
    if choice is None:
        return None
    box = box_of(choice.mask)
    if _longer(box) < small and (ink := _look_closer(grey, choice, scale, box)) is not None:
        return ink
    return Ink(scaled, choice.strength, choice.mask, choice.threshold, choice.is_dark, box)


def _longer(box: Box) -> int:
    top, bottom, left, right = box
    return max(bottom - top, right - left)


def _seems_dark(grey: Grey) -> bool:
    """Whether the few pixels that are far from the rest, as ink is, are darker: then the mean is below the median."""
    step = -(-max(grey.shape) // WORKING_SIDE)
    counts = np.bincount(grey[::step, ::step].ravel(), minlength=256)
    below, count = np.cumsum(counts), int(counts.sum())
    twice_median = int(np.searchsorted(below, count / 2)) + int(np.searchsorted(below, count / 2, side="right"))
    twice_sum = 2 * int(counts @ np.arange(256))
    # Of a picture whose mean is its median the darker one has its ink bright, since there is less ink than paper.
    return twice_sum > 255 * count if twice_sum == twice_median * count else twice_sum < twice_median * count


def to_working_side(grey: Grey) -> Grey:
    """Scaled so that the longer side is about `WORKING_SIDE`."""
    height, width = grey.shape
    longer = max(height, width)
    if longer > WORKING_SIDE:
        scale = WORKING_SIDE / longer
        return morphology.resize(grey, max(1, round(width * scale)), max(1, round(height * scale)))
    enlargement = min(MAX_ENLARGEMENT, WORKING_SIDE // longer)
    return morphology.resize(grey, width * enlargement, height * enlargement) if enlargement > 1 else grey


# Paper ----------------------------------------------------------------------


def ink_strength(grey: Grey, window: int) -> Grey:
    """By how much each pixel is brighter than the paper around it.

    The paper is the morphological opening: what remains when everything that is
    brighter than its surroundings and narrower than `window` pixels is taken
    away. It follows gradients and the edges of shadows, at whatever angle.
    """
    paper = morphology.open(morphology.smooth(grey), window)
    strength = np.maximum(grey, paper) - paper
    # Noise lifts bare paper over the opening, which is its lower edge.
    noise = strength.dtype.type(morphology.percentile(strength, 25))
    result: Grey = np.maximum(strength, noise) - noise
    return result


def _window(grey: Grey, part: float, scale: float) -> int:
    """A part of the longer side in pixels, but never so few of the picture's own that a stroke could fill it."""
    return max(int(part * max(grey.shape)), round(MIN_WINDOW / scale)) | 1


# Choosing -------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """The picture, or its negative, with the paper taken away: what is bright in it may be ink."""

    grey: Grey
    """As it was: `uint8[h, w]`."""
    strength: Grey
    """Above the paper: `uint8[h, w]`."""
    is_dark: bool
    """Whether this is the negative."""
    window: int
    """Pixels: what is wider was taken for paper."""
    is_scan: bool
    """Whether the picture holds nothing but the digit, which may touch its edges."""


def _best_choice(grey: Grey, scale: float) -> _Choice | None:
    is_scan = max(grey.shape) * scale <= SCAN_SIDE
    best: _Choice | None = None
    for part in PAPER_WINDOWS:
        window = _window(grey, part, scale)
        for is_dark in (False, True):
            side = 255 - grey if is_dark else grey
            for choice in _choices(_View(side, ink_strength(side, window), is_dark, window, is_scan)):
                if best is None or choice.quality > best.quality:
                    best = choice
            if best is not None and best.is_convincing:
                return best
    return best


def _choices(view: _View) -> list[_Choice]:
    """At Otsu's threshold, and, if that gives no convincing choice, at Otsu's threshold of what lies above it."""
    counts = np.bincount(view.strength.ravel(), minlength=256)
    threshold = morphology.otsu(counts)
    choices: list[_Choice] = []
    for weight in THRESHOLDS:
        threshold = max(threshold, MIN_STRENGTH)
        if (choice := _choose(view, threshold, weight)) is None:
            break
        choices.append(choice)
        counts[: threshold + 1] = 0
        if choice.likeness > CONVINCING or counts.sum() < 20:
            break
        threshold = morphology.otsu(counts)
    return choices


def _choose(view: _View, threshold: int, weight: float) -> _Choice | None:
    """The pieces above a threshold that make up the digit."""
    parts = Components(view.strength > threshold)
    if not parts.count:
        return None
    height, width = view.strength.shape
    heights, widths = parts.bottom - parts.top, parts.right - parts.left
    spans = np.maximum(heights, widths)
    away = np.minimum(np.hypot(parts.center_y / height - 0.5, parts.center_x / width - 0.5) / 0.6, 1)
    on_edge = np.zeros_like(parts.on_edge) if view.is_scan else parts.on_edge
    touches = on_edge > 0
    clutter = np.zeros(parts.count, np.bool_) if view.is_scan else _is_clutter(parts, heights, widths)

    # The heaviest piece, in the middle rather than at the edge, is the digit or most of it.
    mass = parts.sums(view.strength)
    score = mass * (1 - 0.9 * away) * np.where(touches, 0.5, 1) * np.where(clutter, 0.02, 1)
    main = int(score.argmax())
    span = spans[main]

    # Others belong to it if they are near: the bar of a 5, what a dry pen left out.
    gap_y = np.maximum(np.maximum(parts.top - parts.bottom[main], parts.top[main] - parts.bottom), 0)
    gap_x = np.maximum(np.maximum(parts.left - parts.right[main], parts.left[main] - parts.right), 0)
    chosen = (gap_x <= 0.12 * span) & (gap_y <= 0.25 * span) & (mass >= 0.03 * mass[main]) & ~clutter
    if not touches[main]:
        # What comes in from outside is part of something else, unless it all but touches.
        chosen &= ~touches | ((np.hypot(gap_x, gap_y) < 0.05 * span) & (mass < 0.5 * mass[main]))
    chosen[main] = True
    mask = parts.mask(chosen)

    alone = mask if np.count_nonzero(chosen) == 1 else parts.mask(np.arange(parts.count) == main)
    box = (slice(parts.top[main], parts.bottom[main]), slice(parts.left[main], parts.right[main]))
    stroke = morphology.stroke_width(alone[box])
    likeness = (
        weight
        * min(max((0.45 - stroke / span) / 0.15, 0.05), 1)  # 1 for thin strokes, next to nothing for a blot
        * (0.1 if clutter[main] else 1)
        * (1 - 0.8 * min(1.0, on_edge[main] / span))
        * (1 - 0.5 * float(away[main]))
        * min(max(span / max(height, width) / 0.08, 0.2), 1)
        * _rarity(view.grey, mask) ** 3
    )
    # Strokes that are nearly as wide as the window have lost a part of themselves to the paper.
    is_whole = stroke < TRUSTED * view.window
    quality = likeness * float(view.strength[mask].mean())
    is_convincing = is_whole and likeness > CONVINCING
    return _Choice(view.strength, mask, threshold, view.is_dark, likeness, quality, is_convincing)


def _is_clutter(parts: Components, heights: Any, widths: Any) -> Bools:
    """Which pieces are no writing: edges of a sheet, ruled lines, frames."""
    height, width = parts.shape
    along_edge = parts.on_edge > 0.5 * np.maximum(heights, widths)
    ruled = (widths > 0.9 * width) & (heights < 0.15 * height)
    upright = (heights == height) & (widths < 0.06 * width)
    clutter: Bools = along_edge | ruled | upright
    for large in np.flatnonzero((heights > 0.6 * height) & (widths > 0.6 * width) & ~clutter).tolist():
        piece = _piece(parts, large)
        # Lines that cross the whole picture are finer than a digit's that fills it.
        crosses = piece.shape == parts.shape and morphology.stroke_width(piece) < FINE * max(piece.shape)
        clutter[large] = crosses or _is_frame(piece, max(1, max(parts.shape) // 40))
    return clutter


def _is_frame(piece: Bools, near: int) -> bool:
    """Whether a piece is drawn along all four sides of its box, as no digit is."""
    sides = (piece[:near].any(0), piece[-near:].any(0), piece[:, :near].any(1), piece[:, -near:].any(1))
    return min(float(side.mean()) for side in sides) > 0.75


def _piece(parts: Components, index: int) -> Bools:
    """The pixels of one piece within its box."""
    piece = parts.mask(np.arange(parts.count) == index)
    return piece[parts.top[index] : parts.bottom[index], parts.left[index] : parts.right[index]]


def _rarity(grey: Grey, mask: Bools) -> float:
    """How little of the rest of the picture is as bright as the ink.

    The hole of a 0 differs from the stroke around it as much as the stroke from
    the paper, but it is as bright as all the paper outside.
    """
    level = morphology.percentile(grey[mask], 60)
    bright = grey >= level
    inside = int(np.count_nonzero(bright & mask))
    outside = grey.size - int(np.count_nonzero(mask))
    return max(0.02, 1 - (int(np.count_nonzero(bright)) - inside) / max(outside, 1))


# Small digits ---------------------------------------------------------------


def _around(grey: Grey, box: Box, shape: tuple[int, ...], margin: float) -> tuple[Grey, Box]:
    """The part of the picture around a box that was found where it was scaled to `shape`, and its place there.

    The margin is a part of the box's longer side.
    """
    top, bottom, left, right = box
    height, width = shape
    more = round(margin * _longer(box)) + 2
    place = max(0, top - more), min(height, bottom + more), max(0, left - more), min(width, right + more)
    scale = max(grey.shape) / max(shape)
    y0, y1, x0, x1 = (int(at * scale) for at in place)
    return grey[y0 : y1 + 1, x0 : x1 + 1], place


def _look_closer(grey: Grey, choice: _Choice, scale: float, box: Box) -> Ink | None:
    """The chosen pieces, and nothing else, in a part of the picture with more pixels to them.

    None if there they stand out no more: in a strip of a few rows there is no paper left around them.
    """
    height, width = choice.mask.shape
    part, (y0, y1, x0, x1) = _around(grey, box, choice.mask.shape, margin=0.35)
    crop = to_working_side(part)
    rows = np.clip((y0 + (np.arange(crop.shape[0]) + 0.5) / crop.shape[0] * (y1 - y0)).astype(int), 0, height - 1)
    columns = np.clip((x0 + (np.arange(crop.shape[1]) + 0.5) / crop.shape[1] * (x1 - x0)).astype(int), 0, width - 1)
    around = morphology.dilate(choice.mask.view(np.uint8), 3)[rows[:, None], columns] > 0
    strength = ink_strength(255 - crop if choice.is_dark else crop, _window(crop, PAPER_WINDOWS[-1], scale))
    found = strength[around]
    threshold = min(
        morphology.otsu(np.bincount(strength.ravel(), minlength=256)), int(morphology.percentile(found, 90) * 0.6)
    )
    threshold = max(threshold, MIN_STRENGTH // 2)
    mask = (strength > threshold) & around
    return Ink(crop, strength, mask, threshold, choice.is_dark, box_of(mask)) if mask.any() else None
