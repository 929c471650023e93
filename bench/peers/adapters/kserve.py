"""KServe's Python server."""

from __future__ import annotations

from bench.peers.peer import SERVERS, Command, Peer, Place


def start(place: Place) -> Command:
    ports = [str(port) for port in place.ports[:2]]
    return Command([str(place.python), str(SERVERS / "kserve_server.py"), *ports])


PEER = Peer(
    name="KServe",
    environment="kserve",
    dialect="open inference",
    start=start,
    settings="gRPC; 1 worker; it has no batching of its own for gRPC",
)
