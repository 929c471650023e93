"""Calls that are made at once go together in one message, and harm nobody.

Which calls gather is decided by the test: the server holds messages until it is
told, and the test knows when a call has begun to wait.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

import client
from client import _async_gather, _core, _sync_gather
from client._gathering import MAX_LONE, Gathering
from digits.canonical import is_canonical, may_be_canonical
from digits.preprocessing import InvalidImage, to_pixels
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import Connect, Fakes, Running

GreyImage = npt.NDArray[np.uint8]
Start = Callable[..., "Running"]
LONG = 20.0  # seconds


class Desk:
    """`Classify` of a server that notes what comes and holds the first messages until `go`."""

    def __init__(self, fakes: Fakes, hold: int = MAX_LONE) -> None:
        self.sizes: list[int] = []
        self.seconds: list[float] = []
        self.go = threading.Event()
        self.address = fakes.serve(classify=self._classify)
        self._fakes = fakes
        self._hold = hold
        self._come = threading.Semaphore(0)
        self._lock = threading.Lock()

    def _classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        with self._lock:
            number = len(self.sizes)
            self.sizes.append(len(request.pixels) // 784)
            self.seconds.append(context.time_remaining())
        self._come.release()
        if number < self._hold:
            self.go.wait(LONG)
        return self._fakes.answer(request)

    def wait_for_messages(self, count: int) -> None:
        for _ in range(count):
            assert self._come.acquire(timeout=LONG), f"no {count} messages came, only {self.sizes}"


class Joined:
    """Knows how many calls have begun to wait for others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._calls = threading.Semaphore(0)
        join = Gathering.join

        def join_and_tell(gathering: Gathering[Any], member: Any) -> None:
            join(gathering, member)
            self._calls.release()

        monkeypatch.setattr(Gathering, "join", join_and_tell)

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self._calls.acquire(timeout=LONG), "a call did not wait for the others"

    @property
    def none(self) -> bool:
        return not self._calls.acquire(blocking=False)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Joined:
    """Calls that wait do so until the test lets them go, without losing patience."""
    for module in (_sync_gather, _async_gather):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 1000.0)
    return Joined(monkeypatch)


@pytest.fixture
def busy(fakes: Fakes, digits: list[GreyImage], start: Start) -> Callable[[Any], tuple[Desk, list[Running]]]:
    """`busy(connect)`: as many calls of a client are on their way as go by themselves, and are held."""

    def busy(connect: Callable[[str], Any], hold: int = MAX_LONE) -> Any:
        desk = Desk(fakes, hold)
        twin = connect(desk.address)
        running = [start(twin.classify, digits[0]) for _ in range(MAX_LONE)]
        desk.wait_for_messages(MAX_LONE)
        return twin, desk, running

    return busy


# When calls gather ----------------------------------------------------------


def test_a_lone_call_is_sent_at_once_and_by_itself(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], joined: Joined
) -> None:
    desk = Desk(fakes, hold=0)
    twin = connect(desk.address)
    assert [twin.classify(image).digit for image in digits[:5]] == [0, 1, 2, 3, 4]
    assert desk.sizes == [1] * 5
    assert joined.none


def test_a_few_calls_do_not_wait_for_each_other(busy: Any, connect: Connect, joined: Joined) -> None:
    _, desk, running = busy(connect)
    assert joined.none
    desk.go.set()
    assert [call.result().digit for call in running] == [0] * MAX_LONE


def test_calls_that_wait_go_together_in_one_message(
    busy: Any, connect: Connect, digits: list[GreyImage], joined: Joined, start: Start
) -> None:
    twin, desk, running = busy(connect)
    waiting = [start(twin.classify, image) for image in digits]
    joined.wait_for(20)
    assert desk.sizes == [1] * MAX_LONE
    desk.go.set()
    assert [call.result().digit for call in waiting] == [*range(10), *range(10)]
    assert [call.result().digit for call in running] == [0] * MAX_LONE
    assert desk.sizes == [1] * MAX_LONE + [10, 10], "of many, half go first"


