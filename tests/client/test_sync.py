"""What only the sync client has: threads, processes, and `client.classify`."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

import client
from client import _core, _ledger
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import Fakes

GreyImage = npt.NDArray[np.uint8]
HOME = Path(client.__file__).parents[1]


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with this very client; a process that does not end is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", script, *arguments],
        cwd=HOME,
        capture_output=True,
        text=True,
        timeout=30,
    )


@contextmanager
def no_collection() -> Iterator[None]:
    """What is left has to be noticed without a collection of garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_threads_may_share_a_client(server_address: str, digits: list[GreyImage]) -> None:
    with client.Client(server_address) as shared, ThreadPoolExecutor(8) as threads:

        def read(first: int) -> list[int]:
            return [shared.classify(digits[(first + index) % 20]).digit for index in range(50)]

        answers = list(threads.map(read, range(8)))
    assert answers == [[(first + index) % 10 for index in range(50)] for first in range(8)]


def test_threads_may_stream_over_a_shared_client(server_address: str, digits: list[GreyImage]) -> None:
    with client.Client(server_address) as shared, ThreadPoolExecutor(4) as threads:

        def read(digit: int) -> set[int]:
            results = shared.stream_classify([digits[digit]] * 200)
            return {result.digit for result in results if isinstance(result, client.Prediction)}

        assert list(threads.map(read, range(4))) == [{0}, {1}, {2}, {3}]


def test_a_stream_leaves_no_thread_behind(server_address: str, digits: list[GreyImage]) -> None:
    def names() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name.startswith("stream-")}

    with client.Client(server_address) as digits_client:
        assert len(list(digits_client.stream_classify(digits))) == 20
        for result in digits_client.stream_classify(digits * 100):
            assert isinstance(result, client.Prediction)
            break
    for thread in threading.enumerate():
        if thread.name.startswith("stream-"):
            thread.join(5)
    assert names() == set()


def test_many_streams_leave_as_many_threads_as_there_were(fakes: Fakes, digits: list[GreyImage]) -> None:
    def stream(messages: Iterator[pb.StreamClassifyRequest], context: Any) -> Iterator[pb.StreamClassifyResponse]:
        for message in itertools.islice(messages, 2):
            yield fakes.answer_frames(message)
        context.abort(grpc.StatusCode.UNAVAILABLE, "lost")

    address = fakes.serve(stream=stream)
    with client.Client(address) as digits_client:
        assert len(list(digits_client.stream_classify(digits, window=1))) == 20
        before = set(threading.enumerate())
        for number in range(20):
            results = digits_client.stream_classify(digits, window=2)
            assert len(list(itertools.islice(results, number))) == number
            results.close()
    after = {thread for thread in threading.enumerate() if not thread.name.startswith("ThreadPoolExecutor")}  # the fake
    for thread in after - before:
        thread.join(10)
    assert not [thread for thread in after - before if thread.is_alive()]


def test_leaving_the_loop_is_enough_to_end_the_call(fakes: Fakes, digits: list[GreyImage]) -> None:
    ended = threading.Event()

    def stream(messages: Iterator[pb.StreamClassifyRequest], context: Any) -> Iterator[pb.StreamClassifyResponse]:
        context.add_callback(ended.set)
        yield from map(fakes.answer_frames, messages)

    with client.Client(fakes.serve(stream=stream)) as digits_client, no_collection():
        for _ in digits_client.stream_classify(digits * 100, window=5):
            break
        assert ended.wait(10)


def test_leaving_does_not_wait_for_a_source_that_hangs(fakes: Fakes, digits: list[GreyImage]) -> None:
    def frames() -> Iterator[GreyImage]:
        yield digits[7]
        fakes.stopping.wait(20)

    with client.Client(fakes.serve()) as digits_client:
        for _ in digits_client.stream_classify(frames()):
            break
    assert not fakes.stopping.is_set()


def test_a_stream_may_be_closed_from_another_thread(server_address: str, digits: list[GreyImage]) -> None:
    with client.Client(server_address) as digits_client:
        results = digits_client.stream_classify(digits * 100)
        next(results)
        closer = threading.Thread(target=results.close)
        closer.start()
        closer.join(10)
        assert not closer.is_alive()


