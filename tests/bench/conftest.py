"""The benches, which are no part of what is installed, and small servers that answer as a peer does, or do not."""

from __future__ import annotations

import os
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from client.load.images import images

ROOT = Path(__file__).parents[2]
Answer = Callable[[bytes], tuple[int, bytes]]


class RawServer(Protocol):
    """Start a server that answers each request with these bytes, then with `endless` again and again."""

    def __call__(self, answer: bytes, endless: bytes = b"") -> str: ...


sys.path.append(str(ROOT))  # behind what is installed; the modules of this folder import the benches


@pytest.fixture(autouse=True)
def _processes_find_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


@pytest.fixture(scope="session")
def digits() -> list[int]:
    """What the bare network reads on the bench's images."""
    from bench.forward import Forward

    return Forward().digits()


@pytest.fixture(scope="session")
def read(digits: list[int]) -> Answer:
    """The right answer to raw pixels: probabilities of which the digit's is 1."""
    known = {row.tobytes(): digit for row, digit in zip(images(), digits, strict=True)}

    def answer(body: bytes) -> tuple[int, bytes]:
        rows = [known[body[start : start + 784]] for start in range(0, len(body), 784)]
        return 200, np.eye(10, dtype=np.float32)[rows].tobytes()

    return answer


@pytest.fixture
def http_server() -> Iterator[Callable[[Answer], str]]:
    """Start an HTTP/1.1 server that answers POSTs with a status and a body; return its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1  # head and body in one packet

            def do_POST(self) -> None:
                status, body = answer(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def raw_server() -> Iterator[RawServer]:
    """Its answers need not be HTTP."""
    with ExitStack() as stack:

        def start(answer: bytes, endless: bytes = b"") -> str:
            class Handler(socketserver.StreamRequestHandler):
                def handle(self) -> None:
                    with suppress(OSError):
                        while self.rfile.readline():
                            length = 0
                            while (field := self.rfile.readline()).strip():
                                name, _, value = field.partition(b":")
                                length = int(value) if name == b"content-length" else length
                            self.rfile.read(length)
                            self.wfile.write(answer)
                            while endless:
                                self.wfile.write(endless)

            server = stack.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            stack.callback(server.shutdown)
            return f"127.0.0.1:{server.server_address[1]}"

        yield start
