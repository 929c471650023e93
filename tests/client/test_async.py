"""What only the async client has: tasks, cancellation, async sources, the event loop."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import client
from client import _core
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import Fakes

GreyImage = npt.NDArray[np.uint8]


@pytest.fixture(autouse=True)
async def _nothing_is_left_behind() -> AsyncIterator[None]:
    """No task that goes on, no exception that nobody retrieved."""
    stray: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: stray.append(context))
    before = asyncio.all_tasks()
    yield
    if tasks := asyncio.all_tasks() - before - {asyncio.current_task()}:
        _, left = await asyncio.wait(tasks, timeout=2)
        assert not left
    gc.collect()
    await asyncio.sleep(0)
    assert not stray


def told(result: client.Prediction | client.MnistGrpcError) -> int | str:
    return result.digit if isinstance(result, client.Prediction) else "bad"


async def happens(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10), "it did not happen"


def sevens(message: pb.StreamClassifyRequest) -> pb.StreamClassifyResponse:
    """Read a 7 in whatever was sent."""
    count = len(message.frames.pixels) // 784
    result = pb.ClassifyResponse(digits=[7] * count, probabilities=[0.1] * 10 * count)
    block = pb.FrameBlock(first_sequence=message.first_sequence, frame_count=count, result=result)
    return pb.StreamClassifyResponse(blocks=[block])


async def test_tasks_may_share_a_client(server_address: str, digits: list[GreyImage]) -> None:
    async with client.AsyncClient(server_address) as shared:
        predictions = await asyncio.gather(*(shared.classify(image) for image in digits * 10))
    assert [prediction.digit for prediction in predictions] == [*range(10)] * 20


async def test_a_source_may_be_asynchronous(server_address: str, digits: list[GreyImage], blank: GreyImage) -> None:
    async def frames() -> AsyncIterator[GreyImage]:
        for image in (*digits[:3], blank, digits[4]):
            await asyncio.sleep(0)
            yield image

    async with client.AsyncClient(server_address) as digits_client:
        results = [told(result) async for result in digits_client.stream_classify(frames())]
    assert results == [0, 1, 2, "bad", 4]


@pytest.mark.parametrize("window", [1, 256])
async def test_a_result_comes_while_an_async_source_is_still_open(
    fakes: Fakes, digits: list[GreyImage], window: int
) -> None:
    taken = asyncio.Event()

    async def frames() -> AsyncIterator[GreyImage]:
        for image in digits[:3]:
            yield image
            await asyncio.wait_for(taken.wait(), 5)
            taken.clear()

    results = []
    async with client.AsyncClient(fakes.serve()) as digits_client:
        async for result in digits_client.stream_classify(frames(), window=window):
            results.append(told(result))
            taken.set()
    assert results == [0, 1, 2]


async def test_an_error_of_an_async_source_is_raised_after_the_results_before_it(
    server_address: str, digits: list[GreyImage]
) -> None:
    async def frames() -> AsyncIterator[GreyImage]:
        yield digits[3]
        raise KeyError("mine")

    results = []

    async def read() -> None:
        async with client.AsyncClient(server_address) as digits_client:
            async for result in digits_client.stream_classify(frames()):
                results.append(told(result))

    with pytest.raises(KeyError, match="mine"):
        await read()
    assert results == [3]


async def test_a_source_that_is_cancelled_does_not_pass_for_one_that_ended(
    server_address: str, digits: list[GreyImage]
) -> None:
    async def frames() -> AsyncIterator[GreyImage]:
        yield digits[3]
        raise asyncio.CancelledError  # as of a camera's task that somebody cancelled

    async def read() -> list[int | str]:
        async with client.AsyncClient(server_address) as digits_client:
            return [told(result) async for result in digits_client.stream_classify(frames())]

    with pytest.raises((asyncio.CancelledError, client.MnistGrpcError, RuntimeError)):
        await read()


async def test_the_event_loop_goes_on_while_a_synchronous_source_waits(fakes: Fakes, digits: list[GreyImage]) -> None:
    asked, ticked = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def frames() -> Iterator[GreyImage]:
        asked.set()
        loop.call_soon_threadsafe(ticked.set)
        assert ticked.wait(3), "the event loop stands still"
        yield digits[7]

    async with client.AsyncClient(fakes.serve()) as digits_client:
        assert [told(result) async for result in digits_client.stream_classify(frames())] == [7]


async def test_frames_that_take_long_to_prepare_are_prepared_in_threads(
    fakes: Fakes, digits: list[GreyImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[threading.Thread] = set()

    def prepare(image: Any) -> Any:
        threads.add(threading.current_thread())
        return real(image)

    real = _core.prepare
    monkeypatch.setattr(_core, "prepare", prepare)
    large = np.kron(digits[7], np.ones((2, 2), np.uint8))
    async with client.AsyncClient(fakes.serve(stream=lambda messages, _: map(sevens, messages))) as digits_client:
        results = digits_client.stream_classify([digits[7], 255 - digits[7], large])
        assert [told(result) async for result in results] == [7, 7, 7]
    assert threads
    assert threading.current_thread() not in threads


async def test_a_stream_gives_way_to_the_loop_every_few_frames(fakes: Fakes, digits: list[GreyImage]) -> None:
    class Frames(list[GreyImage]):
        def __iter__(self) -> Iterator[GreyImage]:
            for number in range(200):
                asked_at.append(turns)
                yield digits[number % 20]

    asked_at: list[int] = []
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with client.AsyncClient(fakes.serve()) as digits_client:
        counting = asyncio.create_task(count())
        assert len([result async for result in digits_client.stream_classify(Frames(), window=200)]) == 200
        counting.cancel()
    assert max(Counter(asked_at).values()) <= 20, "so many frames in one turn of the loop"


async def test_the_event_loop_goes_on_while_a_batch_is_prepared(fakes: Fakes, digits: list[GreyImage]) -> None:
    ticked = threading.Event()
    loop = asyncio.get_running_loop()

    def images() -> Iterator[GreyImage]:
        loop.call_soon_threadsafe(ticked.set)
        assert ticked.wait(3), "the event loop stands still"
        yield digits[7]

    async with client.AsyncClient(fakes.serve()) as digits_client:
        assert [prediction.digit for prediction in await digits_client.classify_batch(images())] == [7]


# Cancellation ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["classify", "classify_batch"])
async def test_a_cancelled_task_cancels_its_call(fakes: Fakes, digits: list[GreyImage], method: str) -> None:
    begun, ended = threading.Event(), threading.Event()

    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        context.add_callback(ended.set)
        begun.set()
        fakes.stopping.wait(20)
        return fakes.answer(request)

    async with client.AsyncClient(fakes.serve(classify=classify)) as digits_client:
        call = digits_client.classify(digits[7]) if method == "classify" else digits_client.classify_batch(digits)
        task: asyncio.Task[Any] = asyncio.create_task(call)
        await happens(begun)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await happens(ended)


async def test_a_cancelled_consumer_cancels_its_stream(fakes: Fakes, digits: list[GreyImage]) -> None:
    begun, ended = threading.Event(), threading.Event()

    def stream(_: Iterator[pb.StreamClassifyRequest], context: Any) -> Iterator[pb.StreamClassifyResponse]:
        context.add_callback(ended.set)
        begun.set()
        fakes.stopping.wait(20)
        yield from ()

    async with client.AsyncClient(fakes.serve(stream=stream)) as digits_client:

        async def consume() -> None:
            async for _ in digits_client.stream_classify(digits):
                pass

        task = asyncio.create_task(consume())
        await happens(begun)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await happens(ended)


async def test_a_caller_may_set_a_timeout_of_its_own(fakes: Fakes, digits: list[GreyImage]) -> None:
    async with client.AsyncClient(fakes.black_hole()) as digits_client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await digits_client.classify(digits[7])


async def test_leaving_a_stream_by_aclosing_has_ended_everything(server_address: str, digits: list[GreyImage]) -> None:
    closed = False

    async def frames() -> AsyncIterator[GreyImage]:
        nonlocal closed
        try:
            while True:
                for image in digits:
                    yield image
        finally:
            closed = True

    def ours() -> list[Any]:
        """Coroutines of the client that run as tasks; gRPC's own end a little later."""
        coroutines: list[Any] = [task.get_coro() for task in asyncio.all_tasks()]
        folder = str(Path(client.__file__).parent)
        codes = [(one, getattr(one, "cr_code", None)) for one in coroutines]
        return [one for one, code in codes if code and code.co_filename.startswith(folder)]

    source = frames()
    async with client.AsyncClient(server_address) as digits_client:
        results = digits_client.stream_classify(source, window=5)
        async with aclosing(results):
            assert told(await anext(results)) == 0
            assert ours()
        assert ours() == []
        assert closed


