"""Traces: from a caller's span, through the call's, to the batch's; in memory, and over OTLP."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace
from opentelemetry.instrumentation.grpc import GrpcAioInstrumentorClient, GrpcInstrumentorClient, filters
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import client
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server import tracing
from server.app import DigitServer
from server.errors import CannotServe
from server.inference import Classifier
from server.service import INLINE_SIZE
from server.settings import Settings

Golden = tuple[npt.NDArray[np.uint8], list[int]]

ROOT = Path(__file__).parents[2]
CLASSIFY = "mnist.v1.DigitClassifier/Classify"
STREAM = "mnist.v1.DigitClassifier/StreamClassify"
TIMEOUT = 30


@asynccontextmanager
async def traced_server(spans: InMemorySpanExporter | None = None, **settings: Any) -> AsyncIterator[DigitServer]:
    """A server whose spans go to `spans`, or else over OTLP."""
    chosen = Settings(port=0, tracing=True, **settings)
    processor = None if spans is None else SimpleSpanProcessor(spans)
    observer, calls, shutdown = tracing.setup(chosen, processor=processor)
    server = DigitServer(chosen, observer=observer, interceptors=[calls], http_span=calls.http_span)
    await server.start()
    try:
        await server.load()
        yield server
    finally:
        await server.stop(grace=0)
        await asyncio.to_thread(shutdown)


def by_name(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def id_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def trace_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id


def stub_at(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.DigitClassifierStub(channel)


async def arrived(stub: Any) -> None:
    """Wait until what was sent before has arrived: the server accepts calls in the order in which they come."""
    for _ in range(5):
        await stub.GetModel(pb.GetModelRequest(), timeout=TIMEOUT)


def request(golden: Golden, rows: int = 1) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(pixels=golden[0][:rows].tobytes())


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Batches are computed when this is set: until then, calls gather behind the first."""
    go = threading.Event()
    run_batch = Classifier.run_batch

    def wait(self: Classifier, blocks: Any) -> Any:
        assert go.wait(TIMEOUT)
        return run_batch(self, blocks)

    monkeypatch.setattr(Classifier, "run_batch", wait)
    yield go
    go.set()


# One trace -----------------------------------------------------------------------


# Untyped.
SyncInstrumentor: Any = GrpcInstrumentorClient
AsyncInstrumentor: Any = GrpcAioInstrumentorClient


@contextmanager
def instrumented(instrumentor: Any) -> Iterator[tuple[trace.Tracer, InMemorySpanExporter]]:
    """A calling service that traces: what a line of its own start-up does, the SDK knows nothing of it."""
    spans = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with pytest.MonkeyPatch.context() as patch:
        # What `set_tracer_provider` does, which can be called only once in a process.
        patch.setattr(trace, "get_tracer_provider", lambda: provider)
        instrumentor.instrument()
        try:
            yield provider.get_tracer("caller"), spans
        finally:
            instrumentor.uninstrument()
            provider.shutdown()


def check_one_trace(caller: InMemorySpanExporter, server: InMemorySpanExporter, version: str) -> None:
    (work,) = by_name(caller, "work")
    (sent,) = [span for span in caller.get_finished_spans() if span.name.endswith("Classify")]
    (call,) = by_name(server, CLASSIFY)
    (batch,) = by_name(server, "batch")
    assert len({trace_of(span) for span in (work, sent, call, batch)}) == 1
    chain = [(sent, work), (call, sent), (batch, call)]
    for span, parent in chain:
        assert span.parent is not None
        assert span.parent.span_id == id_of(parent), span.name
    assert sent.kind is trace.SpanKind.CLIENT
    assert call.kind is trace.SpanKind.SERVER
    assert [link.context.span_id for link in batch.links] == [id_of(call)]
    assert attributes_of(batch)["mnist_grpc.rows"] == 1
    assert attributes_of(batch)["mnist_grpc.model_version"] == version
    for span, outer in chain:
        assert span.start_time is not None
        assert outer.start_time is not None
        assert outer.start_time <= span.start_time
        assert span.end_time is not None
        assert outer.end_time is not None
        assert span.end_time <= outer.end_time


async def test_one_trace_leads_from_an_async_sdk_call_to_its_batch(golden: Golden, spans: InMemorySpanExporter) -> None:
    with instrumented(AsyncInstrumentor()) as (tracer, caller):
        async with traced_server(spans) as server, client.AsyncClient(server.address, timeout=TIMEOUT) as digits:
            with tracer.start_as_current_span("work"):
                prediction = await digits.classify(golden[0][1].reshape(28, 28))
    check_one_trace(caller, spans, prediction.model_version)


