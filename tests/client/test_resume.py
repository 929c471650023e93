"""Streams whose connections break, stall, or lose their servers, each case for the sync and the async client."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

import client
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from bench.reliability.proxy import Fault, Proxy
    from tests.client.conftest import Connect, Fakes, Running

GreyImage = npt.NDArray[np.uint8]
Put = Callable[..., "Proxy"]

ROOT = Path(__file__).parents[2]


notices_resets = pytest.mark.skipif(
    tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 66),
    reason="an older gRPC may not notice that a young connection was reset: then the stream's timeout passes",
)


@pytest.fixture
def put_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    """`put_proxy(target, faults)`: a proxy before a server, whose connections have these faults in turn."""
    monkeypatch.syspath_prepend(str(ROOT))  # the proxy belongs to programs that are not installed
    from bench.reliability.proxy import Proxy

    opened: list[Proxy] = []

    def put(target: str, faults: Iterable[Fault | None] = ()) -> Proxy:
        opened.append(Proxy(target, faults))
        return opened[-1]

    yield put
    for proxy in opened:
        proxy.close()


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> type[Fault]:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.reliability.proxy import Fault

    return Fault


@pytest.fixture(scope="session")
def film(digits: list[GreyImage]) -> list[GreyImage]:
    """2,000 different frames: digits whose ink fades here and there."""
    random_ = np.random.default_rng(4)
    frames = []
    for number in range(2000):
        image = digits[number % 20].copy()
        faded = (image > 0) & (image < 250) & (random_.random(image.shape) < 0.3)
        image[faded] = (image[faded] * 0.7).astype(np.uint8)
        frames.append(image)
    assert len({image.tobytes() for image in frames}) == 2000
    return frames


@pytest.fixture(scope="session")
def expected(server_address: str, film: list[GreyImage]) -> list[client.Prediction]:
    """What a batch says of the frames."""
    with client.Client(server_address, timeout=60) as asked:
        return asked.classify_batch(film)


def check(results: Iterable[client.Prediction | client.MnistGrpcError], expected: list[client.Prediction]) -> None:
    """Each frame has its own result: neighbours differ by far more than the batches they were computed in."""
    count = 0
    for number, (result, right) in enumerate(zip(results, expected, strict=True)):
        assert isinstance(result, client.Prediction), (number, result)
        assert result.digit == right.digit, number
        assert np.allclose(result.probabilities, right.probabilities, atol=1e-3), number
        count += 1
    assert count == len(expected)


# Lost connections -------------------------------------------------------------


@notices_resets
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("how", ["reset", "close"])
def test_connections_cut_in_the_middle_lose_and_double_no_frame(
    connect: Connect,
    server_address: str,
    put_proxy: Put,
    fault: type[Fault],
    film: list[GreyImage],
    expected: list[client.Prediction],
    way: Any,
    how: Any,
) -> None:
    random_ = random.Random(way + how)
    least, most = (5_000, 100_000) if way == "up" else (50, 9_000)
    faults = [fault(most, way, how), *(fault(random_.randrange(least, most), way, how) for _ in range(12))]
    proxy = put_proxy(server_address, faults)
    check(connect(proxy.address, timeout=60).stream_classify(film, window=32), expected)
    assert proxy.broken == len(faults)


@notices_resets
def test_a_connection_cut_at_each_of_its_first_bytes_is_made_again(
    connect: Connect,
    server_address: str,
    put_proxy: Put,
    fault: type[Fault],
    film: list[GreyImage],
    expected: list[client.Prediction],
) -> None:
    faults = [fault(after, "down") for after in (2_000, 1, 9, 50, 120, 300)]
    proxy = put_proxy(server_address, faults)
    check(connect(proxy.address, timeout=60).stream_classify(film[:300], window=8), expected[:300])
    assert proxy.broken == len(faults)


def test_a_connection_that_is_lost_while_the_source_waits_is_made_again_for_its_next_frame(
    connect: Connect,
    server_address: str,
    put_proxy: Put,
    film: list[GreyImage],
    expected: list[client.Prediction],
) -> None:
    proxy = put_proxy(server_address)
    go = threading.Event()

    def frames() -> Iterator[GreyImage]:
        yield from film[:3]
        assert go.wait(20)
        yield from film[3:6]

    results = connect(proxy.address, timeout=60).stream_classify(frames())
    first = list(itertools.islice(results, 3))
    proxy.cut()
    go.set()
    check([*first, *results], expected[:6])


def test_a_live_stream_goes_on_after_a_lost_connection_with_its_newest_frame(
    connect: Connect, server_address: str, put_proxy: Put, film: list[GreyImage], expected: list[client.Prediction]
) -> None:
    proxy = put_proxy(server_address)
    answered = threading.Event()

    def frames() -> Iterator[GreyImage]:
        for number, image in enumerate(film[:300]):
            if number % 50 == 25:
                assert answered.wait(20)
                proxy.cut()
            yield image

    results = []
    for result in connect(proxy.address, timeout=60).stream_classify(frames(), latest_only=True):
        results.append(result)
        answered.set()
    assert len(results) == 300
    for result, right in zip(results, expected, strict=False):
        if isinstance(result, client.Prediction):
            assert np.allclose(result.probabilities, right.probabilities, atol=1e-3)
        else:
            assert isinstance(result, client.OvertakenError)
    assert isinstance(results[-1], client.Prediction)
    assert proxy.connections > 1


def test_a_server_that_ends_every_stream_after_some_answers_gets_the_rest_in_other_streams(
    connect: Connect, fakes: Fakes, digits: list[GreyImage]
) -> None:
    codes = itertools.cycle([grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
    received: list[int] = []

    def stream(messages: Iterator[pb.StreamClassifyRequest], context: Any) -> Iterator[pb.StreamClassifyResponse]:
        for message in itertools.islice(messages, 2):
            received.append(message.first_sequence)
            yield fakes.answer_frames(message)
        context.abort(next(codes), "about to stop")

    results = connect(fakes.serve(stream=stream), timeout=60).stream_classify(digits * 20, window=7)
    digits_read = [result.digit for result in results if isinstance(result, client.Prediction)]
    assert digits_read == [*range(10)] * 40
    assert received == sorted(set(received)), "what was answered is not sent again"


def test_a_server_that_is_restarted_while_a_stream_runs_loses_no_frame(
    connect: Connect, fakes: Fakes, digits: list[GreyImage]
) -> None:
    servers = [type(fakes)(digits)]
    address = servers[0].serve()
    read = []
    for result in connect(address, timeout=60).stream_classify(digits * 20, window=16):
        read.append(result.digit if isinstance(result, client.Prediction) else -1)
        if len(read) % 100 == 0:
            servers.append(type(fakes)(digits))
            servers[-1].serve(port=int(address.rsplit(":", 1)[1]))  # both have the port for a moment, nobody else
            servers[-2].close()
    servers[-1].close()
    assert read == [*range(10)] * 40


@pytest.mark.parametrize("which", [0, 1])
def test_a_stream_whose_server_is_gone_for_good_goes_on_at_another_one(
    connect: Connect,
    server_address: str,
    put_proxy: Put,
    film: list[GreyImage],
    expected: list[client.Prediction],
    which: int,
) -> None:
    proxies = [put_proxy(server_address), put_proxy(server_address)]
    results = connect([proxy.address for proxy in proxies], timeout=60).stream_classify(film[:200], window=16)
    begin = list(itertools.islice(results, 100))
    proxies[which].close()
    check([*begin, *results], expected[:200])


# Errors that no other call mends ------------------------------------------------


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "UNIMPLEMENTED", "INTERNAL", "INVALID_ARGUMENT"])
def test_a_stream_that_is_refused_for_good_is_not_tried_again(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], code: str
) -> None:
    calls = []

    def stream(messages: Iterator[pb.StreamClassifyRequest], context: Any) -> Iterator[pb.StreamClassifyResponse]:
        calls.append(code)
        yield fakes.answer_frames(next(messages))
        next(messages, None)
        context.abort(grpc.StatusCode[code], "for good")

    results = connect(fakes.serve(stream=stream), timeout=60).stream_classify([digits[7]] * 3, window=1)
    assert next(results).digit == 7  # type: ignore[union-attr]
    with pytest.raises(client.MnistGrpcError, match="for good") as raised:
        next(results)
    assert raised.value.code == code
    assert isinstance(raised.value.__cause__, grpc.RpcError)
    assert len(calls) == 1


def test_a_server_that_never_comes_back_is_told_with_what_broke_the_connection(
    connect: Connect, server_address: str, put_proxy: Put, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    proxy = put_proxy(server_address)

    def frames() -> Iterator[GreyImage]:
        yield digits[7]
        proxy.close()
        yield digits[7]

    results = connect(proxy.address, timeout=2).stream_classify(frames(), window=1)
    assert next(results).digit == 7  # type: ignore[union-attr]
    with pytest.raises(client.UnavailableError, match=rf"^{proxy.address}: the connection was lost, .* 2 s") as told:
        start(lambda: next(results)).result(within=10)
    assert isinstance(told.value.__cause__, grpc.RpcError)


# Black holes ------------------------------------------------------------------


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("after", [1, 100, 5_000])
def test_a_connection_that_falls_silent_runs_into_the_timeout(
    connect: Connect,
    server_address: str,
    put_proxy: Put,
    fault: type[Fault],
    digits: list[GreyImage],
    start: Callable[..., Running],
    way: Any,
    after: int,
) -> None:
    proxy = put_proxy(server_address, [fault(after, way, "silence")])
    results = connect(proxy.address).stream_classify(itertools.cycle(digits), timeout=0.5)
    with pytest.raises(client.DeadlineExceededError, match=rf"^{proxy.address}: .* within 0\.5 s$"):
        start(lambda: list(results)).result(within=10)


def test_several_servers_that_never_answer_run_into_the_timeout(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    results = connect([fakes.black_hole(), fakes.black_hole()]).stream_classify(digits, timeout=0.5)
    with pytest.raises(client.DeadlineExceededError, match=r"within 0\.5 s$"):
        start(lambda: list(results)).result(within=10)
