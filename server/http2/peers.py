"""Who is at the other end of a connection, and how it is left."""

from __future__ import annotations

import asyncio
from typing import Any


class PeerProtocol(asyncio.Protocol):
    """What a connection does at its end, whatever is spoken on it."""

    _transport: asyncio.Transport

    @property
    def is_leaving(self) -> bool:
        """Whether all has been said, and only the client's farewell is missing."""
        return self._transport.is_closing() and not self._transport.get_write_buffer_size()

    def abort(self) -> None:
        """Close without a farewell."""
        self._transport.abort()

    def _say_farewell(self) -> None:
        """Close; once, as to close twice would lose what asyncio's TLS still has to say."""
        if not self._transport.is_closing():
            self._transport.close()


def peer_of(address: Any) -> str:
    """A socket's address as gRPC writes it: `ipv4:127.0.0.1:50324`."""
    if not isinstance(address, tuple):
        return "unknown"
    host, port = address[:2]
    host = host.removeprefix("::ffff:")  # a caller over IPv4, at a socket for both
    return f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"
