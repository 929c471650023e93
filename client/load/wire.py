"""A gRPC client that costs next to nothing, to load servers with: HTTP/2 frames by hand (RFC 9113).

A Python gRPC client takes as much processor time for a call as the server does,
so on one machine it cannot send what is too much for the server. This one takes
12 to 18 µs, with what a caller does to check the answer. It does what a load
generator needs and no more, within the server's limits of streams and flow.
Knows nothing of what the messages say.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
PREFIX = struct.Struct(">BI")
"""gRPC's five bytes before a message: whether it is compressed, and its length."""
LENGTHS = {RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
"""Of frames that have one."""
CONNECT_SECONDS = 10.0
RECEIVE_BYTES = 1 << 18
WINDOW_GIVEN_BACK = 1 << 30
"""A window of 2 GiB is given back when so much of it is used."""
CLOGGED_BODIES, CLOGGED_BYTES = 64, 1 << 20
"""So many messages that flow control holds back, or bytes that the socket does not take: more would only pile up."""

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class ConnectionEnded(Exception):
    """The server has closed the connection, told that it will, or sent what cannot be read."""


@dataclass(slots=True)
class Call:
    """What became of a call; complete once `exchange` has returned it."""

    tag: Any
    """What the caller gave."""
    stream: int = 0
    """Its number."""
    body: bytearray = field(default_factory=bytearray)
    """The answer's messages, each with gRPC's five bytes before it; `take_messages` empties it."""
    headers: bytes = b""
    """The last header block, where gRPC's status stands."""
    head: bytes = b""
    """The first one, where that of HTTP stands; the same where there is one only."""
    has_trailers: bool = False
    """Whether the answer ended with the last header block."""
    reset: int | None = None
    """The error code with which the server reset the stream."""
    ended_at: float = 0.0
    """When its end was received, on the machine's monotonic clock."""

    @property
    def was_not_begun(self) -> bool:
        """Whether the server had too many calls under way: this one may be sent again."""
        return self.reset == REFUSED_STREAM

    @property
    def message(self) -> bytes:
        """The only message of a unary call's answer; empty where there is none, and unchecked: see `body_fault`."""
        return bytes(self.body[5:])

    @property
    def body_fault(self) -> str:
        """Why the body is not exactly one message that is not compressed; empty if it is."""
        came = len(self.body) - 5
        if came < 0:
            return f"an answer of {came + 5} bytes has no message"
        compressed, said = PREFIX.unpack_from(self.body)
        if compressed:
            return "a message that is said to be compressed, which was not asked for"
        return "" if said == came else f"a message of {said} bytes is announced, and {came} came"

    def take_messages(self) -> Iterator[bytes]:
        """The messages of a stream's answer that have come as a whole, each once.

        Raises:
            ConnectionEnded: one is compressed, which was not asked for.
        """
        body, start = self.body, 0
        while len(body) >= start + 5 and len(body) >= (end := start + 5 + int.from_bytes(body[start + 1 : start + 5])):
            if body[start]:
                raise ConnectionEnded("a stream has a message that is said to be compressed, which was not asked for")
            yield bytes(body[start + 5 : end])
            start = end
        del body[:start]

    def metadata(self) -> dict[str, bytes]:
        """The trailing metadata, with `grpc-status` and `grpc-message`.

        Raises:
            ConnectionEnded: it cannot be read.
        """
        return _decoded(self.headers)

    @property
    def http_status(self) -> bytes:
        """As it stands in the first header block.

        Raises:
            ConnectionEnded: that cannot be read.
        """
        return _decoded(self.head).get(":status", b"")


class Connection:
    """One connection, non-blocking after the first word; `fileno` is for a selector.

    Attributes:
        open: calls that are under way, by the number of their stream.
        max_streams: how many the server allows at a time.
        is_leaving: whether the server takes no more calls and answers those that it took, as it said by GOAWAY.
        farewell: what it said beside that.
    """

    def __init__(
        self,
        target: str,
        path: str,
        *,
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Connect to `host:port` for calls of a method's `/package.Service/Method`, each with this metadata.

        Raises:
            OSError: nobody is there, or TLS with it does not come about.
        """
        host, _, port = target.rpartition(":")
        host = host.strip("[]")
        self._socket = socket.create_connection((host, int(port)), CONNECT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            with contextlib.ExitStack() as failed:
                failed.callback(self._socket.close)
                self._socket = tls.wrap_socket(self._socket, server_hostname=server_name or host)
                failed.pop_all()
        self._socket.setblocking(False)
        scheme = "http" if tls is None else "https"
        authority = [(":method", "POST"), (":scheme", scheme), (":authority", server_name or target)]
        self._to_server = b"".join(literal(name, value) for name, value in authority)
        fields = [("te", "trailers"), ("user-agent", "mnist-grpc-bench"), *metadata]
        self._fields = b"".join(literal(name, value) for name, value in fields)
        self._path = path
        self._heads: dict[tuple[str, str], bytes] = {}
        self._received = bytearray()
        self._unsent = bytearray()
        self._bodies: deque[tuple[int, memoryview, bool]] = deque()  # what flow control holds back; is it the end
        self._unreturned: dict[int, int] = {0: 0}  # bytes that came, by stream; 0 is the connection
        self._next_stream = 1
        self.max_streams = MOST
        self._refused = False
        self.is_ready = False
        """Whether the server's settings have come."""
        self.is_leaving = False
        self.farewell = ""
        self._initial_window = INITIAL_WINDOW
        self._window = INITIAL_WINDOW
        self._windows: dict[int, int] = {}
        self.open: dict[int, Call] = {}
        # No dynamic table: then equal blocks mean equal fields, and each can be read by itself.
        settings = struct.pack(">HIHI", HEADER_TABLE_SIZE, 0, INITIAL_WINDOW_SIZE, MOST)
        self._unsent += PREFACE + frame(SETTINGS, 0, 0, settings)
        self._unsent += frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", MOST - INITIAL_WINDOW))
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
        return not self.open or (len(self.open) < self.max_streams and not self._refused)

    @property
    def wants_to_write(self) -> bool:
        return bool(self._unsent)

    @property
    def is_clogged(self) -> bool:
        """Whether the server takes what was sent so slowly that more would only pile up here."""
        return len(self._bodies) >= CLOGGED_BODIES or len(self._unsent) > CLOGGED_BYTES

    def call(self, *messages: bytes, tag: Any = None, timeout: float | None = None, path: str = "") -> Call:
        """Begin a call that has these messages and no more; `flush` or `exchange` sends it."""
        call = self._begin(Call(tag), self._head(path, "application/grpc", timeout))
        self._put(call.stream, b"".join(map(_framed, messages)), True)
        return call

    def post(self, path: str, content_type: str, body: bytes, tag: Any = None) -> Call:
        """Begin a request of plain HTTP; the same holds for it."""
        call = self._begin(Call(tag), self._head(path, content_type))
        self._put(call.stream, body, True)
        return call

    def stream(self, tag: Any = None) -> tuple[int, Call]:
        """Begin a call of many messages; return the number of its stream for `send` and `end`."""
        call = self._begin(Call(tag), self._head("", "application/grpc"))
        return call.stream, call

    def cancel(self, call: Call) -> bool:
        """Give a call up; return whether it was still open."""
        if self.open.pop(call.stream, None) is None:
            return False
        del self._windows[call.stream]
        self._unreturned.pop(call.stream, None)
        self._refused = False
        self._unsent += frame(RST_STREAM, 0, call.stream, CANCEL.to_bytes(4))
        return True

    def send(self, stream: int, message: bytes) -> None:
        """One more message of a stream."""
        self._put(stream, _framed(message), False)

    def end(self, stream: int) -> None:
        """No more messages of a stream; to be called when all of them are answered."""
        self._unsent += frame(DATA, END_STREAM, stream, b"")

    def exchange(self) -> list[Call]:
        """Send and receive what can be without waiting; return the calls that have ended.

        Raises:
            ConnectionEnded: by the server, or it sent what is no HTTP/2.
        """
        ended: list[Call] = []
        lost = ""
        try:
            while content := self._socket.recv(RECEIVE_BYTES):
                self._received += content
                if len(content) < RECEIVE_BYTES and not isinstance(self._socket, ssl.SSLSocket):
                    break  # TLS may hold more, of which a selector would not tell
            else:
                lost = "the server closed the connection"
        except WOULD_BLOCK:
            pass
        except OSError as error:
            lost = f"the connection was lost: {error.strerror or error}"
        self._take(ended)
        if lost and not ended:  # else the next one tells
            raise ConnectionEnded(lost)
        self.flush()
        return ended

    def flush(self) -> None:
        """Send what can be without waiting; `exchange` tells if the connection is lost, behind what still comes."""
        if self._unsent:
            try:
                sent = self._socket.send(self._unsent)
                del self._unsent[:sent]
            except WOULD_BLOCK:
                pass
            except OSError:
                self._unsent.clear()

    def _head(self, path: str, content_type: str, timeout: float | None = None) -> bytes:
        """A block of headers."""
        key = (path or self._path, content_type)
        if (head := self._heads.get(key)) is None:
            head = self._to_server + literal(":path", key[0]) + literal("content-type", content_type) + self._fields
            self._heads[key] = head
        return head if timeout is None else head + literal("grpc-timeout", f"{max(int(timeout * 1e6), 1)}u")

    def _begin(self, call: Call, head: bytes) -> Call:
        call.stream = self._next_stream
        self._next_stream += 2
        self._unsent += frame(HEADERS, END_HEADERS, call.stream, head)
        self._windows[call.stream] = self._initial_window
        self.open[call.stream] = call
        return call

    def _put(self, stream: int, body: bytes, ends: bool) -> None:
        self._bodies.append((stream, memoryview(body), ends))
        self._fill()

    def _fill(self) -> None:
        """Put as much of the bodies into frames as flow control allows."""
        for _ in range(len(self._bodies)):
            stream, body, ends = self._bodies.popleft()
            if stream not in self.open:
                continue
            while body and (size := min(len(body), FRAME_BYTES, self._window, self._windows[stream])) > 0:
                last = ends and size == len(body)
                self._unsent += frame(DATA, END_STREAM if last else 0, stream, body[:size])
                self._window -= size
                self._windows[stream] -= size
                body = body[size:]
            if body:
                self._bodies.append((stream, body, ends))

    def _take(self, ended: list[Call]) -> None:
        received, start = self._received, 0
        now = time.monotonic()
        while len(received) - start >= 9:
            length, kind = int.from_bytes(received[start : start + 3]), received[start + 3]
            end = start + 9 + length
            if length > FRAME_BYTES:
                raise ConnectionEnded(f"the server sent what is no HTTP/2: a frame of {length} bytes")
            if len(received) < end:
                break
            flags, stream = received[start + 4], int.from_bytes(received[start + 5 : start + 9])
            content = bytes(received[start + 9 : end])
            start = end
            if (kind in (DATA, HEADERS) and flags & (PADDED | HAS_PRIORITY)) or (
                kind == HEADERS and not flags & END_HEADERS
            ):
                raise ConnectionEnded("the server uses what this client does not understand")
            if kind not in (DATA, HEADERS):
                _require_length(kind, length)
            if kind not in (DATA, HEADERS, RST_STREAM):
                self._obey(kind, flags, stream, content, ended)
                continue
            if kind == DATA:
                self._give_back(0, length)
            if (call := self.open.get(stream)) is None:
                continue  # it was reset
            if kind == DATA:
                call.body += content
                self._give_back(stream, length)
            elif kind == HEADERS:
                call.head = call.head or content
                call.headers = content
            else:
                call.reset = int.from_bytes(content)
            if kind == RST_STREAM or flags & END_STREAM:
                del self.open[stream], self._windows[stream]
                self._unreturned.pop(stream, None)
                self._refused = call.was_not_begun
                call.has_trailers = kind == HEADERS
                call.ended_at = now
                ended.append(call)
        del received[:start]

    def _give_back(self, stream: int, length: int) -> None:
        used = self._unreturned.get(stream, 0) + length
        if used >= WINDOW_GIVEN_BACK:
            self._unsent += frame(WINDOW_UPDATE, 0, stream, used.to_bytes(4))
            used = 0
        self._unreturned[stream] = used

    def _obey(self, kind: int, flags: int, stream: int, content: bytes, ended: list[Call]) -> None:
        if kind == GOAWAY:
            last, code = struct.unpack_from(">II", content)
            if code:
                raise ConnectionEnded(f"the server said GOAWAY: {content[8:].decode(errors='replace')}")
            self.is_leaving = True
            self.farewell = content[8:].decode(errors="replace")
            for number in [number for number in self.open if number > last]:
                call = self.open.pop(number)
                del self._windows[number]
                self._unreturned.pop(number, None)
                call.reset = REFUSED_STREAM
                ended.append(call)
        if kind == PING and not flags & ACK:
            self._unsent += frame(PING, ACK, 0, content)
        elif kind == SETTINGS and not flags & ACK:
            for setting, value in struct.iter_unpack(">HI", content):
                if setting == MAX_CONCURRENT_STREAMS:
                    self.max_streams = value
                elif setting == INITIAL_WINDOW_SIZE:
                    for open_ in self._windows:
                        self._windows[open_] += value - self._initial_window
                    self._initial_window = value
            self._unsent += frame(SETTINGS, ACK, 0, b"")
            self.is_ready = True
            self._fill()
        elif kind == WINDOW_UPDATE:
            if stream == 0:
                self._window += int.from_bytes(content)
            elif stream in self._windows:
                self._windows[stream] += int.from_bytes(content)
            self._fill()


def _require_length(kind: int, length: int) -> None:
    """Raise ConnectionEnded if frames of this kind are not so long."""
    if LENGTHS.get(kind, length) != length or (kind == GOAWAY and length < 8) or (kind == SETTINGS and length % 6):
        raise ConnectionEnded(f"the server sent what is no HTTP/2: a frame of kind {kind} with {length} bytes")


def frame(kind: int, flags: int, stream: int, content: bytes | memoryview) -> bytes:
    return b"".join((struct.pack(">IBI", len(content) << 8 | kind, flags, stream), content))


def _framed(message: bytes) -> bytes:
    return PREFIX.pack(0, len(message)) + message


def literal(name: str, value: str) -> bytes:
    """A header field that no table remembers (RFC 7541, 6.2.2)."""
    return b"\0" + b"".join(_length(len(text)) + text for text in (name.encode(), value.encode()))


def _length(value: int) -> bytes:
    """Of a string that is not in Huffman's code (RFC 7541, 5.1)."""
    if value < 127:
        return bytes([value])
    encoded, value = bytearray([127]), value - 127
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


@functools.lru_cache(maxsize=10_000)
def _decoded(block: bytes) -> dict[str, bytes]:
    try:
        return {name.decode(): value for name, value in hpack.Decoder().decode(block, raw=True)}
    except (hpack.HPACKError, UnicodeDecodeError) as error:
        raise ConnectionEnded(f"the server's headers cannot be read ({type(error).__name__})") from error
