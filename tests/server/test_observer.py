"""Several observers as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from server.observer import Observer, Observers


class Heard(Observer):
    """Listens to two events, and remembers them."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        self.events.append((method, code, seconds))

    def batch_ended(
        self, rows: int, tokens: Sequence[Any], queue_seconds: Sequence[float], compute_seconds: float, failed: bool
    ) -> None:
        self.events.append((rows, *tokens, failed))


class Marking(Heard):
    """Has something come back with the batch."""

    def queued(self, rows: int) -> str:
        return f"{rows} rows"


def test_each_is_told_of_what_it_listens_to() -> None:
    first, second, third = Heard(), Marking(), Heard()
    both = Observers([Observers([first, second]), third])
    both.call_ended("a/B", code="OK", seconds=0.5)
    both.stream_opened()  # nobody listens
    token = both.queued(3)
    both.batch_ended(3, [token], [0.0], 0.1, failed=False)
    for one in (first, second, third):
        assert one.events == [("a/B", "OK", 0.5), (3, "3 rows", False)]


def test_only_one_may_have_something_come_back() -> None:
    with pytest.raises(ValueError, match="only one"):
        Observers([Marking(), Observers([Heard(), Marking()])])


def test_none_are_as_good_as_one_that_does_nothing() -> None:
    nobody = Observers([])
    nobody.frames_dropped(3)
    assert nobody.queued(1) is None
