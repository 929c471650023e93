"""What the methods of DigitClassifier do, without a word of any transport.

Plain async code over messages: validate, submit, wait under a deadline and a
cancellation, build the answer, name the error. A transport is a thin skin that
passes messages in and turns `ServiceError` into its own kind of status.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from digits.preprocessing import PIXELS, InvalidImage
from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.answers import build_response
from server.batching import Answer, DeadlineExpired, DynamicBatcher, Flow, QueueClosed, QueueFull
from server.errors import DeadlineExceeded, Internal, InvalidArgument, NotServing, Overloaded, ServiceError
from server.gathering import Arrivals
from server.inputs import Inputs, Rows, collect, count_bytes, count_images, decode, read_buffer
from server.observer import Observer
from server.settings import Settings
from server.stream import (
    LatestOnly,
    MergedFrames,
    OrderedStream,
    ReadReady,
    Reply,
    Request,
    build_blocks,
    error_block,
    measure_frames,
)
from server.version import server_version

if TYPE_CHECKING:  # torch is imported by whoever loads the model, when the port is already open
    from digits.checkpoint import Checkpoint
    from server.inference import Classifier, Scores

logger = logging.getLogger(__name__)

Read: TypeAlias = Callable[[], Awaitable[pb.StreamClassifyRequest | None]]
Write: TypeAlias = Callable[[pb.StreamClassifyResponse], Awaitable[None]]

MODEL_NAME = "mnist"
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["DigitClassifier"].full_name
CLASSIFY, STREAM_CLASSIFY, GET_MODEL = (f"{SERVICE_NAME}/{name}" for name in ("Classify", "StreamClassify", "GetModel"))

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.02, 5.0
"""Bounds of what a caller is told to wait that a full queue refused; between them, as long as the queue will take."""

MAX_DECODING_BYTES = 64 * 1024 * 1024
"""Of image files that wait to be decoded; more are refused."""

DECODING_RETRY_SECONDS = 1.0
"""What a caller is told to wait that was refused for that."""

STREAM_WINDOW_MESSAGES = 2
"""A stream holds up to so many of the longest messages in unanswered frames."""

RECENT_CALLS = 16
"""So many of the last unary calls tell how small the next one may be."""

UNREAD_SECONDS = 0.05
"""A message that takes longer is on a slow way, and not in one's way."""

COMPANY_SECONDS = 0.002
"""For so long after its headers a call shows that there are several callers."""

PART_ROWS = 64
"""A large request is cut into parts of so many rows, so that a batch has room for parts of other callers."""

INLINE_SIZE = 64
"""Batches of up to this many images run on the event loop, if the model is quick (docs/design.md has the figures)."""


