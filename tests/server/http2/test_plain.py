"""Plain HTTP at the port of gRPC, over real sockets: HTTP/1.1 and 1.0, HTTP/2, with TLS and without."""

from __future__ import annotations

import asyncio
import base64
import datetime
import http.client
import ipaddress
import json
import logging
import math
import re
import ssl
import struct
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import h2.config
import h2.connection
import h2.events
import h2.settings
import numpy as np
import numpy.typing as npt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf import json_format
from h2.connection import ConnectionState

import server.service
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server import limits
from server.app import DigitServer
from server.authentication import ANY_METHOD
from server.errors import DeadlineExceeded, Internal
from server.http2 import http1, plain
from server.http2.plain import HTTP_STATUSES, Request
from server.inference import Classifier, Scores
from server.inputs import Rows
from server.observer import Observer
from server.service import CLASSIFY, DigitService
from server.settings import Settings

Golden = tuple[npt.NDArray[np.uint8], list[int]]
Start = Callable[..., tuple[str, subprocess.Popen[str]]]
Headers = Sequence[tuple[str, str]]

TIMEOUT = 30
TOKEN = "token-0123456789abcdef"
JSON: Headers = [("content-type", "application/json")]
FILE: Headers = [("content-type", "application/octet-stream")]

pytestmark = pytest.mark.usefixtures("no_stray_errors")


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Watch(Observer):
    """Tells when images wait, and how calls end."""

    def __init__(self) -> None:
        self.waits, self.over = asyncio.Event(), asyncio.Event()
        self.ends: list[tuple[str, str]] = []

    def queue_changed(self, rows: int) -> None:
        if rows:
            self.waits.set()
        else:
            self.waits.clear()

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        self.ends.append((method, code))
        self.over.set()


class Served(NamedTuple):
    server: DigitServer
    watch: Watch
    address: str

    @property
    def place(self) -> tuple[str, int]:
        host, port = self.address.rsplit(":", 1)
        return host, int(port)


@asynccontextmanager
async def server_of(*, loaded: bool = True, metrics_page: Any = None, **settings: Any) -> AsyncIterator[Served]:
    watch = Watch()
    digit_server = DigitServer(
        Settings(port=0, transport="asgi", **settings), observer=watch, metrics_page=metrics_page
    )
    await digit_server.start()
    try:
        if loaded:
            await digit_server.load()
        yield Served(digit_server, watch, digit_server.address)
    finally:
        await digit_server.stop(grace=0)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with server_of() as served:
        yield served


# Clients ---------------------------------------------------------------------------------


class Http1:
    """A connection of HTTP/1.1, on which requests are sent as they are written."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    @asynccontextmanager
    async def to(cls, served: Served, context: ssl.SSLContext | None = None) -> AsyncIterator[Http1]:
        reader, writer = await asyncio.open_connection(*served.place, ssl=context)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def request(self, method: str, target: str, headers: Headers = (), body: bytes = b"", version: str = "1.1") -> None:
        lines = [f"{method} {target} HTTP/{version}", "host: x", *(f"{name}: {value}" for name, value in headers)]
        if body:
            lines.append(f"content-length: {len(body)}")
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    async def reply(self, to_head: bool = False) -> Reply:
        async with asyncio.timeout(TIMEOUT):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status, *lines = head.strip().split("\r\n")
            headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
            length = 0 if to_head else int(headers.get("content-length", 0))
            return Reply(int(status.split()[1]), headers, await self.reader.readexactly(length))

    async def ask(self, method: str, target: str, headers: Headers = (), body: bytes = b"") -> Reply:
        self.request(method, target, headers, body)
        return await self.reply(to_head=method == "HEAD")

    async def is_closed(self) -> bool:
        async with asyncio.timeout(TIMEOUT):
            try:
                return await self.reader.read() == b""
            except ConnectionResetError:
                return True


class Http2:
    """A connection of HTTP/2, by the package h2."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.flush()
        self.events: dict[int, list[Any]] = {}
        self._rest = b""

    @classmethod
    @asynccontextmanager
    async def to(cls, served: Served, context: ssl.SSLContext | None = None) -> AsyncIterator[Http2]:
        reader, writer = await asyncio.open_connection(*served.place, ssl=context)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    def begin(self, method: str, target: str, headers: Headers = (), ends: bool = False) -> int:
        number = self.h2.get_next_available_stream_id()
        pseudo = [(":method", method), (":scheme", "http"), (":authority", "x"), (":path", target)]
        self.h2.send_headers(number, [*pseudo, *headers], end_stream=ends)
        self.flush()
        self.events[number] = []
        return number

    async def more(self) -> None:
        """Take what comes next."""
        async with asyncio.timeout(TIMEOUT):
            data = await self.reader.read(65536)
        assert data, "the server closed the connection"
        self._rest += data
        while len(self._rest) >= 9 and len(self._rest) >= (size := 9 + (struct.unpack(">I", self._rest[:4])[0] >> 8)):
            frame, self._rest = self._rest[:size], self._rest[size:]
            self._take(self.h2.receive_data(frame))
            if self.h2.state_machine.state is ConnectionState.CLOSED:  # h2 takes a GOAWAY for the end of all streams
                self.h2.state_machine.state = ConnectionState.CLIENT_OPEN
        self.flush()

    def _take(self, events: list[Any]) -> None:
        for event in events:
            if (number := getattr(event, "stream_id", 0)) in self.events:
                self.events[number].append(event)
            if isinstance(event, h2.events.DataReceived):
                self.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)

    async def send_body(self, number: int, body: bytes) -> None:
        """Send as far as the server lets us; less, if it answers before."""
        while body and not any(isinstance(event, h2.events.StreamEnded) for event in self.events[number]):
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            if not room:
                await self.more()
                continue
            self.h2.send_data(number, body[:room], end_stream=len(body) <= room)
            self.flush()
            body = body[room:]

    async def reply(self, number: int) -> Reply:
        ends = (h2.events.StreamEnded, h2.events.StreamReset)
        while not any(isinstance(event, ends) for event in self.events[number]):
            await self.more()
        events = self.events[number]
        response: Any = next(event for event in events if isinstance(event, h2.events.ResponseReceived))
        headers = dict(response.headers)
        body = b"".join(event.data for event in events if isinstance(event, h2.events.DataReceived))
        return Reply(int(headers.pop(":status")), headers, body)

    async def ask(self, method: str, target: str, headers: Headers = (), body: bytes = b"") -> Reply:
        number = self.begin(method, target, headers, ends=not body)
        await self.send_body(number, body)
        return await self.reply(number)


