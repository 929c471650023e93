"""The load generator at servers that are right, that stand still, and that do something wrong."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest

pytest.importorskip("hpack")

from client.load.ceiling import ceiling, responder
from client.load.jobs import KINDS
from client.load.loop import at_random, evenly
from client.load.measure import Door, Load, LoadFailed, measure, require_right

Faulty = Callable[[str], str]

FREEZE_SECONDS = 1.0
quick = functools.partial(Load, seconds=0.3, warm_up=0.1)


@pytest.fixture(scope="module")
def good() -> object:
    with responder() as door:
        yield door


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("load", [Load(callers=9), Load(rate=300), Load(rate=300, even=True)], ids=lambda one: one.name)
def test_right_answers_are_counted(good: Door, load: Load, kind: str, images: int) -> None:
    found = measure(good, quick(kind, images, load.callers, load.rate, load.even, connections=2), None)
    require_right(found)
    assert found["latency_us"]["count"] > 0
    assert found["images_per_second"] == pytest.approx(images * found["messages_per_second"], rel=0.01)
    assert found["all_messages"] >= found["latency_us"]["count"]


def test_messages_of_the_warm_up_are_checked_and_not_in_the_figures(good: Door) -> None:
    found = measure(good, Load(rate=100, even=True, seconds=0.2, warm_up=0.5), None)
    assert 19 <= found["latency_us"]["count"] <= 21
    assert 69 <= found["all_messages"] <= 71


@pytest.mark.parametrize(
    ("kind", "fault"),
    [*((kind, "freeze") for kind in KINDS), ("classify", "freeze, one at a time"), ("infer", "freeze, one at a time")],
)
def test_a_freeze_of_one_second_is_in_the_p99_of_an_open_loop(faulty: Faulty, kind: str, fault: str) -> None:
    """Not only in the largest: whatever was meant to be sent meanwhile has waited. It begins behind the warm-up.

    Where the server allows one call at a time, messages are sent when it goes on, and their latency counts from before.
    """
    load = Load(kind, rate=200, even=True, connections=1, seconds=2, warm_up=0.05, patience=30)
    found = measure(Door(faulty(fault)), load, None)
    require_right(found)
    latency = found["latency_us"]
    assert latency["max"] >= FREEZE_SECONDS * 1e6
    # Of 400 messages the four that were meant to be sent within 20 ms of the freeze have waited for the rest of it,
    assert latency["p99"] >= 0.97 * FREEZE_SECONDS * 1e6
    # and 200 have waited for half of it on average.
    assert latency["mean"] >= 0.2 * FREEZE_SECONDS * 1e6


def test_a_freeze_is_a_single_slow_answer_of_a_closed_loop(faulty: Faulty) -> None:
    found = measure(Door(faulty("freeze")), Load(callers=1, seconds=2, warm_up=1e-6, patience=30), None)
    require_right(found)
    assert found["latency_us"]["max"] >= FREEZE_SECONDS * 1e6


@pytest.mark.parametrize(
    ("fault", "kind", "what", "detail"),
    [
        ("wrong", "classify", "wrong answer", "[1] instead of [0]"),
        ("wrong", "stream", "wrong answer", "[1] instead of [0]"),
        ("another's", "classify", "wrong answer", "[0, 1] instead of [0]"),
        ("another's", "infer", "wrong answer", "[0, 1] instead of [0]"),
        ("garbage", "classify", "wrong answer", "no message that can be read"),
        ("garbage", "infer", "wrong answer", "no message that can be read"),
        ("garbage", "stream", "connection ended", "wrong answer: a stream has a message that cannot be read"),
        ("no message", "classify", "wrong answer", "an answer of 0 bytes has no message"),
        ("HTTP 503", "classify", "HTTP status '503'", ""),
        ("compressed", "classify", "wrong answer", "said to be compressed"),
        ("compressed", "infer", "wrong answer", "said to be compressed"),
        ("too short", "classify", "wrong answer", "a message of 4096 bytes is announced"),
        ("two messages", "classify", "wrong answer", "is announced, and"),
        ("no trailers", "classify", "no status", "without trailers"),
        ("unreadable headers", "classify", "connection ended", "the server's headers cannot be read"),
        ("short goodbye", "classify", "connection ended", "no HTTP/2: a frame of kind 7 with 3 bytes"),
        ("odd settings", "classify", "connection ended", "no HTTP/2: a frame of kind 4 with 3 bytes"),
        ("early end", "stream", "connection ended", "the stream ended early"),
        ("closes at the end", "stream", "connection ended", "the server closed the connection"),
        ("lost", "classify", "lost answer", "not answered within 0.5 s of the end"),
        ("lost", "stream", "lost answer", "not answered within 0.5 s of the end"),
        ("skipped", "stream", "connection ended", "wrong answer: frame 19"),
        ("refused", "classify", "RESOURCE_EXHAUSTED", "the queue is full"),
        ("bad frame", "stream", "RESOURCE_EXHAUSTED", "the queue is full"),
        ("no status", "classify", "status ''", ""),
        ("reset", "classify", "reset", "error 2"),
        ("goodbye", "classify", "connection ended", "too old"),
    ],
)
def test_a_single_answer_that_is_not_right_fails_the_run(
    faulty: Faulty, fault: str, kind: str, what: str, detail: str
) -> None:
    found = measure(
        Door(faulty(fault)), Load(kind, rate=200, connections=1, patience=0.5, seconds=0.2, warm_up=0.1), None
    )
    assert what in found["faults"], found
    assert detail in found["examples"][what]
    with pytest.raises(LoadFailed, match=what):
        require_right(found)


def test_a_lost_answer_of_a_closed_loop_fails_the_run(faulty: Faulty) -> None:
    found = measure(Door(faulty("lost")), Load(callers=4, seconds=0.5, warm_up=0.1, patience=0.5), None)
    assert "lost answer" in found["faults"]


@pytest.mark.parametrize("load", [Load(callers=1), Load(callers=4), Load(rate=300)], ids=lambda one: one.name)
def test_a_server_that_takes_no_more_calls_fails_the_run(faulty: Faulty, load: Load) -> None:
    """Also if it says so together with an answer, keeps the connection, and three others go on."""
    found = measure(Door(faulty("goodbye with the answer")), quick("classify", 1, load.callers, load.rate), None)
    assert found["faults"] == {"connection ended": 1}
    assert found["examples"] == {"connection ended": "the server said GOAWAY: too old"}


def test_a_server_that_allows_fewer_calls_than_at_first_fails_a_closed_loop(faulty: Faulty) -> None:
    found = measure(Door(faulty("fewer")), quick(callers=8, connections=2), None)
    assert found["faults"] == {"too few callers": 1}
    assert "allows 1 on a connection that is to have 4" in found["examples"]["too few callers"]


def test_a_rate_that_the_generator_cannot_reach_is_no_fault_of_the_server(good: Door) -> None:
    found = measure(good, quick(rate=1e8, even=True, patience=0.3), None)
    assert set(found["faults"]) == {"not sent"}
    assert "the generator is the limit" in found["examples"]["not sent"]
    assert found["faults"]["not sent"] + found["all_messages"] == pytest.approx(1e8 * 0.4, rel=0.01)


@pytest.mark.parametrize("load", [quick(callers=4, seconds=2), quick(rate=400, seconds=2)], ids=lambda one: one.name)
def test_what_a_server_did_not_begin_with_is_sent_again(faulty: Faulty, load: Load) -> None:
    found = measure(Door(faulty("not begun")), load, None)
    require_right(found)
    assert found["all_messages"] >= 20
    assert found["sent_again"] == 1


def test_answers_are_compared_with_those_that_are_expected(good: Door) -> None:
    with pytest.raises(LoadFailed, match=r"wrong answer .*\[0\] instead of \[1\]"):
        require_right(measure(good, quick(), [1] * 256))


def test_a_server_that_answers_nothing_has_no_figures() -> None:
    with pytest.raises(LoadFailed, match="nothing was answered"):
        require_right({"faults": {}, "latency_us": {"count": 0}})


def test_more_callers_than_the_server_allows_at_a_time_are_not_measured_as_if_they_were(faulty: Faulty) -> None:
    strict = Door(faulty("strict"))
    with pytest.raises(ValueError, match="18 callers on 2 connections are 9 each, and the server allows 8"):
        measure(strict, quick(callers=18, connections=2), None)
    require_right(measure(strict, quick(callers=16, connections=2), None))
    require_right(measure(strict, quick(rate=300, connections=2), None))


def test_many_callers_have_more_connections() -> None:
    assert [Load(callers=count).connection_count for count in (1, 3, 64, 256, 257, 1024)] == [1, 3, 4, 4, 5, 16]
    assert Load("stream", callers=64).connection_count == 1


def test_a_port_where_nobody_is_raises() -> None:
    with pytest.raises(OSError, match="refused"):
        measure(Door("127.0.0.1:1"), quick(), None)


def test_the_ceiling_of_an_open_loop_is_that_of_a_closed_one(good: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.load.ceiling.SECONDS", 0.2)
    assert ceiling(good, Load(rate=10))["messages_per_second"] > 10


def test_answers_of_the_ceiling_are_checked(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.load.ceiling.SECONDS", 0.2)
    with pytest.raises(LoadFailed, match="wrong answer"):
        ceiling(Door(faulty("wrong")), Load())


def test_times_are_even_or_random_and_of_this_rate() -> None:
    assert list(itertools.islice(evenly(5, 4), 3)) == [5, 5.25, 5.5]
    times = list(itertools.islice(at_random(5, 4), 10_000))
    assert times == sorted(times)
    assert (times[-1] - 5) * 4 == pytest.approx(10_000, rel=0.05)
    assert times == list(itertools.islice(at_random(5, 4), 10_000))
