"""A service as a newcomer writes it: the example that the README shows, as a process, under many uploads at once."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from client.testing import FakeServer
from digits.preprocessing import InvalidImage, to_pixels

pytestmark = pytest.mark.timeout(300)  # two processes start, one with torch

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "fastapi_service.py"
UPLOADS = 200

StartServer = Callable[..., tuple[str, subprocess.Popen[str]]]


@contextmanager
def service(target: str) -> Iterator[str]:
    """The example under uvicorn; connections are taken by its socket before it is ready, and wait there."""
    with socket.create_server(("127.0.0.1", 0), backlog=UPLOADS) as listener:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "examples.fastapi_service:app", "--fd", str(listener.fileno())],
            cwd=ROOT,
            env=os.environ | {"MNIST_GRPC_TARGET": target, "PYTHONPATH": str(ROOT)},
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        port = listener.getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=30)
    assert "Traceback" not in output, output
    assert "Application shutdown complete" in output, output


def browser() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(timeout=60, limits=httpx2.Limits(max_connections=None), trust_env=False)


async def upload(http: httpx2.AsyncClient, service: str, file: bytes) -> httpx2.Response:
    return await http.post(f"{service}/digits", files={"image": ("digit.png", file, "image/png")})


def test_the_example_has_fewer_than_twenty_lines() -> None:
    lines = [line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) < 20


def test_the_readme_shows_the_example() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```python\n{EXAMPLE.read_text(encoding='utf-8')}```" in readme


async def test_two_hundred_uploads_at_once_are_all_read_right(
    server_process: StartServer, golden_files: list[bytes]
) -> None:
    target, _ = server_process()
    with service(target) as address:
        async with browser() as http:
            # All are under way before the first answer is awaited; file i shows the digit i % 10.
            uploads = (upload(http, address, golden_files[index % 20]) for index in range(UPLOADS))
            responses = await asyncio.gather(*uploads)
    assert [response.status_code for response in responses] == [200] * UPLOADS
    assert [response.json()["digit"] for response in responses] == [index % 10 for index in range(UPLOADS)]
    assert all(0.5 < response.json()["confidence"] <= 1 for response in responses)


async def test_errors_become_codes_of_http(golden_files: list[bytes]) -> None:
    with FakeServer() as server, service(server.target) as address:
        async with browser() as http:
            bad = await upload(http, address, b"no image")
            with pytest.raises(InvalidImage) as reason:
                to_pixels(b"no image")
            assert (bad.status_code, bad.json()["detail"]) == (422, str(reason.value))
            server.fail_next("RESOURCE_EXHAUSTED")
            overloaded = await upload(http, address, golden_files[7])
            assert (overloaded.status_code, server.target in overloaded.json()["detail"]) == (503, True)
            assert (await upload(http, address, golden_files[7])).json()["digit"] == 7
