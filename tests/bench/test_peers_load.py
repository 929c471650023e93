"""The load generator of `bench.peers`: what it sends, what it counts, and that it notices lies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bench.peers import links
from bench.peers import load as peers_load
from bench.peers.load import LoadError, Loop, Target, WrongAnswer, ask, process
from client.load.images import images
from tests.bench.conftest import Answer, RawServer

Start = Callable[[Answer], str]

PATH = "raw /classify"
SECONDS = 0.1


@contextmanager
def fails(error: type[LoadError], match: str) -> Iterator[None]:
    with pytest.raises(error, match=match) as raised:
        yield
    assert type(raised.value) is error


@pytest.mark.parametrize(("count", "in_flight"), [(1, 1), (1, 16), (64, 4)])
def test_http_requests_go_round_the_images_and_are_counted(
    http_server: Start, read: Answer, digits: list[int], count: int, in_flight: int
) -> None:
    bodies: list[bytes] = []

    def answer(body: bytes) -> tuple[int, bytes]:
        bodies.append(body)
        return read(body)

    sample = Loop(digits).closed_loop(Target(http_server(answer), PATH), count, in_flight, SECONDS)

    assert {len(body) for body in bodies} == {784 * count}
    assert len(set(bodies)) == min(len(bodies), 256 if count == 1 else 32)
    assert 0 < sample.rate * SECONDS <= len(bodies) * count
    assert 0 < sample.p50_us <= sample.p99_us


def test_a_wrong_answer_ends_the_load(http_server: Start, read: Answer, digits: list[int]) -> None:
    wrong = images()[7].tobytes()

    def answer(body: bytes) -> tuple[int, bytes]:
        return read(images()[8].tobytes() if body == wrong else body)

    with fails(WrongAnswer, "instead of"):
        Loop(digits).closed_loop(Target(http_server(answer), PATH), 1, 4, SECONDS)


def test_an_answer_that_cannot_be_read_is_wrong(http_server: Start, digits: list[int]) -> None:
    with fails(WrongAnswer, "13 bytes"):
        Loop(digits).closed_loop(Target(http_server(lambda body: (200, b"not a number!")), PATH), 1, 1, SECONDS)


def test_a_refusal_is_told_in_the_servers_words(http_server: Start, digits: list[int]) -> None:
    target = Target(http_server(lambda body: (503, b"the queue is full")), PATH)
    with fails(LoadError, "HTTP 503: the queue is full"):
        Loop(digits).closed_loop(target, 1, 1, SECONDS)
    with fails(LoadError, "HTTP 503: the queue is full"):
        ask(target, timeout=10)


RIGHT = b"HTTP/1.1 200 OK\r\ncontent-length: 10240\r\n\r\n" + bytes(10240)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (RIGHT * 2, "an answer to no request"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n", "does not say how long it is: content-length b'x'"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n", "does not say how long it is: content-length b'-5'"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: %b\r\n\r\n" % (b"9" * 5000), "does not say how long it is"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "does not say how long it is"),
        (b"HTTP/1.1\r\ncontent-length: 0\r\n\r\n", "an answer begins with b'HTTP/1.1'"),
        (b"HTTP/1.1 OK\r\ncontent-length: 0\r\n\r\n", "an answer begins with b'HTTP/1.1 OK'"),
    ],
)
def test_what_is_no_answer_is_the_peers_fault(raw_server: RawServer, answer: bytes, reason: str) -> None:
    """At its start and under load, and the load generator's process goes on."""
    address = raw_server(answer)
    with fails(LoadError, re.escape(reason)), process([0] * 256) as load:
        load.closed_loop(Target(address, PATH), 256, 1, SECONDS)
    if answer != RIGHT * 2:  # the first of these is an answer
        with fails(LoadError, re.escape(reason)):
            ask(Target(address, PATH), timeout=10)


def test_whatever_goes_wrong_with_an_answer_is_the_peers_fault(
    monkeypatch: pytest.MonkeyPatch, http_server: Start, read: Answer, digits: list[int]
) -> None:
    def exchange(self: links.HttpLink) -> list[links.Answer]:
        raise IndexError("pop from empty list")

    monkeypatch.setattr(links.HttpLink, "exchange", exchange)
    target = Target(http_server(read), PATH)
    with fails(LoadError, "IndexError: pop from empty list"):
        Loop(digits).closed_loop(target, 1, 1, SECONDS)
    with fails(LoadError, "IndexError: pop from empty list"):
        ask(target, timeout=10)


def test_drops_of_an_answer_are_silence(monkeypatch: pytest.MonkeyPatch, raw_server: RawServer) -> None:
    """A header that never ends."""
    monkeypatch.setattr(peers_load, "SILENCE_SECONDS", 0.2)
    with fails(LoadError, "no answer in"):
        Loop([0] * 256).closed_loop(Target(raw_server(b"HTTP/1.1 200 OK\r\n", endless=b"a"), PATH), 256, 1, SECONDS)


def test_a_load_generator_that_has_ended_is_started_anew(http_server: Start, read: Answer, digits: list[int]) -> None:
    target = Target(http_server(read), PATH)
    with process(digits) as load:
        assert load.closed_loop(target, 1, 1, SECONDS).rate > 0
        assert load._process is not None
        load._process.kill()
        load._process.wait()
        with fails(LoadError, "the load generator ended with code -9"):
            load.closed_loop(target, 1, 1, SECONDS)
        assert load.closed_loop(target, 1, 1, SECONDS).rate > 0


def test_the_warm_up_comes_before_what_is_counted(
    monkeypatch: pytest.MonkeyPatch, http_server: Start, read: Answer, digits: list[int]
) -> None:
    periods: list[float] = []
    right = peers_load._Run.keep_up

    def keep_up(self: peers_load._Run, in_flight: int, seconds: float) -> float:
        periods.append(seconds)
        elapsed = right(self, in_flight, seconds)
        counts.append(len(self.latencies))
        return elapsed

    counts: list[int] = []
    monkeypatch.setattr(peers_load._Run, "keep_up", keep_up)
    monkeypatch.setattr(peers_load, "percentiles_us", lambda latencies: (len(latencies), 0.0))
    sample = Loop(digits).closed_loop(Target(http_server(read), PATH), 1, 1, SECONDS)
    assert periods == [peers_load.WARM_UP_SECONDS, SECONDS]
    assert sample.p50_us == counts[1]


def test_all_images_are_asked_in_one_request(http_server: Start, read: Answer, digits: list[int]) -> None:
    assert ask(Target(http_server(read), PATH), timeout=10) == digits


def test_the_generator_runs_in_a_process_of_its_own(http_server: Start, read: Answer, digits: list[int]) -> None:
    with process(digits) as load:
        assert load.closed_loop(Target(http_server(read), PATH), 1, 2, SECONDS).rate > 0
        with fails(WrongAnswer, "instead of"):
            load.closed_loop(Target(http_server(lambda body: (200, bytes(40))), PATH), 1, 2, SECONDS)
        with fails(LoadError, "HTTP 500"):
            load.closed_loop(Target(http_server(lambda body: (500, b"")), PATH), 1, 2, SECONDS)
