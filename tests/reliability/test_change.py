"""What holds while servers, workers and weights come and go, with every answer checked."""

from __future__ import annotations

from collections.abc import Callable

BrokenRules = Callable[..., list[str]]


def test_a_rolling_restart_under_load_fails_no_call_of_the_sdk(broken_rules: BrokenRules) -> None:
    assert broken_rules("rolling", calls=500, restarts=2) == []


def test_streams_of_the_sdk_lose_and_double_no_frame_by_cut_connections_and_restarts(
    broken_rules: BrokenRules,
) -> None:
    assert broken_rules("resume", cuts=20, restarts=1) == []


def test_a_killed_worker_fails_no_call_of_the_sdk_and_metrics_add_up(broken_rules: BrokenRules) -> None:
    assert broken_rules("workers", kills=1, rounds=1) == []


def test_weights_exchanged_under_load_give_each_answer_by_one_version(broken_rules: BrokenRules) -> None:
    assert broken_rules("reload", reloads=6) == []


def test_weights_exchanged_under_load_are_those_of_all_workers(broken_rules: BrokenRules) -> None:
    assert broken_rules("reload", reloads=6, workers=2) == []
