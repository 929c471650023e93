"""Pictures that show no digit, for a model to learn to be unsure of.

Letters and signs from the fonts that come with matplotlib, scribbles, two digits
over or beside each other, digits turned or mirrored, blots, textures, noise and
blank paper. A model that is taught to spread its probabilities evenly over such
pictures also does so on others that it never saw: D. Hendrycks, M. Mazeika,
T. Dietterich, "Deep Anomaly Detection with Outlier Exposure", ICLR 2019.

Whole batches are made at once. Draws from torch's global CPU generator and
from nothing else. Knows nothing of training or networks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from digits.preprocessing import INK_SIDE, SIDE
from trainer.data import LabelledPixels
from trainer.handwriting import CURVE_POINTS, ink_of, smooth_curve

GLYPHS = "ACEFGHKLMNPRTUVWXYacdefhjkmnprtuvwxy&%#@?+=*<>$§ΓΔΘΛΞΠΣΦΨΩαγδεζηθλμξπφψωБДЖИЛФЦЧШЩЭЮЯ"
"""Without those that could be a digit as well, such as O, I, l, S, Z, q, g, b and B."""

FONTS = ("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono", "DejaVuSans-Bold")

TURNABLE = (2, 3, 4, 5, 7)
"""Digits that are none after a quarter turn."""

MIRRORABLE = (3, 4, 6, 7, 9)
"""Digits that are none in a mirror."""


def draw_outliers(count: int, digits: LabelledPixels) -> Tensor:
    """Return so many pictures without a digit, `uint8[n, 784]`, of all kinds that can be made, in equal parts.

    Args:
        digits: what some kinds are made of; those that need other digits than are there are left out.
    """
    possible = kinds_of(digits)
    kinds = torch.arange(count) % len(possible)
    made = torch.empty(count, SIDE * SIDE, dtype=torch.uint8)
    for number, name in enumerate(possible):
        rows = kinds == number
        made[rows] = KINDS[name](int(rows.sum()), digits)
    return made[torch.randperm(count)]


def kinds_of(digits: LabelledPixels) -> list[str]:
    """The names of the kinds that can be made of these digits; of all ten, all of `KINDS`."""
    there = set(digits.labels.tolist())
    needed = {
        "overlaid": len(there - {1}) >= 2,
        "side_by_side": len(there) >= 2,
        "turned": not there.isdisjoint(TURNABLE) and not there.isdisjoint(MIRRORABLE),
    }
    return [name for name in KINDS if needed.get(name, True)]


# Writing ----------------------------------------------------------------------


def letters(count: int, digits: LabelledPixels) -> Tensor:
    """Letters and signs of several scripts and fonts."""
    glyphs = _glyphs()
    return glyphs[torch.randint(len(glyphs), (count,))]


def scribbles(count: int, digits: LabelledPixels) -> Tensor:
    """One to three strokes of a pen through points anywhere."""
    pieces = torch.randint(1, 4, (count,))
    points = torch.empty(count, CURVE_POINTS, 2)
    for number in (1, 2, 3):
        rows = torch.nonzero(pieces == number)[:, 0]
        length = CURVE_POINTS // number
        for piece in range(number):
            points[rows, piece * length : (piece + 1) * length] = smooth_curve(torch.rand(len(rows), 5, 2), length)
    half = torch.exp(torch.rand(count) * 1.5) * 0.5  # half a pixel to two
    return ink_of(points * INK_SIDE + (SIDE - INK_SIDE) / 2, half, 0.5 + 0.4 * torch.rand(count))


# Digits that are none any more ------------------------------------------------


def overlaid(count: int, digits: LabelledPixels) -> Tensor:
    """Two digits over each other, neither of them a 1, which often adds nothing."""
    first, second = _pairs(count, digits[digits.labels != 1])
    moved = torch.randint(-3, 4, (2,)).tolist()
    return torch.maximum(first, second.roll(moved, (1, 2))).reshape(count, SIDE * SIDE)


def side_by_side(count: int, digits: LabelledPixels) -> Tensor:
    """Two digits beside each other, in the room of one."""
    first, second = (F.avg_pool2d(part[:, None].float(), 2)[:, 0] for part in _pairs(count, digits))
    made = torch.zeros(count, SIDE, SIDE)
    made[:, 7:21, 2:16] = first * 1.4
    made[:, 7:21, 12:26] = torch.maximum(made[:, 7:21, 12:26], second * 1.4)
    return made.clamp_max(255).to(torch.uint8).reshape(count, SIDE * SIDE)


def turned(count: int, digits: LabelledPixels) -> Tensor:
    """Digits after a quarter turn to either side, or in a mirror."""
    quarter = _some_of(digits, TURNABLE, count).rot90(1, (1, 2))
    quarter = torch.where((torch.rand(count) < 0.5)[:, None, None], quarter, quarter.rot90(2, (1, 2)))
    mirrored = _some_of(digits, MIRRORABLE, count).flip(2)
    return torch.where((torch.rand(count) < 0.5)[:, None, None], quarter, mirrored).reshape(count, SIDE * SIDE)


# Things and surfaces ------------------------------------------------------------


def blots(count: int, digits: LabelledPixels) -> Tensor:
    """Filled shapes with a surface, half of them the same on both sides, as clothes and shoes are."""
    knots = torch.randn(count, 1, 7, 7) - 1.5
    knots[:, :, 1:6, 1:6] += 2.2
    shape = F.interpolate(knots, size=(SIDE, SIDE), mode="bicubic", align_corners=True)[:, 0]
    shape = torch.where((torch.rand(count) < 0.5)[:, None, None], shape, (shape + shape.flip(2)) / 1.4)
    surface = _clouds(count, 9) * torch.rand(count, 1, 1)
    grey = (0.3 + 0.7 * torch.rand(count, 1, 1) + 0.4 * surface).clamp(0.1, 1)
    return _pixels((shape * 3).clamp(0, 1) * grey)


def textures(count: int, digits: LabelledPixels) -> Tensor:
    """Waves in one direction or two, fine or coarse, over all of the picture."""
    y, x = torch.meshgrid(torch.arange(SIDE) * 1.0, torch.arange(SIDE) * 1.0, indexing="ij")

    def waves() -> Tensor:
        angle, phase = torch.rand(2, count, 1, 1) * 6.3
        rate = 0.2 + 1.5 * torch.rand(count, 1, 1)
        return torch.sin(rate * (torch.cos(angle) * x + torch.sin(angle) * y) + phase)

    sharp = 0.5 + 4 * torch.rand(count, 1, 1)
    both = (torch.rand(count, 1, 1) < 0.5).float()
    return _pixels((waves() * (1 - both) + both * waves() * waves()) * sharp + 0.5)


def noise(count: int, digits: LabelledPixels) -> Tensor:
    """Clouds from as coarse as the picture to as fine as a pixel; sparse dots; nothing but one grey."""
    strength = 2 * torch.rand(count, 1, 1)
    level = torch.rand(count, 1, 1)
    kinds = torch.randint(6, (count,))[:, None, None]
    made = _clouds(count, SIDE) * strength + level
    made = torch.where(kinds == 1, _clouds(count, 12) * strength + level, made)
    made = torch.where(kinds == 2, _clouds(count, 5) * strength + level, made)
    made = torch.where(kinds == 3, (torch.rand(count, SIDE, SIDE) < 0.3 * level**2).float(), made)
    made = torch.where(kinds == 4, level * (torch.rand(count, 1, 1) < 0.7), made)
    return _pixels(made)


KINDS: dict[str, Callable[[int, LabelledPixels], Tensor]] = {
    make.__name__: make for make in (letters, scribbles, overlaid, side_by_side, turned, blots, textures, noise)
}
"""By name; each takes a number and digits of which `kinds_of` says that they will do, and returns `uint8[n, 784]`."""


# Tools --------------------------------------------------------------------------


def _pairs(count: int, digits: LabelledPixels) -> tuple[Tensor, Tensor]:
    """Two digits that are not the same, `uint8[n, 28, 28]` each; there are two different ones at least."""
    labels, order = digits.labels.sort()
    place = torch.randint(len(digits), (count,))
    begin, end = (torch.searchsorted(labels, labels[place], right=right) for right in (False, True))
    others = len(digits) - (end - begin)  # they follow the digit's own kind, around the end of the row
    other = (end + (torch.rand(count, dtype=torch.float64) * others).long()) % len(digits)
    images = digits.pixels.reshape(-1, SIDE, SIDE)
    return images[order[place]], images[order[other]]


def _some_of(digits: LabelledPixels, labels: tuple[int, ...], count: int) -> Tensor:
    rows = torch.nonzero(torch.isin(digits.labels, torch.tensor(labels)))[:, 0]
    return digits.pixels[rows[torch.randint(len(rows), (count,))]].reshape(count, SIDE, SIDE)


def _clouds(count: int, knots: int) -> Tensor:
    """Smooth noise of deviation 1 or less, `float32[n, 28, 28]`."""
    coarse = torch.randn(count, 1, knots, knots)
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0] * 0.6


def _pixels(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).reshape(-1, SIDE * SIDE)


def font_of(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of the fonts that come with matplotlib, by the name of its file, at so many pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


@functools.cache
def _glyphs() -> Tensor:
    """Every glyph in every font, laid out as digits are, `uint8[n, 784]`."""
    pictures = []
    for name in FONTS:
        font = font_of(name, 4 * INK_SIDE)
        for glyph in GLYPHS:
            left, top, right, bottom = font.getbbox(glyph)
            picture = Image.new("L", (round(right - left), round(bottom - top)))
            ImageDraw.Draw(picture).text((-left, -top), glyph, font=font, fill=255)
            scale = INK_SIDE / max(picture.size)
            size = [max(1, round(side * scale)) for side in picture.size]
            page = Image.new("L", (SIDE, SIDE))
            page.paste(
                picture.resize((size[0], size[1]), Image.Resampling.BOX), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2)
            )
            pictures.append(np.asarray(page).reshape(-1))
    return torch.from_numpy(np.stack(pictures))
