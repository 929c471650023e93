"""One call: what a handler of grpc.aio sees of it, over a stream of `server.http2.connection`.

`Call` has the methods of `grpc.aio.ServicerContext` that handlers here use, with
the same meaning, so that every service and interceptor runs on either transport
as it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn, TypeAlias, cast

import grpc

from server.errors import ServiceError
from server.http2 import wire
from server.http2.engine import Stream
from server.http2.head import Head
from server.http2.hpack import encode
from server.http2.link import Link
from server.http2.wire import Deframer, Header, Metadata, WireError

logger = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

HEAD: list[Header] = [
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", wire.ACCEPTED_ENCODINGS),
]
"""What goes before a first message, or before the status where there is none."""

HEAD_BLOCK = encode(HEAD)

OK_BLOCK = encode(wire.trailers_of(wire.OK))

WRITE_AHEAD = 65536
"""Bytes of answers that wait for the client's window before `write` waits too."""

CLOCK_SECONDS = 0.002
"""The clock of uvloop has milliseconds. Whoever is told that a deadline has passed shall also find it passed."""

READY_MESSAGES = 256
READY_BYTES = 256 * 1024
"""Of messages that are read at once; others stay as they came, which may be a thousandth of what they say."""

COMPRESS_FROM = 1024
"""Shorter answers are sent as they are, whatever the request was."""


class Details(grpc.HandlerCallDetails):
    """What interceptors and generic handlers are told of a call."""

    def __init__(self, call: Call) -> None:
        self._head = call.head
        self.method = call.path

    @property
    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:  # type: ignore[override]
        return self._head.metadata()


