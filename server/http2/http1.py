"""A connection of HTTP/1.1, or 1.0: bytes between the socket and `h11`, and requests one after the other.

What it guards against:

- A head is whole within `HANDSHAKE_SECONDS` of its first byte and has at most
  `MAX_METADATA_BYTES`; of a body something comes every `SILENCE_SECONDS`; a
  connection without a request ends after `IDLE_SECONDS`.
- A client that does not read gets nothing more: one answer waits for it, and if
  nothing of that goes for `SILENCE_SECONDS`, the connection ends.
- Requests that come before the one before them is answered wait, up to
  `MAX_AHEAD` bytes of them; then nothing more is read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

import h11

from server import limits
from server.http2.connection import TOO_OLD, TURN_SECONDS
from server.http2.peers import PeerProtocol, peer_of
from server.http2.plain import LINGER_SECONDS, Answer, Exchange, Request, Routes, broken, head_too_large

if TYPE_CHECKING:
    from server.http2.server import Http2Server

logger = logging.getLogger(__name__)

IDLE_SECONDS = limits.KEEPALIVE_SECONDS
SILENCE_SECONDS = limits.KEEPALIVE_TIMEOUT_SECONDS

MAX_AHEAD = 65536
MAX_UNSENT = 65536
"""Bytes that the kernel does not take before nothing more is answered."""

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus} | {499: b"Client Closed Request"}


class Work:
    """A request whose answer is being made."""

    def __init__(self, connection: Http1Connection, exchange: Exchange, body: bytes) -> None:
        self.exchange = exchange
        self.is_cut_off = False
        self._connection = connection
        if exchange.has_images:
            connection.server.arrivals.count_one()
        self.task = connection.server.loop.create_task(exchange.answer(body))
        self.task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Answer]) -> None:
        """Also of a task that was cancelled before it began."""
        self.exchange.abandon()
        if task.cancelled():
            self._connection.answered(self, None)
        elif (error := task.exception()) is not None:
            logger.error("an answer has a fault", exc_info=error)
            self._connection.answered(self, None)
        else:
            self._connection.answered(self, task.result())


class Http1Connection(PeerProtocol):
    """A client's connection, from its first bytes on."""

    def __init__(self, server: Http2Server, routes: Routes) -> None:
        self.server = server
        self.calls: set[Work] = set()
        """The request whose answer is being made, if there is one."""
        self._routes = routes
        self._peer = "unknown"
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.MAX_METADATA_BYTES)
        self._exchange: Exchange | None = None  # of the request that has begun and is not answered
        self._refusal: Answer | None = None  # sent once it is known whether the body is here already
        self._is_head = False
        self._is_doubtful = False  # two lengths of the body are told (RFC 9112, 6.1)
        self._is_body_long = False  # or of a length that is not told
        self._is_head_timed = False  # the clock runs for the head that comes in now
        self._body = bytearray()
        self._thrown_away = 0
        self._ahead = 0  # bytes that came and were not looked at, at most
        self._paused = False  # the client does not read
        self._draining = False
        self._closing = False  # nothing more is taken
        self._unsent = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    # asyncio.Protocol ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=MAX_UNSENT)
        self._peer = peer_of(transport.get_extra_info("peername"))
        self.server.connections.add(self)
        if age := self.server.age_of_new_connection():
            self._later("age", age, self._grow_old)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._http.receive_data(data)
        self._ahead += len(data)
        if not (self.calls or self._paused):
            self._advance()
        if self._ahead > MAX_AHEAD and not self._closing:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        return False  # whoever sends no more is gone

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        for timer in self._timers.values():
            timer.cancel()
        for work in self.calls:
            work.task.cancel()
        self._forget()
        self.server.connections.discard(self)
        self.server.connection_lost()

    def pause_writing(self) -> None:
        self._paused = True
        self._watch_reader()

    def resume_writing(self) -> None:
        self._paused = False
        if not (self._closing or self.calls or self._transport.is_closing()):
            self._go_on()

    # What the client sends ------------------------------------------------------------

    def _go_on(self) -> None:
        """Take what came in the meantime."""
        if self._closing or self.calls or self._paused:
            return
        if self._ahead:
            self._ahead = len(self._http.trailing_data[0])
        if self._ahead <= MAX_AHEAD:
            self._transport.resume_reading()
        self._advance()

    def _advance(self) -> None:
        end = time.perf_counter() + TURN_SECONDS
        try:
            while not (self._closing or self.calls or self._paused):
                event = self._http.next_event()
                if isinstance(event, h11.Request):
                    self._begin(event)
                elif isinstance(event, h11.Data):
                    self._take(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    self._end()
                elif isinstance(event, h11.ConnectionClosed):
                    self.close()
                else:
                    self._need_more()
                    return
                if time.perf_counter() > end and not self._closing:  # others are to have a turn
                    self._transport.pause_reading()
                    self.server.loop.call_soon(self._go_on)
                    return
        except h11.RemoteProtocolError as error:
            logger.debug("%s broke HTTP: %s", self._peer, error)
            if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._send(broken(error.error_status_hint, f"no request of HTTP/1.1: {error}"), closes=True)
            else:  # it has its answer already
                self._linger()

    def _need_more(self) -> None:
        if self._ahead:
            self._ahead = 0
            self._transport.resume_reading()
        if self._http.their_state is h11.IDLE:
            if self._http.trailing_data[0] and not self._is_head_timed:
                self._is_head_timed = True
                self._expect(limits.HANDSHAKE_SECONDS)
            return
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            # A client that was not asked for its body may send it or not, and a long one is not to be waited for.
            self._send(refusal, closes=self._http.they_are_waiting_for_100_continue or self._is_body_long)
        elif self._http.they_are_waiting_for_100_continue:
            self._transport.write(
                self._http.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
            )
        if not self._closing:
            self._expect(SILENCE_SECONDS)

    def _begin(self, event: h11.Request) -> None:
        self._is_head_timed = False
        self._is_head = event.method == b"HEAD"
        self._thrown_away = 0
        if event.http_version[:2] != b"1.":
            self._send(broken(505, f"HTTP/1.1 and 2 are spoken here, not {event.http_version.decode()}"), closes=True)
            return
        headers = list(event.headers)
        names = {name: value for name, value in headers if name in (b"content-length", b"transfer-encoding")}
        length = names.get(b"content-length")
        self._is_body_long = length is None or int(length) > self._routes.max_message_bytes
        self._is_doubtful = len(names) == 2
        size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in headers)
        self._exchange = self._routes.begin(
            Request(event.method.decode("latin-1"), event.target.decode("latin-1"), headers, self._peer)
        )
        self._refusal = self._exchange.refusal
        if size > limits.MAX_METADATA_BYTES:
            self._exchange.abandon()
            self._refusal = head_too_large(size)

    def _take(self, data: bytes | bytearray) -> None:
        if self._exchange is None or self._refusal is not None:
            self._thrown_away += len(data)
            if self._thrown_away > self._routes.max_message_bytes:
                self._stop_reading_body()
            return
        self._body += data
        if len(self._body) > self._exchange.body_limit:
            self._refusal = self._exchange.too_large()
            self._stop_reading_body()

    def _stop_reading_body(self) -> None:
        if self._refusal is not None:
            self._send(self._refusal, closes=True)
        else:
            self._linger()

    def _end(self) -> None:
        if self._refusal is not None:
            self._send(self._refusal)
        elif self._exchange is None:  # the rest of a request that was refused is here
            self._next()
        else:
            self._stop_timer("input")
            body = bytes(self._body)
            self._body.clear()
            self.calls.add(Work(self, self._exchange, body))

    # What it gets ----------------------------------------------------------------------

    def answered(self, work: Work, answer: Answer | None) -> None:
        """The answer is there; None where there will be none."""
        self.calls.discard(work)
        if self._closing:
            return
        if answer is None:
            self._transport.abort()
            return
        self._send(answer)
        if not (self._closing or self._paused):
            self._go_on()

    def _send(self, answer: Answer, closes: bool = False) -> None:
        """Send an answer; make ready for the next request, or close."""
        self._forget()
        headers = list(answer.headers)
        if closes or self._draining or self._is_doubtful:
            headers.append((b"connection", b"close"))
        http = self._http
        reason = _REASONS.get(answer.status, b"")
        parts = [http.send(h11.Response(status_code=answer.status, headers=headers, reason=reason))]
        if not self._is_head:
            parts.append(http.send(h11.Data(data=answer.body)))
        parts.append(http.send(h11.EndOfMessage()))
        self._transport.write(b"".join(parts))
        if http.our_state is h11.DONE:
            if http.their_state is h11.DONE:
                self._next()
        elif http.their_state in (h11.SEND_BODY, h11.ERROR) or http.trailing_data[0]:
            self._linger()
        else:
            self.close()

    def _next(self) -> None:
        """The next request may come."""
        if self._draining:
            self.close()
            return
        self._http.start_next_cycle()
        self._is_head = False
        self._expect(IDLE_SECONDS)

    def _forget(self) -> None:
        """The request has its answer, or will have none."""
        if self._exchange is not None:
            self._exchange.abandon()
        self._exchange = self._refusal = None
        self._body.clear()

    # Time and the end --------------------------------------------------------------------

    def _later(self, name: str, seconds: float, step: Callable[[], None]) -> None:
        self._stop_timer(name)
        self._timers[name] = self.server.loop.call_later(seconds, step)

    def _stop_timer(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()

    def _expect(self, seconds: float) -> None:
        """End the connection unless the client sends something in time."""
        self._later("input", seconds, self._give_up)

    def _give_up(self) -> None:
        self._closing = True
        self._transport.abort()

    def _watch_reader(self) -> None:
        self._unsent = self._transport.get_write_buffer_size()
        self._later("reader", SILENCE_SECONDS, self._expect_reader)

    def _expect_reader(self) -> None:
        """End the connection if nothing of what is to be sent was taken."""
        unsent = 0 if self._transport.is_closing() else self._transport.get_write_buffer_size()
        if unsent >= self._unsent > 0:
            self._give_up()
        elif unsent:
            self._watch_reader()

    def _grow_old(self) -> None:
        self.drain()
        self._later("age", self.server.max_connection_age_grace, lambda: self.cancel_calls(TOO_OLD))

    def drain(self) -> None:
        """Close behind the answer to the request that is under way; at once if there is none."""
        self._draining = True
        if self._http.their_state is h11.IDLE and not self._http.trailing_data[0]:
            self.close()

    def cancel_calls(self, reason: str) -> None:
        """End the request that is under way; the reason is what it is told."""
        for work in self.calls:
            if not work.is_cut_off and not self._closing:
                work.is_cut_off = True
                self._send(work.exchange.cut_off(reason), closes=True)
                work.task.cancel()
        if self._exchange is not None and not self._closing:  # its body is not whole
            self._send(self._exchange.cut_off(reason), closes=True)
        if not self._closing:
            self.close()

    def _linger(self) -> None:
        """Close when the client does, or soon: what it still sends is thrown away."""
        self._closing = True
        self._body.clear()
        self._transport.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._watch_reader()
        self._later("input", LINGER_SECONDS, self.close)

    def close(self) -> None:
        """Send what is queued, and close."""
        self._closing = True
        self._say_farewell()
        self._later("reader", SILENCE_SECONDS, self._transport.abort)
