"""Prometheus metrics: what the server did, told over HTTP.

Each worker process counts in a memory-mapped file of its own, and whoever
serves HTTP adds the files up when it is asked. To count is one addition in
shared memory, without a lock or a system call: prometheus_client's own
multi-process mode does the same at ten times the price, which a call would
feel (docs/observability.md has the figures). prometheus_client writes the
page, and is imported by who serves it only.

A single process counts in memory that nobody else sees, by the same code.

When a worker dies, `worker_died` moves what it counted into the file of the
dead, so that counters never go backwards, and its gauges vanish.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import struct
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from itertools import accumulate
from operator import add
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, Self, TypeAlias
from urllib.parse import urlsplit

from server.errors import CannotServe, not_installed
from server.observer import Observer
from server.settings import bracketed

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

logger = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "_MNIST_GRPC_METRICS_DIRECTORY"
"""The environment variable by which the supervisor tells its workers where to count."""

SECONDS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds of the buckets of times. A lone image takes about 1 ms from end to end and 0.1 ms to compute."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

CODES = (
    "OK",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "INTERNAL",
    "CANCELLED",
)
"""What the calls of every method are counted by from the start: a series that begins with 1 shows no increase."""

METHODS = ("mnist.v1.DigitClassifier/Classify", "mnist.v1.DigitClassifier/StreamClassify")
EARLIER_VERSIONS = 8
"""How many models that were served before are still told, as 0."""

MAX_CALL_SERIES = 500
"""Methods times codes that are told apart; later ones are counted as the method `other`."""

MEMORY_BYTES = 1 << 18
"""For what one process counts: a server begins with 5 kB, and each model that it serves adds 50 bytes."""


@dataclass(frozen=True, slots=True)
class Family:
    """What the series of one name have in common."""

    name: str
    kind: str
    """`counter`, `histogram` or `gauge`; a gauge's value is the sum over the workers, or with `largest` the maximum."""
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    largest: bool = False

    @property
    def cells(self) -> int:
        """Numbers of one series: a histogram's are its buckets, the one without a bound, and the sum."""
        return len(self.buckets) + 2 if self.kind == "histogram" else 1


def _counter(name: str, text: str, *labels: str) -> Family:
    return Family(f"mnist_grpc_{name}", "counter", text, labels)


def _gauge(name: str, text: str, *labels: str, largest: bool = False) -> Family:
    return Family(f"mnist_grpc_{name}", "gauge", text, labels, largest=largest)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Family:
    return Family(f"mnist_grpc_{name}", "histogram", text, labels, buckets)


# Without the suffixes that the text format adds to counters (_total) and histograms (_bucket, _count, _sum).
CALLS = _counter("calls", "Calls that ended, by status code.", "method", "code")
CALL_SECONDS = _histogram("call_duration_seconds", "From a call's arrival to its end.", SECONDS, "method")
QUEUE_SECONDS = _histogram("queue_duration_seconds", "How long an item (the images of a call) waited.", SECONDS)
COMPUTE_SECONDS = _histogram("compute_duration_seconds", "How long a batch took to compute.", SECONDS)
BATCH_ROWS = _histogram("batch_rows", "Images in a batch.", ROWS)
BATCHES = _counter("batches", "Batches that were computed, or failed.")
BATCH_FAILURES = _counter("batch_failures", "Batches that failed.")
ROWS_COMPUTED = _counter("rows_computed", "Images that were computed.")
REJECTED = _counter("rejected_rows", "Images that were refused on arrival.", "reason")
EXPIRED = _counter("expired_rows", "Images whose deadline passed while they waited; they were not computed.")
CANCELLED = _counter("cancelled_rows", "Images whose caller left while they waited; they were not computed.")
FRAMES_DROPPED = _counter("frames_dropped", "Frames of a live stream that newer ones overtook.")
RELOADS = _counter("reloads", "Times that new weights were asked for, by what came of it.", "outcome")
WORKER_RESTARTS = _counter("worker_restarts", "Worker processes that died and were replaced.")
QUEUE_ROWS = _gauge("queue_rows", "Images that wait now.")
QUEUE_LIMIT = _gauge("queue_limit_rows", "Images that may wait.")
STREAMS = _gauge("open_streams", "Streams that are open now.")
MODEL = _gauge("model_info", "1 for the model that is served, 0 for earlier ones.", "version", largest=True)
SERVING = _gauge("serving", "Worker processes whose health says SERVING.")
WORKERS = _gauge("workers", "Worker processes that run.")