class DigitService:
    """The service's methods over one model and one batcher.

    An async context manager; `serve_model` makes it answer, `drain` makes its
    streams end.
    """

    def __init__(self, settings: Settings, observer: Observer | None = None, arrivals: Arrivals | None = None) -> None:
        """`arrivals` are those of the calls, where the transport counts them."""
        self._arrivals = arrivals
        self._settings = settings
        self.observer = observer or Observer()
        self._announced: dict[Hashable, float] = {}  # unary calls whose messages are being read, and since when
        self._recent_rows = deque([1], maxlen=RECENT_CALLS)  # in the unary calls that were read last
        self._classifier: Classifier | None = None
        self._batcher: DynamicBatcher[Rows, Scores] = DynamicBatcher(
            self._run_batch,
            max_batch_size=settings.max_batch_size,
            max_wait_ms=settings.max_wait_ms,
            max_queue_size=settings.max_queue_size,
            arrivals=arrivals,
            company=self._has_company,
            observer=self.observer,
        )
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._decoding_bytes = 0  # of the requests that wait for the decoder or are in it
        self._streams: set[OrderedStream[Any, Any]] = set()
        self._draining = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Begin to batch, in the running event loop."""
        await self._batcher.__aenter__()

    async def close(self) -> None:
        """Finish what waits, and end."""
        await self._batcher.close()
        self._decoder.shutdown(wait=False, cancel_futures=True)

    @property
    def model(self) -> Classifier:
        """The model that computes the next batch.

        Raises:
            NotServing: none is loaded yet.
        """
        if self._classifier is None:
            raise NotServing("the model is not loaded yet")
        return self._classifier

    @property
    def max_images(self) -> int:
        """How many images a request may carry."""
        return self._settings.max_queue_size

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def busy_seconds(self) -> float:
        """How long the running batch has been computed; 0 when none is."""
        return self._batcher.busy_seconds

    def serve_model(self, classifier: Classifier) -> None:
        """Answer with this model from the next batch on."""
        self._classifier = classifier
        self._batcher.inline_size = INLINE_SIZE if classifier.is_quick else 0  # others would keep the loop waiting
        self.observer.model_served(classifier.checkpoint.version)

    def drain(self) -> None:
        """End open streams once the frames that they have sent are answered."""
        self._draining = True
        self._batcher.hurry()
        for stream in self._streams:
            stream.drain()

    # Calls that arrive ----------------------------------------------------------

    def announce(self, call: Hashable, method: str) -> ServiceError | None:
        """A unary call has come and its message has not; return why it is refused, if it is.

        It is if at least half of the queue is taken, and what is left would not
        do even if this call and those that are being read are no larger than
        the smallest of the last ones. So no call is refused for its size that
        is smaller than all those, nor for calls that are announced and not
        sent. `enqueue` knows exactly, once the message is here.
        """
        now = time.monotonic()
        queued, limit = self._batcher.queued_rows, self._settings.max_queue_size
        if 2 * queued >= limit:
            rows = min(self._recent_rows)
            unread = sum(now - since < UNREAD_SECONDS for since in self._announced.values())
            if queued + min(unread * rows, limit // 2) + rows > limit:
                self.observer.rejected("queue_full", rows)
                self.observer.call_ended(method, Overloaded.code, 0.0)
                return Overloaded(
                    f"the queue holds {queued} of at most {limit} rows, and {unread} calls are being read: "
                    "no room for one like the last ones",
                    self._retry_after(),
                )
        self._announced[call] = now
        return None

    def arrived(self, call: Hashable) -> None:
        """The message of a call is here, or will never be."""
        self._announced.pop(call, None)

    def _has_company(self) -> bool:
        """Whether a call has come just now and its message is still being read."""
        return bool(self._announced) and time.monotonic() - next(reversed(self._announced.values())) < COMPANY_SECONDS

    # Methods ------------------------------------------------------------------

    async def classify(self, request: pb.ClassifyRequest, timeout: float | None = None) -> pb.ClassifyResponse:
        """Answer all images of a request, or raise the ServiceError of the first bad one.

        `timeout` is what is left of the caller's deadline, in seconds.
        """
        deadline = deadline_after(timeout)
        with Observed(self, CLASSIFY, deadline), named_errors():
            inputs = await self._read(request, deadline)
            if inputs.errors:
                raise inputs.errors[min(inputs.errors)]
            return build_response(await self._submit(inputs.rows, deadline), request.include_logits)

    async def stream_classify(
        self, read: Read, write: Write, timeout: float | None = None, read_ready: ReadReady | None = None
    ) -> None:
        """Answer frames in order until `read` returns None; see `OrderedStream`.

        A transport that gets many messages at a time gives `read_ready`, which is
        used in place of `read`; see `MergedFrames`.
        """
        if read_ready is not None:
            settings = self._settings
            most = min(settings.stream_window, settings.max_queue_size, settings.max_message_bytes // PIXELS)
            read = MergedFrames(read_ready, most)
        deadline = deadline_after(timeout)
        flow = Flow()  # one for all of its frames, so that many of them do not crowd out other callers

        async def write_blocks(replies: list[list[pb.FrameBlock]]) -> None:
            await write(pb.StreamClassifyResponse(blocks=[block for blocks in replies for block in blocks]))

        with Observed(self, STREAM_CLASSIFY, deadline), named_errors():
            self.model  # noqa: B018  # raises while there is none
            answer = LatestOnly(
                lambda request: self._answer_frames(request, deadline, flow),
                self.observer.frames_dropped,
                self._arrivals,
            )
            await self.run_stream(measure_frames, answer, read, write_blocks)

    async def run_stream(
        self,
        measure: Callable[[Request], tuple[int, int]],
        answer: Callable[[Request], Coroutine[Any, Any, Reply]],
        read: Callable[[], Awaitable[Request | None]],
        write: Callable[[list[Reply]], Awaitable[None]],
    ) -> None:
        """Run an `OrderedStream` with the window of the settings, which `drain` ends.

        Raises:
            NotServing: the server is about to stop.
        """
        if self._draining:
            raise NotServing("the server is about to stop")
        settings = self._settings
        window_bytes = STREAM_WINDOW_MESSAGES * settings.max_message_bytes
        stream = OrderedStream(measure, answer, settings.stream_window, window_bytes, self._arrivals)
        self._streams.add(stream)
        self.observer.stream_opened()
        try:
            await stream.run(read, write)
        finally:
            self._streams.discard(stream)
            self.observer.stream_closed()

    def get_model(self) -> pb.GetModelResponse:
        """Describe the model."""
        with Observed(self, GET_MODEL), named_errors():
            return self._describe(self.model.checkpoint)

    async def compute(
        self, rows: Rows, deadline: float | None = None, flow: Flow | None = None
    ) -> list[Answer[Scores]]:
        """Have rows computed by one model; for other contracts than ours.

        `deadline` is a time of the event loop's clock. Raises ServiceError only.
        """
        with named_errors():
            self.model  # noqa: B018  # raises while there is none
            if len(rows) > (limit := self._settings.max_queue_size):
                raise InvalidArgument("images", f"a request carries at most {limit} images, this one {len(rows)}")
            return await self._submit(rows, deadline, flow)

    async def _answer_frames(
        self, request: pb.StreamClassifyRequest, deadline: float | None, flow: Flow
    ) -> list[pb.FrameBlock]:
        """Answer the frames of one stream message; a frame's error stands in its place."""
        first, frames = request.first_sequence, request.frames
        try:
            with named_errors():
                if first + count_images(frames) > 1 << 64:
                    raise InvalidArgument("first_sequence", f"frames have numbers below 2^64, these begin at {first}")
                inputs = await self._read(frames, deadline)
                answers = await self._submit(inputs.rows, deadline, flow) if len(inputs.rows) else []
                return build_blocks(first, inputs, answers, frames.include_logits)
        except ServiceError as error:
            return [error_block(first, count_images(frames), error)]

    # Steps --------------------------------------------------------------------

    def _run_batch(self, blocks: list[Rows]) -> list[Scores]:
        return self.model.run_batch(blocks)

    def _describe(self, checkpoint: Checkpoint) -> pb.GetModelResponse:
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
            digit_threshold=manifest.digit_threshold,
            test_accuracy=manifest.test_accuracy,
            dataset=manifest.dataset,
            server_version=server_version(),
            max_batch_size=self._settings.max_batch_size,
            max_message_bytes=self._settings.max_message_bytes,
        )

    async def _read(self, request: pb.ClassifyRequest, deadline: float | None) -> Inputs:
        self.model  # noqa: B018  # raises while there is none
        if (size := count_bytes(request)) > (limit := self._settings.max_message_bytes):
            raise InvalidArgument("images", f"a request has at most {limit} bytes, this one has {size}")
        if (count := count_images(request)) > (limit := self._settings.max_queue_size):
            raise InvalidArgument("images", f"a request carries at most {limit} images, this one {count}")
        if request.WhichOneof("images") == "encoded":
            return await self._decode(request.encoded, size, deadline)
        return read_buffer(request)

    async def _decode(self, encoded: pb.EncodedImages, size: int, deadline: float | None) -> Inputs:
        """Decode off the event loop; requests take turns file by file, and hold a bounded number of bytes."""
        if not encoded.files:
            raise InvalidArgument("encoded.files", "a request carries 1 or more images, this one carries 0")
        if self._decoding_bytes and self._decoding_bytes + size > MAX_DECODING_BYTES:
            self.observer.rejected("decoder_full", len(encoded.files))
            raise Overloaded(
                f"{self._decoding_bytes} bytes of image files wait to be decoded: no room for {size} more",
                DECODING_RETRY_SECONDS,
            )
        loop = asyncio.get_running_loop()
        decoded: list[npt.NDArray[np.uint8] | InvalidImage] = []
        self._decoding_bytes += size
        try:
            for file in encoded.files:
                if deadline is not None and loop.time() >= deadline:
                    raise DeadlineExceeded(f"the deadline passed after {len(decoded)} files were decoded")
                decoded.append(await loop.run_in_executor(self._decoder, decode, file))
        finally:
            self._decoding_bytes -= size
        return collect(decoded)

    async def _submit(self, rows: Rows, deadline: float | None, flow: Flow | None = None) -> list[Answer[Scores]]:
        """Have rows computed by one model, in parts of at most `PART_ROWS`."""
        if flow is None:  # a unary call
            self._recent_rows.append(len(rows))
        if deadline is None or asyncio.get_running_loop().time() < deadline:
            answer = self._batcher.run_now(rows)
            if answer is not None:
                return [answer]
        flow = flow or Flow()
        while True:
            answers = await self._submit_once(rows, deadline, flow)
            if len(answers) == 1 or len({answer.result.model_version for answer in answers}) == 1:
                return answers
            # The model was exchanged between two parts.

    async def _submit_once(self, rows: Rows, deadline: float | None, flow: Flow) -> list[Answer[Scores]]:
        size = min(self._settings.max_batch_size, PART_ROWS)
        count = len(rows)
        parts = [rows] if count <= size else [rows[start : start + size] for start in range(0, count, size)]
        try:
            futures = self._batcher.enqueue(parts, deadline=deadline, flow=flow)
        except QueueFull as error:
            raise Overloaded(str(error), self._retry_after()) from error
        try:
            return [await future for future in futures]
        except BaseException:
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # another part's failure is the one that is told
            raise

    def _retry_after(self) -> float:
        """When there should be room again; no two callers are told the same, or they would all come at once."""
        wait = min(max(self._batcher.backlog_seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
        return wait * random.uniform(1, 1.5)


class Observed:
    """Tells the service's observer how a call ended and how long it took, in a `with`."""

    __slots__ = ("_deadline", "_method", "_service", "_start")

    def __init__(self, service: DigitService, method: str, deadline: float | None = None) -> None:
        """`method` is `package.Service/Method`; `deadline` is a time of the event loop's clock."""
        self._service = service
        self._method = method
        self._deadline = deadline

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            code = "OK"
        elif isinstance(error, ServiceError):
            code = error.code
        elif self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline:
            code = "DEADLINE_EXCEEDED"
        else:
            code = "CANCELLED"  # whatever else would be a fault is a ServiceError by now
        self._service.observer.call_ended(self._method, code, time.perf_counter() - self._start)


def deadline_after(timeout: float | None) -> float | None:
    """When a caller's time is over, on the event loop's clock."""
    return None if timeout is None else asyncio.get_running_loop().time() + timeout


class named_errors:  # read as a word in `with`
    """Turns whatever went wrong in a `with` into the ServiceError that the caller may see."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, ServiceError):
            return
        if isinstance(error, QueueClosed):
            raise NotServing("the server is about to stop") from error
        if isinstance(error, DeadlineExpired):
            raise DeadlineExceeded(str(error)) from error
        # The callers of a failed batch share its exception, and so one incident and one traceback.
        incident_id: str | None = getattr(error, "incident_id", None)
        if incident_id is None:
            incident_id = uuid.uuid4().hex[:12]
            error.incident_id = incident_id  # type: ignore[attr-defined]
            logger.error("incident %s", incident_id, exc_info=error)
        raise Internal(incident_id) from error