def test_a_lone_call_after_many_is_sent_by_itself_again(
    busy: Any, connect: Connect, digits: list[GreyImage], joined: Joined, start: Start
) -> None:
    twin, desk, running = busy(connect)
    waiting = [start(twin.classify, image) for image in digits]
    joined.wait_for(20)
    desk.go.set()
    for call in running + waiting:
        call.result()
    twin.classify(digits[3])
    joined.wait_for(1)  # company was still to be expected; it did not come, and so:
    assert [twin.classify(image).digit for image in digits[:3]] == [0, 1, 2]
    assert joined.none
    assert desk.sizes[-4:] == [1] * 4


def test_calls_do_not_wait_for_a_server_that_hangs(busy: Any, connect: Connect, digits: list[GreyImage]) -> None:
    twin, desk, running = busy(connect)
    assert [twin.classify(image).digit for image in digits[:3]] == [0, 1, 2]
    assert not desk.go.is_set()
    desk.go.set()
    for call in running:
        call.result()


def test_calls_with_ids_of_their_own_go_by_themselves(
    busy: Any, connect: Connect, fakes: Fakes, digits: list[GreyImage], joined: Joined
) -> None:
    desk = Desk(fakes, hold=8)

    def call(digits_client: client.Client, number: int) -> int:
        with client.request_id(f"id-{number}"):
            return digits_client.classify(digits[number]).digit

    with client.Client(desk.address) as digits_client, ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(call, digits_client, number) for number in range(8)]
        desk.wait_for_messages(8)
        desk.go.set()
        assert [call.result(LONG) for call in calls] == [*range(8)]
    assert desk.sizes == [1] * 8
    assert joined.none


def test_no_calls_gather_where_that_is_switched_off(fakes: Fakes, digits: list[GreyImage], joined: Joined) -> None:
    desk = Desk(fakes, hold=8)
    with client.Client(desk.address, coalesce=False) as digits_client, ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(digits_client.classify, image) for image in digits[:8]]
        desk.wait_for_messages(8)
        desk.go.set()
        assert [call.result(LONG).digit for call in calls] == [*range(8)]
    assert joined.none


async def test_no_tasks_gather_where_that_is_switched_off(fakes: Fakes, digits: list[GreyImage]) -> None:
    desk = Desk(fakes, hold=8)
    async with client.AsyncClient(desk.address, coalesce=False) as digits_client:
        calls = asyncio.gather(*(digits_client.classify(image) for image in digits[:8]))
        await asyncio.to_thread(desk.wait_for_messages, 8)
        desk.go.set()
        assert [prediction.digit for prediction in await calls] == [*range(8)]


def test_a_real_server_gets_the_calls_of_many_threads_in_few_messages(
    server_address: str, digits: list[GreyImage]
) -> None:
    with client.Client(server_address) as shared, ThreadPoolExecutor(64) as threads:
        predictions = list(threads.map(shared.classify, digits * 50))
    assert [prediction.digit for prediction in predictions] == [*range(10)] * 100
    assert max(prediction.batch_rows for prediction in predictions) > 1


async def test_a_real_server_gets_the_calls_of_many_tasks_in_few_messages(
    server_address: str, digits: list[GreyImage]
) -> None:
    async with client.AsyncClient(server_address) as shared:
        predictions = await asyncio.gather(*(shared.classify(image) for image in digits * 50))
    assert [prediction.digit for prediction in predictions] == [*range(10)] * 100
    assert max(prediction.batch_rows for prediction in predictions) > 32


# Images that look canonical and are not ---------------------------------------


def off_center(image: GreyImage) -> GreyImage:
    """A digit of MNIST's, moved to the right: at a glance it is as MNIST's are."""
    moved = np.roll(image, 4, axis=1)
    assert not moved[:, :4].any(), "nothing came around"
    assert may_be_canonical(moved)
    assert not is_canonical(moved)
    return moved


