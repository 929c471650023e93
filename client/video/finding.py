"""Where digits may stand in a picture: `find_digits(picture)` gives boxes and clean crops.

Knows nothing of video, of networks or of the service: what it looks for is a
pen's stroke, that is, ink of an even width and contrast that stands alone on
its surroundings. What the stroke says is for the classifier to tell, and
whether it stays is for the tracks.

Dark and light ink are told from any slow change of light by the black and the
white top-hat, the picture closed (opened) with a square that no stroke fills,
less the picture itself (F. Meyer, "Contrast feature extraction", 1979).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from client.video.boxes import Box
from digits.components import Bools as Mask
from digits.components import Components

Grey: TypeAlias = npt.NDArray[np.uint8]

WORKING_SIDE = 640  # the longer side to which pictures are scaled; the smallest digits are a 40th of it
MAX_WORKING_SIDE = 2_800  # up to here, sums over a picture fit 32 bits
LEVELS = 4  # this picture, half of it, a quarter, an eighth: each is searched for one range of sizes

_SQUARE = 25  # pixels of the top-hats' square: a stroke of half of that is seen with its paper
_REACH = 24  # pixels to either side that decide how much ink differs from paper here
_INK = 0.45  # of the strongest contrast nearby: more than this is ink
_SHORTEST, _TALLEST = 16, 96  # pixels of a level
_BROADEST = 13.0  # pixels of a level: the square must hold the stroke's paper on both sides
_WIDEST = 2.3  # times the height
_THIN = 0.35  # times the height: narrower than this is a 1, or a piece of a line
_STROKE = (0.025, 0.36)  # of the longer side of the box
_LENGTH = (0.75, 4.6)  # of the stroke, in longer sides of the box: a 1 is 0.9, an 8 about 3.5
_UNEVEN = 2.1  # how much wider than on average a stroke may be where it is widest
_APART = 0.4  # of a component's contrast, by which its own tone is apart from that of the band around its box
# What a pen's stroke on plain surroundings is like: from where on it counts, and from where on it counts fully.
_PAPER = (0.72, 0.88)  # how quiet the ring around it is, 1 being plain
_FREE = (0.25, 0.55)  # how free it is of strokes of the other polarity: a hole in a 0 has ink all around
_SHARPNESS = (0.25, 0.55)  # 1 less the width of its edge in widths of the stroke
_EVENNESS = (0.7, 0.8)  # 1 less the deviation of its contrast
_CONTRAST = (20.0, 48.0)  # of 255
_LEAST = 0.1  # of the score: less is not worth asking about
_SAME_PLACE = 0.35  # intersection over union
_INK_FROM = np.maximum(np.arange(256) * _INK, _CONTRAST[0] / 2).astype(np.uint8)  # by the strongest contrast nearby
_FINER = 1.4  # times better is what is found at a level twice as fine
_KNOWN = 0.6  # of a box that lies in the box of what was found at a finer level: it is not looked at again
_INSIDE = 0.8  # of a box inside another one
_SLIVER, _SLIVER_INSIDE = 0.12, 0.15  # of the area of a box: what is so much smaller may be the rough edge of its ink


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """What may be a digit."""

    box: Box
    """In the pixels of the picture."""

    crop: Grey
    """`uint8[h, w]`: the ink alone, bright on black, with some paper around it."""

    score: float
    """How much it looks like ink that stands alone, 0 to 1."""


def find_digits(picture: npt.NDArray[np.uint8], *, working_side: int = WORKING_SIDE) -> list[Candidate]:
    """What may be digits in a picture, the best first.

    Args:
        picture: `uint8[h, w]`, or `uint8[h, w, 3]` in RGB.
        working_side: the longer side to which larger pictures are scaled for
            the search; digits shorter than a 40th of it are not looked for.

    Raises:
        ValueError: the working side is not above 0, or above 2,800.
    """
    if not 0 < working_side <= MAX_WORKING_SIDE:
        raise ValueError(f"the working side is 1 to {MAX_WORKING_SIDE} pixels, not {working_side!r}")
    image = Image.fromarray(picture).convert("L")
    longer = max(image.size)
    if longer > working_side:
        size = (max(1, round(image.width * working_side / longer)), max(1, round(image.height * working_side / longer)))
        image = image.resize(size, Image.Resampling.BOX if longer >= 2 * working_side else Image.Resampling.BILINEAR)
    found: list[tuple[Candidate, int]] = []
    for number in range(LEVELS):
        level = np.asarray(image)
        if min(level.shape) < _SHORTEST:
            break
        scale = (picture.shape[1] / level.shape[1], picture.shape[0] / level.shape[0])
        good = [candidate.box for candidate, _ in found if candidate.score > 1 / _FINER]
        found += [(candidate, number) for candidate in _search(_Level.of(level, scale), good)]
        image = image.reduce(2)
    return _without_doubles(found)


@dataclass(frozen=True, slots=True)
class _Level:
    """A picture at one scale; all arrays are `[h, w]`."""

    grey: Grey
    dark: Grey
    """By how much each pixel is darker than what is around a stroke."""
    light: Grey
    """By how much it is lighter."""
    scale: tuple[float, float]
    """The picture's pixels to one of the level."""

    @classmethod
    def of(cls, grey: Grey, scale: tuple[float, float]) -> _Level:
        smooth = _smooth(grey)
        dark, light = _top_hats(smooth)
        return cls(smooth, dark, light, scale)


