"""A port that is kept for processes which share it: who may listen there, and who may not."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import grpc
import pytest

from server.errors import CannotServe
from server.ports import Reservation

Listen = Callable[..., socket.socket]


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Listen as gRPC's servers do; `sharing` says whether with SO_REUSEPORT."""
    sockets: list[socket.socket] = []

    def start(host: str, port: int, *, sharing: bool) -> socket.socket:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        sockets.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(sharing))
        listener.bind((host, port))
        listener.listen()
        return listener

    yield start
    for each in sockets:
        each.close()


def needs_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def refusal(host: str, port: int) -> str:
    with pytest.raises(CannotServe) as refused:
        Reservation(host, port)
    return str(refused.value)


def test_a_kept_port_is_listened_at_by_those_who_share_and_by_nobody_else(listen: Listen) -> None:
    with Reservation("127.0.0.1", 0) as reserved:
        for sharing_listen_already in (False, True):
            with pytest.raises(OSError, match="in use") as taken:
                listen("127.0.0.1", reserved.port, sharing=False)
            assert taken.value.errno == errno.EADDRINUSE
            assert f"127.0.0.1:{reserved.port}" in refusal("127.0.0.1", reserved.port)
            assert "taken" in refusal("0.0.0.0", reserved.port)
            if not sharing_listen_already:
                for _ in range(2):
                    listen("127.0.0.1", reserved.port, sharing=True)


async def test_a_server_that_does_not_share_cannot_have_a_kept_port() -> None:
    with Reservation("127.0.0.1", 0) as reserved:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        with pytest.raises(RuntimeError):
            server.add_insecure_port(reserved.address)


def test_connections_to_a_kept_port_are_refused_and_go_to_those_who_share_it(listen: Listen) -> None:
    with Reservation("127.0.0.1", 0) as reserved:
        address = ("127.0.0.1", reserved.port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        listener = listen(*address, sharing=True)
        listener.setblocking(False)
        connections = [socket.create_connection(address) for _ in range(30)]
        for connection in connections:
            listener.accept()[0].close()  # BlockingIOError, if it were one of the kept socket's
            connection.close()


@pytest.mark.parametrize("sharing", [False, True])
def test_a_port_at_which_somebody_listens_is_not_kept(sharing: bool, listen: Listen) -> None:
    port = port_of(listen("127.0.0.1", 0, sharing=sharing))
    assert refusal("127.0.0.1", port) == (
        f"cannot listen on 127.0.0.1:{port}: the address is taken, or not one of this machine"
    )


def test_a_port_that_was_left_can_be_had_at_once_whoever_had_it(listen: Listen) -> None:
    """A server that has just ended leaves connections in TIME_WAIT."""
    with Reservation("127.0.0.1", 0) as reserved:
        port = reserved.port
    for sharing in (False, True):
        listener = listen("127.0.0.1", port, sharing=sharing)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            listener.accept()[0].close()
            assert connection.recv(1) == b""
        listener.close()
        with Reservation("127.0.0.1", port) as reserved, pytest.raises(OSError, match="in use"):
            listen("127.0.0.1", reserved.port, sharing=False)
        with Reservation("127.0.0.1", port), pytest.raises(CannotServe):
            Reservation("127.0.0.1", port)


def test_of_many_at_the_same_moment_one_gets_the_port() -> None:
    for _ in range(20):
        with Reservation("127.0.0.1", 0) as reserved:
            port = reserved.port
        kept: list[Reservation] = []
        together = threading.Barrier(8)

        def take(port: int = port, kept: list[Reservation] = kept, together: threading.Barrier = together) -> None:
            together.wait()
            with suppress(CannotServe):
                kept.append(Reservation("127.0.0.1", port))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for each in kept:
            each.close()
        assert len(kept) == 1


def test_a_name_with_two_addresses_is_kept_at_both_or_at_none(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_ipv6()
    resolve = socket.getaddrinfo

    def resolve_two(host: str, port: int, **options: Any) -> list[Any]:
        assert host == "localhost"
        return [*resolve("::1", port, **options), *resolve("127.0.0.1", port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve_two)
    with Reservation("localhost", 0) as reserved:
        port = reserved.port
        assert reserved.address == f"localhost:{port}"
        for host in ("::1", "127.0.0.1"):
            with pytest.raises(OSError, match="in use"):
                listen(host, port, sharing=False)
    for host in ("::1", "127.0.0.1"):
        with closing(listen(host, port, sharing=False)):
            assert f"localhost:{port}" in refusal("localhost", port)
    Reservation("localhost", port).close()


def test_an_address_that_this_machine_lacks_is_passed_over_unless_it_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve = socket.getaddrinfo

    def resolve_two(host: str, port: int, **options: Any) -> list[Any]:
        hosts = ("192.0.2.1", "127.0.0.1") if host == "localhost" else (host,)  # the first is for documents only
        return [found for each in hosts for found in resolve(each, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve_two)
    with Reservation("localhost", 0) as reserved, pytest.raises(CannotServe):
        Reservation("127.0.0.1", reserved.port)
    assert "not one of this machine" in refusal("192.0.2.1", 0)


def test_every_address_is_kept_for_both_kinds() -> None:
    needs_ipv6()
    with Reservation("0.0.0.0", 0) as reserved:
        assert reserved.address == f"0.0.0.0:{reserved.port}"
        for host in ("127.0.0.1", "::1", "::"):
            assert "taken" in refusal(host, reserved.port)
    with Reservation("::1", 0) as reserved:
        assert reserved.address == f"[::1]:{reserved.port}"
        Reservation("127.0.0.1", reserved.port).close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70 + ".invalid", ""])
def test_a_host_that_is_unknown_is_named(host: str) -> None:
    assert refusal(host, 1234).startswith(f"cannot listen on {host}:1234: ")
