"""Open streams: messages in, answers out, in order and within a window; and the blocks of our own contract.

Knows neither how images are classified nor a transport.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from digits.preprocessing import PIXELS
from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.answers import build_response
from server.batching import Answer
from server.errors import NotServing, Overtaken, ServiceError
from server.gathering import Arrivals
from server.inputs import Inputs, count_bytes, count_images

if TYPE_CHECKING:
    from server.inference import Scores

AnswerFrames: TypeAlias = Callable[[pb.StreamClassifyRequest], Coroutine[Any, Any, list[pb.FrameBlock]]]

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class OrderedStream(Generic[Request, Reply]):
    """One open stream: a reader that runs ahead of a writer by a bounded window.

    The reader starts on each message as it comes, so that one stream alone
    fills batches; the writer sends the answers in the order of arrival. While
    `window` rows, or `window_bytes` of images, are unanswered, the message that
    was read last is held back and nothing more is read: the transport's flow
    control holds the sender.
    """

    def __init__(
        self,
        measure: Callable[[Request], tuple[int, int]],
        answer: Callable[[Request], Coroutine[Any, Any, Reply]],
        window: int,
        window_bytes: int,
        arrivals: Arrivals | None = None,
    ) -> None:
        """Begin.

        Args:
            measure: gives the rows and the bytes of a message.
            answer: is called in the order of arrival.
            window: rows that are unanswered at most.
            window_bytes: of their images.
            arrivals: counts the messages.
        """
        self._measure = measure
        self._answer = answer
        self._window = window
        self._window_bytes = window_bytes
        self._arrivals = arrivals
        self._complete = False  # the sender has said that nothing more comes, and all is pending
        self._pending: deque[tuple[int, int, asyncio.Task[Reply]]] = deque()  # with rows and bytes
        self._unanswered = 0
        self._unanswered_bytes = 0
        self._ended = False  # nothing more will be pending
        self._draining = False
        self._changed = asyncio.Event()  # for the writer: something is pending, or the end
        self._room = asyncio.Event()  # for the reader

    def drain(self) -> None:
        """Start no more; end with NotServing once all that was started is answered."""
        self._draining = True
        self._end()

    async def run(
        self, read: Callable[[], Awaitable[Request | None]], write: Callable[[list[Reply]], Awaitable[None]]
    ) -> None:
        """Answer messages until `read` gives None; `write` gets the answers that are ready at the same time."""
        reader = asyncio.create_task(self._read(read), name="stream-reader")
        try:
            await self._write(write)
            if self._draining and not self._complete:
                raise NotServing("the server is about to stop; open the stream again to reach another one")
            await reader
        finally:
            reader.cancel()
            for *_, task in self._pending:
                task.cancel()
            await asyncio.gather(reader, *(task for *_, task in self._pending), return_exceptions=True)

    async def _read(self, read: Callable[[], Awaitable[Request | None]]) -> None:
        try:
            while (request := await read()) is not None:
                rows, size = self._measure(request)
                rows = max(rows, 1)  # an empty message takes a place, too
                # A message larger than the window goes when it is alone.
                while self._unanswered and (
                    self._unanswered + rows > self._window or self._unanswered_bytes + size > self._window_bytes
                ):
                    self._room.clear()
                    await self._room.wait()
                if self._draining:
                    return
                if self._arrivals is not None:
                    self._arrivals.count_one()
                self._pending.append((rows, size, asyncio.create_task(self._answer(request))))
                self._unanswered += rows
                self._unanswered_bytes += size
                self._changed.set()
            self._complete = True
        finally:
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._changed.set()

    async def _write(self, write: Callable[[list[Reply]], Awaitable[None]]) -> None:
        """Send each message's answer when it is ready, with those that are ready behind it."""
        while True:
            while not self._pending:
                if self._ended:
                    return
                self._changed.clear()
                await self._changed.wait()
            await self._pending[0][2]
            replies = []
            rows = size = 0
            while self._pending and self._pending[0][2].done():
                message_rows, message_bytes, task = self._pending.popleft()
                replies.append(task.result())
                rows += message_rows
                size += message_bytes
            await write(replies)
            self._unanswered -= rows
            self._unanswered_bytes -= size
            self._room.set()


MERGED_ROWS = 256
"""Frames that are merged at most."""

ReadReady: TypeAlias = Callable[[], Awaitable[list[pb.StreamClassifyRequest]]]
"""Waits for a message, and gives all that are there; none at the end."""


