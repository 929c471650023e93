"""Triton with a backend in C++, which `scripts/bench-peers` compiles with the libtorch of the environment."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.peers.adapters.triton import backends, model, serve
from bench.peers.peer import CannotStart, Command, Peer, Place
from digits.checkpoint import load_checkpoint
from server.settings import EMBEDDED_WEIGHTS

BACKEND = "digits"


def library(python: Path) -> Path:
    """Where the script puts the backend of an environment."""
    return python.parent.parent / "lib" / f"libtriton_{BACKEND}.so"


def write_weights(path: Path) -> None:
    """What `servers/triton_cpp/network.h` reads: mean, std and temperature, then each layer, all as raw float32."""
    checkpoint = load_checkpoint(EMBEDDED_WEIGHTS)
    manifest = checkpoint.manifest
    parts = [np.array([manifest.mean, manifest.std, manifest.temperature])]
    layers = checkpoint.network.state_dict()
    parts += [layers[f"fc{layer}.{kind}"].numpy().ravel() for layer in (1, 2, 3) for kind in ("weight", "bias")]
    np.concatenate(parts).astype("<f4").tofile(path)


def start(place: Place) -> Command:
    compiled = library(place.python)
    if not compiled.is_file():
        raise CannotStart("not compiled: scripts/bench-peers PYTHON triton-cpp")
    (backends(place) / BACKEND).mkdir(parents=True)
    (backends(place) / BACKEND / compiled.name).symlink_to(compiled)
    write_weights(model(place, BACKEND, instances=1) / "weights.f32")
    return serve(place)


PEER = Peer(
    name="Triton, C++ backend",
    environment="triton-cpp",
    dialect="open inference",
    start=start,
    settings="gRPC; dynamic batching without delay, batches of up to 256, 1 instance; no HTTP, no metrics",
)
