"""`AsyncClient.classify` from many tasks: those who wait go together in one message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING

from client import _core, _request_id
from client._gathering import PATIENCE_SECONDS, Gathering, Member
from client._types import Prediction
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierAsyncStub


class _Caller(Member):
    __slots__ = ("message", "result")

    def __init__(self, pixels: bytes, timeout: float, now: float, result: asyncio.Future[Prediction]) -> None:
        super().__init__(pixels, timeout, now)
        self.result = result
        self.message: _Message | None = None  # what it is sent in


class _Message:
    def __init__(
        self,
        members: list[_Caller],
        ask: Callable[[list[_Caller]], Coroutine[None, None, list[Prediction]]],
        end: Callable[[_Message], None],
    ) -> None:
        self.members = members
        self.task = asyncio.create_task(ask(members))
        # Also called for a task that is cancelled before its first step.
        self.task.add_done_callback(lambda _: end(self))


class AsyncGather:
    """The calls of one client in one event loop."""

    def __init__(
        self, target: str, stub: DigitClassifierAsyncStub, loop: asyncio.AbstractEventLoop, connections: int = 1
    ) -> None:
        self._loop = loop  # CPython 3.11 asks the kernel for the process id to tell which one runs, 0.4 us each time
        self._target = target
        self._stub = stub
        self._gathering: Gathering[_Caller] = Gathering(connections)
        self._messages: set[_Message] = set()  # on their way
        self._callers: set[_Caller] = set()  # who wait for an answer
        self._alarm: asyncio.TimerHandle | None = None  # one for all of them: most end long before their time is over
        self._alarm_at = 0.0
        self._impatience: asyncio.TimerHandle | None = None
        self._woken = False
        self._closed = False

    def begin_alone(self) -> bool:
        """Whether a call that comes now is to be made by itself; if so, it ends with `end_alone`. Else it joins."""
        return self._gathering.begin_alone()

    def end_alone(self) -> None:
        self._gathering.end(1)
        self._send_soon()

    async def join(self, pixels: bytes, timeout: float) -> Prediction:
        """Send an image, 784 bytes, together with others; wait for its answer and for no other.

        Raises:
            MnistGrpcError: of its own, also where all calls of a message fail for one reason.
            RuntimeError: the client is closed.
        """
        if self._closed:
            raise RuntimeError(_core.CLOSED)
        loop = self._loop
        caller = _Caller(pixels, timeout, loop.time(), loop.create_future())
        self._gathering.join(caller)
        self._callers.add(caller)
        self._send_soon()
        if self._alarm is None or caller.deadline < self._alarm_at:
            self._set_alarm(caller.deadline)
        if self._impatience is None:
            self._impatience = loop.call_later(PATIENCE_SECONDS, self._lose_patience)
        try:
            return await caller.result
        except asyncio.CancelledError:
            self._leave(caller)
            if caller.result.done() and not caller.result.cancelled():
                caller.result.exception()  # it came in the same turn, and is nobody's any more
            raise

    async def close(self) -> None:
        """Let all who wait have the error of a closed client."""
        self._closed = True
        for timer in (self._alarm, self._impatience):
            if timer is not None:
                timer.cancel()
        for caller in self._gathering.drain():
            self._give(caller, RuntimeError(_core.CLOSED))
        tasks = [message.task for message in self._messages]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for caller in list(self._callers):
            self._give(caller, RuntimeError(_core.CLOSED))

    # Sending ------------------------------------------------------------------

    def _send_soon(self) -> None:
        """Send in the next turn of the loop: those whose last call was answered in this one call again until then."""
        if not self._woken and self._gathering.ready:
            self._woken = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._woken = False
        while self._gathering.ready:
            self._begin_message()

    def _lose_patience(self) -> None:
        """Send those who have waited long enough for others to be answered."""
        loop = self._loop
        self._impatience = None
        while (first := self._gathering.first) is not None:
            if (wait := first.since + PATIENCE_SECONDS - loop.time()) > 0:
                self._impatience = loop.call_later(wait, self._lose_patience)
                return
            self._begin_message()

    def _begin_message(self) -> None:
        if members := self._gathering.cut():
            message = _Message(members, self._ask, self._end)
            self._messages.add(message)
            for caller in members:
                caller.message = message

    def _end(self, message: _Message) -> None:
        """Give each caller of a message that has ended a result."""
        members, task = message.members, message.task
        results: Sequence[Prediction | BaseException]
        too_long = False
        if task.cancelled():  # all callers left, or the client is closed, or the loop ends
            results = [RuntimeError(_core.CLOSED) if self._closed else asyncio.CancelledError() for _ in members]
        elif (error := task.exception()) is None:
            results = task.result()
        elif isinstance(error, Exception):
            too_long = _core.is_too_long(error, len(members))
            results = [_core.error_of_member(error, self._target, caller.timeout) for caller in members]
        else:
            results = [error for _ in members]
        self._messages.discard(message)
        self._gathering.end(len(members))
        if too_long and not self._closed:
            self._gathering.too_long(len(members))
            self._gathering.put_back(members)
        else:
            for caller, result in zip(members, results, strict=True):
                self._give(caller, result)
        self._send_soon()

    async def _ask(self, members: list[_Caller]) -> list[Prediction]:
        request = pb.ClassifyRequest(pixels=b"".join([caller.pixels for caller in members]))
        deadline = max(caller.deadline for caller in members)
        seconds = max(0.001, deadline - self._loop.time())
        with _request_id.bound(_request_id.new()), _core.translate_errors(self._target, seconds):
            response = await self._stub.Classify(request, timeout=seconds)
        return _core.parse_response(response, len(members), self._target)

    # Callers ------------------------------------------------------------------

    def _give(self, caller: _Caller, result: Prediction | BaseException) -> None:
        self._callers.discard(caller)
        if caller.result.done():
            return
        if isinstance(result, Prediction):
            caller.result.set_result(result)
        elif isinstance(result, asyncio.CancelledError):
            caller.result.cancel()
        else:
            caller.result.set_exception(result)

    def _leave(self, caller: _Caller) -> None:
        """This one waits no more; a message whose callers all left is called off."""
        caller.left = True
        self._callers.discard(caller)
        if caller.message is not None and all(other.left for other in caller.message.members):
            caller.message.task.cancel()

    def _set_alarm(self, deadline: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = deadline
        self._alarm = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        """Let those go whose time is over, and look again when the next one's is."""
        self._alarm = None
        now = self._loop.time()
        for caller in [caller for caller in self._callers if caller.deadline <= now]:
            self._give(caller, _core.no_answer(self._target, caller.timeout))
            self._leave(caller)
        if self._callers:
            self._set_alarm(min(caller.deadline for caller in self._callers))
