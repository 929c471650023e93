"""Metrics: what is counted, what a scrape tells, and that dashboard and alerts ask for what is there."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import prometheus_client
import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server import metrics
from server.app import DigitServer
from server.errors import CannotServe
from server.metrics import Metrics, MetricsServer, start_metrics_server, worker_died
from server.settings import Settings

Golden = tuple[npt.NDArray[np.uint8], list[int]]
Start = Callable[..., tuple[str, subprocess.Popen[str]]]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "mnist-grpc.json"
CLASSIFY, STREAM = metrics.METHODS
TIMEOUT = 30


def page_of(port: int, path: str = "/metrics", accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return str(response.read().decode())


def samples_of(page: str) -> Samples:
    """The numbers of a page by name and labels, none of which may come twice."""
    samples: Samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"mnist_grpc_{name}", frozenset(labels.items())]


@contextmanager
def scraped(**where: Any) -> Iterator[int]:
    server, port = start_metrics_server("127.0.0.1", 0, **where)
    try:
        yield port
    finally:
        server.close()


def scrape(**where: Any) -> Samples:
    with scraped(**where) as port:
        return samples_of(page_of(port))


@asynccontextmanager
async def busy_server(golden: Golden) -> AsyncIterator[int]:
    """The port of the metrics of a server that has met most of what can happen to one."""
    registry = CollectorRegistry()
    settings = Settings(port=0, max_queue_size=40)
    server = DigitServer(settings, observer=Metrics(registry, max_queue_size=settings.max_queue_size))
    await server.start()
    try:
        await server.load()
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = pb_grpc.DigitClassifierStub(channel)
            for rows in (1, 20, 3):
                await stub.Classify(pb.ClassifyRequest(pixels=golden[0][:rows].tobytes()), timeout=TIMEOUT)
            for bad in (b"", b"1", bytes(784 * 41)):
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.Classify(pb.ClassifyRequest(pixels=bad), timeout=TIMEOUT)
            stream = stub.StreamClassify(timeout=TIMEOUT)
            await stream.write(pb.StreamClassifyRequest(frames=pb.ClassifyRequest(pixels=golden[0][:2].tobytes())))
            await stream.read()
            with scraped(registry=registry) as port:
                yield port
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
    finally:
        await server.stop(grace=0)


# What is counted -----------------------------------------------------------------


async def test_a_server_tells_what_it_did(golden: Golden) -> None:
    async with busy_server(golden) as port:
        samples = samples_of(await asyncio.to_thread(page_of, port))
    assert value(samples, "calls_total", method=CLASSIFY, code="OK") == 3
    assert value(samples, "calls_total", method=CLASSIFY, code="INVALID_ARGUMENT") == 3
    assert value(samples, "call_duration_seconds_count", method=CLASSIFY) == 6
    assert value(samples, "call_duration_seconds_count", method=STREAM) == 0, "it is still open"
    assert value(samples, "open_streams") == 1
    assert value(samples, "rows_computed_total") == value(samples, "batch_rows_sum") == 26
    assert value(samples, "queue_duration_seconds_count") == 4
    assert value(samples, "batches_total") == value(samples, "batch_rows_count") == 4
    assert value(samples, "compute_duration_seconds_count") == 4
    assert value(samples, "batch_failures_total") == 0
    assert value(samples, "queue_rows") == 0
    assert value(samples, "queue_limit_rows") == 40
    assert [n for (name, _), n in samples.items() if name == "mnist_grpc_model_info"] == [1]
    waited = value(samples, "queue_duration_seconds_sum") + value(samples, "compute_duration_seconds_sum")
    assert 0 < value(samples, "compute_duration_seconds_sum") <= waited
    assert value(samples, "call_duration_seconds_sum", method=CLASSIFY) < TIMEOUT


def test_every_event_has_its_number() -> None:
    registry = CollectorRegistry()
    observer = Metrics(registry, max_queue_size=100)
    observer.call_ended(CLASSIFY, "OK", 0.25)
    observer.call_ended("inference.GRPCInferenceService/ModelInfer", "NOT_FOUND", 0.5)
    observer.stream_opened()
    observer.stream_opened()
    observer.stream_closed()
    observer.frames_dropped(3)
    observer.rejected("queue_full", 4)
    observer.rejected("decoder_full", 5)
    observer.queue_changed(7)
    observer.dropped("expired", 8)
    observer.dropped("cancelled", 9)
    observer.batch_ended(10, [None, None], [0.5, 0.75], 0.125, failed=False)
    observer.batch_ended(11, [None], [0.0], 0.0, failed=True)
    observer.reload_ended("served")
    observer.reload_ended("refused")
    observer.health_changed(True)
    samples = scrape(registry=registry)
    method = "inference.GRPCInferenceService/ModelInfer"
    assert value(samples, "calls_total", method=CLASSIFY, code="OK") == 1
    assert value(samples, "calls_total", method=method, code="NOT_FOUND") == 1
    assert value(samples, "call_duration_seconds_sum", method=CLASSIFY) == 0.25
    assert value(samples, "call_duration_seconds_sum", method=method) == 0.5
    assert value(samples, "open_streams") == 1
    assert value(samples, "frames_dropped_total") == 3
    assert value(samples, "rejected_rows_total", reason="queue_full") == 4
    assert value(samples, "rejected_rows_total", reason="decoder_full") == 5
    assert value(samples, "rejected_rows_total", reason="closing") == 0
    assert value(samples, "queue_rows") == 7
    assert value(samples, "expired_rows_total") == 8
    assert value(samples, "cancelled_rows_total") == 9
    assert value(samples, "queue_duration_seconds_count") == 3
    assert value(samples, "queue_duration_seconds_sum") == 1.25
    assert value(samples, "compute_duration_seconds_count") == 2
    assert value(samples, "compute_duration_seconds_sum") == 0.125
    assert value(samples, "batch_rows_sum") == 21
    assert value(samples, "batches_total") == 2
    assert value(samples, "batch_failures_total") == 1
    assert value(samples, "rows_computed_total") == 10
    assert value(samples, "reloads_total", outcome="served") == 1
    assert value(samples, "reloads_total", outcome="refused") == 1
    assert value(samples, "serving") == value(samples, "workers") == 1
    observer.health_changed(False)
    assert value(scrape(registry=registry), "serving") == 0


def test_times_fall_into_the_buckets_that_prometheus_client_would_choose() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    observer = Metrics(ours, max_queue_size=1)
    reference = prometheus_client.Histogram(
        "mnist_grpc_compute_duration_seconds", "", buckets=metrics.SECONDS, registry=theirs
    )
    generator = random.Random(7)
    times = [0.0, *metrics.SECONDS, *(bound * 1.0001 for bound in metrics.SECONDS), 1e9]
    times += [10 ** generator.uniform(-6, 2) for _ in range(500)]
    for seconds in times:
        observer.batch_ended(1, [None], [0.0], seconds, failed=False)
        reference.observe(seconds)
    expected = samples_of(prometheus_client.generate_latest(theirs).decode())
    told = scrape(registry=ours)
    compared = {key: told[key] for key in expected if not key[0].endswith("_created")}
    assert len(compared) == len(metrics.SECONDS) + 3
    assert compared == {key: pytest.approx(expected[key]) for key in compared}


def test_the_model_that_is_served_is_1_and_some_earlier_ones_are_0() -> None:
    registry = CollectorRegistry()
    observer = Metrics(registry, max_queue_size=1)

    def told() -> dict[str, float]:
        return {
            dict(labels)["version"]: number
            for (name, labels), number in scrape(registry=registry).items()
            if name == "mnist_grpc_model_info"
        }

    assert told() == {}
    observer.model_served("a")
    observer.model_served("b")
    assert told() == {"a": 0, "b": 1}
    observer.model_served("a")
    assert told() == {"a": 1, "b": 0}
    for number in range(3000):  # more than there is room for, if each kept its own
        observer.model_served(f"v{number}")
    versions = told()
    assert len(versions) == 1 + metrics.EARLIER_VERSIONS
    assert [version for version, served in versions.items() if served] == ["v2999"]


def test_methods_without_end_are_counted_as_other() -> None:
    registry = CollectorRegistry()
    observer = Metrics(registry, max_queue_size=1)
    for number in range(5000):
        observer.call_ended(f"strange.Service/Method{number}", "OK", 0.001)
    observer.call_ended(CLASSIFY, "OK", 0.001)
    samples = scrape(registry=registry)
    counts = {key: number for key, number in samples.items() if key[0] == "mnist_grpc_calls_total"}
    assert len(counts) < metrics.MAX_CALL_SERIES + 10
    assert sum(counts.values()) == 5001
    assert value(samples, "calls_total", method="other", code="OK") > 4000
    assert value(samples, "calls_total", method=CLASSIFY, code="OK") == 1
    observer.rejected("a new reason", 1)
    assert value(scrape(registry=registry), "rejected_rows_total", reason="a new reason") == 1


# Several processes ---------------------------------------------------------------


WORKER = """
import sys
from server.metrics import Metrics
observer = Metrics(max_queue_size=100)
observer.model_served(sys.argv[1])
observer.health_changed(True)
observer.stream_opened()
observer.queue_changed(5)
assert "prometheus_client" not in sys.modules, "who only counts needs none"
for line in sys.stdin:
    for _ in range(int(line)):
        observer.call_ended("mnist.v1.DigitClassifier/Classify", "OK", 0.25)
    print("counted", flush=True)
