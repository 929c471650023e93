"""What holds beside hostile input, and over many calls of every kind."""

from __future__ import annotations

from collections.abc import Callable

BrokenRules = Callable[..., list[str]]

WIDE = 0.5
"""Short runs say little of memory."""


def test_hostile_messages_files_and_connections_harm_no_neighbours(broken_rules: BrokenRules) -> None:
    assert broken_rules("fuzz", messages=4_000, memory_limit=WIDE) == []


def test_calls_through_every_door_with_cancellations_new_weights_and_restarts_between_are_answered_rightly(
    broken_rules: BrokenRules,
) -> None:
    assert broken_rules("soak", calls=4_000, parts=2, memory_limit=WIDE) == []
