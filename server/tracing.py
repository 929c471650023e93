"""OpenTelemetry traces: a span for each call, also over plain HTTP, and one for each batch that links to its calls.

A caller whose channel is instrumented sends W3C's `traceparent`; the call's
span here continues that trace. A batch belongs to many calls: its span is part
of the trace of the first of them, links to all, and the others link to it.

Off by default, and then nothing of OpenTelemetry is imported. The interceptor
is ours because that of the instrumentation package takes every stream handler
for an async generator and fails on those that write to their context. Spans go
out over OTLP/HTTP, so that the exporter has no gRPC channel of its own in a
gRPC server's process. OpenTelemetry's own environment variables say where to
(`OTEL_EXPORTER_OTLP_ENDPOINT`), which (`OTEL_TRACES_SAMPLER`) and under which
name (`OTEL_SERVICE_NAME`).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from server.errors import CannotServe
from server.observer import Observer
from server.servicer import Context, code_of, code_of_interruption
from server.settings import Settings
from server.version import server_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import Span, Tracer

    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]  # which has no parameters when the program runs

logger = logging.getLogger(__name__)

SERVICE_NAME = "mnist-grpc-server"
NOT_TRACED = ("grpc.health.v1.Health", "grpc.reflection.")
"""What is asked every few seconds, or by people at a keyboard; beginnings of service names."""

FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
"""The codes that make a span an error: the others are the caller's doing."""

SHUTDOWN_SECONDS = 2.0
"""How long the last spans may take to go out; then they are lost."""


def setup(
    settings: Settings, *, processor: SpanProcessor | None = None
) -> tuple[Observer, CallTracer, Callable[[], None]]:
    """Make what traces this process: an observer, an interceptor of its server, and what ends it.

    The last one sends what is left, for up to `SHUTDOWN_SECONDS`. `processor`
    takes the spans; by default they go out over OTLP.

    Raises:
        CannotServe: OpenTelemetry is not installed, or cannot be set up as the
            environment says.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise CannotServe(f"{error.name} is not installed; pip install 'mnist-grpc[otel]' brings it") from error
    try:
        provider = _provider(settings)
        provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:  # a variable with a value that it cannot have
        raise CannotServe(f"OpenTelemetry cannot be set up: {error}") from error
    tracer = provider.get_tracer("mnist-grpc", server_version())
    return BatchTracer(tracer), CallTracer(tracer), lambda: _shut_down(provider)


def _provider(settings: Settings) -> TracerProvider:
    """One of this server; the process may have another one, which is none of our business."""
    from opentelemetry.sdk.environment_variables import OTEL_SPAN_LINK_COUNT_LIMIT
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider

    # A batch has as many links as calls, unless the operator says otherwise.
    limits = SpanLimits() if OTEL_SPAN_LINK_COUNT_LIMIT in os.environ else SpanLimits(max_links=settings.max_batch_size)
    resource = Resource.create({"service.version": server_version(), "process.pid": os.getpid()})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):  # the environment gives no name
        resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
    return TracerProvider(resource=resource, span_limits=limits, shutdown_on_exit=False)


def _shut_down(provider: TracerProvider) -> None:
    """Send what is left. OpenTelemetry would wait half a minute for a collector that does not answer."""
    ending = threading.Thread(target=provider.shutdown, name="tracing-shutdown", daemon=True)
    ending.start()
    ending.join(SHUTDOWN_SECONDS)
    if ending.is_alive():
        logger.warning("the last spans were not sent within %g s, and are lost", SHUTDOWN_SECONDS)


class CallTracer(grpc.aio.ServerInterceptor):
    """Makes a server span of each call, as a part of its caller's trace."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(details)
        if handler is None or details.method.lstrip("/").startswith(NOT_TRACED):
            return handler
        make, behavior = _taken_apart(handler)

        async def traced(request: Any, context: Context) -> Any:
            with self._span(details, context):
                result = behavior(request, context)
                if inspect.isawaitable(result):
                    return await result
                async for response in result:
                    await context.write(response)
                return None

        return make(traced, handler.request_deserializer, handler.response_serializer)

    @contextmanager
    def _span(self, details: grpc.HandlerCallDetails, context: Context) -> Iterator[None]:
        """A span that is the current one within, and ends with the status of the call."""
        from opentelemetry import propagate, trace

        service, _, method = details.method.lstrip("/").rpartition("/")
        carrier = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        span = self._tracer.start_span(
            f"{service}/{method}",
            context=propagate.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )
        code = "OK"
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield
            except asyncio.CancelledError:
                code = code_of_interruption(context)
                raise
            except BaseException as error:
                code = code_of(context)
                if not isinstance(error, grpc.aio.AbortError):
                    code = "UNKNOWN"  # what gRPC answers
                    span.record_exception(error)
                raise
            finally:
                span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
                if code in FAULTS:
                    span.set_status(trace.StatusCode.ERROR, code)

    @contextmanager
    def http_span(self, method: str, path: str, headers: Mapping[str, str]) -> Iterator[Callable[[int], None]]:
        """The same for a request over plain HTTP; what it gives is to be told the status of the answer."""
        from opentelemetry import propagate, trace

        span = self._tracer.start_span(
            f"{method} {path}",
            context=propagate.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes={"http.request.method": method, "http.route": path},
        )

        def answered(status: int) -> None:
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                span.set_status(trace.StatusCode.ERROR)

        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield answered


def _taken_apart(handler: Handler) -> tuple[Callable[..., Handler], Callable[[Any, Context], Any]]:
    """What makes a handler of this kind, and what the handler does."""
    kinds: dict[tuple[bool, bool], tuple[Callable[..., Handler], Any]] = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }
    return kinds[handler.request_streaming, handler.response_streaming]


class BatchTracer(Observer):
    """Makes a span of each batch in which a traced call has a part."""

    def __init__(self, tracer: Tracer) -> None:
        from opentelemetry import trace

        self._tracer = tracer
        self._trace = trace
        self._version = ""

    def queued(self, rows: int) -> tuple[Span, int] | None:
        span = self._trace.get_current_span()
        return (span, rows) if span.is_recording() else None

    def model_served(self, version: str) -> None:
        self._version = version

    def batch_ended(
        self, rows: int, tokens: Sequence[Any], queue_seconds: Sequence[float], compute_seconds: float, failed: bool
    ) -> None:
        calls: dict[Span, int] = {}
        for token in tokens:
            if token is not None:
                span, part = token
                calls[span] = calls.get(span, 0) + part
        if not calls:
            return
        trace = self._trace
        end = time.time_ns()
        first, *others = calls
        batch = self._tracer.start_span(
            "batch",
            context=trace.set_span_in_context(first),
            links=[trace.Link(span.get_span_context(), {"mnist_grpc.rows": part}) for span, part in calls.items()],
            attributes={
                "mnist_grpc.rows": rows,
                "mnist_grpc.items": len(tokens),
                "mnist_grpc.queue_seconds": max(queue_seconds),
                "mnist_grpc.model_version": self._version,
            },
            start_time=end - int(compute_seconds * 1e9),
        )
        if failed:
            batch.set_status(trace.StatusCode.ERROR)
        batch.end(end)
        for span in others:
            if span.is_recording():  # its caller may have left
                span.add_link(batch.get_span_context())
