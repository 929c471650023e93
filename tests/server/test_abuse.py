"""Clients that no gRPC library would be: what they do to the real process, and that it goes on answering others."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import hpack
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

import client as mnist
import server.limits
from client._channel import channel_options
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server.app import build_server
from server.limits import (
    HANDSHAKE_SECONDS,
    MAX_METADATA_BYTES,
    MAX_PING_STRIKES,
    MAX_STREAMS,
    MIN_PING_INTERVAL_SECONDS,
    connection_options,
)
from server.settings import MAX_SECONDS, Settings
from tests.server.attacks import listeners
from tests.server.http2.peer import Frame, frame

Start = Callable[..., tuple[str, subprocess.Popen[str]]]

TIMEOUT = 30
SERVICE = "mnist.v1.DigitClassifier"
LARGE = "inference.GRPCInferenceService"
"""What reflection says of it takes more than 100 times as many bytes as the question."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
ACK, END_STREAM, END_HEADERS = 1, 1, 4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4
REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 7, 8, 11
MIB = 1 << 20


class RawClient:
    """HTTP/2 by hand, so that what is sent may break any rule."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=TIMEOUT)
        self._reader = self.socket.makefile("rb")
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        self._next_stream = 1
        self.send(PREFACE, frame(SETTINGS, 0, 0, b""))

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(frames))

    def open(self, path: str | bytes, *more: tuple[str, str | bytes], flags: int = END_HEADERS) -> tuple[int, bytes]:
        """A new call's number, and the frame that begins it."""
        number = self._next_stream
        self._next_stream += 2
        pseudo = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
        block = self._encoder.encode([*pseudo, ("content-type", "application/grpc"), ("te", "trailers"), *more])
        return number, frame(HEADERS, flags, number, block)

    def frames(self) -> Iterator[Frame]:
        """What the server sends, until it closes the connection; its settings and pings are acknowledged."""
        with contextlib.suppress(ConnectionResetError):
            while head := self._reader.read(9):
                length, kind, flags, stream = struct.unpack(">I", b"\0" + head[:3])[0], head[3], head[4], head[5:]
                received = Frame(kind, flags, struct.unpack(">I", stream)[0], self._reader.read(length))
                if kind in (SETTINGS, PING) and not flags & ACK:
                    with contextlib.suppress(OSError):  # the server may close before it reads this
                        self.send(frame(kind, ACK, 0, received.content if kind == PING else b""))
                yield received

    def headers_in(self, received: Frame) -> dict[str, str]:
        return {str(name): str(value) for name, value in self._decoder.decode(received.content)}

    def close(self) -> None:
        self._reader.close()
        self.socket.close()


@pytest.fixture
def client_of() -> Iterator[Callable[[str], RawClient]]:
    clients: list[RawClient] = []

    def connect(address: str) -> RawClient:
        clients.append(RawClient(address))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def a_ping() -> bytes:
    return frame(PING, 0, 0, bytes(8))


def one_image() -> bytes:
    content = pb.ClassifyRequest(pixels=bytes(784)).SerializeToString()
    return struct.pack(">BI", 0, len(content)) + content


def status_of(client: RawClient, number: int) -> str:
    """The gRPC status with which the server ends a call."""
    for received in client.frames():
        if received.kind == HEADERS:
            status = client.headers_in(received).get("grpc-status")
            if received.stream == number and status is not None:
                return status
        if received.kind == RESET and received.stream == number:
            return f"reset with {received.error}"
    return "closed"


