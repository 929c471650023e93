"""Ours, with each transport: in an environment of its own where the script has made one, else in this one."""

from __future__ import annotations

from bench.peers.peer import ENVIRONMENTS, Command, Peer, Place

ENVIRONMENT = "ours" if (ENVIRONMENTS / "ours" / "requirement").is_file() else None


def ours(transport: str, workers: int) -> Peer:
    def start(place: Place) -> Command:
        options = ["--port", place.port, "--transport", transport, "--workers", str(workers), "--log-level", "warning"]
        return Command([str(place.python), "-m", "server", *options])

    return Peer(
        name=f"{transport} x{workers}",
        environment=ENVIRONMENT,
        dialect="ours",
        start=start,
        settings=f"--transport {transport} --workers {workers}",
    )


OURS = {
    peer.name: peer for peer in (ours(transport, workers) for workers in (1, 2) for transport in ("grpcio", "asgi"))
}
