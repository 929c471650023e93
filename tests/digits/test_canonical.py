"""What counts as an image that already is as MNIST's are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from digits.canonical import are_canonical, is_canonical, may_be_canonical
from digits.preprocessing import to_pixels

GreyImage = npt.NDArray[np.uint8]


def by_the_book(grey: GreyImage) -> bool:
    """The rules, written down without a thought for speed."""
    inked = np.argwhere(grey)
    if grey.max() < 254:
        return False
    longer = (inked.max(axis=0) - inked.min(axis=0)).max() + 1
    weights = grey[tuple(inked.T)].astype(np.float64)
    center = (inked * weights[:, None]).sum(axis=0) / weights.sum()
    return bool(longer in (19, 20) and (center >= 13.4).all() and (center <= 14.6).all())


@st.composite
def nearly_canonical(draw: st.DrawFn) -> GreyImage:
    """Noise in a box near 20x20, near the middle, peak near 254: every rule holds for some, not for others."""
    height, width = draw(st.integers(1, 22)), draw(st.integers(17, 22))
    top = draw(st.integers(0, 28 - height))
    left = draw(st.integers(2, 28 - width))
    box = np.frombuffer(draw(st.binary(min_size=height * width, max_size=height * width)), np.uint8)
    image = np.zeros((28, 28), np.uint8)
    image[top : top + height, left : left + width] = box.reshape(height, width)
    image[top, left] = draw(st.sampled_from([0, 1, 253, 254, 255]))
    image[top + height - 1, left + width - 1] = draw(st.sampled_from([0, 1, 253, 254, 255]))
    return image.T.copy() if draw(st.booleans()) else image


@given(st.lists(nearly_canonical(), max_size=5))
@example([])
@example([np.zeros((28, 28), np.uint8), np.full((28, 28), 255, np.uint8)])
def test_one_image_and_many_are_judged_by_the_same_rules(images: list[GreyImage]) -> None:
    expected = [by_the_book(image) for image in images]
    assert [is_canonical(image) for image in images] == expected
    decided = are_canonical(np.array(images, np.uint8).reshape(-1, 28, 28))
    assert decided.dtype == np.bool_
    assert decided.tolist() == expected


@given(nearly_canonical())
def test_at_a_glance_no_canonical_image_is_missed(image: GreyImage) -> None:
    glanced = may_be_canonical(image)
    assert glanced == image.tobytes() or (glanced is None and not by_the_book(image))


@pytest.mark.parametrize("shape", [(28, 27), (27, 28), (56, 14), (784,), (28, 28, 1)])
def test_at_a_glance_other_shapes_are_nothing(shape: tuple[int, ...]) -> None:
    assert may_be_canonical(np.full(shape, 255, np.uint8)) is None


@given(nearly_canonical(), st.sampled_from(["C", "F", "strided"]))
def test_the_layout_in_memory_does_not_matter(image: GreyImage, layout: Any) -> None:
    laid_out = np.repeat(image, 2, axis=1)[:, ::2] if layout == "strided" else np.array(image, order=layout)
    assert is_canonical(laid_out) == by_the_book(image)
    assert are_canonical(np.stack([laid_out] * 2)).tolist() == [by_the_book(image)] * 2
    assert are_canonical(np.broadcast_to(laid_out, (3, 28, 28))).tolist() == [by_the_book(image)] * 3


def test_a_digit_is_canonical_and_moved_or_dimmed_or_cropped_it_is_not(
    golden: tuple[npt.NDArray[np.uint8], list[int]],
) -> None:
    digits = golden[0].reshape(-1, 28, 28)
    cropped = digits.copy()
    cropped[:, :7] = 0
    cropped[:, -7:] = 0
    cropped[:, :, :7] = 0
    cropped[:, :, -7:] = 0
    assert are_canonical(digits).all()
    assert not are_canonical(np.roll(digits, 2, axis=1)).any()
    assert not are_canonical(np.roll(digits, -2, axis=2)).any()
    assert not are_canonical(np.minimum(digits, 253)).any()
    assert not are_canonical(cropped).any()


@pytest.mark.parametrize("shape", [(27, 28), (28, 27), (56, 14), (784, 1), (1, 784), (4, 4)])
def test_another_size_is_not_canonical(shape: tuple[int, int]) -> None:
    assert not is_canonical(np.full(shape, 255, np.uint8))


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_every_image_of_mnist_is_canonical(mnist: dict[str, npt.NDArray[np.uint8]], part: str) -> None:
    images = mnist[f"{part}-images"].reshape(-1, 28, 28)
    assert are_canonical(images).all()
    assert all(map(is_canonical, images))


def test_a_canonical_array_passes_unchanged_and_is_not_the_callers_own_memory(
    golden: tuple[npt.NDArray[np.uint8], list[int]],
) -> None:
    digit = golden[0][3].reshape(28, 28)
    pixels = to_pixels(digit)
    np.testing.assert_array_equal(pixels, digit)
    assert not np.shares_memory(pixels, digit)
    assert pixels.flags.c_contiguous