def check_answers(address: str) -> None:
    """A caller with manners gets an answer, on a connection of its own."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub: Any = pb_grpc.DigitClassifierStub(channel)
        assert len(stub.Classify(pb.ClassifyRequest(pixels=bytes(784)), timeout=TIMEOUT).digits) == 1
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@asynccontextmanager
async def server_of(**settings: Any) -> AsyncIterator[str]:
    """A server in this process, without a model."""
    digit_server, port = build_server(Settings(port=0, **settings))
    await digit_server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await digit_server.stop(grace=0)


def memory_of(process: subprocess.Popen[str]) -> int:
    """Bytes of RAM."""
    return int(psutil.Process(process.pid).memory_info().rss)


def wait_for_memory_below(limit: int, process: subprocess.Popen[str]) -> None:
    """Give the process time to work through what it has taken in."""
    end = time.monotonic() + TIMEOUT
    while (taken := memory_of(process)) >= limit:
        assert time.monotonic() < end, f"{taken / MIB:.0f} MiB are taken, {limit / MIB:.0f} are the limit"
        time.sleep(0.02)


# Pings ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_call", [False, True], ids=["without a call", "with an open call"])
def test_a_client_that_pings_too_often_is_told_so_and_cut_off(
    with_call: bool, server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, _ = server_process("--workers", "1")
    client = client_of(address)
    if with_call:
        client.send(client.open(f"/{SERVICE}/StreamClassify")[1])
    client.send(a_ping())
    answered, goodbyes = 0, []
    for received in client.frames():  # to their end: the server closes the connection
        if received.kind == PING and received.flags & ACK:
            answered += 1
            with contextlib.suppress(OSError):
                client.send(a_ping())
        if received.kind == GOAWAY:
            goodbyes.append((received.error, received.content[8:]))
    assert goodbyes == [(ENHANCE_YOUR_CALM, b"too_many_pings")]
    assert answered >= 1
    check_answers(address)


def test_a_client_that_pings_now_and_then_is_served_on(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, _ = server_process("--workers", "1")
    client = client_of(address)
    for _ in range(MAX_PING_STRIKES):
        client.send(a_ping())
        assert any(received.kind == PING and received.flags & ACK for received in client.frames())
    number, opening = client.open(f"/{SERVICE}/Classify")
    client.send(opening, frame(DATA, END_STREAM, number, one_image()))
    assert status_of(client, number) == "0"


async def test_a_client_without_calls_may_ping_as_often_as_one_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval is shortened for the test; gRPC's own, for a client without calls, is two hours."""
    monkeypatch.setattr(server.limits, "MIN_PING_INTERVAL_SECONDS", 0.05)

    def ping(address: str) -> int:
        client = RawClient(address)
        answered = 0
        for _ in range(3 * (MAX_PING_STRIKES + 1)):
            time.sleep(0.1)
            client.send(a_ping())
            answered += any(received.kind == PING and received.flags & ACK for received in client.frames())
        client.close()
        return answered

    async with server_of() as address:
        assert await asyncio.to_thread(ping, address) == 3 * (MAX_PING_STRIKES + 1)


def test_the_sdk_pings_less_often_than_it_may() -> None:
    options: dict[str, Any] = dict(channel_options("localhost:50051"))
    assert options["grpc.keepalive_time_ms"] >= 1.5 * 1000 * MIN_PING_INTERVAL_SECONDS


