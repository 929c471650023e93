"""A place between clients and a server where connections break: forwards bytes, and cuts where it is told to.

Knows nothing of what the bytes mean, and needs nothing but the standard library.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, TypeAlias

CHUNK_BYTES = 16_384
SEND_SECONDS = 30.0
"""Who takes nothing for so long will take nothing more."""


End: TypeAlias = Literal["reset", "close", "silence"]
"""RST to both sides; FIN to both sides; or nothing at all any more, in both directions."""


@dataclass(frozen=True)
class Fault:
    """What happens to a connection once this number of bytes went in one direction."""

    after: int
    way: Literal["up", "down"] = "down"
    """To the server, or to the client."""
    how: End = "reset"


class Proxy:
    """Listens at `address` and forwards to a server; a context manager.

    The n-th connection has the n-th of the faults, those that follow have none.
    """

    def __init__(self, target: str, faults: Iterable[Fault | None] = ()) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._faults = iter(faults)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closing = _Signal()
        self._cuts = [_Signal()]  # given, but for the last one, which is that of the connections there are
        self._lock = threading.Lock()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        """Accepted so far."""
        self.broken = 0
        """Of these, cut or silenced."""
        self._threads = [threading.Thread(target=self._accept, name="proxy", daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cut(self) -> None:
        """Reset the connections that there are."""
        with self._lock:
            self._cuts[-1].give()
            self._cuts.append(_Signal())

    def close(self) -> None:
        """Accept no more, and reset the connections that there are; may be called again."""
        self._closing.give()
        self._threads[0].join()
        self.cut()
        for thread in self._threads:
            thread.join()
        for signal in (self._closing, *self._cuts):
            signal.close()

    def _accept(self) -> None:
        with self._listener, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._closing, selectors.EVENT_READ)
            while all(key.fileobj is not self._closing for key, _ in selector.select()):
                client, _ = self._listener.accept()
                with self._lock:
                    self.connections += 1
                    told = (client, next(self._faults, None), self._cuts[-1])
                self._threads.append(threading.Thread(target=self._forward, args=told, daemon=True))
                self._threads[-1].start()

    def _forward(self, client: socket.socket, fault: Fault | None, cutting: _Signal) -> None:
        try:
            server = socket.create_connection(self._target, SEND_SECONDS)
        except OSError:
            _reset(client)
            return
        with client, server, selectors.DefaultSelector() as selector:
            client.settimeout(SEND_SECONDS)
            for each in (client, server, cutting):
                selector.register(each, selectors.EVENT_READ)
            try:
                end = self._pump(selector, client, server, fault)
            except OSError:  # one side has gone; so does the other
                end = "reset"
            if end == "silence":
                _wait(cutting)
            if end == "reset":
                _reset(client)
                _reset(server)

    def _pump(
        self, selector: selectors.BaseSelector, client: socket.socket, server: socket.socket, fault: Fault | None
    ) -> End:
        """Forward in both directions; return how the connection has to end."""
        left = fault.after if fault else 0
        while True:
            for key, _ in selector.select():
                if isinstance(key.fileobj, _Signal):
                    self._count()
                    return "reset"
                source, sink, way = (client, server, "up") if key.fileobj is client else (server, client, "down")
                counted = fault is not None and fault.way == way
                content = source.recv(min(left, CHUNK_BYTES) if counted else CHUNK_BYTES)
                if not content:
                    return "close"
                sink.sendall(content)
                if fault is not None and counted:
                    left -= len(content)
                    if left == 0:
                        self._count()
                        return fault.how

    def _count(self) -> None:
        with self._lock:
            self.broken += 1


class _Signal:
    """What a selector can wait for; once given, it stays."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()

    def fileno(self) -> int:
        return self._receiver.fileno()

    def give(self) -> None:
        self._sender.close()

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()


def _wait(signal: _Signal) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(signal, selectors.EVENT_READ)
        selector.select()


def _reset(connection: socket.socket) -> None:
    """Close a connection with RST, and lose what was not sent yet."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
