"""The generator's HTTP/2, against frames written by hand."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator

import pytest

pytest.importorskip("hpack")

from client.load import wire
from client.load.responder import OK_HEAD, OK_TAIL
from client.load.wire import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW,
    INITIAL_WINDOW_SIZE,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Call,
    Connection,
    ConnectionEnded,
    frame,
    literal,
)


class Pair:
    """A connection, and the other end of it."""

    def __init__(self, listener: socket.socket) -> None:
        self.client = Connection(f"127.0.0.1:{listener.getsockname()[1]}", "/a/b")
        self._socket, _ = listener.accept()
        self._socket.settimeout(10)
        self._received = bytearray(self._socket.recv(len(PREFACE), socket.MSG_WAITALL))
        assert self._received == PREFACE
        self._received.clear()

    def tell(self, *frames: bytes) -> list[Call]:
        """Send frames to the client, let it read them and answer; return the calls that have ended."""
        self._socket.sendall(b"".join(frames))
        assert select.select([self.client], [], [], 10)[0]
        return self.client.exchange()

    def read(self) -> list[tuple[int, int, bytes]]:
        """What the client has sent since: kinds, streams and contents of frames up to an answered PING."""
        self.tell(frame(PING, 0, 0, bytes(8)))
        frames: list[tuple[int, int, bytes]] = []
        while not frames or frames[-1][0] != PING:
            head = self._socket.recv(9, socket.MSG_WAITALL)
            length, kind, _, stream = int.from_bytes(head[:3]), head[3], head[4], int.from_bytes(head[5:])
            frames.append((kind, stream, self._socket.recv(length, socket.MSG_WAITALL) if length else b""))
        return frames[:-1]

    def close(self) -> None:
        self.client.close()
        self._socket.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pair = Pair(listener)
        yield pair
        pair.close()


def data(frames: list[tuple[int, int, bytes]], stream: int) -> int:
    """Bytes of a stream's body."""
    return sum(len(content) for kind, number, content in frames if (kind, number) == (DATA, stream))


def window(by: int) -> bytes:
    return struct.pack(">I", by)


def test_no_more_is_sent_than_the_window_of_a_stream_allows(pair: Pair) -> None:
    pair.tell(frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 10)))
    pair.client.call(b"x" * 95)
    assert data(pair.read(), 1) == 10
    pair.tell(frame(WINDOW_UPDATE, 0, 1, window(20)))
    assert data(pair.read(), 1) == 20
    pair.tell(frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 15)))  # five more of each
    assert data(pair.read(), 1) == 5
    pair.tell(frame(WINDOW_UPDATE, 0, 1, window(1000)))
    assert data(pair.read(), 1) == 65


def test_no_more_is_sent_than_the_window_of_the_connection_allows(pair: Pair) -> None:
    pair.tell(frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 1 << 20)))
    for _ in range(2):
        pair.client.call(b"x" * 50_000)
    frames = pair.read()
    assert data(frames, 1) + data(frames, 3) == INITIAL_WINDOW
    pair.tell(frame(WINDOW_UPDATE, 0, 0, window(100_000)))
    frames += pair.read()
    assert data(frames, 1) == data(frames, 3) == 50_005


def test_windows_are_given_back(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "WINDOW_GIVEN_BACK", 1000)
    pair.client.stream()
    pair.read()
    pair.tell(frame(HEADERS, END_HEADERS, 1, OK_HEAD), frame(DATA, 0, 1, bytes(999)))
    assert pair.read() == []
    pair.tell(frame(DATA, 0, 1, b"x"))
    assert pair.read() == [(WINDOW_UPDATE, 0, window(1000)), (WINDOW_UPDATE, 1, window(1000))]
    pair.tell(frame(DATA, 0, 1, bytes(1001)))
    assert pair.read() == [(WINDOW_UPDATE, 0, window(1001)), (WINDOW_UPDATE, 1, window(1001))]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (GOAWAY, b"bye"),
        (SETTINGS, b"odd"),
        (WINDOW_UPDATE, b""),
        (PING, b"1234567"),
        (RST_STREAM, b"123"),
        (DATA, bytes(wire.FRAME_BYTES + 1)),
    ],
)
def test_frames_of_a_wrong_length_end_the_connection_with_a_sentence(pair: Pair, kind: int, content: bytes) -> None:
    pair.client.call(b"")
    with pytest.raises(ConnectionEnded, match="the server sent what is no HTTP/2: a frame of "):
        pair.tell(frame(kind, 0, 1, content))


def test_headers_that_cannot_be_read_are_told_as_such(pair: Pair) -> None:
    pair.client.call(b"")
    for block in (b"\xff" * 6, literal("\xff", "").replace("\xff".encode(), b"\xff\xff")):
        call = Call(None, head=block, headers=block)
        with pytest.raises(ConnectionEnded, match="the server's headers cannot be read"):
            call.metadata()
        with pytest.raises(ConnectionEnded, match="the server's headers cannot be read"):
            assert call.http_status


def test_both_header_blocks_of_an_answer_are_kept_and_what_ended_it(pair: Pair) -> None:
    for _ in range(3):
        pair.client.call(b"")
    head = frame(HEADERS, END_HEADERS, 1, OK_HEAD)
    (whole,) = pair.tell(head, frame(DATA, 0, 1, b"x"), frame(HEADERS, END_HEADERS | END_STREAM, 1, OK_TAIL))
    (short,) = pair.tell(frame(HEADERS, END_HEADERS | END_STREAM, 3, OK_HEAD + OK_TAIL))
    (plain,) = pair.tell(frame(HEADERS, END_HEADERS, 5, OK_HEAD), frame(DATA, END_STREAM, 5, b"x"))
    assert [call.http_status for call in (whole, short, plain)] == [b"200"] * 3
    assert [call.has_trailers for call in (whole, short, plain)] == [True, True, False]
    assert [call.metadata().get("grpc-status") for call in (whole, short, plain)] == [b"0", b"0", None]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"\0\0\0\0\0", ""),
        (b"\0\0\0\0\2ab", ""),
        (b"", "an answer of 0 bytes has no message"),
        (b"\0\0\0\0", "an answer of 4 bytes has no message"),
        (b"\1\0\0\0\2ab", "compressed"),
        (b"\0\0\0\0\3ab", "a message of 3 bytes is announced, and 2 came"),
        (b"\0\0\0\0\0\0\0\0\0\0", "a message of 0 bytes is announced, and 5 came"),
    ],
)
def test_a_unary_answer_is_exactly_one_message(body: bytes, fault: str) -> None:
    found = Call(None, body=bytearray(body)).body_fault
    assert fault in found
    assert bool(found) == bool(fault)


def test_a_compressed_message_of_a_stream_is_none() -> None:
    with pytest.raises(ConnectionEnded, match="compressed"):
        list(Call(None, body=bytearray(b"\0\0\0\0\1a\1\0\0\0\1a")).take_messages())


def test_a_connection_is_clogged_where_flow_control_holds_back_many_messages(pair: Pair) -> None:
    pair.tell(frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)))
    for _ in range(wire.CLOGGED_BODIES):
        assert not pair.client.is_clogged
        pair.client.call(b"x")
    assert pair.client.is_clogged