@pytest.mark.parametrize("place", ["the thread that sends", "any, while the lock is held"])
def test_a_dropped_stream_may_be_collected_anywhere(
    fakes: Fakes, digits: list[GreyImage], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    ended, dropped, collected = threading.Event(), threading.Event(), threading.Event()
    holding = place == "any, while the lock is held"

    def stream(messages: Iterator[pb.StreamClassifyRequest], context: Any) -> Iterator[pb.StreamClassifyResponse]:
        context.add_callback(ended.set)
        yield from map(fakes.answer_frames, messages)

    def collect() -> None:
        gc.collect()
        collected.set()

    def build_request(pixels: npt.NDArray[np.uint8]) -> pb.ClassifyRequest:
        if dropped.is_set() and not holding:
            dropped.clear()
            collect()
        return real(pixels)

    def frames() -> Iterator[GreyImage]:
        yield digits[7]
        dropped.wait(20)
        yield from itertools.repeat(digits[7])

    real = _core.build_request
    monkeypatch.setattr(_ledger, "build_request", build_request)
    with no_collection(), client.Client(fakes.serve(stream=stream)) as digits_client:
        kept: list[Any] = [digits_client.stream_classify(frames())]
        kept.append(kept)  # a cycle, which only a collection can free
        next(kept[0])
        [mine] = digits_client._streams
        lock = mine._lock
        del kept, mine
        if holding:
            # Somebody holds what the stream's own threads need; whoever collects does not wait for them.
            with lock:
                collector = threading.Thread(target=collect, daemon=True)
                collector.start()
                assert collected.wait(10)
        dropped.set()
        assert collected.wait(10)
        assert ended.wait(10)
        assert digits_client.classify(digits[7], timeout=5).digit == 7


class InGenerators(grpc.StreamStreamClientInterceptor):
    """Gives a generator in place of a call, as instrumentations do."""

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        yield from continuation(details, requests)


def test_a_stream_through_an_interceptor_that_gives_a_generator_ends_as_others_do(
    fakes: Fakes, digits: list[GreyImage]
) -> None:
    def never(_: Any, context: Any) -> Iterator[pb.StreamClassifyResponse]:
        fakes.stopping.wait(20)
        yield from ()

    with client.Client(fakes.serve(), interceptors=[InGenerators()]) as digits_client:
        assert len(list(digits_client.stream_classify(digits))) == 20
        results = digits_client.stream_classify(itertools.repeat(digits[7]))
        next(results)
        results.close()
    with (
        client.Client(fakes.serve(stream=never), interceptors=[InGenerators()]) as digits_client,
        pytest.raises(client.DeadlineExceededError, match=r"within 0\.3 s"),
    ):
        list(digits_client.stream_classify(digits, timeout=0.3))


def test_a_generator_in_place_of_a_call_is_closed_by_none_but_the_thread_that_is_in_it(
    fakes: Fakes, digits: list[GreyImage]
) -> None:
    took, closed = set(), set()
    over = threading.Event()

    class Answers:
        def __init__(self, call: Any) -> None:
            self._call = call

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            took.add(threading.get_ident())
            return next(self._call)

        def close(self) -> None:
            closed.add(threading.get_ident())
            self._call.cancel()
            over.set()

    class InObjects(grpc.StreamStreamClientInterceptor):
        def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
            return Answers(continuation(details, requests))

    with client.Client(fakes.serve(), interceptors=[InObjects()]) as digits_client:
        results = digits_client.stream_classify(itertools.repeat(digits[7]))
        next(results)
        results.close()
        assert over.wait(20)
    assert closed == took


# client.classify ------------------------------------------------------------


@pytest.fixture
def peers(fakes: Fakes) -> list[str]:
    """Who called the server that is `MNIST_GRPC_TARGET` of this test."""
    return []


@pytest.fixture
def address(fakes: Fakes, peers: list[str]) -> str:
    def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        peers.append(context.peer())
        return fakes.answer(request)

    return fakes.serve(classify=classify)


def test_the_one_liner_asks_the_target_of_the_environment(
    address: str, peers: list[str], digits: list[GreyImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_GRPC_TARGET", address)
    assert client.classify(digits[7]).digit == 7
    assert len(peers) == 1


def test_the_one_liner_keeps_its_connection(address: str, peers: list[str], digits: list[GreyImage]) -> None:
    assert [client.classify(image, target=address).digit for image in digits] == [*range(10), *range(10)]
    assert len(peers) == 20
    assert len(set(peers)) == 1


def test_the_one_liner_may_be_called_from_many_threads_at_once(
    address: str, peers: list[str], digits: list[GreyImage]
) -> None:
    with ThreadPoolExecutor(8) as threads:
        predictions = list(threads.map(lambda image: client.classify(image, target=address), digits * 5))
    assert [prediction.digit for prediction in predictions] == [*range(10)] * 10
    assert len(set(peers)) == 1


def test_the_one_liner_has_a_timeout(fakes: Fakes, digits: list[GreyImage]) -> None:
    with pytest.raises(client.DeadlineExceededError, match=r"0\.3 s"):
        client.classify(digits[7], target=fakes.black_hole(), timeout=0.3)


# Processes ------------------------------------------------------------------


def test_a_process_that_leaves_everything_open_still_ends(server_address: str, digits: list[GreyImage]) -> None:
    script = """
import sys, threading
import numpy as np
import client

image = np.frombuffer(bytes.fromhex(sys.argv[2]), np.uint8).reshape(28, 28)

def frames():
    yield image
    threading.Event().wait()

print(client.classify(image, target=sys.argv[1]).digit)
digits = client.Client(sys.argv[1])
results = digits.stream_classify(frames())
print(next(results).digit)
"""
    process = run_script(script, server_address, digits[7].tobytes().hex())
    assert (process.stdout, process.stderr, process.returncode) == ("7\n7\n", "", 0)


def test_a_client_that_is_only_dropped_makes_no_noise(server_address: str, digits: list[GreyImage]) -> None:
    script = """
import gc, sys
import numpy as np
import client

image = np.frombuffer(bytes.fromhex(sys.argv[2]), np.uint8).reshape(28, 28)
digits = client.Client(sys.argv[1])
print(digits.classify(image).digit)
del digits
gc.collect()
"""
    process = run_script(script, server_address, digits[7].tobytes().hex())
    assert (process.stdout, process.stderr, process.returncode) == ("7\n", "", 0)


def test_the_one_liner_works_on_both_sides_of_a_fork(server_address: str, digits: list[GreyImage]) -> None:
    script = """
import os, signal, sys
import numpy as np
import client

signal.alarm(20)  # survives the fork no more than this
image = np.frombuffer(bytes.fromhex(sys.argv[2]), np.uint8).reshape(28, 28)
assert client.classify(image, target=sys.argv[1]).digit == 7
child = os.fork()
if child == 0:
    signal.alarm(10)
    os._exit(client.classify(image, target=sys.argv[1], timeout=5).digit)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), client.classify(image, target=sys.argv[1]).digit)
"""
    process = run_script(script.replace("-W", ""), server_address, digits[7].tobytes().hex())
    assert (process.stdout, process.returncode) == ("7 7\n", 0), process.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_stream_that_was_open_at_a_fork_says_so_in_the_child(server_address: str, digits: list[GreyImage]) -> None:
    script = """
import itertools, os, signal, sys
import numpy as np
import client

signal.alarm(20)  # survives the fork no more than this
image = np.frombuffer(bytes.fromhex(sys.argv[2]), np.uint8).reshape(28, 28)
digits = client.Client(sys.argv[1])
results = digits.stream_classify(itertools.repeat(image))
next(results)

def take():
    try:
        next(results)
    except RuntimeError as error:
        print(error, flush=True)

for action in (take, results.close):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        action()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(next(results).digit)
results.close()
"""
    process = run_script(script, server_address, digits[7].tobytes().hex())
    error, digit = process.stdout.splitlines() or [process.stderr, ""]
    assert "forked from" in error
    assert (digit, process.returncode) == ("7", 0), process.stderr


def test_a_stream_that_begins_after_closing_says_so(server_address: str, digits: list[GreyImage]) -> None:
    with client.Client(server_address) as twin:
        stream = twin.stream_classify([digits[3]])
    with pytest.raises(RuntimeError, match="the client is closed"):
        next(stream)
