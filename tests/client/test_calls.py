"""Calls with one answer, each case for the sync and the async client."""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import client
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import Connect, Fakes, Running, Twin

GreyImage = npt.NDArray[np.uint8]


def png(array: GreyImage) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def file(array: GreyImage, folder: Path) -> Path:
    path = folder / "digit.png"
    path.write_bytes(png(array))
    return path


FORMS: dict[str, Callable[[GreyImage, Path], client.Image]] = {
    "a path": file,
    "a path as text": lambda array, folder: str(file(array, folder)),
    "bytes": lambda array, _: png(array),
    "a bytearray": lambda array, _: bytearray(png(array)),
    "a memoryview": lambda array, _: memoryview(png(array)),
    "a file object": lambda array, _: io.BytesIO(png(array)),
    "a PIL image": lambda array, _: Image.fromarray(array),
    "uint8[h, w]": lambda array, _: array,
    "uint8[h, w, 3]": lambda array, _: np.stack([array] * 3, axis=2),
    "uint8[h, w, 4]": lambda array, _: np.stack([array] * 3 + [np.full_like(array, 255)], axis=2),
    "float[h, w]": lambda array, _: array / 255,
}

# What each method does, on a digit.
CALLS: dict[str, Callable[[Twin, GreyImage, float | None], Any]] = {
    "classify": lambda twin, image, timeout: twin.classify(image, timeout=timeout),
    "classify_batch": lambda twin, image, timeout: twin.classify_batch([image], timeout=timeout),
    "stream_classify": lambda twin, image, timeout: list(twin.stream_classify([image], timeout=timeout)),
    "get_model": lambda twin, _, timeout: twin.get_model(timeout=timeout),
    "is_serving": lambda twin, _, timeout: twin.is_serving(timeout=timeout),
}
every_call = pytest.mark.parametrize("call", list(CALLS.values()), ids=list(CALLS))


@pytest.fixture
def real(connect: Connect, server_address: str) -> Twin:
    """A client of the real server."""
    return connect(server_address)


# Right answers --------------------------------------------------------------


@pytest.mark.parametrize("form", list(FORMS))
def test_an_image_may_come_in_any_form(real: Twin, digits: list[GreyImage], tmp_path: Path, form: str) -> None:
    image = FORMS[form](digits[7], tmp_path)
    prediction = real.classify(image)
    assert prediction.digit == 7
    np.testing.assert_allclose(prediction.probabilities, real.classify(digits[7]).probabilities, atol=1e-6)


def test_every_golden_digit_is_read_right(real: Twin, digits: list[GreyImage]) -> None:
    assert [real.classify(image).digit for image in digits] == [*range(10), *range(10)]


def test_a_prediction_tells_how_it_was_computed(real: Twin, digits: list[GreyImage]) -> None:
    prediction = real.classify(digits[4])
    assert type(prediction.digit) is int
    assert type(prediction.confidence) is float
    assert prediction.probabilities.shape == (10,)
    assert prediction.probabilities.dtype == np.float32
    assert prediction.probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert prediction.probabilities.argmax() == prediction.digit == 4
    assert prediction.confidence == prediction.probabilities.max()
    assert prediction.model_version == real.get_model().version
    assert prediction.batch_rows >= 1
    assert 0 <= prediction.queue_seconds < 10
    assert 0 < prediction.compute_seconds < 10
    with pytest.raises(ValueError, match="read-only"):
        prediction.probabilities[0] = 1
    with pytest.raises(AttributeError):
        prediction.digit = 5  # type: ignore[misc]


def test_the_model_describes_itself(real: Twin) -> None:
    model = real.get_model()
    assert model.name == "mnist"
    assert len(model.weights_sha256) == 64
    assert model.version == model.weights_sha256[:12]
    assert model.labels == tuple("0123456789")
    assert model.parameter_count > 0
    assert model.max_batch_size >= 1
    assert model.max_message_bytes >= 1024 * 784
    assert model.test_accuracy is None or 0.9 < model.test_accuracy <= 1


