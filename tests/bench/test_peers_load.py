"""The load generator of `bench.peers`: what it sends, what it counts, and that it notices lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bench.peers.load import LoadError, Loop, Target, WrongAnswer, ask, process
from client.load.images import images
from tests.bench.conftest import Answer

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


def test_all_images_are_asked_in_one_request(http_server: Start, read: Answer, digits: list[int]) -> None:
    assert ask(Target(http_server(read), PATH), timeout=10) == digits


def test_the_generator_runs_in_a_process_of_its_own(http_server: Start, read: Answer, digits: list[int]) -> None:
    with process(digits) as load:
        assert load.closed_loop(Target(http_server(read), PATH), 1, 2, SECONDS).rate > 0
        with fails(WrongAnswer, "instead of"):
            load.closed_loop(Target(http_server(lambda body: (200, bytes(40))), PATH), 1, 2, SECONDS)
        with fails(LoadError, "HTTP 500"):
            load.closed_loop(Target(http_server(lambda body: (500, b"")), PATH), 1, 2, SECONDS)
