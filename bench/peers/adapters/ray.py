"""Ray Serve by gRPC, with our description of the Open Inference Protocol."""

from __future__ import annotations

import os

from bench.peers.peer import ROOT, SERVERS, Command, Peer, Place


def start(place: Place) -> Command:
    packages = place.folder / "packages"
    packages.mkdir()
    (packages / "protos").symlink_to(ROOT / "protos")
    ports = [str(port) for port in place.ports[:2]]
    return Command(
        [str(place.python), str(SERVERS / "ray_server.py"), *ports, str(place.folder)],
        {"PYTHONPATH": f"{packages}{os.pathsep}{SERVERS}", "RAY_USAGE_STATS_ENABLED": "0"},
    )


PEER = Peer(
    name="Ray Serve",
    environment="ray",
    dialect="open inference",
    start=start,
    settings="gRPC; batches of up to 64 requests, 1 ms; 1 replica and 1 proxy",
    start_seconds=180,
)
