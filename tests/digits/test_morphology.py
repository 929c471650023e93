"""Small image operations, beside SciPy's or beside the plainest way to compute them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from digits import morphology

ndimage = pytest.importorskip("scipy.ndimage")

Grey = npt.NDArray[np.uint8]

GREYS = npst.arrays(np.uint8, npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14))
SIZES = st.integers(0, 8).map(lambda half: 2 * half + 1)


@settings(max_examples=100, deadline=None)
@given(image=GREYS, size=SIZES)
def test_dilation_and_erosion_are_those_of_scipy_with_black_outside(image: Grey, size: int) -> None:
    for ours, theirs in (
        (morphology.dilate, ndimage.grey_dilation),
        (morphology.erode, ndimage.grey_erosion),
    ):
        expected = theirs(image, size=(size, size), mode="constant", cval=0)
        np.testing.assert_array_equal(ours(image, size), expected)


@settings(max_examples=100, deadline=None)
@given(image=GREYS, size=SIZES)
def test_an_opening_is_scipys_with_a_square_that_fits_in(image: Grey, size: int) -> None:
    fitting = [min(size, side) if min(size, side) % 2 else min(size, side) - 1 for side in image.shape]
    eroded = ndimage.grey_erosion(image, size=fitting, mode="constant", cval=0)
    expected = ndimage.grey_dilation(eroded, size=fitting, mode="constant", cval=0)
    np.testing.assert_array_equal(morphology.open(image, size), expected)


@settings(max_examples=60, deadline=None)
@given(image=GREYS, size=SIZES)
def test_an_opening_is_nowhere_brighter_and_opening_it_again_changes_nothing(image: Grey, size: int) -> None:
    opened = morphology.open(image, size)
    assert (opened <= image).all()
    np.testing.assert_array_equal(morphology.open(opened, size), opened)


def test_an_opening_leaves_a_gradient_and_takes_a_stroke_away() -> None:
    paper = np.broadcast_to(np.linspace(60, 200, 80).astype(np.uint8), (60, 80))
    picture = paper.copy()
    picture[20:40, 30:36] = 255
    opened = morphology.open(picture, 9)
    assert np.abs(opened[8:-8, 8:-8].astype(int) - paper[8:-8, 8:-8]).max() <= 16


@settings(max_examples=60, deadline=None)
@given(counts=npst.arrays(np.int64, 256, elements=st.integers(0, 50)))
def test_otsus_threshold_parts_the_classes_as_well_as_the_best_of_all(counts: npt.NDArray[np.int64]) -> None:
    levels = np.arange(256)

    def between(threshold: int) -> float:
        """Variance between the classes, times the square of their number."""
        low, high = counts[: threshold + 1], counts[threshold + 1 :]
        if not low.sum() or not high.sum():
            return 0.0
        apart = (low @ levels[: threshold + 1]) / low.sum() - (high @ levels[threshold + 1 :]) / high.sum()
        return float(low.sum() * high.sum() * apart**2)

    best = max(between(threshold) for threshold in range(256))
    assert between(morphology.otsu(counts)) == pytest.approx(best)


def test_otsus_threshold_lies_between_two_heaps() -> None:
    values = np.concatenate([np.full(900, 30), np.full(100, 200)])
    assert 30 <= morphology.otsu(np.bincount(values, minlength=256)) < 200


@settings(max_examples=100, deadline=None)
@given(values=npst.arrays(np.uint8, st.integers(1, 60)), percent=st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values: Grey, percent: int) -> None:
    expected = np.percentile(values, percent, method="inverted_cdf")
    assert morphology.percentile(values, percent) == expected


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("upright", [True, False])
def test_the_width_of_a_long_bar_is_measured(width: int, upright: bool) -> None:
    bar = np.zeros((20, 400), np.float32)
    bar[5 : 5 + width] = 1
    measured = morphology.stroke_width(bar.T if upright else bar)
    assert measured == pytest.approx(width, rel=0.05)


def test_the_width_of_a_slanting_bar_is_measured_to_a_quarter() -> None:
    rows, columns = np.mgrid[0:200, 0:200].astype(np.float32)
    across = (rows - columns) / math.sqrt(2)
    for softness in (1.0, 3.0):  # steps of pixels make a slanting outline longer than it is
        bar = np.clip((4 - np.abs(across)) / softness + 0.5, 0, 1)  # 8 wide
        assert morphology.stroke_width(bar) == pytest.approx(8, rel=0.25)


@settings(max_examples=60, deadline=None)
@given(mask=npst.arrays(np.bool_, npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14)))
def test_a_mask_is_as_wide_as_the_same_in_numbers(mask: npt.NDArray[np.bool_]) -> None:
    assert morphology.stroke_width(mask) == pytest.approx(morphology.stroke_width(mask.astype(np.float32)), rel=1e-4)


@pytest.mark.parametrize("radius", [-1.5, -1, -0.4, 0.4, 1, 1.5, 2.25])
def test_a_stroke_grows_by_its_radius_on_each_side_also_by_fractions(radius: float) -> None:
    bar = np.zeros((40, 30), np.uint8)
    bar[16:24] = 255
    grown = morphology.grow(bar, radius)[:, 15]
    assert float(grown.sum()) / 255 == pytest.approx(8 + 2 * radius, abs=0.02)


def test_smoothing_keeps_what_is_even_and_the_outermost_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 12)).astype(np.uint8)
    smoothed = morphology.smooth(image)
    expected = ndimage.convolve(image.astype(float), np.outer([1, 2, 1], [1, 2, 1]) / 16)
    np.testing.assert_allclose(smoothed[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        np.testing.assert_array_equal(smoothed[edge], image[edge])
    tiny = image[:2]
    np.testing.assert_array_equal(morphology.smooth(tiny), tiny)
