"""What is under way in one stream, and what comes of it in order; does no I/O."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client._core import PACKED_FRAMES, build_request, error_of_frame, parse_response
from client._errors import DeadlineExceededError, MnistGrpcError, ServerError
from client._types import Prediction
from protos.mnist.v1 import digit_classifier_pb2 as pb

StreamResult = Prediction | MnistGrpcError


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The last thing that comes of a stream: what to raise, if anything."""

    error: BaseException | None = None


class FrameLedger:
    """The frames of one stream.

    Frames that wait to be sent go together in one message, or, with
    `latest_only`, each in its own, so that newer ones can overtake older ones. A
    frame that cannot be prepared is never sent; its error takes its place among
    the answers.
    """

    def __init__(self, target: str, timeout: float, latest_only: bool = False) -> None:
        self._latest_only = latest_only
        self._target = target
        self._timeout = timeout
        self._waiting: deque[npt.NDArray[np.uint8]] = deque()
        self._added = 0
        self._answered = 0
        self._complete = False
        self._local: deque[tuple[int, MnistGrpcError]] = deque()  # behind how many added frames, and the error
        self._owing_since = time.monotonic()

    # From the caller's frames to messages.

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Take the next frame, `uint8[784]`."""
        self._begin_to_owe()
        self._waiting.append(pixels)
        self._added += 1

    def fail(self, error: MnistGrpcError) -> list[StreamResult]:
        """Put an error in the place of the next frame; return what can be given out now."""
        self._local.append((self._added, error))
        return self._due()

    def complete(self) -> None:
        """No more frames follow; after the answers, the server owes the end."""
        self._begin_to_owe()
        self._complete = True

    @property
    def is_complete(self) -> bool:
        return self._complete

    def next_message(self) -> pb.StreamClassifyRequest | None:
        """A message with the frames that wait, up to `PACKED_FRAMES`, or with the first of them; None if none does."""
        if not self._waiting:
            return None
        first = self._added - len(self._waiting)
        count = 1 if self._latest_only else min(len(self._waiting), PACKED_FRAMES)
        packed = [self._waiting.popleft() for _ in range(count)]
        return pb.StreamClassifyRequest(
            first_sequence=first, frames=build_request(np.stack(packed)), latest_only=self._latest_only
        )

    # From answers to results.

    def receive(self, response: pb.StreamClassifyResponse) -> list[StreamResult]:
        """What can be given out now, in the order of the frames.

        Raises:
            ServerError: these are no answers to the frames under way.
        """
        self._owing_since = time.monotonic()
        results = []
        for block in response.blocks:
            if block.first_sequence != self._answered or block.frame_count > self._added - self._answered:
                raise ServerError(
                    f"{self._target}: the server answered {block.frame_count} frames from {block.first_sequence} on "
                    f"when frames {self._answered} to {self._added - 1} were under way"
                )
            outcome: list[StreamResult]
            if block.WhichOneof("outcome") == "result":
                outcome = [*parse_response(block.result, block.frame_count, self._target)]
            else:
                outcome = [error_of_frame(block.error) for _ in range(block.frame_count)]
            for result in outcome:
                self._answered += 1
                results += [result, *self._due()]
        return results

    def end(self) -> StreamEnd:
        """What comes of the server's having ended the stream without an error."""
        if self._complete and self._added == self._answered:
            return StreamEnd()
        unanswered = self._added - self._answered
        return StreamEnd(
            ServerError(f"{self._target}: the server ended the stream too early, with {unanswered} frames unanswered")
        )

    # Time.

    def seconds_left(self) -> float:
        """How much longer to wait for the next answer, or for the end."""
        owes = self._complete or self._added > self._answered
        return self._owing_since + self._timeout - time.monotonic() if owes else self._timeout

    def overdue(self) -> StreamEnd:
        """What comes of waiting for longer than that."""
        if self._added == self._answered:
            return StreamEnd()  # everything is answered; the end itself is all that is missing
        return StreamEnd(DeadlineExceededError(f"{self._target}: no answer to a frame within {self._timeout:g} s"))

    def _begin_to_owe(self) -> None:
        if self._added == self._answered:
            self._owing_since = time.monotonic()

    def _due(self) -> list[StreamResult]:
        due: list[StreamResult] = []
        while self._local and self._local[0][0] <= self._answered:
            due.append(self._local.popleft()[1])
        return due