@pytest.fixture(params=[Http1, Http2], ids=["http1", "http2"])
def kind(request: pytest.FixtureRequest) -> Any:
    """Of both kinds of clients, one."""
    return request.param


def in_json(request: pb.ClassifyRequest) -> bytes:
    return json_format.MessageToJson(request).encode()


async def by_grpc(served: Served, request: pb.ClassifyRequest) -> pb.ClassifyResponse:
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub: Any = pb_grpc.DigitClassifierStub(channel)
        response: pb.ClassifyResponse = await stub.Classify(request, timeout=TIMEOUT)
        return response


def without_times(response: pb.ClassifyResponse) -> pb.ClassifyResponse:
    response.receipt.ClearField("queue_time")
    response.receipt.ClearField("compute_time")
    return response


# Health and metrics ----------------------------------------------------------------------


async def test_health_is_told_before_and_after_the_model_is_there(kind: Any) -> None:
    async with server_of(loaded=False) as served, kind.to(served) as client:
        reply = await client.ask("GET", "/healthz")
        assert (reply.status, reply.body) == (503, b"NOT_SERVING\n")
        await served.server.load()
        reply = await client.ask("GET", "/healthz?verbose")
        assert (reply.status, reply.body) == (200, b"SERVING\n")
        reply = await client.ask("HEAD", "/healthz")
        assert (reply.status, reply.body, reply.headers["content-length"]) == (200, b"", "8")
        assert "date" in reply.headers


async def test_metrics_are_told_where_they_are_on(kind: Any) -> None:
    def page(accept: str) -> tuple[bytes, str]:
        return f"page for {accept}".encode(), "text/x"

    async with server_of(loaded=False, metrics_page=page) as served, kind.to(served) as client:
        reply = await client.ask("GET", "/metrics", [("accept", "text/x")])
        assert (reply.status, reply.body, reply.headers["content-type"]) == (200, b"page for text/x", "text/x")


async def test_metrics_that_are_off_name_the_flag(kind: Any) -> None:
    async with server_of(loaded=False) as served, kind.to(served) as client:
        reply = await client.ask("GET", "/metrics")
        assert (reply.status, reply.json["code"]) == (404, 5)
        assert "--metrics-port" in reply.json["message"]


def test_each_worker_tells_the_metrics_of_all(server_process: Start, golden_files: list[bytes]) -> None:
    address, _ = server_process("--transport", "asgi", "--workers", "2", "--metrics-port", "0")
    for _ in range(3):
        client = http.client.HTTPConnection(address, timeout=TIMEOUT)
        client.request("POST", "/v1/classify", golden_files[0], dict(FILE))
        reply = client.getresponse()
        assert reply.status == 200, reply.read()
        client.close()
    client = http.client.HTTPConnection(address, timeout=TIMEOUT)
    client.request("GET", "/metrics")
    page = client.getresponse().read().decode()
    client.close()
    assert f'mnist_grpc_calls_total{{code="OK",method="{CLASSIFY}"}} 3.0' in page
    assert "mnist_grpc_workers 2.0" in page


# Classify --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pixels", "encoded"])
async def test_json_gives_the_answer_that_grpc_gives(
    form: str, kind: Any, served: Served, golden: Golden, golden_files: list[bytes]
) -> None:
    request = pb.ClassifyRequest(include_logits=True)
    if form == "pixels":
        request.pixels = golden[0].tobytes()
    else:
        request.encoded.files.extend(golden_files)
    async with kind.to(served) as client:
        reply = await client.ask("POST", "/v1/classify", JSON, in_json(request))
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    told = json_format.ParseDict(reply.json, pb.ClassifyResponse())
    assert without_times(told) == without_times(await by_grpc(served, request))