async def test_one_trace_leads_from_a_sync_sdk_call_to_its_batch(golden: Golden, spans: InMemorySpanExporter) -> None:
    with instrumented(SyncInstrumentor()) as (tracer, caller):

        def call(address: str) -> client.Prediction:
            with client.Client(address, timeout=TIMEOUT) as digits, tracer.start_as_current_span("work"):
                return digits.classify(golden[0][1].reshape(28, 28))

        async with traced_server(spans) as server:
            prediction = await asyncio.to_thread(call, server.address)
    check_one_trace(caller, spans, prediction.model_version)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_an_instrumented_sdk_streams_as_ever(golden: Golden, spans: InMemorySpanExporter, kind: str) -> None:
    images = [row.reshape(28, 28) for row in golden[0]]

    def stream(address: str) -> list[Any]:
        with client.Client(address, timeout=TIMEOUT) as digits:
            digits.wait_ready()
            return list(digits.stream_classify(images))

    # Without the filter, the instrumentation gives `wait_ready` a health watch that cannot be cancelled.
    sync = SyncInstrumentor(filter_=filters.negate(filters.health_check()))
    with instrumented(sync if kind == "sync" else AsyncInstrumentor()) as (_, caller):
        async with traced_server(spans) as server:
            if kind == "sync":
                results = await asyncio.to_thread(stream, server.address)
            else:
                async with client.AsyncClient(server.address, timeout=TIMEOUT) as asked:
                    await asked.wait_ready()
                    results = [result async for result in asked.stream_classify(images)]
    digits = [result.digit for result in results if isinstance(result, client.Prediction)]
    assert len(digits) == 20
    assert sum(map(int.__eq__, digits, golden[1])) >= 18
    (call,) = by_name(spans, STREAM)
    sent = [span for span in caller.get_finished_spans() if span.name.endswith("StreamClassify")]
    assert [trace_of(span) for span in sent] == [trace_of(call)]
    batches = by_name(spans, "batch")
    assert sum(attributes_of(batch)["mnist_grpc.rows"] for batch in batches) == 20
    assert {link.context.span_id for batch in batches for link in batch.links} == {id_of(call)}


# Batches -------------------------------------------------------------------------


async def test_a_batch_links_to_all_its_calls_and_they_link_to_it(
    golden: Golden, spans: InMemorySpanExporter, stalled: threading.Event
) -> None:
    # So many images are computed in a thread, so that the loop goes on while the model is stalled.
    async with traced_server(spans) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = stub_at(channel)
        images = pb.ClassifyRequest(pixels=golden[0][:1].tobytes() * (INLINE_SIZE + 1))
        first = stub.Classify(images, timeout=TIMEOUT)
        await arrived(stub)
        others = [stub.Classify(request(golden, rows), timeout=TIMEOUT) for rows in (1, 2, 3)]
        await arrived(stub)
        stalled.set()
        await asyncio.gather(first, *others)
    lone, shared = by_name(spans, "batch")
    calls = {id_of(span): span for span in by_name(spans, CLASSIFY)}
    assert len(calls) == 4
    assert len({trace_of(span) for span in calls.values()}) == 4
    assert [attributes_of(batch)["mnist_grpc.rows"] for batch in (lone, shared)] == [INLINE_SIZE + 1, 6]
    assert attributes_of(shared)["mnist_grpc.items"] == 3
    linked: dict[int, Any] = {link.context.span_id: dict(link.attributes or {}) for link in shared.links}
    assert sorted(link["mnist_grpc.rows"] for link in linked.values()) == [1, 2, 3]
    assert linked.keys() < calls.keys()
    assert shared.parent is not None
    assert shared.parent.span_id in linked
    for span_id in linked:
        back = [link.context.span_id for link in calls[span_id].links]
        assert back == ([] if span_id == shared.parent.span_id else [id_of(shared)])


