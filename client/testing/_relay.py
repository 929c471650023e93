"""A port that leads to another port, and whose connections can be cut or kept silent; knows nothing of gRPC.

gRPC's own server cannot end one connection, refuse new ones for a while, or
say nothing at all. What stands before it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
HOST = "127.0.0.1"
_PIECE = 65536  # bytes


class Relay:
    """Open from its creation to `close`; may be used from any thread but its own."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._connections: dict[int, socket.socket] = {}  # to the port behind, by our own port of it
        self._pipes: set[asyncio.Task[None]] = set()
        self._silent = False
        self._listener = _bound(0)
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-server-relay", daemon=True)
        self._thread.start()
        self.accept()

    def cut(self, our_port: int) -> None:
        """End the connection that reaches the port behind from this one, after what was said over it."""

        async def cut() -> None:
            with contextlib.suppress(KeyError, OSError):  # it has ended already
                behind = self._connections[our_port]
                behind.shutdown(socket.SHUT_RD)  # what came is still read and passed on, then comes the end

        self._run(cut())

    def accept(self) -> None:
        """Take connections."""

        async def accept() -> None:
            self._listener.listen(256)
            self._loop.add_reader(self._listener, self._take_connection)

        self._run(accept())

    def refuse(self) -> None:
        """Cut all connections, and refuse new ones."""

        async def refuse() -> None:
            self._stop_listening()
            self._listener = _bound(self.port)  # so that nobody else gets the port
            await self._end_all()

        self._run(refuse())

    def be_silent(self) -> None:
        """Accept connections, and pass nothing on."""
        self._silent = True

    def speak(self) -> None:
        """Pass on again; what was held back is lost with its connection."""

        async def speak() -> None:
            await self._end_all()
            self._silent = False

        self._run(speak())

    def close(self) -> None:
        async def close() -> None:
            self._stop_listening()
            await self._end_all()

        self._run(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, step: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(step, self._loop).result()

    # In the loop.

    def _take_connection(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):  # the caller has thought better of it
            caller, _ = self._listener.accept()
            caller.setblocking(False)
            pipe = self._loop.create_task(self._pipe(caller))
            self._pipes.add(pipe)
            pipe.add_done_callback(self._pipes.discard)
            pipe.add_done_callback(lambda _: caller.close())  # also where it is cancelled before it begins

    def _stop_listening(self) -> None:
        self._loop.remove_reader(self._listener)
        self._listener.close()

    async def _end_all(self) -> None:
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    async def _pipe(self, caller: socket.socket) -> None:
        """One connection, until either side ends it."""
        with contextlib.suppress(OSError), caller, socket.socket() as behind:
            behind.setblocking(False)
            await self._loop.sock_connect(behind, (HOST, self._behind))
            our_port = behind.getsockname()[1]
            self._connections[our_port] = behind
            ways = [asyncio.create_task(self._pump(*way)) for way in ((caller, behind), (behind, caller))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                del self._connections[our_port]
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)

    async def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        while piece := await self._loop.sock_recv(source, _PIECE):
            if self._silent:
                await asyncio.Event().wait()  # until the connection is ended
            await self._loop.sock_sendall(sink, piece)


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setblocking(False)
    bound.bind((HOST, port))
    return bound