@pytest.mark.parametrize("content_type", ["image/png", "Application/Octet-Stream; x=y"])
async def test_a_file_gives_the_answer_that_its_pixels_give(
    content_type: str, kind: Any, served: Served, golden: Golden, golden_files: list[bytes]
) -> None:
    zero = golden[1].index(0)
    async with kind.to(served) as client:
        reply = await client.ask("POST", "/v1/classify", [("content-type", content_type)], golden_files[zero])
    assert reply.status == 200
    assert reply.json["digits"] == [0], "also zeros are told"
    told = json_format.ParseDict(reply.json, pb.ClassifyResponse())
    by_pixels = await by_grpc(served, pb.ClassifyRequest(pixels=golden[0][zero].tobytes()))
    assert without_times(told) == without_times(by_pixels)


async def test_many_images_are_answered_in_the_callers_order(kind: Any, served: Served, golden: Golden) -> None:
    rows = np.tile(golden[0], (50, 1))  # a long answer, which is written in a thread and sent in pieces
    async with kind.to(served) as client:
        reply = await client.ask("POST", "/v1/classify", JSON, in_json(pb.ClassifyRequest(pixels=rows.tobytes())))
    assert reply.status == 200
    assert len(reply.body) > 65536
    assert reply.json["digits"] == reply.json["digits"][:20] * 50


async def test_the_ordinary_client_of_python_is_served(served: Served, golden_files: list[bytes]) -> None:
    def ask() -> list[tuple[int, bytes]]:
        client = http.client.HTTPConnection(*served.place, timeout=TIMEOUT)
        replies = []
        for _ in range(2):
            client.request("POST", "/v1/classify", iter([golden_files[0]]), dict(FILE), encode_chunked=True)
            reply = client.getresponse()
            replies.append((reply.status, reply.read()))
        client.close()
        return replies

    assert [status for status, _ in await asyncio.to_thread(ask)] == [200, 200]


async def test_a_call_is_counted_and_logged_as_one_of_grpc(
    kind: Any, served: Served, golden_files: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "server.calls")
    async with kind.to(served) as client:
        given = await client.ask("POST", "/v1/classify", [*FILE, ("x-request-id", "mine")], golden_files[0])
        bad = await client.ask("POST", "/v1/classify", FILE, b"no image")
    assert given.headers["x-request-id"] == "mine"
    assert served.watch.ends == [(CLASSIFY, "OK"), (CLASSIFY, "INVALID_ARGUMENT")]
    told = [vars(record) for record in caplog.records if record.name == "server.calls"]
    assert [(each["method"], each["code"]) for each in told] == served.watch.ends
    assert [each["request_id"] for each in told] == ["mine", bad.headers["x-request-id"]]
    assert all(each["peer"].startswith("ipv4:127.0.0.1:") for each in told)


# Errors ----------------------------------------------------------------------------------


BAD_JSON = {
    "no JSON": (b"{", "body"),
    "another field": (b'{"pixelz": ""}', "body"),
    "a number": (b"7", "body"),
    "a list of numbers": (b"[1]", "body"),
    "null": (b"null", "body"),
    "no base64": (b'{"pixels": "A"}', "body"),
    "no UTF-8": (b'{"pixels": "\xff"}', "body"),
    "deep": (b"[" * 100_000, "body"),
    "half a list": (b"[", "body"),
    "no value": (b'{"pixels": }', "body"),
    "half a character": (b'{"\\ud800": 1, "\\ud800": 2}', "body"),
    "half a character alone": (b'{"\\ud800": 1}', "body"),
    "pixels that are a number": (b'{"pixels": 5}', "body"),
    "files that are a number": (b'{"encoded": {"files": [5]}}', "body"),
    "features that are a list": (b'{"features": [1, NaN]}', "body"),
    "a long number": (b'{"pixels": ' + b"1" * 100_000 + b"}", "body"),
    "millions of files": (b'{"encoded": {"files": [' + b'"",' * 1_000_000 + b'""]}}', "body"),
    "nothing": (b"{}", "images"),
    "one byte": (b'{"pixels": "AA=="}', "pixels"),
    "no image": (b'{"encoded": {"files": ["AA=="]}}', "encoded.files[0]"),
}


@pytest.mark.parametrize("name", BAD_JSON)
async def test_bad_json_is_answered_with_a_status_that_names_the_field(name: str, kind: Any, served: Served) -> None:
    body, field = BAD_JSON[name]
    async with kind.to(served) as client:
        reply = await client.ask("POST", "/v1/classify", JSON, body)
        assert (reply.status, reply.json["code"]) == (400, 3)
        (detail,) = reply.json["details"]
        assert detail["@type"] == "type.googleapis.com/google.rpc.BadRequest"
        assert detail["fieldViolations"] == [{"field": field, "description": reply.json["message"]}]
        assert len(reply.body) < 2000
        assert "of a wrong type column" not in reply.json["message"], "where the parser stopped"
        assert not re.search("Error|object|operand|method|concatenate", reply.json["message"]), "no words of Python"
        assert (await client.ask("GET", "/healthz")).status == 200


