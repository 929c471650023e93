"""What holds under load and faults, with real server processes and every answer checked.

Memory has wide limits here: what a short run shows is mostly how it begins. The
programs themselves run for longer and have narrow ones.
"""

from __future__ import annotations

from collections.abc import Callable

BrokenRules = Callable[..., list[str]]

WIDE = 0.5


def test_behind_a_stalled_model_what_is_too_late_or_cancelled_is_not_computed(broken_rules: BrokenRules) -> None:
    assert broken_rules("deadlines", rounds=1) == []


def test_calls_cancelled_at_random_moments_harm_no_others_and_leave_nothing_behind(broken_rules: BrokenRules) -> None:
    assert broken_rules("cancellation", calls=600, memory_limit=WIDE) == []


def test_three_times_the_load_is_refused_with_a_hint_and_health_answers_all_the_while(
    broken_rules: BrokenRules,
) -> None:
    assert broken_rules("overload", seconds=1.0, images=256) == []


def test_streams_that_are_never_read_left_early_or_greedy_harm_no_others(broken_rules: BrokenRules) -> None:
    assert broken_rules("streams", seconds=3.0, rounds=1, frames=3_000, memory_limit=WIDE) == []


def test_live_video_that_outruns_the_server_gets_its_newest_frame_answered(broken_rules: BrokenRules) -> None:
    assert broken_rules("latest_only", messages=100) == []
