"""The asynchronous client: `Client`, awaited."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc

from client import _core
from client._async_stream import AsyncStream, prepare
from client._errors import MnistGrpcError
from client._types import Image, Model, Prediction
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierStub

if TYPE_CHECKING:  # one class at run time, two for the types
    from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierAsyncStub


class AsyncClient:
    """A connection to a digit server, for asyncio.

    Belongs to one event loop, that of its first call, and may be shared between
    the tasks of it. An async context manager; otherwise await `close`.
    Arguments, methods and errors are those of `Client`.
    """

    def __init__(self, target: str | None = None, *, timeout: float = _core.DEFAULT_TIMEOUT) -> None:
        self.target = _core.resolve_target(target)
        self.timeout = _core.checked_timeout(timeout)
        self._open_channel: grpc.aio.Channel | None = None
        self._open_stub: DigitClassifierAsyncStub | None = None
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """See `Client.close`."""
        self._closed = True
        for stream in self._streams:
            stream.abandon(RuntimeError(_core.CLOSED))
        if self._open_channel is not None:
            await self._open_channel.close()

    async def classify(self, image: Image, *, timeout: float | None = None) -> Prediction:
        """See `Client.classify`. Files are prepared in a thread."""
        request = _core.build_request(await prepare(image))
        with self._call(timeout) as seconds:
            response = await self._stub.Classify(request, timeout=seconds)
        return _core.parse_response(response, 1, self.target)[0]

    async def classify_batch(self, images: Iterable[Image], *, timeout: float | None = None) -> list[Prediction]:
        """See `Client.classify_batch`. Images are prepared in a thread."""
        predictions: list[Prediction] = []
        calls: deque[tuple[int, grpc.aio.UnaryUnaryCall[pb.ClassifyRequest, pb.ClassifyResponse]]] = deque()
        requests = _core.build_requests(images)

        async def take_answer() -> None:
            count, call = calls.popleft()
            predictions.extend(_core.parse_response(await call, count, self.target))

        with self._call(timeout) as seconds:
            try:
                while (request := await asyncio.to_thread(next, requests, None)) is not None:
                    calls.append((_core.count_images(request), self._stub.Classify(request, timeout=seconds)))
                    if len(calls) == _core.CHUNKS_IN_FLIGHT:
                        await take_answer()
                while calls:
                    await take_answer()
            finally:
                for _, call in calls:
                    call.cancel()
        return predictions

    def stream_classify(
        self,
        frames: Iterable[Image] | AsyncIterable[Image],
        *,
        timeout: float | None = None,
        window: int = _core.STREAM_WINDOW,
        latest_only: bool = False,
    ) -> AsyncIterator[Prediction | MnistGrpcError]:
        """See `Client.stream_classify`. `frames` may also be an async iterable."""
        seconds = self._seconds(timeout)
        stream = AsyncStream(self.target, seconds, _core.checked_window(window), latest_only)
        self._streams.add(stream)
        return stream.run(self._checked_stub, frames)

    async def get_model(self, *, timeout: float | None = None) -> Model:
        """See `Client.get_model`."""
        with self._call(timeout) as seconds:
            return _core.parse_model(await self._stub.GetModel(pb.GetModelRequest(), timeout=seconds))

    async def wait_ready(self, timeout: float = _core.DEFAULT_READY_TIMEOUT) -> None:
        """See `Client.wait_ready`."""
        deadline = time.monotonic() + timeout
        with self._call(timeout):
            watch = self._channel.unary_stream(
                _core.HEALTH_WATCH, request_serializer=bytes, response_deserializer=bytes
            )
            while (remaining := deadline - time.monotonic()) > 0:
                call = watch(_core.health_request(), timeout=remaining, wait_for_ready=True)
                try:
                    async for status in call:
                        if _core.is_serving(status):
                            return
                except grpc.RpcError as error:
                    if error.code() not in _core.WORTH_WAITING:
                        raise
                finally:
                    call.cancel()
                await asyncio.sleep(_core.READY_PAUSE)
        raise _core.not_ready(self.target, timeout)

    async def is_serving(self, *, timeout: float | None = None) -> bool:
        """See `Client.is_serving`."""
        with self._call(timeout) as seconds:
            check = self._channel.unary_unary(_core.HEALTH_CHECK, request_serializer=bytes, response_deserializer=bytes)
            return _core.is_serving(await check(_core.health_request(), timeout=seconds))

    @property
    def _channel(self) -> grpc.aio.Channel:
        """Opened by the first call, because it belongs to the event loop that opens it."""
        if self._open_channel is None:
            self._open_channel = grpc.aio.insecure_channel(self.target, options=_core.channel_options(self.target))
        return self._open_channel

    @property
    def _stub(self) -> DigitClassifierAsyncStub:
        if self._open_stub is None:
            stub: Any = DigitClassifierStub(self._channel)
            self._open_stub = stub
        return self._open_stub

    def _checked_stub(self) -> DigitClassifierAsyncStub:
        self._seconds(None)
        return self._stub

    @contextmanager
    def _call(self, timeout: float | None) -> Iterator[float]:
        seconds = self._seconds(timeout)
        try:
            with _core.translate_errors(self.target, seconds):
                yield seconds
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                # grpc.aio cancels the calls of a channel that is closed; nobody cancelled this task.
                raise RuntimeError(_core.CLOSED) from None
            raise

    def _seconds(self, timeout: float | None) -> float:
        """The timeout of a call that begins now."""
        if self._closed:
            raise RuntimeError(_core.CLOSED)
        return self.timeout if timeout is None else _core.checked_timeout(timeout)
