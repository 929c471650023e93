"""`classify_batch` and `classify_iter`, each case for the sync and the async client, and how messages are made."""

from __future__ import annotations

import asyncio
import io
import itertools
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import client
from client._batch import FIRST_IMAGES, MESSAGES_IN_FLIGHT, MOST_IMAGES, Chunk, Chunks, progress_bar
from client._sync_batch import exchange
from digits.preprocessing import to_pixels
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import Connect, Fakes, Running

GreyImage = npt.NDArray[np.uint8]


def labels(predictions: Any) -> list[int]:
    return [prediction.digit for prediction in predictions]


def png(array: GreyImage) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def moved(digit: GreyImage) -> GreyImage:
    """The same digit off the middle, so that it has to be prepared."""
    return np.roll(digit, 3, axis=1)


class Counter:
    """`Classify` of a server that notes how many images come in each message."""

    def __init__(self, fakes: Fakes) -> None:
        self.sizes: list[int] = []
        self.request_ids: set[Any] = set()
        self._fakes = fakes

    def __call__(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        self.sizes.append(len(request.pixels) // 784)
        self.request_ids.add(dict(context.invocation_metadata()).get("x-request-id"))
        return self._fakes.answer(request)


# What images may be ---------------------------------------------------------


FORMS: dict[str, Callable[[list[GreyImage], Path], Any]] = {
    "a list": lambda images, _: images,
    "a tuple": lambda images, _: tuple(images),
    "a generator": lambda images, _: (image for image in images),
    "uint8[n, 28, 28]": lambda images, _: np.stack(images),
    "uint8[n, 28, 28], not contiguous": lambda images, _: np.stack([*images, *images])[: len(images)][:, ::1, ::1],
    "uint8[n, h, w]": lambda images, _: np.kron(np.stack(images), np.ones((1, 4, 4), np.uint8)),
    "uint8[n, h, w, 3]": lambda images, _: np.stack([np.stack([image] * 3, axis=2) for image in images]),
    "float[n, h, w]": lambda images, _: np.stack(images) / 255,
    "column-major arrays": lambda images, _: [np.asfortranarray(image) for image in images],
    "PNG files as bytes": lambda images, _: [png(image) for image in images],
    "a mixture": lambda images, _: [
        image if number % 3 else png(image) if number % 2 else Image.fromarray(image)
        for number, image in enumerate(images)
    ],
    "not as MNIST's": lambda images, _: [moved(image) if number % 4 else image for number, image in enumerate(images)],
    "an array, not as MNIST's": lambda images, _: np.stack([moved(image) for image in images]),
    "an array of paths": lambda images, folder: np.array(files(images, folder)),
}


def files(images: list[GreyImage], folder: Path) -> list[str]:
    paths = [folder / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(png(image))
    return [str(path) for path in paths]


@pytest.mark.parametrize("form", list(FORMS))
def test_images_may_come_in_any_form(
    connect: Connect, server_address: str, digits: list[GreyImage], tmp_path: Path, form: str
) -> None:
    images = FORMS[form](digits, tmp_path)
    assert labels(connect(server_address).classify_batch(images)) == [*range(10), *range(10)]


@pytest.mark.parametrize("form", list(FORMS))
def test_each_image_is_prepared_as_it_would_be_alone(digits: list[GreyImage], tmp_path: Path, form: str) -> None:
    kept = [str(image) if isinstance(image, str) else image for image in FORMS[form](digits, tmp_path)]
    pixels = b"".join(chunk.pixels for chunk in Chunks(FORMS[form](digits, tmp_path)))
    assert pixels == b"".join(to_pixels(image).tobytes() for image in kept)


@pytest.mark.parametrize(
    "image",
    ["digit.png", Path("digit.png"), b"\x89PNG", bytearray(b"\x89PNG"), io.BytesIO(), np.zeros((28, 28), np.uint8)],
    ids=lambda image: type(image).__name__,
)
@pytest.mark.parametrize("method", ["classify_batch", "classify_iter"])
def test_a_single_image_given_by_mistake_is_refused(connect: Connect, fakes: Fakes, image: Any, method: str) -> None:
    with pytest.raises(
        TypeError, match=r"several images are expected.* this is one.*put it in a list, or use classify"
    ):
        getattr(connect(fakes.nobody()), method)(image)


def test_what_is_no_iterable_is_refused(connect: Connect, fakes: Fakes) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        connect(fakes.nobody()).classify_batch(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("images", [[], (), np.empty((0, 28, 28), np.uint8), iter(())])
def test_no_images_need_no_server(connect: Connect, fakes: Fakes, images: Any) -> None:
    twin = connect(fakes.nobody())
    assert twin.classify_batch(images) == []
    assert list(twin.classify_iter(images)) == []


# Messages -------------------------------------------------------------------


def test_messages_grow_from_a_first_small_one(digits: list[GreyImage]) -> None:
    chunks = list(Chunks(digits * 100))
    assert [chunk.count for chunk in chunks] == [64, 128, 256, 512, 512, 512, 16]
    assert [chunk.first for chunk in chunks] == [0, 64, 192, 448, 960, 1472, 1984]
    assert b"".join(chunk.pixels for chunk in chunks) == b"".join(image.tobytes() for image in digits * 100)


def test_messages_stay_small_where_preparing_takes_long(digits: list[GreyImage]) -> None:
    assert [chunk.count for chunk in Chunks([png(image) for image in digits] * 8)] == [64, 64, 32]


def test_a_message_stays_below_the_limit_of_a_default_server() -> None:
    request = pb.ClassifyRequest(pixels=bytes(784 * MOST_IMAGES))
    assert request.ByteSize() < 4 * 1024 * 1024


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("count", [2, 3, 8, 9])
def test_halves_are_the_whole(count: int, first: int) -> None:
    whole = Chunk(first, bytes(range(count)) * 784)
    one, two = whole.halves()
    assert one.pixels + two.pixels == whole.pixels
    assert (one.first, two.first) == (first, first + one.count)
    assert one.count + two.count == count
    assert min(one.count, two.count) >= 1


def test_a_large_batch_keeps_its_order(connect: Connect, server_address: str, digits: list[GreyImage]) -> None:
    order = np.random.default_rng(0).integers(0, 20, 3000)
    twin = connect(server_address)
    images = [digits[index] for index in order]
    assert labels(twin.classify_batch(images)) == [index % 10 for index in order]
    assert labels(twin.classify_iter(np.stack(images))) == [index % 10 for index in order]


@pytest.mark.parametrize("limit", [1, 7, 60])
def test_a_server_that_takes_fewer_images_in_a_message_gets_fewer(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], limit: int
) -> None:
    counter = Counter(fakes)

    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        if (size := len(request.pixels) // 784) > limit:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"a request carries at most {limit} images, this one {size}"
            )
        return counter(request, context)

    predictions = connect(fakes.serve(classify=classify)).classify_batch(digits * 6)
    assert labels(predictions) == [*range(10)] * 12
    assert sum(counter.sizes) == 120


def test_a_message_that_grpc_itself_refuses_for_its_length_is_sent_in_parts(
    connect: Connect, fakes: Fakes, digits: list[GreyImage]
) -> None:
    counter = Counter(fakes)
    address = fakes.serve(classify=counter, options=[("grpc.max_receive_message_length", 20 * 784)])
    assert labels(connect(address).classify_batch(digits * 5)) == [*range(10)] * 10
    assert max(counter.sizes) < 20


def test_several_messages_are_under_way_at_a_time_and_no_more(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    together = threading.Barrier(MESSAGES_IN_FLIGHT)
    lock = threading.Lock()
    now = most = 0

    def classify(request: pb.ClassifyRequest, _: Any) -> pb.ClassifyResponse:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait(20)
        with lock:
            now -= 1
        return fakes.answer(request)

    count = sum(min(FIRST_IMAGES << step, MOST_IMAGES) for step in range(2 * MESSAGES_IN_FLIGHT))
    images = list(itertools.islice(itertools.cycle(digits), count))
    running = start(connect(fakes.serve(classify=classify)).classify_batch, images)
    assert labels(running.result()) == [index % 10 for index in range(count)]
    assert most == MESSAGES_IN_FLIGHT


def test_the_messages_of_a_batch_have_one_id(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    counter = Counter(fakes)
    twin = connect(fakes.serve(classify=counter))
    twin.classify_batch(digits * 20)
    assert len(counter.sizes) > 1
    assert len(counter.request_ids) == 1
    twin.classify_batch(digits)
    assert len(counter.request_ids) == 2


# Streaming ------------------------------------------------------------------


def test_endless_images_are_read_no_further_than_their_answers_are_taken(
    connect: Connect, server_address: str, digits: list[GreyImage]
) -> None:
    read = 0

    def images() -> Iterator[GreyImage]:
        nonlocal read
        for image in itertools.cycle(digits):
            read += 1
            yield image

    answers = connect(server_address).classify_iter(images())
    assert labels(itertools.islice(answers, 100)) == [index % 10 for index in range(100)]
    assert read <= 100 + (MESSAGES_IN_FLIGHT + 1) * MOST_IMAGES
    answers.close()


def test_answers_come_while_the_rest_is_under_way(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    go = threading.Event()

    def classify(request: pb.ClassifyRequest, _: Any) -> pb.ClassifyResponse:
        if len(request.pixels) > FIRST_IMAGES * 784:
            go.wait(20)
        return fakes.answer(request)

    answers = connect(fakes.serve(classify=classify)).classify_iter(digits * 10)
    assert labels(itertools.islice(answers, FIRST_IMAGES)) == [index % 10 for index in range(FIRST_IMAGES)]
    go.set()
    assert labels(answers) == [index % 10 for index in range(FIRST_IMAGES, 200)]


def test_leaving_the_loop_cancels_what_is_under_way(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    begun, cancelled = threading.Event(), threading.Event()

    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        if len(request.pixels) > FIRST_IMAGES * 784:
            context.add_callback(cancelled.set)
            begun.set()
            fakes.stopping.wait(20)
        return fakes.answer(request)

    answers = connect(fakes.serve(classify=classify)).classify_iter(digits * 10)
    assert next(answers).digit == 0
    assert begun.wait(20)
    answers.close()
    assert cancelled.wait(20)


def test_no_threads_are_left(server_address: str, digits: list[GreyImage]) -> None:
    with client.Client(server_address) as digits_client:
        answers = digits_client.classify_iter([png(image) for image in digits * 10])
        next(answers)
        before = [thread for thread in threading.enumerate() if thread.name.startswith("batch-prepare")]
        assert before
        answers.close()
        for thread in before:
            thread.join(20)
            assert not thread.is_alive()


# Errors ---------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 5, 1500])
@pytest.mark.parametrize("form", [list, np.stack, lambda images: [png(image) for image in images]])
def test_a_bad_image_is_told_by_its_index_after_the_answers_before_it(
    connect: Connect, server_address: str, digits: list[GreyImage], blank: GreyImage, index: int, form: Any
) -> None:
    images = digits * 80
    images[index] = blank
    twin = connect(server_address)
    with pytest.raises(client.InvalidImageError, match=f"^image {index}: .*contrast") as caught:
        twin.classify_batch(form(images))
    assert caught.value.index == index
    answers = twin.classify_iter(form(images))
    assert labels(itertools.islice(answers, index)) == [number % 10 for number in range(index)]
    with pytest.raises(client.InvalidImageError, match=f"^image {index}: "):
        next(answers)


def test_an_error_of_the_iterable_is_raised_as_it_is_after_the_answers_before_it(
    connect: Connect, server_address: str, digits: list[GreyImage]
) -> None:
    def images() -> Iterator[GreyImage]:
        yield from digits * 10
        raise KeyError("mine")

    answers = connect(server_address).classify_iter(images())
    assert labels(itertools.islice(answers, 200)) == [*range(10)] * 20
    with pytest.raises(KeyError, match="mine"):
        next(answers)


def test_a_message_that_fails_ends_the_batch(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        if len(request.pixels) > FIRST_IMAGES * 784:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
        return fakes.answer(request)

    answers = connect(fakes.serve(classify=classify)).classify_iter(digits * 10)
    assert len(list(itertools.islice(answers, FIRST_IMAGES))) == FIRST_IMAGES
    with pytest.raises(client.UnauthenticatedError, match="who are you"):
        next(answers)


def test_an_image_that_the_server_refuses_is_told_by_its_index(
    connect: Connect, fakes: Fakes, digits: list[GreyImage]
) -> None:
    bad = digits[7].tobytes()

    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        if bad in request.pixels:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not this one")
        return fakes.answer(request)

    with pytest.raises(client.InvalidImageError, match="not this one") as caught:
        connect(fakes.serve(classify=classify)).classify_batch([*digits[:6], digits[7]])
    assert caught.value.index == 6


def test_a_closed_client_refuses_a_batch_at_once(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    twin = connect(fakes.nobody())
    twin.close()
    for method in (twin.classify_batch, twin.classify_iter):
        with pytest.raises(RuntimeError, match="the client is closed"):
            method(digits)


def test_closing_ends_a_batch_that_is_under_way(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    come = threading.Event()

    def classify(request: pb.ClassifyRequest, _: Any) -> pb.ClassifyResponse:
        come.set()
        fakes.stopping.wait(20)
        return fakes.answer(request)

    twin = connect(fakes.serve(classify=classify))
    running = start(twin.classify_batch, digits * 10)
    assert come.wait(20)
    twin.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        running.result()


# Progress -------------------------------------------------------------------


@pytest.mark.parametrize(("images", "told"), [(list, "200/200"), (iter, "200 images")])
def test_progress_is_shown_on_request(
    connect: Connect,
    server_address: str,
    digits: list[GreyImage],
    capsys: pytest.CaptureFixture[str],
    images: Any,
    told: str,
) -> None:
    pytest.importorskip("tqdm")
    twin = connect(server_address)
    assert len(twin.classify_batch(images(digits * 10))) == 200
    assert capsys.readouterr().err == ""
    assert len(twin.classify_batch(images(digits * 10), progress=True)) == 200
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""


def test_progress_without_tqdm_says_what_to_install(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install 'mnist-grpc\[progress\]'"):
        connect(fakes.nobody()).classify_batch(digits, progress=True)


# What only the async client has ---------------------------------------------


async def test_images_may_come_from_an_async_iterable(
    server_address: str, digits: list[GreyImage], blank: GreyImage
) -> None:
    async def images(last: GreyImage) -> AsyncIterator[GreyImage]:
        for image in [*digits * 10, last]:
            await asyncio.sleep(0)
            yield image

    async with client.AsyncClient(server_address) as digits_client:
        assert labels(await digits_client.classify_batch(images(digits[3]))) == [*range(10)] * 20 + [3]
        answers = digits_client.classify_iter(images(blank))
        assert [(await anext(answers)).digit for _ in range(200)] == [*range(10)] * 20
        with pytest.raises(client.InvalidImageError, match=r"^image 200: "):
            await anext(answers)


async def test_an_error_of_an_async_iterable_is_raised_after_the_answers_before_it(
    server_address: str, digits: list[GreyImage]
) -> None:
    async def images() -> AsyncIterator[GreyImage]:
        for image in digits:
            yield image
        raise KeyError("mine")

    async with client.AsyncClient(server_address) as digits_client:
        answers = digits_client.classify_iter(images())
        assert [(await anext(answers)).digit for _ in range(20)] == [*range(10)] * 2
        with pytest.raises(KeyError, match="mine"):
            await anext(answers)


# MNIST itself ---------------------------------------------------------------


def test_ten_thousand_images_of_mnist_are_read_alike_in_a_list_and_in_an_array(
    connect: Connect, server_address: str, mnist: dict[str, npt.NDArray[np.uint8]]
) -> None:
    images = mnist["t10k-images"].reshape(-1, 28, 28)
    twin = connect(server_address)
    one = np.array(labels(twin.classify_batch(images)))
    assert labels(twin.classify_batch(list(images))) == one.tolist()
    assert (one == mnist["t10k-labels"]).mean() > 0.98


async def test_iterables_that_wait_keep_nobody_else_from_a_thread(
    server_address: str, golden_files: list[bytes]
) -> None:
    png = golden_files[0]
    go, all_wait = threading.Event(), asyncio.Event()
    numbers, loop = itertools.count(1), asyncio.get_running_loop()

    def waiting() -> Iterator[bytes]:
        yield png
        if next(numbers) == 50:
            loop.call_soon_threadsafe(all_wait.set)
        assert go.wait(20)
        yield png

    async with client.AsyncClient(server_address) as shared:
        batches = [asyncio.ensure_future(shared.classify_batch(waiting())) for _ in range(50)]
        async with asyncio.timeout(20):
            await all_wait.wait()
        alone = await shared.classify(png)  # which is decoded in a thread
        assert not any(batch.done() for batch in batches)
        go.set()
        for predictions in await asyncio.gather(*batches):
            assert [prediction.digit for prediction in predictions] == [alone.digit] * 2


def test_leaving_waits_until_grpc_has_let_go_of_the_calls(digits: list[GreyImage]) -> None:
    """As a program that ends while gRPC's thread holds the lock of a call would hang."""
    let_go: list[int] = []

    class Call:
        def __init__(self) -> None:
            self.callbacks: list[Callable[[Any], None]] = []

        def add_done_callback(self, callback: Callable[[Any], None]) -> None:
            self.callbacks.append(callback)

        def cancel(self) -> None:
            threading.Timer(0.05, self.end).start()

        def result(self) -> None:
            raise KeyboardInterrupt

        def end(self) -> None:
            let_go.append(1)
            for callback in self.callbacks:
                callback(self)

    class Stub:
        class Classify:
            @staticmethod
            def future(request: pb.ClassifyRequest, timeout: float) -> Call:
                return Call()

    images = Chunks(digits * 50)
    answers = exchange(images, cast(Any, Stub), lambda: nullcontext(1.0), 4, "nowhere", progress_bar(False, images))
    with pytest.raises(KeyboardInterrupt):
        next(answers)
    assert let_go == [1] * 4