def test_a_large_batch_keeps_its_order(real: Twin, digits: list[GreyImage]) -> None:
    order = np.random.default_rng(0).integers(0, 20, 3000)
    predictions = real.classify_batch([digits[index] for index in order])
    assert [prediction.digit for prediction in predictions] == [index % 10 for index in order]
    alone = np.stack([real.classify(image).probabilities for image in digits])
    np.testing.assert_allclose(
        np.stack([prediction.probabilities for prediction in predictions]), alone[order], atol=1e-5
    )


def test_a_batch_may_come_from_a_generator(real: Twin, digits: list[GreyImage]) -> None:
    predictions = real.classify_batch(image for image in digits)
    assert [prediction.digit for prediction in predictions] == [*range(10), *range(10)]


def test_a_batch_may_be_an_array(real: Twin, digits: list[GreyImage]) -> None:
    predictions = real.classify_batch(np.stack(digits))
    assert [prediction.digit for prediction in predictions] == [*range(10), *range(10)]


def test_no_images_need_no_server(connect: Connect, fakes: Fakes) -> None:
    assert connect(fakes.nobody()).classify_batch([]) == []


# Bad images -----------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 5, 1500])
def test_a_bad_image_in_a_batch_says_which_it_is(
    real: Twin, digits: list[GreyImage], blank: GreyImage, index: int
) -> None:
    images = [digits[0]] * 2000
    images[index] = blank
    with pytest.raises(client.InvalidImageError, match=f"^image {index}: ") as caught:
        real.classify_batch(images)
    assert caught.value.index == index


@pytest.mark.parametrize("image", ["no-such-file.png", b"", b"no image", np.zeros((28, 28)), 7])
def test_an_image_that_cannot_be_read_is_refused_here(connect: Connect, fakes: Fakes, image: Any) -> None:
    with pytest.raises(client.InvalidImageError) as caught:
        connect(fakes.nobody()).classify(image)
    assert (caught.value.code, caught.value.index) == (None, None)
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_of_the_images_iterable_is_raised_as_it_is(connect: Connect, fakes: Fakes) -> None:
    def images() -> Iterator[GreyImage]:
        raise KeyError("mine")
        yield

    with pytest.raises(KeyError, match="mine"):
        connect(fakes.serve()).classify_batch(images())


# Faults ---------------------------------------------------------------------


@every_call
def test_a_server_that_says_nothing_runs_into_the_timeout(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running], call: Callable[..., Any]
) -> None:
    address = fakes.black_hole()
    running = start(call, connect(address), digits[0], 0.3)
    with pytest.raises(client.DeadlineExceededError, match=rf"^{address}: .* within 0\.3 s"):
        running.result(within=5)


@every_call
def test_the_clients_own_timeout_holds_where_a_call_has_none(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running], call: Callable[..., Any]
) -> None:
    running = start(call, connect(fakes.black_hole(), timeout=0.3), digits[0], None)
    with pytest.raises(client.DeadlineExceededError, match=r"0\.3 s"):
        running.result(within=5)


@every_call
def test_a_refused_connection_names_the_address(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], call: Callable[..., Any]
) -> None:
    address = fakes.nobody()
    with pytest.raises(client.UnavailableError, match=f"^{address}: no server answers there; is it running") as caught:
        call(connect(address), digits[0], None)
    assert caught.value.code == "UNAVAILABLE"
    assert isinstance(caught.value.__cause__, grpc.RpcError)


KINDS = {
    "INVALID_ARGUMENT": client.InvalidImageError,
    "DEADLINE_EXCEEDED": client.DeadlineExceededError,
    "RESOURCE_EXHAUSTED": client.OverloadedError,
    "UNAVAILABLE": client.UnavailableError,
    "UNAUTHENTICATED": client.UnauthenticatedError,
    "PERMISSION_DENIED": client.UnauthenticatedError,
}


