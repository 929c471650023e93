"""What is found in single pictures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

import client
from client.video import Box, find_digits

Pixels = npt.NDArray[np.uint8]
Picture = Callable[..., Pixels]

PLACES = [(number, 40 + 115 * (number % 5), 60 + 200 * (number // 5), 60) for number in range(10)]


def boxes(picture: Pixels) -> list[Box]:
    return [candidate.box for candidate in find_digits(picture)]


def near(left: int, top: int, size: int) -> Box:
    return Box(left, top, left + size, top + size)


@pytest.mark.parametrize(("paper", "ink"), [(230, 40), (30, 220), (150, 70), (90, 170)])
def test_ten_digits_are_found_where_they_are_and_read_from_their_crops(
    picture: Picture, server_address: str, paper: int, ink: int
) -> None:
    found = find_digits(picture(*PLACES, paper=paper, ink=ink))
    assert len(found) == 10
    with client.Client(server_address) as digits:
        predictions = digits.classify_batch([candidate.crop for candidate in found])
    right = 0
    for number, left, top, size in PLACES:
        [index] = [i for i, candidate in enumerate(found) if near(left, top, size).common_area(candidate.box)]
        box = found[index].box
        assert box.common_area(near(left - 12, top - 12, size + 24)) == box.area
        assert max(box.width, box.height) >= size - 4
        right += predictions[index].digit == number
    assert right >= 9


def test_a_shadow_over_the_paper_hides_nothing_and_adds_nothing(picture: Picture) -> None:
    shadow = np.linspace(240, 90, 640, dtype=np.float32)[None, :].repeat(480, axis=0)
    shadow[:, 320:] -= 20
    assert len(boxes(picture(*PLACES, paper=shadow, ink=20))) == 10


def test_dark_and_light_ink_are_found_side_by_side(picture: Picture) -> None:
    dark = picture(*PLACES[:5], paper=130, ink=30)
    both = picture(*PLACES[5:], paper=dark[:, :, 0], ink=230)
    assert len(boxes(both)) == 10


@pytest.mark.parametrize("size", [20, 40, 90, 180, 300])
def test_digits_of_all_sizes_are_found_once(picture: Picture, size: int) -> None:
    [box] = boxes(picture((3, 150, 100, size), shape=(600, 640)))
    assert abs(box.height - size) <= max(3, size // 12)
    assert abs(box.top - 100) <= max(3, size // 8)


def test_a_large_picture_is_searched_at_a_smaller_size_and_the_boxes_are_in_its_own_pixels(picture: Picture) -> None:
    [box] = boxes(picture((5, 2000, 1500, 400), shape=(2400, 3200)))
    assert abs(box.height - 400) < 24
    assert box.common_area(Box(1950, 1450, 2450, 1950)) == box.area


def test_digits_that_stand_close_together_are_all_found(picture: Picture) -> None:
    found = boxes(picture(*[(number, 60 + 62 * index, 100, 60) for index, number in enumerate((3, 8, 2, 0, 5, 4))]))
    assert len(found) == 6


def test_grey_pictures_are_taken_as_they_are(picture: Picture) -> None:
    coloured = picture(*PLACES)
    assert boxes(coloured) == boxes(coloured[:, :, 0])


def test_crops_are_bright_ink_on_black_with_paper_around(picture: Picture) -> None:
    for candidate in find_digits(picture(*PLACES)):
        crop = candidate.crop
        assert crop.dtype == np.uint8
        assert crop.max() == 255
        assert not np.concatenate([crop[0], crop[-1], crop[:, 0], crop[:, -1]]).any()


@pytest.mark.parametrize(
    "empty",
    [
        np.full((480, 640, 3), 200, np.uint8),
        np.tile(np.linspace(0, 255, 640).astype(np.uint8)[None, :, None], (480, 1, 3)),
        np.random.default_rng(1).integers(0, 256, (480, 640, 3), np.uint8),
        np.random.default_rng(2).integers(180, 200, (480, 640, 3), np.uint8),
        np.zeros((3, 3, 3), np.uint8),
    ],
    ids=["plain", "gradient", "noise", "grain", "tiny"],
)
def test_nothing_is_found_where_nothing_is(empty: Pixels) -> None:
    assert boxes(empty) == []


def test_lines_and_squares_are_no_digits() -> None:
    paper = np.full((480, 640, 3), 220, np.uint8)
    paper[::24] = paper[:, ::24] = 90
    assert boxes(paper) == []


def test_the_gap_between_two_digits_and_the_hole_in_one_are_none(picture: Picture) -> None:
    found = boxes(picture((0, 100, 100, 90), (8, 105, 204, 90), (0, 190, 102, 90)))
    assert len(found) == 3


def test_a_digit_that_is_cut_off_by_the_frame_is_left_out(picture: Picture) -> None:
    assert boxes(picture((3, 100, 100, 80))[130:, :]) == []


@pytest.mark.parametrize("side", [0, -1, 3000])
def test_a_working_side_out_of_range_is_refused(side: int) -> None:
    with pytest.raises(ValueError, match=f"the working side is 1 to 2800 pixels, not {side}"):
        find_digits(np.zeros((9, 9), np.uint8), working_side=side)
