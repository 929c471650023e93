"""The ledger of a stream, without a network: each frame gets one result, in order, whatever becomes of the calls."""

from __future__ import annotations

from collections import deque
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import client
from client._ledger import FIRST_ATTEMPTS, MAX_PAUSE, FrameLedger, StreamEnd, StreamResult
from protos.mnist.v1 import digit_classifier_pb2 as pb

TARGET = "digits:50051"


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(window: int = 1000, latest_only: bool = False, clock: Clock | None = None) -> FrameLedger:
    return FrameLedger(TARGET, 10.0, window, latest_only, clock or Clock())


def frame(number: int) -> npt.NDArray[np.uint8]:
    """Pixels that tell which frame they are."""
    pixels = np.zeros(784, np.uint8)
    pixels[:4] = np.frombuffer(number.to_bytes(4, "little"), np.uint8)
    return pixels


def numbers(message: pb.StreamClassifyRequest) -> list[int]:
    """Which frames a message carries."""
    rows = np.frombuffer(message.frames.pixels, np.uint8).reshape(-1, 784)
    return [int.from_bytes(row[:4].tobytes(), "little") for row in rows]


def answer(first: int, *frames: int) -> pb.StreamClassifyResponse:
    """One block of answers whose probabilities tell which frames they are for."""
    probabilities = [number / 1024 for number in frames for _ in range(10)]
    result = pb.ClassifyResponse(digits=[number % 10 for number in frames], probabilities=probabilities)
    return pb.StreamClassifyResponse(
        blocks=[pb.FrameBlock(first_sequence=first, frame_count=len(frames), result=result)]
    )


def told(result: Any) -> Any:
    """The number of the frame that an answer is for; an error, or the end, as it is."""
    return round(1024 * float(result.probabilities[0])) if isinstance(result, client.Prediction) else result


def error(code: str = "UNAVAILABLE") -> client.MnistGrpcError:
    raised = client.UnavailableError(f"{TARGET}: it went")
    raised.code = code
    raised.__cause__ = grpc.RpcError("the cause")
    return raised


def answered(ledger: FrameLedger, frames: int = 1) -> int:
    """Have the first frames answered in a call; return its number."""
    call = ledger.begin_call()
    for number in range(frames):
        ledger.add(frame(number))
        ledger.next_message(call)
        ledger.receive(call, answer(number, number))
        assert told(ledger.take()) == number
    return call


@pytest.fixture
def ledger() -> FrameLedger:
    return make()


def rows(*digits: int) -> pb.ClassifyResponse:
    """One row a digit, with a probability of 0.91."""
    probabilities = [0.91 if column == digit else 0.01 for digit in digits for column in range(10)]
    return pb.ClassifyResponse(digits=digits, probabilities=probabilities)


def block(first: int, *digits: int) -> pb.FrameBlock:
    return pb.FrameBlock(first_sequence=first, frame_count=len(digits), result=rows(*digits))


def respond(*blocks: pb.FrameBlock) -> pb.StreamClassifyResponse:
    return pb.StreamClassifyResponse(blocks=blocks)


def send_all(ledger: FrameLedger) -> list[tuple[int, int]]:
    """Send in the first call; return first sequence and number of frames of each message."""
    if ledger.wants_call:
        assert ledger.begin_call() == 1
    sent = []
    while (waiting := ledger.next_message(1)) is not None:
        sent.append((waiting.first_sequence, len(numbers(waiting))))
    return sent


def receive(ledger: FrameLedger, *blocks: pb.FrameBlock) -> list[StreamResult]:
    """What blocks that come in the first call give."""
    ledger.receive(1, respond(*blocks))
    return taken(ledger)


def taken(ledger: FrameLedger) -> list[StreamResult]:
    results: list[StreamResult] = []
    while (result := ledger.take()) is not None:
        assert not isinstance(result, StreamEnd)
        results.append(result)
    return results


