"""What the tests of several packages share: real digits, and a server to talk to.

The server is imported inside the fixtures, so that the client's tests also run
where only the client is installed.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import io
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--transport",
        choices=["grpcio", "asgi"],
        default="grpcio",
        help="what the servers of the tests speak gRPC with",
    )
    parser.addoption("--no-skip", action="store_true", help="a test that would be skipped fails")


def pytest_configure(config: pytest.Config) -> None:
    if (transport := config.getoption("--transport")) != "grpcio":
        from server.settings import Settings

        os.environ["MNIST_GRPC_TRANSPORT"] = transport  # of servers that are processes
        defaults = Settings.__init__.__kwdefaults__
        assert defaults is not None
        defaults["transport"] = transport


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--no-skip"):
        assert call.excinfo is not None
        report.outcome, report.longrepr = "failed", f"it may not be skipped: {call.excinfo.value}"
    return report


@pytest.fixture(scope="session")
def golden() -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Twenty digits written by people: canonical pixels, `uint8[20, 784]`, and what they show."""
    from server.golden import golden_digits

    pixels, labels = golden_digits()
    pixels.flags.writeable = False
    return pixels, labels.tolist()


@pytest.fixture(scope="session")
def golden_files(golden: tuple[npt.NDArray[np.uint8], list[int]]) -> list[bytes]:
    """The golden digits as PNG files."""
    files = []
    for row in golden[0]:
        buffer = io.BytesIO()
        Image.fromarray(row.reshape(28, 28)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


@pytest.fixture(scope="session")
def mnist() -> dict[str, npt.NDArray[np.uint8]]:
    """MNIST's four files as arrays, by the first part of their names: `t10k-images`, `uint8[10000, 28, 28]`, and so on.

    Looked for in `$MNIST_DATA_DIR`, else in a folder `data` here or in a folder beside this one.
    """
    given = os.environ.get("MNIST_DATA_DIR")
    for place in [Path(given)] if given else [ROOT / "data", *sorted(ROOT.parent.glob("*/data"))]:
        raw = place / "MNIST" / "raw"
        if raw.is_dir():
            return {f"{part}-{kind}": _read_idx(raw, part, kind) for part in ("train", "t10k") for kind in _IDX_HEADERS}
    pytest.skip("MNIST is not here: set MNIST_DATA_DIR to a folder that holds MNIST/raw/*-ubyte (or .gz)")


_IDX_HEADERS = {"images": 16, "labels": 8}  # bytes


def _read_idx(raw: Path, part: str, kind: str) -> npt.NDArray[np.uint8]:
    path = raw / f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    content = path.read_bytes() if path.is_file() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
    values = np.frombuffer(content, np.uint8, offset=_IDX_HEADERS[kind])
    return values.reshape(-1, 28, 28) if kind == "images" else values


@pytest.fixture(scope="session")
def mnist_raw(mnist: dict[str, npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """All images of MNIST, `uint8[70000, 28, 28]`: the training part, then the test part."""
    return np.concatenate([mnist["train-images"], mnist["t10k-images"]])


@pytest.fixture(scope="session")
def mnist_test(mnist: dict[str, npt.NDArray[np.uint8]]) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """MNIST's test part: images `uint8[10000, 28, 28]`, and what they show."""
    return mnist["t10k-images"], mnist["t10k-labels"].tolist()


@pytest.fixture
async def no_stray_errors() -> AsyncIterator[None]:
    """Fail a test that leaves an exception which nobody retrieved, or a broken callback."""
    stray: list[dict[str, Any]] = []

    def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # gRPC has one queue for all event loops of a process, and may wake this one for a call of one that is closed.
        if "PollerCompletionQueue._handle_events" not in context.get("message", ""):
            stray.append(context)

    asyncio.get_running_loop().set_exception_handler(note)
    gc.freeze()  # only what the test makes is then looked through; torch alone brings a million objects
    yield
    gc.collect()
    gc.unfreeze()
    await asyncio.sleep(0)
    assert not stray


@pytest.fixture
async def running_server() -> AsyncIterator[str]:
    """The address of a server on the embedded weights, in the test's own event loop.

    It answers only while that loop runs: a synchronous client calls it from
    `asyncio.to_thread`, or uses `server_process`.
    """
    from server.app import build_server
    from server.settings import Settings

    server, port = build_server(Settings(port=0))
    await server.start()
    await server.load()
    yield f"127.0.0.1:{port}"
    await server.stop(grace=0)


@pytest.fixture(params=["grpcio", "asgi"])
def each_transport(request: pytest.FixtureRequest) -> str:
    """Either transport, for tests that run on both whatever `--transport` says."""
    return str(request.param)


@pytest.fixture
def server_process() -> Iterator[Callable[..., tuple[str, subprocess.Popen[str]]]]:
    """Start `python -m server` on a free port; give its address once it serves, and the process.

    One process without a supervisor, unless `--workers` says otherwise.
    `server_process(*flags, wait=True, **environment)`; with `wait=False` the
    address is empty and stdout is still to be read.
    """
    processes: list[subprocess.Popen[str]] = []

    def start(*flags: str, wait: bool = True, **environment: str) -> tuple[str, subprocess.Popen[str]]:
        ours = {name for name in os.environ if name.startswith("MNIST_GRPC_")} - {"MNIST_GRPC_TRANSPORT"}
        inherited = {name: value for name, value in os.environ.items() if name not in ours}
        process = subprocess.Popen(
            [sys.executable, "-m", "server", *(() if "--port" in flags else ("--port", "0")), *flags],
            env=inherited | {"MNIST_GRPC_WORKERS": "1"} | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        if not wait:
            return "", process
        assert process.stdout is not None
        line = process.stdout.readline()
        if "serving on" not in line:
            process.kill()
            pytest.fail(f"the server did not start: {line}{process.communicate()[1]}")
        return line.split()[-1], process

    yield start
    for process in processes:
        process.kill()
        process.communicate()
