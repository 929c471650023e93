"""The synchronous client."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import grpc

from client import _core
from client._errors import MnistGrpcError
from client._sync_stream import SyncStream
from client._types import Image, Model, Prediction
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierStub


class Client:
    """A connection to a digit server.

    May be shared between threads. A context manager; otherwise call `close`.
    The connection is made by the first call, and made again when it is lost.

    Args:
        target: `host:port`, or any gRPC target such as `dns:///digits:50051` or
            `unix:/run/digits.sock`; else the environment variable
            `MNIST_GRPC_TARGET`, else `localhost:50051`.
        timeout: seconds that a call may take unless it says otherwise.

    Every call raises a subclass of `MnistGrpcError`: `InvalidImageError`,
    `DeadlineExceededError`, `OverloadedError`, `UnavailableError`,
    `UnauthenticatedError` or `ServerError`. Calls that meet an overloaded or
    unavailable server are retried a few times within their timeout.
    """

    def __init__(self, target: str | None = None, *, timeout: float = _core.DEFAULT_TIMEOUT) -> None:
        self.target = _core.resolve_target(target)
        self.timeout = _core.checked_timeout(timeout)
        self._channel = grpc.insecure_channel(self.target, options=_core.channel_options(self.target))
        self._stub = DigitClassifierStub(self._channel)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that are under way fail. May be called again."""
        self._closed = True
        self._channel.close()

    def classify(self, image: Image, *, timeout: float | None = None) -> Prediction:
        """Read the digit in one image.

        Args:
            image: see `client.Image`.
            timeout: seconds for this call; else the client's.
        """
        request = _core.build_request(_core.prepare(image))
        with self._call(timeout) as seconds:
            response = self._stub.Classify(request, timeout=seconds)
        return _core.parse_response(response, 1, self.target)[0]

    def classify_batch(self, images: Iterable[Image], *, timeout: float | None = None) -> list[Prediction]:
        """Read the digits in any number of images; return the answers in their order.

        All are answered, or the first error is raised; that of a bad image
        tells its `index`.

        Args:
            images: anything to iterate over, also an array `uint8[n, h, w]`.
            timeout: seconds for each message of up to 1,024 images.
        """
        predictions: list[Prediction] = []
        calls: deque[tuple[int, grpc.Future[pb.ClassifyResponse]]] = deque()

        def take_answer() -> None:
            count, call = calls.popleft()
            predictions.extend(_core.parse_response(call.result(), count, self.target))

        with self._call(timeout) as seconds:
            try:
                for request in _core.build_requests(images):
                    calls.append((_core.count_images(request), self._stub.Classify.future(request, timeout=seconds)))
                    if len(calls) == _core.CHUNKS_IN_FLIGHT:
                        take_answer()
                while calls:
                    take_answer()
            finally:
                for _, call in calls:
                    call.cancel()
        return predictions

    def stream_classify(
        self,
        frames: Iterable[Image],
        *,
        timeout: float | None = None,
        window: int = _core.STREAM_WINDOW,
        latest_only: bool = False,
    ) -> Iterator[Prediction | MnistGrpcError]:
        """Read the digits in a sequence of frames while it goes on.

        Yields one result a frame, in order: a `Prediction`, or, in the place of
        a frame that could not be read, the error (not raised: the stream goes
        on). What ends the whole stream is raised. Leaving the loop ends the
        call.

        Args:
            frames: iterated in a thread of the client's, up to `window` frames
                ahead of the results that were taken.
            timeout: seconds without an answer while one is owed; else the
                client's.
            window: the most frames whose results were not yet taken.
            latest_only: for live video: a frame that waits for its turn when a
                newer one comes is not read; its result is an `OvertakenError`.
        """
        seconds = self._seconds(timeout)
        stream = SyncStream(self.target, seconds, _core.checked_window(window), latest_only, lambda: self._closed)
        return stream.run(self._stub, frames)

    def get_model(self, *, timeout: float | None = None) -> Model:
        """Tell what the server serves."""
        with self._call(timeout) as seconds:
            return _core.parse_model(self._stub.GetModel(pb.GetModelRequest(), timeout=seconds))

    def wait_ready(self, timeout: float = _core.DEFAULT_READY_TIMEOUT) -> None:
        """Wait until the server serves.

        Raises:
            UnavailableError: it does not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._call(timeout):
            watch = self._channel.unary_stream(
                _core.HEALTH_WATCH, request_serializer=bytes, response_deserializer=bytes
            )
            while (remaining := deadline - time.monotonic()) > 0:
                call: Any = watch(_core.health_request(), timeout=remaining, wait_for_ready=True)
                try:
                    for status in call:
                        if _core.is_serving(status):
                            return
                except grpc.RpcError as error:
                    if error.code() not in _core.WORTH_WAITING:
                        raise
                finally:
                    # A channel that others instrumented may give a generator in place of a call.
                    (call.cancel if hasattr(call, "cancel") else call.close)()
                time.sleep(_core.READY_PAUSE)
        raise _core.not_ready(self.target, timeout)

    def is_serving(self, *, timeout: float | None = None) -> bool:
        """Whether the server answers that it serves; False while it loads or drains."""
        check = self._channel.unary_unary(_core.HEALTH_CHECK, request_serializer=bytes, response_deserializer=bytes)
        with self._call(timeout) as seconds:
            return _core.is_serving(check(_core.health_request(), timeout=seconds))

    @contextmanager
    def _call(self, timeout: float | None) -> Iterator[float]:
        seconds = self._seconds(timeout)
        try:
            with _core.translate_errors(self.target, seconds):
                yield seconds
        except MnistGrpcError as error:
            if self._closed and error.code is not None:  # gRPC cancels the calls of a channel that is closed
                raise RuntimeError(_core.CLOSED) from error
            raise

    def _seconds(self, timeout: float | None) -> float:
        """The timeout of a call that begins now."""
        if self._closed:
            raise RuntimeError(_core.CLOSED)
        return self.timeout if timeout is None else _core.checked_timeout(timeout)