FAMILIES = {
    family.name: family
    for family in (
        CALLS,
        CALL_SECONDS,
        QUEUE_SECONDS,
        COMPUTE_SECONDS,
        BATCH_ROWS,
        BATCHES,
        BATCH_FAILURES,
        ROWS_COMPUTED,
        REJECTED,
        EXPIRED,
        CANCELLED,
        FRAMES_DROPPED,
        RELOADS,
        WORKER_RESTARTS,
        QUEUE_ROWS,
        QUEUE_LIMIT,
        STREAMS,
        MODEL,
        SERVING,
        WORKERS,
    )
}

Series: TypeAlias = tuple[str, tuple[str, ...]]
"""The name of a family, and the values of its labels."""


# Counting ------------------------------------------------------------------------


class Cells:
    """Numbers in memory that one process writes and another one may read.

    The memory is a row of records: how long a record's name is and how many
    numbers it has, the name, the numbers. A record stays where it is. The first
    eight bytes tell where the records end; they are written last, and a number
    is written in one piece, so that a reader needs no lock and a process that
    is killed leaves whole records.
    """

    _HEAD = struct.Struct("<II")  # bytes of the name with its padding, numbers
    _START = 8
    _RESERVE = 512  # bytes behind all records, for what has found no room

    def __init__(self, memory: mmap.mmap, *, is_writer: bool = True) -> None:
        self._memory = memory
        self.numbers = memoryview(memory).cast("d")
        self._end = memoryview(memory).cast("q")
        if is_writer:
            self._end[0] = max(self._end[0], self._START)
        self.nowhere = (len(memory) - self._RESERVE) // 8
        """The index of numbers that nobody reads."""

    @classmethod
    def private(cls) -> Self:
        """Cells of this process alone."""
        return cls(mmap.mmap(-1, MEMORY_BYTES))

    @classmethod
    def in_file(cls, path: Path) -> Self:
        """Cells in a file, which is made if it is not there."""
        with path.open("a+b") as file:
            # Written, not only made so long: who writes to a mapped page for which the disk has no room is killed.
            file.write(bytes(max(0, MEMORY_BYTES - file.tell())))
            file.flush()
            return cls(mmap.mmap(file.fileno(), MEMORY_BYTES))

    @classmethod
    def of_another(cls, path: Path) -> Self | None:
        """Cells that another process writes, to be read only; None where it has not begun, or is gone."""
        try:
            with path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), MEMORY_BYTES, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError):  # the latter for a file that is not yet so long
            return None
        return cls(memory, is_writer=False)

    def add(self, family: Family, labels: tuple[str, ...] = ()) -> int | None:
        """Begin a series at 0; return the index of its first number in `numbers`, or None where there is no room."""
        name = "\0".join((family.name, *labels)).encode()
        name += b"\0" * (-len(name) % 8)
        start = self._end[0]
        first = start + self._HEAD.size + len(name)
        end = first + 8 * family.cells
        if end > len(self._memory) - self._RESERVE:
            return None
        self._HEAD.pack_into(self._memory, start, len(name), family.cells)
        self._memory[start + self._HEAD.size : first] = name
        self._end[0] = end
        return first // 8

    def series(self) -> Iterator[tuple[Series, int]]:
        """All series and the index of their first number, in the order in which they began."""
        at, end = self._START, self._end[0]
        while at < end:
            length, numbers = self._HEAD.unpack_from(self._memory, at)
            at += self._HEAD.size
            name, *labels = self._memory[at : at + length].decode().rstrip("\0").split("\0")
            at += length
            yield (name, tuple(labels)), at // 8
            at += 8 * numbers

    def close(self) -> None:
        self.numbers.release()
        self._end.release()
        self._memory.close()


