"""What the server tells those who watch it: metrics, traces, tests.

The base class ignores everything, so an observer overrides what it wants to
know. All methods are called on the event loop, in the middle of the work: they
have to be quick, and they must not raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Observer:
    """Watches and does nothing."""

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        """A call of `package.Service/Method` ended with a status code's name, `OK` among them, after so long."""

    def stream_opened(self) -> None:
        """A `StreamClassify` (or `ModelStreamInfer`) was accepted."""

    def stream_closed(self) -> None:
        """It is gone, however it ended."""

    def frames_dropped(self, frames: int) -> None:
        """Frames of a `latest_only` stream were overtaken by newer ones."""

    def rejected(self, reason: str, rows: int) -> None:
        """Rows were refused on arrival: `queue_full`, `decoder_full` or `closing`."""

    def queued(self, rows: int) -> Any:
        """An item of so many rows entered the queue; what is returned comes back with its batch."""

    def queue_changed(self, rows: int) -> None:
        """So many rows wait now."""

    def dropped(self, reason: str, rows: int) -> None:
        """Rows left the queue without being computed: `expired` or `cancelled`."""

    def batch_ended(
        self, rows: int, tokens: Sequence[Any], queue_seconds: Sequence[float], compute_seconds: float, failed: bool
    ) -> None:
        """A batch was computed just now; of each of its items, what `queued` returned and how long it waited."""

    def model_served(self, version: str) -> None:
        """The next batch is computed by this model."""

    def reload_ended(self, outcome: str) -> None:
        """New weights were asked for: `served`, `refused`, `unchanged` or `rolled_back`."""

    def health_changed(self, serving: bool) -> None:
        """Health says SERVING, or no longer."""


class Observers(Observer):
    """Several as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        for observer in self._observers:
            observer.call_ended(method, code, seconds)

    def stream_opened(self) -> None:
        for observer in self._observers:
            observer.stream_opened()

    def stream_closed(self) -> None:
        for observer in self._observers:
            observer.stream_closed()

    def frames_dropped(self, frames: int) -> None:
        for observer in self._observers:
            observer.frames_dropped(frames)

    def rejected(self, reason: str, rows: int) -> None:
        for observer in self._observers:
            observer.rejected(reason, rows)

    def queued(self, rows: int) -> tuple[Any, ...]:
        return tuple(observer.queued(rows) for observer in self._observers)

    def queue_changed(self, rows: int) -> None:
        for observer in self._observers:
            observer.queue_changed(rows)

    def dropped(self, reason: str, rows: int) -> None:
        for observer in self._observers:
            observer.dropped(reason, rows)

    def batch_ended(
        self, rows: int, tokens: Sequence[Any], queue_seconds: Sequence[float], compute_seconds: float, failed: bool
    ) -> None:
        for index, observer in enumerate(self._observers):
            observer.batch_ended(rows, [token[index] for token in tokens], queue_seconds, compute_seconds, failed)

    def model_served(self, version: str) -> None:
        for observer in self._observers:
            observer.model_served(version)

    def reload_ended(self, outcome: str) -> None:
        for observer in self._observers:
            observer.reload_ended(outcome)

    def health_changed(self, serving: bool) -> None:
        for observer in self._observers:
            observer.health_changed(serving)
