"""Triton with its Python backend. The binary is the one that PyTriton's package brings, CUDA's libraries with it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from bench.peers.dialects import INPUT, MODEL, OUTPUT
from bench.peers.peer import SERVERS, CannotStart, Command, Peer, Place


def model(place: Place, backend: str, instances: int) -> Path:
    """Configure the model for a backend, and return the folder of its only version."""
    version = place.folder / "models" / MODEL / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(f"""
name: "{MODEL}"
backend: "{backend}"
max_batch_size: 256
input [ {{ name: "{INPUT}" data_type: TYPE_UINT8 dims: [ 784 ] }} ]
output [ {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ 10 ] }} ]
dynamic_batching {{ }}
instance_group [ {{ kind: KIND_CPU count: {instances} }} ]
""")
    return version


def backends(place: Place) -> Path:
    """The folder for the backends that the server finds."""
    return place.folder / "backends"


def serve(place: Place, libraries: Sequence[Path] = (), options: Sequence[str] = ()) -> Command:
    """What serves the model, and finds shared libraries in these folders, too."""
    triton = distribution(place.python)
    arguments = [str(triton / "bin" / "tritonserver"), "--model-repository", str(place.folder / "models")]
    arguments += ["--backend-directory", str(backends(place)), "--grpc-address", "127.0.0.1"]
    arguments += ["--grpc-port", place.port, "--allow-http", "false", "--allow-metrics", "false"]
    arguments += ["--log-info", "false", *options]
    folders = [triton.parents[1] / "nvidia_pytriton.libs", *libraries]
    return Command(arguments, {"LD_LIBRARY_PATH": ":".join(map(str, folders))})


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
    shutil.copytree(triton / "backends", backends(place))
    version = triton.parents[2].name.removeprefix("python")
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends(place) / "python")
    files = model(place, "python", instances=1)
    shutil.copy(SERVERS / "triton_model.py", files / "model.py")
    shutil.copy(SERVERS / "digit_network.py", files)
    return serve(place, [libpython(place)])


PEER = Peer(
    name="Triton, Python backend",
    environment="triton",
    dialect="open inference",
    start=start,
    settings="gRPC; dynamic batching without delay, batches of up to 256, 1 instance; no HTTP, no metrics",
)
