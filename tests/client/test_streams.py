"""Streams of frames, each case for the sync and the async client."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

import client
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import Connect, Fakes, Running

GreyImage = npt.NDArray[np.uint8]


def told(results: Iterable[client.Prediction | client.MnistGrpcError]) -> list[int | str]:
    """Digits, and "bad" for errors."""
    return [result.digit if isinstance(result, client.Prediction) else "bad" for result in results]


class Endless:
    """Frames without end; counts how many were read."""

    def __init__(self, image: GreyImage, alarm_at: int = 0) -> None:
        self.read = 0
        self.alarm = threading.Event()
        """Set when frame number `alarm_at`, counted from 1, is asked for."""
        self._image = image
        self._alarm_at = alarm_at

    def __iter__(self) -> Iterator[GreyImage]:
        while True:
            self.read += 1
            if self.read == self._alarm_at:
                self.alarm.set()
            yield self._image


# Order ----------------------------------------------------------------------


def test_results_come_in_the_order_of_the_frames(
    connect: Connect, server_address: str, digits: list[GreyImage]
) -> None:
    order = np.random.default_rng(0).integers(0, 20, 1000)
    results = connect(server_address).stream_classify(digits[index] for index in order)
    assert told(results) == [index % 10 for index in order]


@pytest.mark.parametrize(
    "frames", ["", "x", "xxx", "x7", "7x", "7x7", "x7x", "77xx77x7xx", "x" * 300 + "7", "7" * 300 + "x"]
)
def test_a_bad_frame_is_told_in_its_place(
    connect: Connect, server_address: str, digits: list[GreyImage], blank: GreyImage, frames: str
) -> None:
    images = [blank if kind == "x" else digits[7] for kind in frames]
    results = list(connect(server_address).stream_classify(images))
    assert told(results) == ["bad" if kind == "x" else 7 for kind in frames]
    assert all(type(result) in (client.Prediction, client.InvalidImageError) for result in results)


def test_a_bad_frame_says_what_is_wrong(connect: Connect, server_address: str, blank: GreyImage) -> None:
    [error] = connect(server_address).stream_classify([blank])
    assert isinstance(error, client.InvalidImageError)
    assert "contrast" in str(error)


def test_a_frame_that_the_server_refuses_is_told_in_its_place(
    connect: Connect, fakes: Fakes, digits: list[GreyImage]
) -> None:
    def stream(messages: Iterable[pb.StreamClassifyRequest], _: Any) -> Iterator[pb.StreamClassifyResponse]:
        for message in messages:
            response = fakes.answer_frames(message)
            for index, digit in enumerate(list(response.blocks[0].result.digits)):
                block = pb.FrameBlock(first_sequence=message.first_sequence + index, frame_count=1)
                if digit == 3:
                    block.error.code, block.error.message, block.error.incident_id = 13, "no threes", "abc"
                else:
                    row = message.frames.pixels[784 * index : 784 * (index + 1)]
                    block.result.CopyFrom(fakes.answer(pb.ClassifyRequest(pixels=row)))
                yield pb.StreamClassifyResponse(blocks=[block])

    results = list(connect(fakes.serve(stream=stream)).stream_classify(digits[:6]))
    assert told(results) == [0, 1, 2, "bad", 4, 5]
    assert isinstance(results[3], client.ServerError)
    assert (results[3].code, results[3].incident_id, str(results[3])) == ("INTERNAL", "abc", "no threes")


def test_a_live_frame_that_was_overtaken_is_told_in_its_place(
    connect: Connect, fakes: Fakes, digits: list[GreyImage]
) -> None:
    def stream(messages: Iterable[pb.StreamClassifyRequest], _: Any) -> Iterator[pb.StreamClassifyResponse]:
        for message in messages:
            assert message.latest_only
            assert len(message.frames.pixels) == 784, "each frame comes alone, so that it can be overtaken"
            response = fakes.answer_frames(message)
            if message.first_sequence == 1:
                error = pb.FrameError(code=10, message="a newer frame came before the turn of this one")
                response.blocks[0].error.CopyFrom(error)
            yield response

    results = list(connect(fakes.serve(stream=stream)).stream_classify(digits[:3], latest_only=True))
    overtaken = results[1]
    assert isinstance(overtaken, client.OvertakenError)
    assert overtaken.code == "ABORTED"
    assert "newer frame" in str(overtaken)
    assert [result.digit for result in results if isinstance(result, client.Prediction)] == [0, 2]


def test_a_live_stream_answers_its_newest_frame(connect: Connect, server_address: str, digits: list[GreyImage]) -> None:
    results = list(connect(server_address).stream_classify(digits, latest_only=True))
    assert len(results) == 20
    assert isinstance(results[-1], client.Prediction)
    assert all(isinstance(result, client.Prediction | client.OvertakenError) for result in results)


def test_two_streams_of_one_client_do_not_mix(connect: Connect, server_address: str, digits: list[GreyImage]) -> None:
    twin = connect(server_address)
    threes = twin.stream_classify([digits[3]] * 50)
    fives = twin.stream_classify([digits[5]] * 50)
    assert {(three.digit, five.digit) for three, five in zip(threes, fives, strict=True)} == {(3, 5)}  # type: ignore[union-attr]


# The source -----------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 256])
def test_a_result_comes_while_the_source_is_still_open(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running], window: int
) -> None:
    results: list[int | str] = []
    taken = threading.Event()

    def frames() -> Iterator[GreyImage]:
        for index in range(3):
            yield digits[index]
            assert taken.wait(5), "the result of a frame waits for the next frame"
            taken.clear()

    def consume() -> None:
        for result in connect(fakes.serve()).stream_classify(frames(), window=window):
            results.extend(told([result]))
            taken.set()

    start(consume).result(within=10)
    assert results == [0, 1, 2]


@pytest.mark.parametrize("window", [1, 5, 100])
def test_the_source_is_read_no_further_than_the_window(
    connect: Connect, server_address: str, digits: list[GreyImage], window: int
) -> None:
    frames = Endless(digits[7], alarm_at=3 + window + 1)
    results = connect(server_address).stream_classify(frames, window=window)
    assert told(next(results) for _ in range(3)) == [7, 7, 7]
    too_far = frames.alarm.wait(0.2)
    results.close()
    assert not too_far


def test_the_source_is_read_as_far_as_the_window(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    def never(_: Any, context: Any) -> Iterator[pb.StreamClassifyResponse]:
        fakes.stopping.wait(20)
        yield from ()

    frames = Endless(digits[7], alarm_at=8)
    results = connect(fakes.serve(stream=never)).stream_classify(frames, window=8)
    running = start(lambda: list(results))
    assert frames.alarm.wait(10)
    fakes.close()
    with pytest.raises(client.MnistGrpcError):
        running.result()


def test_a_slow_consumer_gets_every_result(connect: Connect, server_address: str, digits: list[GreyImage]) -> None:
    frames = Endless(digits[7], alarm_at=20)
    results = connect(server_address, timeout=0.5).stream_classify(frames, window=20)
    assert told([next(results)]) == [7]
    assert frames.alarm.wait(10)
    threading.Event().wait(0.7)  # longer than the timeout, which the server does not owe
    assert told(next(results) for _ in range(100)) == [7] * 100
    results.close()


def test_a_slow_source_is_no_timeout(connect: Connect, server_address: str, digits: list[GreyImage]) -> None:
    def frames() -> Iterator[GreyImage]:
        for image in digits[:3]:
            threading.Event().wait(0.5)
            yield image

    assert told(connect(server_address).stream_classify(frames(), timeout=0.3)) == [0, 1, 2]


def test_an_error_of_the_source_is_raised_after_the_results_before_it(
    connect: Connect, server_address: str, digits: list[GreyImage]
) -> None:
    def frames() -> Iterator[GreyImage]:
        yield from digits[:3]
        raise KeyError("mine")

    results = connect(server_address).stream_classify(frames())
    assert told(next(results) for _ in range(3)) == [0, 1, 2]
    with pytest.raises(KeyError, match="mine"):
        next(results)


def test_frames_that_cannot_be_iterated_are_the_callers_mistake(connect: Connect, server_address: str) -> None:
    with pytest.raises(TypeError):
        list(connect(server_address).stream_classify(7))  # type: ignore[arg-type]


def test_an_error_of_the_source_is_raised_although_the_server_has_gone(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    def frames() -> Iterator[GreyImage]:
        yield digits[7]
        fakes.close()
        raise KeyError("mine")

    results = connect(fakes.serve(), timeout=0.5).stream_classify(frames())
    with pytest.raises(KeyError, match="mine"):
        start(lambda: list(results)).result(within=10)


@pytest.mark.parametrize("when", ["waits for room", "has ended", "failed"])
def test_a_generator_is_closed_when_the_stream_is_left(
    connect: Connect, server_address: str, digits: list[GreyImage], when: str
) -> None:
    closed = threading.Event()

    def frames() -> Iterator[GreyImage]:
        try:
            yield digits[7]
            if when == "failed":
                raise KeyError("mine")
            yield from [] if when == "has ended" else Endless(digits[7])
        finally:
            closed.set()

    results = connect(server_address).stream_classify(frames(), window=3)
    assert told([next(results)]) == [7]
    results.close()
    assert closed.wait(10)


def test_a_generator_that_waits_is_closed_once_it_gives_back_control(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    waiting, go, closed = threading.Event(), threading.Event(), threading.Event()

    def frames() -> Iterator[GreyImage]:
        try:
            yield digits[7]
            waiting.set()
            go.wait(20)
            yield digits[7]
        finally:
            closed.set()

    results = connect(fakes.serve()).stream_classify(frames())
    assert told([next(results)]) == [7]
    assert waiting.wait(10)
    start(results.close).result(within=5)
    assert not closed.is_set()
    go.set()
    assert closed.wait(10)


def test_what_is_no_generator_is_left_as_it_is(connect: Connect, server_address: str, digits: list[GreyImage]) -> None:
    class Film:
        def __init__(self) -> None:
            self.shown = 0
            self.closed = False

        def __iter__(self) -> Film:
            return self

        def __next__(self) -> GreyImage:
            self.shown += 1
            return digits[7]

        def close(self) -> None:
            self.closed = True

    film = Film()
    results = connect(server_address).stream_classify(film, window=2)
    assert told([next(results)]) == [7]
    results.close()
    assert not film.closed


@pytest.mark.parametrize("window", [0, -1, 2.5, float("nan"), float("inf"), True, "x", None])
def test_a_window_that_is_no_whole_number_of_1_or_more_is_refused(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running], window: Any
) -> None:
    twin = connect(fakes.serve())
    with pytest.raises(ValueError, match=rf"window.*1 or more, not {window!r}$"):
        start(lambda: list(twin.stream_classify(digits, window=window))).result(within=3)


def test_a_window_may_be_a_whole_number_of_numpys(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    whole: Any = np.int64(2)
    assert told(connect(fakes.serve()).stream_classify(digits[:3], window=whole)) == [0, 1, 2]


@pytest.mark.parametrize(
    "image", ["7.png", b"abc", Path("7.png"), io.BytesIO(b"abc"), np.zeros((28, 28), np.uint8)], ids=type
)
def test_one_image_is_not_taken_for_frames(connect: Connect, fakes: Fakes, image: Any) -> None:
    with pytest.raises(TypeError, match=r"several images are expected, .* put it in a list"):
        connect(fakes.serve()).stream_classify(image)


def test_an_array_of_images_is_frames(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    assert told(connect(fakes.serve()).stream_classify(np.stack(digits[:3]))) == [0, 1, 2]


# The end --------------------------------------------------------------------


def test_leaving_early_ends_the_call(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    ended = threading.Event()

    def stream(messages: Iterable[pb.StreamClassifyRequest], context: Any) -> Iterator[pb.StreamClassifyResponse]:
        context.add_callback(ended.set)
        yield from map(fakes.answer_frames, messages)

    results = connect(fakes.serve(stream=stream)).stream_classify(Endless(digits[7]))
    assert told([next(results)]) == [7]
    assert not ended.is_set()
    results.close()
    assert ended.wait(10)


def test_leaving_by_an_error_of_the_callers_ends_the_call(
    connect: Connect, fakes: Fakes, digits: list[GreyImage]
) -> None:
    ended = threading.Event()

    def stream(messages: Iterable[pb.StreamClassifyRequest], context: Any) -> Iterator[pb.StreamClassifyResponse]:
        context.add_callback(ended.set)
        yield from map(fakes.answer_frames, messages)

    twin = connect(fakes.serve(stream=stream))

    def consume() -> None:
        for _ in twin.stream_classify(Endless(digits[7])):
            raise KeyError("mine")

    with pytest.raises(KeyError):
        consume()
    assert ended.wait(10)


def test_a_stream_that_is_never_iterated_makes_no_call(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    frames = Endless(digits[7])
    connect(fakes.nobody()).stream_classify(frames).close()
    assert frames.read == 0


def test_the_server_sees_the_end_of_the_frames(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    received: list[int] = []
    ended = threading.Event()

    def stream(messages: Iterable[pb.StreamClassifyRequest], _: Any) -> Iterator[pb.StreamClassifyResponse]:
        for message in messages:
            received.append(len(message.frames.pixels) // 784)
            yield fakes.answer_frames(message)
        ended.set()

    results = connect(fakes.serve(stream=stream)).stream_classify([digits[7]] * 150)
    assert told(results) == [7] * 150
    assert ended.wait(10)
    assert sum(received) == 150
    assert max(received) <= 64


# Faults ---------------------------------------------------------------------


@pytest.mark.parametrize("place", ["black_hole", "nobody"])
@pytest.mark.parametrize("frames", ["", "x", "7"], ids=["no frames", "a bad frame", "a good frame"])
def test_a_stream_without_a_server_ends(
    connect: Connect,
    fakes: Fakes,
    digits: list[GreyImage],
    blank: GreyImage,
    start: Callable[..., Running],
    frames: str,
    place: str,
) -> None:
    twin = connect(getattr(fakes, place)())
    images = [blank if kind == "x" else digits[7] for kind in frames]
    running = start(lambda: list(twin.stream_classify(images, timeout=0.3)))
    try:
        results = running.result(within=5)
    except (client.DeadlineExceededError, client.UnavailableError):
        return
    assert told(results) == ["bad"] * frames.count("x")
    assert "7" not in frames


def test_a_server_that_stops_answering_runs_into_the_timeout(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    def stream(messages: Iterator[pb.StreamClassifyRequest], _: Any) -> Iterator[pb.StreamClassifyResponse]:
        yield fakes.answer_frames(next(messages))
        fakes.stopping.wait(20)

    address = fakes.serve(stream=stream)
    results = connect(address).stream_classify(Endless(digits[7]), timeout=1)
    assert told([next(results)]) == [7]
    with pytest.raises(client.DeadlineExceededError, match=rf"^{address}: .* within 1 s"):
        start(lambda: list(results)).result(within=5)


def test_a_server_that_answers_all_and_never_ends_the_call_is_not_waited_for_for_ever(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    def stream(messages: Iterable[pb.StreamClassifyRequest], _: Any) -> Iterator[pb.StreamClassifyResponse]:
        yield from map(fakes.answer_frames, messages)
        fakes.stopping.wait(20)

    results = connect(fakes.serve(stream=stream)).stream_classify(digits[:3], timeout=0.3)
    assert told(next(results) for _ in range(3)) == [0, 1, 2]
    with suppress(client.DeadlineExceededError):  # this, or the end: both are right
        assert start(lambda: list(results)).result(within=5) == []


def nothing(_: Fakes, messages: Iterator[pb.StreamClassifyRequest], __: Any) -> Iterator[pb.StreamClassifyResponse]:
    next(messages)
    yield from ()


def one_answer_and_the_end(
    fakes: Fakes, messages: Iterator[pb.StreamClassifyRequest], _: Any
) -> Iterator[pb.StreamClassifyResponse]:
    yield fakes.answer_frames(next(messages))


def wrong_number(
    fakes: Fakes, messages: Iterator[pb.StreamClassifyRequest], _: Any
) -> Iterator[pb.StreamClassifyResponse]:
    for message in messages:
        response = fakes.answer_frames(message)
        response.blocks[0].first_sequence += 1
        yield response


def the_same_twice(
    fakes: Fakes, messages: Iterator[pb.StreamClassifyRequest], _: Any
) -> Iterator[pb.StreamClassifyResponse]:
    response = fakes.answer_frames(next(messages))
    while True:
        yield response


def frames_that_nobody_sent(
    fakes: Fakes, messages: Iterator[pb.StreamClassifyRequest], _: Any
) -> Iterator[pb.StreamClassifyResponse]:
    response = fakes.answer_frames(next(messages))
    response.blocks[0].frame_count = 1_000_000
    yield response
    fakes.stopping.wait(20)


def rows_that_do_not_fit(
    fakes: Fakes, messages: Iterator[pb.StreamClassifyRequest], _: Any
) -> Iterator[pb.StreamClassifyResponse]:
    response = fakes.answer_frames(next(messages))
    response.blocks[0].result.probabilities.append(0.5)
    yield response
    fakes.stopping.wait(20)


def broken(
    fakes: Fakes, messages: Iterator[pb.StreamClassifyRequest], context: Any
) -> Iterator[pb.StreamClassifyResponse]:
    yield fakes.answer_frames(next(messages))
    context.abort(grpc.StatusCode.INTERNAL, "broken")


def draining(
    fakes: Fakes, messages: Iterator[pb.StreamClassifyRequest], context: Any
) -> Iterator[pb.StreamClassifyResponse]:
    next(messages)
    context.abort(grpc.StatusCode.UNAVAILABLE, "about to stop")
    yield from ()


@pytest.mark.parametrize(
    "stream",
    [
        nothing,
        one_answer_and_the_end,
        wrong_number,
        the_same_twice,
        frames_that_nobody_sent,
        rows_that_do_not_fit,
        broken,
        draining,
    ],
)
def test_a_stream_that_goes_wrong_is_an_error_and_no_hang(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running], stream: Callable[..., Any]
) -> None:
    address = fakes.serve(stream=lambda messages, context: stream(fakes, messages, context))
    results = connect(address).stream_classify(Endless(digits[7]))
    with pytest.raises((client.ServerError, client.UnavailableError), match=f"^{address}"):
        start(lambda: list(results)).result(within=5)


def test_a_stream_that_ends_too_early_is_not_taken_for_complete(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    def stream(messages: Iterator[pb.StreamClassifyRequest], _: Any) -> Iterator[pb.StreamClassifyResponse]:
        yield fakes.answer_frames(next(messages))

    results = connect(fakes.serve(stream=stream)).stream_classify([digits[7]] * 500)
    with pytest.raises((client.ServerError, client.UnavailableError)):
        start(lambda: list(results)).result(within=5)


def test_a_connection_that_breaks_and_is_not_made_again_ends_the_stream(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    results = connect(fakes.serve(), timeout=2).stream_classify(Endless(digits[7]))
    assert told([next(results)]) == [7]
    fakes.close()
    with pytest.raises(client.UnavailableError):
        start(lambda: list(results)).result(within=5)


def test_closing_the_client_ends_a_stream_that_waits_for_its_source(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    def frames() -> Iterator[GreyImage]:
        yield digits[7]
        fakes.stopping.wait(20)

    twin = connect(fakes.serve())
    results = twin.stream_classify(frames())
    assert told([next(results)]) == [7]
    running = start(lambda: list(results))
    start(twin.close).result(within=5)
    with pytest.raises(RuntimeError, match="the client is closed"):
        running.result(within=5)


def test_closing_the_client_ends_a_stream_that_waits_for_its_server(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    begun = threading.Event()

    def never(_: Any, context: Any) -> Iterator[pb.StreamClassifyResponse]:
        begun.set()
        fakes.stopping.wait(20)
        yield from ()

    twin = connect(fakes.serve(stream=never))
    running = start(lambda: list(twin.stream_classify(digits)))
    assert begun.wait(10)
    start(twin.close).result(within=5)
    with pytest.raises(RuntimeError, match="the client is closed"):
        running.result(within=5)


def test_closing_the_client_ends_a_stream_that_waits_to_be_resumed(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    twin = connect(fakes.serve())
    results = twin.stream_classify(Endless(digits[7]))
    assert told([next(results)]) == [7]
    fakes.close()
    running = start(lambda: list(results))
    start(twin.close).result(within=5)
    with pytest.raises(RuntimeError, match="the client is closed"):
        running.result(within=5)


def test_closing_the_client_ends_a_stream_whose_caller_is_elsewhere(
    connect: Connect, fakes: Fakes, digits: list[GreyImage]
) -> None:
    ended = threading.Event()

    def stream(messages: Iterable[pb.StreamClassifyRequest], context: Any) -> Iterator[pb.StreamClassifyResponse]:
        context.add_callback(ended.set)
        yield from map(fakes.answer_frames, messages)

    twin = connect(fakes.serve(stream=stream))
    results = twin.stream_classify(Endless(digits[7]), window=3)
    assert told([next(results)]) == [7]
    twin.close()
    assert ended.wait(10)
    given: list[Any] = []
    with pytest.raises(RuntimeError, match="the client is closed"):
        given += results
    assert len(given) <= 3
