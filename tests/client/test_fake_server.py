"""`client.testing.FakeServer`: what it is told happens over the wire, for the sync and the async client."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import client
from client.testing import FakeServer, digit_png
from digits.preprocessing import to_pixels
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierStub

if TYPE_CHECKING:
    from tests.client.conftest import Connect, Running, Twin

ROOT = Path(__file__).parents[2]
SEVEN = digit_png(7)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def twin(server: FakeServer, connect: Connect) -> Twin:
    return connect(server.target)


def told(results: Any) -> list[int | str]:
    """Digits, and the names of errors."""
    return [result.digit if isinstance(result, client.Prediction) else type(result).__name__ for result in results]


def pixels_of(digit: int) -> npt.NDArray[np.uint8]:
    return to_pixels(digit_png(digit)).reshape(784)


# Answers --------------------------------------------------------------------


def test_untold_it_reads_the_digits_that_it_ships(twin: Twin) -> None:
    assert told(twin.classify_batch([digit_png(digit) for digit in range(10)])) == [*range(10)]


def test_a_real_server_reads_the_digits_that_it_ships(connect: Connect, server_address: str) -> None:
    assert told(connect(server_address).classify_batch([digit_png(digit) for digit in range(10)])) == [*range(10)]


@pytest.mark.parametrize("digit", [-1, 10, 3.0, "3", True, None])
def test_there_are_ten_digits(digit: Any) -> None:
    with pytest.raises(ValueError, match=r"a digit is a whole number from 0 to 9, not .*"):
        digit_png(digit)


def test_it_answers_one_digit_for_all_images(server: FakeServer, twin: Twin) -> None:
    server.answers = 4
    assert told(twin.classify_batch([SEVEN] * 3)) == [4, 4, 4]
    assert server.answers == 4


def test_it_answers_in_the_order_of_a_list(server: FakeServer, twin: Twin) -> None:
    server.answers = [3, 1, 4]
    assert told([twin.classify(SEVEN), *twin.classify_batch([SEVEN, SEVEN])]) == [3, 1, 4]


def test_it_answers_what_a_generator_yields(server: FakeServer, twin: Twin) -> None:
    server.answers = (digit for digit in (3, 1))
    assert told(twin.classify_batch([SEVEN] * 2)) == [3, 1]


def test_it_answers_what_a_function_makes_of_the_pixels(server: FakeServer, twin: Twin) -> None:
    server.answers = lambda pixels: 1 if np.array_equal(pixels, pixels_of(7)) else 0
    assert told(twin.classify_batch([SEVEN, digit_png(2)])) == [1, 0]


def test_a_digit_is_answered_with_ninety_nine_percent(server: FakeServer, twin: Twin) -> None:
    server.answers = 2
    prediction = twin.classify(SEVEN)
    assert prediction.confidence == pytest.approx(0.99)
    assert prediction.probabilities.sum() == pytest.approx(1)


def test_an_answer_may_have_a_confidence(server: FakeServer, twin: Twin) -> None:
    server.answers = [(2, 0.55)]
    prediction = twin.classify(SEVEN)
    assert prediction.digit == 2
    assert prediction.confidence == pytest.approx(0.55)
    assert prediction.probabilities.sum() == pytest.approx(1)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_an_answer_may_be_ten_probabilities(server: FakeServer, twin: Twin, kind: Callable[..., Any]) -> None:
    row = [0.1, 0.4, 0.3, 0.2, 0, 0, 0, 0, 0, 0]
    server.answers = [kind(row)]
    prediction = twin.classify(SEVEN)
    assert prediction.digit == 1
    np.testing.assert_allclose(prediction.probabilities, row, rtol=1e-6)


def test_an_answer_with_little_confidence_looks_like_no_digit(server: FakeServer, twin: Twin) -> None:
    server.answers = [(7, 0.15), (7, 0.25)] * 2
    for results in (twin.classify_batch([SEVEN] * 2), twin.stream_classify([SEVEN] * 2)):
        unsure, sure = (result for result in results if isinstance(result, client.Prediction))
        assert (unsure.digit, unsure.is_digit) == (7, False)
        assert (sure.digit, sure.is_digit) == (7, True)
        assert [unsure.digit_score, sure.digit_score] == pytest.approx([1.5, 2.5])


def test_the_fakes_model_decides_what_looks_like_a_digit_and_what_classes_mean(server: FakeServer, twin: Twin) -> None:
    assert server.model.digit_threshold == twin.get_model().digit_threshold == 2
    server.model = dataclasses.replace(server.model, digit_threshold=9.95)
    assert twin.classify(SEVEN).is_digit is False
    server.model = dataclasses.replace(server.model, digit_threshold=None, labels=tuple("abcdefghij"))
    prediction = twin.classify(SEVEN)
    assert (prediction.is_digit, prediction.label) == (None, "h")
    assert twin.get_model().digit_threshold is None


@pytest.mark.parametrize("error", [client.ServerError, client.ServerError("broken")])
def test_an_answer_may_be_an_error(server: FakeServer, twin: Twin, error: Any) -> None:
    server.answers = [1, error, 2]
    assert twin.classify(SEVEN).digit == 1
    with pytest.raises(client.ServerError):
        twin.classify(SEVEN)
    assert twin.classify(SEVEN).digit == 2


def test_a_function_may_raise_an_error_of_the_client(server: FakeServer, twin: Twin) -> None:
    def refuse(pixels: npt.NDArray[np.uint8]) -> int:
        raise client.InvalidImageError("no sevens, please")

    server.answers = refuse
    with pytest.raises(client.InvalidImageError, match="no sevens, please"):
        twin.classify(SEVEN)


def test_an_error_takes_its_frames_place_in_a_stream(server: FakeServer, twin: Twin) -> None:
    server.answers = [1, client.InvalidImageError("bad"), 3, client.OvertakenError, client.ServerError, 6]
    results = list(twin.stream_classify([SEVEN] * 6))
    assert told(results) == [1, "InvalidImageError", 3, "OvertakenError", "ServerError", 6]
    assert str(results[1]) == "bad"


@pytest.mark.parametrize("latest_only", [False, True])
def test_a_stream_is_answered_in_order(twin: Twin, latest_only: bool) -> None:
    frames = [digit_png(index % 10) for index in range(100)]
    assert told(twin.stream_classify(frames, latest_only=latest_only)) == [index % 10 for index in range(100)]


def test_many_callers_are_answered_at_once(server: FakeServer) -> None:
    together = threading.Barrier(50)

    def answer(_: npt.NDArray[np.uint8]) -> int:
        together.wait(10)
        return 5

    server.answers = answer
    clients = [client.Client(server.target) for _ in range(50)]
    with ThreadPoolExecutor(50) as threads:
        predictions = list(threads.map(lambda one: one.classify(SEVEN), clients))
    for one in clients:
        one.close()
    assert told(predictions) == [5] * 50


@pytest.mark.parametrize(
    "answers",
    [
        "7",
        [client.MnistGrpcError],
        10,
        -1,
        True,
        3.5,
        object(),
        [1, 11],
        [(1, 1.5)],
        [(1, 0.05)],
        [[0.5, 0.5]],
        [[0.2] * 10],
        ["x"],
    ],
)
def test_answers_that_are_none_are_refused_where_they_are_given(answers: Any) -> None:
    with pytest.raises(ValueError, match=r"not "):
        FakeServer(answers)


# Faults ---------------------------------------------------------------------

ERRORS = [
    client.InvalidImageError,
    client.DeadlineExceededError,
    client.OverloadedError,
    client.UnavailableError,
    client.UnauthenticatedError,
    client.ServerError,
]


@pytest.mark.parametrize("error", ERRORS)
def test_the_next_call_fails_and_the_one_after_does_not(
    server: FakeServer, twin: Twin, error: type[client.MnistGrpcError]
) -> None:
    server.fail_next(error)
    with pytest.raises(error) as caught:
        twin.classify(SEVEN)
    assert type(caught.value) is error
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert server.target in str(caught.value)
    assert twin.classify(SEVEN).digit == 7
    assert len(server.requests) == 2


def test_a_failure_may_have_a_message_and_an_incident(server: FakeServer, twin: Twin) -> None:
    error = client.ServerError("the disk is full")
    error.incident_id = "abc"
    server.fail_next(error)
    with pytest.raises(client.ServerError, match="the disk is full") as caught:
        twin.classify(SEVEN)
    assert caught.value.incident_id == "abc"


def test_a_failure_tells_the_id_of_the_call(server: FakeServer) -> None:
    server.fail_next(client.UnavailableError)
    request = pb.ClassifyRequest(pixels=pixels_of(7).tobytes())
    with grpc.insecure_channel(server.target) as channel:
        stub = DigitClassifierStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Classify(request, timeout=10, metadata=(("x-request-id", "mine"),))
    trailers: Any = caught.value.trailing_metadata()
    assert ("x-request-id", "mine") in [tuple(pair) for pair in trailers]


@pytest.mark.parametrize("status", ["DATA_LOSS", grpc.StatusCode.DATA_LOSS])
def test_a_failure_may_be_any_status(server: FakeServer, twin: Twin, status: Any) -> None:
    server.fail_next(status)
    with pytest.raises(client.ServerError) as caught:
        twin.classify(SEVEN)
    assert caught.value.code == "DATA_LOSS"


@pytest.mark.parametrize("error", [client.OverloadedError, client.UnavailableError])
def test_the_client_tries_again_where_the_failure_tells_it_to(
    server: FakeServer, twin: Twin, error: type[client.MnistGrpcError]
) -> None:
    server.fail_next(error, times=2, retry_after=0.01)
    assert twin.classify(SEVEN).digit == 7
    assert len(server.requests) == 3


def test_tries_come_to_an_end(server: FakeServer, twin: Twin) -> None:
    server.fail_next(client.OverloadedError, times=4, retry_after=0)
    with pytest.raises(client.OverloadedError):
        twin.classify(SEVEN)
    assert len(server.requests) == 4


def test_faults_come_in_the_order_in_which_they_were_ordered(server: FakeServer, twin: Twin) -> None:
    server.fail_next(client.OverloadedError)
    server.fail_next(client.ServerError)
    for error in (client.OverloadedError, client.ServerError):
        with pytest.raises(error):
            twin.classify(SEVEN)


def test_a_call_that_is_delayed_is_answered(server: FakeServer, twin: Twin) -> None:
    server.delay_next(0.01)
    assert twin.classify(SEVEN).digit == 7


def test_a_call_that_is_delayed_for_longer_than_its_deadline_fails(server: FakeServer, twin: Twin) -> None:
    server.delay_next(60)
    with pytest.raises(client.DeadlineExceededError, match=r"within 1 s"):
        twin.classify(SEVEN, timeout=1)
    assert twin.classify(SEVEN).digit == 7


def test_a_call_that_hangs_runs_into_its_deadline(server: FakeServer, twin: Twin) -> None:
    server.hang_next()
    with pytest.raises(client.DeadlineExceededError, match=r"within 1 s"):
        twin.classify(SEVEN, timeout=1)
    assert twin.classify(SEVEN).digit == 7


def test_one_call_that_hangs_holds_up_no_other(
    server: FakeServer, connect: Connect, start: Callable[..., Running]
) -> None:
    server.hang_next()
    hanging = start(connect(server.target).classify, SEVEN)
    server.wait_for_requests()
    assert connect(server.target).classify(SEVEN).digit == 7
    server.close()
    with pytest.raises(client.MnistGrpcError):
        hanging.result()


def test_a_connection_that_is_cut_is_made_again(server: FakeServer, twin: Twin) -> None:
    server.drop_connection_next()
    assert twin.classify(SEVEN).digit == 7
    assert len(server.requests) == 2


def test_a_connection_that_is_cut_at_each_try_is_an_error(server: FakeServer, twin: Twin) -> None:
    server.drop_connection_next(times=4)
    with pytest.raises(client.UnavailableError):
        twin.classify(SEVEN)


def test_a_cut_ends_no_connection_of_others(
    server: FakeServer, connect: Connect, start: Callable[..., Running]
) -> None:
    release = threading.Event()

    def answer(_: npt.NDArray[np.uint8]) -> int:
        assert release.wait(10)
        return 3

    server.answers = answer
    waiting = start(connect(server.target).classify, SEVEN)
    server.wait_for_requests()
    server.drop_connection_next()
    request = pb.ClassifyRequest(pixels=pixels_of(7).tobytes())
    own_connection = [("grpc.use_local_subchannel_pool", 1)]  # clients of a process share them otherwise
    with grpc.insecure_channel(server.target, options=own_connection) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            DigitClassifierStub(channel).Classify(request, timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    release.set()
    assert waiting.result().digit == 3
    assert len(server.requests) == 2


def test_a_stream_fails_after_so_many_frames(server: FakeServer, twin: Twin) -> None:
    server.fail_next(client.ServerError, after=3)
    results = twin.stream_classify([SEVEN] * 5, window=1)
    assert told(next(results) for _ in range(3)) == [7, 7, 7]
    with pytest.raises(client.ServerError):
        next(results)


def test_a_stream_hangs_after_so_many_frames(server: FakeServer, twin: Twin) -> None:
    server.hang_next(after=2)
    results = twin.stream_classify([SEVEN] * 5, timeout=2)
    assert told(next(results) for _ in range(2)) == [7, 7]
    with pytest.raises(client.DeadlineExceededError):
        next(results)


def test_a_fault_inside_of_a_stream_spares_single_calls(server: FakeServer, twin: Twin) -> None:
    server.fail_next(client.ServerError, after=1)
    assert twin.classify(SEVEN).digit == 7
    with pytest.raises(client.ServerError):
        list(twin.stream_classify([SEVEN] * 2))


def test_a_stream_that_is_too_short_for_its_fault_leaves_it_to_the_next(server: FakeServer, twin: Twin) -> None:
    server.fail_next(client.ServerError, after=2)
    assert told(twin.stream_classify([SEVEN] * 2)) == [7, 7]
    with pytest.raises(client.ServerError):
        list(twin.stream_classify([SEVEN] * 3))


def test_faults_spare_health_and_the_description_of_the_model(server: FakeServer, twin: Twin) -> None:
    server.fail_next(client.ServerError)
    twin.wait_ready(10)
    assert twin.is_serving()
    assert twin.get_model() == server.model
    with pytest.raises(client.ServerError):
        twin.classify(SEVEN)


def test_while_it_is_unreachable_nobody_answers_at_its_address(server: FakeServer, connect: Connect) -> None:
    twin = connect(server.target)
    assert twin.classify(SEVEN).digit == 7
    with server.unreachable():
        with pytest.raises(client.UnavailableError, match="no server answers there"):
            connect(server.target).classify(SEVEN)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", int(server.target.rpartition(":")[2])))
        with pytest.raises(client.MnistGrpcError):
            twin.classify(SEVEN, timeout=0.3)
    twin.wait_ready(10)
    assert twin.classify(SEVEN).digit == 7


def test_while_it_is_silent_calls_run_into_their_deadline(server: FakeServer, connect: Connect) -> None:
    twin = connect(server.target)
    assert twin.classify(SEVEN).digit == 7
    with server.silent():
        for caller in (twin, connect(server.target)):
            with pytest.raises(client.DeadlineExceededError):
                caller.classify(SEVEN, timeout=0.2)
    twin.wait_ready(10)
    assert twin.classify(SEVEN).digit == 7
    assert len(server.requests) == 2, "what was not heard never comes"


@pytest.mark.parametrize(
    "order",
    [
        lambda server: server.fail_next(client.MnistGrpcError),
        lambda server: server.fail_next(ValueError),
        lambda server: server.fail_next("OK"),
        lambda server: server.fail_next("NO_SUCH_STATUS"),
        lambda server: server.fail_next(client.ServerError, times=0),
        lambda server: server.fail_next(client.ServerError, after=-1),
        lambda server: server.fail_next(client.ServerError, retry_after=-1),
        lambda server: server.delay_next(-1),
        lambda server: server.delay_next(float("nan")),
        lambda server: server.hang_next(times=0),
    ],
)
def test_faults_that_are_none_are_refused_where_they_are_ordered(order: Callable[[FakeServer], None]) -> None:
    with pytest.raises(ValueError, match=r"not "):
        order(FakeServer())


# Health and model -----------------------------------------------------------


def test_a_server_that_does_not_serve_says_so_and_answers_nothing(server: FakeServer, twin: Twin) -> None:
    server.serving = False
    assert twin.is_serving() is False
    with pytest.raises(client.UnavailableError, match="serving"):
        twin.classify(SEVEN)
    with pytest.raises(client.UnavailableError, match="not serving within"):
        twin.wait_ready(0.2)


def test_those_who_wait_are_told_when_it_serves(server: FakeServer, twin: Twin, start: Callable[..., Running]) -> None:
    server.serving = False
    waiting = start(twin.wait_ready, 10)
    server.serving = True
    waiting.result()
    assert twin.classify(SEVEN).digit == 7


@pytest.mark.parametrize(("name", "status"), [(b"", b"\x08\x01"), (b"\x0a\x01x", b"\x08\x03")])
def test_health_is_watched_by_name(server: FakeServer, name: bytes, status: bytes) -> None:
    with grpc.insecure_channel(server.target) as channel:
        ask: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")
        watch = ask(name, timeout=10)
        assert next(watch) == status
        watch.cancel()


def test_health_does_not_know_other_services(server: FakeServer) -> None:
    with grpc.insecure_channel(server.target) as channel:
        ask: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(grpc.RpcError) as caught:
            ask(b"\x0a\x01x", timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_model_may_be_another(server: FakeServer, twin: Twin) -> None:
    server.model = dataclasses.replace(server.model, version="another", test_accuracy=0.5)
    assert twin.get_model() == server.model
    assert twin.classify(SEVEN).model_version == "another"


# The contract without the SDK -----------------------------------------------


def test_all_forms_of_images_are_read(server: FakeServer) -> None:
    pixels = np.stack([pixels_of(7), pixels_of(2)])
    features = ((pixels.astype("<f4") / 255) - 0.5) / 0.5
    requests = [
        pb.ClassifyRequest(pixels=pixels.tobytes(), include_logits=True),
        pb.ClassifyRequest(features=features.tobytes(), include_logits=True),
        pb.ClassifyRequest(encoded=pb.EncodedImages(files=[SEVEN, digit_png(2)]), include_logits=True),
    ]
    with grpc.insecure_channel(server.target) as channel:
        for request in requests:
            response = DigitClassifierStub(channel).Classify(request, timeout=10)
            assert list(response.digits) == [7, 2]
            assert np.array(response.logits).reshape(2, 10).argmax(axis=1).tolist() == [7, 2]
            assert response.receipt.batch_rows == 2
    for received in server.requests:
        np.testing.assert_array_equal(received.pixels, pixels)


@pytest.mark.parametrize(
    "request_",
    [
        pb.ClassifyRequest(),
        pb.ClassifyRequest(pixels=b"x" * 783),
        pb.ClassifyRequest(features=b"x" * 784),
        pb.ClassifyRequest(encoded=pb.EncodedImages(files=[b"no image"])),
    ],
)
def test_what_breaks_the_contract_is_refused(server: FakeServer, request_: pb.ClassifyRequest) -> None:
    with grpc.insecure_channel(server.target) as channel:
        stub = DigitClassifierStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Classify(request_, timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        good = pb.ClassifyRequest(pixels=pixels_of(7).tobytes())
        frames = [pb.StreamClassifyRequest(first_sequence=i, frames=one) for i, one in enumerate([request_, good])]
        blocks = [block for response in stub.StreamClassify(iter(frames), timeout=10) for block in response.blocks]
    assert [block.WhichOneof("outcome") for block in blocks] == ["error", "result"]
    assert blocks[0].error.code == 3


# What was received ----------------------------------------------------------


def test_it_keeps_what_was_received(server: FakeServer, connect: Connect) -> None:
    connect(server.target, timeout=7).classify(Image.open(ROOT / "docs" / "examples" / "7.png"))
    [request] = server.requests
    assert request.method == "Classify"
    assert request.pixels.shape == (1, 784)
    assert request.pixels.dtype == np.uint8
    assert "grpc-python" in str(request.metadata["user-agent"])
    assert request.timeout is not None
    assert 0 < request.timeout < 7.5
    with pytest.raises(ValueError, match="read-only"):
        request.pixels[0, 0] = 1


def test_a_call_without_a_deadline_has_none(server: FakeServer) -> None:
    with grpc.insecure_channel(server.target) as channel:
        DigitClassifierStub(channel).Classify(pb.ClassifyRequest(pixels=pixels_of(7).tobytes()))
    assert server.requests[0].timeout is None


def test_it_keeps_the_frames_of_a_stream(server: FakeServer, twin: Twin) -> None:
    list(twin.stream_classify([digit_png(digit) for digit in range(10)]))
    assert {request.method for request in server.requests} == {"StreamClassify"}
    received = np.concatenate([request.pixels for request in server.requests])
    np.testing.assert_array_equal(received, np.stack([pixels_of(digit) for digit in range(10)]))


def test_waiting_for_what_does_not_come_ends(server: FakeServer) -> None:
    with pytest.raises(AssertionError, match=r"0 of 1 requests came within 0\.05 s"):
        server.wait_for_requests(timeout=0.05)


def test_resetting_forgets_all(server: FakeServer, twin: Twin) -> None:
    server.answers = [1]
    server.hang_next(times=9)
    server.serving = False
    server.reset()
    assert server.requests == []
    assert server.serving
    assert twin.classify(SEVEN).digit == 7


# Mistakes of the test's author ----------------------------------------------


def test_answers_that_are_used_up_fail_the_call_and_the_test(connect: Connect) -> None:
    def run() -> None:
        with FakeServer([3]) as server:
            twin = connect(server.target)
            assert twin.classify(SEVEN).digit == 3
            with pytest.raises(client.ServerError, match="the 1 answers that were given are used up"):
                twin.classify(SEVEN)

    with pytest.raises(AssertionError, match="the 1 answers that were given are used up"):
        run()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda _: 1 / 0, "division by zero"),
        (lambda _: 11, "0 to 9, not 11"),
        (lambda _: client.MnistGrpcError, "one of the errors below"),
    ],
)
def test_a_function_that_breaks_fails_the_call_and_the_test(
    connect: Connect, answer: Callable[[Any], Any], reason: str
) -> None:
    def run() -> None:
        with FakeServer(answer) as server, pytest.raises(client.ServerError, match=reason):
            connect(server.target).classify(SEVEN)

    with pytest.raises(AssertionError, match=reason):
        run()


def test_a_fault_that_never_came_fails_the_test(connect: Connect) -> None:
    def run() -> None:
        with FakeServer() as server:
            server.fail_next(client.OverloadedError, times=3)
            with pytest.raises(client.OverloadedError):
                connect(server.target).classify(SEVEN)

    with pytest.raises(AssertionError, match="fail_next was to come 3 times, and came 1 times"):
        run()


def test_the_tests_own_failure_is_not_hidden() -> None:
    def run() -> None:
        with FakeServer() as server:
            server.hang_next()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run()


def test_a_server_that_was_not_started_says_how_to() -> None:
    with pytest.raises(RuntimeError, match="with FakeServer"):
        _ = FakeServer().target


def test_a_server_is_started_once() -> None:
    with FakeServer() as server, pytest.raises(RuntimeError, match="started once"):
        server.start()
    with pytest.raises(RuntimeError, match="started once"):
        server.start()


# The process ----------------------------------------------------------------


async def test_it_serves_the_event_loop_that_started_it() -> None:
    with FakeServer() as server:
        async with client.AsyncClient(server.target) as digits:
            predictions = await asyncio.gather(*(digits.classify(digit_png(index % 10)) for index in range(50)))
            messages = len(server.requests)
            server.hang_next()
            hanging = asyncio.create_task(digits.classify(SEVEN))
            await asyncio.to_thread(server.wait_for_requests, messages + 1)
            hanging.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hanging
    assert told(predictions) == [index % 10 for index in range(50)]


def test_closing_lets_nothing_hang_and_leaves_no_thread_behind(connect: Connect, start: Callable[..., Running]) -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("fake-server")}

    before = threads()
    with FakeServer() as server:
        server.hang_next(times=3)
        twins = [connect(server.target) for _ in range(3)]
        calls = [start(twin.classify, SEVEN) for twin in twins]
        server.wait_for_requests(3)
        ours = threads() - before
        assert ours
    for call in calls:
        with pytest.raises(client.MnistGrpcError):
            call.result()
    for thread in ours:
        thread.join(10)
    assert not any(thread.is_alive() for thread in ours)


def test_a_program_ends_that_forgot_to_close_it() -> None:
    script = """
import threading
import client
from client.testing import FakeServer, digit_png

server = FakeServer().start()
server.hang_next()
threading.Thread(target=client.Client(server.target).classify, args=(digit_png(7),), daemon=True).start()
server.wait_for_requests()
print("the end")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(client.__file__).parents[1], capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "the end\n"


def test_it_needs_nothing_but_the_client() -> None:
    script = """
import sys
import client
assert "client.testing" not in sys.modules
import client.testing
print(sorted({"torch", "server", "trainer", "pytest"} & {name.split(".")[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=Path(client.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
