"""`Client.stream_classify`, between four threads."""

from __future__ import annotations

import contextvars
import inspect
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import grpc

from client import _core
from client._errors import MnistGrpcError
from client._ledger import FrameLedger, StreamEnd, StreamResult
from client._types import Image
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierStub

_NO_MORE: Any = object()


class SyncStream:
    """One stream.

    A thread of ours prepares frames (`_feed`), another makes calls, one after
    another if they are lost, and receives answers (`_converse`), one of gRPC's
    sends what waits (`_messages`), and the caller's takes results (`run`). What
    they share is the ledger, under one lock.
    """

    def __init__(
        self, open_stub: Callable[[], DigitClassifierStub], target: str, timeout: float, window: int, latest_only: bool
    ) -> None:
        self._open_stub = open_stub
        self._target = target
        self._timeout = timeout
        self._ledger = FrameLedger(target, timeout, window, latest_only)
        # Reentrant, as a collection of garbage may leave a stream in the middle of another one's work, or of its own.
        self._lock = threading.RLock()
        self._room = threading.Condition(self._lock)  # for `_feed`
        self._frames = threading.Condition(self._lock)  # for `_messages` and `_converse`
        self._results = threading.Condition(self._lock)  # for `run`
        self._left = False
        self._call: Any = None
        self._in_source = False  # whether the feeder is where only the caller's iterable can bring it back from

    def run(self, frames: Iterable[Image]) -> Generator[StreamResult, None, None]:
        feeder = _thread("stream-feed", self._feed, frames)
        caller = _thread("stream-call", self._converse)
        feeder.start()
        caller.start()
        try:
            while not isinstance(result := self._take(), StreamEnd):
                yield result
            if result.error is not None:
                raise result.error
        finally:
            self._leave(feeder, caller)

    def abandon(self, error: Exception) -> None:
        """End the stream with an error."""
        with self._lock:
            self._ledger.abandon(error)
            self._wake_all()

    def _take(self) -> StreamResult | StreamEnd:
        with self._lock:
            while (result := self._ledger.take()) is None:
                self._results.wait(self._ledger.seconds_left())
            if self._ledger.is_short:
                self._room.notify()
            return result

    def _leave(self, feeder: threading.Thread, caller: threading.Thread) -> None:
        with self._lock:
            self._left = True
            self._wake_all()
            call = self._call
            blocked = self._in_source
        if call is not None:
            call.cancel()
        for thread in (caller,) if blocked else (caller, feeder):
            if thread is not threading.current_thread():
                thread.join()

    def _wake_all(self) -> None:
        self._room.notify_all()
        self._frames.notify_all()
        self._results.notify_all()

    # Frames.

    def _feed(self, frames: Iterable[Image]) -> None:
        failed: BaseException | None = None
        source: Any = None
        try:
            if self._enter_source():
                source = iter(frames)
                while (frame := next(source, _NO_MORE)) is not _NO_MORE:
                    self._prepare(frame)
                    if not self._enter_source():
                        break
        except BaseException as error:  # the caller's own; raised where the caller sees it
            failed = error
        with self._lock:
            self._ledger.complete(failed)
            self._wake_all()
        if inspect.isgenerator(source):
            source.close()  # by this thread, as no other can while this one is in it

    def _enter_source(self) -> bool:
        """Wait until a frame is wanted; return whether one is."""
        with self._lock:
            self._in_source = False
            self._room.wait_for(lambda: self._ledger.has_room or self._is_over)
            self._in_source = not self._is_over
            return self._in_source

    def _prepare(self, frame: Image) -> None:
        try:
            pixels = _core.prepare(frame)
        except MnistGrpcError as error:
            with self._lock:
                self._ledger.fail(error)
                self._results.notify()
        else:
            with self._lock:
                self._ledger.add(pixels)
                self._frames.notify_all()

    # Calls.

    def _converse(self) -> None:
        try:
            while (number := self._next_call()) is not None:
                pause = self._speak(number)
                with self._lock:
                    self._frames.wait_for(lambda: self._is_over, pause)
        except Exception as error:
            self.abandon(error)

    def _next_call(self) -> int | None:
        """Wait until a call is wanted; return its number, None if there will be no more."""
        with self._lock:
            self._frames.wait_for(lambda: self._ledger.wants_call or self._is_over)
            if self._is_over:
                return None
            number = self._ledger.begin_call()
            self._results.notify()  # frames that were overtaken
            return number

    def _speak(self, number: int) -> float:
        """Make a call; return for how many seconds not to make another one."""
        call = self._open_stub().StreamClassify(self._messages(number))
        with self._lock:
            self._call = call
            left = self._left
        if left:
            call.cancel()
        try:
            for response in call:
                with self._lock:
                    self._ledger.receive(number, response)
                    self._results.notify()
            with self._lock:
                self._ledger.end_call(number)
                self._wake_all()
                return 0.0
        except grpc.RpcError as error:
            lost = _core.error_of_call(error, self._target, self._timeout)
            with self._lock:
                pause = self._ledger.lose_call(number, lost)
                self._wake_all()
                return pause

    def _messages(self, number: int) -> Iterator[pb.StreamClassifyRequest]:
        while (message := self._next_message(number)) is not None:
            yield message

    def _next_message(self, number: int) -> pb.StreamClassifyRequest | None:
        with self._lock:
            while (message := self._ledger.next_message(number)) is None:
                if self._left or not self._ledger.sends_more(number):
                    return None
                self._frames.wait()
            return message

    @property
    def _is_over(self) -> bool:
        return self._left or self._ledger.is_over


def _thread(name: str, target: Callable[..., None], *arguments: Any) -> threading.Thread:
    """A thread that sees the context variables of the caller, as interceptors of gRPC do."""
    context = contextvars.copy_context()
    return threading.Thread(target=context.run, args=(target, *arguments), name=name, daemon=True)
