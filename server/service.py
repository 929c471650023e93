"""What the methods of DigitClassifier do, without a word of any transport.

Plain async code over messages: validate, submit, wait under a deadline and a
cancellation, build the answer, name the error. A transport is a thin skin that
passes messages in and turns `ServiceError` into its own kind of status.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.answers import build_response
from server.batching import Answer, DeadlineExpired, DynamicBatcher, QueueClosed, QueueFull
from server.errors import DeadlineExceeded, Internal, InvalidArgument, NotServing, Overloaded, ServiceError
from server.inputs import Inputs, Rows, count_images, decode, read_buffer
from server.settings import Settings
from server.version import server_version

if TYPE_CHECKING:  # torch is imported by whoever loads the model, when the port is already open
    from server.inference import Classifier, Scores

logger = logging.getLogger(__name__)

MODEL_NAME = "mnist"
RETRY_AFTER_SECONDS = 0.05
"""What a refused caller is told to wait: a full default queue is worked off in about that time."""

INLINE_SIZE = 32
"""Batches of up to this many images run on the event loop (docs/design.md has the figures)."""

Read = Callable[[], Awaitable[pb.StreamClassifyRequest | None]]
Write = Callable[[pb.StreamClassifyResponse], Awaitable[None]]


class DigitService:
    """The service's methods over one model and one batcher.

    An async context manager; `serve_model` makes it answer, `drain` makes its
    streams end.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._classifier: Classifier | None = None
        self._batcher: DynamicBatcher[Rows, Scores] = DynamicBatcher(
            self._run_batch,
            max_batch_size=settings.max_batch_size,
            max_wait_ms=settings.max_wait_ms,
            max_queue_size=settings.max_queue_size,
            inline_size=INLINE_SIZE,
        )
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._decoding = 0  # images that wait for the decoder or are in it
        self._streams: set[_Stream] = set()
        self._draining = False

    async def __aenter__(self) -> DigitService:
        await self._batcher.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._batcher.close()
        self._decoder.shutdown(wait=False, cancel_futures=True)

    def serve_model(self, classifier: Classifier) -> None:
        """Answer with this model from the next batch on."""
        self._classifier = classifier

    def drain(self) -> None:
        """End open streams once the frames that they have sent are answered."""
        self._draining = True
        self._batcher.hurry()
        for stream in self._streams:
            stream.drain()

    # Methods ------------------------------------------------------------------

    async def classify(self, request: pb.ClassifyRequest, timeout: float | None = None) -> pb.ClassifyResponse:
        """Answer all images of a request, or raise the ServiceError of the first bad one.

        `timeout` is what is left of the caller's deadline, in seconds.
        """
        deadline = _deadline(timeout)
        with _named_errors():
            inputs = await self._read(request)
            if inputs.errors:
                raise inputs.errors[min(inputs.errors)]
            return build_response(await self._submit(inputs.rows, deadline), request.include_logits)

    async def stream_classify(self, read: Read, write: Write, timeout: float | None = None) -> None:
        """Answer frames in order until `read` returns None; see `_Stream`."""
        self._model()
        if self._draining:
            raise NotServing("the server is about to stop")
        stream = _Stream(self, self._settings.stream_window, _deadline(timeout))
        self._streams.add(stream)
        try:
            with _named_errors():
                await stream.run(read, write)
        finally:
            self._streams.discard(stream)

    def get_model(self) -> pb.GetModelResponse:
        """Describe the model."""
        checkpoint = self._model().checkpoint
        manifest = checkpoint.manifest
        return pb.GetModelResponse(
            name=MODEL_NAME,
            version=checkpoint.version,
            architecture=manifest.architecture,
            weights_sha256=checkpoint.sha256,
            parameter_count=checkpoint.parameter_count,
            labels=manifest.labels,
            normalization_mean=manifest.mean,
            normalization_std=manifest.std,
            temperature=manifest.temperature,
            test_accuracy=manifest.test_accuracy,
            dataset=manifest.dataset,
            server_version=server_version(),
            max_batch_size=self._settings.max_batch_size,
            max_message_bytes=self._settings.max_message_bytes,
        )

    async def answer_frames(self, request: pb.StreamClassifyRequest, deadline: float | None) -> list[pb.FrameBlock]:
        """Answer the frames of one stream message; a frame's error stands in its place."""
        first, frames = request.first_sequence, request.frames
        try:
            with _named_errors():
                inputs = await self._read(frames)
                answers = await self._submit(inputs.rows, deadline) if len(inputs.rows) else []
                if not inputs.errors:
                    response = build_response(answers, frames.include_logits)
                    return [pb.FrameBlock(first_sequence=first, frame_count=inputs.count, result=response)]
                return _blocks_with_errors(first, inputs, answers, frames.include_logits)
        except ServiceError as error:
            return [_error_block(first, count_images(frames), error)]

    # Steps --------------------------------------------------------------------

    def _model(self) -> Classifier:
        if self._classifier is None:
            raise NotServing("the model is not loaded yet")
        return self._classifier

    def _run_batch(self, blocks: list[Rows]) -> list[Scores]:
        return self._model().run_batch(blocks)

    async def _read(self, request: pb.ClassifyRequest) -> Inputs:
        self._model()
        size, limit = request.ByteSize(), self._settings.max_message_bytes
        if size > limit:
            raise InvalidArgument("images", f"a request has at most {limit} bytes, this one has {size}")
        if (count := count_images(request)) > self._settings.max_queue_size:
            raise InvalidArgument(
                "images", f"a request carries at most {self._settings.max_queue_size} images, this one {count}"
            )
        if request.WhichOneof("images") == "encoded":
            return await self._decode(request.encoded)
        return read_buffer(request)

    async def _decode(self, encoded: pb.EncodedImages) -> Inputs:
        """Decode off the event loop, one request at a time, for a bounded number of images."""
        count = len(encoded.files)
        if not count:
            raise InvalidArgument("encoded.files", "a request carries 1 or more images, this one carries 0")
        if self._decoding and self._decoding + count > self._settings.max_queue_size:
            raise Overloaded(f"{self._decoding} images wait to be decoded: no room for {count}", RETRY_AFTER_SECONDS)
        self._decoding += count
        wanted = True
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._decoder, decode, encoded.files, lambda: wanted
            )
        finally:
            wanted = False
            self._decoding -= count

    async def _submit(self, rows: Rows, deadline: float | None) -> list[Answer[Scores]]:
        """Have rows computed by one model, in parts of at most `max_batch_size`."""
        while True:
            answers = await self._submit_once(rows, deadline)
            if len({answer.result.model_version for answer in answers}) == 1:
                return answers
            # The model was exchanged between two parts.

    async def _submit_once(self, rows: Rows, deadline: float | None) -> list[Answer[Scores]]:
        size = self._settings.max_batch_size
        futures = self._batcher.enqueue(
            [rows[start : start + size] for start in range(0, len(rows), size)], deadline=deadline
        )
        try:
            return [await future for future in futures]
        finally:
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # another part's failure is the one that is told


