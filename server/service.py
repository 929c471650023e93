"""What the methods of DigitClassifier do, without a word of any transport.

Plain async code over messages: validate, submit, wait under a deadline and a
cancellation, build the answer, name the error. A transport is a thin skin that
passes messages in and turns `ServiceError` into its own kind of status.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from digits.preprocessing import InvalidImage
from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.answers import build_response
from server.batching import Answer, DeadlineExpired, DynamicBatcher, QueueClosed, QueueFull
from server.errors import DeadlineExceeded, Internal, InvalidArgument, NotServing, Overloaded, ServiceError
from server.inputs import Inputs, Rows, collect, count_bytes, count_images, decode, read_buffer
from server.settings import Settings
from server.stream import FrameStream, Read, Write, build_blocks, error_block
from server.version import server_version

if TYPE_CHECKING:  # torch is imported by whoever loads the model, when the port is already open
    from digits.checkpoint import Checkpoint
    from server.inference import Classifier, Scores

logger = logging.getLogger(__name__)

MODEL_NAME = "mnist"
RETRY_AFTER_SECONDS = 0.05
"""What a caller is told to wait that a full queue refused: a default one is worked off in about that time."""

MAX_DECODING_BYTES = 64 * 1024 * 1024
"""Of image files that wait to be decoded; more are refused."""

DECODING_RETRY_SECONDS = 1.0
"""What a caller is told to wait that was refused for that."""

INLINE_SIZE = 32
"""Batches of up to this many images run on the event loop (docs/design.md has the figures)."""


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
        self._decoding_bytes = 0  # of the requests that wait for the decoder or are in it
        self._streams: set[FrameStream] = set()
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
        with named_errors():
            inputs = await self._read(request, deadline)
            if inputs.errors:
                raise inputs.errors[min(inputs.errors)]
            return build_response(await self._submit(inputs.rows, deadline), request.include_logits)

    async def stream_classify(self, read: Read, write: Write, timeout: float | None = None) -> None:
        """Answer frames in order until `read` returns None; see `FrameStream`."""
        self._model()
        if self._draining:
            raise NotServing("the server is about to stop")
        deadline = _deadline(timeout)
        stream = FrameStream(lambda request: self._answer_frames(request, deadline), self._settings.stream_window)
        self._streams.add(stream)
        try:
            with named_errors():
                await stream.run(read, write)
        finally:
            self._streams.discard(stream)

    def get_model(self) -> pb.GetModelResponse:
        """Describe the model."""
        with named_errors():
            return self._describe(self._model().checkpoint)

    async def _answer_frames(self, request: pb.StreamClassifyRequest, deadline: float | None) -> list[pb.FrameBlock]:
        """Answer the frames of one stream message; a frame's error stands in its place."""
        first, frames = request.first_sequence, request.frames
        try:
            with named_errors():
                if first + count_images(frames) > 1 << 64:
                    raise InvalidArgument("first_sequence", f"frames have numbers below 2^64, these begin at {first}")
                inputs = await self._read(frames, deadline)
                answers = await self._submit(inputs.rows, deadline) if len(inputs.rows) else []
                return build_blocks(first, inputs, answers, frames.include_logits)
        except ServiceError as error:
            return [error_block(first, count_images(frames), error)]

    # Steps --------------------------------------------------------------------

    def _model(self) -> Classifier:
        if self._classifier is None:
            raise NotServing("the model is not loaded yet")
        return self._classifier

    def _run_batch(self, blocks: list[Rows]) -> list[Scores]:
        return self._model().run_batch(blocks)

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
            test_accuracy=manifest.test_accuracy,
            dataset=manifest.dataset,
            server_version=server_version(),
            max_batch_size=self._settings.max_batch_size,
            max_message_bytes=self._settings.max_message_bytes,
        )

    async def _read(self, request: pb.ClassifyRequest, deadline: float | None) -> Inputs:
        self._model()
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


def _deadline(timeout: float | None) -> float | None:
    """When a caller's time is over, on the event loop's clock."""
    return None if timeout is None else asyncio.get_running_loop().time() + timeout


@contextmanager
def named_errors() -> Iterator[None]:
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
