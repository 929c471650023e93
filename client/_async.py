"""The asynchronous client: `Client`, awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
import numpy as np
import numpy.typing as npt

from client import _core
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
        self.timeout = timeout
        self._open_channel: grpc.aio.Channel | None = None
        self._open_stub: DigitClassifierAsyncStub | None = None
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
        if self._open_channel is not None:
            await self._open_channel.close()

    async def classify(self, image: Image, *, timeout: float | None = None) -> Prediction:
        """See `Client.classify`. Files are prepared in a thread."""
        request = _core.build_request(await _prepare(image))
        with self._call(timeout) as seconds:
            response = await self._stub.Classify(request, timeout=seconds)
        return _core.parse_response(response)[0]

    async def classify_batch(self, images: Iterable[Image], *, timeout: float | None = None) -> list[Prediction]:
        """See `Client.classify_batch`. Images are prepared in a thread."""
        predictions: list[Prediction] = []
        calls: list[grpc.aio.UnaryUnaryCall[pb.ClassifyRequest, pb.ClassifyResponse]] = []
        requests = _core.build_requests(images)
        with self._call(timeout) as seconds:
            try:
                while (request := await asyncio.to_thread(next, requests, None)) is not None:
                    calls.append(self._stub.Classify(request, timeout=seconds))
                    if len(calls) == _core.CHUNKS_IN_FLIGHT:
                        predictions += _core.parse_response(await calls.pop(0))
                while calls:
                    predictions += _core.parse_response(await calls.pop(0))
            finally:
                for call in calls:
                    call.cancel()
        return predictions

    async def stream_classify(
        self,
        frames: Iterable[Image] | AsyncIterable[Image],
        *,
        timeout: float | None = None,
        window: int = _core.STREAM_WINDOW,
    ) -> AsyncIterator[Prediction | MnistGrpcError]:
        """See `Client.stream_classify`. `frames` may also be an async iterable."""
        self._check_open()
        stream = _AsyncStream(self.target, self.timeout if timeout is None else timeout, window)
        async for result in stream.run(self._stub, frames):
            yield result

    async def get_model(self, *, timeout: float | None = None) -> Model:
        """See `Client.get_model`."""
        with self._call(timeout) as seconds:
            return _core.parse_model(await self._stub.GetModel(pb.GetModelRequest(), timeout=seconds))

    async def wait_ready(self, timeout: float = _core.DEFAULT_READY_TIMEOUT) -> None:
        """See `Client.wait_ready`."""
        self._check_open()
        watch = self._channel.unary_stream(_core.HEALTH_WATCH, request_serializer=bytes, response_deserializer=bytes)
        deadline = time.monotonic() + timeout
        while (remaining := deadline - time.monotonic()) > 0:
            call = watch(_core.health_request(), timeout=remaining, wait_for_ready=True)
            try:
                async for status in call:
                    if _core.is_serving(status):
                        return
            except grpc.RpcError as error:
                if error.code() not in _core.WORTH_WAITING:
                    raise _core.error_of_call(error, self.target, timeout) from error
                await asyncio.sleep(_core.READY_PAUSE)
            finally:
                call.cancel()
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

    @contextmanager
    def _call(self, timeout: float | None) -> Iterator[float]:
        self._check_open()
        seconds = self.timeout if timeout is None else timeout
        with _core.translate_errors(self.target, seconds):
            yield seconds

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(_core.CLOSED)


class _AsyncStream:
    """One `stream_classify`, between tasks that feed, send and receive, and the caller, who takes results."""

    def __init__(self, target: str, timeout: float, window: int) -> None:
        self._target = target
        self._timeout = timeout
        self._room = asyncio.Semaphore(window)
        self._ledger = _core.FrameLedger(target)
        self._results: asyncio.Queue[_core.StreamResult | _core.StreamEnd] = asyncio.Queue()
        self._source_error: Exception | None = None
        self._all_fed = False
        self._changed = asyncio.Event()

    async def run(
        self, stub: DigitClassifierAsyncStub, frames: Iterable[Image] | AsyncIterable[Image]
    ) -> AsyncIterator[_core.StreamResult]:
        call = stub.StreamClassify()
        tasks = [asyncio.create_task(step) for step in (self._feed(frames), self._send(call), self._receive(call))]
        try:
            while not isinstance(result := await self._take(), _core.StreamEnd):
                self._room.release()
                yield result
            if result.error is not None:
                raise result.error
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(self, frames: Iterable[Image] | AsyncIterable[Image]) -> None:
        try:
            async for frame in _as_async(frames):
                await self._room.acquire()
                try:
                    pixels = await _prepare(frame)
                except MnistGrpcError as error:
                    self._put(self._ledger.fail(error))
                    continue
                self._ledger.add(pixels)
                self._changed.set()
        except Exception as error:  # the caller's own; raised where the caller sees it
            self._source_error = error
        finally:
            self._all_fed = True
            self._changed.set()

    async def _send(self, call: grpc.aio.StreamStreamCall[pb.StreamClassifyRequest, pb.StreamClassifyResponse]) -> None:
        try:
            while True:
                if (message := self._ledger.next_message()) is not None:
                    await call.write(message)
                elif self._all_fed:
                    break
                else:
                    self._changed.clear()
                    await self._changed.wait()
            await call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the call has ended; the receiver tells why

    async def _receive(
        self, call: grpc.aio.StreamStreamCall[pb.StreamClassifyRequest, pb.StreamClassifyResponse]
    ) -> None:
        try:
            async for response in call:
                self._put(self._ledger.receive(response))
            self._results.put_nowait(_core.StreamEnd(self._source_error))
        except grpc.RpcError as error:
            self._results.put_nowait(_core.StreamEnd(_core.error_of_call(error, self._target, self._timeout)))
        except Exception as error:
            self._results.put_nowait(_core.StreamEnd(error))

    def _put(self, results: list[_core.StreamResult]) -> None:
        for result in results:
            self._results.put_nowait(result)

    async def _take(self) -> _core.StreamResult | _core.StreamEnd:
        """The next result; raise if it is owed for too long."""
        wait = self._timeout
        while True:
            try:
                async with asyncio.timeout(wait):
                    return await self._results.get()
            except TimeoutError:
                wait = self._ledger.seconds_left(self._timeout)
                if wait <= 0:
                    raise _core.stream_timed_out(self._target, self._timeout) from None


async def _prepare(image: Image) -> npt.NDArray[np.uint8]:
    return _core.prepare(image) if _core.is_quick(image) else await asyncio.to_thread(_core.prepare, image)


async def _as_async(frames: Iterable[Image] | AsyncIterable[Image]) -> AsyncIterator[Image]:
    if isinstance(frames, AsyncIterable):
        async for frame in frames:
            yield frame
    else:
        for frame in frames:
            yield frame
