"""Plain pictures need no search: what is found in them, and what is left to the search."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from digits import segmentation
from digits.plain import find_plain_ink
from digits.preprocessing import preprocess, to_pixels

Grey = npt.NDArray[np.uint8]


def seven(side: int = 28, paper: int = 255, ink: int = 0, large: int = 1120) -> Grey:
    """A seven in the middle, half as high as the picture, with soft edges."""
    image = Image.new("L", (large, large), paper)
    corners = [(0.35 * large, 0.28 * large), (0.65 * large, 0.28 * large), (0.45 * large, 0.72 * large)]
    ImageDraw.Draw(image).line(corners, fill=ink, width=large // 12, joint="curve")
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def changed(place: Any, value: int) -> Grey:
    picture = seven().copy()
    picture[place] = value
    return picture


def mean_difference(a: Grey, b: Grey) -> float:
    """In grey levels of 255, after the best shift of up to a pixel."""
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return min(float(np.abs(np.roll(a, shift, (0, 1)).astype(int) - b).mean()) for shift in shifts)


@pytest.mark.parametrize("side", [20, 28, 64, 144])
@pytest.mark.parametrize(("paper", "ink"), [(255, 0), (0, 255), (230, 60), (40, 200)])
def test_what_is_nearer_to_ink_than_to_paper_is_the_digit(side: int, paper: int, ink: int) -> None:
    picture = seven(side, paper, ink)
    found = find_plain_ink(picture)
    assert found is not None
    assert found.is_dark == (ink < paper)
    assert found.is_alone
    nearer = np.abs(picture.astype(int) - paper) > abs(paper - ink) // 2
    np.testing.assert_array_equal(found.mask, nearer)
    rows, columns = np.flatnonzero(nearer.any(axis=1)), np.flatnonzero(nearer.any(axis=0))
    assert found.box == (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)


@pytest.mark.parametrize(("paper", "ink"), [(255, 0), (230, 60)])
def test_a_plain_picture_and_its_negative_give_the_same(paper: int, ink: int) -> None:
    picture = seven(28, paper, ink)
    np.testing.assert_array_equal(to_pixels(picture), to_pixels(255 - picture))


def test_a_little_unevenness_is_paper() -> None:
    grain = np.random.default_rng(0).integers(-12, 13, (28, 28))
    assert find_plain_ink(np.clip(seven(28, 225, 30) + grain, 0, 255).astype(np.uint8)) is not None


NOT_PLAIN: dict[str, Grey] = {
    "blank": np.full((28, 28), 255, np.uint8),
    "a shadow": np.minimum(seven(), np.linspace(255, 140, 28).astype(np.uint8)),
    "a faint line across": changed(np.s_[24, :], 150),
    "a faint line inside": changed(np.s_[24, 4:24], 150),
    "a speck apart": changed(np.s_[25, 25], 0),
    "another piece beside it": changed(np.s_[10:20, 2:4], 0),
    "ink at the edge": changed(np.s_[:8, 10:13], 0),
    "something brighter, too": np.where(np.eye(28) > 0, 255, seven(28, 150, 0)).astype(np.uint8),
    "a cut-out on other paper": np.where(np.pad(np.ones((24, 24)), 2) > 0, np.minimum(seven(), 160), 255).astype(
        np.uint8
    ),
    "a few pixels": seven()[7:21, 7:21][::2, ::2],
}
frame = changed(np.s_[2:26, 2:26], 0)
frame[3:25, 3:25] = seven()[3:25, 3:25]
NOT_PLAIN["a frame"] = frame


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_is_left_to_the_search(name: str) -> None:
    assert find_plain_ink(NOT_PLAIN[name]) is None
    assert find_plain_ink(255 - NOT_PLAIN[name]) is None


@pytest.mark.parametrize("side", [28, 100, 400, 1000])
def test_the_search_would_have_given_nearly_the_same(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = seven(side)
    stages = preprocess(picture)
    assert stages.ink is not None
    assert stages.ink.is_alone
    monkeypatch.setattr(segmentation, "find_plain_ink", lambda grey: None)
    searched = preprocess(picture)
    assert searched.ink is not None
    assert not searched.ink.is_alone
    assert mean_difference(stages.pixels, searched.pixels) < 8


def test_a_small_digit_on_a_large_plain_page_keeps_its_detail() -> None:
    page = np.full((1200, 1000), 255, np.uint8)
    page[700:850, 300:450] = seven(150)
    stages = preprocess(page)
    assert stages.ink is not None
    assert stages.ink.is_alone
    assert stages.ink.mask.sum() > 1000
    assert mean_difference(stages.pixels, to_pixels(seven(150))) < 4
