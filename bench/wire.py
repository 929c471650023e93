"""A gRPC client that costs next to nothing, to load servers with: HTTP/2 frames by hand (RFC 9113).

A Python gRPC client takes as much processor time for a call as the server does,
so on one machine it cannot send what is too much for the server. This one takes
some 40 µs, with what a caller does to check the answer. It does what a load
generator needs and no more: calls whose messages are all there at the beginning,
without TLS, within the server's limits of streams and flow.
"""

from __future__ import annotations

import functools
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 1, 1, 4, 8, 32
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 3, 4
"""Settings."""

INITIAL_WINDOW = 65_535
FRAME_BYTES = 16_384
REFUSED_STREAM, CANCEL = 7, 8
MOST = 2**31 - 1
RECEIVE_BYTES = 1 << 18


class ConnectionEnded(Exception):
    """The server has closed the connection, or told that it gives it up."""


@dataclass(slots=True)
class Call:
    """What became of a call; complete once `exchange` has returned it."""

    tag: Any
    """What the caller gave."""
    stream: int = 0
    """Its number."""
    body: bytes = b""
    """The answer's messages, each with gRPC's five bytes before it; empty where there is none."""
    headers: bytes = b""
    """The last header block, where a status stands."""
    reset: int | None = None
    """The error code with which the server reset the stream."""
    ended_at: float = 0.0
    """When its end was received, on the machine's monotonic clock."""

    @property
    def was_not_begun(self) -> bool:
        """Whether the server had too many calls under way, or is about to go: this one may be sent again."""
        return self.reset == REFUSED_STREAM

    @property
    def message(self) -> bytes:
        return self.body[5:]

    def messages(self) -> list[bytes]:
        """All of them; of the last, as much as came."""
        found, start = [], 0
        while start < len(self.body):
            end = start + 5 + int.from_bytes(self.body[start + 1 : start + 5])
            found.append(self.body[start + 5 : end])
            start = end
        return found

    def metadata(self) -> dict[str, bytes]:
        """The trailing metadata, with `grpc-status` and `grpc-message`."""
        return _decoded(self.headers)