"""


class Worker:
    """A process that counts calls, and dies when it is told to."""

    def __init__(self, directory: Path, version: str = "v1") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, version],
            env=os.environ | {"PYTHONPATH": str(ROOT), metrics.DIRECTORY_VARIABLE: str(directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.count(0)

    def begin(self, calls: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()

    def count(self, calls: int) -> None:
        self.begin(calls)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "counted\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Any]:
    workers: list[Worker] = []

    def start(version: str = "v1") -> Worker:
        workers.append(Worker(tmp_path, version))
        return workers[-1]

    yield start
    for started in workers:
        started.kill()


def calls_of(samples: Samples) -> tuple[float, float, float]:
    return (
        value(samples, "calls_total", method=CLASSIFY, code="OK"),
        value(samples, "call_duration_seconds_count", method=CLASSIFY),
        value(samples, "call_duration_seconds_sum", method=CLASSIFY),
    )


def test_workers_are_added_up_and_a_dead_one_takes_nothing_but_its_gauges(worker: Any, tmp_path: Path) -> None:
    with scraped(multiprocess_dir=tmp_path) as port:
        first, second = worker("v1"), worker("v2")
        first.count(10)
        second.count(4)
        samples = samples_of(page_of(port))
        assert calls_of(samples) == (14, 14, 3.5)
        assert value(samples, "workers") == value(samples, "serving") == value(samples, "open_streams") == 2
        assert value(samples, "queue_rows") == 10
        assert value(samples, "queue_limit_rows") == 200
        assert value(samples, "model_info", version="v1") == value(samples, "model_info", version="v2") == 1
        assert value(samples, "worker_restarts_total") == 0

        first.kill()
        worker_died(first.process.pid, tmp_path)
        samples = samples_of(page_of(port))
        assert calls_of(samples) == (14, 14, 3.5)
        assert value(samples, "workers") == value(samples, "serving") == value(samples, "open_streams") == 1
        assert value(samples, "queue_rows") == 5
        assert ("mnist_grpc_model_info", frozenset({("version", "v1")})) not in samples
        assert value(samples, "worker_restarts_total") == 1

        third = worker("v2")
        third.count(1)
        assert value(samples_of(page_of(port)), "model_info", version="v2") == 1, "a version is served or not"
        for dying in (second, third):
            dying.kill()
            worker_died(dying.process.pid, tmp_path)
        samples = samples_of(page_of(port))
        assert calls_of(samples) == (15, 15, 3.75)
        assert value(samples, "worker_restarts_total") == 3
        assert not [name for name, _ in samples if name == "mnist_grpc_workers"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["dead.metrics", "moves"], "the dead leave one file, however many they are"


def test_numbers_that_are_just_being_moved_are_not_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = metrics._Moves(tmp_path)
    move = moves.one()
    move.__enter__()
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            move.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", sleep)
    assert metrics._total_of_files(tmp_path) == {}
    assert len(waited) == 3
    assert moves.count() == 2


def test_counters_never_go_backwards_while_workers_are_killed(worker: Any, tmp_path: Path) -> None:
    with scraped(multiprocess_dir=tmp_path) as port:
        last = (0.0, 0.0, 0.0)
        for _ in range(5):
            dying = worker()
            dying.begin(10_000_000)
            while (told := calls_of(samples_of(page_of(port)))) == last:
                pass
            assert all(now >= before for now, before in zip(told, last, strict=True))
            dying.kill()
            killed = calls_of(samples_of(page_of(port)))
            worker_died(dying.process.pid, tmp_path)
            last = calls_of(samples_of(page_of(port)))
            assert last == killed
        # At most the call that was being counted is counted by half.
        assert abs(last[0] - last[1]) <= 5
        assert last[2] == pytest.approx(last[1] / 4, abs=5)


def test_a_worker_that_dies_before_it_counts_is_counted_itself(tmp_path: Path) -> None:
    worker_died(4711, tmp_path)
    assert value(scrape(multiprocess_dir=tmp_path), "worker_restarts_total") == 1


def test_without_a_directory_no_death_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(metrics.DIRECTORY_VARIABLE, raising=False)
    worker_died(4711)
    assert not list(tmp_path.iterdir())


def test_the_supervisor_counts_without_being_taken_for_a_worker(tmp_path: Path) -> None:
    Metrics(directory=tmp_path).reload_ended("served")
    samples = scrape(multiprocess_dir=tmp_path)
    assert value(samples, "reloads_total", outcome="served") == 1
    assert not [name for name, _ in samples if name in ("mnist_grpc_workers", "mnist_grpc_queue_limit_rows")]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_server_serves_its_metrics(workers: int, server_process: Start, golden: Golden) -> None:
    flags = ["--metrics-port", "0", "--workers", str(workers), "--max-queue-size", "40"]
    address, process = server_process(*flags)
    assert process.stderr is not None
    # The line comes before `serving on`, which has been read.
    port = next(int(found[1]) for line in process.stderr if (found := re.search(r"metrics on http://.*:(\d+)/", line)))
    with grpc.insecure_channel(address) as channel:
        stub: Any = pb_grpc.DigitClassifierStub(channel)
        stub.Classify(pb.ClassifyRequest(pixels=golden[0].tobytes()), timeout=TIMEOUT)
    samples = samples_of(page_of(port))
    assert value(samples, "workers") == value(samples, "serving") == workers
    assert value(samples, "queue_limit_rows") == 40 * workers
    assert value(samples, "rows_computed_total") == 20
    assert value(samples, "calls_total", method=CLASSIFY, code="OK") == 1
    process.terminate()
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    with pytest.raises(urllib.error.URLError):
        page_of(port)


# The page ------------------------------------------------------------------------


async def test_the_page_parses_in_both_formats_and_every_metric_has_a_help_text(golden: Golden) -> None:
    async with busy_server(golden) as port:
        text = await asyncio.to_thread(page_of, port)
        openmetrics = await asyncio.to_thread(page_of, port, "/metrics?x=1", "application/openmetrics-text")
    families = list(text_string_to_metric_families(text))
    assert {family.name for family in families} == set(metrics.FAMILIES)
    assert all(family.documentation.endswith(".") for family in families)
    assert openmetrics.endswith("# EOF\n")
    parse_openmetrics: Any = openmetrics_parser.text_string_to_metric_families
    assert {family.name for family in parse_openmetrics(openmetrics)} == set(metrics.FAMILIES)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotServe, match=f"metrics cannot be served on 127.0.0.1:{port}: Address already in use"):
            start_metrics_server("127.0.0.1", port)


def test_a_second_metrics_server_does_not_share_the_port() -> None:
    with scraped(registry=CollectorRegistry()) as port, pytest.raises(CannotServe):
        start_metrics_server("127.0.0.1", port)


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(CannotServe, match=r"metrics cannot be kept in .*missing.*: No such file or directory"):
        Metrics(directory=tmp_path / "missing", max_queue_size=1)


def test_only_the_page_is_there() -> None:
    with scraped(registry=CollectorRegistry()) as port:
        for path in ("/", "/metrics/", "/../../etc/passwd"):
            with pytest.raises(urllib.error.HTTPError) as error:
                page_of(port, path)
            assert error.value.code == 404
            error.value.close()


def test_a_scraper_that_says_nothing_holds_up_no_other() -> None:
    with scraped(registry=CollectorRegistry()) as port, socket.create_connection(("127.0.0.1", port)):
        assert page_of(port) == ""


def test_without_prometheus_client_the_server_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ModuleNotFoundError(name='prometheus_client')")
    code = """
