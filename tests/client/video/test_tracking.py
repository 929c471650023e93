"""Tracks over made-up sightings: when digits appear, stay, change and leave."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest

from client.video import Box, Digit, Sighting, Smoothing, Tracker


def sight(
    digit: int, left: int = 100, top: int = 100, *, size: int = 50, sure: float = 0.97, score: float = 1.0
) -> Sighting:
    probabilities = np.full(10, (1 - sure) / 9, np.float32)
    probabilities[digit] = sure
    return Sighting(Box(left, top, left + size, top + size), score, probabilities)


def follow(frames: Iterable[list[Sighting]], *, fps: float = 25, tracker: Tracker | None = None) -> list[list[Digit]]:
    tracker = tracker or Tracker()
    return [tracker.update(index / fps, sightings) for index, sightings in enumerate(frames)]


def shown(frames: list[list[Digit]]) -> list[list[int]]:
    return [[digit.digit for digit in frame] for frame in frames]


def test_a_digit_appears_after_a_quarter_of_a_second_and_stays() -> None:
    frames = follow([[sight(7)]] * 50)
    first = next(index for index, digits in enumerate(frames) if digits)
    assert 0.25 <= first / 25 <= 0.3
    assert all([digit.digit for digit in digits] == [7] for digits in frames[first:])
    assert {digit.track for digits in frames for digit in digits} == {1}


def test_what_flickers_up_is_never_shown() -> None:
    assert not any(follow([[sight(7)], [sight(7)], *[[]] * 10] * 5))


def test_at_one_frame_a_second_two_sightings_are_enough() -> None:
    assert shown(follow([[sight(4)]] * 3, fps=1)) == [[], [4], [4]]


def test_a_short_gap_is_bridged_and_marked_as_not_seen() -> None:
    frames = follow([[sight(7)]] * 20 + [[]] * 6 + [[sight(7)]] * 10)
    assert all(len(digits) == 1 for digits in frames[10:])
    assert [digits[0].seen for digits in frames[18:28]] == [True] * 2 + [False] * 6 + [True] * 2
    assert {digit.track for digits in frames for digit in digits} == {1}


def test_a_digit_that_left_is_gone_within_half_a_second_and_comes_back_as_another_track() -> None:
    frames = follow([[sight(7)]] * 20 + [[]] * 15 + [[sight(7)]] * 20)
    assert frames[20 + 12] == []
    assert {digit.track for digits in frames[40:] for digit in digits} == {2}


def test_a_model_of_other_classes_begins_anew_with_the_digit_that_is_followed() -> None:
    def letter(number: int) -> Sighting:
        probabilities = np.full(26, 0.03 / 25, np.float32)
        probabilities[number] = 0.97
        return Sighting(Box(100, 100, 150, 150), 1.0, probabilities)

    frames = follow([[sight(7)]] * 20 + [[letter(25)]] * 10 + [[sight(3)]] * 10)
    assert [digits[0].digit for digits in frames[10:]] == [7] * 10 + [25] * 10 + [3] * 10
    assert [len(digits[0].probabilities) for digits in frames[10:]] == [10] * 10 + [26] * 10 + [10] * 10
    assert {digit.track for digits in frames for digit in digits} == {1}
    for (digit,) in frames[10:]:
        assert digit.confidence == float(digit.probabilities[digit.digit]) > 0.9


def test_single_misreadings_are_outvoted() -> None:
    frames = [[sight(1 if index % 4 == 3 else 7)] for index in range(60)]
    assert {digit.digit for digits in follow(frames) for digit in digits} == {7}


def test_a_digit_that_is_written_on_becomes_the_other_one_once_and_for_all() -> None:
    frames = shown(follow([[sight(1)]] * 25 + [[sight(4)]] * 40))
    changes = [(before, after) for before, after in pairwise(frames) if before != after]
    assert changes == [([], [1]), ([1], [4])]


def test_a_change_is_not_shown_before_it_has_lasted() -> None:
    frames = shown(follow([[sight(1)]] * 25 + [[sight(4)]] * 40))
    assert (frames.index([4]) - 25) / 25 >= 0.2


def test_clutter_that_persists_but_does_not_look_like_ink_is_not_shown() -> None:
    assert not any(follow([[sight(1, score=0.3)]] * 100))


def test_clutter_that_no_digit_fits_is_not_shown() -> None:
    assert not any(follow([[sight(1, sure=0.35)]] * 100))


def test_moving_digits_keep_their_tracks_also_fast_and_small() -> None:
    frames = [[sight(3, 20 + 9 * index, 100, size=24), sight(5, 600 - 9 * index, 160, size=24)] for index in range(60)]
    result = follow(frames)
    assert {(digit.track, digit.digit) for digits in result for digit in digits} == {(1, 3), (2, 5)}
    for sightings, digits in zip(frames[15:], result[15:], strict=True):
        assert all(sighting.box.iou(digit.box) > 0.6 for sighting, digit in zip(sightings, digits, strict=True))


def test_a_digit_keeps_its_track_while_it_is_drawn() -> None:
    frames = [
        [Sighting(Box(100, 100, 120 + index, 130 + 2 * index), 1.0, sight(2).probabilities)] for index in range(40)
    ]
    result = follow(frames)
    assert {digit.track for digits in result for digit in digits} == {1}
    assert result[-1][0].box.iou(frames[-1][0].box) > 0.85


def test_two_digits_beside_each_other_are_two_tracks() -> None:
    frames = follow([[sight(3, 100), sight(3, 155)]] * 30)
    assert [digit.track for digit in frames[-1]] == [1, 2]


def test_the_order_of_the_sightings_does_not_matter() -> None:
    forth = follow([[sight(3, 100), sight(8, 300)]] * 30)
    mixed = follow([[sight(3, 100), sight(8, 300)], [sight(8, 300), sight(3, 100)]] * 15)
    assert shown(forth)[-1] == shown(mixed)[-1] == [3, 8]


def test_probabilities_are_smoothed_sum_to_one_and_are_read_only() -> None:
    [digit] = follow([[sight(7, sure=0.9)]] * 30)[-1]
    assert digit.probabilities.sum() == pytest.approx(1)
    assert digit.confidence == digit.probabilities[7] == digit.probabilities.max()
    with pytest.raises(ValueError, match="read-only"):
        digit.probabilities[0] = 1


def test_a_patient_tracker_waits_longer() -> None:
    frames = follow([[sight(7)]] * 60, tracker=Tracker(Smoothing(appear=1.0)))
    assert next(index for index, digits in enumerate(frames) if digits) == 25


def test_time_does_not_run_backwards() -> None:
    tracker = Tracker()
    tracker.update(2.0, [])
    with pytest.raises(ValueError, match="1 s is before 2 s"):
        tracker.update(1.0, [])
