"""Ours, with each transport."""

from __future__ import annotations

from bench.peers.peer import Command, Peer, Place


def ours(transport: str, workers: int) -> Peer:
    def start(place: Place) -> Command:
        options = ["--port", place.port, "--transport", transport, "--workers", str(workers), "--log-level", "warning"]
        return Command([str(place.python), "-m", "server", *options])

    return Peer(
        name=f"{transport} x{workers}",
        dialect="ours",
        start=start,
        settings=f"--transport {transport} --workers {workers}",
    )


OURS = {peer.name: peer for peer in (ours(transport, workers) for workers in (1, 2) for transport in ("grpcio", "asgi"))}
