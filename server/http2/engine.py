"""The server's side of one HTTP/2 connection (RFC 9113), without any I/O: bytes in, calls of a `Sink`, bytes out.

Why one of our own stands in docs/transport.md, with figures. It is as much of
HTTP/2 as gRPC needs: no push, no priorities, no upgrade. What it guards against:

- A stream counts among the open ones until it is at its end, and until whoever
  works on it says that it is done (`release`), reset or not; one too many is
  refused. So streams that are opened and reset at once start no more work than
  others do, and answers that nobody takes stay few.
- The window of a stream is given back as its bytes are used (`consume`), so
  that a sender stops when nobody reads.
- Header blocks, frames that bring nothing forward, and the sizes of all frames
  are bounded; what breaks a bound or a rule ends the connection with GOAWAY.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Any, Protocol

from server.http2.head import Head
from server.http2.hpack import MAX_LIST_BYTES, Decoder, InvalidBlock

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client begins with (RFC 9113, 3.4)."""

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR = 0, 1, 2, 3, 5, 6
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 7, 8, 9, 11

MAX_FRAME_BYTES = 65536
"""Of a frame that a client may send; gRPC clients then send a large message in fewer pieces."""

STREAM_WINDOW = 256 * 1024
"""Bytes that a client may send on a stream before any of them are used."""

CONNECTION_WINDOW = 2**31 - 1
"""It is streams that are to be stopped, not the connection."""

MAX_BLOCK_BYTES = 2 * 1024 * 1024
"""Of a block of headers, which has to be read to its end even if they are refused: later ones refer to it."""

MAX_CONTINUATIONS = 256
"""Frames that a block may be cut into behind the first."""

MAX_IDLE_FRAMES = 10_000
"""Frames in a row that bring nothing forward: no call, and no data in or out; see `forgive`."""

EVERY_STREAM = 2**31 - 1

_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    range(10)
)
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _WITH_PRIORITY = 1, 1, 4, 8, 32
_ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE, _MAX_HEADER_LIST_SIZE = range(2, 7)
_DEFAULT_WINDOW = 65535
_HEAD = struct.Struct(">HBBBI")  # the length in two parts, the type, flags, the stream
_HEAD_BYTES = _HEAD.size
_PAIR = struct.Struct(">II")
_SETTING = struct.Struct(">HI")


class ProtocolBroken(Exception):
    """The client broke the protocol; GOAWAY with this code is in the output."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stream:
    """What is known of an open stream. `user` is the sink's own."""

    __slots__ = (
        "closed_here",
        "closed_there",
        "credit",
        "end_block",
        "id",
        "is_released",
        "lingers",
        "pending",
        "pending_bytes",
        "receive_window",
        "send_window",
        "user",
    )

    def __init__(self, number: int, send_window: int) -> None:
        self.id = number
        self.send_window = send_window
        self.receive_window = STREAM_WINDOW
        self.credit = 0  # bytes that were used and not given back yet
        self.pending: deque[memoryview] = deque()  # data that waits for window
        self.pending_bytes = 0
        self.end_block: bytes | None = None  # trailers that go behind it; empty: the end, and no trailers
        self.is_released = False  # nobody works on it any more
        self.lingers = False
        self.closed_here = False  # all has been sent
        self.closed_there = False  # nothing more comes
        self.user: Any = None


class Sink(Protocol):
    """What the engine tells, while it is given bytes."""

    def begun(self, stream: Stream, head: Head) -> None:
        """A client opened a stream, with sound headers."""

    def received(self, stream: Stream, data: bytes) -> None:
        """Bytes came; `consume` is to be told once they are used."""

    def ended(self, stream: Stream) -> None:
        """Nothing more comes."""

    def reset(self, stream: Stream, code: int) -> None:
        """The client gave the stream up, or broke its rules."""

    def widened(self) -> None:
        """There is more window; data that waited may have been sent."""

    def pinged(self, is_answer: bool) -> None:
        """A ping came, and was answered; or the answer to one of ours."""


