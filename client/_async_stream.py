"""`AsyncClient.stream_classify`, between three tasks and the caller."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import grpc
import numpy as np
import numpy.typing as npt

from client import _core
from client._errors import MnistGrpcError
from client._ledger import FrameLedger, StreamEnd, StreamResult
from client._types import Image
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierAsyncStub

T = TypeVar("T")
Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.StreamClassifyRequest, pb.StreamClassifyResponse]"

_NO_MORE: Any = object()


class AsyncStream:
    """One stream: a task prepares frames, one sends what waits, one receives answers."""

    def __init__(self, target: str, timeout: float, window: int, latest_only: bool) -> None:
        self._target = target
        self._timeout = timeout
        self._room = asyncio.Semaphore(window)
        self._changed = asyncio.Event()
        self._ledger = FrameLedger(target, timeout, latest_only)
        self._results: asyncio.Queue[StreamResult | StreamEnd] = asyncio.Queue()
        self._source_error: BaseException | None = None
        self._status: grpc.RpcError | None = None

    async def run(
        self, open_stub: Callable[[], DigitClassifierAsyncStub], frames: Iterable[Image] | AsyncIterable[Image]
    ) -> AsyncIterator[StreamResult]:
        call = open_stub().StreamClassify()
        call.add_done_callback(self._note_status)
        tasks = [asyncio.create_task(step) for step in (self._feed(frames), self._send(call), self._receive(call))]
        try:
            while not isinstance(result := await self._take(), StreamEnd):
                self._room.release()
                yield result
            if error := self._source_error or result.error:
                raise error
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def abandon(self, error: Exception) -> None:
        """End the stream with an error."""
        self._results.put_nowait(StreamEnd(error))

    async def _feed(self, frames: Iterable[Image] | AsyncIterable[Image]) -> None:
        try:
            source = _as_async(frames)
            while await self._room.acquire():
                if (frame := await anext(source, _NO_MORE)) is _NO_MORE:
                    break
                try:
                    pixels = await prepare(frame)
                except MnistGrpcError as error:
                    self._put(self._ledger.fail(error))
                    continue
                self._ledger.add(pixels)
                self._changed.set()
        except BaseException as error:  # the caller's own; raised where the caller sees it
            self._source_error = error
        self._ledger.complete()
        self._changed.set()

    async def _send(self, call: Call) -> None:
        try:
            while True:
                if (message := self._ledger.next_message()) is not None:
                    await call.write(message)
                elif self._ledger.is_complete:
                    break
                else:
                    self._changed.clear()
                    await self._changed.wait()
            await call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the call has ended; the receiver tells why

    async def _receive(self, call: Call) -> None:
        try:
            async for response in call:
                self._put(self._ledger.receive(response))
            self._results.put_nowait(self._ledger.end())
        except grpc.RpcError as error:
            self.abandon(_core.error_of_call(self._status or error, self._target, self._timeout))
        except Exception as error:
            self.abandon(error)

    def _note_status(self, call: Any) -> None:
        """Keep the first status: a write that fails after it would put INTERNAL in its place (grpc#36066)."""
        if self._status is None:
            self._status = grpc.aio.AioRpcError(
                _result(call.code()),
                grpc.aio.Metadata(),
                _result(call.trailing_metadata()),
                details=_result(call.details()),
            )

    def _put(self, results: list[StreamResult]) -> None:
        for result in results:
            self._results.put_nowait(result)

    async def _take(self) -> StreamResult | StreamEnd:
        """The next result, or the end, also if the server does not come to it."""
        wait = self._timeout
        while True:
            try:
                async with asyncio.timeout(wait):
                    return await self._results.get()
            except TimeoutError:
                wait = self._ledger.seconds_left()
                if wait <= 0:
                    return self._ledger.overdue()


def _result(finished: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that has nothing to wait for."""
    try:
        finished.send(None)
    except StopIteration as stop:
        return cast(T, stop.value)
    raise RuntimeError("the call has not ended")


async def prepare(image: Image) -> npt.NDArray[np.uint8]:
    """As `_core.prepare`, in a thread where it takes long."""
    return _core.prepare(image) if _core.is_quick(image) else await asyncio.to_thread(_core.prepare, image)


def _as_async(frames: Iterable[Image] | AsyncIterable[Image]) -> AsyncIterator[Image]:
    if isinstance(frames, AsyncIterable):
        return aiter(frames)
    if isinstance(frames, (list, tuple, np.ndarray)):
        return _from_sequence(frames)
    return _from_thread(frames)


async def _from_sequence(frames: Iterable[Image]) -> AsyncIterator[Image]:
    for frame in frames:
        yield frame


async def _from_thread(frames: Iterable[Image]) -> AsyncIterator[Image]:
    """Iterate in a thread of its own: a frame, of a camera for example, may be long in coming, or never come."""
    loop = asyncio.get_running_loop()
    wanted = threading.Semaphore(0)
    left = False
    taken: asyncio.Queue[Any] = asyncio.Queue()

    def give(frame: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits
            loop.call_soon_threadsafe(taken.put_nowait, frame)

    def iterate() -> None:
        try:
            source = iter(frames)
            while wanted.acquire() and not left:
                give(next(source, _NO_MORE))
        except BaseException as error:  # the caller's own; raised below
            give(_Raised(error))

    threading.Thread(target=iterate, name="stream-source", daemon=True).start()
    try:
        while True:
            wanted.release()
            frame = await taken.get()
            if frame is _NO_MORE:
                return
            if isinstance(frame, _Raised):
                raise frame.error
            yield frame
    finally:
        left = True
        wanted.release()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