async def test_a_large_request_in_parts_has_a_batch_for_each(golden: Golden, spans: InMemorySpanExporter) -> None:
    async with (
        traced_server(spans, max_batch_size=8) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        await stub_at(channel).Classify(request(golden, 20), timeout=TIMEOUT)
    (call,) = by_name(spans, CLASSIFY)
    batches = by_name(spans, "batch")
    assert [attributes_of(batch)["mnist_grpc.rows"] for batch in batches] == [8, 8, 4]
    assert {trace_of(batch) for batch in batches} == {trace_of(call)}


async def test_a_batch_that_fails_is_an_error_and_so_is_its_call(
    golden: Golden, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    async with traced_server(spans) as server, grpc.aio.insecure_channel(server.address) as channel:
        monkeypatch.setattr(Classifier, "run_batch", fail)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub_at(channel).Classify(request(golden), timeout=TIMEOUT)
    for span in (*by_name(spans, "batch"), *by_name(spans, CLASSIFY)):
        assert span.status.status_code is trace.StatusCode.ERROR, span.name
    assert len(spans.get_finished_spans()) == 2


# Calls ---------------------------------------------------------------------------


async def test_a_call_ends_with_its_status_and_a_caller_s_fault_is_no_error(
    golden: Golden, spans: InMemorySpanExporter
) -> None:
    async with traced_server(spans) as server, grpc.aio.insecure_channel(server.address) as channel:
        await stub_at(channel).Classify(request(golden), timeout=TIMEOUT)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub_at(channel).Classify(pb.ClassifyRequest(pixels=b"1"), timeout=TIMEOUT)
    good, bad = by_name(spans, CLASSIFY)
    common = {"rpc.system": "grpc", "rpc.service": "mnist.v1.DigitClassifier", "rpc.method": "Classify"}
    assert attributes_of(good) == common | {"rpc.grpc.status_code": 0}
    assert attributes_of(bad) == common | {"rpc.grpc.status_code": 3}
    assert good.status.status_code is bad.status.status_code is trace.StatusCode.UNSET
    assert not bad.events, "an ordered refusal is no exception"


async def test_a_call_that_its_caller_leaves_ends_its_span_and_is_still_linked(
    golden: Golden, spans: InMemorySpanExporter, stalled: threading.Event
) -> None:
    async with traced_server(spans) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = stub_at(channel)
        call = stub.Classify(pb.ClassifyRequest(pixels=golden[0][:1].tobytes() * (INLINE_SIZE + 1)), timeout=TIMEOUT)
        await arrived(stub)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await arrived(stub)  # and with it the cancellation
        (span,) = by_name(spans, CLASSIFY)
        stalled.set()
    assert attributes_of(span)["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]
    (batch,) = by_name(spans, "batch")
    assert trace_of(batch) == trace_of(span)


async def test_an_unforeseen_exception_is_in_the_span(spans: InMemorySpanExporter) -> None:
    settings = Settings(tracing=True)
    _, interceptor, shutdown = tracing.setup(settings, processor=SimpleSpanProcessor(spans))

    async def fail(request: bytes, context: Any) -> bytes:
        raise ZeroDivisionError("a bug")

    async def generate(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for part in (b"1", b"2"):
            yield part

    server = grpc.aio.server(interceptors=[interceptor])
    handlers: dict[str, Any] = {
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
        "Generate": grpc.unary_stream_rpc_method_handler(generate),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("any.Service", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as open_channel:
            channel: Any = open_channel
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary("/any.Service/Fail")(b"", timeout=TIMEOUT)
            assert error.value.code() is grpc.StatusCode.UNKNOWN
            parts = [part async for part in channel.unary_stream("/any.Service/Generate")(b"", timeout=TIMEOUT)]
            assert parts == [b"1", b"2"], "a handler that is a generator works as well"
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary("/any.Service/Missing")(b"", timeout=TIMEOUT)
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(0)
        shutdown()
    (span,) = by_name(spans, "any.Service/Fail")
    assert attributes_of(span)["rpc.grpc.status_code"] == 2
    assert [dict(event.attributes or {})["exception.type"] for event in span.events] == ["ZeroDivisionError"]
    assert len(by_name(spans, "any.Service/Generate")) == 1


async def test_health_checks_are_not_traced(spans: InMemorySpanExporter) -> None:
    async with traced_server(spans) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
    assert not spans.get_finished_spans()


async def test_what_a_caller_does_not_sample_is_not_traced(golden: Golden, spans: InMemorySpanExporter) -> None:
    async with traced_server(spans) as server, grpc.aio.insecure_channel(server.address) as channel:
        for flag in ("00", "01"):
            metadata = (("traceparent", f"00-{'a' * 32}-{'b' * 16}-{flag}"),)
            await stub_at(channel).Classify(request(golden), timeout=TIMEOUT, metadata=metadata)
        metadata = (("traceparent", "nonsense"),)
        await stub_at(channel).Classify(request(golden), timeout=TIMEOUT, metadata=metadata)
    call, batch, alone = (*by_name(spans, CLASSIFY)[:1], by_name(spans, "batch")[0], by_name(spans, CLASSIFY)[1])
    assert len(spans.get_finished_spans()) == 4
    assert trace_of(call) == trace_of(batch) == int("a" * 32, 16)
    assert alone.parent is None


async def test_a_call_over_plain_http_continues_its_caller_s_trace(golden: Golden, spans: InMemorySpanExporter) -> None:
    def post(address: str, body: bytes) -> int:
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
        headers = {"content-type": "application/json", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        connection.request("POST", "/v1/classify", body, headers)
        status = connection.getresponse().status
        connection.close()
        return status

    bodies = json.dumps({"pixels": base64.b64encode(golden[0][0].tobytes()).decode()}).encode(), b"rubbish"
    async with traced_server(spans, transport="asgi") as server:
        statuses = [await asyncio.to_thread(post, server.address, body) for body in bodies]
    assert statuses == [200, 400]
    good, bad = by_name(spans, "POST /v1/classify")
    (batch,) = by_name(spans, "batch")
    assert trace_of(good) == trace_of(batch) == trace_of(bad) == int("a" * 32, 16)
    assert batch.parent is not None
    assert batch.parent.span_id == id_of(good)
    assert good.kind == trace.SpanKind.SERVER
    assert [attributes_of(span) for span in (good, bad)] == [
        {"http.request.method": "POST", "http.route": "/v1/classify", "http.response.status_code": status}
        for status in statuses
    ]
    assert bad.status.status_code == trace.StatusCode.UNSET, "it is the caller's fault"


async def test_a_call_over_plain_http_that_fails_here_is_an_error(spans: InMemorySpanExporter) -> None:
    _, calls, shutdown = tracing.setup(Settings(tracing=True), processor=SimpleSpanProcessor(spans))
    with calls.http_span("POST", "/v1/classify", {}) as answered:
        answered(503)
    shutdown()
    (span,) = spans.get_finished_spans()
    assert span.status.status_code == trace.StatusCode.ERROR


def test_a_batch_without_a_traced_call_is_not_traced(spans: InMemorySpanExporter) -> None:
    observer, _, shutdown = tracing.setup(Settings(tracing=True), processor=SimpleSpanProcessor(spans))
    observer.batch_ended(1, [observer.queued(1)], [0.0], 0.001, failed=False)
    shutdown()
    assert not spans.get_finished_spans()


# Over the network ----------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP receiver: its address, and what it has been sent."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


async def test_spans_reach_an_otlp_collector(
    golden: Golden, collector: tuple[str, list[ExportTraceServiceRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    async with traced_server() as server, grpc.aio.insecure_channel(server.address) as channel:
        await stub_at(channel).Classify(request(golden, 3), timeout=TIMEOUT)
    (resource,) = [each for message in received for each in message.resource_spans]
    told = {attribute.key: attribute.value for attribute in resource.resource.attributes}
    assert told["service.name"].string_value == tracing.SERVICE_NAME
    assert told["process.pid"].int_value == os.getpid()
    got = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert got.keys() == {CLASSIFY, "batch"}
    assert got["batch"].parent_span_id == got[CLASSIFY].span_id
    assert [link.span_id for link in got["batch"].links] == [got[CLASSIFY].span_id]


def test_the_environment_names_the_service(
    collector: tuple[str, list[ExportTraceServiceRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=digits,deployment.environment=test")
    _, interceptor, shutdown = tracing.setup(Settings(tracing=True))
    assert isinstance(interceptor, tracing.CallTracer)
    interceptor._tracer.start_span("any").end()
    shutdown()
    attributes = received[0].resource_spans[0].resource.attributes
    told = {attribute.key: attribute.value.string_value for attribute in attributes}
    assert (told["service.name"], told["deployment.environment"]) == ("digits", "test")


def test_a_collector_that_does_not_answer_holds_up_no_stop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import socket

    monkeypatch.setattr(tracing, "SHUTDOWN_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
        _, interceptor, shutdown = tracing.setup(Settings(tracing=True))
        assert isinstance(interceptor, tracing.CallTracer)
        interceptor._tracer.start_span("any").end()
        ended = threading.Thread(target=shutdown, daemon=True)
        ended.start()
        ended.join(10)
        assert not ended.is_alive()
    assert "are lost" in caplog.text


# Off, and missing ----------------------------------------------------------------


def test_without_tracing_nothing_of_opentelemetry_is_imported() -> None:
    code = """
import sys
from server.instruments import Instruments
from server.settings import Settings
with Instruments(Settings()) as instruments:
    print(instruments.interceptors, instruments.http_span)
print([name for name in sys.modules if name.startswith("opentelemetry") or name == "server.tracing"])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[] None\n[]\n"


def test_without_opentelemetry_the_server_says_what_to_install(tmp_path: Path) -> None:
    package = tmp_path / "opentelemetry"
    package.mkdir()
    (package / "__init__.py").write_text("raise ModuleNotFoundError(name='opentelemetry')")
    code = """
from server import tracing
from server.errors import CannotServe
from server.settings import Settings
try:
    tracing.setup(Settings(tracing=True))
except CannotServe as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "opentelemetry is not installed; pip install 'mnist-grpc[otel]' brings it\n"


@pytest.mark.parametrize("variable", ["OTEL_SPAN_LINK_COUNT_LIMIT", "OTEL_BSP_MAX_QUEUE_SIZE"])
def test_a_variable_that_cannot_be_read_is_told(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "-1")
    setup: Callable[[Settings], Any] = tracing.setup
    with pytest.raises(CannotServe, match="OpenTelemetry cannot be set up"):
        setup(Settings(tracing=True))