async def test_a_client_that_no_longer_answers_pings_is_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are shortened for the test."""
    monkeypatch.setattr(server.limits, "KEEPALIVE_SECONDS", 1.0)
    monkeypatch.setattr(server.limits, "KEEPALIVE_TIMEOUT_SECONDS", 1.0)
    async with server_of() as address, asyncio.timeout(TIMEOUT):
        reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
        writer.write(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(SETTINGS, ACK, 0, b""))
        with contextlib.suppress(ConnectionResetError):
            await reader.read()  # until the server closes it
        writer.close()


# Old connections ---------------------------------------------------------------------------


def test_without_an_age_connections_may_become_as_old_as_they_like() -> None:
    names = {name for name, _ in connection_options(Settings())}
    assert not names & {"grpc.max_connection_age_ms", "grpc.max_connection_age_grace_ms"}


@pytest.mark.parametrize("grace", [0.0, 2.5, MAX_SECONDS])
def test_an_age_never_comes_without_a_grace(grace: float) -> None:
    options = dict(connection_options(Settings(max_connection_age=MAX_SECONDS, max_connection_age_grace=grace)))
    assert options["grpc.max_connection_age_ms"] == 2**31 - 1  # gRPC's infinity; more would overflow
    assert options["grpc.max_connection_age_grace_ms"] == min(int(grace * 1000), 2**31 - 1)


def talk(address: str, answered: list[int]) -> None:
    """Send frames, one after the answer to the other, until the stream ends; it should end with an error.

    Not with grpc.aio, where a write that fails takes the place of the status that came before (grpc#36066).
    """
    may_send = threading.Semaphore(1)

    def requests() -> Iterator[pb.StreamClassifyRequest]:
        for number in itertools.count():
            may_send.acquire()
            yield pb.StreamClassifyRequest(first_sequence=number, frames=pb.ClassifyRequest(pixels=bytes(784)))

    with grpc.insecure_channel(address) as channel:
        classifier: Any = pb_grpc.DigitClassifierStub(channel)
        try:
            for response in classifier.StreamClassify(requests(), timeout=TIMEOUT):
                answered.append(response.blocks[0].first_sequence)
                may_send.release()
        finally:
            may_send.release()  # or gRPC would wait for the next request


async def test_a_stream_of_an_old_connection_is_ended_after_the_grace_and_no_unary_call_fails_meanwhile(
    server_process: Start,
) -> None:
    address, _ = server_process("--workers", "1", "--max-connection-age", "0.5", "--max-connection-age-grace", "1.5")
    request = pb.ClassifyRequest(pixels=bytes(784))
    async with grpc.aio.insecure_channel(address) as channel:
        classifier: Any = pb_grpc.DigitClassifierStub(channel)
        stopped = asyncio.Event()

        async def call() -> int:
            calls = 0
            while not stopped.is_set():
                await classifier.Classify(request, timeout=TIMEOUT)
                calls += 1
            return calls

        calling = [asyncio.create_task(call()) for _ in range(4)]
        answered: list[int] = []
        with pytest.raises(grpc.RpcError) as error:
            await asyncio.to_thread(talk, address, answered)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert answered == list(range(len(answered)))
        assert answered
        stopped.set()
        assert min(await asyncio.gather(*calling)) > 0, "each would have raised"


# Connections and streams that never get anywhere ----------------------------------------------


async def test_a_connection_that_never_gets_to_http2_is_closed(server_process: Start) -> None:
    address, process = server_process("--workers", "1")
    host, port = address.rsplit(":", 1)
    connections = len(psutil.Process(process.pid).net_connections("tcp"))

    async def end_of(beginning: bytes) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(beginning)
        with contextlib.suppress(ConnectionResetError):
            await reader.read()  # until the server closes it
        writer.close()

    # Nothing, half of HTTP/2's first words, all of them without the settings that have to follow, half of these.
    beginnings = [b"", PREFACE[:10], PREFACE, PREFACE + frame(SETTINGS, 0, 0, bytes(6))[:7]]
    async with asyncio.timeout(HANDSHAKE_SECONDS + TIMEOUT):
        await asyncio.gather(*(end_of(beginning) for beginning in beginnings * 25))
    check_answers(address)
    assert len(psutil.Process(process.pid).net_connections("tcp")) <= connections + 1  # one of check_answers, perhaps


def test_another_protocol_is_closed_at_once(server_process: Start) -> None:
    address, _ = server_process("--workers", "1")
    host, port = address.rsplit(":", 1)
    # One transport speaks HTTP/1.1 and answers; it is asked to close.
    for words in (
        b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + bytes(512),
        b"\0" * 64,
    ):
        with socket.create_connection((host, int(port)), timeout=HANDSHAKE_SECONDS / 2) as connection:
            connection.sendall(words)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(65536):
                    pass
    check_answers(address)


def test_a_connection_may_open_so_many_streams_and_each_one_more_is_refused(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, _ = server_process("--workers", "1")
    client = client_of(address)
    path = f"/{SERVICE}/StreamClassify"
    frames = client.frames()
    settings = next(received for received in frames if received.kind == SETTINGS)
    assert dict(struct.iter_unpack(">HI", settings.content))[MAX_CONCURRENT_STREAMS] == MAX_STREAMS
    client.send(*(client.open(path)[1] for _ in range(MAX_STREAMS)))
    surplus = dict(client.open(path) for _ in range(20))
    client.send(*surplus.values())
    refused = {}
    for received in frames:
        if received.kind == RESET:
            refused[received.stream] = received.error
            if len(refused) == len(surplus):
                break
    assert refused.keys() == surplus.keys(), "these and no other"
    assert set(refused.values()) <= {REFUSED_STREAM, ENHANCE_YOUR_CALM}
    check_answers(address)


# Headers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1, 100])
@pytest.mark.parametrize(
    ("total", "code"),
    [
        (MAX_METADATA_BYTES - 1024, grpc.StatusCode.OK),
        (MAX_METADATA_BYTES + 128, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (MIB, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_headers_beyond_the_limit_are_always_refused_and_below_it_never(
    total: int, code: grpc.StatusCode, entries: int, running_server: str
) -> None:
    async with grpc.aio.insecure_channel(running_server) as channel:
        classifier: Any = pb_grpc.DigitClassifierStub(channel)
        metadata = [(f"x-{number:04}", "v" * (total // entries - 38)) for number in range(entries)]
        for _ in range(10):  # with gRPC's own two limits it would be refused by chance
            call = classifier.GetModel(pb.GetModelRequest(), metadata=metadata, timeout=TIMEOUT)
            assert await call.code() == code
        assert (await classifier.GetModel(pb.GetModelRequest(), timeout=TIMEOUT)).name == "mnist"


def test_headers_without_an_end_are_answered_and_not_kept(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, process = server_process("--workers", "1")
    client = client_of(address)
    check_answers(address)
    before = memory_of(process)
    number, opening = client.open(f"/{SERVICE}/Classify", flags=0)
    junk = b"".join(b"\x00\x05k%04d\x64" % n + b"v" * 100 for n in range(100))  # not to be indexed, so nothing to keep
    block = frame(CONTINUATION, 0, number, junk)
    sent = 0
    client.send(opening)
    try:
        while sent < 600 * MIB:
            client.send(block * 50)
            sent += 50 * len(block)
    except OSError:  # to end it is as good
        assert sent >= MAX_METADATA_BYTES
        wait_for_memory_below(before + 300 * MIB, process)
    else:
        assert status_of(client, number) == "8"  # RESOURCE_EXHAUSTED
        client.close()  # up to then gRPC's core may keep what comes (docs/transport.md, Under attack)
        wait_for_memory_below(before + 300 * MIB, process)
    check_answers(address)


def test_a_call_for_which_there_will_be_no_room_is_refused_before_its_message_comes(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, _ = server_process("--workers", "1", "--max-queue-size", "2", "--max-wait-ms", "60000")
    client = client_of(address)
    path = f"/{SERVICE}/Classify"
    for _ in range(2):  # these stay in the queue, in a window of a minute
        number, opening = client.open(path)
        client.send(opening, frame(DATA, END_STREAM, number, one_image()))
    status = "4"
    while status == "4":  # until the two are there
        number, opening = client.open(path, ("grpc-timeout", "20m"))
        client.send(opening, frame(DATA, END_STREAM, number, one_image()))
        status = status_of(client, number)
    assert status == "8"  # RESOURCE_EXHAUSTED
    number, opening = client.open(path)
    client.send(opening)
    assert status_of(client, number) == "8"


def test_calls_whose_messages_never_come_keep_nobody_out(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, _ = server_process("--workers", "1")
    with grpc.insecure_channel(address) as channel:
        stub: Any = pb_grpc.DigitClassifierStub(channel)
        for _ in range(20):  # so that calls are taken for large ones
            stub.Classify(pb.ClassifyRequest(pixels=bytes(1024 * 784)), timeout=TIMEOUT)
    client = client_of(address)
    client.send(*(client.open(f"/{SERVICE}/Classify")[1] for _ in range(100)))
    check_answers(address)


def test_a_token_that_is_no_text_is_refused_like_any_other(
    server_process: Start, client_of: Callable[[str], RawClient], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("right-0123456789abcdef", encoding="utf-8")
    address, process = server_process("--workers", "1", "--auth-token-file", str(tokens))
    client = client_of(address)
    for value in (b"Bearer \xff\xfe\x80", b"\xc3", b"Bearer \xe2\x82", b"Bearer " + b"\xf0" * 4000):
        number, opening = client.open(f"/{SERVICE}/Classify", ("authorization", value))
        client.send(opening, frame(DATA, END_STREAM, number, one_image()))
        assert status_of(client, number) == "16"  # UNAUTHENTICATED
    number, opening = client.open(f"/{SERVICE}/Classify", ("authorization", "Bearer right-0123456789abcdef"))
    client.send(opening, frame(DATA, END_STREAM, number, one_image()))
    assert status_of(client, number) == "0"
    client.close()
    process.terminate()
    _, err = process.communicate(timeout=TIMEOUT)
    assert "Traceback" not in err, "callers do not write our log"


# Paths ----------------------------------------------------------------------------------------

NO_TEXT = [b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"mnist.v1.DigitClassifier/Classify\xe2\x82"]
"""Paths without their slash that are no UTF-8."""


def call_what_is_no_text(client: RawClient, path: bytes, address: str, process: subprocess.Popen[str]) -> None:
    """Call such a path; wait until it is answered, and until a server that this ended has left its port."""
    usual = listeners(address, process.pid)
    number, opening = client.open(b"/" + path)
    client.send(opening, frame(DATA, END_STREAM, number, one_image()))
    status = ""
    for received in client.frames():
        if received.kind == HEADERS and received.stream == number:
            status = client.headers_in(received)["grpc-status"]
        # CANCELLED by grpcio's server that was ended: it says goodbye when another one listens beside it.
        if received.kind == GOAWAY or status not in ("", "1"):
            break
    assert status in ("1", "2", "12")
    end = time.monotonic() + TIMEOUT
    while listeners(address, process.pid) > usual:
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("workers", [1, 2])
def test_paths_that_are_no_text_end_their_own_calls_and_nobody_elses(
    workers: int,
    server_process: Start,
    client_of: Callable[[str], RawClient],
    golden: tuple[npt.NDArray[np.uint8], list[int]],
) -> None:
    address, process = server_process("--workers", str(workers), "--grace", "1")
    streaming = client_of(address)
    stream, opening = streaming.open(f"/{SERVICE}/StreamClassify")
    streaming.send(opening)
    frames = streaming.frames()

    def is_answered() -> bool:
        streaming.send(frame(DATA, 0, stream, some_frames(1)))
        return any(received.kind == DATA and received.stream == stream for received in frames)

    assert is_answered()
    stopped = threading.Event()

    def call_on() -> int:
        """As a service does with the SDK; raises what the SDK does."""
        calls = 0
        with mnist.Client(address, timeout=TIMEOUT, coalesce=False) as digits:
            while not stopped.is_set():
                digits.classify(golden[0][0].reshape(28, 28))
                calls += 1
        return calls

    with ThreadPoolExecutor() as pool:
        neighbours = [pool.submit(call_on) for _ in range(4)]
        try:
            for path in NO_TEXT * 3:
                call_what_is_no_text(client_of(address), path, address, process)
                check_answers(address)
        finally:
            stopped.set()
        assert min(neighbour.result() for neighbour in neighbours) > 0
    assert is_answered(), "a stream that was open before goes on"
    streaming.close()
    process.terminate()
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert "Traceback" not in err, "callers do not write our log"
    assert err.count("CRITICAL") <= workers, "at most one line a minute"


def test_a_hundred_paths_that_are_no_text_pile_up_nothing(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, process = server_process("--workers", "1")
    attacked = psutil.Process(process.pid)
    call_what_is_no_text(client_of(address), NO_TEXT[0], address, process)
    check_answers(address)
    memory, threads, files = memory_of(process), attacked.num_threads(), attacked.num_fds()
    for _ in range(100):
        client = client_of(address)
        call_what_is_no_text(client, NO_TEXT[0], address, process)
        client.close()
    check_answers(address)
    assert memory_of(process) - memory < 50 * MIB
    assert attacked.num_threads() <= threads + 4
    end = time.monotonic() + TIMEOUT
    while attacked.num_fds() > files + 10:  # gRPC gives back what a connection held when it learns that it is closed
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_port_that_cannot_be_had_again_ends_the_process_with_an_exit_code(
    tmp_path: Path, server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    """As if another program had taken it in that moment."""
    (tmp_path / "sitecustomize.py").write_text(
        "from server import grpcio\n"
        "grpcio.REBIND_SECONDS = 0.1\n"
        "grpcio.GrpcioServer._bind_all = lambda self, ports: list(ports)\n",
        encoding="utf-8",
    )
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    flags = ("--workers", "1", "--transport", "grpcio", "--grace", "1")  # the other one is not ended by such a path
    address, process = server_process(*flags, PYTHONPATH=path)
    client = client_of(address)
    client.send(client.open(b"/" + NO_TEXT[0])[1])
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert f"{address} cannot be had again" in err
    assert "Traceback" not in err


ODD_HEADERS = [
    (":authority", b"\xff"),
    (":scheme", b"\xff"),
    ("user-agent", b"\xff"),
    ("grpc-timeout", b"\xffS"),
    ("grpc-encoding", b"\xff"),
    ("x-request-id", b"\xff\xc3("),
    ("x-\xff", b"value"),
    ("x-value", b"\0\r\n\xff"),
    ("x-value-bin", b"\xff!"),
    (":path", b"/" + b"a" * 15_000),
    (":path", b""),
    (":path", b"/\0\r\n"),
]


def test_headers_that_are_no_text_harm_nobody_else(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, process = server_process("--workers", "1", "--grace", "1")
    neighbour = client_of(address)
    usual = {":method": b"POST", ":scheme": b"http", ":path": f"/{SERVICE}/Classify".encode(), ":authority": b"here"}
    usual |= {"content-type": b"application/grpc", "te": b"trailers"}
    for odd in ODD_HEADERS:
        client = client_of(address)
        # As literals: an encoder would refuse some.
        block = b"".join(
            b"\0" + a_string(name.encode("latin-1")) + a_string(value) for name, value in (usual | dict([odd])).items()
        )
        client.send(frame(HEADERS, END_HEADERS, 1, block))
        with contextlib.suppress(OSError):  # it may have been refused already
            client.send(frame(DATA, END_STREAM, 1, one_image()))
        # Until it is answered, whatever is said of it.
        any(each.stream == 1 and (each.flags & END_STREAM or each.kind == RESET) for each in client.frames())
        number, opening = neighbour.open(f"/{SERVICE}/Classify")
        neighbour.send(opening, frame(DATA, END_STREAM, number, one_image()))
        assert status_of(neighbour, number) == "0", odd
    process.terminate()
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert "CRITICAL" not in err


def a_string(content: bytes) -> bytes:
    """In HPACK, without Huffman's code."""
    length = len(content)
    if length < 127:
        return bytes([length]) + content
    rest, parts = length - 127, [127]
    while rest >= 128:
        parts.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*parts, rest]) + content


