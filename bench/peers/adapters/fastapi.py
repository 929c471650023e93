"""FastAPI under uvicorn."""

from __future__ import annotations

from bench.peers.peer import SERVERS, Command, Peer, Place


def start(place: Place) -> Command:
    options = ["--host", "127.0.0.1", "--port", place.port, "--workers", "2"]
    options += ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    arguments = [str(place.python), "-m", "uvicorn", "fastapi_server:app", "--app-dir", str(SERVERS), *options]
    return Command(arguments)


PEER = Peer(
    name="FastAPI",
    environment="fastapi",
    dialect="raw /classify",
    start=start,
    settings="HTTP, raw bytes; uvicorn with uvloop and httptools, 2 workers; a forward a request",
)
