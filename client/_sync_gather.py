"""`Client.classify` from many threads: those who wait go together in one message.

There is no thread for it. One of the callers in a message sends it for all, the
one with the most time left, so that the call is over before its own time is;
the others sleep, each at a lock of its own, which costs a fraction of what a
condition costs. Who leaves while it sends hands the message on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from client import _core, _request_id
from client._errors import MnistGrpcError
from client._gathering import PATIENCE_SECONDS, QUIET_SECONDS, Gathering, Member
from client._types import Prediction
from digits.canonical import SIDE, are_canonical
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierStub


class _NotCanonical:
    """What comes of pixels that have to be prepared first."""


class _Caller(Member):
    __slots__ = ("message", "result", "unsure", "wake")

    def __init__(self, pixels: bytes, timeout: float, now: float, unsure: bool) -> None:
        super().__init__(pixels, timeout, now)
        self.unsure = unsure  # whether the pixels are canonical
        self.message: list[_Caller] | None = None  # what this one is to send
        self.result: Prediction | Exception | _NotCanonical | None = None
        self.wake = threading.Lock()  # released when there is a message to send, or a result
        self.wake.acquire()


class SyncGather:
    """The calls of one client; `begin_alone` and `join` may be called from any thread."""

    def __init__(self, target: str, stub: DigitClassifierStub, connections: int = 1) -> None:
        self._target = target
        self._stub = stub
        self._lock = threading.Lock()
        self._gathering: Gathering[_Caller] = Gathering(connections)
        self._watcher: _Caller | None = None  # who sends if the company of the last message does not come again
        self._closed = False

    def begin_alone(self) -> bool:
        """Whether a call that comes now is to be made by itself; if so, it ends with `end_alone`. Else it joins."""
        with self._lock:
            return self._gathering.begin_alone()

    @property
    def in_company(self) -> bool:
        """Whether the last message carried several calls; without the lock, as it may change right afterwards."""
        return self._gathering.in_company

    def end_alone(self) -> None:
        with self._lock:
            self._gathering.end(1)
            self._appoint()

    def join(self, pixels: bytes, timeout: float) -> Prediction:
        """Send an image, 784 bytes, together with others; wait for its answer and for no other.

        Raises:
            MnistGrpcError: of its own, also where all calls of a message fail for one reason.
            RuntimeError: the client is closed.
        """
        prediction = self._join(_Caller(pixels, timeout, time.monotonic(), unsure=False))
        assert prediction is not None
        return prediction

    def join_unsure(self, pixels: bytes, timeout: float) -> Prediction | None:
        """As `join`, with pixels of which it is not sure that they are canonical; None if they are not.

        They are judged by who sends, for all calls of a message in one go. What
        NumPy does lets go of Python's lock again and again, and each time all
        other threads have their turn: that took two thirds of the time of 64
        threads that judged their images one by one.
        """
        return self._join(_Caller(pixels, timeout, time.monotonic(), unsure=True))

    def _join(self, caller: _Caller) -> Prediction | None:
        try:
            with self._lock:
                if self._closed:
                    raise RuntimeError(_core.CLOSED)
                self._gathering.join(caller)
                self._appoint(caller)
            while caller.result is None:
                self._wait(caller)
                if caller.message is not None:
                    self._send(caller, caller.message)
        except BaseException:
            self._leave(caller)
            raise
        if isinstance(caller.result, Exception):
            raise caller.result
        return None if isinstance(caller.result, _NotCanonical) else caller.result

    def close(self) -> None:
        """Let all who wait have the error of a closed client; calls that are under way are the channel's to end."""
        with self._lock:
            self._closed = True
            for caller in self._gathering.drain():
                caller.result = RuntimeError(_core.CLOSED)
                _wake(caller)

    def _wait(self, caller: _Caller) -> None:
        """Until there is a message to send or a result, or the caller's time or patience is over."""
        left = caller.deadline - time.monotonic()
        if not caller.sent:
            left = min(left, QUIET_SECONDS if self._watcher is caller else PATIENCE_SECONDS)
        joined = self._gathering.joined
        if caller.wake.acquire(timeout=max(0.0, left)):
            return
        with self._lock:
            if caller.message is not None or caller.result is not None:
                return
            now = time.monotonic()
            if now >= caller.deadline:
                raise _core.no_answer(self._target, caller.timeout)
            quiet = self._watcher is caller and self._gathering.joined == joined
            if not caller.sent and (quiet or now - caller.since >= PATIENCE_SECONDS):
                self._begin_message()

    def _appoint(self, newcomer: _Caller | None = None) -> None:
        """With the lock held: have what can be sent be sent, by one of its callers.

        Where many go together, as many are waited for as the last time, while
        they keep coming; in the meantime one of them watches whether they do.
        """
        while (ready := self._gathering.ready) and self._gathering.is_complete:
            self._begin_message()
        if ready and self._watcher is None:
            self._watcher = newcomer or self._gathering.first
            if self._watcher is not None and self._watcher is not newcomer:
                _wake(self._watcher)

    def _begin_message(self) -> None:
        self._watcher = None
        if members := self._gathering.cut():
            sender = max(members, key=_deadline)
            sender.message = members
            _wake(sender)

    def _send(self, sender: _Caller, members: list[_Caller]) -> None:
        """Exchange a message, and give each of its callers a result."""
        too_long = False
        results: Sequence[Prediction | Exception | _NotCanonical]
        try:
            results = self._exchange(members)
        except Exception as error:
            too_long = _core.is_too_long(error, len(members))
            results = [
                # Who was left out of the message is not concerned.
                _NotCanonical() if caller.unsure else _core.error_of_member(error, self._target, caller.timeout)
                for caller in members
            ]
        try:
            with self._lock:
                if too_long:
                    self._gathering.too_long(len(members))
                    self._gathering.put_back(members)
                else:
                    for caller, result in zip(members, results, strict=True):
                        caller.result = result
                self._gathering.end(len(members))
                sender.message = None
                self._appoint()
        finally:  # also if this thread is interrupted, which concerns nobody else
            for caller in members:
                if caller.result is not None:
                    _wake(caller)

    def _exchange(self, members: list[_Caller]) -> list[Prediction | _NotCanonical]:
        _judge(members)
        sent = [caller for caller in members if not caller.unsure]
        predictions = iter(self._ask(sent) if sent else ())
        return [_NotCanonical() if caller.unsure else next(predictions) for caller in members]

    def _ask(self, members: list[_Caller]) -> list[Prediction]:
        request = pb.ClassifyRequest(pixels=b"".join([caller.pixels for caller in members]))
        seconds = max(0.001, max(map(_deadline, members)) - time.monotonic())
        try:
            with _request_id.bound(_request_id.new()), _core.translate_errors(self._target, seconds):
                response = self._stub.Classify(request, timeout=seconds)
        except (MnistGrpcError, ValueError) as error:
            if self._closed:  # gRPC cancels the calls of a channel that is closed, and raises ValueError for new ones
                raise RuntimeError(_core.CLOSED) from error
            raise
        return _core.parse_response(response, len(members), self._target)

    def _leave(self, caller: _Caller) -> None:
        """This one waits no more; if it was about to send for others, or did, they are sent again."""
        with self._lock:
            caller.left = True
            if self._watcher is caller:
                self._watcher = None
            if caller.message is not None:
                self._gathering.end(len(caller.message))
                others = [other for other in caller.message if other.result is None and other is not caller]
                self._gathering.put_back(others)
                caller.message = None
                for other in others:  # which have patience again
                    _wake(other)
            self._appoint()


def _judge(members: list[_Caller]) -> None:
    """Make sure of those whose pixels are canonical."""
    unsure = [caller for caller in members if caller.unsure]
    if unsure:
        images = np.frombuffer(b"".join([caller.pixels for caller in unsure]), np.uint8).reshape(-1, SIDE, SIDE)
        for caller, is_canonical in zip(unsure, are_canonical(images).tolist(), strict=True):
            caller.unsure = not is_canonical


_deadline = attrgetter("deadline")


def _wake(caller: _Caller) -> None:
    """By one thread at a time: with the lock of the gather held, or as the sender of the caller's message."""
    try:  # noqa: SIM105  # contextlib.suppress takes longer than all the rest
        caller.wake.release()
    except RuntimeError:  # it is awake already
        pass
