"""A request over a stream of HTTP/2 that is no call of gRPC: between the stream and an `Exchange`."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from server import limits
from server.http2.engine import CANCEL, INTERNAL_ERROR, NO_ERROR, Stream
from server.http2.head import Head
from server.http2.hpack import encode
from server.http2.link import Link
from server.http2.plain import LINGER_SECONDS, Answer, Request, Routes, head_too_large

logger = logging.getLogger(__name__)

MAX_THROWN_AWAY = 16 * 1024 * 1024
"""Bytes of a body that are read although the answer does not need them."""

PIECE = 65536
"""Bytes of an answer that are queued at once; more follow as the client takes them."""


class PlainCall:
    """From the headers of a request to the end of its answer."""

    def __init__(self, link: Link, routes: Routes, stream: Stream, head: Head) -> None:
        self._link = link
        self.stream = stream
        self.over = False
        """The answer is complete, or nobody is there who could get it."""
        self._is_answered = False
        self._is_head = head.method == b"HEAD"
        self._body = bytearray()
        self._thrown_away = 0
        self._rest = link.server.loop.create_future()
        """The end of what a client sends that has its answer already."""
        self._whole: asyncio.Future[Answer | None] = link.server.loop.create_future()
        """The end of the body; with an answer, if that is not needed."""
        headers = [(name, value) for name, value in head.headers if name[:1] != b":"]
        self._exchange = routes.begin(
            Request(head.method.decode("latin-1"), head.path.decode("latin-1"), headers, link.peer)
        )
        if head.size > limits.MAX_METADATA_BYTES:
            self._exchange.abandon()
            self._whole.set_result(head_too_large(head.size))
        elif (refusal := self._exchange.refusal) is not None:
            self._whole.set_result(refusal)
        elif stream.closed_there:
            self._whole.set_result(self._exchange.wrong_length(0))
        self._waits = False
        self._count()
        self.task = link.server.loop.create_task(self._run())
        self.task.add_done_callback(self._ended)

    # What comes from the connection ---------------------------------------------

    def feed(self, data: bytes) -> None:
        """Bytes of the body."""
        if self._whole.done():
            self._throw_away(len(data))
            return
        self._body += data
        if len(self._body) > self._exchange.body_limit:
            self._body.clear()
            self._whole.set_result(self._exchange.too_large())
        self._link.engine.consume(self.stream, len(data))
        self._link.flush_soon()

    def _throw_away(self, size: int) -> None:
        """Take what is sent after the answer: clients take an end before their own for a fault, and show no answer."""
        self._thrown_away += size
        if self._thrown_away <= MAX_THROWN_AWAY:
            self._link.engine.consume(self.stream, size)
            self._link.flush_soon()
        else:
            self._end_rest()

    def _end_rest(self) -> None:
        if not self._rest.done():
            self._rest.set_result(None)

    def feed_end(self) -> None:
        """The body is whole."""
        if not self._whole.done():
            if self._waits:
                self._count()
            self._whole.set_result(self._exchange.wrong_length(len(self._body)))
        self._end_rest()

    def abandon(self) -> None:
        """Nobody waits for the answer any more."""
        self.over = True
        self._exchange.abandon()
        self.task.cancel()

    def cut_off(self, code: int, message: str) -> None:
        """End the request from outside; one whose answer is being sent gets no more of it."""
        if self.over:
            return
        if self._is_answered:
            self._link.engine.reset(self.stream, NO_ERROR if self.stream.closed_here else CANCEL)
        else:
            answer = self._exchange.cut_off(message)
            self._begin(answer)
            if not self._is_head:
                self._link.engine.send_data(self.stream, answer.body)
            self._link.engine.end(self.stream)
        self._link.flush_soon()
        self.abandon()

    def _count(self) -> None:
        """Images come, and the task has its turn."""
        if self._exchange.has_images:
            self._link.server.arrivals.count_one()

    # The task ------------------------------------------------------------------------

    async def _run(self) -> None:
        self._waits = True
        answer = await self._whole or await self._exchange.answer(bytes(self._body))
        self._body.clear()
        engine, stream = self._link.engine, self.stream
        self._begin(answer)
        if not self._is_head:
            for start in range(0, len(answer.body), PIECE):
                engine.send_data(stream, answer.body[start : start + PIECE])
                self._link.flush_soon()
                while (room := self._link.room_for(self)) is not None:
                    await room
        engine.end(stream, lingers=True)
        self._link.flush_soon()
        while (sent := self._link.sent(self)) is not None:
            await sent
        if not stream.closed_there:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    await self._rest
            engine.reset(stream, NO_ERROR)
            self._link.flush_soon()

    def _begin(self, answer: Answer) -> None:
        self._is_answered = True
        block = encode([(b":status", b"%d" % answer.status), *answer.headers])
        self._link.engine.send_headers(self.stream, block)
        self._link.answer_sent()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Also of a task that was cancelled before it began."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s has a fault", self._link.peer, exc_info=error)
            self._link.engine.reset(self.stream, INTERNAL_ERROR)
            self._link.flush_soon()
        self.over = True
        self._exchange.abandon()
        self._link.call_ended(self)
