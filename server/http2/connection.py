"""One connection of the event loop: bytes between the socket and an `Engine`, and calls."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, cast

from server import limits
from server.http2 import wire
from server.http2.call import HEAD, WRITE_AHEAD, Call
from server.http2.engine import ENHANCE_YOUR_CALM, EVERY_STREAM, PREFACE, Engine, ProtocolBroken, Stream
from server.http2.head import Head
from server.http2.hpack import encode
from server.http2.link import Begun
from server.http2.peers import PeerProtocol, peer_of
from server.http2.plain_call import PlainCall
from server.http2.wire import WireError

if TYPE_CHECKING:
    from server.http2.server import Http2Server

logger = logging.getLogger(__name__)

MAX_UNSENT = 1 << 20
"""Bytes that the kernel does not take before nothing more is read: a client that reads nothing gets no answers."""

TURN_SECONDS = 0.005
"""What came at once and takes longer is followed by a turn of the others."""

SETTLE_SECONDS = 2.0
"""How long a client has to answer the ping that tells which calls were on their way.

One that sleeps holds up no stop.
"""

TOO_OLD = "the connection has reached its greatest age, and its calls had their grace"


class Connection(PeerProtocol):
    """A client's connection. Also the `Sink` of its engine, and the `Link` of its calls."""

    def __init__(self, server: Http2Server) -> None:
        self.server = server
        self.engine = Engine(self, limits.MAX_STREAMS)
        self.peer = "unknown"
        self.calls: set[Call | PlainCall] = set()
        """Those whose handlers run."""
        self._begun = b""  # what came before it was known to be HTTP/2
        self._is_http2 = False
        self._flushing = False
        self._paused = False
        self._waiting: dict[Begun, asyncio.Future[None]] = {}  # for room to write
        self._draining = self._is_last_known = self._is_cut_off = False
        self._ping_sent = False
        self._heard = 0.0
        self._last_ping = -limits.MIN_PING_INTERVAL_SECONDS
        self._strikes = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._accepted = server.loop.time()  # with TLS, before the handshake

    # asyncio.Protocol ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._transport.set_write_buffer_limits(high=MAX_UNSENT)
        self.peer = peer_of(transport.get_extra_info("peername"))
        self.server.connections.add(self)
        self._heard = self.server.loop.time()
        left = self._accepted + limits.HANDSHAKE_SECONDS - self._heard
        self._later("handshake", max(0.0, left), self._expect_handshake)
        if age := self.server.age_of_new_connection():
            self._later("age", age, self._grow_old)
        self._watch()
        if self.server.is_stopping:  # its TLS handshake began before
            self.drain()

    def data_received(self, data: bytes) -> None:
        start = time.perf_counter()
        self._heard = self.server.loop.time()
        self._receive(data)
        if time.perf_counter() - start > TURN_SECONDS and not self._paused and not self._transport.is_closing():
            # The event loop would read on, and work for this client alone.
            self._transport.pause_reading()
            self.server.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if not self._paused and not self._transport.is_closing():
            self._transport.resume_reading()

    def _receive(self, data: bytes) -> None:
        if not self._is_http2:
            data = self._begun + data
            if not data.startswith(PREFACE):
                if PREFACE.startswith(data):
                    self._begun = data
                else:
                    self._hand_over(data)
                return
            self._is_http2 = True
            self.engine.start()
        try:
            self.engine.receive(data)
        except ProtocolBroken as error:
            logger.debug("%s broke HTTP/2: %s", self.peer, error)
            self.close()
            return
        self._flush()

    def _hand_over(self, data: bytes) -> None:
        """Leave the transport to whoever understands what does not begin as HTTP/2 does."""
        for timer in self._timers.values():
            timer.cancel()
        self.server.connections.discard(self)
        if not self._transport.is_closing():
            self.server.other_protocol(self._transport, data)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        for call in list(self.calls):
            call.abandon()
        self.widened()
        self.server.connections.discard(self)
        self.server.connection_lost()

    def pause_writing(self) -> None:
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        self._read_on()
        self.widened()

    # Sink ------------------------------------------------------------------------------

    def begun(self, stream: Stream, head: Head) -> None:
        if not head.is_grpc:
            self._answer_plainly(stream, head)
            return
        try:
            if head.wrong is not None:
                raise head.wrong
            if head.size > limits.MAX_METADATA_BYTES:
                raise WireError(
                    wire.RESOURCE_EXHAUSTED,
                    f"a call has at most {limits.MAX_METADATA_BYTES} bytes of metadata, this one has {head.size}",
                )
            stream.user = call = Call(self, stream, head)
        except WireError as error:
            trailers = wire.trailers_of(error.number, str(error))
            self._answer(stream, encode([*HEAD, *trailers]))
            return
        self.calls.add(call)

    def received(self, stream: Stream, data: bytes) -> None:
        if stream.user is not None:
            stream.user.feed(data)

    def ended(self, stream: Stream) -> None:
        if stream.user is not None:
            stream.user.feed_end()

    def reset(self, stream: Stream, code: int) -> None:
        if stream.user is not None:
            stream.user.abandon()

    def widened(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for room in waiting.values():
            if not room.done():
                room.set_result(None)
        self._close_if_done()

    def pinged(self, is_answer: bool) -> None:
        if is_answer:
            self._ping_sent = False
            if self._draining:
                self._settle()
            return
        now = self.server.loop.time()
        if now - self._last_ping < limits.MIN_PING_INTERVAL_SECONDS:
            self._strikes += 1
            if self._strikes > limits.MAX_PING_STRIKES:
                raise ProtocolBroken(ENHANCE_YOUR_CALM, "too_many_pings")
        self._last_ping = now

    def _answer_plainly(self, stream: Stream, head: Head) -> None:
        """What is no gRPC."""
        if self.server.routes is not None:
            stream.user = call = PlainCall(self, self.server.routes, stream, head)
            self.calls.add(call)
        elif head.method == b"POST":
            self._answer(stream, encode([(b":status", b"415")]))
        else:
            self._answer(stream, encode([(b":status", b"405"), (b"allow", b"POST")]))

    def _answer(self, stream: Stream, block: bytes) -> None:
        """End a stream that nobody works on."""
        self.engine.release(stream)
        self.engine.send_headers(stream, block, ends=True)

    # Link -------------------------------------------------------------------------------

    def flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self.server.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        data = self.engine.output()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def answer_sent(self) -> None:
        # Who gets something may ask whether we are there; gRPC's clients measure their way by pings.
        self._strikes = 0
        self._last_ping = -limits.MIN_PING_INTERVAL_SECONDS

    def call_ended(self, call: Begun) -> None:
        self.calls.discard(call)
        self._waiting.pop(call, None)
        self.engine.release(call.stream)
        self._close_if_done()

    def sent(self, call: Begun) -> asyncio.Future[None] | None:
        return None if call.stream.closed_here else self._wait(call)

    def room_for(self, call: Begun) -> asyncio.Future[None] | None:
        if call.over or (not self._paused and call.stream.pending_bytes <= WRITE_AHEAD):
            return None
        return self._wait(call)

    def _wait(self, call: Begun) -> asyncio.Future[None]:
        self._waiting[call] = room = self.server.loop.create_future()
        return room

    # Age, pings and the end ------------------------------------------------------------

    def _later(self, name: str, seconds: float, step: Any) -> None:
        self._timers[name] = self.server.loop.call_later(seconds, step)

    def _expect_handshake(self) -> None:
        if not self.engine.is_open:
            self._transport.abort()

    def _watch(self) -> None:
        """Ping a client that has been silent for long; drop one that does not answer."""
        self.engine.forgive()
        silent = self.server.loop.time() - self._heard
        if self._ping_sent and silent >= limits.KEEPALIVE_TIMEOUT_SECONDS:
            self._transport.abort()
            return
        pause = limits.KEEPALIVE_SECONDS - silent
        if pause <= 0:
            self._ping()
            pause = limits.KEEPALIVE_TIMEOUT_SECONDS
        self._later("watch", pause, self._watch)

    def _ping(self) -> None:
        self._ping_sent = True
        self.engine.ping()
        self._flush()

    def _grow_old(self) -> None:
        self.drain()
        self._later("age", self.server.max_connection_age_grace, lambda: self.cancel_calls(TOO_OLD))

    def drain(self) -> None:
        """Have the client open no more streams here, and close when those that are open are answered."""
        if self._draining or self._transport.is_closing():
            return
        self._draining = True
        if not self.engine.is_open:
            self._transport.close()
            return
        # In two steps (RFC 9113, 6.8): calls that are on their way are answered, as the ping's answer comes after them.
        self.engine.goaway(EVERY_STREAM)
        self._ping()
        self._later("settle", SETTLE_SECONDS, self._settle)

    def _settle(self) -> None:
        """Refuse what is opened from now on."""
        if self._is_last_known:
            return
        self._is_last_known = True
        self.engine.goaway(self.engine.last_stream)
        self.flush_soon()
        self._close_if_done()

    def cancel_calls(self, reason: str) -> None:
        """End all calls that still go on; the reason is what they are told."""
        self._is_cut_off = True
        for call in list(self.calls):
            call.cut_off(wire.UNAVAILABLE, reason)
        self._close_if_done()
        if self._draining:
            self._settle()

    def close(self) -> None:
        """Send what is queued, and close."""
        self._flush()
        self._say_farewell()

    def _close_if_done(self) -> None:
        has_unsent = self.engine.has_unsent and not self._is_cut_off
        if self._is_last_known and not self.calls and not has_unsent:
            self.server.loop.call_soon(self.close)