class MergedFrames:
    """Reads a stream whose messages come many at a time: pixels that follow each other become one message.

    A message of one image costs many times what its image costs the network.
    Those that lie side by side are validated, batched and answered together;
    the blocks of the answers say which frames they are of, as always.
    """

    def __init__(self, read_ready: ReadReady, max_rows: int) -> None:
        """What is merged has at most `max_rows` frames, and never more than `MERGED_ROWS`."""
        self._read_ready = read_ready
        self._max_rows = min(MERGED_ROWS, max_rows)
        self._is_live = False  # from a message that asks for the latest frames only, to the end
        self._ready: deque[pb.StreamClassifyRequest] = deque()

    async def __call__(self) -> pb.StreamClassifyRequest | None:
        """The next message, or several as one; None at the end."""
        if not self._ready:
            self._ready.extend(await self._read_ready())
            if not self._ready:
                return None
        first = self._ready.popleft()
        self._is_live |= first.latest_only
        if self._is_live or not self._ready or (rows := mergeable_rows(first)) is None:
            return first
        parts = [first.frames.pixels]
        while self._ready:
            other = self._ready[0]
            more = mergeable_rows(other)
            if (
                more is None
                or rows + more > self._max_rows
                or other.first_sequence != first.first_sequence + rows
                or other.frames.include_logits != first.frames.include_logits
            ):
                break
            parts.append(other.frames.pixels)
            rows += more
            self._ready.popleft()
        if len(parts) > 1:
            first.frames.pixels = b"".join(parts)
        return first


def mergeable_rows(request: pb.StreamClassifyRequest) -> int | None:
    """The images of a message that others may be merged with: whole pixels, of which none may be overtaken."""
    size = len(request.frames.pixels)
    return size // PIXELS if size and not size % PIXELS and not request.latest_only else None


LOOK_TURNS = 32
"""For how many turns of the event loop a stream of the latest frames only looks for newer ones."""

OVERDUE_SECONDS = 0.1
"""After so long without an answer it no longer looks."""


class LatestOnly:
    """Answers the messages of a stream, one by one once a message asks for the latest frames only.

    One whose turn comes when a newer one is there is then answered as overtaken.
    """

    def __init__(
        self, answer: AnswerFrames, overtaken: Callable[[int], None], arrivals: Arrivals | None = None
    ) -> None:
        """`overtaken` is told how many frames were not computed because newer ones came; `arrivals` count the rest."""
        self._arrivals = arrivals
        self._answer = answer
        self._overtaken = overtaken
        self._asked_for = False
        self._turn = asyncio.Lock()
        self._messages = 0
        self._answered_at = time.monotonic()

    def __call__(self, request: pb.StreamClassifyRequest) -> Coroutine[Any, Any, list[pb.FrameBlock]]:
        self._messages += 1
        self._asked_for |= request.latest_only
        return self._in_turn(request, self._messages) if self._asked_for else self._answer(request)

    async def _is_latest(self, number: int) -> bool:
        """Whether no newer message is there, also not one that the process has received and not yet read.

        Reading takes turns of the event loop, in which a small batch is computed
        too: without them, each message would be the newest one when its turn
        comes, however many wait behind it. A flood, which always has a newer
        one, gets an answer now and then nevertheless.
        """
        if time.monotonic() - self._answered_at < OVERDUE_SECONDS:
            for left in reversed(range(LOOK_TURNS)):
                if number != self._messages:
                    return False
                if not left and self._arrivals is not None:
                    self._arrivals.count_one()
                await asyncio.sleep(0)
        return number == self._messages

    async def _in_turn(self, request: pb.StreamClassifyRequest, number: int) -> list[pb.FrameBlock]:
        async with self._turn:
            if await self._is_latest(number):
                try:
                    return await self._answer(request)
                finally:
                    self._answered_at = time.monotonic()
        count = count_images(request.frames)
        self._overtaken(count)
        return [error_block(request.first_sequence, count, Overtaken("a newer frame came before the turn of this one"))]


def measure_frames(request: pb.StreamClassifyRequest) -> tuple[int, int]:
    """The frames of a message, and the bytes of their images."""
    return count_images(request.frames), count_bytes(request.frames)


def build_blocks(
    first: int, inputs: Inputs, answers: Sequence[Answer[Scores]], include_logits: bool
) -> list[pb.FrameBlock]:
    """Blocks for the frames of one message: runs of good ones, and each bad one alone."""
    if not inputs.errors:
        result = build_response(answers, include_logits)
        return [pb.FrameBlock(first_sequence=first, frame_count=inputs.count, result=result)]
    blocks = []
    index = taken = 0
    while index < inputs.count:
        if (error := inputs.errors.get(index)) is not None:
            blocks.append(error_block(first + index, 1, error))
            index += 1
            continue
        end = min((bad for bad in inputs.errors if bad > index), default=inputs.count)
        part = _rows_of(answers, taken, taken + end - index)
        response = build_response(part, include_logits)
        blocks.append(pb.FrameBlock(first_sequence=first + index, frame_count=end - index, result=response))
        taken += end - index
        index = end
    return blocks


def _rows_of(answers: Sequence[Answer[Scores]], start: int, end: int) -> list[Answer[Scores]]:
    """The part of the answers that covers rows start to end of all."""
    part = []
    offset = 0
    for answer in answers:
        low, high = max(start - offset, 0), min(end - offset, len(answer.result))
        if low < high:
            part.append(
                Answer(answer.result[low:high], answer.batch_rows, answer.queue_seconds, answer.compute_seconds)
            )
        offset += len(answer.result)
    return part


def error_block(first: int, count: int, error: ServiceError) -> pb.FrameBlock:
    """A block that gives frames an error in place of an answer."""
    return pb.FrameBlock(
        first_sequence=first,
        frame_count=count,
        error=pb.FrameError(code=error.number, message=str(error), field=error.field, incident_id=error.incident_id),
    )