# Pixels ---------------------------------------------------------------------


def _smooth(grey: Grey) -> Grey:
    """Weighted by 1 2 1 both ways: what a codec and a sensor leave over is weaker, a stroke is not."""
    wide = np.pad(grey, 1, mode="edge").astype(np.uint16)
    rows = wide[:-2] + 2 * wide[1:-1] + wide[2:]
    both = rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]
    smooth: Grey = ((both + 8) >> 4).astype(np.uint8)
    return smooth


def _top_hats(grey: Grey) -> tuple[Grey, Grey]:
    """By how much each pixel is darker, and lighter, than what is around a stroke: `uint8[h, w]` each."""
    half = _SQUARE // 2
    closed = _extreme(_extreme(grey, half, np.maximum), half, np.minimum)
    opened = _extreme(_extreme(grey, half, np.minimum), half, np.maximum)
    return closed - grey, grey - opened


def _extreme(grey: Grey, reach: int, pick: np.ufunc) -> Grey:
    """The largest (smallest) value of the square of `2 * reach + 1` pixels around each pixel.

    Along one axis and then the other, with windows that double in length.
    """
    for axis in (0, 1):
        line = grey if axis == 0 else grey.T
        before, after = np.repeat(line[:1], reach, axis=0), np.repeat(line[-1:], reach, axis=0)
        line = np.concatenate([before, line, after])
        if axis:
            line = np.asfortranarray(line)
        length, wanted = 1, 2 * reach + 1
        while length < wanted:
            step = min(length, wanted - length)
            line = pick(line[:-step], line[step:])
            length += step
        grey = line if axis == 0 else line.T
    return grey