@pytest.mark.parametrize("method", ["classify", "classify_batch", "stream_classify"])
@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name != "OK"], ids=lambda code: code.name)
def test_a_status_of_the_server_becomes_an_error_of_ours(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], code: grpc.StatusCode, method: str
) -> None:
    def refuse(_: Any, context: Any) -> None:
        context.set_trailing_metadata((("incident-id", "abc"), ("grpc-retry-pushback-ms", "-1")))
        context.abort(code, "the reason")

    def refuse_at_the_end(messages: Iterator[pb.StreamClassifyRequest], context: Any) -> None:
        deque(messages, maxlen=0)
        refuse(None, context)

    address = fakes.serve(classify=refuse, stream=refuse_at_the_end)
    with pytest.raises(client.MnistGrpcError) as caught:
        CALLS[method](connect(address), digits[0], None)
    assert type(caught.value) is KINDS.get(code.name, client.ServerError)
    assert (caught.value.code, caught.value.incident_id) == (code.name, "abc")
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert caught.value.__cause__.code() is code
    assert str(caught.value).startswith(f"{address}: ")


def test_a_message_that_is_too_long_for_the_server_is_no_overload(
    connect: Connect, fakes: Fakes, digits: list[GreyImage]
) -> None:
    address = fakes.serve(options=[("grpc.max_receive_message_length", 500)])
    with pytest.raises(client.InvalidImageError, match="larger than max"):
        connect(address).classify(digits[0])


@pytest.mark.parametrize(
    "answer",
    [
        pb.ClassifyResponse(),
        pb.ClassifyResponse(digits=[7]),
        pb.ClassifyResponse(digits=[7], probabilities=[0.1] * 9),
        pb.ClassifyResponse(digits=[7], probabilities=[0.1] * 20),
        pb.ClassifyResponse(digits=[7, 7], probabilities=[0.1] * 20),
        pb.ClassifyResponse(digits=[12], probabilities=[0.1] * 10),
    ],
    ids=["nothing", "no probabilities", "nine", "twenty", "two images", "a digit above 9"],
)
@pytest.mark.parametrize("method", ["classify", "classify_batch"])
def test_an_answer_that_does_not_fit_the_question_is_the_servers_fault(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], answer: pb.ClassifyResponse, method: str
) -> None:
    twin = connect(fakes.serve(classify=lambda *_: answer))
    with pytest.raises(client.ServerError):
        CALLS[method](twin, digits[0], None)


# Retries --------------------------------------------------------------------


class Reluctant:
    """A handler that refuses twice and then answers."""

    def __init__(self, fakes: Fakes, code: grpc.StatusCode, pushback: str | None = None) -> None:
        self.calls = 0
        self._fakes = fakes
        self._code = code
        self._pushback = pushback

    def __call__(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        self.calls += 1
        if self.calls <= 2:
            if self._pushback is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", self._pushback),))
            context.abort(self._code, "not now")
        return self._fakes.answer(request)


@pytest.mark.parametrize(("images", "messages"), [(1, 1), (1024, 5)])
@pytest.mark.parametrize(
    ("code", "pushback"),
    [
        (grpc.StatusCode.UNAVAILABLE, None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "1"),
    ],
    ids=["unavailable", "overloaded", "overloaded with a hint when to come again"],
)
def test_a_server_that_recovers_is_asked_again(
    connect: Connect,
    fakes: Fakes,
    digits: list[GreyImage],
    code: grpc.StatusCode,
    pushback: str | None,
    images: int,
    messages: int,
) -> None:
    handler = Reluctant(fakes, code, pushback)
    predictions = connect(fakes.serve(classify=handler)).classify_batch([digits[7]] * images)
    assert [prediction.digit for prediction in predictions] == [7] * images
    assert handler.calls == messages + 2


@pytest.mark.parametrize(
    ("code", "pushback"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, None),
        (grpc.StatusCode.INTERNAL, None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "-1"),
    ],
    ids=["a wrong request", "a broken server", "a server that does not want to be asked"],
)
def test_what_a_second_try_does_not_mend_is_not_asked_again(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], code: grpc.StatusCode, pushback: str | None
) -> None:
    handler = Reluctant(fakes, code, pushback)
    with pytest.raises(client.MnistGrpcError):
        connect(fakes.serve(classify=handler)).classify(digits[7])
    assert handler.calls == 1