@pytest.fixture
def movable(digits: list[GreyImage]) -> list[GreyImage]:
    return [image for image in digits if not image[:, -4:].any()]


class Company:
    """Callers of a server that answers with zeros, whose last calls went together, so that the next ones will."""

    def __init__(self, fakes: Fakes, busy_with: GreyImage) -> None:
        self.sent: list[bytes] = []
        self.fails = False
        self.go = threading.Event()
        self._come = threading.Semaphore(0)
        self.client = client.Client(fakes.serve(classify=self._classify))
        self._image = busy_with

    def _classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        rows = [request.pixels[start : start + 784] for start in range(0, len(request.pixels), 784)]
        self.sent += rows
        self._come.release()
        self.go.wait(LONG)
        if self.fails:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        return pb.ClassifyResponse(digits=[0] * len(rows), probabilities=[1.0, *[0.0] * 9] * len(rows))

    def gather(self, start: Start, joined: Joined) -> None:
        running = [start(self.client.classify, self._image) for _ in range(MAX_LONE)]
        for _ in range(MAX_LONE):
            assert self._come.acquire(timeout=LONG)
        running += [start(self.client.classify, self._image) for _ in range(2)]
        joined.wait_for(2)
        self.go.set()
        for call in running:
            call.result()
        self.sent.clear()


@pytest.fixture
def company(fakes: Fakes, digits: list[GreyImage], start: Start, joined: Joined) -> Iterator[Company]:
    company = Company(fakes, digits[0])
    with company.client:
        company.gather(start, joined)
        yield company


@pytest.mark.parametrize("moved", [1, 4, 8])
def test_what_is_sent_is_canonical_whoever_sends_it(
    company: Company, movable: list[GreyImage], start: Start, moved: int
) -> None:
    images = [off_center(image) if number < moved else image for number, image in enumerate(movable[:8])]
    calls = [start(company.client.classify, image) for image in images]
    assert [call.result().digit for call in calls] == [0] * 8
    assert sorted(company.sent) == sorted(to_pixels(image).tobytes() for image in images), "each once"


