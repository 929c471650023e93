"""PyTriton."""

from __future__ import annotations

from bench.peers.adapters.triton import libpython
from bench.peers.peer import SERVERS, Command, Peer, Place


def start(place: Place) -> Command:
    ports = [str(port) for port in place.ports[:3]]
    arguments = [str(place.python), str(SERVERS / "pytriton_server.py"), *ports, str(place.folder / "workspace")]
    return Command(arguments, {"LD_LIBRARY_PATH": str(libpython(place))})


PEER = Peer(
    name="PyTriton",
    environment="pytriton",
    dialect="open inference",
    start=start,
    settings="gRPC; dynamic batching without delay, batches of up to 256; no metrics",
)
