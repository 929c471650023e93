"""A connection with its calls under way: messages in, answers out, each of them judged.

Knows nothing of when messages are sent.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import grpc
from google.protobuf.message import DecodeError

from client.load.images import IMAGES
from client.load.jobs import WRONG, Fault, Job, numbered
from client.load.wire import MOST, Call, Connection, ConnectionEnded
from protos.mnist.v1 import digit_classifier_pb2 as pb

STATUSES = {code.value[0]: code.name for code in grpc.StatusCode}


class Answer(NamedTuple):
    """To one message."""

    meant: float
    """When the message was meant to be sent, on the machine's monotonic clock."""
    at: float
    fault: Fault | None


class Lane(Protocol):
    """What a loop needs of a connection."""

    under_way: int
    """Messages that are sent and not answered."""
    returned: deque[tuple[int, float]]
    """Messages that the server did not begin with, to be sent again: their numbers, and when they were meant to go."""

    @property
    def has_room(self) -> bool:
        """Whether the server allows one more message."""

    @property
    def most(self) -> int:
        """How many messages the server allows at a time; 0 where it takes no more."""

    @property
    def farewell(self) -> str:
        """Why it takes no more; empty while it does."""

    @property
    def is_clogged(self) -> bool:
        """Whether more messages would only pile up here."""

    @property
    def wants_to_write(self) -> bool: ...

    def fileno(self) -> int: ...

    def send(self, number: int, meant: float) -> None:
        """Put a message into the buffer; `flush` or `exchange` sends it."""

    def flush(self) -> None:
        """Send what can be without waiting."""

    def exchange(self) -> list[Answer]:
        """Receive and send what can be without waiting.

        Raises:
            ConnectionEnded: by the server.
        """

    def finish(self, patience: float) -> Fault | None:
        """End what is open, when all is answered; say what is wrong with the end.

        Raises:
            ConnectionEnded: by the server.
        """

    def close(self) -> None: ...


class UnaryLane:
    """Calls of one message each."""

    def __init__(self, connection: Connection, job: Job) -> None:
        self._connection = connection
        self._job = job
        self.under_way = 0
        self.returned: deque[tuple[int, float]] = deque()
        self.fileno = connection.fileno
        self.flush = connection.flush
        self.close = connection.close

    @property
    def has_room(self) -> bool:
        return self._connection.has_room

    @property
    def most(self) -> int:
        return 0 if self._connection.is_leaving else self._connection.max_streams

    @property
    def farewell(self) -> str:
        return f"the server said GOAWAY: {self._connection.farewell}" if self._connection.is_leaving else ""

    @property
    def is_clogged(self) -> bool:
        return self._connection.is_clogged

    @property
    def wants_to_write(self) -> bool:
        return self._connection.wants_to_write

    def send(self, number: int, meant: float) -> None:
        self._connection.call(self._job.messages[number % IMAGES], tag=(number, meant))
        self.under_way += 1

    def exchange(self) -> list[Answer]:
        answers = []
        for call in self._connection.exchange():
            self.under_way -= 1
            number, meant = call.tag
            if call.was_not_begun:
                self.returned.append(call.tag)
                continue
            fault = status_fault(call) or self._job.fault(number, call.message)
            answers.append(Answer(meant, call.ended_at, fault))
        return answers

    def finish(self, patience: float) -> Fault | None:
        return None


