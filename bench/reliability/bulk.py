"""The bulk of a soak: calls of every kind over bare connections, to servers that come and go, some of them cancelled.

A server that drains ends its connections in order, and tells which calls it has
not begun. These are made again, on another connection, and so are those that it
refuses with UNAVAILABLE; of a stream, the frames that were not answered yet.
grpcio's server ends calls that have come, and that it has not taken in, with
CANCELLED. A call that gets no answer at all is lost.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import random
import select
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from bench.reliability.common import HANG_SECONDS, BrokenRule, Known
from bench.reliability.loads import OUTPUTS
from client.load.images import IMAGES
from client.load.wire import Call, Connection, ConnectionEnded
from digits.preprocessing import PIXELS
from protos.inference import grpc_inference_service_pb2 as oip
from protos.mnist.v1 import digit_classifier_pb2 as pb

CLASSIFY, STREAM = "/mnist.v1.DigitClassifier/Classify", "/mnist.v1.DigitClassifier/StreamClassify"
INFER, PLAIN = "/inference.GRPCInferenceService/ModelInfer", "/v1/classify"
SHARES = {CLASSIFY: 0.75, STREAM: 0.1, INFER: 0.1, PLAIN: 0.05}
"""Of all calls; a transport without plain HTTP is asked by `Classify` instead."""

SIZES = (1, 1, 1, 1, 1, 1, 2, 8, 32)
"""Images of a call, or of a message of a stream."""
STREAM_MESSAGES = 4
CANCELLED_SHARE = 0.1
CANCELLED_AFTER = (0, 0, 1, 5)
"""Turns of the loop; with 0, the call and its end go out together."""
CONNECTIONS = 2
"""To each server."""
IN_FLIGHT = 24
"""On each of them."""
RECONNECT_SECONDS = 0.05
MAX_COMPLAINTS = 5
OK, CANCELLED, UNAVAILABLE = b"0", b"1", b"14"


@dataclass
class Tally:
    """What became of calls."""

    ended: Counter[str] = field(default_factory=Counter)
    """By kind and end."""
    images: int = 0
    again: Counter[str] = field(default_factory=Counter)
    """Calls that were made again, by what the server said."""
    wrong: int = 0
    lost: int = 0
    complaints: list[str] = field(default_factory=list)
    """Of wrong answers and lost calls, the first ones."""

    @property
    def calls(self) -> int:
        return sum(self.ended.values()) + self.wrong + self.lost

    def add(self, other: Tally) -> None:
        self.ended += other.ended
        self.images += other.images
        self.again += other.again
        self.wrong += other.wrong
        self.lost += other.lost
        self.complaints = (self.complaints + other.complaints)[:MAX_COMPLAINTS]

    def note_wrong(self, complaint: str) -> None:
        self.wrong += 1
        self.complaints = [*self.complaints, complaint][:MAX_COMPLAINTS]

    def note_lost(self, complaint: str) -> None:
        self.lost += 1
        self.complaints = [*self.complaints, complaint][:MAX_COMPLAINTS]


@dataclass(frozen=True)
class Job:
    """A call that is to be made."""

    path: str
    start: int
    """The first image."""
    counts: tuple[int, ...]
    """Images of each message."""
    cancelled: bool = False

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[1] if self.path != PLAIN else "plain HTTP"


class Place:
    """Where a connection to a server is, or will be again."""

    def __init__(self, target: str) -> None:
        self.connection: Connection | None = None
        self._target = target
        self._next = 0.0

    def renew(self) -> None:
        """Connect if there is no connection, and the last try was not a moment ago."""
        if self.connection is None and (now := time.monotonic()) >= self._next:
            self._next = now + RECONNECT_SECONDS
            with contextlib.suppress(OSError, ConnectionEnded):  # perhaps nobody is there now
                self.connection = Connection(self._target, CLASSIFY)

    def drop(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def load(targets: list[str], answers: Known, calls: int, seed: int, done: str, transport: str) -> Tally:
    """Call until so many calls have ended, and a file has appeared."""
    return _Load(targets, answers, seed, transport).run(calls, done)


class _Load:
    def __init__(self, targets: list[str], answers: Known, seed: int, transport: str) -> None:
        self._answers = answers
        self._random = random.Random(seed)
        self._has_plain = transport == "asgi"
        self._takes_back = transport == "grpcio"
        self._places = [Place(target) for target in targets for _ in range(CONNECTIONS)]
        self._again: deque[Job] = deque()
        self._untaken: dict[Connection, list[Job]] = {}  # CANCELLED by a server that may be about to say that it drains
        self._doomed: deque[tuple[int, Connection, Call]] = deque()
        self._turn = 0
        self._tally = Tally()
        self._ended_at = time.monotonic()

    def run(self, calls: int, done: str) -> Tally:
        made = 0
        while True:
            self._turn += 1
            is_over = made >= calls and os.path.exists(done)
            for place in self._places:
                place.renew()
                connection = place.connection
                while connection is not None and connection.is_ready and connection.has_room:
                    if len(connection.open) >= IN_FLIGHT or (is_over and not self._again):
                        break
                    made += not self._again
                    self._begin(connection, self._again.popleft() if self._again else self._new())
            self._cancel()
            self._exchange()
            if is_over and not self._again and not any(self._open()):
                for place in self._places:
                    place.drop()
                for connection in list(self._untaken):
                    self._settle_untaken(connection)
                return self._tally
            if time.monotonic() > self._ended_at + HANG_SECONDS:
                raise BrokenRule(f"{sum(self._open())} calls hang")

    def _open(self) -> list[int]:
        return [len(place.connection.open) for place in self._places if place.connection is not None]

    def _new(self) -> Job:
        (path,) = self._random.choices(list(SHARES), list(SHARES.values()))
        if path == PLAIN and not self._has_plain:
            path = CLASSIFY
        messages = STREAM_MESSAGES if path == STREAM else 1
        counts = tuple(self._random.choices(SIZES, k=messages))
        return Job(path, self._random.randrange(IMAGES), counts, self._random.random() < CANCELLED_SHARE)

    def _begin(self, connection: Connection, job: Job) -> None:
        if job.path == PLAIN:
            call = connection.post(job.path, "application/json", self._body(job.start, job.counts[0]), job)
        elif job.path == STREAM:
            firsts = np.cumsum([job.start, *job.counts[:-1]]).tolist()
            messages = [self._frames(first, count) for first, count in zip(firsts, job.counts, strict=True)]
            call = connection.call(*messages, tag=job, path=job.path)
        else:
            make = self._tensor if job.path == INFER else self._images
            call = connection.call(make(job.start, job.counts[0]), tag=job, path=job.path)
        if job.cancelled:
            self._doomed.append((self._turn + self._random.choice(CANCELLED_AFTER), connection, call))

    def _cancel(self) -> None:
        for _ in range(len(self._doomed)):
            turn, connection, call = self._doomed.popleft()
            if turn > self._turn:
                self._doomed.append((turn, connection, call))
            elif connection.cancel(call):
                self._tally.ended[f"{call.tag.name}, cancelled"] += 1

    def _exchange(self) -> None:
        connections = {place.connection: place for place in self._places if place.connection is not None}
        writing = [connection for connection in connections if connection.wants_to_write]
        readable, writable, _ = select.select(list(connections), writing, [], RECONNECT_SECONDS)
        for connection in {*readable, *writable}:
            try:
                for call in connection.exchange():
                    self._end(call, connection)
                is_left = connection.is_leaving and not connection.open
            except ConnectionEnded as error:
                for call in connection.open.values():
                    self._tally.note_lost(f"{call.tag}: {error}")
                connection.open.clear()
                is_left = True
            if is_left or connection.is_leaving:
                self._settle_untaken(connection)
            if is_left:
                connections[connection].drop()

    def _settle_untaken(self, connection: Connection) -> None:
        """Make calls again that were CANCELLED by a server that drains; by any other, they are wrong."""
        for job in self._untaken.pop(connection, []):
            if connection.is_leaving:
                self._make_again(job, "CANCELLED, and not taken in")
            else:
                self._tally.note_wrong(f"{job}: it was CANCELLED by a server that does not drain")

    def _end(self, call: Call, connection: Connection) -> None:
        job: Job = call.tag
        self._ended_at = time.monotonic()
        if call.was_not_begun:
            self._make_again(job, "not begun")
            return
        if self._takes_back and call.reset is None and call.metadata().get("grpc-status") == CANCELLED:
            self._untaken.setdefault(connection, []).append(job)
            return
        if call.reset is not None:
            self._tally.note_lost(f"{job} was reset with {call.reset}")
            return
        try:
            answered = self._check(job, call)
        except BrokenRule as error:
            self._tally.note_wrong(f"{job}: {error}")
            return
        if answered == len(job.counts):
            self._tally.images += sum(job.counts)
            self._tally.ended[f"{job.name}, right answers"] += 1
        else:  # the rest, where it was refused
            self._tally.images += sum(job.counts[:answered])
            rest = Job(job.path, job.start + sum(job.counts[:answered]), job.counts[answered:])
            self._make_again(rest, "UNAVAILABLE")

    def _make_again(self, job: Job, reason: str) -> None:
        self._tally.again[reason] += 1
        self._again.append(job)

    # Requests ----------------------------------------------------------------------------

    @functools.cache  # noqa: B019 - there is one load in a process
    def _images(self, start: int, count: int) -> bytes:
        return self._answers.request(self._answers.rows(start, count)).SerializeToString()

    @functools.cache  # noqa: B019
    def _frames(self, first: int, count: int) -> bytes:
        frames = self._answers.request(self._answers.rows(first, count))
        return pb.StreamClassifyRequest(first_sequence=first, frames=frames).SerializeToString()

    @functools.cache  # noqa: B019
    def _tensor(self, start: int, count: int) -> bytes:
        tensor = oip.ModelInferRequest.InferInputTensor(name="pixels", datatype="UINT8", shape=[count, PIXELS])
        pixels = self._answers.pixels[self._answers.rows(start, count)].tobytes()
        return oip.ModelInferRequest(
            model_name="mnist", inputs=[tensor], raw_input_contents=[pixels]
        ).SerializeToString()

    @functools.cache  # noqa: B019
    def _body(self, start: int, count: int) -> bytes:
        pixels = self._answers.pixels[self._answers.rows(start, count)].tobytes()
        return json.dumps({"pixels": base64.b64encode(pixels).decode()}).encode()

    # Answers -----------------------------------------------------------------------------

    def _check(self, job: Job, call: Call) -> int:
        """Return how many of the messages were answered, which is less than all only where a server is about to stop.

        Raises:
            BrokenRule: an answer is wrong, or there is none.
        """
        if job.path == PLAIN:
            return self._check_plain(job, call)
        metadata = call.metadata()
        status = metadata.get("grpc-status")
        if status not in (OK, UNAVAILABLE):
            raise BrokenRule(f"it ended with {status!r}: {metadata.get('grpc-message')!r}")
        if job.path == STREAM:
            answered = self._check_stream(job, call)
            if status == OK and answered != len(job.counts):
                raise BrokenRule(f"{answered} of {len(job.counts)} messages were answered")
            return answered
        if status != OK:
            return 0
        rows = self._answers.rows(job.start, job.counts[0])
        if job.path == INFER:
            response = oip.ModelInferResponse.FromString(call.message)
            columns = {
                output.name: np.frombuffer(raw, OUTPUTS[output.name])
                for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
            }
            self._answers.check_columns(response.model_version, rows, columns["digit"], columns["probabilities"])
        else:
            self._answers.check(pb.ClassifyResponse.FromString(call.message), rows)
        return 1

    def _check_stream(self, job: Job, call: Call) -> int:
        answered, first = 0, job.start
        for content in call.take_messages():
            for block in pb.StreamClassifyResponse.FromString(content).blocks:
                if block.first_sequence != first or block.WhichOneof("outcome") != "result":
                    raise BrokenRule(f"frame {first} was to be answered, here is {block}")
                self._answers.check(block.result, self._answers.rows(first, block.frame_count))
                first += block.frame_count
                while answered < len(job.counts) and job.start + sum(job.counts[: answered + 1]) <= first:
                    answered += 1
        if call.body:
            raise BrokenRule(f"{len(call.body)} bytes are left of a message that did not come as a whole")
        if first != job.start + sum(job.counts[:answered]):
            raise BrokenRule(f"a message was answered in part: frames up to {first} of {job.counts} were")
        return answered

    def _check_plain(self, job: Job, call: Call) -> int:
        status = call.metadata().get(":status")
        if status == b"503":
            return 0
        if status != b"200":
            raise BrokenRule(f"it was answered with {status!r}: {call.body!r}")
        answer = json.loads(call.body)
        self._answers.check_columns(
            answer["receipt"]["modelVersion"],
            self._answers.rows(job.start, job.counts[0]),
            answer["digits"],
            answer["probabilities"],
        )
        return 1
