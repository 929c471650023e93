"""TorchServe. It needs a Java runtime."""

from __future__ import annotations

import json
import shutil
import subprocess

from bench.peers.dialects import MODEL
from bench.peers.peer import SERVERS, CannotStart, Command, Peer, Place

SETTINGS = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 64, "maxBatchDelay": 1}


def start(place: Place) -> Command:
    if shutil.which("java") is None:
        raise CannotStart("there is no java")
    archiver = [str(place.python.parent / "torch-model-archiver"), "--model-name", MODEL, "--version", "1.0"]
    archiver += [
        "--handler",
        str(SERVERS / "torchserve_handler.py"),
        "--extra-files",
        str(SERVERS / "digit_network.py"),
    ]
    made = subprocess.run([*archiver, "--export-path", str(place.folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        raise CannotStart(f"torch-model-archiver: {made.stderr.strip()[-200:]}")
    archive = f"{MODEL}.mar"
    names = ("inference_address", "management_address", "metrics_address")
    lines = [f"{name}=http://127.0.0.1:{port}" for name, port in zip(names, place.ports, strict=False)]
    lines += [f"grpc_inference_port={place.ports[3]}", f"grpc_management_port={place.ports[4]}"]
    lines += ["load_models=all", f"model_store={place.folder}", "job_queue_size=1000", "metrics_mode=log"]
    models = {MODEL: {"1.0": {"defaultVersion": True, "marName": archive, **SETTINGS}}}
    lines.append(f"models={json.dumps(models)}")
    config = place.folder / "config.properties"
    config.write_text("\n".join(lines) + "\n")
    arguments = [str(place.python.parent / "torchserve"), "--start", "--foreground", "--disable-token-auth"]
    arguments += ["--ts-config", str(config), "--model-store", str(place.folder)]
    return Command(arguments, {"LOG_LOCATION": str(place.folder), "METRICS_LOCATION": str(place.folder)})


PEER = Peer(
    name="TorchServe",
    environment="torchserve",
    dialect="raw /predictions/mnist",
    start=start,
    settings="HTTP, raw bytes; batches of up to 64 requests, 1 ms; 1 worker",
)
