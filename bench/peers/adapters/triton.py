"""Triton with its Python backend. The binary is the one that PyTriton's package brings, CUDA's libraries with it."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench.peers.dialects import INPUT, MODEL, OUTPUT
from bench.peers.peer import SERVERS, CannotStart, Command, Peer, Place

CONFIG = f"""
name: "{MODEL}"
backend: "python"
max_batch_size: 256
input [ {{ name: "{INPUT}" data_type: TYPE_UINT8 dims: [ 784 ] }} ]
output [ {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ 10 ] }} ]
dynamic_batching {{ }}
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""


def distribution(python: Path) -> Path:
    """The folder in which PyTriton has the server."""
    found = sorted(python.parent.parent.glob("lib/python*/site-packages/pytriton/tritonserver"))
    if not found:
        raise CannotStart("PyTriton has brought no tritonserver")
    return found[0]


def libpython(place: Place) -> Path:
    """The folder of the interpreter's library, which the backend's process needs; another one's may not fit."""
    return place.python.resolve().parent.parent / "lib"


def start(place: Place) -> Command:
    triton = distribution(place.python)
    backends, models = place.folder / "backends", place.folder / "models"
    shutil.copytree(triton / "backends", backends)
    version = triton.parents[2].name.removeprefix("python")
    shutil.copy(triton / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    (models / MODEL / "1").mkdir(parents=True)
    (models / MODEL / "config.pbtxt").write_text(CONFIG)
    shutil.copy(SERVERS / "triton_model.py", models / MODEL / "1" / "model.py")
    shutil.copy(SERVERS / "digit_network.py", models / MODEL / "1")
    arguments = [str(triton / "bin" / "tritonserver"), "--model-repository", str(models)]
    arguments += ["--backend-directory", str(backends), "--grpc-address", "127.0.0.1", "--grpc-port", place.port]
    arguments += ["--allow-http", "false", "--allow-metrics", "false", "--log-info", "false"]
    return Command(arguments, {"LD_LIBRARY_PATH": f"{triton.parents[1] / 'nvidia_pytriton.libs'}:{libpython(place)}"})


PEER = Peer(
    name="Triton, Python backend",
    environment="triton",
    dialect="open inference",
    start=start,
    settings="gRPC; dynamic batching without delay, batches of up to 256, 1 instance; no HTTP, no metrics",
)
