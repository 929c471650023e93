"""The asynchronous client: `Client`, awaited."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import grpc
import PIL.Image

from client import _core, _explain, _fork, _request_id
from client._async_batch import exchange
from client._async_gather import AsyncGather
from client._async_stream import AsyncStream, prepare
from client._batch import MESSAGES_IN_FLIGHT, Chunks, _as_array, progress_bar
from client._channel import TLS, ChannelSettings, channel_settings, checked_interceptors
from client._connection import Connection
from client._errors import MnistGrpcError
from client._routing import AsyncRouter
from client._types import Image, Model, Prediction
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierStub

if TYPE_CHECKING:  # one class at run time, two for the types
    from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierAsyncStub
_INTERCEPTORS = (
    grpc.aio.UnaryUnaryClientInterceptor,
    grpc.aio.UnaryStreamClientInterceptor,
    grpc.aio.StreamUnaryClientInterceptor,
    grpc.aio.StreamStreamClientInterceptor,
)
_OTHER_LOOP = (
    "an AsyncClient belongs to the event loop of its first call, and this is another; "
    "make one in each event loop, for example inside the function that asyncio.run gets"
)


class AsyncClient(Connection):
    """A connection to a digit server, for asyncio.

    Belongs to one event loop, that of its first call, and may be shared between
    the tasks of it; another loop gets a RuntimeError. So does a process that is
    forked after its first call: fork before, or make it by "spawn". An async
    context manager; otherwise await `close`. Arguments, methods and
    errors are those of `Client`.

        >>> import asyncio
        >>> async def read(paths):
        ...     async with client.AsyncClient("localhost:50051") as digits:
        ...         return await asyncio.gather(*(digits.classify(path) for path in paths))
        >>> [prediction.digit for prediction in asyncio.run(read(["3.png", "7.png"]))]
        [3, 7]
    """

    _opened: _Open | None

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
        *,
        timeout: float = _core.DEFAULT_TIMEOUT,
        tls: bool | TLS = False,
        token: str | Callable[[], str] | None = None,
        metadata: Mapping[str, str] | None = None,
        interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
        connections: int = 1,
        wait_for_ready: bool = False,
        coalesce: bool = True,
    ) -> None:
        settings = channel_settings(
            target,
            tls=tls,
            token=token,
            metadata=metadata,
            interceptors=checked_interceptors(interceptors, _INTERCEPTORS, "AsyncClient"),
            connections=connections,
            wait_for_ready=wait_for_ready,
        )
        super().__init__(settings, timeout)
        self._coalesce = coalesce
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()

    async def __aenter__(self) -> Self:
        self._enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """See `Client.close`."""
        opened = self._opened
        gone = opened is None or opened.loop.is_closed()  # with its connections
        if opened is not None and not gone and opened.loop is not asyncio.get_running_loop():
            raise RuntimeError(_OTHER_LOOP)
        self._closed = True
        for stream in self._streams:
            stream.abandon(RuntimeError(_core.CLOSED))
        if opened is not None and not gone:
            await opened.gather.close()
            await opened.router.close()

    @property
    def _stub(self) -> DigitClassifierAsyncStub:
        """What calls are made with, each over one of the connections; opened by the first."""
        return self._open().stub

    def _open(self) -> _Open:
        self._enter()
        loop = asyncio.get_running_loop()
        if self._opened is None:
            _fork.check(asyncio=True)
            self._opened = _Open(self._settings, loop)
        elif self._opened.loop is not loop:
            raise RuntimeError(_OTHER_LOOP)
        return self._opened

    def _after_fork(self) -> None:
        super()._after_fork()
        self._streams = weakref.WeakSet()

    async def classify(self, image: Image, *, timeout: float | None = None) -> Prediction:
        """See `Client.classify`. Files are prepared in a thread."""
        return await self._classify_pixels(_core.quick_bytes(image) or (await prepare(image)).tobytes(), timeout)

    async def explain(self, image: Image, *, timeout: float | None = None) -> PIL.Image.Image:
        """See `Client.explain`. Images are prepared, and the picture is drawn, in a thread."""
        stages = await asyncio.to_thread(_core.stages_of, image)
        prediction = await self._classify_pixels(stages.pixels.tobytes(), timeout)
        return await asyncio.to_thread(_explain.draw, stages, prediction)

    async def _classify_pixels(self, pixels: bytes, timeout: float | None) -> Prediction:
        gather = self._gather()
        if gather is not None and not gather.begin_alone():
            return await gather.join(pixels, self._seconds(timeout))
        try:
            with self._call(timeout) as seconds:
                response = await self._stub.Classify(pb.ClassifyRequest(pixels=pixels), timeout=seconds)
        finally:
            if gather is not None:
                gather.end_alone()
        return _core.parse_response(response, 1, self.target)[0]

    def _gather(self) -> AsyncGather | None:
        """See `Client._gather`."""
        return self._open().gather if self._coalesce and _request_id.given() is None else None

    async def classify_batch(
        self, images: Iterable[Image] | AsyncIterable[Image], *, timeout: float | None = None, progress: bool = False
    ) -> list[Prediction]:
        """See `Client.classify_batch`. Images are prepared in threads; they may also be an async iterable."""
        return [prediction async for chunk in self._exchange(images, timeout, progress) for prediction in chunk]

    def classify_iter(
        self, images: Iterable[Image] | AsyncIterable[Image], *, timeout: float | None = None, progress: bool = False
    ) -> AsyncGenerator[Prediction, None]:
        """See `Client.classify_iter`. Images are prepared in threads; they may also be an async iterable."""
        return _flat(self._exchange(images, timeout, progress))

    def _exchange(
        self, images: Iterable[Image] | AsyncIterable[Image], timeout: float | None, progress: bool
    ) -> AsyncGenerator[list[Prediction], None]:
        self._seconds(timeout)  # which checks it, now and not when the first answer is taken
        opened = self._open()
        most = MESSAGES_IN_FLIGHT * len(opened.router.links)
        bar = progress_bar(progress, images)
        chunks = Chunks(() if isinstance(images, AsyncIterable) else images)
        return exchange(images, chunks, opened.stub, lambda: self._call(timeout), most, self.target, bar)

    def stream_classify(
        self,
        frames: Iterable[Image] | AsyncIterable[Image],
        *,
        timeout: float | None = None,
        window: int = _core.STREAM_WINDOW,
        latest_only: bool = False,
    ) -> AsyncGenerator[Prediction | MnistGrpcError, None]:
        """See `Client.stream_classify`. `frames` may also be an async iterable."""
        seconds = self._seconds(timeout)
        _as_array(frames)  # which refuses what is one image
        stream = AsyncStream(self._checked_stub, self.target, seconds, _core.checked_window(window), latest_only)
        self._streams.add(stream)
        return stream.run(frames)

    async def get_model(self, *, timeout: float | None = None) -> Model:
        """See `Client.get_model`."""
        with self._call(timeout) as seconds:
            return _core.parse_model(await self._stub.GetModel(pb.GetModelRequest(), timeout=seconds))

    async def wait_ready(self, timeout: float = _core.DEFAULT_READY_TIMEOUT) -> None:
        """See `Client.wait_ready`."""
        with self._call(timeout) as seconds:
            router = self._open().router
            watch = router.unary_stream(_core.HEALTH_WATCH, request_serializer=bytes, response_deserializer=bytes)
            waiting = _core.Waiting(self.target, seconds, router.has_several_servers)
            while True:
                await router.wait_for_a_server(time.monotonic() + waiting.seconds_of_call())
                call = watch(_core.health_request(), timeout=waiting.seconds_of_call(), wait_for_ready=True)
                try:
                    async for status in call:
                        if _core.is_serving(status):
                            return
                except grpc.RpcError as error:
                    waiting.end_of_call(error)
                finally:
                    call.cancel()
                await asyncio.sleep(_core.READY_PAUSE)

    async def is_serving(self, *, timeout: float | None = None) -> bool:
        """See `Client.is_serving`."""
        with self._call(timeout) as seconds:
            router = self._open().router
            check = router.unary_unary(_core.HEALTH_CHECK, request_serializer=bytes, response_deserializer=bytes)
            return _core.is_serving(await check(_core.health_request(), timeout=seconds))

    def _checked_stub(self) -> DigitClassifierAsyncStub:
        return self._stub

    @contextmanager
    def _call(self, timeout: float | None) -> Iterator[float]:
        try:
            with super()._call(timeout) as seconds:
                yield seconds
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                # grpc.aio cancels the calls of a channel that is closed; nobody cancelled this task.
                raise RuntimeError(_core.CLOSED) from None
            raise


async def _flat(chunks: AsyncGenerator[list[Prediction], None]) -> AsyncGenerator[Prediction, None]:
    async with aclosing(chunks):
        async for chunk in chunks:
            for prediction in chunk:
                yield prediction


class _Open:
    """What there is once the connection was opened."""

    def __init__(self, settings: ChannelSettings, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.router = AsyncRouter(settings)
        stub: Any = DigitClassifierStub(cast(grpc.Channel, self.router))
        self.stub: DigitClassifierAsyncStub = stub
        self.gather = AsyncGather(settings.target, stub, loop, len(self.router.links))