class Metrics(Observer):
    """Counts what it is told, in the directory of the supervisor or, without one, for this process.

    Args:
        registry: where a single process shows its metrics; by default
            prometheus_client's own, which also knows the process.
        directory: where a worker counts; by default that of `DIRECTORY_VARIABLE`.
        max_queue_size: how many rows may wait here; without it, the process is
            no worker, as the supervisor.

    Raises:
        CannotServe: prometheus_client is not installed, or the directory cannot
            be written to.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        directory: str | os.PathLike[str] | None = None,
        max_queue_size: int | None = None,
    ) -> None:
        directory = directory or os.environ.get(DIRECTORY_VARIABLE)
        self._forget: Callable[[], None] | None = None
        if directory:
            path = _file_of(os.getpid(), Path(directory))
            try:
                self._cells = Cells.in_file(path)
            except OSError as error:
                raise CannotServe(f"metrics cannot be kept in {path}: {error.strerror}") from error
        else:
            self._cells = Cells.private()
            self._forget = _register(_Collector(lambda: _total([self._cells])), registry)
        self._numbers = self._cells.numbers
        self._places: dict[Series, int] = {}
        self._full = False
        # Of each method and code: the places of its counter and of the method's histogram.
        self._calls: dict[tuple[str, str], tuple[int, int]] = {}
        for method in METHODS:
            for code in CODES:
                self._place_of_call(method, code)
        self._queue = self._place(QUEUE_SECONDS)
        self._compute = self._place(COMPUTE_SECONDS)
        self._batch_rows = self._place(BATCH_ROWS)
        self._batches = self._place(BATCHES)
        self._failures = self._place(BATCH_FAILURES)
        self._computed = self._place(ROWS_COMPUTED)
        self._dropped = {"expired": self._place(EXPIRED), "cancelled": self._place(CANCELLED)}
        self._frames = self._place(FRAMES_DROPPED)
        self._queue_rows = self._place(QUEUE_ROWS)
        self._streams = self._place(STREAMS)
        self._serving = self._place(SERVING)
        for reason in ("queue_full", "decoder_full", "closing"):
            self._place(REJECTED, reason)
        for outcome in ("served", "refused", "unchanged", "rolled_back"):
            self._place(RELOADS, outcome)
        self._place(WORKER_RESTARTS)
        if max_queue_size is not None:
            self._numbers[self._place(WORKERS)] = 1
            self._numbers[self._place(QUEUE_LIMIT)] = max_queue_size
        self._versions: list[str] = []  # that are told, the served one last

    def close(self) -> None:
        """Tell nothing more. Only for a process that goes on without: a worker's numbers outlive it."""
        if self._forget is not None:
            self._forget()

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        counter, histogram = self._calls.get((method, code)) or self._place_of_call(method, code)
        numbers = self._numbers
        numbers[counter] += 1
        numbers[histogram + bisect_left(SECONDS, seconds)] += 1
        numbers[histogram + _TIME_SUM] += seconds

    def stream_opened(self) -> None:
        self._numbers[self._streams] += 1

    def stream_closed(self) -> None:
        self._numbers[self._streams] -= 1

    def frames_dropped(self, frames: int) -> None:
        self._numbers[self._frames] += frames

    def rejected(self, reason: str, rows: int) -> None:
        self._numbers[self._place(REJECTED, reason)] += rows

    def queue_changed(self, rows: int) -> None:
        self._numbers[self._queue_rows] = rows

    def dropped(self, reason: str, rows: int) -> None:
        self._numbers[self._dropped[reason]] += rows

    def batch_ended(
        self, rows: int, tokens: Sequence[Any], queue_seconds: Sequence[float], compute_seconds: float, failed: bool
    ) -> None:
        numbers = self._numbers
        histogram = self._queue
        for seconds in queue_seconds:
            numbers[histogram + bisect_left(SECONDS, seconds)] += 1
        numbers[histogram + _TIME_SUM] += sum(queue_seconds)
        histogram = self._compute
        numbers[histogram + bisect_left(SECONDS, compute_seconds)] += 1
        numbers[histogram + _TIME_SUM] += compute_seconds
        histogram = self._batch_rows
        numbers[histogram + bisect_left(ROWS, rows)] += 1
        numbers[histogram + _ROWS_SUM] += rows
        numbers[self._batches] += 1
        if failed:
            numbers[self._failures] += 1
        else:
            numbers[self._computed] += rows

    def model_served(self, version: str) -> None:
        if version in self._versions:
            self._versions.remove(version)
        for earlier in self._versions:
            self._numbers[self._place(MODEL, earlier)] = 0
        self._versions.append(version)
        self._numbers[self._place(MODEL, version)] = 1
        while len(self._versions) > 1 + EARLIER_VERSIONS:
            self._numbers[self._place(MODEL, self._versions.pop(0))] = _NOT_TOLD

    def reload_ended(self, outcome: str) -> None:
        self._numbers[self._place(RELOADS, outcome)] += 1

    def health_changed(self, serving: bool) -> None:
        self._numbers[self._serving] = serving

    def _place_of_call(self, method: str, code: str) -> tuple[int, int]:
        if len(self._calls) >= MAX_CALL_SERIES:
            method = "other"
        places = self._place(CALLS, method, code), self._place(CALL_SECONDS, method)
        if method != "other":
            self._calls[method, code] = places
        return places

    def _place(self, family: Family, *labels: str) -> int:
        """Where the numbers of a series are; it begins when it is first asked for."""
        series = family.name, labels
        if (place := self._places.get(series)) is not None:
            return place
        if (place := self._cells.add(family, labels)) is None:
            if not self._full:
                self._full = True
                logger.warning("no room for more metrics: %s %s and later ones are not counted", family.name, labels)
            return self._cells.nowhere
        self._places[series] = place
        return place


