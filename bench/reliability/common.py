"""What the scenarios share: a report, server processes, known answers, load generators.

Knows no scenario. Imports no torch before an answer has to be known, so that
load generators, which get the answers handed to them, stay light.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
import psutil

from client.load.images import images
from protos.mnist.v1 import digit_classifier_pb2 as pb

ROOT = Path(__file__).parents[2]
TRANSPORT = "grpcio"
"""What a server speaks gRPC with, unless it is told otherwise."""

START_SECONDS = 60.0
STOP_SECONDS = 30.0
HANG_SECONDS = 30.0
"""What is not answered by then counts as hanging."""

LOG_CHARACTERS = 3000
"""How much of a server's log is shown when it matters."""

TOLERANCE = 1e-3
"""Of probabilities and logits: batches of other sizes make less of a difference, other weights far more."""

CHANNEL_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),  # the scenarios want to see every refusal
    ("grpc.use_local_subchannel_pool", 1),  # a channel is a connection of its own
    ("grpc.max_receive_message_length", -1),
]


T = TypeVar("T")


class BrokenRule(Exception):
    """Something that must never happen did; the message says what."""


class Report:
    """The table of a scenario, printed line by line, and the rules that it found broken."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def row(self, what: str, figure: object, note: str = "") -> None:
        print(f"{what:<58} {figure!s:>16}  {note}".rstrip(), flush=True)

    def require(self, holds: bool, rule: str) -> None:
        """Note a rule that is broken."""
        if not holds:
            self.failures.append(rule)
            print(f"BROKEN: {rule}", flush=True)

    def end(self) -> int:
        """Print the last line; return the exit code."""
        reasons = "; ".join(failure.splitlines()[0] for failure in self.failures)
        print(f"failed: {reasons}" if self.failures else "ok", flush=True)
        return 1 if self.failures else 0


# Answers --------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """Images, and what each version of the weights says of them."""

    pixels: npt.NDArray[np.uint8]
    """[n, 784]"""
    logits: dict[str, npt.NDArray[np.float32]]
    """By version: [n, 10]."""
    temperatures: dict[str, float]
    """By version: what logits are divided by before they become probabilities."""

    def rows(self, start: int, count: int) -> npt.NDArray[np.intp]:
        """So many of the images, going round."""
        return (start + np.arange(count)) % len(self.pixels)

    def request(self, rows: Sequence[int] | npt.NDArray[np.intp], *, logits: bool = False) -> pb.ClassifyRequest:
        """A request for these of the images."""
        return pb.ClassifyRequest(pixels=self.pixels[np.asarray(rows)].tobytes(), include_logits=logits)

    def probabilities(self, version: str, rows: Sequence[int] | npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """What the version says of these of the images, [n, 10]."""
        result: npt.NDArray[np.float32] = self._probabilities[version][np.asarray(rows)]
        return result

    @functools.cached_property
    def _probabilities(self) -> dict[str, npt.NDArray[np.float32]]:
        return {version: _softmax(logits / self.temperatures[version]) for version, logits in self.logits.items()}

    @functools.cached_property
    def _digits(self) -> dict[str, npt.NDArray[np.intp]]:
        return {version: logits.argmax(axis=1) for version, logits in self.logits.items()}

    def check(self, response: pb.ClassifyResponse, rows: Sequence[int] | npt.NDArray[np.intp]) -> str:
        """Raise BrokenRule unless this is what the version that the receipt names says; return the version."""
        version = response.receipt.model_version
        self.check_columns(version, rows, response.digits, response.probabilities, response.logits)
        return version

    def check_columns(
        self,
        version: str,
        rows: Sequence[int] | npt.NDArray[np.intp],
        digits: Sequence[int] | npt.NDArray[np.integer[Any]],
        probabilities: Sequence[float] | npt.NDArray[np.float32],
        given_logits: Sequence[float] | npt.NDArray[np.float32] = (),
    ) -> None:
        """Raise BrokenRule unless this is what the version says; logits only where there are any."""
        if version not in self.logits:
            raise BrokenRule(f"an answer names the unknown version {version!r}")
        expected = self._digits[version][np.asarray(rows)]
        found = np.array(digits)
        if found.shape != (len(rows),) or (found != expected).any():
            raise BrokenRule(f"digits {found.tolist()} instead of {expected.tolist()}")
        _check_near(
            probabilities, self.probabilities(version, rows), f"probabilities that version {version} does not give"
        )
        if len(given_logits):
            _check_near(
                given_logits, self.logits[version][np.asarray(rows)], f"logits that version {version} does not give"
            )


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: npt.NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return result


def _check_near(given: Any, expected: npt.NDArray[np.float32], complaint: str) -> None:
    values = np.array(given, np.float32)
    if values.size != expected.size or np.abs(values.reshape(expected.shape) - expected).max() > TOLERANCE:
        raise BrokenRule(complaint)


def known(
    weights: Sequence[str | os.PathLike[str]] | None = None, pixels: npt.NDArray[np.uint8] | None = None
) -> Known:
    """Have the bare network read images, else the bench's, by these weights files, else by the embedded ones."""
    import torch

    from digits.checkpoint import load_checkpoint
    from digits.preprocessing import normalize
    from server.settings import EMBEDDED_WEIGHTS

    torch.set_num_threads(1)
    pixels = images() if pixels is None else pixels
    logits: dict[str, npt.NDArray[np.float32]] = {}
    temperatures: dict[str, float] = {}
    for path in weights or [EMBEDDED_WEIGHTS]:
        checkpoint = load_checkpoint(path)
        features = normalize(pixels, checkpoint.manifest.mean, checkpoint.manifest.std)
        with torch.inference_mode():
            logits[checkpoint.version] = checkpoint.network(torch.from_numpy(features)).numpy()
        temperatures[checkpoint.version] = checkpoint.manifest.temperature
    return Known(pixels, logits, temperatures)