class Call:
    """A call of a method, from its headers to its status."""

    __slots__ = (
        "_arrivals",
        "_broken",
        "_code",
        "_deadline",
        "_deframer",
        "_details",
        "_handler",
        "_has_head",
        "_link",
        "_loop",
        "_messages",
        "_reader",
        "_timer",
        "_trailing",
        "_unused",
        "encoding",
        "half_closed",
        "head",
        "over",
        "path",
        "stream",
        "task",
    )

    def __init__(self, link: Link, stream: Stream, head: Head) -> None:
        """Begin a call whose headers have come.

        Raises:
            WireError: an unknown encoding.
        """
        self._link = link
        self.stream = stream
        self.head = head
        self.path = head.path.decode("ascii", "replace")
        self.encoding = head.encoding if head.encoding in head.accepted else b"identity"
        """Of answers."""
        self.half_closed = stream.closed_there
        """The client sends no more messages."""
        self.over = False
        """The status is on its way, or nobody is there who could get it."""
        self._deframer = Deframer(link.server.max_message_bytes, head.encoding)
        self._messages: deque[bytes] = deque()
        self._unused = 0  # bytes for which the client was given no new window yet
        self._broken: ServiceError | None = None  # what stands where the next message should
        self._reader: asyncio.Future[None] | None = None
        self._handler: Handler | None = None
        self._has_head = False
        self._code = wire.OK
        self._details = ""
        self._trailing: Metadata = ()
        self._loop = loop = link.server.loop
        self._arrivals = link.server.arrivals.of_call(head.path)
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None
        if head.timeout is not None:
            self._deadline = loop.time() + head.timeout
            self._timer = loop.call_at(self._deadline + CLOCK_SECONDS, self._expire)
        self._count()
        self.task = loop.create_task(self._run())
        self.task.add_done_callback(self._ended)

    # What comes from the connection ---------------------------------------------

    def feed(self, data: bytes) -> None:
        """Bytes of the client's messages."""
        if self.over or self._broken is not None:
            return
        self._unused += len(data)
        try:
            messages = self._deframer.feed(data)
        except WireError as error:
            self._messages += error.messages
            self._broken = error
            self._wake()
            return
        self._messages += messages
        if messages:
            self._wake()
        elif not self._messages:
            # A message has to come whole before a handler can take it, and its length is bounded: what is there of
            # it makes room at once. Whole ones make room as they are taken.
            self._use(self._unused)

    def _use(self, size: int) -> None:
        """Let the client send so many bytes more."""
        self._unused -= size
        self._link.engine.consume(self.stream, size)
        self._link.flush_soon()

    def feed_end(self) -> None:
        """The client sends no more."""
        self.half_closed = True
        try:
            self._deframer.end()
        except WireError as error:
            self._broken = self._broken or error
        self._wake()

    def abandon(self) -> None:
        """Nobody waits for the answer any more."""
        self.over = True
        self.task.cancel()

    def cut_off(self, code: int, message: str) -> None:
        """End the call from outside, whatever its handler does."""
        if not self.stream.closed_here:
            self._code, self._details, self._trailing = code, message, ()
            self._link.engine.drop_unsent(self.stream)  # or the status would wait for a client that does not read
            self._end()
            self.task.cancel()

    def _expire(self) -> None:
        self.cut_off(wire.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _break(self, error: ServiceError) -> None:
        """What was to be the next message is none: what lies behind it is nothing."""
        self._broken = error
        self._messages.clear()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._count()
            self._reader.set_result(None)

    def _count(self) -> None:
        """Images may have come, and the task has its turn."""
        if self._arrivals is not None:
            self._arrivals.count_one()

    # What handlers and interceptors use ------------------------------------------

    def invocation_metadata(self) -> Metadata:
        """Of the caller."""
        return self.head.metadata()

    def time_remaining(self) -> float | None:
        """Seconds up to the deadline, 0 when it has passed; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - self._loop.time())

    def peer(self) -> str:
        """Whose call it is, as gRPC writes it: `ipv4:127.0.0.1:50324`."""
        return self._link.peer

    def code(self) -> int:
        """The number of the status that the handler ended the call with."""
        return self._code

    def details(self) -> str:
        """The status's message."""
        return self._details

    def trailing_metadata(self) -> Metadata:
        """What goes with the status."""
        return self._trailing

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with a status; always raises."""
        self._code, self._details, self._trailing = code.value[0], details, trailing_metadata
        raise grpc.aio.AbortError

    async def read(self) -> Any:
        """The next message, or `grpc.aio.EOF`."""
        content = await self._take()
        if content is None:
            return grpc.aio.EOF
        return self._deserialized(content)

    async def read_ready(self) -> list[Any]:
        """Wait for a message, and give those that are there, up to some; none at the end.

        Raises:
            ServiceError: bytes that are no message stood where the next one should.
        """
        content = await self._take()
        requests: list[Any] = []
        size = 0
        while content is not None:
            if isinstance(request := self._deserialized(content), ServiceError):
                self._break(request)
                break
            requests.append(request)
            size += len(content)
            if not self._messages or len(requests) == READY_MESSAGES or size >= READY_BYTES:
                return requests
            try:
                content = self._pop()
            except WireError:  # it stands where the next message should
                break
        if not requests and self._broken is not None:
            raise self._broken
        return requests

    async def write(self, response: Any) -> None:
        """Send a message; waits while the client has too much that it did not read."""
        if self.over:
            raise asyncio.CancelledError
        framed = self._framed(response)
        self._send_head()
        self._link.engine.send_data(self.stream, framed)
        self._link.answer_sent()
        self._link.flush_soon()
        while (room := self._link.room_for(self)) is not None:
            await room

    # The handler's task -----------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._answer()
        except grpc.aio.AbortError:
            pass
        except ServiceError as error:
            self._code, self._details = error.number, str(error)
        except asyncio.CancelledError:
            if not self.over:  # cancelled by its own handler, which should not be
                self._code, self._details = wire.CANCELLED, "the call was cancelled"
            return
        except BaseException as error:
            logger.exception("the handler of %s has a fault", self.path)
            self._code, self._details = wire.UNKNOWN, "the server has a fault"
            if not isinstance(error, Exception):
                raise
        finally:
            if not self.over:
                self._end()
        while (sent := self._link.sent(self)) is not None:  # the deadline is also that of a client which does not read
            await sent

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Also of a task that was cancelled before it began."""
        if self._timer is not None:
            self._timer.cancel()
        self._link.call_ended(self)

    async def _answer(self) -> None:
        handler = await self._link.server.find_handler(Details(self))
        if handler is None:
            raise WireError(wire.UNIMPLEMENTED, "Method not found!")
        self._handler = handler
        behavior = _behavior(handler)
        if handler.request_streaming:
            result = behavior(self._requests(), self)
        else:
            result = behavior(await self._only_message(), self)
        if not handler.response_streaming:
            self._end_with(await result)
        elif hasattr(result, "__aiter__"):
            async for response in result:
                await self.write(response)
        else:
            await result

    async def _take(self) -> bytes | None:
        """The next message's bytes; None when no more come."""
        while not self._messages:
            if self._broken is not None:
                raise self._broken
            if self.half_closed:
                return None
            self._reader = self._loop.create_future()
            await self._reader
        return self._pop()

    def _pop(self) -> bytes:
        """The first of the messages that are there.

        Raises:
            WireError: it cannot be opened.
        """
        self._use(self._unused // len(self._messages))
        try:
            return self._deframer.opened(self._messages.popleft())
        except WireError as error:
            self._break(error)
            raise

    async def _only_message(self) -> Any:
        content = await self._take()
        if content is None:
            raise WireError(wire.UNIMPLEMENTED, f"{self.path} takes one message, none came")
        return self._deserialized(content)

    def _deserialized(self, content: bytes) -> Any:
        assert self._handler is not None
        return self._handler.request_deserializer(content) if self._handler.request_deserializer else content

    async def _requests(self) -> AsyncIterator[Any]:
        while (request := await self.read()) is not grpc.aio.EOF:
            yield request

    # Sending -----------------------------------------------------------------------

    def _framed(self, response: Any) -> bytes:
        assert self._handler is not None
        content = self._handler.response_serializer(response) if self._handler.response_serializer else response
        return wire.framed(content, self.encoding if len(content) >= COMPRESS_FROM else b"identity")

    def _send_head(self) -> None:
        if not self._has_head:
            self._has_head = True
            block = HEAD_BLOCK
            if self.encoding != b"identity":
                block = encode([*HEAD, (b"grpc-encoding", self.encoding)])
            self._link.engine.send_headers(self.stream, block)

    def _end_with(self, response: Any) -> None:
        """The only answer, and the end."""
        if self.over:
            return
        framed = self._framed(response)
        self._send_head()
        self._link.engine.send_data(self.stream, framed)
        self._end()

    def _end(self) -> None:
        """Send the status."""
        self.over = True
        self._messages.clear()
        if self._code or self._trailing or not self._has_head:
            trailers = wire.trailers_of(self._code, self._details, self._trailing)
            block = encode(trailers if self._has_head else [*HEAD, *trailers])
        else:
            block = OK_BLOCK
        self._link.engine.send_headers(self.stream, block, ends=True)
        self._link.answer_sent()
        self._link.flush_soon()


def _behavior(handler: Handler) -> Callable[[Any, Call], Any]:
    """What a handler of its kind does."""
    behavior: Any
    if handler.request_streaming:
        behavior = handler.stream_stream if handler.response_streaming else handler.stream_unary
    else:
        behavior = handler.unary_stream if handler.response_streaming else handler.unary_unary
    return cast("Callable[[Any, Call], Any]", behavior)