_TIME_SUM = len(SECONDS) + 1
_ROWS_SUM = len(ROWS) + 1
_NOT_TOLD = float("-inf")
"""The value of a gauge that is over: its record stays."""


# Adding up ------------------------------------------------------------------------

_SUFFIX = ".metrics"

MAX_LOOKS = 1000
LOOK_AGAIN_SECONDS = 0.001


class _Moves:
    """Counts the moves of a dead worker's numbers, for readers in other processes: odd while one goes on.

    Not a lock, so that the supervisor waits for no reader, however slow.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "moves"

    def count(self) -> int:
        """How many times one began or ended."""
        try:
            return int.from_bytes(self._path.read_bytes(), "little")
        except FileNotFoundError:
            return 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Move, in a `with`. Only the supervisor does."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        count = int.from_bytes(os.pread(file, 8, 0), "little")
        try:
            os.pwrite(file, (count | 1).to_bytes(8, "little"), 0)
            yield
        finally:
            os.pwrite(file, ((count | 1) + 1).to_bytes(8, "little"), 0)
            os.close(file)


def _file_of(pid: int, directory: Path) -> Path:
    return directory / f"worker-{pid}{_SUFFIX}"


def worker_died(pid: int, directory: str | os.PathLike[str] | None = None) -> None:
    """Keep what a worker counted, forget its gauges, and count its death. For the supervisor, once it is reaped.

    `directory` is by default that of `DIRECTORY_VARIABLE`; without either, nothing happens.
    """
    directory = directory or os.environ.get(DIRECTORY_VARIABLE)
    if not directory:
        return
    path = _file_of(pid, Path(directory))
    with _Moves(Path(directory)).one():
        dead = Cells.in_file(Path(directory) / f"dead{_SUFFIX}")
        places = dict(dead.series())

        def keep(series: Series, amounts: Sequence[float]) -> None:
            family = FAMILIES[series[0]]
            place = places[series] if series in places else dead.add(family, series[1])
            if place is None:
                logger.warning("no room for more metrics: %s %s of dead workers is lost", *series)
                return
            places[series] = place
            for index, amount in enumerate(amounts, place):
                dead.numbers[index] += amount

        if path.exists():  # it may have died before it counted anything
            worker = Cells.in_file(path)
            for series, place in worker.series():
                family = FAMILIES[series[0]]
                if family.kind != "gauge":
                    keep(series, worker.numbers[place : place + family.cells].tolist())
            worker.close()
            path.unlink()
        keep((WORKER_RESTARTS.name, ()), [1])
        dead.close()


def _total(processes: Sequence[Cells]) -> dict[Series, Sequence[float]]:
    """What processes counted, added up."""
    total: dict[Series, Sequence[float]] = {}
    for cells in processes:
        for series, place in cells.series():
            family = FAMILIES[series[0]]
            numbers: Sequence[float] = cells.numbers[place : place + family.cells].tolist()
            combine: Callable[[float, float], float] = max if family.largest else add
            total[series] = [*map(combine, total[series], numbers)] if series in total else numbers
    return total


def _total_of_files(directory: Path) -> dict[Series, Sequence[float]]:
    """What all files of a directory hold; in any process, in any thread."""
    moves = _Moves(directory)
    for _ in range(MAX_LOOKS):
        before = moves.count()
        if before % 2 == 0:
            total = _sum_of_files(directory)
            if moves.count() == before:
                return total
        time.sleep(LOOK_AGAIN_SECONDS)
    return _sum_of_files(directory)  # the supervisor was stopped within a move: better a wrong page than none


def _sum_of_files(directory: Path) -> dict[Series, Sequence[float]]:
    opened = [Cells.of_another(path) for path in sorted(directory.glob(f"*{_SUFFIX}"))]
    processes = [cells for cells in opened if cells is not None]
    try:
        return _total(processes)
    finally:
        for cells in processes:
            cells.close()


# Telling ---------------------------------------------------------------------------


class _Collector:
    """Shows totals to prometheus_client."""

    def __init__(self, total: Callable[[], dict[Series, Sequence[float]]]) -> None:
        self._total = total

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        told: dict[str, Any] = {
            family.name: kinds[family.kind](family.name, family.help, labels=family.labels)
            for family in FAMILIES.values()
        }
        for (name, labels), numbers in self._total().items():
            family = FAMILIES[name]
            if family.kind == "histogram":
                bounds = [*map(_bound, family.buckets), "+Inf"]
                counts = accumulate(numbers[:-1])
                told[name].add_metric(labels, list(zip(bounds, counts, strict=True)), numbers[-1])
            elif numbers[0] != _NOT_TOLD:
                told[name].add_metric(labels, numbers[0])
        yield from told.values()


def _bound(bound: float) -> str:
    """A bucket's bound as Prometheus writes numbers: with a point."""
    return str(float(bound))


