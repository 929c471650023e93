"""One connection: HTTP/2 by zttp, calls by `server.http2.call`, and what neither knows.

zttp parses and writes frames, keeps to the client's windows and refuses floods.
It gives the client new window as soon as bytes are parsed, however many of them
nobody has read; so this holds back the WINDOW_UPDATE frames of streams whose
handler lags behind, and lets them go when it has caught up. The connection's
own window is never held back, nor is reading stopped for one stream's sake: it
is in what comes next that the client may give us the window to go on.
"""

from __future__ import annotations

import asyncio
import logging
import random
import struct
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import zttp

from server import limits
from server.http2 import wire
from server.http2.call import CANCEL, NO_ERROR, WRITE_AHEAD, Call
from server.http2.wire import Header, WireError

if TYPE_CHECKING:
    from server.http2.server import Http2Server

logger = logging.getLogger(__name__)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What an HTTP/2 client begins with (RFC 9113, 3.4)."""

MAX_UNSENT = 1 << 20
"""Bytes that the kernel does not take before nothing more is read: a client that reads nothing gets no answers."""

_HEADER_BYTES, _OVERHEAD = 9, 32  # of a frame; of a header field in what clients are told of our limit (RFC 9113, 6.5.2)
_WINDOW_UPDATE, _PING, _GOAWAY = 8, 6, 7  # types of frames
_EVERY_STREAM = 2**31 - 1
_REFUSED_STREAM, _ENHANCE_YOUR_CALM = 7, 11  # errors

AddressInfo: TypeAlias = Any


class Connection(asyncio.Protocol):
    """Frames in, calls out; answers in, frames out."""

    def __init__(self, server: Http2Server) -> None:
        self.server = server
        self.peer = "unknown"
        self.calls: dict[int, Call] = {}
        """Those whose handlers run, by their streams' numbers."""
        self._http: zttp.H2Connection = zttp.Connection(zttp.SERVER, protocol=zttp.HTTP2)
        self._transport: asyncio.Transport
        self._begun = b""  # what came before it was known to be HTTP/2
        self._is_http2 = False
        self._flushing = False
        self._paused = False
        self._withheld: dict[int, int] = {}  # window that clients are owed, by stream
        self._held = 0  # streams
        self._waiting: dict[Call, asyncio.Future[None]] = {}  # for room to write
        self._lingering: dict[int, zttp.Stream] = {}  # answered, but the client has not got it all, and may send more
        self._last_stream = 0
        self._draining = False
        self._closing_at = _EVERY_STREAM  # streams after it are refused
        self._ping_sent = False
        self._heard = 0.0
        self._last_ping = -limits.MIN_PING_INTERVAL_SECONDS
        self._strikes = 0
        self._timers: list[asyncio.TimerHandle] = []

    # asyncio.Protocol ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self.peer = _peer(transport.get_extra_info("peername"))
        self._transport.set_write_buffer_limits(high=MAX_UNSENT)
        self.server.connections.add(self)
        loop = self.server.loop
        self._heard = loop.time()
        self._timers.append(loop.call_later(limits.HANDSHAKE_SECONDS, self._expect_handshake))
        if age := self.server.max_connection_age:
            # Not all that came at one moment are to come again at one.
            self._timers.append(loop.call_later(age * random.uniform(0.9, 1.1), self._grow_old))
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._heard = self.server.loop.time()
        if not self._is_http2:
            data = self._begun + data
            if not data.startswith(PREFACE):
                if PREFACE.startswith(data):
                    self._begun = data
                else:
                    self.server.other_protocol(self._transport, data)
                return
            self._is_http2 = True
            self._http.initiate_connection()
        try:
            self._http.receive_data(data)
            self._take_events()
        except zttp.RemoteProtocolError as error:
            logger.debug("%s broke HTTP/2: %s", self.peer, error)
            self._flush()
            self._transport.close()
            return
        self._flush()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.server.connections.discard(self)
        for timer in self._timers:
            timer.cancel()
        for call in list(self.calls.values()):
            call.abandon()
        self._wake_writers()
        self.server.connection_lost()

    def pause_writing(self) -> None:
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        if not self._transport.is_closing():
            self._transport.resume_reading()
        self._wake_writers()

    # Events --------------------------------------------------------------------------

    def _take_events(self) -> None:
        next_event, calls = self._http.next_event, self.calls
        has_room = False
        while (event := next_event()) is not zttp.NEED_DATA:
            kind = type(event)
            if kind is zttp.Data:
                if (call := calls.get(event.stream_id)) is not None:
                    call.feed(event.data)
            elif kind is zttp.Request:
                self._begin(event)
            elif kind is zttp.EndOfMessage:
                self._lingering.pop(event.stream_id, None)
                if (call := calls.get(event.stream_id)) is not None:
                    call.feed_end()
            elif kind is zttp.WindowUpdate or kind is zttp.Settings:
                has_room = True
            elif kind is zttp.RstStream:
                self._forget(event.stream_id)
                if (call := calls.get(event.stream_id)) is not None:
                    call.abandon()
            elif kind is zttp.Ping:
                self._pinged(event)
            elif kind is zttp.ConnectionClosed:
                self._transport.close()
                return
        if has_room:
            self._wake_writers()

    def _begin(self, request: zttp.Request) -> None:
        """A stream's headers have come."""
        number = request.stream_id
        stream = self._http.stream(number)
        if number > self._closing_at:
            stream.reset(_REFUSED_STREAM)
            return
        self._last_stream = number
        content_type = timeout = None
        encoding = b"identity"
        size = 0
        for name, value in request.headers:
            size += len(name) + len(value) + _OVERHEAD
            if name == b"content-type":
                content_type = value
            elif name == b"grpc-timeout":
                timeout = value
            elif name == b"grpc-encoding":
                encoding = value
        if request.method != b"POST" or content_type is None or not content_type.startswith(b"application/grpc"):
            self._answer_plainly(request, stream)
            return
        try:
            if size > limits.MAX_METADATA_BYTES:
                raise WireError(
                    wire.RESOURCE_EXHAUSTED,
                    f"a call has at most {limits.MAX_METADATA_BYTES} bytes of metadata, this one has {size}",
                )
            seconds = None if timeout is None else wire.seconds_of(timeout)
            self.calls[number] = Call(self, request, stream, seconds, encoding)
        except WireError as error:
            stream.send_response(
                200,
                [
                    (b"content-type", b"application/grpc"),
                    (b"grpc-accept-encoding", wire.ACCEPTED_ENCODINGS),
                    *wire.trailers_of(error.code, str(error)),
                ],
                True,
            )
            if not request.end_stream:
                stream.reset(NO_ERROR)

    def _answer_plainly(self, request: zttp.Request, stream: zttp.Stream) -> None:
        """What is no gRPC: a method other than POST, or another content type."""
        status, headers = (415, []) if request.method == b"POST" else (405, [(b"allow", b"POST")])
        stream.send_response(status, headers, True)
        if not request.end_stream:
            stream.reset(NO_ERROR)

    # Link -------------------------------------------------------------------------------

    def flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self.server.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        data = self._http.data_to_send()
        if self._held:
            data = self._without_held_updates(data)
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def call_ended(self, call: Call) -> None:
        del self.calls[call.stream_id]
        if call.held:
            self.release(call)
        self._close_if_done()

    def finish(self, call: Call) -> None:
        self._strikes = 0
        if call.half_closed:
            return
        if call.stream.pending_bytes:
            self._lingering[call.stream_id] = call.stream
        else:
            call.stream.reset(NO_ERROR)

    def hold(self, call: Call) -> None:
        self._held += 1
        self._withheld[call.stream_id] = 0

    def release(self, call: Call) -> None:
        call.held = False
        self._held -= 1
        if increment := self._withheld.pop(call.stream_id, 0):
            self._flush()  # frames do not overtake those that were queued before
            if not call.over:
                self._write_frame(_WINDOW_UPDATE, call.stream_id, struct.pack(">I", increment))

    def room_for(self, call: Call) -> asyncio.Future[None] | None:
        if call.over:
            return None
        if not self._paused and (call.stream.pending_bytes or 0) <= WRITE_AHEAD:
            return None
        self._waiting[call] = room = self.server.loop.create_future()
        return room

    def _wake_writers(self) -> None:
        for stream_id, stream in list(self._lingering.items()):
            if not stream.pending_bytes:
                del self._lingering[stream_id]
                stream.reset(NO_ERROR)
        waiting, self._waiting = self._waiting, {}
        for room in waiting.values():
            if not room.done():
                room.set_result(None)
        self._close_if_done()

    def _forget(self, stream_id: int) -> None:
        self._lingering.pop(stream_id, None)

    def _without_held_updates(self, data: bytes) -> bytes:
        """The frames without those that give window to held streams, which is noted."""
        kept = bytearray()
        start = 0
        while start < len(data):
            end = start + _HEADER_BYTES + int.from_bytes(data[start : start + 3])
            if data[start + 3] == _WINDOW_UPDATE:
                stream_id = int.from_bytes(data[start + 5 : start + 9])
                if stream_id in self._withheld:
                    self._withheld[stream_id] += int.from_bytes(data[start + 9 : start + 13])
                    start = end
                    continue
            kept += data[start:end]
            start = end
        return bytes(kept)

    def _write_frame(self, kind: int, stream_id: int, payload: bytes) -> None:
        """A frame that zttp has no method for."""
        if not self._transport.is_closing():
            head = len(payload).to_bytes(3) + bytes([kind, 0]) + stream_id.to_bytes(4)
            self._transport.write(head + payload)

    # Age, pings and the end ------------------------------------------------------------

    def _expect_handshake(self) -> None:
        if not self._is_http2:
            self._transport.abort()

    def _pinged(self, ping: zttp.Ping) -> None:
        now = self.server.loop.time()
        if ping.ack:
            self._ping_sent = False
            if self._draining and self._closing_at == _EVERY_STREAM:
                self._closing_at = self._last_stream
                self._http.close(NO_ERROR, self._last_stream)
                self._close_if_done()
            return
        if now - self._last_ping < limits.MIN_PING_INTERVAL_SECONDS:
            self._strikes += 1
            if self._strikes > limits.MAX_PING_STRIKES:
                self._flush()
                self._write_frame(
                    _GOAWAY, 0, struct.pack(">II", self._last_stream, _ENHANCE_YOUR_CALM) + b"too_many_pings"
                )
                self._transport.close()
                return
        self._last_ping = now

    def _watch(self) -> None:
        """Ping a client that has been silent for long; drop one that does not answer."""
        loop = self.server.loop
        silent = loop.time() - self._heard
        if self._ping_sent and silent >= limits.KEEPALIVE_TIMEOUT_SECONDS:
            self._transport.abort()
            return
        pause = limits.KEEPALIVE_SECONDS - silent
        if pause <= 0:
            self._ping_sent = True
            self._flush()
            self._write_frame(_PING, 0, bytes(8))
            pause = limits.KEEPALIVE_TIMEOUT_SECONDS
        self._timers[1:] = [timer for timer in self._timers[1:] if timer.when() > loop.time()]
        self._timers.append(loop.call_later(pause, self._watch))

    def _grow_old(self) -> None:
        self.drain()
        grace = self.server.max_connection_age_grace
        self._timers.append(self.server.loop.call_later(grace, self.cancel_calls))

    def drain(self) -> None:
        """Have the client open no more streams here, and close when those that are open are answered."""
        if self._draining or self._transport.is_closing():
            return
        self._draining = True
        if not self._is_http2:
            self._transport.close()
            return
        # Two steps (RFC 9113, 6.8): calls that are on their way are answered; the ping's answer comes after the last.
        self._http.close(NO_ERROR, _EVERY_STREAM)
        self._flush()
        self._ping_sent = True
        self._write_frame(_PING, 0, bytes(8))

    def cancel_calls(self) -> None:
        """End all calls that still go on."""
        for call in list(self.calls.values()):
            call.cut_off(wire.UNAVAILABLE, "the server is about to stop")
        if self._draining:
            self._flush()
            self._closing_at = min(self._closing_at, self._last_stream)
            self._close_if_done()

    def close(self) -> None:
        """Close now."""
        self._flush()
        self._transport.close()

    def _close_if_done(self) -> None:
        if self._draining and self._closing_at != _EVERY_STREAM and not self.calls and not self._http.has_pending_send():
            self._flush()
            self._transport.close()


def _peer(address: AddressInfo) -> str:
    """As gRPC writes it."""
    if not isinstance(address, tuple):
        return "unix:" if address is not None else "unknown"
    host, port = address[:2]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


__all__ = ["CANCEL", "Connection", "Header"]
