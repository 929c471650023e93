"""What a test has told the fake to do, and what the fake has received; does no I/O.

Shared between the test's thread and those of the calls.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import grpc
import numpy as np
import numpy.typing as npt

from client._errors import MnistGrpcError
from client.testing._answers import Answer, Answers, Row, ScriptError, checked_digit, nearest_sample, row_of
from client.testing._faults import INCIDENT, Action, Fault, Status, status_of


@dataclass(frozen=True, slots=True)
class Request:
    """A message that asked the fake to classify."""

    method: str
    """`Classify`, or `StreamClassify`, of which each message is a request."""

    pixels: npt.NDArray[np.uint8] = field(repr=False)
    """`uint8[n, 784]`, the images as the server gets them; read-only."""

    metadata: Mapping[str, str | bytes] = field(repr=False)
    """What the caller sent beside the message, by names in lower case."""

    timeout: float | None
    """Seconds that the caller left for the call; None if it set no deadline."""


class Script:
    """Answers and faults still to come, requests that came, and mistakes of the test's author."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answers: Answers | None = None
        self._next_answer: Callable[[npt.NDArray[np.uint8]], Answer] = nearest_sample
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.answers = None
        with self._changed:
            self._faults: deque[Fault] = deque()
            self._requests: list[Request] = []
            self._mistakes: list[str] = []

    # What the test says.

    @property
    def answers(self) -> Answers | None:
        return self._answers

    @answers.setter
    def answers(self, answers: Answers | None) -> None:
        next_answer = nearest_sample if answers is None else _source(answers)
        with self._changed:
            self._answers, self._next_answer = answers, next_answer

    def add_fault(self, action: Action, name: str, times: int, after: int) -> None:
        if times < 1:
            raise ScriptError(f"a fault comes 1 time or more, not {times!r}")
        if after < 0:
            raise ScriptError(f"a fault comes after 0 frames or more, not {after!r}")
        with self._changed:
            self._faults.append(Fault(action, name, after, times, times))

    # What the calls ask.

    def claim_fault(self, streaming: bool) -> Fault | None:
        """What is to go wrong with the call that begins now."""
        with self._changed:
            fault = next((fault for fault in self._faults if streaming or fault.after == 0), None)
            if fault is not None:
                fault.left -= 1
                if fault.left == 0:
                    self._faults.remove(fault)
            return fault

    def give_back(self, fault: Fault) -> None:
        """The stream ended before it could go wrong: let the next one."""
        with self._changed:
            fault.left += 1
            if fault.left == 1:
                self._faults.appendleft(fault)

    def answer(self, pixels: npt.NDArray[np.uint8]) -> list[Row | Status]:
        """Answers to `uint8[n, 784]`."""
        with self._changed:
            next_answer = self._next_answer
        return [self._answer(next_answer, image) for image in pixels]  # without the lock: the test's function may wait

    def _answer(
        self, next_answer: Callable[[npt.NDArray[np.uint8]], Answer], image: npt.NDArray[np.uint8]
    ) -> Row | Status:
        try:
            return _outcome(next_answer, image)
        except Exception as error:  # the test's own mistake
            return Status(grpc.StatusCode.INTERNAL, self.mistake(error), INCIDENT)

    # What came of it.

    def note(self, request: Request) -> None:
        with self._changed:
            self._requests.append(request)
            self._changed.notify_all()

    def mistake(self, error: Exception) -> str:
        """Keep it for the end of the test; return it for the caller."""
        text = str(error) if isinstance(error, ScriptError) else f"`answers` failed with {error!r}"
        with self._changed:
            self._mistakes.append(text)
        return f"FakeServer: {text}"

    @property
    def requests(self) -> list[Request]:
        with self._changed:
            return list(self._requests)

    def wait_for_requests(self, count: int, timeout: float) -> list[Request]:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._requests) >= count, timeout):
                raise AssertionError(f"{len(self._requests)} of {count} requests came within {timeout:g} s")
            return list(self._requests)

    def complaints(self) -> list[str]:
        """What the test told wrongly, or told and did not meet."""
        with self._changed:
            unmet = [
                f"{fault.name} was to come {fault.times} times, and came {fault.times - fault.left} times"
                for fault in self._faults
            ]
            return [*dict.fromkeys(self._mistakes), *unmet]


def _outcome(next_answer: Callable[[npt.NDArray[np.uint8]], Answer], image: npt.NDArray[np.uint8]) -> Row | Status:
    try:
        row = row_of(next_answer(image))
    except MnistGrpcError as error:
        row = error
    return status_of(row) if isinstance(row, MnistGrpcError) else row


def _source(answers: Answers) -> Callable[[npt.NDArray[np.uint8]], Answer]:
    if callable(answers):
        return answers
    if isinstance(answers, int | np.integer):
        digit = checked_digit(answers)
        return lambda _: digit
    if not isinstance(answers, Iterable) or isinstance(answers, str | bytes):
        raise ScriptError(
            f"answers are a digit for all images, an iterable of answers, or a function of pixels, not {answers!r}"
        )
    if isinstance(answers, list | tuple):
        answers = list(answers)
        for answer in answers:  # a mistake is told where it is made
            if isinstance(row := row_of(answer), MnistGrpcError):
                status_of(row)
    source = iter(answers)
    lock = threading.Lock()
    given = 0

    def take(_: object) -> Answer:
        nonlocal given
        with lock:
            try:
                answer = next(source)
            except StopIteration:
                raise ScriptError(
                    f"the {given} answers that were given are used up, and another image came; give `answers` "
                    "more of them, or a function, which answers any number"
                ) from None
            given += 1
            return answer

    return take
