"""Waiting for a server, each case for the sync and the async client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

import client

if TYPE_CHECKING:
    from tests.client.conftest import Connect, Fakes, Running

# grpc.health.v1.HealthCheckResponse with status 0 to 3, as bytes; proto3 leaves a 0 out
UNKNOWN, SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"", b"\x08\x01", b"\x08\x02", b"\x08\x03"


def test_a_serving_server_is_ready_at_once(connect: Connect, server_address: str) -> None:
    twin = connect(server_address)
    twin.wait_ready(5)
    assert twin.is_serving() is True


@pytest.mark.parametrize("before", [UNKNOWN, NOT_SERVING, SERVICE_UNKNOWN])
def test_a_server_that_serves_later_is_waited_for(
    connect: Connect, fakes: Fakes, start: Callable[..., Running], before: bytes
) -> None:
    asked: list[bytes] = []
    watched, loaded = threading.Event(), threading.Event()

    def watch(request: bytes, _: Any) -> Iterator[bytes]:
        asked.append(request)
        yield before
        watched.set()
        assert loaded.wait(20)
        yield SERVING
        fakes.stopping.wait(20)

    waiting = start(connect(fakes.serve(watch=watch)).wait_ready, 10)
    assert watched.wait(10)
    loaded.set()
    assert waiting.result(within=5) is None
    assert asked == [b"\x0a\x18mnist.v1.DigitClassifier"]


def test_a_watch_that_breaks_off_is_begun_again(connect: Connect, fakes: Fakes) -> None:
    watches = 0

    def watch(_: bytes, context: Any) -> Iterator[bytes]:
        nonlocal watches
        watches += 1
        yield NOT_SERVING
        if watches == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        if watches == 2:
            return
        yield SERVING

    connect(fakes.serve(watch=watch)).wait_ready(10)
    assert watches == 3


def test_a_watch_that_only_ends_is_not_asked_without_a_pause(connect: Connect, fakes: Fakes) -> None:
    watches = 0

    def watch(_: bytes, __: Any) -> Iterator[bytes]:
        nonlocal watches
        watches += 1
        yield NOT_SERVING

    with pytest.raises(client.UnavailableError, match=r"not serving within 0\.5 s"):
        connect(fakes.serve(watch=watch)).wait_ready(0.5)
    assert watches <= 15


def test_a_server_that_starts_later_is_waited_for(
    connect: Connect, fakes: Fakes, start: Callable[..., Running]
) -> None:
    def watch(*_: Any) -> Iterator[bytes]:
        yield SERVING

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(10)
        port = listener.getsockname()[1]
        waiting = start(connect(f"127.0.0.1:{port}").wait_ready, 20)
        listener.accept()[0].close()  # it has tried, and nobody serves
    fakes.serve(watch=watch, port=port)
    assert waiting.result() is None


@pytest.mark.parametrize("place", ["black_hole", "nobody"])
def test_waiting_ends_with_its_timeout(
    connect: Connect, fakes: Fakes, start: Callable[..., Running], place: str
) -> None:
    address = getattr(fakes, place)()
    with pytest.raises(client.UnavailableError, match=rf"^{address}: not serving within 0\.3 s; is it running"):
        start(connect(address).wait_ready, 0.3).result(within=5)


def test_a_server_that_never_serves_is_not_waited_for_longer(
    connect: Connect, fakes: Fakes, start: Callable[..., Running]
) -> None:
    def watch(*_: Any) -> Iterator[bytes]:
        yield NOT_SERVING
        fakes.stopping.wait(20)

    with pytest.raises(client.UnavailableError, match="not serving"):
        start(connect(fakes.serve(watch=watch)).wait_ready, 0.3).result(within=5)


def test_a_server_without_health_is_no_reason_to_wait(connect: Connect, fakes: Fakes) -> None:
    with pytest.raises(client.ServerError) as caught:
        connect(fakes.serve()).wait_ready(10)
    assert caught.value.code == "UNIMPLEMENTED"


def test_a_server_that_refuses_the_caller_is_no_reason_to_wait(connect: Connect, fakes: Fakes) -> None:
    def watch(_: bytes, context: Any) -> Iterator[bytes]:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
        yield b""

    with pytest.raises(client.UnauthenticatedError, match="who are you"):
        connect(fakes.serve(watch=watch)).wait_ready(10)


@pytest.mark.parametrize(
    ("status", "serving"), [(UNKNOWN, False), (SERVING, True), (NOT_SERVING, False), (SERVICE_UNKNOWN, False)]
)
def test_a_server_tells_whether_it_serves(connect: Connect, fakes: Fakes, status: bytes, serving: bool) -> None:
    asked: list[bytes] = []

    def check(request: bytes, _: Any) -> bytes:
        asked.append(request)
        return status

    assert connect(fakes.serve(check=check)).is_serving() is serving
    assert asked == [b"\x0a\x18mnist.v1.DigitClassifier"]


def test_a_ready_client_classifies(connect: Connect, server_address: str, digits: list[npt.NDArray[np.uint8]]) -> None:
    twin = connect(server_address)
    twin.wait_ready(10)
    assert twin.classify(digits[7]).digit == 7
