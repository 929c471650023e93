"""MLServer."""

from __future__ import annotations

import json

from bench.peers.dialects import MODEL
from bench.peers.peer import SERVERS, Command, Peer, Place


def start(place: Place) -> Command:
    grpc, http, metrics, *_ = place.ports
    settings = {"host": "127.0.0.1", "grpc_port": grpc, "http_port": http, "metrics_port": metrics}
    settings |= {"parallel_workers": 0, "debug": False, "metrics_dir": str(place.folder)}
    model = {"name": MODEL, "implementation": "mlserver_model.DigitsModel"}
    (place.folder / "settings.json").write_text(json.dumps(settings))
    (place.folder / "model-settings.json").write_text(json.dumps(model))
    arguments = [str(place.python.parent / "mlserver"), "start", str(place.folder)]
    return Command(arguments, {"PYTHONPATH": str(SERVERS)})


PEER = Peer(
    name="MLServer",
    environment="mlserver",
    dialect="open inference",
    start=start,
    settings="gRPC; inference in the server's process, no batching",
)
