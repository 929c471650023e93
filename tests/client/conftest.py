"""What the client's tests need: a real server as a process, and fakes for its faults.

Nothing here imports the server or torch, so that these tests also run where
only the client is installed, at the oldest versions that it accepts.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import client
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0  # seconds after which whatever a test waits for will not come

T = TypeVar("T")
GreyImage: TypeAlias = npt.NDArray[np.uint8]
Handler: TypeAlias = Callable[[Any, Any], Any]


@pytest.fixture(autouse=True)
def _no_target_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MNIST_GRPC_TARGET", raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


# Digits ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def digits() -> list[GreyImage]:
    """Twenty digits, canonical `uint8[28, 28]`; image i shows the digit i % 10."""
    with Image.open(ROOT / "server" / "golden" / "digits.png") as sheet:
        pixels = np.array(sheet, np.uint8)
    return [pixels[row : row + 28, column : column + 28] for row in (0, 28) for column in range(0, 280, 28)]


@pytest.fixture(scope="session")
def blank() -> GreyImage:
    """No digit: an image that is refused on this side."""
    return np.zeros((28, 28), np.uint8)


# The real server ------------------------------------------------------------


@contextmanager
def real_server(folder: Path, *flags: str | Path) -> Iterator[str]:
    """`host:port` of a real server, a process of MNIST_GRPC_SERVER_PYTHON where that is set."""
    python = os.environ.get("MNIST_GRPC_SERVER_PYTHON", sys.executable)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MNIST_GRPC_")}
    log = folder / "log.txt"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [python, "-m", "server", "--port", "0", *map(str, flags)],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        hung = threading.Timer(90, process.kill)
        hung.start()
        line = process.stdout.readline()
        hung.cancel()
        if "serving on" not in line:
            process.kill()
            pytest.fail(f"the server did not start: {line}{log.read_text()}")
        yield line.split()[-1]
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="session")
def server_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a real server in plaintext."""
    with real_server(tmp_path_factory.mktemp("server")) as address:
        yield address


# Fakes ----------------------------------------------------------------------


class Fakes:
    """Servers that answer as a test tells them to, and places where none answers."""

    def __init__(self, digits: Sequence[GreyImage]) -> None:
        self.stopping = threading.Event()
        """What a handler that never answers waits for."""
        self._labels = {image.tobytes(): index % 10 for index, image in enumerate(digits)}
        self._servers: dict[str, grpc.Server] = {}
        self._cleanup = ExitStack()

    def serve(
        self,
        *,
        classify: Handler | None = None,
        stream: Handler | None = None,
        get_model: Handler | None = None,
        check: Handler | None = None,
        watch: Handler | None = None,
        port: int = 0,
        options: Sequence[tuple[str, Any]] = (),
        credentials: grpc.ServerCredentials | None = None,
        unix: str | None = None,
    ) -> str:
        """Start a server on these handlers, `(request, context) -> response`; return its address."""
        pool = self._cleanup.enter_context(ThreadPoolExecutor(16))
        server = grpc.server(pool, options=options)
        servicer = _Servicer(classify or (lambda request, _: self.answer(request)), stream or self._echo, get_model)
        pb_grpc.add_DigitClassifierServicer_to_server(servicer, server)
        health: dict[str, Any] = {}  # raw bytes: no serializers, no grpc_health
        if check is not None:
            health["Check"] = grpc.unary_unary_rpc_method_handler(check)
        if watch is not None:
            health["Watch"] = grpc.unary_stream_rpc_method_handler(watch)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),))
        address = unix or f"127.0.0.1:{port}"
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        server.start()
        address = unix or f"127.0.0.1:{port}"
        self._servers[address] = server
        self._cleanup.callback(lambda: server.stop(0).wait(PATIENCE))
        return address

    def stop(self, address: str) -> None:
        """End one of the servers, and the calls that it has."""
        self._servers[address].stop(0).wait(PATIENCE)

    def answer(self, request: pb.ClassifyRequest) -> pb.ClassifyResponse:
        """The right digits, each with a probability of 0.91."""
        rows = [request.pixels[start : start + 784] for start in range(0, len(request.pixels), 784)]
        labels = [self._labels[row] for row in rows]
        probabilities = [0.91 if digit == label else 0.01 for label in labels for digit in range(10)]
        return pb.ClassifyResponse(digits=labels, probabilities=probabilities)

    def answer_frames(self, message: pb.StreamClassifyRequest) -> pb.StreamClassifyResponse:
        """One block for all frames of a message."""
        result = self.answer(message.frames)
        block = pb.FrameBlock(first_sequence=message.first_sequence, frame_count=len(result.digits), result=result)
        return pb.StreamClassifyResponse(blocks=[block])

    def _echo(self, messages: Iterable[pb.StreamClassifyRequest], _: Any) -> Iterator[pb.StreamClassifyResponse]:
        yield from map(self.answer_frames, messages)

    def black_hole(self) -> str:
        """An address that accepts connections and never says a word."""
        listener = self._cleanup.enter_context(socket.create_server(("127.0.0.1", 0)))
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def nobody(self) -> str:
        """An address that refuses connections; bound, so that nobody else gets the port."""
        holder = self._cleanup.enter_context(socket.socket())
        holder.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{holder.getsockname()[1]}"

    def close(self) -> None:
        self.stopping.set()
        self._cleanup.close()