class _Stream:
    """One open stream: a reader that runs ahead of a writer by a bounded window.

    The reader starts on each message as it comes, so that one stream alone
    fills batches; the writer sends the answers in the order of arrival. While
    `window` frames are unanswered, the message that was read last is held back
    and nothing more is read: the transport's flow control holds the sender.
    """

    def __init__(self, service: DigitService, window: int, deadline: float | None) -> None:
        self._service = service
        self._window = window
        self._deadline = deadline
        self._complete = False  # the sender has said that nothing more comes, and all is pending
        self._pending: deque[tuple[int, asyncio.Task[list[pb.FrameBlock]]]] = deque()
        self._unanswered = 0
        self._ended = False  # nothing more will be pending
        self._draining = False
        self._changed = asyncio.Event()  # for the writer: something is pending, or the end
        self._room = asyncio.Event()  # for the reader

    def drain(self) -> None:
        """Read no more; end with NotServing once all that was read is answered."""
        self._draining = True
        self._end()

    async def run(self, read: Read, write: Write) -> None:
        reader = asyncio.create_task(self._read(read), name="stream-reader")
        try:
            await self._write(write)
            if self._draining and not self._complete:
                raise NotServing("the server is about to stop; open the stream again to reach another one")
            await reader
        finally:
            reader.cancel()
            for _, task in self._pending:
                task.cancel()
            await asyncio.gather(reader, *(task for _, task in self._pending), return_exceptions=True)

    async def _read(self, read: Read) -> None:
        try:
            while (request := await read()) is not None:
                count = count_images(request.frames)
                # A message larger than the window goes when it is alone.
                while self._unanswered and self._unanswered + count > self._window:
                    self._room.clear()
                    await self._room.wait()
                if self._draining:
                    return
                task = asyncio.create_task(self._service.answer_frames(request, self._deadline))
                self._pending.append((count, task))
                self._unanswered += count
                self._changed.set()
            self._complete = True
        finally:
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._changed.set()

    async def _write(self, write: Write) -> None:
        """Send each message's answer when it is ready, with those that are ready behind it."""
        while True:
            while not self._pending:
                if self._ended:
                    return
                self._changed.clear()
                await self._changed.wait()
            await self._pending[0][1]
            response = pb.StreamClassifyResponse()
            count = 0
            while self._pending and self._pending[0][1].done():
                frames, task = self._pending.popleft()
                response.blocks.extend(task.result())
                count += frames
            await write(response)
            self._unanswered -= count
            self._room.set()


