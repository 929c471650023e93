"""`AsyncClient.stream_classify`, between three tasks and the caller."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import grpc
import numpy as np
import numpy.typing as npt

from client import _core, _fork
from client._errors import MnistGrpcError, UnavailableError
from client._ledger import FrameLedger, StreamEnd, StreamResult
from client._types import Image
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierAsyncStub

T = TypeVar("T")
Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.StreamClassifyRequest, pb.StreamClassifyResponse]"

_NO_MORE: Any = object()
_FRAMES_A_TURN = 8  # of those that are prepared on the event loop, before others have theirs; 0.2 ms
_WRITE_FAILED = "Internal error from Core"


class AsyncStream:
    """One stream.

    A task prepares frames (`_feed`), another makes calls, one after another if
    they are lost, and receives answers (`_converse`), with a third that sends
    what waits (`_send`), and the caller's takes results (`run`). What they share
    is the ledger.
    """

    def __init__(
        self,
        open_stub: Callable[[], DigitClassifierAsyncStub],
        target: str,
        timeout: float,
        window: int,
        latest_only: bool,
    ) -> None:
        self._open_stub = open_stub
        self._target = target
        self._timeout = timeout
        self._ledger = FrameLedger(target, timeout, window, latest_only)
        self._room = asyncio.Event()  # for `_feed`
        self._frames = asyncio.Event()  # for `_send` and `_converse`
        self._results = asyncio.Event()  # for `run`

    async def run(self, frames: Iterable[Image] | AsyncIterable[Image]) -> AsyncGenerator[StreamResult, None]:
        self._process = os.getpid()
        tasks = [asyncio.create_task(step) for step in (self._feed(frames), self._converse())]
        try:
            while not isinstance(result := await self._take(), StreamEnd):
                yield result
            if result.error is not None:
                raise result.error
        finally:
            if os.getpid() == self._process:  # else they would end a call that the parent's connection carries
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def abandon(self, error: Exception) -> None:
        """End the stream with an error."""
        self._ledger.abandon(error)
        self._wake_all()

    async def _take(self) -> StreamResult | StreamEnd:
        _fork.check_process(self._process)
        while (result := self._ledger.take()) is None:
            self._results.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._ledger.seconds_left()):
                    await self._results.wait()
        if self._ledger.is_short:
            self._room.set()
        return result

    def _wake_all(self) -> None:
        for event in (self._room, self._frames, self._results):
            event.set()

    # Frames.

    async def _feed(self, frames: Iterable[Image] | AsyncIterable[Image]) -> None:
        failed: BaseException | None = None
        source: Any = None
        try:
            if not self._ledger.is_over:
                source = _as_async(frames)
                turn = 0
                while (frame := await anext(source, _NO_MORE)) is not _NO_MORE:
                    await self._prepare(frame)
                    turn = (turn + 1) % _FRAMES_A_TURN
                    if turn == 0:
                        await asyncio.sleep(0)  # nothing above has to wait, where the frames are at hand and canonical
                    if not await self._wait_for_room():
                        break
        except BaseException as error:  # the caller's own; raised where the caller sees it
            failed = error
        self._ledger.complete(failed)
        self._wake_all()
        try:
            if inspect.isasyncgen(source):
                await source.aclose()
        except Exception as error:  # of the caller's cleaning up; told as asyncio tells such
            message = "an error occurred while a source of frames was closed"
            asyncio.get_running_loop().call_exception_handler(
                {"message": message, "exception": error, "asyncgen": source}
            )

    async def _wait_for_room(self) -> bool:
        """Wait until a frame is wanted; return whether one is."""
        while not self._ledger.has_room and not self._ledger.is_over:
            self._room.clear()
            await self._room.wait()
        return not self._ledger.is_over

    async def _prepare(self, frame: Image) -> None:
        try:
            self._ledger.add(await prepare(frame))
            self._frames.set()
        except MnistGrpcError as error:
            self._ledger.fail(error)
            self._results.set()

    # Calls.

    async def _converse(self) -> None:
        try:
            while await self._wait_for_call():
                pause = await self._speak(self._ledger.begin_call())
                await asyncio.sleep(pause)
        except Exception as error:
            self.abandon(error)

    async def _wait_for_call(self) -> bool:
        """Wait until a call is wanted; return whether one is."""
        while not self._ledger.wants_call and not self._ledger.is_over:
            self._frames.clear()
            await self._frames.wait()
        return not self._ledger.is_over

    async def _speak(self, number: int) -> float:
        """Make a call; return for how many seconds not to make another one."""
        self._results.set()  # frames that were overtaken
        call = self._open_stub().StreamClassify()
        status = _Status(call)
        sender = asyncio.create_task(self._send(call, number))
        try:
            async for response in call:
                self._ledger.receive(number, response)
                self._results.set()
            self._ledger.end_call(number)
            return 0.0
        except grpc.RpcError as error:
            lost = _core.error_of_call(status.first or error, self._target, self._timeout)
            return self._ledger.lose_call(number, lost)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return self._ledger.lose_call(number, _cancelled(self._target))  # of a channel that was closed, not of ours
        finally:
            call.cancel()
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            self._wake_all()

    async def _send(self, call: Call, number: int) -> None:
        try:
            while True:
                if (message := self._ledger.next_message(number)) is not None:
                    await call.write(message)
                elif self._ledger.sends_more(number):
                    self._frames.clear()
                    await self._frames.wait()
                else:
                    break
            await call.done_writing()
        except (grpc.RpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
            return  # the call has ended; the receiver tells why
        except Exception as error:
            self.abandon(error)


class _Status:
    """How a call ended, also where a write that failed for it has put INTERNAL in its place (grpc#36066)."""

    def __init__(self, call: Call) -> None:
        self.first: grpc.RpcError | None = None
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        if self.first is not None:
            return
        code, details = _result(call.code()), _result(call.details())
        if (code, details) == (grpc.StatusCode.INTERNAL, _WRITE_FAILED):
            # The call had ended before, nobody knows how; if not by the loss of its connection, the next one tells.
            code, details = grpc.StatusCode.UNAVAILABLE, "the call ended while a message was being written"
        self.first = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), _result(call.trailing_metadata()), details=details)