from server.errors import CannotServe
from server.metrics import Metrics, start_metrics_server
for step in (lambda: Metrics(max_queue_size=1), lambda: start_metrics_server("127.0.0.1", 0)):
    try:
        step()
    except CannotServe as error:
        print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=True,
    )
    sentence = "prometheus_client is not installed; pip install 'mnist-grpc[server]' brings it"
    assert result.stdout.splitlines() == [sentence, sentence]


def test_a_metrics_server_ends_when_it_is_closed() -> None:
    server, port = start_metrics_server("127.0.0.1", 0, registry=CollectorRegistry())
    assert isinstance(server, MetricsServer)
    server.close()
    again, same = start_metrics_server("127.0.0.1", port, registry=CollectorRegistry())
    assert same == port
    again.close()


# Dashboard and alerts ------------------------------------------------------------


def dashboard_expressions() -> list[str]:
    """Every PromQL expression of the dashboard, with what Grafana puts in for its variables."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    return [
        expression.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$instance", ".*")
        for expression in expressions
    ]


def alert_expressions() -> list[str]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def selectors_of(expression: str) -> list[promql_parser.VectorSelector]:
    """The selectors in an expression, which is checked by being parsed."""
    found: list[promql_parser.VectorSelector] = []

    def visit(part: Any) -> None:
        if isinstance(part, promql_parser.VectorSelector):
            found.append(part)

    promql_parser.walk(promql_parser.parse(expression), visit)
    # None was passed over.
    assert {selector.name for selector in found} == set(re.findall(r"mnist_grpc_\w+", expression))
    return found


@pytest.mark.parametrize("expressions", [dashboard_expressions, alert_expressions])
async def test_every_expression_asks_for_what_a_scrape_has(expressions: Any, golden: Golden) -> None:
    async with busy_server(golden) as port:
        samples = samples_of(await asyncio.to_thread(page_of, port))
    labels: dict[str, set[str]] = {}
    values: dict[tuple[str, str], set[str]] = {}
    for name, pairs in samples:
        labels.setdefault(name, set()).update(label for label, _ in pairs)
        for label, text in pairs:
            values.setdefault((name, label), set()).add(text)
    assert len(expressions()) >= 10
    for expression in expressions():
        for selector in selectors_of(expression):
            assert selector.name in labels, expression
            for matcher in selector.matchers.matchers:
                if matcher.name in ("job", "instance"):  # Prometheus adds them
                    continue
                assert matcher.name in labels[selector.name], expression
                matching = [text for text in values[selector.name, matcher.name] if re.fullmatch(matcher.value, text)]
                assert matching, f"{expression}: nothing is like {matcher.value}"


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {str(selector.name) for expression in dashboard_expressions() for selector in selectors_of(expression)}
    for family in metrics.FAMILIES:
        assert any(re.fullmatch(f"{family}(_total|_bucket|_sum|_count)?", name) for name in shown), family


def test_every_alert_says_what_it_means() -> None:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(names) == len(set(names))
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} == rule["annotations"].keys()
    tested = (ALERTS.parent / "alerts_test.yml").read_text()
    assert [name for name in names if tested.count(name) < 2] == []


needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (of Prometheus) is not here")


@needs_promtool
def test_promtool_finds_the_alerts_sound_and_they_fire_when_they_should() -> None:
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        result = subprocess.run(["promtool", *command], cwd=ALERTS.parent, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


@needs_promtool
async def test_promtool_finds_the_metrics_well_named(golden: Golden) -> None:
    async with busy_server(golden) as port:
        page = await asyncio.to_thread(page_of, port)
    command = ["promtool", "check", "metrics"]
    result = await asyncio.to_thread(subprocess.run, command, input=page, capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