def test_a_bad_image_that_seems_canonical_is_told_by_its_own_error(
    company: Company, digits: list[GreyImage], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = off_center(digits[1])

    def refuse(image: Any) -> Any:
        raise InvalidImage("an image of this test")

    monkeypatch.setattr(_core, "preprocess", refuse)
    calls = [start(company.client.classify, image) for image in (bad, digits[2], digits[3])]
    with pytest.raises(client.InvalidImageError, match="an image of this test"):
        calls[0].result()
    assert [call.result().digit for call in calls[1:]] == [0, 0]
    assert sorted(company.sent) == sorted(image.tobytes() for image in digits[2:4])


def test_who_is_left_out_of_a_message_is_not_told_its_error(
    company: Company, digits: list[GreyImage], movable: list[GreyImage]
) -> None:
    gather = company.client._open().gather
    lone, moved = (
        _sync_gather._Caller(image.tobytes(), LONG, time.monotonic(), unsure=True) for image in (digits[1], movable[0])
    )
    moved.pixels = off_center(movable[0]).tobytes()
    company.fails = True
    with gather._lock:
        for caller in (lone, moved):
            gather._gathering.join(caller)
        members = gather._gathering.cut()
    assert members == [lone, moved]
    gather._send(lone, members)
    assert isinstance(lone.result, client.UnavailableError)
    assert isinstance(moved.result, _sync_gather._NotCanonical), "it goes on, to be prepared and sent by itself"


def test_calls_with_images_to_prepare_keep_to_their_time(company: Company, movable: list[GreyImage]) -> None:
    company.go.clear()
    with pytest.raises(client.DeadlineExceededError, match=r"0\.\d+ s"):
        company.client.classify(off_center(movable[0]), timeout=0.3)
    company.go.set()


def test_threads_with_images_of_both_kinds_are_all_answered_rightly(
    server_address: str, digits: list[GreyImage], movable: list[GreyImage]
) -> None:
    images = [*digits, *map(off_center, movable)] * 20
    with client.Client(server_address, coalesce=False) as alone:
        expected = [alone.classify(image).digit for image in images[: len(digits) + len(movable)]] * 20
    with client.Client(server_address) as shared, ThreadPoolExecutor(32) as threads:
        predictions = list(threads.map(shared.classify, images))
    assert [prediction.digit for prediction in predictions] == expected
    assert max(prediction.batch_rows for prediction in predictions) > 1


# Whose fault it is ----------------------------------------------------------


def test_one_bad_image_is_no_trouble_to_its_neighbours(
    busy: Any, connect: Connect, digits: list[GreyImage], blank: GreyImage, joined: Joined, start: Start
) -> None:
    twin, desk, _ = busy(connect)
    waiting = [start(twin.classify, image) for image in (digits[1], digits[2])]
    with pytest.raises(client.InvalidImageError, match="contrast"):
        twin.classify(blank)
    joined.wait_for(2)
    desk.go.set()
    assert [call.result().digit for call in waiting] == [1, 2]
    assert desk.sizes[-1] == 2


def test_a_call_whose_time_is_over_before_there_is_room_is_not_sent(
    busy: Any, connect: Connect, digits: list[GreyImage], joined: Joined, start: Start
) -> None:
    twin, desk, _ = busy(connect)
    waiting = [start(twin.classify, image) for image in (digits[1], digits[2])]
    joined.wait_for(2)
    with pytest.raises(client.DeadlineExceededError, match=r"no answer within 0\.2 s") as caught:
        twin.classify(digits[3], timeout=0.2)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    desk.go.set()
    assert [call.result().digit for call in waiting] == [1, 2]
    assert desk.sizes[-1] == 2


def test_each_caller_waits_no_longer_than_its_own_time_and_the_others_go_on(
    busy: Any, connect: Connect, fakes: Fakes, digits: list[GreyImage], joined: Joined, start: Start
) -> None:
    first, second = threading.Event(), threading.Event()
    sizes: list[int] = []
    seconds: list[float] = []
    come = threading.Semaphore(0)

    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        sizes.append(len(request.pixels) // 784)
        seconds.append(context.time_remaining())
        come.release()
        (first if len(request.pixels) == 784 else second).wait(LONG)
        return fakes.answer(request)

    twin = connect(fakes.serve(classify=classify))
    lone = [start(twin.classify, digits[0]) for _ in range(MAX_LONE)]
    for _ in lone:
        assert come.acquire(timeout=LONG)
    impatient = start(lambda: twin.classify(digits[1], timeout=3))
    patient = [start(lambda digit=digit: twin.classify(digits[digit], timeout=30)) for digit in (2, 3)]
    joined.wait_for(3)
    first.set()
    assert come.acquire(timeout=LONG)
    assert sizes[-1] == 3
    assert 20 < seconds[-1] < 40, "the message may take as long as the most patient caller waits"
    with pytest.raises(client.DeadlineExceededError, match="no answer within 3 s"):
        impatient.result()
    second.set()
    assert [call.result().digit for call in patient] == [2, 3]
    for call in lone:
        call.result()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, client.UnavailableError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, client.OverloadedError),
        (grpc.StatusCode.INTERNAL, client.ServerError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, client.DeadlineExceededError),
        (grpc.StatusCode.INVALID_ARGUMENT, client.InvalidImageError),
    ],
)
def test_a_message_that_fails_gives_each_of_its_callers_an_error_of_its_own(
    connect: Connect,
    fakes: Fakes,
    digits: list[GreyImage],
    joined: Joined,
    start: Start,
    code: grpc.StatusCode,
    kind: type[client.MnistGrpcError],
) -> None:
    go, come, failing = threading.Event(), threading.Semaphore(0), threading.Event()

    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        come.release()
        go.wait(LONG)
        if failing.is_set() and request.pixels[:784] != digits[0].tobytes():
            context.set_trailing_metadata((("incident-id", "abc"), ("grpc-retry-pushback-ms", "-1")))
            context.abort(code, "the reason")
        return fakes.answer(request)

    twin = connect(fakes.serve(classify=classify))
    lone = [start(twin.classify, digits[0]) for _ in range(MAX_LONE)]
    for _ in lone:
        assert come.acquire(timeout=LONG)
    waiting = [start(twin.classify, image) for image in digits[1:6]]
    joined.wait_for(5)
    failing.set()
    go.set()
    errors = []
    for call in waiting:
        with pytest.raises(kind) as caught:
            call.result()
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 5
    assert {error.code for error in errors} == {code.name}
    assert all(isinstance(error.__cause__, grpc.RpcError) for error in errors)
    for call in lone:
        assert call.result().digit == 0
    failing.clear()
    assert twin.classify(digits[7]).digit == 7, "nobody is left behind"