WRONG: dict[str, tuple[str, str, Headers, int, int, dict[str, str]]] = {
    "unknown path": ("GET", "/", (), 404, 5, {}),
    "nearly a path": ("GET", "/healthz/", (), 404, 5, {}),
    "health by another method": ("DELETE", "/healthz", (), 405, 12, {"allow": "GET, HEAD"}),
    "classify by another method": ("GET", "/v1/classify", (), 405, 12, {"allow": "POST"}),
    "an unknown method": ("BREW", "/metrics", (), 405, 12, {"allow": "GET, HEAD"}),
    "a method of gRPC in JSON": ("POST", "/mnist.v1.DigitClassifier/Classify", JSON, 415, 3, {}),
    "a method of gRPC by another": ("GET", "/mnist.v1.DigitClassifier/Classify", (), 405, 12, {"allow": "POST"}),
    "a form": ("POST", "/v1/classify", [("content-type", "application/x-www-form-urlencoded")], 415, 3, {}),
    "no content type": ("POST", "/v1/classify", (), 415, 3, {}),
    "compressed": ("POST", "/v1/classify", [*JSON, ("content-encoding", "gzip")], 415, 3, {}),
    "no time": ("POST", "/v1/classify", [*JSON, ("grpc-timeout", "soon")], 400, 3, {}),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_is_not_offered_is_answered_with_a_sentence(name: str, kind: Any, served: Served) -> None:
    method, target, headers, status, code, more = WRONG[name]
    async with kind.to(served) as client:
        reply = await client.ask(method, target, headers, b"x" if method == "POST" else b"")
        assert (reply.status, reply.json["code"]) == (status, code)
        assert reply.json["message"]
        assert more.items() <= reply.headers.items()
        assert (await client.ask("GET", "/healthz")).status == 200, "the connection goes on"


async def test_a_fault_is_answered_with_its_incident_and_no_python_text(
    kind: Any, served: Served, golden_files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(DigitService, "_submit", broken)
    async with kind.to(served) as client:
        reply = await client.ask("POST", "/v1/classify", FILE, golden_files[0])
    assert (reply.status, reply.json["code"]) == (500, Internal.number)
    assert "incident" in reply.json["message"]
    assert b"secret" not in reply.body


async def test_without_a_model_a_call_is_refused(kind: Any) -> None:
    async with server_of(loaded=False) as served, kind.to(served) as client:
        reply = await client.ask("POST", "/v1/classify", FILE, b"x")
        assert (reply.status, reply.json["code"]) == (503, 14)


async def test_a_deadline_that_has_passed_is_told(kind: Any, served: Served, golden_files: list[bytes]) -> None:
    async with kind.to(served) as client:
        reply = await client.ask("POST", "/v1/classify", [*FILE, ("grpc-timeout", "1n")], golden_files[0])
        assert (reply.status, reply.json["code"]) == (504, DeadlineExceeded.number)
        assert served.watch.ends == [(CLASSIFY, "DEADLINE_EXCEEDED")]


async def test_a_deadline_passes_while_the_images_are_computed(
    kind: Any, golden_files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    run_batch = Classifier.run_batch

    def held(self: Classifier, blocks: Sequence[Rows]) -> list[Scores]:
        assert go.wait(TIMEOUT)
        return run_batch(self, blocks)

    monkeypatch.setattr(server.service, "INLINE_SIZE", 0)
    monkeypatch.setattr(Classifier, "run_batch", held)
    async with server_of() as served, kind.to(served) as client:
        reply = await client.ask("POST", "/v1/classify", [*FILE, ("grpc-timeout", "100m")], golden_files[0])
        assert (reply.status, reply.json["code"]) == (504, DeadlineExceeded.number)
        assert served.watch.ends == [(CLASSIFY, "DEADLINE_EXCEEDED")]
        go.set()


def test_every_code_has_its_status() -> None:
    assert set(HTTP_STATUSES) == {code.name for code in grpc.StatusCode} - {"OK"}


@pytest.mark.parametrize(
    ("target", "path"),
    [("/a?b=/c", "/a"), ("http://x:1/a/b?c", "/a/b"), ("http://x", "/"), ("//x/a", "//x/a"), ("*", "*")],
)
def test_the_path_of_a_target(target: str, path: str) -> None:
    assert Request("GET", target, []).path == path


# Limits ----------------------------------------------------------------------------------


async def test_a_body_over_the_limit_is_refused(kind: Any, golden: Golden) -> None:
    async with server_of(max_message_bytes=1 << 20) as served:
        for headers, size in [(FILE, (1 << 20) + 1), (JSON, (2 << 20) + 1)]:
            async with kind.to(served) as client:
                reply = await client.ask("POST", "/v1/classify", headers, bytes(size))
                assert (reply.status, reply.json["code"]) == (413, 3)
                assert str(size - 1) in reply.json["message"]
        rows = np.tile(golden[0], (65, 1))  # nearly the limit in pixels, and over it as base64
        async with kind.to(served) as client:
            reply = await client.ask("POST", "/v1/classify", JSON, in_json(pb.ClassifyRequest(pixels=rows.tobytes())))
            assert reply.status == 200


async def test_a_body_of_unknown_length_is_refused_when_it_is_over_the_limit() -> None:
    async with server_of(max_message_bytes=1024, loaded=False) as served:
        async with Http1.to(served) as client:
            client.request("POST", "/v1/classify", [*FILE, ("transfer-encoding", "chunked")])
            client.send(b"800\r\n" + bytes(2048) + b"\r\n")  # and no end
            assert (await client.reply()).status == 413
            assert await client.is_closed()
        async with Http2.to(served) as client2:
            number = client2.begin("POST", "/v1/classify", FILE)
            client2.h2.send_data(number, bytes(1025))
            client2.flush()
            assert (await client2.reply(number)).status == 413
            assert (await client2.ask("GET", "/healthz")).status == 503


async def test_headers_over_the_limit_are_refused(kind: Any, served: Served) -> None:
    async with kind.to(served) as client:
        large = "a" * (limits.MAX_METADATA_BYTES // 2)
        reply = await client.ask("GET", "/healthz", [("x-a", large), ("x-b", large)])
        assert reply.status == 431


async def test_headers_without_an_end_are_refused(served: Served) -> None:
    async with Http1.to(served) as client:
        client.send(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * limits.MAX_METADATA_BYTES)
        assert (await client.reply()).status == 431
        assert await client.is_closed()


async def test_a_full_queue_refuses_with_a_hint_when_to_try_again(kind: Any, golden: Golden) -> None:
    async with server_of(max_wait_ms=60_000, max_queue_size=2) as served:
        request = in_json(pb.ClassifyRequest(pixels=golden[0][:2].tobytes()))
        async with kind.to(served) as first, kind.to(served) as client:
            waiting = asyncio.create_task(first.ask("POST", "/v1/classify", JSON, request))
            await served.watch.waits.wait()
            for _ in range(2):
                reply = await client.ask("POST", "/v1/classify", JSON, request)
                assert (reply.status, reply.json["code"]) == (429, 8)
                (detail,) = reply.json["details"]
                delay = float(detail["retryDelay"].rstrip("s"))
                assert int(reply.headers["retry-after"]) == max(1, math.ceil(delay))
                assert (await client.ask("GET", "/healthz")).status == 200
            assert served.watch.ends == [(CLASSIFY, "RESOURCE_EXHAUSTED")] * 2
            served.server._service.drain()  # ends the window
            assert (await waiting).status == 200


# Tokens ----------------------------------------------------------------------------------


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(TOKEN)
    path.chmod(0o600)
    return path


async def test_all_but_health_asks_for_a_token(kind: Any, token_file: Path, golden_files: list[bytes]) -> None:
    async with server_of(auth_token_file=str(token_file)) as served, kind.to(served) as client:
        assert (await client.ask("GET", "/healthz")).status == 200
        for method, path in [("POST", "/v1/classify"), ("GET", "/metrics"), ("GET", "/nowhere")]:
            for headers in [(), [("authorization", "Bearer x")], [("authorization", f"Bearer {TOKEN}")] * 2]:
                reply = await client.ask(method, path, headers, b"x" if method == "POST" else b"")
                assert (reply.status, reply.json["code"]) == (401, 16)
                assert reply.headers["www-authenticate"] == "Bearer"
        assert set(served.watch.ends) == {(ANY_METHOD, "UNAUTHENTICATED")}
        good = [*FILE, ("authorization", f"bearer {TOKEN}")]
        assert (await client.ask("POST", "/v1/classify", good, golden_files[0])).status == 200
        assert (await client.ask("GET", "/metrics", good)).status == 404


async def test_a_body_is_not_asked_for_without_a_token(token_file: Path, golden_files: list[bytes]) -> None:
    async with server_of(auth_token_file=str(token_file)) as served:
        expects = [*FILE, ("expect", "100-continue"), ("content-length", str(len(golden_files[0])))]
        async with Http1.to(served) as client:
            client.request("POST", "/v1/classify", expects)
            reply = await client.reply()
            assert (reply.status, reply.headers["connection"]) == (401, "close")
            assert await client.is_closed()
        async with Http1.to(served) as client:
            client.request("POST", "/v1/classify", [*expects, ("authorization", f"Bearer {TOKEN}")])
            assert (await client.reply()).status == 100
            client.send(golden_files[0])
            assert (await client.reply()).status == 200


# HTTP/1.1 --------------------------------------------------------------------------------


async def test_requests_that_come_at_once_are_answered_one_after_the_other(
    served: Served, golden_files: list[bytes]
) -> None:
    async with Http1.to(served) as client:
        for number in range(20):
            client.request("POST", "/v1/classify", [*FILE, ("x-request-id", str(number))], golden_files[number])
        client.request("HEAD", "/healthz")
        client.request("GET", "/healthz")
        for number in range(20):
            reply = await client.reply()
            assert (reply.status, reply.headers["x-request-id"]) == (200, str(number))
        await client.reply(to_head=True)
        assert (await client.reply()).body == b"SERVING\n"


async def test_a_request_may_come_byte_by_byte(served: Served, golden_files: list[bytes]) -> None:
    async with Http1.to(served) as client:
        head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = b"".join(b"1\r\n%c\r\n" % byte for byte in golden_files[0]) + b"0\r\n\r\n"
        for byte in head + body:
            client.send(bytes([byte]))
            await client.writer.drain()
        assert (await client.reply()).status == 200


async def test_http_1_0_is_answered_and_closed(served: Served) -> None:
    async with Http1.to(served) as client:
        client.request("GET", "/healthz", version="1.0")
        reply = await client.reply()
        assert (reply.status, reply.body) == (200, b"SERVING\n")
        assert await client.is_closed()


async def test_a_client_that_wants_no_more_is_let_go(served: Served) -> None:
    async with Http1.to(served) as client:
        client.request("GET", "/healthz", [("connection", "close")])
        assert (await client.reply()).status == 200
        assert await client.is_closed()


BROKEN = {
    "no HTTP": (b"hello\r\n\r\n", 400),
    "binary": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    "nearly HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", 505),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two lengths": (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
    "a length that is none": (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
    "a folded name": (b"GET / HTTP/1.1\r\nhost: x\r\na b: c\r\n\r\n", 400),
    "an unknown coding": (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n", 501),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_broken_requests_are_refused_and_the_connection_ends(name: str, served: Served) -> None:
    data, status = BROKEN[name]
    async with Http1.to(served) as client:
        client.send(data)
        reply = await client.reply()
        assert reply.status == status
        assert reply.headers["connection"] == "close"
        assert reply.json["message"]
        assert await client.is_closed()


async def test_a_body_with_two_lengths_is_answered_and_the_connection_ends(
    served: Served, golden_files: list[bytes]
) -> None:
    """RFC 9112, 6.1: what is between here and the client may have taken the other one."""
    async with Http1.to(served) as client:
        chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(golden_files[0]), golden_files[0])
        client.request("POST", "/v1/classify", [*FILE, ("content-length", "5"), ("transfer-encoding", "chunked")])
        client.send(chunk)
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await client.is_closed()


async def test_a_refusal_before_a_long_body_says_that_the_connection_ends(served: Served) -> None:
    for length, closes in ((served.server._settings.max_message_bytes + 1, True), (100, False)):
        async with Http1.to(served) as client:
            client.request("POST", "/v1/classify", [("content-type", "text/x"), ("content-length", str(length))])
            reply = await client.reply()
            assert (reply.status, reply.headers.get("connection")) == (415, "close" if closes else None)
            if not closes:
                client.send(bytes(length))
                assert (await client.ask("GET", "/healthz")).status == 200


async def test_a_refusal_reaches_a_client_that_sends_its_body_to_the_end(served: Served) -> None:
    """curl takes a reset behind an answer for a fault, and does not show the answer."""
    async with Http2.to(served) as client:
        number = client.begin("POST", "/v1/classify", [("content-type", "text/x"), ("content-length", "600000")])
        await client.more()
        reply = await client.reply(number)
        assert reply.status == 415
        body = bytes(600_000)
        while body:
            room = min(client.h2.local_flow_control_window(number), client.h2.max_outbound_frame_size)
            if not room:
                await client.more()
                continue
            client.h2.send_data(number, body[:room], end_stream=len(body) <= room)
            client.flush()
            body = body[room:]
        assert (await client.ask("GET", "/healthz")).status == 200
        assert not any(isinstance(event, h2.events.StreamReset) for event in client.events[number])


async def test_a_body_that_is_still_sent_long_after_its_refusal_is_not_waited_for(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.http2.plain_call.MAX_THROWN_AWAY", 1000)
    async with Http2.to(served) as client:
        number = client.begin("POST", "/v1/classify", [("content-type", "text/x")])
        assert (await client.reply(number)).status == 415
        client.h2.send_data(number, bytes(1001))
        client.flush()
        while not any(isinstance(event, h2.events.StreamReset) for event in client.events[number]):
            await client.more()


@pytest.mark.parametrize("length", ["5", "50", "five"])
async def test_a_body_of_another_length_than_announced_is_refused(length: str, served: Served) -> None:
    async with Http2.to(served) as client:
        client.h2.config.validate_outbound_headers = False
        reply = await client.ask("POST", "/v1/classify", [*FILE, ("content-length", length)], bytes(20))
        assert (reply.status, reply.json["code"]) == (400, 3)
        assert reply.json["message"].startswith(f"content-length: a body of {length} bytes was announced, 20 came")


async def test_an_answer_that_waits_for_the_window_comes_whole_whatever_becomes_of_the_body(served: Served) -> None:
    async with Http2.to(served) as client:
        client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        client.flush()
        number = client.begin("POST", "/nothing")
        while not client.events[number]:
            await client.more()
        client.h2.send_data(number, b"", end_stream=True)
        client.flush()
        client.h2.ping(bytes(8))
        client.flush()
        await client.more()
        client.h2.increment_flow_control_window(1000, number)
        client.flush()
        reply = await client.reply(number)
        assert (reply.status, reply.json["code"]) == (404, 5)
        assert not any(isinstance(event, h2.events.StreamReset) for event in client.events[number])


async def test_requests_that_are_sent_ahead_are_not_taken_in(served: Served) -> None:
    request = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    answered = 0
    async with Http1.to(served) as client:
        client.writer.transport.set_write_buffer_limits(high=0)
        sending = asyncio.create_task(send_for_ever(client, request * 5000))
        for _ in range(300):
            assert (await client.reply()).status == 200
            answered += 1
        (connection,) = served.server._server.connections
        assert len(connection._http.trailing_data[0]) < 1_000_000, "what came was taken in as if it were asked for"
        sending.cancel()


async def send_for_ever(client: Http1, data: bytes) -> None:
    while True:
        client.send(data)
        await client.writer.drain()


async def test_work_that_takes_long_lets_others_have_a_turn(
    kind: Any, served: Served, golden_files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("connection", "http1"):
        monkeypatch.setattr(f"server.http2.{module}.TURN_SECONDS", -1.0)  # whatever comes
    async with kind.to(served) as client:
        for _ in range(3):
            assert (await client.ask("POST", "/v1/classify", FILE, golden_files[0])).status == 200
        many = in_json(pb.ClassifyRequest(pixels=bytes(784 * 2000)))
        assert (await client.ask("POST", "/v1/classify", JSON, many)).status == 200


async def test_a_broken_chunk_is_refused(served: Served) -> None:
    async with Http1.to(served) as client:
        client.request("POST", "/v1/classify", [*FILE, ("transfer-encoding", "chunked")])
        client.send(b"zz\r\n")
        assert (await client.reply()).status == 400
        assert await client.is_closed()


@pytest.mark.parametrize("begun", [b"P", b"PRI * HTTP/2.0\r\n", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_never_ends_is_not_waited_for(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_SECONDS", 0.05)
    async with server_of(loaded=False) as served, Http1.to(served) as client:
        client.send(begun)
        assert await client.is_closed()


async def test_a_second_head_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_SECONDS", 0.05)
    async with server_of(loaded=False) as served, Http1.to(served) as client:
        client.request("GET", "/healthz")
        client.send(b"GET /heal")
        assert (await client.reply()).status == 503
        assert await client.is_closed()


async def test_a_body_that_stops_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "SILENCE_SECONDS", 0.05)
    async with server_of(loaded=False) as served, Http1.to(served) as client:
        client.request("POST", "/v1/classify", [*FILE, ("content-length", "10")])
        client.send(b"x")
        assert await client.is_closed()
        assert not served.server._service._announced


async def test_an_idle_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "IDLE_SECONDS", 0.05)
    async with server_of(loaded=False) as served, Http1.to(served) as client:
        assert (await client.ask("GET", "/healthz")).status == 503
        assert await client.is_closed()


async def test_a_client_that_does_not_read_gets_no_more_and_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "SILENCE_SECONDS", 0.2)
    pages: list[str] = []
    gone = asyncio.Event()
    lost = http1.Http1Connection.connection_lost

    def connection_lost(self: http1.Http1Connection, error: Exception | None) -> None:
        lost(self, error)
        gone.set()

    monkeypatch.setattr(http1.Http1Connection, "connection_lost", connection_lost)

    def page(accept: str) -> tuple[bytes, str]:
        pages.append(accept)
        return bytes(1 << 23), "text/plain"

    async with server_of(loaded=False, metrics_page=page) as served, Http1.to(served) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(10):
            client.request("GET", "/metrics")
        await gone.wait()
        assert len(pages) == 1


# Those who leave, and the end -----------------------------------------------------------


async def test_a_client_that_leaves_takes_its_images_out_of_the_queue(kind: Any, golden_files: list[bytes]) -> None:
    async with server_of(max_wait_ms=60_000) as served:
        async with kind.to(served) as client:
            asked = asyncio.create_task(client.ask("POST", "/v1/classify", FILE, golden_files[0]))
            await served.watch.waits.wait()
            asked.cancel()
        await served.watch.over.wait()
        assert served.watch.ends == [(CLASSIFY, "CANCELLED")]
        assert not served.watch.waits.is_set()


async def test_a_stream_that_is_reset_takes_its_images_out_of_the_queue(golden_files: list[bytes]) -> None:
    async with server_of(max_wait_ms=60_000) as served, Http2.to(served) as client:
        number = client.begin("POST", "/v1/classify", FILE)
        await client.send_body(number, golden_files[0])
        await served.watch.waits.wait()
        client.h2.reset_stream(number)
        client.flush()
        await served.watch.over.wait()
        assert served.watch.ends == [(CLASSIFY, "CANCELLED")]
        assert (await client.ask("GET", "/healthz")).status == 200


async def test_streams_that_are_reset_at_once_leave_nothing_behind(served: Served) -> None:
    async with Http2.to(served) as client:
        for _ in range(4):
            for _ in range(limits.MAX_STREAMS - 10):
                client.h2.reset_stream(client.begin("POST", "/v1/classify", FILE))
            client.flush()
            assert (await client.ask("GET", "/healthz")).status == 200
        assert not served.server._service._announced


async def test_a_stop_waits_for_the_answer_and_closes(kind: Any, golden_files: list[bytes]) -> None:
    async with server_of(max_wait_ms=60_000) as served, kind.to(served) as client, Http1.to(served) as idle:
        assert (await idle.ask("GET", "/healthz")).status == 200
        asked = asyncio.create_task(client.ask("POST", "/v1/classify", FILE, golden_files[0]))
        await served.watch.waits.wait()
        stopping = asyncio.create_task(served.server.stop(grace=TIMEOUT))
        reply = await asked
        assert reply.status == 200
        if kind is Http1:
            assert reply.headers["connection"] == "close"
        client.writer.close()
        assert await idle.is_closed()
        await stopping


async def test_a_stop_without_grace_tells_those_who_wait(
    kind: Any, golden_files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server_of(max_wait_ms=60_000) as served, kind.to(served) as client:
        asked = asyncio.create_task(client.ask("POST", "/v1/classify", FILE, golden_files[0]))
        await served.watch.waits.wait()
        monkeypatch.setattr(served.server._service, "drain", lambda: None)  # else it would be answered
        await served.server.stop(grace=0)
        reply = await asked
        assert (reply.status, reply.json["code"]) == (503, 14)


async def test_a_connection_that_is_too_old_ends_with_its_next_answer() -> None:
    async with server_of(loaded=False, max_connection_age=0.05) as served, Http1.to(served) as client:
        assert (await client.ask("GET", "/healthz")).status == 503
        assert await client.is_closed()


async def test_a_body_that_is_not_whole_at_the_end_of_a_connection_s_age_is_answered(kind: Any) -> None:
    age: dict[str, Any] = {"max_connection_age": 0.3, "max_connection_age_grace": 0.1}
    async with server_of(**age) as served, kind.to(served) as client:
        if kind is Http1:
            client.send(
                b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: 9\r\n\r\n1"
            )
            reply = await client.reply()
        else:
            reply = await client.reply(client.begin("POST", "/v1/classify", [("content-type", "image/png")]))
        assert (reply.status, reply.json["code"]) == (503, 14)


async def test_who_waits_at_the_end_of_a_connection_s_age_is_told_so(
    kind: Any, golden_files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    age: dict[str, Any] = {"max_connection_age": 0.3, "max_connection_age_grace": 0.1}
    async with server_of(max_wait_ms=60_000, **age) as served, kind.to(served) as client:
        reply = await client.ask("POST", "/v1/classify", FILE, golden_files[0])
        assert (reply.status, reply.json["code"]) == (503, 14)
        assert "greatest age" in reply.json["message"]


# TLS -------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, Any]:
    """The settings of a server that signed its certificate itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "server.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "server.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "server.key").chmod(0o600)
    return {"tls_cert": str(tmp_path / "server.pem"), "tls_key": str(tmp_path / "server.key")}


@pytest.mark.parametrize(("protocols", "of"), [(["h2"], Http2), (["http/1.1"], Http1), ([], Http1)])
async def test_over_tls_a_client_speaks_what_it_chose(
    protocols: list[str], of: Any, certificate: dict[str, Any], golden_files: list[bytes]
) -> None:
    context = ssl.create_default_context(cafile=certificate["tls_cert"])
    if protocols:
        context.set_alpn_protocols(protocols)
    async with server_of(**certificate) as served, of.to(served, context) as client:
        chosen = client.writer.get_extra_info("ssl_object").selected_alpn_protocol()
        assert chosen == (protocols[0] if protocols else None)
        assert (await client.ask("GET", "/healthz")).body == b"SERVING\n"
        reply = await client.ask("POST", "/v1/classify", FILE, golden_files[0])
        assert reply.status == 200


async def test_a_client_that_does_not_say_farewell_holds_up_no_stop(kind: Any, certificate: dict[str, Any]) -> None:
    context = ssl.create_default_context(cafile=certificate["tls_cert"])
    context.set_alpn_protocols(["h2" if kind is Http2 else "http/1.1"])
    async with server_of(**certificate) as served, kind.to(served, context) as client:
        assert (await client.ask("GET", "/healthz")).status == 200
        client.writer.transport.pause_reading()
        async with asyncio.timeout(TIMEOUT):
            await served.server.stop(grace=10 * TIMEOUT)
        client.writer.transport.abort()


async def test_plain_text_at_a_port_of_tls_gets_nothing(certificate: dict[str, Any]) -> None:
    async with server_of(loaded=False, **certificate) as served, Http1.to(served) as client:
        client.request("GET", "/healthz")
        assert await client.is_closed()


# Without a socket ------------------------------------------------------------------------


def test_a_time_to_try_again_is_in_whole_seconds_rounded_up() -> None:
    assert plain.retry_after(0.02) == b"1"
    assert plain.retry_after(1.0) == b"1"
    assert plain.retry_after(1.2) == b"2"


def test_base64_of_images_fits_the_margin_of_json() -> None:
    assert len(base64.b64encode(bytes(3000))) < plain.JSON_MARGIN * 3000