async def test_leaving_the_loop_is_enough_to_end_the_call(fakes: Fakes, digits: list[GreyImage]) -> None:
    ended = threading.Event()

    def stream(messages: Iterator[pb.StreamClassifyRequest], context: Any) -> Iterator[pb.StreamClassifyResponse]:
        context.add_callback(ended.set)
        yield from map(fakes.answer_frames, messages)

    async with client.AsyncClient(fakes.serve(stream=stream)) as digits_client:
        gc.disable()  # what is left is noticed without it
        try:
            async for _ in digits_client.stream_classify(digits * 100, window=5):
                break
            await happens(ended)
        finally:
            gc.enable()


async def test_a_sync_generator_is_closed_in_its_thread_when_a_stream_is_left(
    server_address: str, digits: list[GreyImage]
) -> None:
    threads: list[str] = []

    def frames() -> Iterator[GreyImage]:
        try:
            while True:
                yield digits[7]
        finally:
            threads.append(threading.current_thread().name)

    async with client.AsyncClient(server_address) as digits_client:
        async with aclosing(digits_client.stream_classify(frames(), window=5)) as results:
            assert told(await anext(results)) == 7
        await asyncio.to_thread(_joined, "stream-source")
    assert threads == ["stream-source"]


def _joined(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(10)


async def test_an_async_source_that_does_not_end_when_cancelled_is_waited_for_with_its_cleaning_up(
    server_address: str, digits: list[GreyImage]
) -> None:
    steps: list[str] = []

    async def frames() -> AsyncIterator[GreyImage]:
        try:
            yield digits[7]
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    async with client.AsyncClient(server_address) as digits_client:
        async with aclosing(digits_client.stream_classify(frames())) as results:
            assert told(await anext(results)) == 7
        steps.append("left")
    assert steps == ["cleaned up", "left"]


async def test_an_error_in_the_cleaning_up_of_a_source_is_told_to_the_event_loop(
    server_address: str, digits: list[GreyImage]
) -> None:
    async def frames() -> AsyncIterator[GreyImage]:
        try:
            while True:
                yield digits[7]
        finally:
            raise KeyError("mine")

    loop = asyncio.get_running_loop()
    told_to_loop: list[Any] = []
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: told_to_loop.append(context["exception"]))
    async with (
        client.AsyncClient(server_address) as digits_client,
        aclosing(digits_client.stream_classify(frames(), window=3)) as results,
    ):
        assert told(await anext(results)) == 7
    loop.set_exception_handler(before)
    assert [repr(error) for error in told_to_loop] == ["KeyError('mine')"]