class Engine:
    """One connection."""

    def __init__(self, sink: Sink, max_streams: int) -> None:
        self._sink = sink
        self._max_streams = max_streams
        self._decoder = Decoder(Head)
        self._rest = b""  # of a frame that is not whole
        self._is_receiving = False
        self._used: set[Stream] = set()  # streams of which bytes were used while others came
        self._has_preface = self._has_settings = False
        self._out: list[bytes] = []
        self._streams: dict[int, Stream] = {}
        self._working: set[int] = set()  # streams that count
        self._blocked: dict[int, Stream] = {}  # with data that waits for window
        self._send_window = self._initial_window = _DEFAULT_WINDOW
        self._max_frame = 16384
        self._connection_credit = 0
        self._block = bytearray()  # of the headers that are not whole
        self._block_stream = 0
        self._block_ends = False
        self._continuations = 0
        self._idle_frames = 0
        self._closing_at = EVERY_STREAM
        self.last_stream = 0
        """The highest number of a stream that was opened."""
        self.failed = False
        """The client broke the protocol: nothing more is read."""

    @property
    def is_open(self) -> bool:
        """Whether the client has said all that belongs to the beginning."""
        return self._has_settings

    @property
    def has_unsent(self) -> bool:
        """Whether data waits for window."""
        return bool(self._blocked)

    # Bytes ------------------------------------------------------------------------

    def start(self) -> None:
        """Send the server's settings."""
        settings = {
            _MAX_CONCURRENT_STREAMS: self._max_streams,
            _INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            _MAX_FRAME_SIZE: MAX_FRAME_BYTES,
            _MAX_HEADER_LIST_SIZE: MAX_LIST_BYTES,
        }
        self._frame(_SETTINGS, 0, 0, b"".join(_SETTING.pack(*pair) for pair in settings.items()))
        self._frame(_WINDOW_UPDATE, 0, 0, (CONNECTION_WINDOW - _DEFAULT_WINDOW).to_bytes(4))

    def output(self) -> bytes:
        """The bytes to send; each is given once."""
        out = b"".join(self._out)
        self._out.clear()
        return out

    def receive(self, data: bytes) -> None:
        """Take bytes of the client.

        Raises:
            ProtocolBroken: they break the protocol.
        """
        if self.failed:
            return
        self._is_receiving = True
        try:
            self._receive(data)
            self._is_receiving = False
            while self._used:  # only now, as most of them have ended meanwhile
                self._give_back(self._used.pop())
        except ProtocolBroken as error:
            self.failed = True
            self.goaway(self.last_stream, error.code, str(error).encode())
            raise

    def _receive(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        position, end = 0, len(data)
        if not self._has_preface:
            if end < len(PREFACE) and PREFACE.startswith(data):
                self._rest = data
                return
            if not data.startswith(PREFACE):
                raise ProtocolBroken(PROTOCOL_ERROR, "no HTTP/2")
            self._has_preface = True
            position = len(PREFACE)
        while end - position >= _HEAD_BYTES:
            high, low, kind, flags, number = _HEAD.unpack_from(data, position)
            length = high << 8 | low
            if length > MAX_FRAME_BYTES:
                raise ProtocolBroken(FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            stop = position + _HEAD_BYTES + length
            if stop > end:
                break
            self._take(kind, flags, number & EVERY_STREAM, data[position + _HEAD_BYTES : stop])
            position = stop
        if position < end:
            self._rest = data[position:]

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block_stream and (kind != _CONTINUATION or number != self._block_stream):
            raise ProtocolBroken(PROTOCOL_ERROR, "a frame within a block of headers")
        if not self._has_settings:
            if kind != _SETTINGS or flags & _ACK:
                raise ProtocolBroken(PROTOCOL_ERROR, "the first frame is no SETTINGS")
            self._has_settings = True
        if kind == _DATA:
            self._take_data(flags, number, payload)
            return
        if kind == _HEADERS:
            self._take_headers(flags, number, payload)
            return
        if kind != _CONTINUATION:
            self._count_idle()
        if kind == _WINDOW_UPDATE:
            self._take_window_update(number, payload)
        elif kind == _RST_STREAM:
            self._take_reset(number, payload)
        elif kind == _SETTINGS:
            self._take_settings(flags, number, payload)
        elif kind == _PING:
            _require(number == 0, "a PING of a stream")
            _require(len(payload) == 8, "a PING is of 8 bytes", FRAME_SIZE_ERROR)
            if not flags & _ACK:
                self._frame(_PING, _ACK, 0, payload)
            self._sink.pinged(bool(flags & _ACK))
        elif kind == _CONTINUATION:
            self._take_continuation(flags, number, payload)
        elif kind == _GOAWAY:
            _require(number == 0, "a GOAWAY of a stream")
            _require(len(payload) >= 8, "a GOAWAY is of 8 bytes or more", FRAME_SIZE_ERROR)
        elif kind == _PRIORITY:
            _require(number != 0, "a PRIORITY of no stream")
            _require(len(payload) == 5, "a PRIORITY is of 5 bytes", FRAME_SIZE_ERROR)
        elif kind == _PUSH_PROMISE:
            raise ProtocolBroken(PROTOCOL_ERROR, "a client does not push")

    # Frames ------------------------------------------------------------------------

    def _take_data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self._connection_credit += size  # nobody is stopped by this window
        if self._connection_credit > CONNECTION_WINDOW // 2:
            self._frame(_WINDOW_UPDATE, 0, 0, self._connection_credit.to_bytes(4))
            self._connection_credit = 0
        stream = self._streams.get(number)
        if stream is None or stream.closed_there:
            self._require_opened(number, "DATA")
            self._count_idle()
            if stream is not None:
                self._break_stream(stream, STREAM_CLOSED)
            return  # of one that was reset a moment ago
        stream.receive_window -= size
        if stream.receive_window < 0:
            self._break_stream(stream, FLOW_CONTROL_ERROR)
            return
        if flags & _PADDED:
            payload = _unpadded(payload)
            self.consume(stream, size - len(payload))
        if payload:
            self._idle_frames = 0
            self._sink.received(stream, payload)
        else:
            self._count_idle()
        if flags & _END_STREAM and not stream.closed_there:
            self._end_there(stream)

    def _take_headers(self, flags: int, number: int, payload: bytes) -> None:
        _require(number % 2 == 1, "HEADERS of a stream that no client can open")
        if flags & _PADDED:
            payload = _unpadded(payload)
        if flags & _WITH_PRIORITY:
            _require(len(payload) >= 5, "HEADERS without the priority that they announce", FRAME_SIZE_ERROR)
            payload = payload[5:]
        if flags & _END_HEADERS:
            self._take_block(number, payload, bool(flags & _END_STREAM))
            return
        self._block += payload
        self._block_stream = number
        self._block_ends = bool(flags & _END_STREAM)
        self._continuations = 0

    def _take_continuation(self, flags: int, number: int, payload: bytes) -> None:
        _require(self._block_stream != 0, "a CONTINUATION of nothing")
        self._continuations += 1
        self._block += payload
        if self._continuations > MAX_CONTINUATIONS or len(self._block) > MAX_BLOCK_BYTES:
            raise ProtocolBroken(ENHANCE_YOUR_CALM, "headers without an end")
        if flags & _END_HEADERS:
            block, self._block = bytes(self._block), bytearray()
            self._block_stream = 0
            self._take_block(number, block, self._block_ends)

    def _take_block(self, number: int, block: bytes, ends: bool) -> None:
        """The headers, or trailers, of a stream are whole."""
        try:
            head = self._decoder.decode(block)  # in any case, as later blocks refer to it
        except InvalidBlock as error:
            raise ProtocolBroken(COMPRESSION_ERROR, str(error)) from error
        if (stream := self._streams.get(number)) is not None:  # trailers, which mean nothing in a request of gRPC
            if stream.closed_there:
                self._break_stream(stream, STREAM_CLOSED)
            elif not ends:
                self._break_stream(stream, PROTOCOL_ERROR)
            else:
                self._end_there(stream)
            return
        if number <= self.last_stream:  # of one that was reset a moment ago
            self._count_idle()
            return
        self._idle_frames = 0
        self.last_stream = number
        if number > self._closing_at or self._is_full():
            self._frame(_RST_STREAM, 0, number, REFUSED_STREAM.to_bytes(4))
            return
        if not head.is_request:
            self._frame(_RST_STREAM, 0, number, PROTOCOL_ERROR.to_bytes(4))
            return
        self._streams[number] = stream = Stream(number, self._initial_window)
        self._working.add(number)
        stream.closed_there = ends
        self._sink.begun(stream, head)

    def _is_full(self) -> bool:
        return len(self._working) >= self._max_streams or len(self._streams) >= self._max_streams

    def _end_there(self, stream: Stream) -> None:
        stream.closed_there = True
        if stream.closed_here:
            self._streams.pop(stream.id, None)
        self._sink.ended(stream)

    def _take_reset(self, number: int, payload: bytes) -> None:
        _require(len(payload) == 4, "a RST_STREAM is of 4 bytes", FRAME_SIZE_ERROR)
        self._require_opened(number, "RST_STREAM")
        if (stream := self._streams.get(number)) is not None:
            self._drop(stream)
            self._sink.reset(stream, int.from_bytes(payload))

    def _take_settings(self, flags: int, number: int, payload: bytes) -> None:
        _require(number == 0, "SETTINGS of a stream")
        if flags & _ACK:
            _require(not payload, "an answer to SETTINGS is empty", FRAME_SIZE_ERROR)
            return
        _require(len(payload) % 6 == 0, "SETTINGS are of 6 bytes each", FRAME_SIZE_ERROR)
        window = self._initial_window
        for name, value in _SETTING.iter_unpack(payload):
            if name == _INITIAL_WINDOW_SIZE:
                _require(value <= EVERY_STREAM, "a window of 2^31 bytes or more", FLOW_CONTROL_ERROR)
                window = value
            elif name == _ENABLE_PUSH:
                _require(value <= 1, "pushes are enabled by 0 or 1")
            elif name == _MAX_FRAME_SIZE:
                _require(16384 <= value <= 2**24 - 1, "frames are of 16384 to 16777215 bytes")
                self._max_frame = min(value, MAX_FRAME_BYTES)
        if change := window - self._initial_window:  # once, as a frame may hold thousands of them
            self._initial_window = window
            for stream in self._streams.values():
                stream.send_window += change
                _require(stream.send_window <= EVERY_STREAM, "a window of 2^31 bytes or more", FLOW_CONTROL_ERROR)
        self._frame(_SETTINGS, _ACK, 0, b"")
        self._send_blocked()

    def _take_window_update(self, number: int, payload: bytes) -> None:
        _require(len(payload) == 4, "a WINDOW_UPDATE is of 4 bytes", FRAME_SIZE_ERROR)
        increment = int.from_bytes(payload) & EVERY_STREAM
        if number == 0:
            _require(increment > 0, "a WINDOW_UPDATE of 0")
            self._send_window += increment
            _require(self._send_window <= EVERY_STREAM, "a window of 2^31 bytes or more", FLOW_CONTROL_ERROR)
        else:
            self._require_opened(number, "WINDOW_UPDATE")
            stream = self._streams.get(number)
            if stream is None:
                return
            stream.send_window += increment
            if increment == 0 or stream.send_window > EVERY_STREAM:
                self._break_stream(stream, FLOW_CONTROL_ERROR if increment else PROTOCOL_ERROR)
                return
        if self._blocked:
            self._send_blocked()

    def _require_opened(self, number: int, name: str) -> None:
        if not 0 < number <= self.last_stream or number % 2 == 0:
            raise ProtocolBroken(PROTOCOL_ERROR, f"a {name} of a stream that was never opened")

    def _count_idle(self) -> None:
        self._idle_frames += 1
        if self._idle_frames > MAX_IDLE_FRAMES:
            raise ProtocolBroken(ENHANCE_YOUR_CALM, "too many frames that bring nothing forward")

    def _break_stream(self, stream: Stream, code: int) -> None:
        """The client broke the rules of one stream."""
        self.reset(stream, code)
        self._sink.reset(stream, code)

    # What the sink says ---------------------------------------------------------------

    def send_headers(self, stream: Stream, block: bytes, ends: bool = False) -> None:
        """Send headers, or trailers with `ends`, which go behind data that waits."""
        if stream.closed_here or stream.end_block is not None:
            return
        if ends and stream.pending_bytes:
            stream.end_block = block
            return
        self._frame(_HEADERS, _END_HEADERS | (_END_STREAM if ends else 0), stream.id, block)
        if ends:
            self._close_here(stream)

    def send_data(self, stream: Stream, data: bytes) -> None:
        """Send data as far as the client's windows allow; the rest waits."""
        if stream.closed_here:
            return
        size = len(data)
        if not stream.pending_bytes and size <= min(stream.send_window, self._send_window, self._max_frame):
            self._idle_frames = 0
            stream.send_window -= size
            self._send_window -= size
            self._frame(_DATA, 0, stream.id, data)
            return
        if not size or stream.end_block is not None:
            return
        stream.pending.append(memoryview(data))
        stream.pending_bytes += size
        self._blocked[stream.id] = stream
        self._send_waiting(stream)

    def end(self, stream: Stream, *, lingers: bool = False) -> None:
        """End a stream behind its data, without trailers; one that lingers takes what the client still sends."""
        stream.lingers = lingers
        if stream.closed_here or stream.end_block is not None:
            return
        if stream.pending_bytes:
            stream.end_block = b""
            return
        self._frame(_DATA, _END_STREAM, stream.id, b"")
        self._close_here(stream)

    def drop_unsent(self, stream: Stream) -> None:
        """Send nothing of what waits for the client's window, so that another end can follow at once."""
        stream.pending.clear()
        stream.pending_bytes = 0
        stream.end_block = None
        self._blocked.pop(stream.id, None)

    def reset(self, stream: Stream, code: int) -> None:
        """Give the stream up; after its end, this tells the client to send no more."""
        if self._streams.get(stream.id) is stream:
            self._frame(_RST_STREAM, 0, stream.id, code.to_bytes(4))
            self._drop(stream)

    def release(self, stream: Stream) -> None:
        """Nobody works on the stream any more: once all of it is sent, another one may take its place."""
        stream.is_released = True
        if not stream.pending_bytes:
            self._working.discard(stream.id)

    def consume(self, stream: Stream, size: int) -> None:
        """So many bytes of the stream were used: the client may send as many more."""
        stream.credit += size
        if self._is_receiving:
            self._used.add(stream)
        else:
            self._give_back(stream)

    def _give_back(self, stream: Stream) -> None:
        if (
            stream.credit >= STREAM_WINDOW // 2
            and not stream.closed_there
            and (stream.lingers or not stream.closed_here)
        ):
            size = min(stream.credit, STREAM_WINDOW - stream.receive_window)  # never more than what came
            stream.credit = 0
            if size:
                stream.receive_window += size
                self._frame(_WINDOW_UPDATE, 0, stream.id, size.to_bytes(4))

    def ping(self) -> None:
        """Ask the client whether it is there."""
        self._frame(_PING, 0, 0, bytes(8))

    def forgive(self) -> None:
        """Count frames that bring nothing forward anew: a quiet connection has some of them in a day, too."""
        self._idle_frames = 0

    def goaway(self, last_stream: int, code: int = NO_ERROR, message: bytes = b"") -> None:
        """Tell the client that streams after this one are refused."""
        self._closing_at = min(self._closing_at, last_stream)  # it never grows again (RFC 9113, 6.8)
        self._frame(_GOAWAY, 0, 0, _PAIR.pack(self._closing_at, code) + message)

    # Sending ----------------------------------------------------------------------------

    def _frame(self, kind: int, flags: int, number: int, payload: bytes | memoryview) -> None:
        size = len(payload)
        self._out.append(_HEAD.pack(size >> 8, size & 0xFF, kind, flags, number) + payload)

    def _send_blocked(self) -> None:
        for stream in list(self._blocked.values()):
            if self._send_window <= 0:
                break
            self._send_waiting(stream)
        self._sink.widened()

    def _send_waiting(self, stream: Stream) -> None:
        """Send what the windows allow, frame by frame."""
        pending = stream.pending
        while pending:
            room = min(stream.send_window, self._send_window, self._max_frame)
            if room <= 0:
                return
            data = pending.popleft()
            if len(data) > room:
                pending.appendleft(data[room:])
                data = data[:room]
            size = len(data)
            self._idle_frames = 0
            stream.pending_bytes -= size
            stream.send_window -= size
            self._send_window -= size
            self._frame(_DATA, 0, stream.id, data)
        self._blocked.pop(stream.id, None)
        if stream.is_released:
            self._working.discard(stream.id)
        if stream.end_block is not None:
            if stream.end_block:
                self._frame(_HEADERS, _END_HEADERS | _END_STREAM, stream.id, stream.end_block)
            else:
                self._frame(_DATA, _END_STREAM, stream.id, b"")
            self._close_here(stream)

    def _close_here(self, stream: Stream) -> None:
        stream.closed_here = True
        if stream.closed_there:
            self._streams.pop(stream.id, None)
        elif not stream.lingers:  # the client is to send no more
            self.reset(stream, NO_ERROR)

    def _drop(self, stream: Stream) -> None:
        stream.closed_here = stream.closed_there = True
        stream.pending.clear()
        stream.pending_bytes = 0
        self._streams.pop(stream.id, None)
        self._blocked.pop(stream.id, None)
        if stream.is_released:
            self._working.discard(stream.id)


def _unpadded(payload: bytes) -> bytes:
    _require(bool(payload) and payload[0] < len(payload), "padding that is longer than its frame")
    return payload[1 : len(payload) - payload[0]]


def _require(holds: bool, message: str, code: int = PROTOCOL_ERROR) -> None:
    if not holds:
        raise ProtocolBroken(code, message)