def texts(results: list[StreamResult]) -> list[int | str]:
    """Digits, and the text of errors."""
    return [result.digit if isinstance(result, client.Prediction) else str(result) for result in results]


# One call -------------------------------------------------------------------


def test_no_frame_no_message(ledger: FrameLedger) -> None:
    assert ledger.next_message(ledger.begin_call()) is None


def test_frames_that_wait_go_together(ledger: FrameLedger) -> None:
    for value in (1, 2, 3):
        ledger.add(frame(value))
    call = ledger.begin_call()
    waiting = ledger.next_message(call)
    assert waiting is not None
    assert (waiting.first_sequence, numbers(waiting)) == (0, [1, 2, 3])
    assert ledger.next_message(call) is None


def test_a_message_holds_at_most_64_frames(ledger: FrameLedger) -> None:
    for index in range(150):
        ledger.add(frame(index))
    assert send_all(ledger) == [(0, 64), (64, 64), (128, 22)]
    ledger.add(frame(0))
    assert send_all(ledger) == [(150, 1)]


def test_answers_come_out_in_the_order_of_the_frames(ledger: FrameLedger) -> None:
    for index in range(5):
        ledger.add(frame(index))
    send_all(ledger)
    assert texts(receive(ledger, block(0, 4, 3), block(2, 2))) == [4, 3, 2]
    assert texts(receive(ledger, block(3, 1, 0))) == [1, 0]


@pytest.mark.parametrize(
    ("frames", "given_out_early", "given_out_late"),
    [
        ("", [], []),
        ("x", ["bad 0"], []),
        ("xx", ["bad 0", "bad 1"], []),
        ("x.", ["bad 0"], [1]),
        (".x", [], [0, "bad 1"]),
        (".x.", [], [0, "bad 1", 2]),
        ("x..xx.x", ["bad 0"], [1, 2, "bad 3", "bad 4", 5, "bad 6"]),
    ],
)
def test_an_error_of_this_side_stands_in_its_place(
    ledger: FrameLedger, frames: str, given_out_early: list[Any], given_out_late: list[Any]
) -> None:
    for index, kind in enumerate(frames):
        if kind == ".":
            ledger.add(frame(index))
        else:
            ledger.fail(client.InvalidImageError(f"bad {index}"))
    assert texts(taken(ledger)) == given_out_early
    good = [index for index, kind in enumerate(frames) if kind == "."]
    assert send_all(ledger) == ([(0, len(good))] if good else [])
    assert texts(receive(ledger, *([block(0, *good)] if good else []))) == given_out_late


def test_an_error_is_given_out_at_once_when_nothing_is_owed(ledger: FrameLedger) -> None:
    ledger.add(frame(0))
    send_all(ledger)
    receive(ledger, block(0, 7))
    ledger.fail(client.InvalidImageError("bad"))
    assert texts(taken(ledger)) == ["bad"]


def test_an_error_block_answers_each_of_its_frames(ledger: FrameLedger) -> None:
    for index in range(3):
        ledger.add(frame(index))
    send_all(ledger)
    error = pb.FrameError(code=13, message="broken", incident_id="abc")
    results = receive(ledger, pb.FrameBlock(first_sequence=0, frame_count=2, error=error), block(2, 7))
    assert texts(results) == ["broken", "broken", 7]
    assert isinstance(results[0], client.ServerError)
    assert (results[0].code, results[0].incident_id) == ("INTERNAL", "abc")


def test_each_frame_has_an_error_object_of_its_own(ledger: FrameLedger) -> None:
    ledger.add(frame(0))
    ledger.add(frame(1))
    error = pb.FrameError(code=13, message="broken")
    send_all(ledger)
    first, second = receive(ledger, pb.FrameBlock(first_sequence=0, frame_count=2, error=error))
    assert first is not second


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (3, client.InvalidImageError),
        (4, client.DeadlineExceededError),
        (8, client.OverloadedError),
        (14, client.UnavailableError),
        (16, client.UnauthenticatedError),
        (13, client.ServerError),
        (99, client.ServerError),
    ],
)
def test_the_code_of_a_frame_error_tells_its_class(
    ledger: FrameLedger, code: int, kind: type[client.MnistGrpcError]
) -> None:
    ledger.add(frame(0))
    error = pb.FrameError(code=code, message="why")
    send_all(ledger)
    [result] = receive(ledger, pb.FrameBlock(first_sequence=0, frame_count=1, error=error))
    assert type(result) is kind
    assert result.incident_id is None