def _register(collector: _Collector, registry: CollectorRegistry | None) -> Callable[[], None]:
    """Show a collector in a registry; return what takes it away."""
    prometheus_client = _prometheus_client()
    registry = registry or prometheus_client.REGISTRY
    registry.register(collector)
    return lambda: registry.unregister(collector)


def _prometheus_client() -> Any:
    try:
        import prometheus_client
    except ModuleNotFoundError as error:
        raise CannotServe(not_installed(error)) from error
    return prometheus_client


class MetricsServer(ThreadingMixIn, TCPServer):
    """Answers `GET /metrics` in threads of its own, until `close`."""

    daemon_threads = True
    allow_reuse_address = True  # a port on which a server was until just now, not one on which a server is

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.address_family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        super().__init__(address, _Handler)  # type: ignore[arg-type]
        # It looks 20 times a second whether it is to end: nothing that could be measured, and no stop waits for it.
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return int(self.server_address[1])

    def close(self) -> None:
        """Listen no more."""
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that left is no news; anything else is, with its traceback."""
        logger.log(
            logging.DEBUG if isinstance(sys.exception(), OSError) else logging.ERROR,
            "metrics could not be told to %s",
            client_address[0],
            exc_info=True,
        )


class _Handler(BaseHTTPRequestHandler):
    """One scrape."""

    server: MetricsServer
    timeout = 10  # seconds that a client may be silent
    server_version = "mnist-grpc"
    sys_version = ""

    def do_GET(self) -> None:
        if urlsplit(self.path).path != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND, "metrics are at /metrics")
            return
        page, content_type = page_of(self.server.registry, self.headers.get("Accept", ""))
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""


def page_of(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The page of a registry in a form that a scraper's header `Accept` asks for, and its content type."""
    from prometheus_client.exposition import choose_encoder

    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def own_registry() -> CollectorRegistry:
    """What `start_metrics_server` tells for a single process.

    Raises:
        CannotServe: prometheus_client is not installed.
    """
    registry: CollectorRegistry = _prometheus_client().REGISTRY
    return registry


def registry_of_workers(directory: str | os.PathLike[str] | None = None) -> CollectorRegistry:
    """What all workers count in a directory, by default that of `DIRECTORY_VARIABLE`; each of them may tell it.

    Raises:
        CannotServe: prometheus_client is not installed.
    """
    path = Path(directory or os.environ[DIRECTORY_VARIABLE])
    registry: CollectorRegistry = _prometheus_client().CollectorRegistry()
    _register(_Collector(lambda: _total_of_files(path)), registry)
    return registry


def start_metrics_server(
    host: str,
    port: int,
    *,
    multiprocess_dir: str | os.PathLike[str] | None = None,
    registry: CollectorRegistry | None = None,
) -> tuple[MetricsServer, int]:
    """Serve metrics at `http://HOST:PORT/metrics` from threads; return the server, and its port.

    With `multiprocess_dir`, what all workers count there; else what is in the
    registry, by default prometheus_client's own.

    Raises:
        CannotServe: the address cannot be bound, or prometheus_client is not
            installed.
    """
    if multiprocess_dir is not None:
        registry = registry_of_workers(multiprocess_dir)
    registry = registry or own_registry()
    try:
        server = MetricsServer(host, port, registry)
    except OSError as error:
        raise CannotServe(f"metrics cannot be served on {bracketed(host)}:{port}: {error.strerror}") from error
    return server, server.port