def _blocks_with_errors(
    first: int, inputs: Inputs, answers: list[Answer[Scores]], include_logits: bool
) -> list[pb.FrameBlock]:
    """Blocks for frames of which some are bad: runs of good ones, and each bad one alone."""
    blocks = []
    index = taken = 0
    while index < inputs.count:
        if (error := inputs.errors.get(index)) is not None:
            blocks.append(_error_block(first + index, 1, error))
            index += 1
            continue
        end = min((bad for bad in inputs.errors if bad > index), default=inputs.count)
        part = _rows_of(answers, taken, taken + end - index)
        response = build_response(part, include_logits)
        blocks.append(pb.FrameBlock(first_sequence=first + index, frame_count=end - index, result=response))
        taken += end - index
        index = end
    return blocks


def _rows_of(answers: list[Answer[Scores]], start: int, end: int) -> list[Answer[Scores]]:
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


def _error_block(first: int, count: int, error: ServiceError) -> pb.FrameBlock:
    return pb.FrameBlock(
        first_sequence=first,
        frame_count=count,
        error=pb.FrameError(code=error.number, message=str(error), field=error.field, incident_id=error.incident_id),
    )


def _deadline(timeout: float | None) -> float | None:
    """When a caller's time is over, on the event loop's clock."""
    return None if timeout is None else asyncio.get_running_loop().time() + timeout


@contextmanager
def _named_errors() -> Iterator[None]:
    """Turn whatever went wrong into the ServiceError that the caller may see."""
    try:
        yield
    except ServiceError:
        raise
    except QueueFull as error:
        raise Overloaded(str(error), RETRY_AFTER_SECONDS) from error
    except QueueClosed as error:
        raise NotServing("the server is about to stop") from error
    except DeadlineExpired as error:
        raise DeadlineExceeded(str(error)) from error
    except Exception as error:
        # The callers of a failed batch share its exception, and so one incident and one traceback.
        incident_id: str | None = getattr(error, "incident_id", None)
        if incident_id is None:
            incident_id = uuid.uuid4().hex[:12]
            error.incident_id = incident_id  # type: ignore[attr-defined]
            logger.exception("incident %s", incident_id)
        raise Internal(incident_id) from error