@pytest.mark.parametrize(
    "wrong",
    [
        respond(block(1, 7)),
        respond(block(0, 7, 7, 7)),
        respond(block(0, 7), block(0, 7)),
        respond(block(0, 7, 7), block(2, 7)),
        respond(pb.FrameBlock(first_sequence=0, frame_count=2, result=rows(7))),
        respond(pb.FrameBlock(first_sequence=0, frame_count=1, result=rows(7, 7))),
        respond(pb.FrameBlock(first_sequence=0, frame_count=0, result=rows(7))),
        respond(pb.FrameBlock(first_sequence=0, frame_count=1, result=pb.ClassifyResponse(digits=[7]))),
    ],
    ids=[
        "a frame skipped",
        "more frames than sent",
        "a frame twice",
        "a frame never sent",
        "fewer rows than frames",
        "more rows than frames",
        "rows for no frame",
        "no probabilities",
    ],
)
def test_answers_that_do_not_fit_the_frames_are_the_servers_fault(
    ledger: FrameLedger, wrong: pb.StreamClassifyResponse
) -> None:
    ledger.add(frame(0))
    ledger.add(frame(1))
    send_all(ledger)
    with pytest.raises(client.ServerError, match=TARGET):
        ledger.receive(1, wrong)


# Any interleaving -----------------------------------------------------------

STEPS = ["add", "add", "add", "fail", "send", "send", "answer", "answer", "call", "lose", "take", "take", "late"]


class World:
    """A caller, a ledger, and a server whose calls are lost; checks all that may never happen."""

    def __init__(self, window: int, latest_only: bool) -> None:
        self.ledger = make(window, latest_only)
        self.window = window
        self.put: list[Any] = []  # numbers of frames, and local errors in their places
        self.results: list[Any] = []
        self.call: int | None = None
        self.inbox: deque[tuple[int, int]] = deque()  # sequence number and frame, in this call
        self.next_sequence: int | None = None
        self.old: list[tuple[int, pb.StreamClassifyResponse]] = []  # answers that come after their call was lost
        self.losses_before_any_answer = 0
        self.heard = False
        self.complete = False

    def step(self, name: str, size: int) -> None:
        getattr(self, "do_" + name)(size)

    def do_add(self, _: int) -> None:
        if self.ledger.has_room and not self.complete:
            self.ledger.add(frame(len(self.put)))
            self.put.append(len(self.put))
        assert len(self.put) - len(self.results) <= self.window

    def do_fail(self, _: int) -> None:
        if self.ledger.has_room and not self.complete:
            bad = client.InvalidImageError(f"frame {len(self.put)}")
            self.ledger.fail(bad)
            self.put.append(bad)

    def do_complete(self, _: int) -> None:
        if not self.complete:
            self.complete = True
            self.ledger.complete()

    def do_call(self, _: int) -> None:
        if self.ledger.wants_call:
            self.call = self.ledger.begin_call()
            self.inbox.clear()
            self.next_sequence = None

    def do_send(self, _: int) -> None:
        if self.call is None:
            return
        assert self.ledger.next_message(self.call - 1) is None, "a call that is over sends nothing"
        if (message := self.ledger.next_message(self.call)) is not None:
            assert self.next_sequence in (None, message.first_sequence), "numbers follow each other"
            for index, number in enumerate(numbers(message)):
                self.inbox.append((message.first_sequence + index, number))
            self.next_sequence = message.first_sequence + len(numbers(message))

    def do_answer(self, size: int) -> None:
        if self.call is None or not self.inbox:
            return
        block = [self.inbox.popleft() for _ in range(min(size, len(self.inbox)))]
        self.ledger.receive(self.call, answer(block[0][0], *(number for _, number in block)))
        self.heard = True

    def do_lose(self, size: int) -> None:
        if self.call is None or (not self.heard and self.losses_before_any_answer == FIRST_ATTEMPTS - 1):
            return
        self.losses_before_any_answer += not self.heard
        if self.inbox:  # what the server had answered and the network lost, or brings too late
            block = [self.inbox.popleft() for _ in range(min(size, len(self.inbox)))]
            self.old.append((self.call, answer(block[0][0], *(number for _, number in block))))
        assert 0 <= self.ledger.lose_call(self.call, error()) <= MAX_PAUSE * 1.2
        self.call = None

    def do_late(self, _: int) -> None:
        for call, response in self.old:
            self.ledger.receive(call, response)
            self.ledger.lose_call(call, error("INTERNAL"))
            self.ledger.end_call(call)

    def do_take(self, _: int) -> None:
        result = self.ledger.take()
        if result is not None and not isinstance(result, StreamEnd):
            self.results.append(told(result))

    def settle(self) -> StreamEnd:
        """Let everything come to its end without further losses."""
        self.do_complete(0)
        while True:
            for name in ("call", "send", "late", "answer"):
                self.step(name, 1000)
            if self.call is not None and not self.inbox and not self.ledger.sends_more(self.call):
                self.ledger.end_call(self.call)
                self.call = None
            while (result := self.ledger.take()) is not None:
                if isinstance(result, StreamEnd):
                    return result
                self.results.append(told(result))