# Windows --------------------------------------------------------------------------------------


def a_setting(name: int, value: int) -> bytes:
    return frame(SETTINGS, 0, 0, struct.pack(">HI", name, value))


def a_window(number: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, number, struct.pack(">I", increment))


def some_frames(images: int) -> bytes:
    content = pb.StreamClassifyRequest(frames=pb.ClassifyRequest(pixels=bytes(784 * images))).SerializeToString()
    return struct.pack(">BI", 0, len(content)) + content


@pytest.mark.parametrize("window", [0, 2**31 - 1], ids=["without a window", "with all windows"])
def test_clients_that_read_nothing_are_stopped_and_the_memory_stays_small(
    window: int, server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    """Questions of a few bytes, each with an answer of 5 kB: together they would be 170 MB."""
    address, process = server_process("--workers", "1")
    check_answers(address)
    before = memory_of(process)
    question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=LARGE).SerializeToString()
    message = struct.pack(">BI", 0, len(question)) + question
    count = 65_535 // len(message) // 16  # as much as every server takes before it gives more window
    clients = [client_of(address) for _ in range(20)]
    for client in clients:
        client.send(a_setting(INITIAL_WINDOW_SIZE, window), *([a_window(0, window - 65_535)] if window else []))
        for _ in range(16):
            number, opening = client.open("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
            client.send(opening, frame(DATA, 0, number, message * count))
    check_answers(address)
    assert memory_of(process) - before < 100 * MIB


def test_a_stream_whose_answers_are_not_read_gets_no_more_window(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, process = server_process("--workers", "1")
    check_answers(address)
    before = memory_of(process)
    client = client_of(address)
    frames = client.frames()
    client.send(a_setting(INITIAL_WINDOW_SIZE, 0))
    settings = next(received for received in frames if received.kind == SETTINGS)
    number, opening = client.open(f"/{SERVICE}/StreamClassify")
    client.send(opening)
    message = some_frames(20)
    windows = {0: 65_535, number: dict(struct.iter_unpack(">HI", settings.content)).get(INITIAL_WINDOW_SIZE, 65_535)}
    sent = 0
    client.socket.settimeout(2)  # when nothing comes for so long, there is no more window to come
    with contextlib.suppress(TimeoutError):
        while sent < 64 * MIB:
            while min(windows.values()) >= len(message):
                client.send(frame(DATA, 0, number, message))
                sent += len(message)
                windows = {of: window - len(message) for of, window in windows.items()}
            received = next(frames)
            if received.kind == WINDOW_UPDATE:
                windows[received.stream] += int.from_bytes(received.content)
            assert received.kind not in (RESET, GOAWAY)
    assert sent < 64 * MIB, "the sender was never stopped"
    check_answers(address)
    assert memory_of(process) - before < 100 * MIB


def test_an_answer_goes_whole_through_windows_of_a_byte(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, _ = server_process("--workers", "1")
    client = client_of(address)
    client.send(a_setting(INITIAL_WINDOW_SIZE, 0))
    number, opening = client.open(f"/{SERVICE}/Classify")
    client.send(opening, frame(DATA, END_STREAM, number, one_image()), a_window(number, 1))
    answer = b""
    for received in client.frames():
        if received.kind == DATA:
            answer += received.content
            client.send(a_window(number, 1))
        elif received.kind == HEADERS and client.headers_in(received).get("grpc-status") is not None:
            break
    assert len(pb.ClassifyResponse.FromString(answer[5:]).digits) == 1
    check_answers(address)


@pytest.mark.parametrize("kind", ["the connection's window", "a stream's window", "the first window", "too much data"])
def test_windows_that_break_the_rules_harm_nobody_else(
    kind: str, server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, process = server_process("--workers", "1")
    check_answers(address)
    before = memory_of(process)
    client = client_of(address)
    number, opening = client.open(f"/{SERVICE}/StreamClassify")
    half = struct.pack(">BI", 0, 4_000_000)
    broken = {
        "the connection's window": a_window(0, 2**31 - 1) * 2,
        "a stream's window": a_window(number, 2**31 - 1) * 2,
        "the first window": a_setting(INITIAL_WINDOW_SIZE, 2**31),
        "too much data": frame(DATA, 0, number, half) + frame(DATA, 0, number, bytes(16_384)) * 4_000,
    }[kind]
    with contextlib.suppress(OSError):
        client.send(opening, broken, a_ping())
    # Until it has seen all: one transport ends the connection or the stream, the other one overlooks some of these.
    any(received.kind == PING and received.flags & ACK for received in client.frames())
    check_answers(address)
    assert memory_of(process) - before < 100 * MIB


# Many and large -------------------------------------------------------------------------------


def test_ten_thousand_open_streams_are_all_answered(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, process = server_process("--workers", "1")
    check_answers(address)
    before = memory_of(process)
    clients = [client_of(address) for _ in range(80)]
    numbers: dict[RawClient, list[int]] = {}
    for client in clients:
        opened = [client.open(f"/{SERVICE}/StreamClassify") for _ in range(MAX_STREAMS)]
        numbers[client] = [number for number, _ in opened]
        client.send(*(opening for _, opening in opened))
    check_answers(address)
    grown = memory_of(process) - before
    for client in clients:
        client.send(*(frame(DATA, END_STREAM, number, some_frames(1)) for number in numbers[client]))
    for client in clients:
        left = set(numbers[client])
        for received in client.frames():
            if received.kind == HEADERS and "grpc-status" in (headers := client.headers_in(received)):
                assert headers["grpc-status"] == "0", headers
                left.discard(received.stream)
                if not left:
                    break
    assert grown < 1 << 30


def test_a_block_of_headers_that_grows_a_thousandfold_is_not_kept(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    """Its first header goes into the table, and each byte after it stands for that header once more: 65 MB in all."""
    address, process = server_process("--workers", "1")
    check_answers(address)
    before = memory_of(process)
    clients = [client_of(address) for _ in range(20)]
    for client in clients:
        number, opening = client.open(f"/{SERVICE}/Classify")
        header = b"\x40\x06x-bomb\x7f\xa1\x1e" + bytes(4_000)  # a literal to be indexed, whose value has 4,000 bytes
        with contextlib.suppress(OSError):
            client.send(
                frame(HEADERS, END_STREAM, number, opening[9:]),
                frame(CONTINUATION, 0, number, header),
                frame(CONTINUATION, END_HEADERS, number, b"\xbe" * 16_000),
                a_ping(),
            )
    for client in clients:  # until it has seen all, or closes the connection
        any(received.kind == PING and received.flags & ACK for received in client.frames())
    assert memory_of(process) - before < 100 * MIB
    check_answers(address)


# Floods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["StreamClassify", "Classify"])
def test_ten_thousand_streams_that_are_opened_and_reset_leave_the_server_answering(
    method: str, server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, process = server_process("--workers", "1")
    client = client_of(address)
    check_answers(address)
    before = memory_of(process)
    for _ in range(100):
        frames = []
        for _ in range(100):
            number, opening = client.open(f"/{SERVICE}/{method}")
            frames.append(opening)
            if method == "Classify":
                frames.append(frame(DATA, 0, number, one_image()))
            frames.append(frame(RESET, 0, number, struct.pack(">I", CANCEL)))
        try:
            client.send(*frames)
        except OSError:  # the server ended it: go on with another connection
            client = client_of(address)
    check_answers(address)
    assert memory_of(process) - before < 200 * MIB


@pytest.mark.parametrize(
    "kind", ["settings", "empty data", "window updates", "priorities", "pings with their answers unread"]
)
def test_a_flood_of_frames_that_cost_nothing_leaves_the_server_answering(
    kind: str, server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, process = server_process("--workers", "1")
    client = client_of(address)
    check_answers(address)
    before = memory_of(process)
    number, opening = client.open(f"/{SERVICE}/StreamClassify")
    client.send(opening)
    flood = {
        "settings": frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 65_535)),
        "empty data": frame(DATA, 0, number, b""),
        "window updates": frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
        "priorities": frame(PRIORITY, 0, number + 2, struct.pack(">IB", 0, 1)),
        "pings with their answers unread": a_ping(),
    }[kind]
    client.socket.settimeout(2)  # a server that reads no more, as nobody reads what it answers, is as good
    with contextlib.suppress(OSError):
        for _ in range(200):
            client.send(flood * 1000)
    check_answers(address)
    assert memory_of(process) - before < 200 * MIB


def test_streams_that_begin_a_message_and_never_end_it_keep_nobody_else_from_being_answered(
    server_process: Start, client_of: Callable[[str], RawClient]
) -> None:
    address, process = server_process("--workers", "1")
    clients = [client_of(address) for _ in range(20)]
    for client in clients:
        for _ in range(50):
            number, opening = client.open(f"/{SERVICE}/Classify")
            half = struct.pack(">BI", 0, 4_000_000) + bytes(100)  # announces much more than comes
            client.send(opening, frame(DATA, 0, number, half))
    check_answers(address)
    assert memory_of(process) < 2 << 30, "what is announced is not set aside"
