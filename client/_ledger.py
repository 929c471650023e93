"""What is under way in one stream, and what comes of it in order, whatever becomes of its calls; does no I/O.

Knows neither threads nor tasks nor how frames and answers travel: a stream tells
it what happens, under a lock of its own if it needs one, and asks what to do.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client._core import PACKED_FRAMES, build_request, error_of_frame, parse_response
from client._errors import DeadlineExceededError, MnistGrpcError, OvertakenError, ServerError, UnavailableError
from client._types import Prediction
from protos.mnist.v1 import digit_classifier_pb2 as pb

StreamResult = Prediction | MnistGrpcError

LOST = ("UNAVAILABLE", "CANCELLED")
"""How a call ends whose connection or server has gone; any other end comes again in the next call."""

FIRST_ATTEMPTS = 4  # calls until the first answer of all, as for the other methods (`_core.channel_options`)
INITIAL_PAUSE = 0.1  # seconds, doubled with each loss that follows without an answer between
MAX_PAUSE = 1.0
JITTER = 0.2  # the callers of a server that went do not all come back at the same moment


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The last thing that comes of a stream: what to raise, if anything."""

    error: BaseException | None = None


class FrameLedger:
    """The frames of one stream: each gets exactly one result, in order, over as many calls as it takes.

    Frames that wait to be sent go together in one message, or, with
    `latest_only`, each in its own, so that newer ones can overtake older ones. A
    frame that cannot be prepared is never sent; its error takes its place among
    the results.

    The pixels of a frame are kept until it is answered, at most `window` of
    them. When a call is lost, the next one begins with the oldest frame that has
    no answer; what is told about a call that is over is ignored, so that nothing
    is sent or answered twice. With `latest_only`, the next call begins with the
    newest frame, and those before it are overtaken.
    """

    def __init__(
        self,
        target: str,
        timeout: float,
        window: int,
        latest_only: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._timeout = timeout
        self._window = window
        self._latest_only = latest_only
        self._clock = clock
        # Frames, in their order: answered, then these.
        self._answered = 0
        self._sent = 0  # so many of all frames were handed out in a message, in this call or an earlier one
        self._under_way: deque[npt.NDArray[np.uint8]] = deque()
        self._waiting: deque[npt.NDArray[np.uint8]] = deque()
        self._local: deque[tuple[int, MnistGrpcError]] = deque()  # behind how many added frames, and the error
        self._complete = False
        # Results that were not yet taken.
        self._results: deque[StreamResult] = deque()
        self._end: StreamEnd | None = None
        self._source_error: BaseException | None = None
        # Calls.
        self._call = 0  # the number of the newest
        self._in_call = False
        self._heard = False  # whether there was ever an answer
        self._losses = 0  # since the last answer
        self._lost: MnistGrpcError | None = None  # the first of these
        self._owing_since = clock()

    # From the caller's frames.

    @property
    def has_room(self) -> bool:
        """Whether fewer frames than the window are without a result that was taken."""
        return self._in_hand < self._window

    @property
    def is_short(self) -> bool:
        """Whether to wake who adds frames: a quarter of the window is free, or there is nothing to take.

        Not at each result: then two threads take turns for each frame, and a message
        carries half as many.
        """
        return not self._results or 4 * self._in_hand <= 3 * self._window

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Take the next frame, `uint8[784]`."""
        self._begin_to_owe()  # put off once it is handed out, but a call that never comes to that ends, too
        self._waiting.append(pixels)

    def fail(self, error: MnistGrpcError) -> None:
        """Put an error in the place of the next frame."""
        self._local.append((self._added, error))
        self._give()

    def complete(self, error: BaseException | None = None) -> None:
        """No more frames follow, in the end because of an error; after the answers, the server owes the end."""
        self._begin_to_owe()
        self._complete = True
        self._source_error = error
        if self._call and not self._in_call and not self._unanswered:
            self._finish()

    # To messages and from answers, in one call after another.

    @property
    def wants_call(self) -> bool:
        """Whether it is time for the next call: at once for the first, when a frame needs it for others."""
        return self._end is None and not self._in_call and (self._call == 0 or bool(self._waiting))

    def begin_call(self) -> int:
        """Count a call that is about to be made; return its number."""
        self._call += 1
        self._in_call = True
        if self._call > 1 and self._latest_only:
            self._overtake()
        return self._call

    def next_message(self, call: int) -> pb.StreamClassifyRequest | None:
        """A message with the frames that wait, up to `PACKED_FRAMES`, or with the first of them; None if none does."""
        if not self._waiting or not self.is_open(call):
            return None
        first = self._answered + len(self._under_way)
        if self._sent <= self._answered and self._lost is None:
            self._owing_since = self._clock()  # the server owes nothing that it was not asked for
        count = 1 if self._latest_only else min(len(self._waiting), PACKED_FRAMES)
        packed = [self._waiting.popleft() for _ in range(count)]
        self._under_way.extend(packed)
        self._sent = max(self._sent, first + count)
        return pb.StreamClassifyRequest(
            first_sequence=first, frames=build_request(np.stack(packed)), latest_only=self._latest_only
        )

    def sends_more(self, call: int) -> bool:
        """Whether messages of this call may follow those that there were."""
        return self.is_open(call) and (bool(self._waiting) or not self._complete)

    def is_open(self, call: int) -> bool:
        """Whether this is the call that is under way."""
        return self._in_call and call == self._call and self._end is None

    def receive(self, call: int, response: pb.StreamClassifyResponse) -> None:
        """Take answers.

        Raises:
            ServerError: these are no answers to the frames under way.
        """
        if not self.is_open(call):
            return
        for block in response.blocks:
            count = block.frame_count
            if block.first_sequence != self._answered or not 1 <= count <= len(self._under_way):
                raise ServerError(
                    f"{self._target}: the server answered {count} frames from {block.first_sequence} on when "
                    f"frames {self._answered} to {self._answered + len(self._under_way) - 1} were under way"
                )
            results: list[StreamResult]
            if block.WhichOneof("outcome") == "result":
                results = [*parse_response(block.result, count, self._target)]
            else:
                results = [error_of_frame(block.error) for _ in range(count)]
            for result in results:
                self._under_way.popleft()
                self._answer(result)
            self._owing_since = self._clock()
            self._heard, self._losses, self._lost = True, 0, None

    def end_call(self, call: int) -> None:
        """The server has ended the call without an error, which it does when all frames are answered."""
        if not self.is_open(call):
            return
        self._in_call = False
        if self._complete and not self._unanswered:
            self._finish()
        else:
            self._finish(
                ServerError(
                    f"{self._target}: the server ended the stream too early, with {self._unanswered} frames unanswered"
                )
            )

    def lose_call(self, call: int, error: MnistGrpcError) -> float:
        """The call has ended with this error; return for how many seconds not to make another one."""
        if not self.is_open(call):
            return 0.0
        self._in_call = False
        self._waiting.extendleft(reversed(self._under_way))
        self._under_way.clear()
        self._losses += 1
        self._lost = self._lost or error
        if error.code not in LOST or (not self._heard and self._losses == FIRST_ATTEMPTS):
            self._finish(error)
        elif self._complete and not self._unanswered:
            self._finish()
        doublings = self._losses - (2 if self._heard else 1)
        if doublings < 0:
            return 0.0  # there was an answer just now, and often there is another server
        return min(INITIAL_PAUSE * 2.0**doublings, MAX_PAUSE) * random.uniform(1 - JITTER, 1 + JITTER)

    def abandon(self, error: Exception) -> None:
        """End the stream with this error, behind the results that there are."""
        self._finish(error)

    # To the caller.

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be sent or answered."""
        return self._end is not None

    def take(self) -> StreamResult | StreamEnd | None:
        """The next result, or the end, also if the server does not come to it; None where neither is here."""
        if self._results:
            return self._results.popleft()
        if self.seconds_left() <= 0:
            self._overdue()
        return self._end

    def seconds_left(self) -> float:
        """How much longer to wait for the next answer, or for the end; a moment to ask again if none is owed."""
        owes = self._complete or self._unanswered > 0
        return self._owing_since + self._timeout - self._clock() if owes else self._timeout

    @property
    def _unanswered(self) -> int:
        return len(self._under_way) + len(self._waiting)

    @property
    def _added(self) -> int:
        return self._answered + self._unanswered

    @property
    def _in_hand(self) -> int:
        """How many frames are without a result that was taken."""
        return self._unanswered + len(self._local) + len(self._results)

    def _begin_to_owe(self) -> None:
        if not self._unanswered:
            self._owing_since = self._clock()

    def _answer(self, result: StreamResult) -> None:
        """Put the result of the oldest unanswered frame behind the others."""
        self._answered += 1
        self._results.append(result)
        self._give()

    def _give(self) -> None:
        """Put local errors behind the results, where it is their turn."""
        while self._local and self._local[0][0] <= self._answered:
            self._results.append(self._local.popleft()[1])

    def _overtake(self) -> None:
        while len(self._waiting) > 1:
            self._waiting.popleft()
            error = OvertakenError("a newer frame came while the connection was lost")
            error.__cause__ = self._lost.__cause__ if self._lost else None
            self._answer(error)

    def _finish(self, error: BaseException | None = None) -> None:
        if self._end is None:
            self._end = StreamEnd(self._source_error or error)

    def _overdue(self) -> None:
        if not self._unanswered:
            self._finish()  # everything is answered; the end itself is all that is missing
        elif self._lost is None:
            self._finish(DeadlineExceededError(f"{self._target}: no answer to a frame within {self._timeout:g} s"))
        else:
            reason = str(self._lost).removeprefix(f"{self._target}: ")
            error = UnavailableError(
                f"{self._target}: the connection was lost, and no answer came within {self._timeout:g} s ({reason})"
            )
            error.code = self._lost.code
            error.__cause__ = self._lost.__cause__
            self._finish(error)
