"""Who is at the other end of a connection."""

from __future__ import annotations

from typing import Any


def peer_of(address: Any) -> str:
    """A socket's address as gRPC writes it: `ipv4:127.0.0.1:50324`."""
    if not isinstance(address, tuple):
        return "unknown"
    host, port = address[:2]
    host = host.removeprefix("::ffff:")  # a caller over IPv4, at a socket for both
    return f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"
