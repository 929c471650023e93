"""What must not happen to calls that go together: that one is forgotten, or that a failure stays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

import client
from client._gathering import MAX_IMAGES, TRIES_LONGER, Gathering, Member
from client.testing import FakeServer
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import Connect, Fakes

GreyImage = npt.NDArray[np.uint8]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


class NotToBeCopied(Exception):
    """As many libraries have them: what it is made with is not what it keeps."""

    def __init__(self, message: str, *, response: object) -> None:
        super().__init__(message)


async def in_company(digits_client: client.AsyncClient, digits: list[GreyImage]) -> None:
    """Make calls that go together, so that the next ones do, too."""
    while not digits_client._open().gather._gathering.in_company:
        await asyncio.gather(*(digits_client.classify(digits[7]) for _ in range(16)))


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("count", range(6))
async def test_closing_in_any_turn_leaves_nobody_waiting(
    server: FakeServer, digits: list[GreyImage], count: int
) -> None:
    digits_client = client.AsyncClient(server.target)
    await in_company(digits_client, digits)
    calls = [asyncio.create_task(digits_client.classify(digits[7])) for _ in range(3)]
    await turns(count)
    await digits_client.close()
    async with asyncio.timeout(20):
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, client.Prediction) or "closed" in str(result)


@pytest.mark.parametrize("count", range(6))
async def test_cancelling_in_any_turn_leaves_the_way_free(
    server: FakeServer, digits: list[GreyImage], count: int
) -> None:
    async with client.AsyncClient(server.target) as digits_client:
        for _ in range(3):
            await in_company(digits_client, digits)
            calls = [asyncio.create_task(digits_client.classify(digits[7])) for _ in range(3)]
            await turns(count)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        gathering = digits_client._open().gather._gathering
        async with asyncio.timeout(20):
            while gathering._gathered or gathering._lone:
                await turns(1)
        assert (await digits_client.classify(digits[7])).digit == 7


def failing_token() -> tuple[Callable[[], str], list[bool]]:
    """A token function, and the switch that makes it raise."""
    switch = [False]

    def token() -> str:
        if switch[0]:
            raise NotToBeCopied("no token today", response=None)
        return "a-token-of-some-length"

    return token, switch


async def test_tasks_get_what_their_token_raised_whatever_it_is(server: FakeServer, digits: list[GreyImage]) -> None:
    token, switch = failing_token()
    async with client.AsyncClient(server.target, token=token) as digits_client:
        await in_company(digits_client, digits)
        switch[0] = True
        calls = (digits_client.classify(digits[7]) for _ in range(8))
        async with asyncio.timeout(20):
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {NotToBeCopied}
        switch[0] = False
        assert (await digits_client.classify(digits[7])).digit == 7


def test_threads_get_what_their_token_raised_whatever_it_is(server: FakeServer, digits: list[GreyImage]) -> None:
    token, switch = failing_token()

    def call(_: int) -> Any:
        try:
            return digits_client.classify(digits[7])
        except NotToBeCopied as error:
            return error

    with client.Client(server.target, token=token) as digits_client, ThreadPoolExecutor(16) as threads:
        list(threads.map(call, range(64)))
        switch[0] = True
        assert {type(result) for result in threads.map(call, range(64))} == {NotToBeCopied}
        switch[0] = False
        assert digits_client.classify(digits[7]).digit == 7


def test_a_message_that_was_too_long_makes_others_short_for_a_while_only() -> None:
    gathering: Gathering[Member] = Gathering()

    def exchange() -> int:
        for _ in range(MAX_IMAGES):
            gathering.join(Member(b"", 1.0, 0.0))
        sizes = []
        while members := gathering.cut():
            sizes.append(len(members))
            gathering.end(len(members))
        return max(sizes)

    gathering.too_long(16)
    assert exchange() == 8
    for _ in range(TRIES_LONGER):
        exchange()
    assert exchange() > 8


@pytest.mark.parametrize("value", [float("nan"), -1.0, 3e30])
def test_probabilities_that_are_none_are_a_fault_of_the_server(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], value: float
) -> None:
    def classify(request: Any, context: Any) -> pb.ClassifyResponse:
        return pb.ClassifyResponse(digits=[7], probabilities=[value] * 10)

    with pytest.raises(client.ServerError, match="probabilities from"):
        connect(fakes.serve(classify=classify)).classify(digits[7])


def test_a_second_try_that_cannot_be_made_is_told(
    fakes: Fakes, digits: list[GreyImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def classify(request: Any, context: Any) -> None:
        context.abort(grpc.StatusCode.UNAVAILABLE, "going down")

    servers = [fakes.serve(classify=classify).replace("127.0.0.1", "localhost") for _ in range(2)]
    with client.Client(servers, timeout=20) as digits_client:
        router = digits_client._open().router
        take = router.take

        def take_once(*tried: Any) -> int:
            if tried and tried[0]:
                raise ValueError("Cannot invoke RPC on closed channel!")  # gRPC's words
            return take(*tried)

        monkeypatch.setattr(router, "take", take_once)
        with pytest.raises(ValueError, match="closed channel"):
            digits_client.classify_batch([digits[7]])
        assert all(not link.open_calls for link in router.links)
