"""Calls over the transport of our own: what gRPC's own clients rarely do, or cannot see."""

from __future__ import annotations

import asyncio
import gzip
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import hpack
import numpy as np
import numpy.typing as npt
import pytest

from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server.app import DigitServer
from server.http2 import wire
from server.http2.connection import Connection
from server.http2.engine import CANCEL
from server.limits import MAX_STREAMS
from server.service import CLASSIFY, STREAM_CLASSIFY
from server.settings import Settings
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
    client.send(client.head(1, CLASSIFY, ("grpc-encoding", "gzip")), frame(DATA, END_STREAM, 1, message))
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


@pytest.mark.parametrize("messages", [0, 2])
async def test_a_unary_call_takes_one_message(messages: int, server: DigitServer, golden: Golden) -> None:
    client = await RawClient.to(server)
    message = wire.framed(pb.ClassifyRequest(pixels=golden[0][0].tobytes()).SerializeToString())
    client.send(client.head(1, CLASSIFY), frame(DATA, END_STREAM, 1, message * messages))
    status = await client.status()
    assert status["grpc-status"] == "12"
    assert "exactly one message" in status["grpc-message"]
    client.close()


async def test_a_message_that_is_too_long_is_refused_before_it_comes(server: DigitServer) -> None:
    client = await RawClient.to(server)
    client.send(client.head(1, CLASSIFY), frame(DATA, 0, 1, struct.pack(">BI", 0, 1 << 30)))
    status = await client.status()
    assert status["grpc-status"] == "8"
    assert "larger%20than%20max" in status["grpc-message"] or "larger than max" in status["grpc-message"]
    assert (await client.frames_until(RESET))[-1][2] == 1, "the client is told to send no more"
    client.close()


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
    answered = b"".join(
        content for kind, _, _, content in await client.frames_until(HEADERS, END_STREAM) if kind == DATA
    )
    blocks = 0
    while answered:
        length = int.from_bytes(answered[1:5])
        blocks += len(pb.StreamClassifyResponse.FromString(answered[5 : 5 + length]).blocks)
        answered = answered[5 + length :]
    assert blocks == sent // len(message)
    client.close()


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