@given(
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 5)), max_size=200),
    window=st.integers(1, 200),
    latest_only=st.booleans(),
)
@example(steps=[("add", 1), ("call", 1), ("send", 1), ("lose", 3)], window=5, latest_only=False)
@settings(max_examples=200, deadline=None)
def test_each_frame_gets_one_result_in_order_over_any_number_of_lost_calls(
    steps: list[tuple[str, int]], window: int, latest_only: bool
) -> None:
    world = World(window, latest_only)
    for name, size in steps:
        world.step(name, size)
    assert world.settle() == StreamEnd()
    assert len(world.results) == len(world.put)
    for put, result in zip(world.put, world.results, strict=True):
        assert put == result or (latest_only and isinstance(put, int) and isinstance(result, client.OvertakenError))
    if frames := [index for index, put in enumerate(world.put) if isinstance(put, int)]:
        assert world.results[frames[-1]] == world.put[frames[-1]], "the newest frame is answered"


# Calls that are lost --------------------------------------------------------


def test_what_is_unanswered_is_sent_again_in_the_next_call_and_nothing_else() -> None:
    ledger = make()
    first = answered(ledger, 2)
    for number in (2, 3, 4):
        ledger.add(frame(number))
    ledger.next_message(first)
    ledger.receive(first, answer(2, 2))
    ledger.add(frame(5))
    ledger.lose_call(first, error())
    assert ledger.wants_call
    second = ledger.begin_call()
    message = ledger.next_message(second)
    assert message is not None
    assert (message.first_sequence, numbers(message)) == (3, [3, 4, 5])
    assert ledger.next_message(second) is None


def test_a_live_stream_goes_on_with_the_newest_frame_and_tells_of_the_others() -> None:
    ledger = make(latest_only=True)
    first = answered(ledger)
    ledger.add(frame(1))
    ledger.next_message(first)
    ledger.fail(bad := client.InvalidImageError("bad"))
    ledger.add(frame(2))
    ledger.lose_call(first, error())
    ledger.add(frame(3))
    second = ledger.begin_call()
    message = ledger.next_message(second)
    assert message is not None
    assert (message.first_sequence, numbers(message), message.latest_only) == (3, [3], True)
    results = [ledger.take() for _ in range(3)]
    assert results[1] is bad
    for result in (results[0], results[2]):
        assert isinstance(result, client.OvertakenError)
        assert isinstance(result.__cause__, grpc.RpcError)


