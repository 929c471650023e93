"""What becomes of gRPC's server when a caller ends it: another one, and nothing left of the first."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from server import grpcio
from server.grpcio import GrpcioServer
from tests.server.attacks import call_a_path_that_is_no_text as end

TIMEOUT = 30

pytestmark = pytest.mark.usefixtures("no_stray_errors")


class Handlers(grpc.GenericRpcHandler):
    """`/test/wait` waits until it may go on, `/test/answer` does not."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.may_go_on = asyncio.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        methods = {"/test/wait": self.wait, "/test/answer": self.answer}
        found = methods.get(handler_call_details.method)
        return grpc.unary_unary_rpc_method_handler(found) if found else None

    async def wait(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self.waiting.set()
        await self.may_go_on.wait()
        return request

    async def answer(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return request


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


@asynccontextmanager
async def server_of(handlers: Handlers, *, shares: bool = True) -> AsyncIterator[tuple[GrpcioServer, str]]:
    server = GrpcioServer(options=[("grpc.so_reuseport", int(shares))])
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


async def call(channel: grpc.aio.Channel, method: str) -> bytes:
    called: Any = channel.unary_unary(f"/test/{method}")
    answer: bytes = await called(b"?", timeout=TIMEOUT, wait_for_ready=True)
    return answer


async def test_a_call_that_was_taken_in_is_answered_by_the_server_that_was_ended(handlers: Handlers) -> None:
    async with server_of(handlers) as (_, address), channel_to(address) as channel:
        waiting = asyncio.create_task(call(channel, "wait"))
        await handlers.waiting.wait()
        for _ in range(3):
            await end(address)
            assert await call(channel, "answer") == b"?"
        handlers.may_go_on.set()
        assert await waiting == b"?"


async def test_where_two_servers_cannot_share_a_port_it_is_had_again(handlers: Handlers) -> None:
    async with server_of(handlers, shares=False) as (_, address):
        for _ in range(3):
            await end(address)
            async with channel_to(address) as channel:
                assert await call(channel, "answer") == b"?"


async def test_a_stop_gives_the_calls_of_all_servers_their_grace_and_ends_what_is_left(handlers: Handlers) -> None:
    async with server_of(handlers) as (server, address), channel_to(address) as channel:
        first = asyncio.create_task(call(channel, "wait"))
        await handlers.waiting.wait()
        await end(address)
        handlers.waiting.clear()
        second = asyncio.create_task(call(channel, "wait"))
        await handlers.waiting.wait()
        stopping = asyncio.create_task(server.stop(TIMEOUT))
        handlers.may_go_on.set()
        assert list(await asyncio.gather(first, second)) == [b"?", b"?"]
        await stopping
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))


async def test_a_stop_without_grace_ends_the_calls_of_a_server_that_was_ended(handlers: Handlers) -> None:
    async with server_of(handlers) as (server, address), channel_to(address) as channel:
        waiting = asyncio.create_task(call(channel, "wait"))
        await handlers.waiting.wait()
        await end(address)
        await server.stop(0)
        with pytest.raises(grpc.aio.AioRpcError):
            await waiting


async def test_a_server_whose_main_loop_ends_while_it_stops_is_stopped_all_the_same() -> None:
    class Ending:
        """As gRPC's: what ended the main loop comes out of the first stop, which then has stopped nothing else."""

        def __init__(self) -> None:
            self.graces: list[float | None] = []

        async def stop(self, grace: float | None) -> None:
            self.graces.append(grace)
            if len(self.graces) == 1:
                raise UnicodeDecodeError("utf-8", b"/\xff", 1, 2, "invalid start byte")

    server: Any = Ending()
    await grpcio._stop(server, 3)
    assert server.graces == [3, 3]


async def test_it_is_told_of_in_one_line_however_often_it_happens(
    handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    async with server_of(handlers) as (_, address):
        for _ in range(5):
            await end(address)
    told = [record for record in caplog.records if record.name == "server.grpcio"]
    assert [record.levelno for record in told] == [logging.CRITICAL]
    assert "another one takes its place" in told[0].getMessage()
    assert not any(record.name == "asyncio" for record in caplog.records)


async def test_a_port_that_cannot_be_had_again_is_told_of(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = asyncio.Event()
    server = GrpcioServer(on_lost=lost.set)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    monkeypatch.setattr(grpcio, "REBIND_SECONDS", 0.05)
    monkeypatch.setattr(server, "_bind_all", list)
    await end(f"127.0.0.1:{port}")
    await asyncio.wait_for(lost.wait(), TIMEOUT)
    assert f"127.0.0.1:{port} cannot be had again" in caplog.text
    await server.stop(0)
