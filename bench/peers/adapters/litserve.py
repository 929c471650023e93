"""LitServe."""

from __future__ import annotations

from bench.peers.peer import SERVERS, Command, Peer, Place


def start(place: Place) -> Command:
    return Command([str(place.python), str(SERVERS / "litserve_server.py"), place.port])


PEER = Peer(
    name="LitServe",
    environment="litserve",
    dialect="raw /classify",
    start=start,
    settings="HTTP, raw bytes; batches of up to 64 requests, 1 ms; fast queue, 1 worker",
)