def test_a_call_that_is_lost_while_nothing_is_owed_is_made_again_when_a_frame_comes() -> None:
    ledger = make()
    call = answered(ledger)
    assert ledger.lose_call(call, error()) == 0
    assert not ledger.wants_call
    assert ledger.take() is None
    ledger.add(frame(1))
    assert ledger.wants_call


def test_a_call_that_is_lost_with_everything_answered_was_the_last_one() -> None:
    before, after = make(), make()
    for ledger in (before, after):
        call = answered(ledger)
        if ledger is before:
            ledger.complete()
        ledger.lose_call(call, error())
        if ledger is after:
            ledger.complete()
        assert ledger.take() == StreamEnd()
        assert not ledger.wants_call


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "INTERNAL", "UNKNOWN"])
def test_an_error_that_another_call_would_meet_again_is_raised_at_once(code: str) -> None:
    ledger = make()
    call = answered(ledger)
    ledger.add(frame(1))
    ledger.lose_call(call, raised := error(code))
    assert ledger.take() == StreamEnd(raised)
    assert not ledger.wants_call


def test_the_first_connection_is_tried_as_often_as_by_the_other_methods() -> None:
    ledger = make()
    ledger.add(frame(0))
    for attempt in range(FIRST_ATTEMPTS):
        assert ledger.take() is None
        pause = ledger.lose_call(ledger.begin_call(), raised := error())
        assert 0.08 * 2**attempt <= pause <= 0.12 * 2**attempt
    assert ledger.take() == StreamEnd(raised)


def test_a_stream_that_had_answers_is_resumed_at_once_and_then_ever_more_slowly() -> None:
    ledger = make()
    call = answered(ledger)
    ledger.add(frame(1))
    pauses = [ledger.lose_call(call, error())]
    pauses += [ledger.lose_call(ledger.begin_call(), error()) for _ in range(20)]
    assert pauses[0] == 0
    assert 0.08 <= pauses[1] <= 0.12
    assert max(pauses) <= MAX_PAUSE * 1.2
    assert min(pauses[10:]) >= MAX_PAUSE * 0.8
    call = ledger.begin_call()
    ledger.next_message(call)
    ledger.receive(call, answer(1, 1))
    ledger.add(frame(2))
    assert ledger.lose_call(call, error()) == 0, "an answer makes up for what went before"


# Time -----------------------------------------------------------------------


def test_the_timeout_runs_while_an_answer_is_owed() -> None:
    clock = Clock()
    ledger = make(clock=clock)
    clock.now = 150  # a slow source: nothing is owed
    assert ledger.seconds_left() == 10
    ledger.add(frame(0))
    clock.now = 154
    ledger.add(frame(1))  # does not put off the answer to the first
    assert ledger.seconds_left() == 6
    send_all(ledger)
    clock.now = 158
    receive(ledger, block(0, 7))
    clock.now = 160
    assert ledger.seconds_left() == 8
    clock.now = 170
    assert ledger.seconds_left() == -2
    receive(ledger, block(1, 7))
    clock.now = 1000
    assert ledger.seconds_left() == 10


def test_the_timeout_begins_when_a_frame_is_handed_out_and_not_when_it_came() -> None:
    clock = Clock()
    ledger = make(clock=clock)
    call = ledger.begin_call()
    ledger.add(frame(0))
    clock.now += 9
    assert ledger.next_message(call) is not None
    assert ledger.seconds_left() == 10
    ledger.add(frame(1))
    clock.now += 4
    assert ledger.next_message(call) is not None
    assert ledger.seconds_left() == 6, "the first frame was handed out before"


def test_a_frame_that_is_never_handed_out_is_not_waited_for_for_ever() -> None:
    clock = Clock()
    ledger = make(clock=clock)
    ledger.begin_call()
    ledger.add(frame(0))
    clock.now += 10
    assert isinstance(ledger.take(), StreamEnd)