class StreamLane:
    """One stream; its frames are numbered from 0 on."""

    def __init__(self, connection: Connection, job: Job) -> None:
        self._connection = connection
        self._job = job
        self._stream, self._call = connection.stream()
        self._sent: deque[tuple[int, float]] = deque()  # unanswered: number of the message, when it was meant to go
        self._messages = 0
        self._answered = 0  # frames
        self._digits: list[int | Fault] = []  # of the message whose turn it is
        self.under_way = 0
        self.returned: deque[tuple[int, float]] = deque()
        self.fileno = connection.fileno
        self.flush = connection.flush
        self.close = connection.close
        self.has_room = True
        self.farewell = ""

    @property
    def most(self) -> int:
        return 0 if self.farewell else MOST

    @property
    def is_clogged(self) -> bool:
        return self._connection.is_clogged

    @property
    def wants_to_write(self) -> bool:
        return self._connection.wants_to_write

    def send(self, number: int, meant: float) -> None:
        frames = self._job.messages[number % IMAGES]
        self._connection.send(self._stream, numbered(self._messages * self._job.images, frames))
        self._messages += 1
        self._sent.append((number, meant))
        self.under_way += 1

    def exchange(self) -> list[Answer]:
        ended = self._connection.exchange()
        at = time.monotonic()
        answers = [
            answer
            for message in self._call.take_messages()
            for block in _blocks(message)
            for answer in self._read(block, at)
        ]
        if ended:  # `finish` has not asked for it
            fault = end_fault(self._call) or Fault(WRONG, "the stream ended early")
            self.farewell, self.has_room = f"{fault.what}: {fault.detail}", False
            if self.under_way:
                raise ConnectionEnded(self.farewell)
        return answers

    def _read(self, block: pb.FrameBlock, at: float) -> list[Answer]:
        """The messages that are answered as a whole by this block: blocks and messages need not be of the same size."""
        digits: list[int | Fault] = list(block.result.digits)
        if block.WhichOneof("outcome") == "error":
            digits = [Fault(STATUSES.get(block.error.code, "unknown"), block.error.message)] * block.frame_count
        if block.first_sequence != self._answered or len(digits) != block.frame_count:
            raise ConnectionEnded(
                f"{WRONG}: frame {self._answered} of a stream was answered by {len(digits)} digits for "
                f"{block.frame_count} frames from {block.first_sequence} on"
            )
        self._answered += block.frame_count
        self._digits += digits
        answers: list[Answer] = []
        count = self._job.images
        while self._sent and len(self._digits) >= count:
            number, meant = self._sent.popleft()
            found, self._digits = self._digits[:count], self._digits[count:]
            answers.append(Answer(meant, at, self._fault(number, found)))
        self.under_way -= len(answers)
        if self._digits and not self._sent:
            raise ConnectionEnded(f"{WRONG}: a stream has answers to {len(self._digits)} frames that were not sent")
        return answers

    def _fault(self, number: int, found: list[int | Fault]) -> Fault | None:
        expected = self._job.expected[number % IMAGES]
        if found == expected:
            return None
        faults = (one for one in found if isinstance(one, Fault))
        return next(faults, Fault(WRONG, f"message {number}: {found} instead of {expected}"))

    def finish(self, patience: float) -> Fault | None:
        if not self.farewell:
            self._connection.end(self._stream)
            end = time.monotonic() + patience
            while not self._connection.exchange():
                if time.monotonic() > end:
                    return Fault("lost answer", "a stream did not end")
                time.sleep(0.001)
        if self._call.body:
            return Fault(WRONG, f"a stream has {len(self._call.body)} bytes behind its last answer")
        return end_fault(self._call)


def _blocks(message: bytes) -> Iterable[pb.FrameBlock]:
    try:
        return pb.StreamClassifyResponse.FromString(message).blocks
    except DecodeError as error:
        raise ConnectionEnded(f"{WRONG}: a stream has a message that cannot be read: {error}") from error


def status_fault(call: Call) -> Fault | None:
    """What is wrong with the answer to a unary call, but for what its message says.

    Raises:
        ConnectionEnded: its headers cannot be read, and so no later ones.
    """
    fault = end_fault(call)
    if fault is None and (what := call.body_fault):
        return Fault(WRONG, what)
    return fault


def end_fault(call: Call) -> Fault | None:
    """What is wrong with how a call ended.

    Raises:
        ConnectionEnded: its headers cannot be read, and so no later ones.
    """
    if call.reset is not None:
        return Fault("reset", f"the server reset the stream with error {call.reset}")
    if not call.has_trailers:
        # Of what is no gRPC, the status says more.
        return _head_fault(call.http_status) or Fault("no status", "an answer ended without trailers, where it stands")
    return _fault_of_headers(call.head, call.headers)


def _head_fault(status: bytes) -> Fault | None:
    if status == b"200":
        return None
    return Fault(f"HTTP status {status.decode(errors='replace')!r}", "gRPC's answers have 200")


@functools.lru_cache(maxsize=10_000)
def _fault_of_headers(head: bytes, last: bytes) -> Fault | None:
    """What an answer's two header blocks say, which are the same for most answers."""
    call = Call(None, head=head, headers=last)
    if (fault := _head_fault(call.http_status)) is not None:
        return fault
    metadata = call.metadata()
    status = metadata.get("grpc-status", b"")
    if status == b"0":
        return None
    text = status.decode(errors="replace")
    name = STATUSES.get(int(text)) if text.isdecimal() and len(text) < 3 else None
    return Fault(name or f"status {text!r}", metadata.get("grpc-message", b"").decode(errors="replace"))