def test_retries_end_with_the_timeout(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    def refuse(_: Any, context: Any) -> None:
        context.set_trailing_metadata((("grpc-retry-pushback-ms", "60000"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "come again in a minute")

    begin = time.monotonic()
    with pytest.raises(client.MnistGrpcError):
        connect(fakes.serve(classify=refuse)).classify(digits[7], timeout=0.5)
    assert time.monotonic() - begin < 5


# Batches in flight ----------------------------------------------------------


def test_a_batch_keeps_at_most_four_messages_in_flight(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    lock = threading.Lock()
    now = most = 0

    def classify(request: pb.ClassifyRequest, _: Any) -> pb.ClassifyResponse:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        try:
            return fakes.answer(request)
        finally:
            with lock:
                now -= 1

    predictions = connect(fakes.serve(classify=classify)).classify_batch(np.stack([digits[3]] * 1024 * 7))
    assert len(predictions) == 7168
    assert most <= 4


def test_the_first_failure_of_a_batch_cancels_the_rest(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    waiting, ended = threading.Semaphore(0), threading.Semaphore(0)

    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        if len(request.pixels) == 784 * 64:  # the first message
            assert waiting.acquire(timeout=10)
            context.abort(grpc.StatusCode.INTERNAL, "broken")
        context.add_callback(ended.release)
        waiting.release()
        fakes.stopping.wait(10)
        return fakes.answer(request)

    twin = connect(fakes.serve(classify=classify))
    with pytest.raises(client.ServerError, match="broken"):
        twin.classify_batch(np.stack([digits[3]] * 100))
    assert ended.acquire(timeout=10)


# Open and closed ------------------------------------------------------------


@pytest.mark.parametrize("call", [*CALLS.values(), lambda twin, *_: twin.wait_ready(1)], ids=[*CALLS, "wait_ready"])
def test_a_closed_client_says_so(
    connect: Connect, server_address: str, digits: list[GreyImage], call: Callable[..., Any]
) -> None:
    twin = connect(server_address)
    assert twin.classify(digits[7]).digit == 7
    twin.close()
    with pytest.raises(RuntimeError, match="closed"):
        call(twin, digits[0], None)


def test_a_client_may_be_closed_twice_and_unused(connect: Connect, fakes: Fakes) -> None:
    twin = connect(fakes.nobody())
    twin.close()
    twin.close()


def test_a_connection_that_was_lost_is_made_again(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    peers = set()

    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        peers.add(context.peer())
        return fakes.answer(request)

    # The server closes connections of this age, and calls go on.
    address = fakes.serve(
        classify=classify, options=[("grpc.max_connection_age_ms", 100), ("grpc.max_connection_age_grace_ms", 1000)]
    )
    twin = connect(address)
    deadline = time.monotonic() + 10
    while len(peers) < 2 and time.monotonic() < deadline:
        assert twin.classify(digits[7]).digit == 7
    assert len(peers) > 1


@pytest.mark.parametrize("method", ["classify", "classify_batch", "stream_classify", "get_model"])
def test_closing_ends_a_call_under_way_and_says_so(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running], method: str
) -> None:
    arrived = threading.Event()

    def never(_: Any, context: Any) -> None:
        arrived.set()
        fakes.stopping.wait(20)
        context.abort(grpc.StatusCode.CANCELLED, "the test is over")

    twin = connect(fakes.serve(classify=never, get_model=never, stream=never))
    running = start(CALLS[method], twin, digits[0], None)
    assert arrived.wait(10)
    twin.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        running.result(within=5)