# Servers --------------------------------------------------------------------


class Server:
    """A server process that has said where it serves."""

    def __init__(
        self, process: subprocess.Popen[str], target: str, lines: queue.SimpleQueue[str], metrics_port: int, log: Path
    ) -> None:
        self.process = process
        self.target = target
        self.lines = lines
        """What the process says on stdout after that, line by line."""
        self._metrics_port = metrics_port
        self._log = log

    @property
    def log(self) -> str:
        """What the process has written to stderr."""
        return self._log.read_text(errors="replace")

    def next_line(self) -> str:
        """The next line on stdout.

        Raises:
            BrokenRule: none comes.
        """
        try:
            return self.lines.get(timeout=HANG_SECONDS)
        except queue.Empty:
            raise BrokenRule(f"the server said nothing more within {HANG_SECONDS:g} s") from None

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def rss_mb(self) -> float:
        """Resident memory of the process and those under it, in MB."""
        return sum(process.memory_info().rss for process in self._tree()) / 1e6

    def cpu_seconds(self) -> float:
        """Processor time used so far, with that of the processes under it."""
        times = [process.cpu_times() for process in self._tree()]
        return float(sum(time_.user + time_.system for time_ in times))

    def children(self) -> list[int]:
        """The processes directly under it that listen or work: its workers."""
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def metrics(self) -> dict[str, float]:
        """The current samples of the metrics endpoint, by `name{labels}` as they stand there."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=5) as answer:
                text: str = answer.read().decode()
        except OSError as error:
            raise BrokenRule(f"the server tells no metrics: {error}") from error
        samples = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                samples[name] = float(value)
        return samples

    def gauge(self, name: str) -> float:
        """The sum over a metric's labels."""
        found = [value for key, value in self.metrics().items() if key.split("{")[0] == name]
        if not found:
            raise BrokenRule(f"the server has no metric {name}")
        return sum(found)

    def wait_for_gauge(self, name: str, value: float, seconds: float) -> float:
        """Wait until a metric has a value; return how long it took, infinity if it does not happen."""
        start = time.perf_counter()
        while (waited := time.perf_counter() - start) < seconds:
            if self.gauge(name) == value:
                return waited
            time.sleep(0.01)
        return float("inf")

    def stop(self, number: int = signal.SIGTERM) -> float:
        """Send a signal; return how long the process took to end, in seconds.

        Raises:
            BrokenRule: it does not end.
        """
        start = time.perf_counter()
        self.process.send_signal(number)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise BrokenRule(f"the server did not end within {STOP_SECONDS:g} s of signal {number}") from None
        return time.perf_counter() - start