def _ink_from(hat: Grey) -> Grey:
    """From which contrast on a pixel is ink, by the strongest contrast around it: `uint8[h, w]`.

    At half the size, which is fine enough for what is looked for 24 pixels around.
    """
    height, width = hat.shape
    even = np.zeros((height + height % 2, width + width % 2), np.uint8)
    even[:height, :width] = hat
    rows = np.maximum(even[::2], even[1::2])
    half = _INK_FROM[_extreme(np.maximum(rows[:, ::2], rows[:, 1::2]), _REACH // 2, np.maximum)]
    return np.repeat(np.repeat(half, 2, axis=0), 2, axis=1)[:height, :width]


# Components -----------------------------------------------------------------


def _search(level: _Level, known: list[Box]) -> list[Candidate]:
    """Candidates of both polarities at one level, but for places that are known already."""
    candidates = []
    for hat, other, sign in ((level.dark, level.light, 1), (level.light, level.dark, -1)):
        parts = Components(hat > _ink_from(hat))
        for group in _groups(parts, hat, sign, level):
            left, top = int(parts.left[group].min()), int(parts.top[group].min())
            right, bottom = int(parts.right[group].max()), int(parts.bottom[group].max())
            box = Box(left, top, right, bottom)
            place = box.scaled(*level.scale)
            if max(box.width, box.height) > _TALLEST or any(place.common_area(o) > _KNOWN * place.area for o in known):
                continue
            candidate = _examine(box, group, parts, hat, other, sign, level)
            if candidate is not None:
                candidates.append(candidate)
    return candidates


def _groups(parts: Components, hat: Grey, sign: int, level: _Level) -> list[list[int]]:
    """Which components may make a digit together, by their numbers: strokes of the right size, and what broke off them.

    Rough tests, so that a frame full of texture costs little more than a clean one.
    """
    height, width = parts.bottom - parts.top, parts.right - parts.left
    longer = np.maximum(height, width)
    inside = (parts.left > 0) & (parts.top > 0) & (parts.right < hat.shape[1]) & (parts.bottom < hat.shape[0])
    whole = inside & (height >= _SHORTEST) & (longer <= _TALLEST) & (width <= _WIDEST * height)
    fitting = np.flatnonzero(whole & (parts.area > 0.03 * height * width))
    means = parts.means(hat, fitting)
    groups = []
    own = parts.means(level.grey, fitting)
    for main, mean, tone in zip(fitting.tolist(), means.tolist(), own.tolist(), strict=True):
        if mean < 0.7 * _CONTRAST[0] or sign * (_mean_around(parts, main, level.grey) - tone) < _APART * mean:
            continue
        stroke = min(2 * float(parts.area[main]) / float(height[main] + width[main]), 0.2 * float(longer[main]))
        gap = max(2.0, 0.9 * stroke)
        apart_x = np.maximum(parts.left - parts.right[main], parts.left[main] - parts.right)
        apart_y = np.maximum(parts.top - parts.bottom[main], parts.top[main] - parts.bottom)
        # Above one another: what stands beside it is another digit.
        near = inside & (apart_y <= gap) & (-apart_x >= 0.5 * np.minimum(width, width[main]))
        near &= (longer >= 0.2 * longer[main]) & (longer < longer[main]) & (parts.area > 0.04 * parts.area[main])
        near[main] = False
        pieces = np.flatnonzero(near).tolist()
        groups.append([main])
        if 0 < len(pieces) <= 3:
            groups.append([main, *pieces])
    return groups


def _mean_around(parts: Components, index: int, grey: Grey) -> float:
    """The tone of a band around a component's box, on average."""
    left, top = int(parts.left[index]), int(parts.top[index])
    right, bottom = int(parts.right[index]), int(parts.bottom[index])
    inner = grey[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2]
    outer = grey[max(top - 7, 0) : bottom + 7, max(left - 7, 0) : right + 7]
    return float(int(outer.sum()) - int(inner.sum())) / max(outer.size - inner.size, 1)


def _examine(
    box: Box, group: list[int], parts: Components, hat: Grey, other: Grey, sign: int, level: _Level
) -> Candidate | None:
    """The candidate that a group of components is, or None if it is no pen's stroke on plain surroundings."""
    left, top, right, bottom = box.left, box.top, box.right, box.bottom
    longer = max(box.width, box.height)
    margin = max(4, longer // 6)
    x0, y0 = max(left - margin, 0), max(top - margin, 0)
    x1, y1 = min(right + margin, hat.shape[1]), min(bottom + margin, hat.shape[0])
    mask = parts.window(group[0], x0, y0, x1, y1)
    for piece in group[1:]:
        mask |= parts.window(piece, x0, y0, x1, y1)
    window = hat[y0:y1, x0:x1]
    values = window[mask]
    contrast = _quantile(values, 0.7)
    if contrast <= _CONTRAST[0]:
        return None
    near = _grown(mask, 2)
    ring = _grown(near, max(3, longer // 10)) & ~near
    if not ring.any():
        return None
    grey = level.grey[y0:y1, x0:x1]
    around = grey[ring].astype(np.int16)
    plain = _quantile(around, 0.5)
    if sign * (plain - float(grey[mask].mean())) < 0.5 * contrast:
        return None  # only a gap between two things, as light as all the paper
    paper = 1 - float(np.abs(around - int(plain)).mean()) / contrast
    free = 1 - float(other[y0:y1, x0:x1][ring].mean()) / contrast
    if free <= _FREE[0] or paper <= _PAPER[0]:
        return None
    stroke, widest = _stroke(mask)
    length = len(values) / stroke
    if not _STROKE[0] <= stroke / longer <= _STROKE[1] or widest > _UNEVEN * stroke + 2:
        return None
    if stroke > _BROADEST or not _LENGTH[0] <= length / longer <= _LENGTH[1]:
        return None
    if box.width < _THIN * box.height and _goes_on(hat, box, contrast):
        return None
    ink = np.where(near, window, 0) * np.float32(1 / contrast)
    edge = float(((ink > 0.25) & (ink < 0.75)).sum()) / (2 * length)  # pixels from paper to ink
    score = (
        _rising(paper, _PAPER)
        * _rising(free, _FREE)
        * _rising(1 - edge / stroke, _SHARPNESS)
        * _rising(1 - float(values.std()) / contrast, _EVENNESS)
        * _rising(contrast, _CONTRAST)
    )
    if score < _LEAST:
        return None
    return Candidate(
        box=box.scaled(*level.scale),
        crop=np.rint(np.clip(ink, 0, 1) * 255).astype(np.uint8),
        score=score,
    )


def _quantile(values: npt.NDArray[Any], share: float) -> float:
    """The value that this share of the values is below; NumPy's own takes ten times as long."""
    index = int(share * len(values))
    return float(np.partition(values, index)[index])


def _goes_on(hat: Grey, box: Box, contrast: float) -> bool:
    """Whether an upright stroke is only a piece of a line that goes on beyond both its ends."""
    columns = slice(max(box.left - 3, 0), box.right + 3)
    above = hat[max(box.top - 10, 0) : max(box.top - 3, 0), columns]
    below = hat[box.bottom + 3 : box.bottom + 10, columns]
    return all(len(end) and end.mean(axis=0).max() > 0.5 * contrast for end in (above, below))


def _rising(value: float, span: tuple[float, float]) -> float:
    """0 up to the span's first value, 1 from its second one on."""
    low, high = span
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _stroke(mask: Mask) -> tuple[float, float]:
    """The width of a stroke, on average and where it is widest, in pixels.

    By eroding it until nothing is left: of a band `w` wide, `w / 2` erosions
    leave a quarter of its width times its area in sum.
    """
    inner = np.pad(mask, 1)
    core = inner[1:-1, 1:-1]
    area = left = int(np.count_nonzero(core))
    total = layers = 0
    while left and layers <= _BROADEST:
        total += left
        layers += 1
        core[:] = core & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        left = int(np.count_nonzero(core))
    return max(4 * total / area - 2, 1.0), 2.0 * layers


def _grown(mask: Mask, reach: int) -> Mask:
    """The mask and what lies within a square of `reach` pixels around it."""
    return _extreme(mask.view(np.uint8), reach, np.maximum) > 0


# Several of one digit -------------------------------------------------------


def _without_doubles(found: list[tuple[Candidate, int]]) -> list[Candidate]:
    """The best candidate of each place, of candidates with their levels.

    The larger of two, of which the other may be a part; but the finer level
    before the coarser one, where neighbours melt into one.
    """

    def rank(entry: tuple[Candidate, int]) -> float:
        candidate, level = entry
        return float(candidate.score * candidate.box.area**0.25 * _FINER**-level)

    kept: list[Candidate] = []
    for candidate, _ in sorted(found, key=rank, reverse=True):
        if not any(_same_place(candidate.box, other.box) for other in kept):
            kept.append(candidate)
    return kept


def _same_place(one: Box, other: Box) -> bool:
    smaller, larger = sorted((one.area, other.area))
    inside = _INSIDE if smaller > _SLIVER * larger else _SLIVER_INSIDE
    return one.iou(other) > _SAME_PLACE or one.common_area(other) > inside * smaller
