"""A port for several processes: taken for them, and for nobody else, before the first of them listens.

Linux spreads the connections to a port over all sockets that listen on it with
SO_REUSEPORT, whoever they belong to; a second server of the same user would
silently get a share of them. So one socket that never serves keeps the port: it
is bound as a server alone on the port would be, and then opened for sharing: by
several processes, or by a server and the one that takes its place.

Knows nothing of what listens.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from server.errors import CannotServe
from server.settings import bracketed

_NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
"""How an address fails that this machine does not have: often ::1, as one of two addresses of `localhost`."""

_PORT_ATTEMPTS = 20
"""For port 0: how many free ports of a first address are tried at the others."""

_Address = tuple[socket.AddressFamily, tuple[Any, ...]]


class Reservation:
    """A port of all addresses of a host, kept until it is closed. A context manager.

    Processes of the same user that set SO_REUSEPORT can listen there meanwhile.
    """

    def __init__(self, host: str, port: int) -> None:
        """Take the port; 0 takes one that is free at all addresses of the host.

        Raises:
            CannotServe: the host is unknown, or the port is taken at one of its
                addresses, or may not be used.
        """
        shown = bracketed(host)
        try:
            addresses = _addresses(host, port)
        except (OSError, UnicodeError) as error:  # the latter for names that cannot be any
            reason = getattr(error, "strerror", None) or error
            raise CannotServe(f"cannot listen on {shown}:{port}: {reason}") from error
        try:
            self._sockets = _keep_all(addresses)
        except OSError as error:
            reason = (
                "the address is taken, or not one of this machine"
                if error.errno in {errno.EADDRINUSE, *_NOT_HERE}
                else error.strerror
            )
            raise CannotServe(f"cannot listen on {shown}:{port}: {reason}") from error
        self.port: int = self._sockets[0].getsockname()[1]
        self.address = f"{shown}:{self.port}"
        """`host:port`, as a client takes it."""

    def close(self) -> None:
        """Leave the port to others."""
        _close(self._sockets)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def literal_hosts(host: str) -> list[str]:
    """The addresses that a host name stands for and this machine has, as they stand before a colon and a port.

    A transport that was given the name might listen at some of them, and say
    nothing of the others.
    """
    here = []
    for family, (address, *_) in _addresses(host, 0):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            here.append(bracketed(address))
    return here


def _addresses(host: str, port: int) -> list[_Address]:
    found: list[_Address] = []
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        if (family, address) not in found:
            found.append((family, address))
    if host in ("0.0.0.0", "::") and socket.has_dualstack_ipv6():
        return [(socket.AF_INET6, ("::", port))]  # for either, gRPC listens on both kinds of addresses by one socket
    return found


def _keep_all(addresses: list[_Address]) -> list[socket.socket]:
    """Keep one and the same port at all addresses that this machine has, or at none."""
    any_port = addresses[0][1][1] == 0
    for _ in range(_PORT_ATTEMPTS - 1 if any_port else 0):
        try:
            return _keep_each(addresses)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    return _keep_each(addresses)


def _keep_each(addresses: list[_Address]) -> list[socket.socket]:
    kept: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, (host, port, *rest) in addresses:
            if kept:
                port = kept[0].getsockname()[1]
            try:
                kept.append(_keep(family, (host, port or _free_port(family, host), *rest)))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
        if not kept and missing is not None:
            raise missing
    except OSError:
        _close(kept)
        raise
    return kept


def _free_port(family: socket.AddressFamily, host: str) -> int:
    """A port that is free now; to be kept, it has to be asked for by its number."""
    with socket.socket(family, socket.SOCK_STREAM) as finder:
        finder.bind((host, 0))
        return int(finder.getsockname()[1])


def _keep(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    """Return a socket that is bound, does not listen, and lets others listen with SO_REUSEPORT only."""
    keeper = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            keeper.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        # Connections of a server that has just ended are no hindrance, one that listens is. To bind is not enough:
        # two that do not listen yet may bind at the same moment, but only one of them gets to listen.
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(address)
        keeper.listen()
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        keeper.shutdown(socket.SHUT_RDWR)  # listens no more, and stays bound
    except BaseException:
        keeper.close()
        raise
    return keeper


def _close(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()
