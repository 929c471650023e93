"""Other ways from a grey picture to pixels: plainer ones, and `to_pixels` with one of its steps left out.

The steps are taken out from here, by putting another constant or function in
the place of one of `digits`, so that the product carries no switches for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from PIL import Image

from digits import morphology, preprocessing, segmentation
from digits.ink import Ink, box_of
from digits.preprocessing import INK_SIDE, SIDE, to_pixels

Grey: TypeAlias = npt.NDArray[np.uint8]
Way: TypeAlias = Callable[[Grey], Grey]


# Plainer ways ---------------------------------------------------------------


def plain_resize(grey: Grey) -> Grey:
    """What the origin's transform does, once the picture has been brought to 28x28."""
    return np.asarray(Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def resize_inverted(grey: Grey) -> Grey:
    """The same of the negative, where the picture's border is bright."""
    return plain_resize(_ink_bright(grey))


def crop_and_center(grey: Grey) -> Grey:
    """What most write for MNIST: Otsu's threshold, the ink's box to 20 pixels, its centre of mass to the middle."""
    grey = _ink_bright(grey)
    threshold = morphology.otsu(np.bincount(grey.ravel(), minlength=256))
    ink = np.where(grey > threshold, grey, 0).astype(np.uint8)
    if not ink.any():
        return np.zeros((SIDE, SIDE), np.uint8)
    top, bottom, left, right = box_of(ink > 0)
    image = Image.fromarray(ink[top:bottom, left:right])
    scale = INK_SIDE / max(image.size)
    box = np.asarray(
        image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX)
    )
    weights = box / max(float(box.sum()), 1)
    y, x = float(weights.sum(1) @ np.arange(box.shape[0])), float(weights.sum(0) @ np.arange(box.shape[1]))
    row = min(max(round(SIDE / 2 - y), 0), SIDE - box.shape[0])
    column = min(max(round(SIDE / 2 - x), 0), SIDE - box.shape[1])
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[row : row + box.shape[0], column : column + box.shape[1]] = box
    return pixels


def _ink_bright(grey: Grey) -> Grey:
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return 255 - grey if float(np.median(border)) > 127 else grey


PLAINER: dict[str, Way] = {
    "to_pixels": to_pixels,
    "plain resize": plain_resize,
    "resize, negative by border": resize_inverted,
    "Otsu, crop, centre": crop_and_center,
}


# Steps left out -------------------------------------------------------------


def _nothing_is_plain(grey: Grey) -> None:
    """Every picture is searched."""


def _above_the_darkest(grey: Grey, window: int) -> Grey:
    """In place of `ink_strength`: the same paper everywhere."""
    above: Grey = grey - grey.min()
    return above


def _everything(choose: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(view: Any, threshold: int, weight: float) -> Any:
        choice = choose(view, threshold, weight)
        return choice and dataclasses.replace(choice, mask=view.strength > threshold)

    return chosen


def _nothing_is_clutter(parts: Any, heights: Any, widths: Any) -> npt.NDArray[np.bool_]:
    return np.zeros(parts.count, np.bool_)


def _one_polarity(choices: Callable[..., Any]) -> Callable[..., Any]:
    def those_of_bright_ink(view: Any) -> Any:
        return [] if view.is_dark else choices(view)

    return those_of_bright_ink


def _hard_edges(ink: Ink) -> Grey:
    top, bottom, left, right = ink.box
    return ink.mask[top:bottom, left:right].astype(np.uint8) * np.uint8(255)


def _upright(normalize: Way) -> Way:
    """Slant taken out by second moments before the strokes are made as wide as MNIST's."""

    def straightened(digit: Grey) -> Grey:
        values = digit / max(float(digit.sum()), 1)
        rows, columns = np.arange(digit.shape[0]), np.arange(digit.shape[1])
        y, x = float(values.sum(1) @ rows), float(values.sum(0) @ columns)
        along = float((values * (rows[:, None] - y) * (columns - x)).sum())
        slant = along / max(float(values.sum(1) @ (rows - y) ** 2), 1e-6)
        reach = math.ceil(abs(slant) * digit.shape[0]) + 1
        image = Image.fromarray(np.pad(digit, ((0, 0), (reach, reach))))
        moved = image.transform(
            image.size, Image.Transform.AFFINE, (1, slant, -slant * y, 0, 1, 0), Image.Resampling.BILINEAR
        )
        upright = np.asarray(moved)
        top, bottom, left, right = box_of(upright > 0)
        return normalize(upright[top:bottom, left:right])

    return straightened


_Patch: TypeAlias = tuple[Any, str, Any]

STEPS: dict[str, list[_Patch]] = {
    "all steps": [],
    "plain pictures searched too": [(segmentation, "find_plain_ink", _nothing_is_plain)],
    "paper not taken away": [(segmentation, "ink_strength", _above_the_darkest)],
    "without the wider paper window": [(segmentation, "PAPER_WINDOWS", segmentation.PAPER_WINDOWS[:1])],
    "without the second threshold": [(segmentation, "THRESHOLDS", segmentation.THRESHOLDS[:1])],
    "one polarity: the rarer is ink": [(segmentation, "_choices", _one_polarity(segmentation._choices))],
    "every piece kept": [(segmentation, "_choose", _everything(segmentation._choose))],
    "edges, lines, frames not known": [(segmentation, "_is_clutter", _nothing_is_clutter)],
    "small digits not looked at again": [(segmentation, "SMALL", 0.0)],
    "hard edges": [(preprocessing, "_soften", _hard_edges)],
    "thin strokes left thin": [(preprocessing, "THINNEST", 0.0)],
    "thick strokes left thick": [(preprocessing, "THICKEST", math.inf)],
    "strokes left as they are": [(preprocessing, "THINNEST", 0.0), (preprocessing, "THICKEST", math.inf)],
    "and slant taken out": [(preprocessing, "_normalize_strokes", _upright(preprocessing._normalize_strokes))],
}
"""What each row of the table puts in the place of what; the last adds a step that `to_pixels` does not have."""


@contextmanager
def changed(step: str) -> Iterator[None]:
    """`to_pixels` works as a row of `STEPS` says, as long as this is open."""
    with ExitStack() as patches:
        for module, name, value in STEPS[step]:
            patches.enter_context(patch.object(module, name, value))
        yield