def _cancelled(target: str) -> MnistGrpcError:
    error = UnavailableError(f"{target}: the call was cancelled")
    error.code = grpc.StatusCode.CANCELLED.name
    return error


def _result(finished: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that has nothing to wait for."""
    try:
        finished.send(None)
    except StopIteration as stop:
        return cast(T, stop.value)
    raise RuntimeError("the call has not ended")


async def prepare(image: Image) -> npt.NDArray[np.uint8]:
    """As `_core.prepare`, in a thread where it takes long."""
    if (pixels := _core.quick_bytes(image)) is not None:
        return np.frombuffer(pixels, np.uint8)
    return await asyncio.to_thread(_core.prepare, image)


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
    source = _ThreadedSource(frames)
    try:
        while (frame := await source.next()) is not _NO_MORE:
            yield frame
    finally:
        await source.leave()


class _ThreadedSource:
    """An iterable of the caller's, and the thread that asks it for one frame at a time."""

    def __init__(self, frames: Iterable[Image]) -> None:
        self._frames = frames
        self._loop = asyncio.get_running_loop()
        self._wanted = threading.Semaphore(0)
        self._left = False
        self._asked = False  # whether the thread is where only the caller's iterable can bring it back from
        self._given: asyncio.Queue[Any] = asyncio.Queue()
        self._ended = asyncio.Event()
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._iterate,), name="stream-source", daemon=True).start()

    async def next(self) -> Any:
        """The next frame, or `_NO_MORE`; raises what the iterable raises."""
        self._asked = True
        self._wanted.release()
        frame = await self._given.get()
        self._asked = False
        if isinstance(frame, _Raised):
            raise frame.error
        return frame

    async def leave(self) -> None:
        """Ask for no more; wait until a generator is closed, unless it is just being waited for."""
        self._left = True
        self._wanted.release()
        if not self._asked:
            await self._ended.wait()

    def _iterate(self) -> None:
        source: Any = None
        try:
            self._wanted.acquire()
            while not self._left:
                if source is None:
                    source = iter(self._frames)
                self._call(self._given.put_nowait, next(source, _NO_MORE))
                self._wanted.acquire()
        except BaseException as error:  # the caller's own; raised where the caller sees it
            self._call(self._given.put_nowait, _Raised(error))
        try:
            if inspect.isgenerator(source):
                source.close()  # by this thread, as no other can while this one is in it
        finally:
            self._call(self._ended.set)

    def _call(self, function: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits
            self._loop.call_soon_threadsafe(function, *arguments)


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
