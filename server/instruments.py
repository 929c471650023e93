"""Metrics and traces of one serving process, as the settings want them; what is off is not even imported."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from server.observer import Observer, Observers
from server.settings import Settings

if TYPE_CHECKING:
    import grpc

logger = logging.getLogger(__name__)


class Instruments:
    """What watches the server. A context manager: when left, traces are sent and the metrics page ends."""

    def __init__(self, settings: Settings, worker: int | None = None) -> None:
        """`worker` is the number of a worker whose metrics a supervisor serves."""
        self._settings = settings
        self._closers: list[Callable[[], object]] = []
        self.interceptors: list[grpc.aio.ServerInterceptor] = []
        self.observer: Observer | None = None
        observers: list[Observer] = []
        if settings.metrics_port is not None:
            from server.metrics import Metrics

            observers.append(Metrics(settings))
        if settings.tracing:
            from server import tracing

            observer, interceptors, close = tracing.setup(settings)
            observers.append(observer)
            self.interceptors += interceptors
            self._closers.append(close)
        if observers:
            self.observer = observers[0] if len(observers) == 1 else Observers(observers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for close in reversed(self._closers):
            close()