class Connection:
    """One connection, non-blocking after the first word; `fileno` is for a selector.

    Attributes:
        open: calls that are under way, by the number of their stream.
    """

    def __init__(self, target: str, path: str) -> None:
        """Connect to `host:port` for calls of a method's `/package.Service/Method`, if a call does not say another."""
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host.strip("[]"), int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._target, self._path = target, path
        self._received = bytearray()
        self._unsent = bytearray()
        self._bodies: deque[tuple[int, memoryview]] = deque()  # what flow control holds back
        self._next_stream = 1
        self._max_streams = MOST
        self._refused = False
        self.is_ready = False
        """Whether the server's settings have come."""
        self._initial_window = INITIAL_WINDOW
        self._window = INITIAL_WINDOW
        self._windows: dict[int, int] = {}
        self.is_leaving = False
        """Whether the server answers the calls that are open here, and takes no more."""
        self.open: dict[int, Call] = {}
        # No dynamic table: then equal blocks mean equal fields, and each can be read by itself.
        settings = struct.pack(">HIHI", HEADER_TABLE_SIZE, 0, INITIAL_WINDOW_SIZE, MOST)
        self._unsent += PREFACE + _frame(SETTINGS, 0, 0, settings)
        self._unsent += _frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", MOST - INITIAL_WINDOW))
        self.exchange()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    @property
    def has_room(self) -> bool:
        """Whether the server allows one more call, going by its settings and by what it refused since a call ended."""
        if self.is_leaving:
            return False
        return not self.open or (len(self.open) < self._max_streams and not self._refused)

    @property
    def wants_to_write(self) -> bool:
        return bool(self._unsent)

    def call(self, *messages: bytes, tag: Any = None, timeout: float | None = None, path: str = "") -> Call:
        """Begin a call with these messages; `exchange` sends it."""
        fields = _fields(self._target, path or self._path, "application/grpc")
        if timeout is not None:
            fields += _literal("grpc-timeout", f"{max(int(timeout * 1e6), 1)}u")
        return self._begin(fields, b"".join(struct.pack(">BI", 0, len(it)) + it for it in messages), tag)

    def post(self, path: str, content_type: str, body: bytes, tag: Any = None) -> Call:
        """Begin a request of plain HTTP; the same holds for it."""
        return self._begin(_fields(self._target, path, content_type), body, tag)

    def _begin(self, fields: bytes, body: bytes, tag: Any) -> Call:
        stream = self._next_stream
        self._next_stream += 2
        self._unsent += _frame(HEADERS, END_HEADERS, stream, fields)
        self._windows[stream] = self._initial_window
        self.open[stream] = call = Call(tag, stream)
        self._bodies.append((stream, memoryview(body)))
        self._fill()
        return call

    def cancel(self, call: Call) -> bool:
        """Give a call up; return whether it was still open."""
        if self.open.pop(call.stream, None) is None:
            return False
        del self._windows[call.stream]
        self._refused = False
        self._unsent += _frame(RST_STREAM, 0, call.stream, struct.pack(">I", CANCEL))
        return True

    def exchange(self) -> list[Call]:
        """Send and receive what can be without waiting; return the calls that have ended.

        Raises:
            ConnectionEnded: by the server; the calls in `open` will get no answer.
        """
        ended: list[Call] = []
        is_closed = False
        try:
            while content := self._socket.recv(RECEIVE_BYTES):
                self._received += content
                if len(content) < RECEIVE_BYTES:
                    break
            else:
                is_closed = True
        except BlockingIOError:
            pass
        except ConnectionError:
            is_closed = True
        self._take(ended)
        if is_closed and not ended:
            raise ConnectionEnded("the server closed the connection")
        if self._unsent:
            try:
                sent = self._socket.send(self._unsent)
                del self._unsent[:sent]
            except BlockingIOError:
                pass
            except ConnectionError:  # there may be answers to read before its end
                self._unsent.clear()
        return ended

    def _fill(self) -> None:
        """Put as much of the bodies into frames as flow control allows."""
        for _ in range(len(self._bodies)):
            stream, body = self._bodies.popleft()
            if stream not in self.open:
                continue
            while body and (size := min(len(body), FRAME_BYTES, self._window, self._windows[stream])) > 0:
                last = size == len(body)
                self._unsent += _frame(DATA, END_STREAM if last else 0, stream, body[:size])
                self._window -= size
                self._windows[stream] -= size
                body = body[size:]
            if body:
                self._bodies.append((stream, body))

    def _take(self, ended: list[Call]) -> None:
        received, start = self._received, 0
        now = time.monotonic()
        while len(received) - start >= 9:
            length, kind = int.from_bytes(received[start : start + 3]), received[start + 3]
            end = start + 9 + length
            if len(received) < end:
                break
            flags, stream = received[start + 4], int.from_bytes(received[start + 5 : start + 9])
            content = bytes(received[start + 9 : end])
            start = end
            if (kind in (DATA, HEADERS) and flags & (PADDED | HAS_PRIORITY)) or (
                kind == HEADERS and not flags & END_HEADERS
            ):
                raise ConnectionEnded("the server uses what this client does not understand")
            if kind not in (DATA, HEADERS, RST_STREAM):
                self._obey(kind, flags, stream, content, ended)
                continue
            if (call := self.open.get(stream)) is None:
                continue  # it was reset
            if kind == DATA:
                call.body += content
            elif kind == HEADERS:
                call.headers = content
            else:
                call.reset = int.from_bytes(content)
            if kind == RST_STREAM or flags & END_STREAM:
                del self.open[stream], self._windows[stream]
                self._refused = call.was_not_begun
                call.ended_at = now
                ended.append(call)
        del received[:start]

    def _obey(self, kind: int, flags: int, stream: int, content: bytes, ended: list[Call]) -> None:
        if kind == GOAWAY:
            last, code = struct.unpack_from(">II", content)
            if code:
                raise ConnectionEnded(f"the server said GOAWAY: {content[8:].decode(errors='replace')}")
            self.is_leaving = True
            for number in [number for number in self.open if number > last]:
                del self._windows[number]
                call = self.open.pop(number)
                call.reset = REFUSED_STREAM
                ended.append(call)
        if kind == PING and not flags & ACK:
            self._unsent += _frame(PING, ACK, 0, content)
        elif kind == SETTINGS and not flags & ACK:
            for setting, value in struct.iter_unpack(">HI", content):
                if setting == MAX_CONCURRENT_STREAMS:
                    self._max_streams = value
                elif setting == INITIAL_WINDOW_SIZE:
                    for open_ in self._windows:
                        self._windows[open_] += value - self._initial_window
                    self._initial_window = value
            self._unsent += _frame(SETTINGS, ACK, 0, b"")
            self.is_ready = True
            self._fill()
        elif kind == WINDOW_UPDATE:
            if stream == 0:
                self._window += int.from_bytes(content)
            elif stream in self._windows:
                self._windows[stream] += int.from_bytes(content)
            self._fill()


def _frame(kind: int, flags: int, stream: int, content: bytes | memoryview) -> bytes:
    return b"".join((struct.pack(">IBI", len(content) << 8 | kind, flags, stream), content))


@functools.cache
def _fields(target: str, path: str, content_type: str) -> bytes:
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", target)]
    fields += [("te", "trailers"), ("content-type", content_type), ("user-agent", "bench-wire")]
    return b"".join(_literal(name, value) for name, value in fields)


def _literal(name: str, value: str) -> bytes:
    """A header field that no table remembers (RFC 7541, 6.2.2)."""
    encoded = [name.encode(), value.encode()]
    if max(map(len, encoded)) > 126:
        raise ValueError(f"a header field has at most 126 bytes, {name}: {value} has more")
    return b"\0" + b"".join(bytes([len(text)]) + text for text in encoded)


@functools.lru_cache(maxsize=10_000)
def _decoded(block: bytes) -> dict[str, bytes]:
    return {name.decode(): value for name, value in hpack.Decoder().decode(block, raw=True)}