async def test_a_closed_client_refuses_a_stream_at_once(fakes: Fakes, digits: list[GreyImage]) -> None:
    digits_client = client.AsyncClient(fakes.nobody())
    await digits_client.close()
    with pytest.raises(RuntimeError, match="closed"):
        digits_client.stream_classify(digits)


async def test_a_status_that_comes_in_the_middle_of_a_write_is_told_as_it_is(
    fakes: Fakes, digits: list[GreyImage]
) -> None:
    # grpc.aio replaces it by INTERNAL where the write fails after it came (grpc#36066).
    def refuse(_: Any, context: Any) -> None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

    async with client.AsyncClient(fakes.serve(stream=refuse)) as digits_client:
        for _ in range(50):
            with pytest.raises(client.UnauthenticatedError, match="who are you"):
                async for _ in digits_client.stream_classify(digits):
                    pass


# The event loop -------------------------------------------------------------


def test_a_client_may_be_made_before_its_event_loop(server_address: str, digits: list[GreyImage]) -> None:
    script = """
import asyncio, gc, sys
import numpy as np
import client

image = np.frombuffer(bytes.fromhex(sys.argv[2]), np.uint8).reshape(28, 28)

async def read(digits):
    async with digits:
        print((await digits.classify(image)).digit)
        async for result in digits.stream_classify([image]):
            print(result.digit)

for _ in range(2):
    asyncio.run(read(client.AsyncClient(sys.argv[1])))

async def drop():
    digits = client.AsyncClient(sys.argv[1])
    print((await digits.classify(image)).digit)

asyncio.run(drop())
gc.collect()
"""
    process = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore::ResourceWarning",
            "-c",
            script,
            server_address,
            digits[7].tobytes().hex(),
        ],
        cwd=Path(client.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (process.stdout, process.stderr, process.returncode) == ("7\n" * 5, "", 0)


async def test_sources_that_block_hold_up_no_other_call(server_address: str, digits: list[GreyImage]) -> None:
    go = threading.Event()

    def camera() -> Iterator[GreyImage]:
        yield digits[3]
        go.wait(20)

    async with client.AsyncClient(server_address) as shared:
        streams = [shared.stream_classify(camera()) for _ in range(40)]  # more than the loop's own threads
        for stream in streams:
            first = await anext(stream)
            assert isinstance(first, client.Prediction)
            assert first.digit == 3
        picture = Image.fromarray(255 - digits[7])  # prepared in a thread
        assert (await shared.classify(picture, timeout=10)).digit == 7
        go.set()
        for stream in streams:
            assert [result async for result in stream] == []


async def test_a_stream_that_begins_after_closing_says_so(server_address: str, digits: list[GreyImage]) -> None:
    async with client.AsyncClient(server_address) as twin:
        stream = twin.stream_classify([digits[3]])
    with pytest.raises(RuntimeError, match="the client is closed"):
        await anext(stream)
