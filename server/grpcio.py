"""gRPC's own server, and another one in its place when a caller has ended it.

grpc.aio takes in all calls in one task, `_server_main_loop`. Since grpcio 1.84 it decodes their paths there, and a path
that is no UTF-8 ends the task. The server then closes its port, while the process lives on. gRPC's core lets such paths
through, and interceptors and handlers are asked later, so nothing of ours could keep them out. So the end is noticed,
and another server listens at the port before the first one has left it. Calls that the first one had taken in go on to
their ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeAlias

import grpc

from server.settings import MAX_SECONDS

Port: TypeAlias = "tuple[str, Callable[[], grpc.ServerCredentials] | None]"
"""`host:port`, and what makes its credentials; None without TLS."""

logger = logging.getLogger(__name__)

REBIND_SECONDS = 10.0
"""For how long a port is tried that cannot be had at once, as where two servers cannot share one."""

REBIND_PAUSE_SECONDS = 0.005
"""Between two tries."""

TELL_SECONDS = 60.0
"""At most one line in so long: callers are not to fill the log."""


class GrpcioServer:
    """As much of `grpc.aio.Server` as is used here."""

    def __init__(
        self,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        options: Sequence[tuple[str, Any]] = (),
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Put a server together.

        Args:
            interceptors: of all calls, in this order.
            options: of gRPC's. Without `grpc.so_reuseport` connections are refused for some milliseconds where
                another server has to take the place of the first.
            on_lost: called when it listens no more, and cannot again.
        """
        self._interceptors = interceptors
        self._options = options
        self._on_lost = on_lost
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._ports: list[Port] = []
        self._server = self._make()
        self._ended: set[grpc.aio.Server] = set()
        """Those in whose place another one has come, and whose calls go on."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._ends = 0
        self._told_at: float | None = None

    def _make(self) -> grpc.aio.Server:
        return grpc.aio.server(handlers=self._handlers, interceptors=self._interceptors, options=self._options)

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Answer with these, too."""
        added = tuple(handlers)
        self._handlers += added
        self._server.add_generic_rpc_handlers(added)

    def add_insecure_port(self, address: str) -> int:
        """Bind `host:port`; return the port.

        Raises:
            RuntimeError: it cannot be bound.
        """
        return self._add_port(address, None)

    def add_secure_port(self, address: str, credentials: Callable[[], grpc.ServerCredentials]) -> int:
        """The same, for TLS; each port has credentials of its own, as gRPC needs where these are read again."""
        return self._add_port(address, credentials)

    def _add_port(self, address: str, credentials: Callable[[], grpc.ServerCredentials] | None) -> int:
        port = self._bind(address, credentials)
        host = address.rpartition(":")[0]
        self._ports.append((f"{host}:{port}", credentials))
        return port

    def _bind(self, address: str, credentials: Callable[[], grpc.ServerCredentials] | None) -> int:
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials())

    async def start(self) -> None:
        """Accept connections."""
        before = asyncio.all_tasks()
        await self._server.start()
        # By its name in gRPC's sources: there is no other word of its end before the last call has ended, too.
        for task in _tasks_of("AioServer._server_main_loop") - before:
            task.add_done_callback(self._main_loop_ended)

    async def stop(self, grace: float | None = None) -> None:
        """Accept no more connections and calls; wait for those that go on, for up to `grace` seconds; end the rest."""
        self._stopping = True
        await asyncio.gather(*(_stop(server, grace) for server in (self._server, *self._ended)))

    def _main_loop_ended(self, task: asyncio.Task[Any]) -> None:
        if self._stopping or task.cancelled() or (error := task.exception()) is None:
            return
        self._ends += 1
        now = asyncio.get_running_loop().time()
        if self._told_at is None or now >= self._told_at + TELL_SECONDS:
            self._told_at = now
            logger.critical(
                "a caller has ended gRPC's server by a path that is no text (%s): another one takes its place",
                type(error).__name__,
                extra={"times": self._ends},
            )
        # gRPC shuts the server down by itself, fails with the same error, and leaves a traceback that nobody asked for.
        for shutdown in _tasks_of("AioServer.shutdown"):
            shutdown.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._ended.add(self._server)
        self._go_on(self._let_end(self._server))
        # At once, while the first one listens: a client whose connection is refused tries again a second later.
        self._server = self._make()
        self._go_on(self._replace(self._bind_all(self._ports)))

    def _bind_all(self, ports: Iterable[Port]) -> list[Port]:
        """Bind these; return those that cannot be bound yet."""
        left = []
        for port in ports:
            try:
                self._bind(*port)
            except RuntimeError:
                left.append(port)
        return left

    async def _replace(self, left: list[Port]) -> None:
        """Have the new server listen as soon as it has all its ports."""
        try:
            async with asyncio.timeout(REBIND_SECONDS):
                while left:
                    await asyncio.sleep(REBIND_PAUSE_SECONDS)
                    left = self._bind_all(left)
        except TimeoutError:
            logger.critical("%s cannot be had again", ", ".join(address for address, _ in left))
            self._on_lost()
            return
        await self.start()
        if self._stopping:  # only now, as a server that never started would keep its ports
            await _stop(self._server, 0)

    async def _let_end(self, server: grpc.aio.Server) -> None:
        """Give back what a server holds once the last of its calls has ended."""
        await _stop(server, MAX_SECONDS)
        self._ended.discard(server)

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _stop(server: grpc.aio.Server, grace: float | None) -> None:
    try:
        await server.stop(grace)
    except Exception:  # its main loop ended at this very moment: gRPC tells so, and goes on when asked again
        await server.stop(grace)


def _tasks_of(function: str) -> set[asyncio.Task[Any]]:
    """The tasks of this event loop that run such a function of gRPC's."""
    return {task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__qualname__", None) == function}