def test_a_server_that_takes_few_images_gets_few_in_a_message(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], joined: Joined, start: Start
) -> None:
    go, come = threading.Event(), threading.Semaphore(0)
    taken: list[int] = []

    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        come.release()
        go.wait(LONG)
        if (count := len(request.pixels) // 784) > 5:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a request carries at most 5 images, this one {count}")
        taken.append(count)
        return fakes.answer(request)

    twin = connect(fakes.serve(classify=classify))
    lone = [start(twin.classify, digits[0]) for _ in range(MAX_LONE)]
    for _ in lone:
        assert come.acquire(timeout=LONG)
    waiting = [start(twin.classify, image) for image in digits]
    joined.wait_for(20)
    go.set()
    assert [call.result().digit for call in waiting] == [*range(10), *range(10)]
    for call in lone:
        call.result()
    assert sum(taken) == 20 + MAX_LONE


def test_an_answer_that_does_not_fit_is_told_to_each_caller(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], joined: Joined, start: Start
) -> None:
    go, come = threading.Event(), threading.Semaphore(0)

    def classify(request: pb.ClassifyRequest, _: Any) -> pb.ClassifyResponse:
        come.release()
        go.wait(LONG)
        return fakes.answer(request) if len(request.pixels) == 784 else pb.ClassifyResponse(digits=[1])

    twin = connect(fakes.serve(classify=classify))
    lone = [start(twin.classify, digits[0]) for _ in range(MAX_LONE)]
    for _ in lone:
        assert come.acquire(timeout=LONG)
    waiting = [start(twin.classify, image) for image in digits[:3]]
    joined.wait_for(3)
    go.set()
    for call in waiting:
        with pytest.raises(client.ServerError, match="answered 3 images with 1 digits"):
            call.result()
    for call in lone:
        call.result()


def test_closing_ends_those_who_wait_and_those_who_are_on_their_way(
    busy: Any, connect: Connect, digits: list[GreyImage], joined: Joined, start: Start
) -> None:
    twin, desk, running = busy(connect)
    waiting = [start(twin.classify, image) for image in digits[:3]]
    joined.wait_for(3)
    twin.close()
    for call in running + waiting:
        with pytest.raises(RuntimeError, match="the client is closed"):
            call.result()
    with pytest.raises(RuntimeError, match="the client is closed"):
        twin.classify(digits[0])
    desk.go.set()


# Callers that are interrupted -----------------------------------------------


class Interrupting(grpc.UnaryUnaryClientInterceptor):
    """Stands for Ctrl-C in the thread that sends the first message of several images."""

    def __init__(self) -> None:
        self.armed = True

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        if self.armed and len(request.pixels) > 784:
            self.armed = False
            raise KeyboardInterrupt
        return continuation(details, request)