class _Servicer(pb_grpc.DigitClassifierServicer):
    def __init__(self, classify: Handler, stream: Handler, get_model: Handler | None) -> None:
        self._classify = classify
        self._stream = stream
        self._get_model = get_model

    def Classify(self, request: Any, context: Any) -> Any:
        return self._classify(request, context)

    def StreamClassify(self, request_iterator: Any, context: Any) -> Any:
        return self._stream(request_iterator, context)

    def GetModel(self, request: Any, context: Any) -> Any:
        return self._get_model(request, context) if self._get_model else super().GetModel(request, context)


@pytest.fixture
def fakes(digits: list[GreyImage]) -> Iterator[Fakes]:
    fakes = Fakes(digits)
    yield fakes
    fakes.close()


# Both clients ---------------------------------------------------------------


class LoopThread:
    """An event loop in a thread of its own, as an application has one, and what went wrong in it unseen."""

    def __init__(self) -> None:
        self.stray: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _, context: self.stray.append(context))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, awaited: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(awaited, self._loop)
        if not concurrent.futures.wait([future], PATIENCE).done:
            future.cancel()
            pytest.fail(f"still awaited after {PATIENCE:g} s: {awaited}")
        return future.result()

    def settle(self) -> set[asyncio.Task[Any]]:
        """Give what is ending the time to end; return the tasks that did not."""

        async def others() -> set[asyncio.Task[Any]]:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            left = (await asyncio.wait(tasks, timeout=2))[1] if tasks else set()
            for task in left:
                task.cancel()
            return left

        return self.run(others())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()


class DrivenAsyncClient:
    """An AsyncClient with the methods of Client, so that a case is written once for both."""

    def __init__(self, thread: LoopThread, target: str | Sequence[str] | None, **options: Any) -> None:
        self._thread = thread
        self._client = client.AsyncClient(target, **options)

    def __repr__(self) -> str:
        return repr(self._client)

    def close(self) -> None:
        self._thread.run(self._client.close())

    def classify(self, image: client.Image, *, timeout: float | None = None) -> client.Prediction:
        return self._thread.run(self._client.classify(image, timeout=timeout))

    def classify_batch(self, images: Iterable[client.Image], **options: Any) -> list[client.Prediction]:
        return self._thread.run(self._client.classify_batch(images, **options))

    def classify_iter(self, images: Iterable[client.Image], **options: Any) -> Generator[client.Prediction, None, None]:
        return self._iterator(lambda: self._client.classify_iter(images, **options))

    def stream_classify(
        self, frames: Iterable[client.Image], **options: Any
    ) -> Generator[client.Prediction | client.MnistGrpcError, None, None]:
        return self._iterator(lambda: self._client.stream_classify(frames, **options))

    def _iterator(self, make: Callable[[], AsyncGenerator[T, None]]) -> Generator[T, None, None]:
        """An async iterator that begins now, as a synchronous one."""
        results: AsyncGenerator[T, None]

        async def begin() -> None:
            nonlocal results
            results = make()

        async def take() -> T:
            return await anext(results)

        self._thread.run(begin())
        return self._iterate(take, lambda: results.aclose())

    def _iterate(
        self, take: Callable[[], Coroutine[Any, Any, T]], end: Callable[[], Coroutine[Any, Any, None]]
    ) -> Generator[T, None, None]:
        async def leave() -> None:
            await end()

        try:
            while True:
                try:
                    result = self._thread.run(take())
                except StopAsyncIteration:
                    return
                yield result
        finally:
            self._thread.run(leave())

    def get_model(self, *, timeout: float | None = None) -> client.Model:
        return self._thread.run(self._client.get_model(timeout=timeout))

    def wait_ready(self, timeout: float = 30) -> None:
        self._thread.run(self._client.wait_ready(timeout))

    def is_serving(self, *, timeout: float | None = None) -> bool:
        return self._thread.run(self._client.is_serving(timeout=timeout))


Twin: TypeAlias = client.Client | DrivenAsyncClient
Connect: TypeAlias = Callable[..., Twin]


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(params=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Make a client, once of each kind; afterwards nothing of it is left behind."""
    opened: list[Twin] = []
    thread: LoopThread | None = None if request.param == "Client" else request.getfixturevalue("loop_thread")

    def connect(target: str | Sequence[str] | None = None, **options: Any) -> Twin:
        twin: Twin = (
            client.Client(target, **options) if thread is None else DrivenAsyncClient(thread, target, **options)
        )
        opened.append(twin)
        return twin

    yield connect
    for twin in opened:
        twin.close()
    if thread is not None:
        left = thread.settle()
        gc.collect()  # a task or future whose exception nobody retrieved complains now
        stray, thread.stray = thread.stray, []
        assert not left
        assert not stray


class Running:
    """A call in a thread of its own, which a test waits for, but not for ever."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(function, *arguments), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            self._future.set_result(function(*arguments))
        except BaseException as error:
            self._future.set_exception(error)

    def result(self, within: float = PATIENCE) -> Any:
        if not concurrent.futures.wait([self._future], within).done:
            pytest.fail(f"it still runs after {within:g} s")
        return self._future.result()


@pytest.fixture
def start() -> Callable[..., Running]:
    """`start(function, *arguments).result(within=seconds)`: a hang is a failure of this one test."""
    return Running
