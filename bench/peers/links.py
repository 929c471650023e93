"""Connections that cost next to nothing: HTTP/1.1 by hand, and gRPC through `client.load.wire`.

Both look the same to a load generator: `call` begins a request, `exchange` sends
and receives what can be without waiting, and `fileno` is for a selector.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

from client.load.lanes import status_fault
from client.load.wire import Call, Connection, ConnectionEnded

RECEIVE_BYTES = 1 << 18
CONNECT_SECONDS = 10.0
LENGTH_DIGITS = 12


@dataclass(slots=True)
class Answer:
    """What became of a request."""

    tag: int
    """What the caller gave."""
    content: bytes
    error: str = ""
    """What the server said in place of an answer."""


class Link(Protocol):
    """One connection."""

    @property
    def wants_to_write(self) -> bool:
        """Whether something could not be sent yet."""

    def fileno(self) -> int: ...

    def call(self, message: bytes, tag: int) -> None:
        """Begin a request; `exchange` sends it."""

    def exchange(self) -> list[Answer]:
        """Send and receive what can be without waiting; return the requests that have ended.

        Raises:
            ConnectionEnded: by the server.
        """

    def close(self) -> None: ...


class HttpLink:
    """A kept-alive connection of HTTP/1.1 that posts to one path, one request at a time."""

    def __init__(self, target: str, path: str) -> None:
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        fields = (f"POST {path} HTTP/1.1", f"host: {target}", "content-type: application/octet-stream")
        self._head = "\r\n".join((*fields, "content-length: ")).encode()
        self._received = bytearray()
        self._unsent = bytearray()
        self.open: list[int] = []

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    @property
    def wants_to_write(self) -> bool:
        return bool(self._unsent)

    def call(self, message: bytes, tag: int) -> None:
        if self.open:
            raise ValueError("HTTP/1.1 takes one request at a time")
        self.open.append(tag)
        self._unsent += b"%b%d\r\n\r\n" % (self._head, len(message))
        self._unsent += message

    def exchange(self) -> list[Answer]:
        try:
            if self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
            while content := self._socket.recv(RECEIVE_BYTES):
                self._received += content
                if len(content) < RECEIVE_BYTES:
                    break
            else:
                raise ConnectionEnded("the server closed the connection")
        except BlockingIOError:
            pass
        except ConnectionError as error:
            raise ConnectionEnded(str(error)) from error
        return self._take()

    def _take(self) -> list[Answer]:
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return []
        if not self.open:
            raise ConnectionEnded("an answer to no request")
        status, *lines = bytes(self._received[:end]).split(b"\r\n")
        _, _, code = status.partition(b" ")
        if not code[:3].isdigit():
            raise ConnectionEnded(f"an answer begins with {status[:40]!r}")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        length = fields.get(b"content-length", b"")
        if not length.isdigit() or len(length) > LENGTH_DIGITS:
            raise ConnectionEnded(f"an answer does not say how long it is: content-length {length[:40]!r}")
        body, stop = end + 4, end + 4 + int(length)
        if len(self._received) < stop:
            return []
        content = bytes(self._received[body:stop])
        del self._received[:stop]
        error = "" if code[:3] == b"200" else f"HTTP {code[:3].decode()}: {content[:200].decode(errors='replace')}"
        return [Answer(self.open.pop(), content, error)]


class GrpcLink:
    """A connection of HTTP/2 for unary calls of one method."""

    def __init__(self, target: str, path: str) -> None:
        self._connection = Connection(target, path)

    @property
    def wants_to_write(self) -> bool:
        return self._connection.wants_to_write

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()

    def call(self, message: bytes, tag: int) -> None:
        self._connection.call(message, tag=tag)

    def exchange(self) -> list[Answer]:
        return [Answer(call.tag, call.message, _error(call)) for call in self._connection.exchange()]


def _error(call: Call) -> str:
    fault = status_fault(call)
    return "" if fault is None else f"{fault.what}: {fault.detail}"