def test_who_is_interrupted_while_it_sends_for_others_hands_the_message_on(
    fakes: Fakes, digits: list[GreyImage], joined: Joined, start: Start
) -> None:
    desk = Desk(fakes)
    with client.Client(desk.address, interceptors=[Interrupting()]) as digits_client:
        lone = [start(digits_client.classify, digits[0]) for _ in range(MAX_LONE)]
        desk.wait_for_messages(MAX_LONE)
        waiting = [start(digits_client.classify, image) for image in digits[:6]]
        joined.wait_for(6)
        desk.go.set()
        answers: list[int | None] = []
        for call in waiting:
            try:
                answers.append(call.result().digit)
            except KeyboardInterrupt:
                answers.append(None)
        for call in lone:
            call.result()
        assert answers.count(None) == 1
        assert all(answer in (digit, None) for digit, answer in enumerate(answers))
        assert desk.sizes == [1] * MAX_LONE + [5]
        assert digits_client.classify(digits[7]).digit == 7


@pytest.fixture
async def held(fakes: Fakes, digits: list[GreyImage]) -> Any:
    """`held(count)`: a client, and so many tasks whose images are at the server in one message, until `go`."""
    lone_go, go, ended = threading.Event(), threading.Event(), threading.Event()
    come = threading.Semaphore(0)

    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        many = len(request.pixels) > 784
        if many:
            context.add_callback(ended.set)
        come.release()
        (go if many else lone_go).wait(LONG)
        return fakes.answer(request)

    async with client.AsyncClient(fakes.serve(classify=classify)) as digits_client:

        async def held(count: int) -> Any:
            lone = [asyncio.create_task(digits_client.classify(digits[0])) for _ in range(MAX_LONE)]
            for _ in lone:
                assert await asyncio.to_thread(come.acquire, timeout=LONG)
            tasks = [asyncio.create_task(digits_client.classify(image)) for image in digits[:count]]
            await asyncio.sleep(0)
            lone_go.set()
            await asyncio.gather(*lone)
            assert await asyncio.to_thread(come.acquire, timeout=LONG)
            return tasks, go, ended

        yield held
        go.set()
        lone_go.set()


async def test_a_cancelled_task_leaves_the_others_their_message(held: Any) -> None:
    tasks, go, _ = await held(4)
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    go.set()
    assert [(await tasks[number]).digit for number in (0, 2, 3)] == [0, 2, 3]


async def test_a_message_whose_tasks_were_all_cancelled_is_called_off(held: Any) -> None:
    tasks, _, ended = await held(3)
    for task in tasks:
        task.cancel()
    assert all(isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*tasks, return_exceptions=True))
    assert await asyncio.to_thread(ended.wait, LONG), "the server still works for nobody"


async def test_a_task_that_is_cancelled_before_its_message_is_sent_is_not_in_it(
    fakes: Fakes, digits: list[GreyImage], joined: Joined
) -> None:
    desk = Desk(fakes)
    async with client.AsyncClient(desk.address) as digits_client:
        lone = [asyncio.create_task(digits_client.classify(digits[0])) for _ in range(MAX_LONE)]
        await asyncio.to_thread(desk.wait_for_messages, MAX_LONE)
        tasks = [asyncio.create_task(digits_client.classify(image)) for image in digits[:4]]
        await asyncio.to_thread(joined.wait_for, 4)
        tasks[2].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        desk.go.set()
        assert [(await tasks[number]).digit for number in (0, 1, 3)] == [0, 1, 3]
        await asyncio.gather(*lone)
    assert desk.sizes == [1] * MAX_LONE + [3]


async def test_a_caller_may_set_a_timeout_of_its_own_around_a_shared_message(held: Any) -> None:
    tasks, go, _ = await held(2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await tasks[0]
    go.set()
    assert (await tasks[1]).digit == 1
