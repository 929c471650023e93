"""A short queue between two threads that either of them can end; knows nothing of what goes through."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Handover(Generic[T]):
    """What one thread `put`s another one iterates over.

    Args:
        capacity: how many may wait; 0 for any number.
        latest_only: where there is no room, drop what has waited longest,
            instead of holding up who puts.
    """

    def __init__(self, capacity: int, *, latest_only: bool = False) -> None:
        self._capacity = capacity
        self._latest_only = latest_only
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Hand over an item; False if nobody takes it any more."""
        with self._changed:
            while self._capacity and len(self._waiting) >= self._capacity and not self._ended:
                if self._latest_only:
                    self._waiting.popleft()
                else:
                    self._changed.wait()
            if self._ended:
                return False
            self._waiting.append(item)
            self._changed.notify_all()
            return True

    def end(self, error: BaseException | None = None) -> None:
        """No more follows; who takes gets what waits, and then the error, if there is one."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
                self._changed.notify_all()

    def leave(self) -> None:
        """Nobody takes any more; what waits is dropped."""
        with self._changed:
            self._ended, self._error = True, None
            self._waiting.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            while not self._waiting and not self._ended:
                self._changed.wait()
            if self._waiting:
                item = self._waiting.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration
