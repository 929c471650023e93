"""The digit is found, and nothing else: what is chosen is compared with the ink that was drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFilter

from digits.preprocessing import InvalidImage, preprocess, to_pixels
from digits.segmentation import find_ink

Grey = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

HEIGHT, WIDTH = 150, 180


def drawn(height: int = HEIGHT, width: int = WIDTH, thick: int = 9, at: tuple[float, float] = (0.5, 0.5)) -> Floats:
    """Ink of a five, 0 to 1, about 80 pixels high with a pen of so many pixels, its middle `at` y and x."""
    middle_y, middle_x = at[0] * height, at[1] * width
    body = [(28, -36), (-20, -36), (-22, -4), (5, -10), (24, 6), (18, 30), (-4, 38), (-26, 30)]
    image = Image.new("L", (4 * width, 4 * height))
    points = [(4 * (middle_x + x), 4 * (middle_y + y)) for x, y in body]
    ImageDraw.Draw(image).line(points, fill=255, width=4 * thick, joint="curve")
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)) / 255


def on(paper: Floats | float, ink: Floats, value: float = 40) -> Grey:
    picture = paper * (1 - ink) + value * ink
    return np.clip(picture + np.random.default_rng(0).normal(0, 2, ink.shape), 0, 255).astype(np.uint8)


ROWS, COLUMNS = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
FIVE = drawn()


def shadow() -> Grey:
    return on(np.where(COLUMNS + 0.1 * ROWS < 98, 220.0, 140.0), FIVE)


def gradient() -> Grey:
    return on(240 - 0.7 * COLUMNS - 0.2 * ROWS, FIVE, 30)


def lined() -> Grey:
    return on(np.where(ROWS % 30 < 1, 170.0, 225.0), FIVE)


def squared() -> Grey:
    return on(np.where((ROWS % 25 < 1) | (COLUMNS % 25 < 1), 180.0, 225.0), FIVE)


def tilted_squares() -> Grey:
    down, across = ROWS + 0.08 * COLUMNS, COLUMNS - 0.08 * ROWS
    return on(np.where((down % 25 < 1) | (across % 25 < 1), 180.0, 225.0), FIVE)


def edge_of_a_table() -> Grey:
    return on(np.where(ROWS + 0.05 * COLUMNS > 140, 50.0, 225.0), FIVE)


def frame() -> Grey:
    lined_in = np.zeros((HEIGHT, WIDTH))
    lined_in[6:9, 6:-6] = lined_in[-9:-6, 6:-6] = lined_in[6:-6, 6:9] = lined_in[6:-6, -9:-6] = 1
    return on(np.where(lined_in > 0, 90.0, 240.0), FIVE)


def neighbours_cut_by_the_border() -> Grey:
    others = np.maximum(drawn(at=(0.5, -0.05)), drawn(at=(0.45, 1.06)))
    return on(225, np.maximum(FIVE, others))


def specks() -> Grey:
    dots = np.zeros((HEIGHT, WIDTH))
    for y, x in [(10, 12), (20, 150), (130, 20), (140, 170), (75, 10), (12, 90)]:
        dots[np.hypot(ROWS - y, COLUMNS - x) < 2.5] = 1
    return on(225, np.maximum(FIVE, dots))


def pencil() -> Grey:
    return on(215, FIVE, 165)


def out_of_focus() -> Grey:
    return np.asarray(Image.fromarray(on(225, FIVE)).filter(ImageFilter.GaussianBlur(2)))


def chalk() -> Grey:
    return on(35, FIVE, 220)


PICTURES: dict[str, Callable[[], Grey]] = {
    make.__name__.replace("_", " "): make
    for make in (
        shadow,
        gradient,
        lined,
        squared,
        tilted_squares,
        edge_of_a_table,
        frame,
        neighbours_cut_by_the_border,
        specks,
        pencil,
        out_of_focus,
        chalk,
    )
}


def overlap(found: npt.NDArray[np.bool_], ink: Floats) -> float:
    """Intersection over union, at the scale of what was found."""
    height, width = found.shape
    scaled = Image.fromarray((ink * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BOX)
    known = np.asarray(scaled) > 100
    return float((found & known).sum() / (found | known).sum())


def mean_difference(a: Grey, b: Grey) -> float:
    """In grey levels of 255, after the best shift of up to a pixel."""
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return min(float(np.abs(np.roll(a, shift, (0, 1)).astype(int) - b).mean()) for shift in shifts)


@pytest.mark.parametrize("name", PICTURES)
def test_the_ink_that_was_drawn_is_found(name: str) -> None:
    ink = find_ink(PICTURES[name]())
    assert ink is not None
    assert ink.is_dark == (name != "chalk")
    assert overlap(ink.mask, FIVE) > 0.75


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_are_nearly_those_of_the_clean_drawing(name: str) -> None:
    clean = to_pixels((FIVE * 255).astype(np.uint8))
    assert mean_difference(to_pixels(PICTURES[name]()), clean) < 18  # of the same in a mirror it is 27


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_and_its_negative_give_the_same(name: str) -> None:
    picture = PICTURES[name]()
    np.testing.assert_array_equal(to_pixels(255 - picture), to_pixels(picture))
    ink, other = find_ink(picture), find_ink(255 - picture)
    assert ink is not None
    assert other is not None
    assert ink.is_dark != other.is_dark


@pytest.mark.parametrize("side", [600, 1500])
def test_a_digit_that_is_small_beside_its_page_is_looked_at_from_nearer(side: int) -> None:
    page = np.full((side, side), 230, np.uint8)
    page[100 : 100 + HEIGHT, 200 : 200 + WIDTH] = on(230, FIVE)
    ink = find_ink(page)
    assert ink is not None
    assert max(ink.mask.shape) > 100
    assert ink.mask.mean() > 0.05
    assert mean_difference(to_pixels(page), to_pixels(on(230, FIVE))) < 6


@pytest.mark.parametrize("thick", [14, 20])
@pytest.mark.parametrize("margin", [1, 4])
def test_thick_strokes_that_all_but_fill_the_picture_are_ink(thick: int, margin: int) -> None:
    five = drawn(thick=thick)
    rows, columns = np.flatnonzero(five.any(axis=1)), np.flatnonzero(five.any(axis=0))
    close = np.s_[rows[0] - margin : rows[-1] + 1 + margin, columns[0] - margin : columns[-1] + 1 + margin]
    ink = find_ink(on(225, five)[close])
    assert ink is not None
    assert ink.is_dark
    assert overlap(ink.mask, five[close]) > 0.75


def test_a_bar_that_does_not_touch_belongs_to_its_digit() -> None:
    bar = np.zeros((HEIGHT, WIDTH))
    bar[22:30, 66:120] = 1  # some pixels above the five
    ink = find_ink(on(225, np.maximum(FIVE, bar)))
    assert ink is not None
    assert overlap(ink.mask, np.maximum(FIVE, bar)) > 0.75


def test_the_stages_show_where_the_ink_was_found() -> None:
    stages = preprocess(lined())
    assert stages.ink is not None
    assert stages.ink.picture.shape == stages.ink.strength.shape == stages.ink.mask.shape
    assert stages.ink.strength[stages.ink.mask].min() > stages.ink.threshold
    np.testing.assert_array_equal(stages.pixels, to_pixels(lined()))


@pytest.mark.parametrize("value", [0, 128, 255])
def test_in_even_paper_there_is_no_ink(value: int) -> None:
    blank = np.full((100, 100), value, np.uint8)
    assert find_ink(blank) is None
    with pytest.raises(InvalidImage, match="contrast"):
        to_pixels(blank)


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (4, 900), (900, 5), (6, 2000), (28, 28), (144, 144), (200, 90)])
@pytest.mark.parametrize("kind", ["noise", "black and white noise", "one pixel", "rows", "columns", "checkerboard"])
def test_whatever_has_no_digit_gives_pixels_or_invalid_image(shape: tuple[int, int], kind: str) -> None:
    random = np.random.default_rng(0)
    picture = {
        "noise": random.integers(0, 256, shape),
        "black and white noise": random.integers(0, 2, shape) * 255,
        "one pixel": (np.arange(shape[0] * shape[1]).reshape(shape) == shape[1] + 1) * 255,
        "rows": np.broadcast_to(random.integers(0, 256, (shape[0], 1)), shape),
        "columns": np.broadcast_to(random.integers(0, 256, (1, shape[1])), shape),
        "checkerboard": np.indices(shape).sum(axis=0) % 2 * 255,
    }[kind].astype(np.uint8)
    for image in (picture, 255 - picture):
        try:
            pixels = to_pixels(image)
        except InvalidImage:
            continue
        assert pixels.shape == (28, 28)
        assert pixels.max() == 255


@pytest.mark.parametrize("rows", [4, 7, 10])
def test_a_speck_in_a_long_strip_is_ink(rows: int) -> None:
    """From nearer there is no paper around it any more."""
    strip = np.zeros((rows, 2400), np.uint8)
    strip[:, 700:1400] = 180
    assert to_pixels(strip).max() == 255
