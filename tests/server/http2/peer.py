"""The other sides of an engine: a sink that notes what it is told, frames by hand, and a whole client, that of h2."""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

from server.http2.engine import PREFACE, Engine, ProtocolBroken, Stream
from server.http2.head import Head
from server.http2.hpack import encode
from server.http2.wire import Header

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
ACK, END_STREAM, END_HEADERS, PADDED, WITH_PRIORITY = 1, 1, 4, 8, 32
ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME = 2, 3, 4, 5

REQUEST: list[Header] = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/a/B"),
    (b":authority", b"here"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
]
REQUEST_BLOCK = encode(REQUEST)
ANSWER_BLOCK = encode([(b":status", b"200"), (b"content-type", b"application/grpc")])
TRAILERS: list[Header] = [(b"grpc-status", b"0")]
TRAILERS_BLOCK = encode(TRAILERS)


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    content: bytes

    @property
    def error(self) -> int:
        """Of RST_STREAM and GOAWAY: their error code."""
        return int.from_bytes(self.content[:4] if self.kind == RST_STREAM else self.content[4:8])


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + content


def frames(data: bytes) -> Iterator[Frame]:
    position = 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 3])
        kind, flags = data[position + 3 : position + 5]
        stream = int.from_bytes(data[position + 5 : position + 9])
        content = data[position + 9 : position + 9 + length]
        assert len(content) == length
        yield Frame(kind, flags, stream, content)
        position += 9 + length


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def request(stream: int, flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, flags, stream, REQUEST_BLOCK)


def window(stream: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


def reset(stream: int, code: int = 8) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


def in_pieces(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """The data cut into pieces of these sizes, again and again."""
    position = 0
    for size in itertools.cycle(sizes):
        if position >= len(data):
            return
        yield data[position : position + size]
        position += size


START = PREFACE + settings()


class Server:
    """An engine, and its sink, which notes all that it is told."""

    def __init__(self, max_streams: int = 128, consumes: bool = True) -> None:
        self.consumes = consumes
        self.events: list[tuple[object, ...]] = []
        self.streams: dict[int, Stream] = {}
        self.heads: dict[int, Head] = {}
        self.bodies: dict[int, bytearray] = {}
        self.engine = Engine(self, max_streams)
        self.engine.start()

    @property
    def ended_streams(self) -> list[object]:
        return [event[1] for event in self.events if event[0] == "ended"]

    @property
    def resets(self) -> dict[object, object]:
        return {event[1]: event[2] for event in self.events if event[0] == "reset"}

    def begun(self, stream: Stream, head: Head) -> None:
        assert stream.id not in self.streams
        self.events.append(("begun", stream.id, stream.closed_there))
        self.streams[stream.id], self.heads[stream.id], self.bodies[stream.id] = stream, head, bytearray()

    def received(self, stream: Stream, data: bytes) -> None:
        assert data
        self.events.append(("received", stream.id, data))
        self.bodies[stream.id] += data
        if self.consumes:
            self.engine.consume(stream, len(data))

    def ended(self, stream: Stream) -> None:
        self.events.append(("ended", stream.id))

    def reset(self, stream: Stream, code: int) -> None:
        self.events.append(("reset", stream.id, code))

    def widened(self) -> None:
        pass

    def pinged(self, is_answer: bool) -> None:
        self.events.append(("pinged", is_answer))

    def take(self, *data: bytes) -> list[Frame]:
        """What is answered to these bytes."""
        self.engine.receive(b"".join(data))
        return list(frames(self.engine.output()))

    def answer(self, stream: Stream, *messages: bytes) -> None:
        """Headers, messages and trailers; nobody works on the stream any more."""
        self.engine.send_headers(stream, ANSWER_BLOCK)
        for message in messages:
            self.engine.send_data(stream, message)
        self.engine.send_headers(stream, TRAILERS_BLOCK, ends=True)
        self.engine.release(stream)


def started(max_streams: int = 128, consumes: bool = True) -> Server:
    """One that has said and heard what belongs to the beginning."""
    server = Server(max_streams, consumes)
    server.take(START)
    return server


class Outcome(NamedTuple):
    events: list[tuple[object, ...]]
    frames: list[Frame]
    error: int | None


def outcome(pieces: Iterable[bytes]) -> Outcome:
    """All that comes of these bytes; no other exception than the one that is meant for this."""
    server, error = Server(), None
    for piece in pieces:
        try:
            server.engine.receive(piece)
        except ProtocolBroken as broken:
            error = broken.code
            break
    sent = list(frames(server.engine.output()))
    if error is not None:
        assert (sent[-1].kind, sent[-1].error) == (GOAWAY, error)
    return Outcome(server.events, sent, error)


class Pair:
    """An engine, and the client of h2 that talks to it: it raises if the engine breaks the protocol."""

    def __init__(
        self,
        server: Server | None = None,
        window: int = 65535,
        frame_size: int = 16384,
        pieces: Iterable[int] = (65536,),
    ) -> None:
        self.server = server or Server()
        self.engine = self.server.engine
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        self.client.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window,
                h2.settings.SettingCodes.MAX_FRAME_SIZE: frame_size,
            },
        )
        self.client.max_inbound_frame_size = frame_size
        self.client.initiate_connection()
        self.pieces = list(pieces)
        self.reads = True  # whether the client gives window back
        self.events: list[h2.events.Event] = []
        self.bodies: dict[int, bytearray] = {}
        self.ends: dict[int, object] = {}
        """Of a stream: its trailers, or the code of its reset."""
        self.exchange()

    def exchange(self) -> None:
        """Carry bytes until both have nothing more to say."""
        while True:
            there, back = self.client.data_to_send(), self.engine.output()
            if not there and not back:
                return
            for piece in in_pieces(there, self.pieces):
                self.engine.receive(piece)
            for piece in in_pieces(back, self.pieces):
                for event in self.client.receive_data(piece):
                    self._note(event)

    def _note(self, event: h2.events.Event) -> None:
        self.events.append(event)
        if isinstance(event, h2.events.DataReceived):
            assert event.stream_id not in self.ends
            self.bodies.setdefault(event.stream_id, bytearray()).extend(event.data)
            if self.reads and event.flow_controlled_length:
                self.client.increment_flow_control_window(event.flow_controlled_length)
                with contextlib.suppress(h2.exceptions.StreamClosedError):
                    self.client.increment_flow_control_window(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.TrailersReceived):
            self.ends[event.stream_id] = [(bytes(name), bytes(value)) for name, value in event.headers]
        elif isinstance(event, h2.events.StreamReset):
            self.ends.setdefault(event.stream_id, event.error_code)

    def open(self, *, ends: bool = False) -> int:
        number = self.client.get_next_available_stream_id()
        self.client.send_headers(number, REQUEST, end_stream=ends)
        return number

    def send(self, number: int, data: bytes, *, ends: bool = True, pad: int | None = None) -> None:
        """All of the data, as the engine gives window."""
        position = 0
        while position < len(data):
            room = min(self.client.local_flow_control_window(number), self.client.max_outbound_frame_size)
            room -= 0 if pad is None else pad + 1
            if room <= 0:
                self.exchange()
                assert self.client.local_flow_control_window(number) > (pad or 0) + 1, "the engine gives no window"
                continue
            self.client.send_data(number, data[position : position + room], pad_length=pad)
            position += room
        if ends:
            self.client.end_stream(number)
