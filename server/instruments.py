"""Metrics and traces of one serving process, as the settings want them; what is off is not even imported."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from server.observer import HttpSpan, Observer, Observers
from server.settings import Settings, bracketed

if TYPE_CHECKING:
    import grpc

logger = logging.getLogger(__name__)


class Instruments:
    """What watches the server. A context manager: when left, traces are sent and the metrics page ends."""

    def __init__(self, settings: Settings, worker: int | None = None) -> None:
        """Set them up; `worker` is the number of a worker whose metrics a supervisor serves.

        Raises:
            CannotServe: a port, a package or a variable that they need cannot be used.
        """
        self._closers: list[Callable[[], object]] = []
        self.interceptors: list[grpc.aio.ServerInterceptor] = []
        self.http_span: HttpSpan | None = None
        """Makes the span of a request over plain HTTP."""
        self.observer: Observer | None = None
        self.page: Callable[[str], tuple[bytes, str]] | None = None
        """The page of metrics for a scraper's header `Accept`, and its content type. Takes milliseconds."""
        observers: list[Observer] = []
        if settings.metrics_port is not None:
            from server.metrics import Metrics, own_registry, page_of, registry_of_workers, start_metrics_server

            metrics = Metrics(max_queue_size=settings.max_queue_size)
            observers.append(metrics)
            # Made when it is first asked for, as workers do without the package that writes it.
            registry = functools.cache(own_registry if worker is None else registry_of_workers)
            self.page = lambda accept: page_of(registry(), accept)
            if worker is None:
                self._closers.append(metrics.close)
                page, port = start_metrics_server(settings.host, settings.metrics_port)
                self._closers.append(page.close)
                logger.info("metrics on http://%s:%d/metrics", bracketed(settings.host), port)
        if settings.tracing:
            from server import tracing

            observer, calls, close = tracing.setup(settings)
            observers.append(observer)
            self.interceptors.append(calls)
            self.http_span = calls.http_span
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