def test_a_frame_that_is_handed_out_again_is_owed_since_the_first_time() -> None:
    clock = Clock()
    ledger = make(clock=clock)
    call = ledger.begin_call()
    ledger.add(frame(0))
    ledger.next_message(call)
    clock.now += 4
    ledger.lose_call(call, error())
    assert ledger.next_message(ledger.begin_call()) is not None
    assert ledger.seconds_left() == 6


def test_silence_is_a_deadline_that_passed() -> None:
    clock = Clock()
    ledger = make(clock=clock)
    answered(ledger)
    clock.now += 50
    assert ledger.take() is None, "nothing is owed"
    ledger.add(frame(1))
    clock.now += 9.9
    assert ledger.take() is None
    assert ledger.seconds_left() == pytest.approx(0.1)
    clock.now += 0.1
    end = ledger.take()
    assert isinstance(end, StreamEnd)
    assert isinstance(end.error, client.DeadlineExceededError)
    assert str(end.error) == f"{TARGET}: no answer to a frame within 10 s"


def test_a_connection_that_does_not_come_back_in_time_is_unavailable_because_of_what_broke_it() -> None:
    clock = Clock()
    ledger = make(clock=clock)
    call = answered(ledger)
    ledger.add(frame(1))
    ledger.lose_call(call, first := error())
    ledger.lose_call(ledger.begin_call(), error("CANCELLED"))
    ledger.begin_call()
    clock.now += 10
    end = ledger.take()
    assert isinstance(end, StreamEnd)
    assert isinstance(end.error, client.UnavailableError)
    assert end.error.__cause__ is first.__cause__
    assert end.error.code == "UNAVAILABLE"
    assert str(end.error) == f"{TARGET}: the connection was lost, and no answer came within 10 s (it went)"


def test_a_new_call_alone_is_no_answer() -> None:
    clock = Clock()
    ledger = make(clock=clock)
    call = answered(ledger)
    ledger.add(frame(1))
    for _ in range(5):
        clock.now += 1.9
        ledger.lose_call(call, error())
        call = ledger.begin_call()
        ledger.next_message(call)
        ledger.receive(call, pb.StreamClassifyResponse())
    assert ledger.seconds_left() == pytest.approx(0.5)


# Ends -----------------------------------------------------------------------


def test_an_error_of_the_source_comes_after_the_results_that_are_owed() -> None:
    ledger = make()
    call = ledger.begin_call()
    ledger.add(frame(0))
    ledger.next_message(call)
    ledger.complete(mine := KeyError("mine"))
    assert ledger.take() is None
    ledger.lose_call(call, error())
    assert ledger.take() is None, "the frame before it is still owed"
    call = ledger.begin_call()
    ledger.next_message(call)
    ledger.receive(call, answer(0, 0))
    assert told(ledger.take()) == 0
    ledger.end_call(call)
    assert ledger.take() == StreamEnd(mine)


def test_an_abandoned_stream_gives_what_it_has_and_then_the_reason() -> None:
    ledger = make()
    call = ledger.begin_call()
    for number in (0, 1):
        ledger.add(frame(number))
    ledger.next_message(call)
    ledger.receive(call, answer(0, 0))
    ledger.abandon(reason := RuntimeError("closed"))
    ledger.receive(call, answer(1, 1))
    assert told(ledger.take()) == 0
    assert ledger.take() == StreamEnd(reason)
    assert ledger.is_over
    assert not ledger.sends_more(call)


def test_answers_to_frames_that_only_an_earlier_call_had_are_an_error() -> None:
    ledger = make()
    call = answered(ledger)
    ledger.add(frame(1))
    ledger.next_message(call)
    ledger.lose_call(call, error())
    call = ledger.begin_call()
    with pytest.raises(client.ServerError, match="answered 1 frames from 1 on"):
        ledger.receive(call, answer(1, 1))
