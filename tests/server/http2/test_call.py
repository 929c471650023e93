"""Calls over the transport of our own: what gRPC's own clients rarely do, or cannot see."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import logging
import struct
import unittest.mock
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import grpc
import hpack
import numpy as np
import numpy.typing as npt
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server.app import DigitServer
from server.http2 import wire
from server.http2.connection import Connection
from server.http2.engine import CANCEL
from server.http2.peers import peer_of
from server.limits import MAX_STREAMS
from server.service import CLASSIFY, STREAM_CLASSIFY
from server.settings import Settings
from server.stream import MergedFrames
from tests.server.http2.peer import ACK, DATA, END_HEADERS, END_STREAM, HEADERS, PING, SETTINGS, WINDOW_UPDATE, frame
from tests.server.http2.peer import RST_STREAM as RESET

pytestmark = pytest.mark.usefixtures("no_stray_errors")

Golden = tuple[npt.NDArray[np.uint8], list[int]]

TIMEOUT = 30


@pytest.fixture
async def server() -> AsyncIterator[DigitServer]:
    running = DigitServer(Settings(port=0, transport="asgi", stream_window=8))
    await running.start()
    await running.load()
    yield running
    await running.stop(grace=0)


@pytest.fixture
async def stub(server: DigitServer) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.DigitClassifierStub(channel)


class RawClient:
    """HTTP/2 by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()

    @classmethod
    async def to(cls, server: DigitServer, window: int = 2**30) -> RawClient:
        client = cls(*await asyncio.open_connection("127.0.0.1", server.port))
        client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window)))
        client.send(frame(WINDOW_UPDATE, 0, 0, (2**30).to_bytes(4)))
        return client

    def send(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))

    def head(self, number: int, method: str, *more: tuple[str, str]) -> bytes:
        headers = [
            (":method", "POST"),
            (":path", f"/{method}"),
            (":scheme", "http"),
            (":authority", "here"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *more,
        ]
        return frame(HEADERS, END_HEADERS, number, self.encoder.encode(headers))

    async def frames_until(self, kind: int, flag: int = 0) -> list[tuple[int, int, int, bytes]]:
        """All frames up to the first of a kind that has a flag."""
        got = []
        while True:
            head = await asyncio.wait_for(self.reader.readexactly(9), TIMEOUT)
            content = await self.reader.readexactly(int.from_bytes(head[:3]))
            got.append((head[3], head[4], int.from_bytes(head[5:]), content))
            if head[3] == kind and (not flag or head[4] & flag):
                return got

    async def status(self) -> dict[str, str]:
        """The trailers of the only open call."""
        last = (await self.frames_until(HEADERS, END_STREAM))[-1]
        return dict(self.decoder.decode(last[3]))  # type: ignore[arg-type]

    async def blocks(self) -> list[pb.FrameBlock]:
        """All that the only open stream is answered, up to its end."""
        answered = b"".join(it[3] for it in await self.frames_until(HEADERS, END_STREAM) if it[0] == DATA)
        messages = wire.Deframer(len(answered)).feed(answered)
        return [block for each in messages for block in pb.StreamClassifyResponse.FromString(each).blocks]

    async def answers(self, count: int, last: int = HEADERS) -> list[bytes]:
        """The data that each of so many calls is answered; its last frame is of this kind, trailers with gRPC."""
        data: dict[int, bytes] = {}
        for _ in range(count):
            for kind, _, stream, content in await self.frames_until(last, END_STREAM):
                if kind == DATA:
                    data[stream] = data.get(stream, b"") + content
        assert len(data) == count
        return [*data.values()]

    def close(self) -> None:
        self.writer.close()


def only_connection(server: DigitServer) -> Connection:
    """What the server holds of its one client."""
    (connection,) = server._server.connections
    assert isinstance(connection, Connection)
    return connection


async def test_requests_and_answers_may_be_compressed(stub: Any, golden: Golden) -> None:
    pixels, labels = golden
    many = np.concatenate([pixels] * 5)
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        answer = await stub.Classify(
            pb.ClassifyRequest(pixels=many.tobytes()), compression=compression, timeout=TIMEOUT
        )
        assert list(answer.digits) == labels * 5


async def test_a_compressed_request_gets_a_compressed_answer(server: DigitServer, golden: Golden) -> None:
    pixels, labels = golden
    client = await RawClient.to(server)
    request = pb.ClassifyRequest(pixels=pixels.tobytes() * 5).SerializeToString()
    message = wire.framed(request, b"gzip")
    client.send(
        client.head(1, CLASSIFY, ("grpc-encoding", "gzip"), ("grpc-accept-encoding", "deflate, gzip")),
        frame(DATA, END_STREAM, 1, message),
    )
    frames = await client.frames_until(HEADERS, END_STREAM)
    head: Any = dict(client.decoder.decode(next(content for kind, _, _, content in frames if kind == HEADERS)))
    assert head["grpc-encoding"] == "gzip"
    assert "gzip" in head["grpc-accept-encoding"].split(","), "Node's client trims nothing"
    content = b"".join(content for kind, _, _, content in frames if kind == DATA)
    assert content[0] == 1
    answer = pb.ClassifyResponse.FromString(gzip.decompress(content[wire.PREFIX_BYTES :]))
    assert list(answer.digits) == labels * 5
    client.close()


async def test_an_unknown_compression_is_refused_with_those_there_are(server: DigitServer) -> None:
    client = await RawClient.to(server)
    client.send(client.head(1, CLASSIFY, ("grpc-encoding", "snappy")))
    status = await client.status()
    assert status["grpc-status"] == "12"
    assert "snappy" in status["grpc-message"]
    assert status["grpc-accept-encoding"] == "identity,deflate,gzip"
    client.close()


@pytest.mark.parametrize("timeout", ["1", "123456789S", "5x", "-1S", ""])
async def test_a_timeout_that_is_none_ends_the_call(timeout: str, server: DigitServer) -> None:
    client = await RawClient.to(server)
    client.send(client.head(1, CLASSIFY, ("grpc-timeout", timeout)))
    status = await client.status()
    assert status["grpc-status"] == "13"
    assert "grpc-timeout" in status["grpc-message"]
    client.close()


async def test_a_deadline_ends_a_call_whose_message_never_comes(server: DigitServer) -> None:
    client = await RawClient.to(server)
    client.send(client.head(1, CLASSIFY, ("grpc-timeout", "50m")))
    assert (await client.status())["grpc-status"] == "4"
    client.close()


async def test_a_unary_call_needs_a_message(server: DigitServer) -> None:
    client = await RawClient.to(server)
    client.send(client.head(1, CLASSIFY), frame(DATA, END_STREAM, 1))
    status = await client.status()
    assert status["grpc-status"] == "12"
    assert "takes one message, none came" in status["grpc-message"]
    client.close()


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_unary_call_answers_its_first_message_however_many_come(
    at_once: bool, server: DigitServer, golden: Golden
) -> None:
    client = await RawClient.to(server)
    message = wire.framed(pb.ClassifyRequest(pixels=golden[0][0].tobytes()).SerializeToString())
    client.send(client.head(1, CLASSIFY), frame(DATA, 0, 1, message * (2 if at_once else 1)))
    assert (await client.status())["grpc-status"] == "0"
    client.close()


async def test_a_message_that_is_too_long_is_refused_before_it_comes(server: DigitServer) -> None:
    client = await RawClient.to(server)
    client.send(client.head(1, CLASSIFY), frame(DATA, 0, 1, struct.pack(">BI", 0, 1 << 30)))
    status = await client.status()
    assert status["grpc-status"] == "8"
    assert "larger%20than%20max" in status["grpc-message"] or "larger than max" in status["grpc-message"]
    assert (await client.frames_until(RESET))[-1][2] == 1, "the client is told to send no more"
    client.close()


BROKEN_MESSAGES = {
    "too long": (struct.pack(">BI", 0, 1 << 30), "8", "larger than max"),
    "a bomb": (wire.framed(bytes(10 << 20), b"gzip"), "8", "larger than max"),
    "a wrong flag": (struct.pack(">BI", 7, 3) + b"abc", "13", "begins with 0 or 1"),
    "no gzip": (struct.pack(">BI", 1, 3) + b"abc", "13", "is no gzip"),
    "cut off": (struct.pack(">BI", 0, 30) + b"abc", "13", "ended within a message"),
}


@pytest.mark.parametrize("name", BROKEN_MESSAGES)
@pytest.mark.parametrize("method", [STREAM_CLASSIFY, "inference.GRPCInferenceService/ModelStreamInfer"])
async def test_what_is_no_message_ends_a_stream_with_a_sentence_behind_the_answers_before_it(
    method: str, name: str, server: DigitServer, golden: Golden, caplog: pytest.LogCaptureFixture
) -> None:
    broken, status, words = BROKEN_MESSAGES[name]
    client = await RawClient.to(server)
    good = b""
    if method == STREAM_CLASSIFY:
        frames = pb.ClassifyRequest(pixels=golden[0][0].tobytes())
        good = wire.framed(pb.StreamClassifyRequest(first_sequence=3, frames=frames).SerializeToString())
    client.send(client.head(1, method, ("grpc-encoding", "gzip")), frame(DATA, END_STREAM, 1, good + broken))
    sent = await client.frames_until(HEADERS, END_STREAM)
    trailers: Any = {}
    for kind, _, _, content in sent:
        if kind == HEADERS:
            trailers = dict(client.decoder.decode(content))
    assert trailers["grpc-status"] == status
    assert words in urllib.parse.unquote(trailers["grpc-message"])
    answers = b"".join(content for kind, _, _, content in sent if kind == DATA)
    if good:
        (block,) = pb.StreamClassifyResponse.FromString(answers[wire.PREFIX_BYTES :]).blocks
        assert (block.first_sequence, list(block.result.digits)) == (3, golden[1][:1])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "it is the caller's fault"
    client.close()


async def test_messages_that_wait_take_no_more_memory_than_came_of_them(
    server: DigitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not read answers, and whose messages say a thousand times what they weigh."""
    opened = 0
    real = wire.Deframer.opened

    def count(deframer: wire.Deframer, message: bytes) -> bytes:
        nonlocal opened
        opened += 1
        return real(deframer, message)

    monkeypatch.setattr(wire.Deframer, "opened", count)
    client = await RawClient.to(server, window=0)
    client.send(client.head(1, STREAM_CLASSIFY, ("grpc-encoding", "gzip")))
    frames = pb.ClassifyRequest(pixels=bytes(1000 * 784), include_logits=True)  # answers of more than is written ahead
    message = wire.framed(pb.StreamClassifyRequest(frames=frames).SerializeToString(), b"gzip")
    assert len(message) < 2000
    client.send(frame(DATA, 0, 1, message * 15), frame(DATA, 0, 1, message * 15))
    number = 3
    for _ in range(30):  # calls by which time passes
        client.send(client.head(number, "mnist.v1.DigitClassifier/Nothing"), frame(DATA, END_STREAM, number, b""))
        await client.status()
        number += 2
    assert 1 <= opened <= 4, "what is answered, what waits for the window, and what is read ahead"
    client.close()


async def test_empty_messages_are_bounded_by_the_window_too(server: DigitServer) -> None:
    client = await RawClient.to(server, window=0)
    client.send(client.head(1, STREAM_CLASSIFY))
    client.send(*[frame(DATA, 0, 1, wire.framed(b"") * 3000)] * 3)
    client.send(frame(PING, 0, 0, bytes(8)))
    given = [it for it in await client.frames_until(PING, ACK) if it[0] == WINDOW_UPDATE and it[2] == 1]
    assert not given
    client.send(frame(WINDOW_UPDATE, 0, 1, (1 << 24).to_bytes(4)), frame(DATA, END_STREAM, 1, b""))
    assert len(await client.blocks()) == 9000
    client.close()


async def test_a_deadline_also_ends_a_call_whose_answer_nobody_takes(server: DigitServer, golden: Golden) -> None:
    client = await RawClient.to(server, window=0)
    message = wire.framed(pb.ClassifyRequest(pixels=golden[0][0].tobytes()).SerializeToString())
    client.send(client.head(1, CLASSIFY, ("grpc-timeout", "200m")), frame(DATA, END_STREAM, 1, message))
    head: Any = dict(client.decoder.decode((await client.frames_until(HEADERS))[-1][3]))
    assert head[":status"] == "200"
    assert "grpc-status" not in head
    assert (await client.status())["grpc-status"] == "4"
    client.close()


async def test_the_status_of_a_deadline_has_no_details_of_another_one(server: DigitServer, golden: Golden) -> None:
    client = await RawClient.to(server, window=0)
    frames = pb.ClassifyRequest(pixels=golden[0][0].tobytes())
    good = wire.framed(pb.StreamClassifyRequest(frames=frames).SerializeToString())
    bad = wire.framed(b"\xff\xff\xff")
    client.send(client.head(1, STREAM_CLASSIFY, ("grpc-timeout", "300m")), frame(DATA, END_STREAM, 1, good + bad))
    await client.frames_until(HEADERS)
    status = await client.status()
    assert status == {"grpc-status": "4", "grpc-message": "Deadline Exceeded"}
    client.close()


async def test_what_comes_behind_a_broken_message_does_not_change_what_is_said_of_it(server: DigitServer) -> None:
    client = await RawClient.to(server)
    half = wire.framed(bytes(100))[:50]
    client.send(client.head(1, STREAM_CLASSIFY), frame(DATA, END_STREAM, 1, wire.framed(b"\xff\xff\xff") + half))
    assert (await client.status())["grpc-status"] == "3"
    client.close()


@pytest.mark.parametrize("accepted", ["identity", "", "deflate,br"])
async def test_answers_are_compressed_only_for_those_who_say_that_they_take_it(
    accepted: str, server: DigitServer, golden: Golden
) -> None:
    client = await RawClient.to(server)
    message = wire.framed(pb.ClassifyRequest(pixels=golden[0].tobytes() * 5).SerializeToString(), b"gzip")
    head = client.head(1, CLASSIFY, ("grpc-encoding", "gzip"), ("grpc-accept-encoding", accepted))
    client.send(head, frame(DATA, END_STREAM, 1, message))
    content = b"".join(it[3] for it in await client.frames_until(HEADERS, END_STREAM) if it[0] == DATA)
    assert content[0] == 0
    assert list(pb.ClassifyResponse.FromString(content[wire.PREFIX_BYTES :]).digits) == golden[1] * 5
    client.close()


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
async def test_metadata_that_is_no_base64_ends_a_call_whatever_is_logged(
    level: int, server: DigitServer, golden: Golden, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(level, "server")
    client = await RawClient.to(server)
    message = wire.framed(pb.ClassifyRequest(pixels=golden[0][0].tobytes()).SerializeToString())
    client.send(client.head(1, CLASSIFY, ("key-bin", "***")), frame(DATA, END_STREAM, 1, message))
    status = await client.status()
    assert (status["grpc-status"], status["grpc-message"]) == ("13", "the metadata key-bin is no base64")
    client.close()


async def test_a_reflection_that_is_left_leaves_nothing_behind(server: DigitServer) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
        for _ in range(3):
            call = stub.ServerReflectionInfo(timeout=TIMEOUT)
            await call.write(request)
            assert (await call.read()).list_services_response.service
            call.cancel()
        (connection,) = server._server.connections
        tasks = [call.task for call in connection.calls]
        if tasks:
            await asyncio.wait(tasks, timeout=TIMEOUT)
    # `no_stray_errors` tells of tasks that were left.


async def test_work_that_takes_long_lets_others_have_a_turn(
    server: DigitServer, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.http2.connection.TURN_SECONDS", -1.0)  # whatever comes
    client = await RawClient.to(server)
    message = wire.framed(pb.ClassifyRequest(pixels=golden[0][0].tobytes()).SerializeToString())
    for number in range(1, 41, 2):
        client.send(client.head(number, CLASSIFY), *(frame(DATA, 0, number, message[i : i + 1]) for i in range(50)))
        client.send(frame(DATA, END_STREAM, number, message[50:]))
    for _ in range(20):
        assert (await client.status())["grpc-status"] == "0"
    client.close()


async def test_a_connection_that_begins_while_the_server_stops_is_closed(server: DigitServer) -> None:
    connection = Connection(server._server)
    server._server.is_stopping = True
    transport = unittest.mock.Mock(asyncio.Transport)
    transport.get_extra_info.return_value = ("127.0.0.1", 5)
    transport.is_closing.return_value = False
    connection.connection_made(transport)
    transport.close.assert_called_once_with()
    connection.connection_lost(None)


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        (("127.0.0.1", 50324), "ipv4:127.0.0.1:50324"),
        (("::ffff:127.0.0.1", 50324, 0, 0), "ipv4:127.0.0.1:50324"),
        (("::1", 50324, 0, 0), "ipv6:%5B::1%5D:50324"),
        ("", "unknown"),
    ],
)
def test_a_peer_is_written_as_grpc_does(address: Any, peer: str) -> None:
    assert peer_of(address) == peer


async def test_streams_that_are_reset_at_once_leave_nothing_behind(server: DigitServer, golden: Golden) -> None:
    client = await RawClient.to(server)
    number = 1
    for _ in range(5):
        frames = []
        for _ in range(MAX_STREAMS // 2):
            frames += [client.head(number, CLASSIFY), frame(RESET, 0, number, CANCEL.to_bytes(4))]
            number += 2
        client.send(*frames)
        message = wire.framed(pb.ClassifyRequest(pixels=golden[0][0].tobytes()).SerializeToString())
        client.send(client.head(number, CLASSIFY), frame(DATA, END_STREAM, number, message))
        assert (await client.status())["grpc-status"] == "0"
        number += 2
    assert len(only_connection(server).calls) <= 1
    client.close()


@pytest.mark.parametrize("together", [True, False], ids=["head and message together", "the message later"])
async def test_calls_that_come_together_are_computed_together_and_a_lone_one_at_once(
    together: bool, server: DigitServer, golden: Golden
) -> None:
    client = await RawClient.to(server)

    async def receipts(numbers: range, images: int = 1) -> list[pb.Receipt]:
        message = wire.framed(pb.ClassifyRequest(pixels=golden[0][:images].tobytes()).SerializeToString())
        heads = [client.head(number, CLASSIFY) for number in numbers]
        data = [frame(DATA, END_STREAM, number, message) for number in numbers]
        if together:
            client.send(*(part for both in zip(heads, data, strict=True) for part in both))
        else:
            client.send(*heads, frame(PING, 0, 0, b"all open"))
            await client.frames_until(PING, ACK)
            await asyncio.sleep(0)  # the calls wait for their messages
            client.send(*data)
        answers = await client.answers(len(numbers))
        return [pb.ClassifyResponse.FromString(answer[5:]).receipt for answer in answers]

    assert [receipt.batch_rows for receipt in await receipts(range(1, 81, 2))] == [40] * 40
    for number, images in ((81, 1), (83, 20)):
        (alone,) = await receipts(range(number, number + 1), images)
        assert alone.batch_rows == images
        assert alone.queue_time.ToNanoseconds() == 0, "it was not queued, as nobody else is there"
    assert server._server.arrivals.count == 0
    client.close()


async def test_calls_of_other_methods_are_no_company(server: DigitServer, golden: Golden) -> None:
    client = await RawClient.to(server)
    check = wire.framed(health_pb2.HealthCheckRequest().SerializeToString())
    message = wire.framed(pb.ClassifyRequest(pixels=golden[0][0].tobytes()).SerializeToString())
    client.send(client.head(1, CLASSIFY), frame(DATA, END_STREAM, 1, message))
    checks = range(3, 103, 2)
    for number in checks:
        client.send(client.head(number, "grpc.health.v1.Health/Check"), frame(DATA, END_STREAM, number, check))
    answer = max(await client.answers(len(checks) + 1), key=len)
    assert pb.ClassifyResponse.FromString(answer[5:]).receipt.queue_time.ToNanoseconds() == 0
    client.close()


async def test_plain_calls_over_http2_that_come_together_are_computed_together(
    server: DigitServer, golden: Golden
) -> None:
    client = await RawClient.to(server)
    numbers = range(1, 41, 2)
    for number in numbers:
        headers = [(":method", "POST"), (":path", "/v1/classify"), (":scheme", "http"), (":authority", "here")]
        block = client.encoder.encode([*headers, ("content-type", "application/json")])
        client.send(frame(HEADERS, END_HEADERS, number, block), frame(DATA, END_STREAM, number, body_of(golden)))
    answers = await client.answers(len(numbers), last=DATA)
    assert [json.loads(answer)["receipt"]["batchRows"] for answer in answers] == [20] * 20
    assert server._server.arrivals.count == 0
    client.close()


async def test_plain_calls_over_http1_that_come_together_are_computed_together(
    server: DigitServer, golden: Golden
) -> None:
    connections = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]
    body = body_of(golden)
    head = f"POST /v1/classify HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    for _, writer in connections:
        writer.write(head.encode() + b"\r\nconnection: close\r\n\r\n" + body)
    answers = [json.loads((await reader.read()).split(b"\r\n\r\n")[1]) for reader, _ in connections]
    assert [answer["receipt"]["batchRows"] for answer in answers] == [20] * 20
    assert server._server.arrivals.count == 0
    for _, writer in connections:
        writer.close()


def body_of(golden: Golden) -> bytes:
    return json.dumps({"pixels": base64.b64encode(golden[0][0].tobytes()).decode()}).encode()


@pytest.mark.parametrize("latest_only", [False, True])
async def test_frames_of_streams_that_come_together_are_computed_together(
    latest_only: bool, server: DigitServer, golden: Golden
) -> None:
    client = await RawClient.to(server)
    streams = range(1, 17, 2)
    for it in streams:
        client.send(client.head(it, STREAM_CLASSIFY))
    client.send(frame(PING, 0, 0, b"all open"))
    await client.frames_until(PING, ACK)
    frames = pb.ClassifyRequest(pixels=golden[0][:4].tobytes())
    message = wire.framed(pb.StreamClassifyRequest(frames=frames, latest_only=latest_only).SerializeToString())
    client.send(*(frame(DATA, END_STREAM, it, message) for it in streams))
    answers = [pb.StreamClassifyResponse.FromString(it[5:]) for it in await client.answers(len(streams))]
    rows = [block.result.receipt.batch_rows for answer in answers for block in answer.blocks]
    assert rows == [4 * len(streams)] * len(streams)

    client.send(client.head(17, STREAM_CLASSIFY), frame(PING, 0, 0, b"it waits"))
    await client.frames_until(PING, ACK)
    client.send(frame(DATA, END_STREAM, 17, message))
    (answer,) = await client.answers(1)
    (block,) = pb.StreamClassifyResponse.FromString(answer[5:]).blocks
    assert block.result.receipt.batch_rows == 4
    assert block.result.receipt.queue_time.ToNanoseconds() == 0, "nobody else is there"
    assert server._server.arrivals.count == 0
    client.close()


async def test_a_stream_whose_answers_nobody_reads_stops_its_sender(server: DigitServer, golden: Golden) -> None:
    """No window for answers: the server holds a bounded part of what is sent, and gives no more window for it."""
    client = await RawClient.to(server, window=0)
    client.send(client.head(1, STREAM_CLASSIFY))
    frames = await client.frames_until(SETTINGS)
    settings = dict(struct.iter_unpack(">HI", frames[-1][3]))
    window = settings[4]
    sent = 0
    message = wire.framed(
        pb.StreamClassifyRequest(frames=pb.ClassifyRequest(pixels=golden[0].tobytes())).SerializeToString()
    )
    while window >= len(message):
        client.send(frame(DATA, 0, 1, message))
        window -= len(message)
        sent += len(message)
        if window < len(message):
            client.send(frame(PING, 0, 0, b"a ping  "))  # its answer comes behind the window that there is to give
            for kind, _, stream, content in await client.frames_until(PING, ACK):
                if kind == WINDOW_UPDATE and stream == 1:
                    window += int.from_bytes(content)
        assert sent < 4 << 20, "the sender was never stopped"
    client.send(frame(WINDOW_UPDATE, 0, 1, (1 << 20).to_bytes(4)))  # it reads again, and all comes
    client.send(frame(DATA, END_STREAM, 1, b""))
    assert len(await client.blocks()) == sent // len(message)
    client.close()


def frames(first: int, count: int, *, latest_only: bool = False) -> pb.StreamClassifyRequest:
    images = pb.ClassifyRequest(pixels=bytes(784 * count))
    return pb.StreamClassifyRequest(first_sequence=first, frames=images, latest_only=latest_only)


async def merged(requests: list[pb.StreamClassifyRequest], max_rows: int) -> list[tuple[int, int]]:
    """The first number and the frames of each message that comes of these, which are there at once."""
    there = [requests, []]

    async def read_ready() -> list[pb.StreamClassifyRequest]:
        return there.pop(0)

    read = MergedFrames(read_ready, max_rows)
    found = []
    while (request := await read()) is not None:
        found.append((request.first_sequence, len(request.frames.pixels) // 784))
    return found


async def test_merged_messages_have_no_more_frames_than_the_server_takes() -> None:
    requests = [frames(number, 1) for number in range(10)]
    assert await merged(requests, 4) == [(0, 4), (4, 4), (8, 2)]
    assert await merged([frames(0, 7), frames(7, 1)], 4) == [(0, 7), (7, 1)], "what comes as one stays one"


async def test_nothing_is_merged_after_a_message_that_asks_for_the_latest_only() -> None:
    requests = [frames(0, 1), frames(1, 1), frames(2, 1, latest_only=True), frames(3, 1), frames(4, 1)]
    assert await merged(requests, 256) == [(0, 2), (2, 1), (3, 1), (4, 1)]


@pytest.mark.parametrize("limits", [{"stream_window": 8}, {"stream_window": 16, "max_queue_size": 16}])
async def test_frames_that_come_together_are_answered_whatever_the_limits_are(
    limits: dict[str, Any], golden: Golden
) -> None:
    running = DigitServer(Settings(port=0, transport="asgi", max_batch_size=8, **limits))
    await running.start()
    await running.load()
    client = await RawClient.to(running)
    messages = b"".join(
        wire.framed(
            pb.StreamClassifyRequest(
                first_sequence=number, frames=pb.ClassifyRequest(pixels=golden[0][number % 20].tobytes())
            ).SerializeToString()
        )
        for number in range(60)
    )
    client.send(client.head(1, STREAM_CLASSIFY), frame(DATA, END_STREAM, 1, messages))
    digits: list[int] = []
    for block in await client.blocks():
        assert block.first_sequence == len(digits)
        digits += block.result.digits
    assert digits == golden[1] * 3
    client.close()
    await running.stop(grace=0)


async def test_frames_that_come_together_are_answered_in_order_whoever_is_beside_them(
    stub: Any, golden: Golden
) -> None:
    """Good and bad messages, gaps in the numbers, several images, logits or none."""
    pixels, labels = golden
    requests = []
    number = 0
    for index in range(200):
        if index % 23 == 7:
            number += 5  # a gap
        count = 3 if index % 11 == 3 else 1
        rows = pixels[[(number + i) % 20 for i in range(count)]].tobytes()
        if index % 17 == 5:
            rows = rows[:-1]
        frames = pb.ClassifyRequest(pixels=rows, include_logits=index % 13 == 2)
        requests.append((number, count, index % 17 == 5, index % 13 == 2, frames))
        number += count

    async def messages() -> AsyncIterator[pb.StreamClassifyRequest]:
        for first, _, _, _, frames in requests:
            yield pb.StreamClassifyRequest(first_sequence=first, frames=frames)

    answers: dict[int, tuple[int, bool] | None] = {}
    async for response in stub.StreamClassify(messages(), timeout=TIMEOUT):
        for block in response.blocks:
            assert not answers or block.first_sequence > max(answers), "in order"
            for i in range(block.frame_count):
                good = block.WhichOneof("outcome") == "result"
                answers[block.first_sequence + i] = (
                    (block.result.digits[i], bool(block.result.logits)) if good else None
                )
    expected: dict[int, tuple[int, bool] | None] = {}
    for first, count, is_bad, logits, _ in requests:
        for i in range(count):
            expected[first + i] = None if is_bad else (labels[(first + i) % 20], logits)
    assert answers == expected
