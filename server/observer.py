"""What the server tells those who watch it: metrics, traces, tests.

The base class ignores everything, so an observer overrides what it wants to
know. All methods are called on the event loop, in the middle of the work: they
have to be quick, and they must not raise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

HttpSpan: TypeAlias = Callable[[str, str, Mapping[str, str]], AbstractContextManager[Callable[[int], None]]]
"""Watches a request over plain HTTP, in a `with`: takes its method, path and headers, gives what is to be told the
status of the answer."""


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
    """Several as one; who does not listen to an event costs it nothing."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        """Take them in the order in which they are told.

        Raises:
            ValueError: several of them return something from `queued`; only one can get it back.
        """
        for event in (name for name in vars(Observer) if not name.startswith("_")):
            listeners = [listener for observer in observers if (listener := _listener(observer, event)) is not None]
            if event == "queued" and len(listeners) > 1:
                raise ValueError("only one observer can have something come back with a batch")
            setattr(self, event, listeners[0] if len(listeners) == 1 else _to_all(listeners))


def _listener(observer: Observer, event: str) -> Callable[..., Any] | None:
    """The observer's method for an event, unless it is one that does nothing."""
    method: Callable[..., Any] = getattr(observer, event)
    return None if method is _nothing or getattr(method, "__func__", None) is getattr(Observer, event) else method


def _to_all(listeners: Sequence[Callable[..., Any]]) -> Callable[..., None]:
    if not listeners:
        return _nothing

    def tell(*arguments: Any, **named: Any) -> None:
        for listener in listeners:
            listener(*arguments, **named)

    return tell


def _nothing(*_: Any, **__: Any) -> None:
    """Nobody listens."""
