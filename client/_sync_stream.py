"""`Client.stream_classify`, between four threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import grpc

from client import _core
from client._errors import MnistGrpcError
from client._ledger import FrameLedger, StreamEnd, StreamResult
from client._types import Image
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierStub


class SyncStream:
    """One stream.

    A thread of ours prepares frames (`_feed`), gRPC's sends what waits
    (`_messages`), another of ours receives answers (`_receive`), and the
    caller's takes results from a queue (`run`). The ledger, under the lock of
    `_changed`, keeps the results in the order of the frames.
    """

    def __init__(
        self, target: str, timeout: float, window: int, latest_only: bool, is_closed: Callable[[], bool]
    ) -> None:
        self._is_closed = is_closed
        self._target = target
        self._timeout = timeout
        self._room = threading.Semaphore(window)
        self._changed = threading.Condition()
        self._ledger = FrameLedger(target, timeout, latest_only)
        self._results: queue.SimpleQueue[StreamResult | StreamEnd] = queue.SimpleQueue()
        self._source_error: BaseException | None = None
        self._left = False

    def run(self, stub: DigitClassifierStub, frames: Iterable[Image]) -> Iterator[StreamResult]:
        if self._is_closed():
            raise RuntimeError(_core.CLOSED)
        call = stub.StreamClassify(self._messages())
        threading.Thread(target=self._feed, args=(frames,), name="stream-feed", daemon=True).start()
        receiver = threading.Thread(target=self._receive, args=(call,), name="stream-receive", daemon=True)
        receiver.start()
        try:
            while not isinstance(result := self._take(), StreamEnd):
                self._room.release()
                yield result
            if error := self._source_error or result.error:
                raise error
        finally:
            with self._changed:
                self._left = True
                self._changed.notify_all()
            self._room.release()
            call.cancel()
            receiver.join()  # but not the feeder, which may be inside the caller's iterable

    def _feed(self, frames: Iterable[Image]) -> None:
        try:
            source = iter(frames)
            while self._room.acquire() and not self._left:
                try:
                    frame = next(source)
                except StopIteration:
                    break
                try:
                    pixels = _core.prepare(frame)
                except MnistGrpcError as error:
                    with self._changed:
                        self._put(self._ledger.fail(error))
                    continue
                with self._changed:
                    self._ledger.add(pixels)
                    self._changed.notify_all()
        except BaseException as error:  # the caller's own; raised where the caller sees it
            self._source_error = error
        with self._changed:
            self._ledger.complete()
            self._changed.notify_all()

    def _messages(self) -> Iterator[pb.StreamClassifyRequest]:
        while True:
            with self._changed:
                while (message := self._ledger.next_message()) is None:
                    if self._ledger.is_complete or self._left:
                        return
                    self._changed.wait()
            yield message

    def _receive(self, call: Iterator[pb.StreamClassifyResponse]) -> None:
        try:
            for response in call:
                with self._changed:
                    self._put(self._ledger.receive(response))
            with self._changed:
                self._results.put(self._ledger.end())
        except grpc.RpcError as error:
            closed = self._is_closed()  # gRPC cancels the calls of a channel that is closed
            raised = _core.error_of_call(error, self._target, self._timeout)
            self._results.put(StreamEnd(RuntimeError(_core.CLOSED) if closed else raised))
        except Exception as error:
            self._results.put(StreamEnd(error))

    def _put(self, results: list[StreamResult]) -> None:
        for result in results:
            self._results.put(result)

    def _take(self) -> StreamResult | StreamEnd:
        """The next result, or the end, also if the server does not come to it."""
        wait = self._timeout
        while True:
            try:
                return self._results.get(timeout=wait)
            except queue.Empty:
                with self._changed:
                    wait = self._ledger.seconds_left()
                    if wait <= 0:
                        return self._ledger.overdue()
