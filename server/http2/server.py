"""A gRPC server on the event loop: as much of `grpc.aio.Server` as is used here, and the same handlers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeAlias

import grpc

from server import limits
from server.gathering import Arrivals
from server.http2.connection import Connection
from server.http2.http1 import Http1Connection
from server.http2.plain import Routes

logger = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
FindHandler: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"

BACKLOG = 1024
"""Connections that the kernel keeps until they are accepted."""


FAREWELL_SECONDS = 0.5
"""How long a stop waits for clients that have got everything and do not close."""

STOPPING = "the server is about to stop"


class Http2Server:
    """Listens from `start`, ends with `stop`."""

    def __init__(
        self,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        max_message_bytes: int,
        arrivals: Arrivals | None = None,
        max_connection_age: float = 0,
        max_connection_age_grace: float = 0,
        shares_port: bool = False,
    ) -> None:
        """Put a server together.

        Args:
            interceptors: of all calls, in this order.
            max_message_bytes: longer messages are refused with RESOURCE_EXHAUSTED.
            arrivals: counts calls for which images came.
            max_connection_age: seconds after which connections are to be made anew; 0: never.
            max_connection_age_grace: seconds that calls then have.
            shares_port: whether other processes listen at the same port.
        """
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection | Http1Connection] = set()
        self.routes: Routes | None = None
        """What answers plain HTTP."""
        self.max_message_bytes = max_message_bytes
        self.arrivals = arrivals or Arrivals()
        self.is_stopping = False
        self._max_connection_age = max_connection_age
        self.max_connection_age_grace = max_connection_age_grace
        self._shares_port = shares_port
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._sockets: list[tuple[socket.socket, ssl.SSLContext | None]] = []
        self._listening: list[asyncio.Server] = []
        self._one_gone = asyncio.Event()
        find: FindHandler = self._find
        for interceptor in reversed(interceptors):
            find = functools.partial(interceptor.intercept_service, find)
        self.find_handler = find
        """What answers a call, or None; interceptors decide."""

    async def _find(self, details: grpc.HandlerCallDetails) -> Handler | None:
        for handlers in self._handlers:
            if (handler := handlers.service(details)) is not None:
                return handler
        return None

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Answer with these, too."""
        self._handlers += handlers

    def add_insecure_port(self, address: str) -> int:
        """Bind `host:port`; return the port.

        Raises:
            RuntimeError: it cannot be bound.
        """
        return self._bind(address, None)

    def add_secure_port(self, address: str, credentials: ssl.SSLContext) -> int:
        """The same, for TLS."""
        return self._bind(address, credentials)

    def _bind(self, address: str, context: ssl.SSLContext | None) -> int:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._shares_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if listener.family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
            listener.bind((host, int(port)))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise RuntimeError(f"cannot listen on {address}: {error.strerror}") from error
        self._sockets.append((listener, context))
        return int(listener.getsockname()[1])

    async def start(self) -> None:
        """Accept connections."""
        for listener, context in self._sockets:
            self._listening.append(
                await self.loop.create_server(
                    lambda: Connection(self),
                    sock=listener,
                    backlog=BACKLOG,
                    ssl=context,
                    ssl_handshake_timeout=limits.HANDSHAKE_SECONDS if context else None,
                )
            )

    def age_of_new_connection(self) -> float:
        """Seconds after which it is to be made anew, 0: never. Not all that come at one moment come again at one."""
        return self._max_connection_age * random.uniform(0.9, 1.1)

    async def stop(self, grace: float | None = None) -> None:
        """Accept no more connections and calls; wait for those that go on, for up to `grace` seconds; end the rest."""
        self.is_stopping = True
        for listening in self._listening:
            listening.close()
        for connection in list(self.connections):
            connection.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace or 0):
                await self._wait_until_gone()
        for connection in list(self.connections):
            connection.cancel_calls(STOPPING)
        tasks = [call.task for connection in self.connections for call in connection.calls]
        if tasks:
            await asyncio.wait(tasks)
        for connection in list(self.connections):
            connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS / 10):  # what is queued goes out
                while self.connections:
                    self._one_gone.clear()
                    await self._one_gone.wait()
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)
        self._listening.clear()

    async def _wait_until_gone(self) -> None:
        """Or only wait for a farewell, which under TLS they do for as long as the client likes."""
        said_all: float | None = None
        while self.connections:
            if not all(connection.is_leaving for connection in self.connections):
                said_all = None
            elif said_all is None:
                said_all = self.loop.time()
            elif self.loop.time() - said_all > FAREWELL_SECONDS:
                return
            self._one_gone.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_SECONDS / 10):
                    await self._one_gone.wait()

    def connection_lost(self) -> None:
        """A connection is gone."""
        self._one_gone.set()

    def other_protocol(self, transport: asyncio.Transport, data: bytes) -> None:
        """Bytes that do not begin as HTTP/2 does."""
        if self.routes is None:
            transport.write(
                b"HTTP/1.1 426 Upgrade Required\r\nupgrade: h2c\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            transport.close()
            return
        connection = Http1Connection(self, self.routes)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        connection.data_received(data)
