"""The synchronous client."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import grpc

from client import _core
from client._errors import MnistGrpcError
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
        self.timeout = timeout
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
        return _core.parse_response(response)[0]

    def classify_batch(self, images: Iterable[Image], *, timeout: float | None = None) -> list[Prediction]:
        """Read the digits in any number of images; return the answers in their order.

        All are answered, or the first error is raised; that of a bad image
        tells its `index`.

        Args:
            images: anything to iterate over, also an array `uint8[n, h, w]`.
            timeout: seconds for each message of up to 1,024 images.
        """
        predictions: list[Prediction] = []
        calls: deque[grpc.Future[pb.ClassifyResponse]] = deque()
        with self._call(timeout) as seconds:
            try:
                for request in _core.build_requests(images):
                    calls.append(self._stub.Classify.future(request, timeout=seconds))
                    if len(calls) == _core.CHUNKS_IN_FLIGHT:
                        predictions += _core.parse_response(calls.popleft().result())
                while calls:
                    predictions += _core.parse_response(calls.popleft().result())
            finally:
                for call in calls:
                    call.cancel()
        return predictions

    def stream_classify(
        self, frames: Iterable[Image], *, timeout: float | None = None, window: int = _core.STREAM_WINDOW
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
        """
        self._check_open()
        return _SyncStream(self.target, self.timeout if timeout is None else timeout, window).run(self._stub, frames)

    def get_model(self, *, timeout: float | None = None) -> Model:
        """Tell what the server serves."""
        with self._call(timeout) as seconds:
            return _core.parse_model(self._stub.GetModel(pb.GetModelRequest(), timeout=seconds))

    def wait_ready(self, timeout: float = _core.DEFAULT_READY_TIMEOUT) -> None:
        """Wait until the server serves.

        Raises:
            UnavailableError: it does not within `timeout` seconds.
        """
        self._check_open()
        watch = self._channel.unary_stream(_core.HEALTH_WATCH, request_serializer=bytes, response_deserializer=bytes)
        deadline = time.monotonic() + timeout
        while (remaining := deadline - time.monotonic()) > 0:
            call = watch(_core.health_request(), timeout=remaining, wait_for_ready=True)
            try:
                for status in call:
                    if _core.is_serving(status):
                        return
            except grpc.RpcError as error:
                if error.code() not in _core.WORTH_WAITING:
                    raise _core.error_of_call(error, self.target, timeout) from error
                time.sleep(_core.READY_PAUSE)
            finally:
                call.cancel()
        raise _core.not_ready(self.target, timeout)

    def is_serving(self, *, timeout: float | None = None) -> bool:
        """Whether the server answers that it serves; False while it loads or drains."""
        check = self._channel.unary_unary(_core.HEALTH_CHECK, request_serializer=bytes, response_deserializer=bytes)
        with self._call(timeout) as seconds:
            return _core.is_serving(check(_core.health_request(), timeout=seconds))

    @contextmanager
    def _call(self, timeout: float | None) -> Iterator[float]:
        self._check_open()
        seconds = self.timeout if timeout is None else timeout
        with _core.translate_errors(self.target, seconds):
            yield seconds

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(_core.CLOSED)


class _SyncStream:
    """One `stream_classify`, between four threads.

    One of ours prepares frames (`_feed`), gRPC's sends what waits
    (`_messages`), another of ours receives answers (`_receive`), and the
    caller's takes results from a queue (`run`). The ledger, under the lock of
    `_changed`, keeps the results in the order of the frames.
    """

    def __init__(self, target: str, timeout: float, window: int) -> None:
        self._target = target
        self._timeout = timeout
        self._room = threading.Semaphore(window)
        self._changed = threading.Condition()
        self._ledger = _core.FrameLedger(target)
        self._results: queue.SimpleQueue[_core.StreamResult | _core.StreamEnd] = queue.SimpleQueue()
        self._source_error: Exception | None = None
        self._all_fed = False
        self._left = False

    def run(self, stub: DigitClassifierStub, frames: Iterable[Image]) -> Iterator[_core.StreamResult]:
        call = stub.StreamClassify(self._messages())
        threading.Thread(target=self._feed, args=(frames,), name="stream-feed", daemon=True).start()
        receiver = threading.Thread(target=self._receive, args=(call,), name="stream-receive", daemon=True)
        receiver.start()
        try:
            while not isinstance(result := self._take(), _core.StreamEnd):
                self._room.release()
                yield result
            if result.error is not None:
                raise result.error
        finally:
            with self._changed:
                self._left = True
                self._changed.notify_all()
            self._room.release()
            call.cancel()
            receiver.join()  # but not the feeder, which may be inside the caller's iterable

    def _feed(self, frames: Iterable[Image]) -> None:
        try:
            for frame in frames:
                self._room.acquire()
                if self._left:
                    return
                try:
                    pixels = _core.prepare(frame)
                except MnistGrpcError as error:
                    with self._changed:
                        self._put(self._ledger.fail(error))
                    continue
                with self._changed:
                    self._ledger.add(pixels)
                    self._changed.notify_all()
        except Exception as error:  # the caller's own; raised where the caller sees it
            self._source_error = error
        finally:
            with self._changed:
                self._all_fed = True
                self._changed.notify_all()

    def _messages(self) -> Iterator[pb.StreamClassifyRequest]:
        while True:
            with self._changed:
                while (message := self._ledger.next_message()) is None:
                    if self._all_fed or self._left:
                        return
                    self._changed.wait()
            yield message

    def _receive(self, call: Iterator[pb.StreamClassifyResponse]) -> None:
        try:
            for response in call:
                with self._changed:
                    self._put(self._ledger.receive(response))
            self._results.put(_core.StreamEnd(self._source_error))
        except grpc.RpcError as error:
            self._results.put(_core.StreamEnd(_core.error_of_call(error, self._target, self._timeout)))
        except Exception as error:
            self._results.put(_core.StreamEnd(error))

    def _put(self, results: list[_core.StreamResult]) -> None:
        for result in results:
            self._results.put(result)

    def _take(self) -> _core.StreamResult | _core.StreamEnd:
        """The next result; raise if it is owed for too long."""
        wait = self._timeout
        while True:
            try:
                return self._results.get(timeout=wait)
            except queue.Empty:
                with self._changed:
                    wait = self._ledger.seconds_left(self._timeout)
                if wait <= 0:
                    raise _core.stream_timed_out(self._target, self._timeout) from None
