"""`Client.stream_classify`, between five threads."""

from __future__ import annotations

import contextvars
import inspect
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import Any

import grpc

from client import _core, _fork
from client._errors import MnistGrpcError
from client._ledger import FrameLedger, StreamEnd, StreamResult
from client._types import Image
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierStub

_NO_MORE: Any = object()


class SyncStream:
    """One stream.

    A thread of ours prepares frames (`_feed`), another makes calls, one after
    another if they are lost, and receives answers (`_converse`), a third cancels
    the call when the stream is left (`_part`), one of gRPC's sends what waits
    (`_messages`), and the caller's takes results (`run`). What they share is the
    ledger, under one lock.

    A stream that is dropped is left by a collection of garbage: in any thread, at
    any point, with any lock held, this one's or gRPC's. So leaving takes no lock,
    waits for nobody and does not touch gRPC; it sets a flag and rings bells.
    """

    def __init__(
        self, open_stub: Callable[[], DigitClassifierStub], target: str, timeout: float, window: int, latest_only: bool
    ) -> None:
        self._open_stub = open_stub
        self._target = target
        self._timeout = timeout
        self._ledger = FrameLedger(target, timeout, window, latest_only)
        # Reentrant, as a collection of garbage may close a client, and so abandon its streams, in the middle of a step.
        self._lock = threading.RLock()
        self._room = _Bell()  # for `_feed`
        self._calling = _Bell()  # for `_converse`
        self._sending = _Bell()  # for `_messages` of the newest call
        self._results = _Bell()  # for `run`
        self._leaving = _Bell()  # for `_part`
        self._left = False
        self._call: Any = None

    def run(self, frames: Iterable[Image]) -> Generator[StreamResult, None, None]:
        self._process = os.getpid()
        _start("stream-feed", self._feed, frames)
        _start("stream-call", self._converse)
        _start("stream-part", self._part)
        try:
            while not isinstance(result := self._take(), StreamEnd):
                yield result
            if result.error is not None:
                raise result.error
        finally:
            self._left = True
            self._wake_all()
            self._leaving.ring()

    def abandon(self, error: Exception) -> None:
        """End the stream with an error."""
        with self._lock:
            self._ledger.abandon(error)
            self._wake_all()

    def _take(self) -> StreamResult | StreamEnd:
        _fork.check_process(self._process)  # a child has none of the threads, and perhaps the lock that one held
        while True:
            with self._lock:
                result = self._ledger.take()
                seconds = self._ledger.seconds_left()
                is_short = self._ledger.is_short
            if result is not None:
                break
            self._results.wait(seconds)
        if is_short:
            self._room.ring()
        return result

    def _part(self) -> None:
        self._leaving.wait()
        with self._lock:
            call = self._call
        if (cancel := getattr(call, "cancel", None)) is not None:
            cancel()

    def _wake_all(self) -> None:
        for bell in (self._room, self._calling, self._sending, self._results):
            bell.ring()

    # Frames.

    def _feed(self, frames: Iterable[Image]) -> None:
        failed: BaseException | None = None
        source: Any = None
        try:
            if self._wait_for_room():
                source = iter(frames)
                while (frame := next(source, _NO_MORE)) is not _NO_MORE:
                    self._prepare(frame)
                    if not self._wait_for_room():
                        break
        except BaseException as error:  # the caller's own; raised where the caller sees it
            failed = error
        with self._lock:
            self._ledger.complete(failed)
            self._wake_all()
        if inspect.isgenerator(source):
            source.close()  # by this thread, as no other can while this one is in it

    def _wait_for_room(self) -> bool:
        """Wait until a frame is wanted; return whether one is."""
        while True:
            with self._lock:
                if self._is_over or self._ledger.has_room:
                    return not self._is_over
            self._room.wait()

    def _prepare(self, frame: Image) -> None:
        try:
            pixels = _core.prepare(frame)
        except MnistGrpcError as error:
            with self._lock:
                self._ledger.fail(error)
            self._results.ring()
        else:
            with self._lock:
                self._ledger.add(pixels)
                sending = self._sending
            sending.ring()
            self._calling.ring()

    # Calls.

    def _converse(self) -> None:
        try:
            while (number := self._next_call()) is not None:
                self._pause(self._speak(number))
        except Exception as error:
            self.abandon(error)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._is_over and (left := until - time.monotonic()) > 0:
            self._calling.wait(left)

    def _next_call(self) -> int | None:
        """Wait until a call is wanted; return its number, None if there will be no more."""
        while True:
            with self._lock:
                if self._is_over:
                    return None
                if self._ledger.wants_call:
                    number = self._ledger.begin_call()
                    break
            self._calling.wait()
        self._results.ring()  # frames that were overtaken
        return number

    def _speak(self, number: int) -> float:
        """Make a call; return for how many seconds not to make another one."""
        sending = _Bell()  # of its own, as gRPC's thread of the call before may still be there to hear it
        with self._lock:
            self._sending = sending
        call = self._open_stub().StreamClassify(self._messages(number, sending))
        with self._lock:
            self._call = call
        try:
            # Left before `_call` was there for `_part` to see, or a generator, which only this thread can close.
            if not self._left:
                for response in call:
                    with self._lock:
                        self._ledger.receive(number, response)
                    self._results.ring()
                    if self._left:
                        break
            with self._lock:
                self._ledger.end_call(number)
            return 0.0
        except grpc.RpcError as error:
            lost = _core.error_of_call(error, self._target, self._timeout)
            with self._lock:
                return self._ledger.lose_call(number, lost)
        finally:
            _core.end_call(call)
            self._wake_all()

    def _messages(self, number: int, sending: _Bell) -> Iterator[pb.StreamClassifyRequest]:
        while (message := self._next_message(number, sending)) is not None:
            yield message

    def _next_message(self, number: int, sending: _Bell) -> pb.StreamClassifyRequest | None:
        while True:
            with self._lock:
                if (message := self._ledger.next_message(number)) is not None:
                    return message
                if self._left or not self._ledger.sends_more(number):
                    return None
            sending.wait()

    @property
    def _is_over(self) -> bool:
        return self._left or self._ledger.is_over


class _Bell:
    """Wakes the one thread that waits for it, or will; ringing never waits, so that it may be done anywhere.

    Not a Condition or an Event: to notify they take a lock, which may be held where a collection of garbage begins.
    """

    def __init__(self) -> None:
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        with suppress(RuntimeError):  # it was rung, and nobody has heard it yet
            self._silence.release()

    def wait(self, seconds: float | None = None) -> None:
        self._silence.acquire(timeout=-1 if seconds is None else min(max(seconds, 0), threading.TIMEOUT_MAX))


def _start(name: str, target: Callable[..., None], *arguments: Any) -> None:
    """Start a thread that sees the context variables of the caller, as interceptors of gRPC do."""
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(target, *arguments), name=name, daemon=True).start()