@contextmanager
def serving(
    *flags: str, module: str = "server", port: int = 0, metrics: bool = True, transport: str = TRANSPORT
) -> Iterator[Server]:
    """Run a server; it is ready when it says so, and is ended when left.

    One worker, unless the flags say otherwise; without `metrics`, gauges cannot be asked for.

    Raises:
        BrokenRule: it does not come to serve, or does not end when told to.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as stderr:
            server = start(
                *flags, module=module, port=port, stderr=stderr, log=log, metrics=metrics, transport=transport
            )
            try:
                yield server
                if server.is_alive:
                    server.stop()
            except BaseException:
                sys.stderr.write(server.log[-LOG_CHARACTERS:])
                raise
            finally:
                _kill(server.process)


def start(
    *flags: str,
    module: str,
    port: int,
    stderr: IO[str],
    log: Path,
    metrics: bool = True,
    transport: str = TRANSPORT,
) -> Server:
    """Start a server process that the caller ends; see `serving`."""
    metrics_port = free_port()
    defaults = {"--workers": "1", "--log-level": "warning", "--transport": transport}
    if metrics:
        defaults["--metrics-port"] = str(metrics_port)
    command = [sys.executable, "-m", module, "--port", str(port)]
    for flag, value in defaults.items():
        if flag not in flags:
            command += [flag, value]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MNIST_GRPC_")}
    process = subprocess.Popen(
        [*command, *flags], env=inherited | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_pump, args=(process, lines), daemon=True).start()
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            line = lines.get(timeout=0.1)
        except queue.Empty:
            if process.poll() is not None:
                break
            continue
        if "serving on " in line:
            return Server(process, line.split("serving on ")[1].split()[0], lines, metrics_port, log)
    _kill(process)
    raise BrokenRule(f"python -m {module} {' '.join(flags)} did not come to serve:\n{log.read_text()}")


def _pump(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    with process.stdout as stdout:
        for line in stdout:
            lines.put(line)


def _kill(process: subprocess.Popen[str]) -> None:
    """End the process and all under it, however they feel about it."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


# Load generators ------------------------------------------------------------


class Generators(ProcessPoolExecutor):
    """Processes that run load generators, and tell what broke there in words: gRPC's errors do not travel."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return super().submit(_in_words, fn, *args, **kwargs)


def _in_words(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    try:
        return function(*args, **kwargs)
    except (grpc.RpcError, BaseExceptionGroup) as error:
        first = first_error(error)
        if isinstance(first, grpc.RpcError):
            unexpected(first, f"a call of {function.__module__}.{function.__qualname__}")
        raise (first if isinstance(first, BrokenRule) else BrokenRule(f"{type(first).__name__}: {first}")) from None


@contextmanager
def processes(count: int) -> Iterator[Generators]:
    """Fresh processes for load generators: `submit` a function of a module.

    Spawned, as gRPC does not survive a fork.
    """
    with Generators(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(abs, range(count)))  # they are up
        yield pool


def wait_for_file(path: str) -> None:
    """Wait until a file appears: how a scenario tells its load generators to end."""
    while not os.path.exists(path):
        time.sleep(0.02)


def connect(target: str) -> grpc.aio.Channel:
    """A connection of its own that retries nothing."""
    return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)


@dataclass
class Latencies:
    """Durations in seconds, told in milliseconds."""

    seconds: list[float]

    def at(self, percent: float) -> str:
        """A percentile, `-` where there is none."""
        return f"{np.percentile(self.seconds, percent) * 1e3:.1f} ms" if self.seconds else "-"

    def p(self, percent: float) -> float:
        """A percentile in seconds, not a number where there is none."""
        return float(np.percentile(self.seconds, percent)) if self.seconds else float("nan")


def first_error(group: BaseException) -> BaseException:
    """The first exception in a group of groups, or the exception itself."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def unexpected(error: grpc.RpcError, where: str) -> NoReturn:
    """Raise BrokenRule for a status that has no business there."""
    raise BrokenRule(f"{where}: {error.code().name}: {error.details()}") from error


def check_growth(report: Report, before_mb: float, after_mb: float, limit: float, what: str) -> None:
    """Report a server's memory, and require that it grew by less than a share of it."""
    growth = after_mb / before_mb - 1
    report.row(f"server memory, {what}", f"{before_mb:.0f} -> {after_mb:.0f} MB", f"{growth:+.1%}")
    report.require(growth < limit, f"the server's memory grew by {growth:.1%}, {what}; the limit is {limit:.0%}")


def check_back_to_zero(report: Report, server: Server, gauge: str) -> None:
    """Report how long a gauge takes to come back to 0, and require that it does."""
    try:
        waited = server.wait_for_gauge(gauge, 0, GAUGE_SECONDS)
    except BrokenRule as error:
        report.require(False, str(error))
        return
    report.row(f"{gauge} back to 0 after", f"{waited * 1e3:.0f} ms")
    report.require(waited < GAUGE_SECONDS, f"{gauge} comes back to 0")


def check_health(report: Report, server: Server, *, alive: bool = True) -> None:
    """Require that the server lives, or was told to end, and has logged no fault of its own."""
    report.require(server.is_alive or not alive, f"the server ended with {server.process.poll()}")
    log = server.log
    fault = next((word for word in ("incident", "Traceback", "never retrieved") if word in log), None)
    report.require(fault is None, f"the server's log tells of {fault}:\n{log[-LOG_CHARACTERS:]}")


QUEUE_GAUGE = "mnist_grpc_queue_rows"
STREAMS_GAUGE = "mnist_grpc_open_streams"
GAUGE_SECONDS = 5.0

Scenario = Callable[..., None]
