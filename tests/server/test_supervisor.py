"""Several workers at one port: real processes, and what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import client
from digits.checkpoint import load_checkpoint, save_checkpoint
from digits.snapshot import Snapshot, manifest_path
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from protos.mnist.v1 import model_admin_pb2 as admin_pb
from protos.mnist.v1 import model_admin_pb2_grpc as admin_pb_grpc
from server import supervisor
from server.control import Fields, Line
from server.errors import CannotServe
from server.settings import EMBEDDED_WEIGHTS, Settings
from server.supervisor import Supervisor, Worker

Start = Callable[..., tuple[str, subprocess.Popen[str]]]
Golden = tuple[npt.NDArray[np.uint8], list[int]]

ROOT = Path(__file__).parents[2]
TIMEOUT = 60
MANY = 24
"""Connections; that all of them go to the same one of two workers happens once in eight million times."""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A copy of the embedded weights and their manifest."""
    path = tmp_path / "mnist_model.pth"
    shutil.copy(EMBEDDED_WEIGHTS, path)
    shutil.copy(manifest_path(EMBEDDED_WEIGHTS), manifest_path(path))
    return path


def write_variant(path: Path, seed: int) -> str:
    """Replace weights by slightly different ones; return their version."""
    checkpoint = load_checkpoint(EMBEDDED_WEIGHTS)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in checkpoint.network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-4)
    return save_checkpoint(path, checkpoint.network, checkpoint.manifest)[:12]


class Log:
    """What a process writes to stderr, read while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
        self._thread.start()
        # Nothing else may read it now.
        process.stderr = None

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, *words: str, count: int = 1) -> list[str]:
        """Wait until so many lines hold all these words; return them."""

        def found() -> list[str]:
            return [line for line in self.lines if all(word in line for word in words)]

        with self._changed:
            self._changed.wait_for(lambda: len(found()) >= count or self._ended, TIMEOUT)
            assert len(found()) >= count, f"{words} not in\n{''.join(self.lines)}"
            return found()

    def text(self) -> str:
        """All of it, after its end."""
        self._thread.join(TIMEOUT)
        return "".join(self.lines)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


@contextlib.contextmanager
def channels_to(address: str, count: int) -> Iterator[list[grpc.Channel]]:
    """Channels with a connection each: by default, channels of one process share one."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]))
            for _ in range(count)
        ]


def versions_at(channels: Sequence[grpc.Channel]) -> Counter[str]:
    stubs: list[Any] = [pb_grpc.DigitClassifierStub(channel) for channel in channels]
    calls = [stub.GetModel.future(pb.GetModelRequest(), timeout=TIMEOUT) for stub in stubs]
    return Counter(call.result().version for call in calls)


def has_ended(worker: psutil.Process) -> bool:
    """Whether a process has ended or does so now, also if nobody has asked for its exit code yet."""
    try:
        end = os.pidfd_open(worker.pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([end], [], [], TIMEOUT)[0])
    finally:
        os.close(end)


def connections_of(worker: psutil.Process) -> int:
    return sum(each.status == psutil.CONN_ESTABLISHED and bool(each.raddr) for each in worker.net_connections("tcp"))


def end_of(process: subprocess.Popen[str], log: Log) -> tuple[int, str, str]:
    """Wait for the process's end; its exit code, the rest of stdout, and all of stderr."""
    assert process.stdout is not None
    code = process.wait(TIMEOUT)
    return code, process.stdout.read(), log.text()


def check_one_line(err: str, *words: str) -> None:
    """The last line of stderr says it all, and there is no traceback."""
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("mnist-grpc-server: ")
    for word in words:
        assert word in line


def check_taken(start: Start, address: str, *counts: str) -> None:
    """Servers with these numbers of workers cannot have the port."""
    _, port = address.split(":")
    others = [start("--workers", count, "--port", port, wait=False)[1] for count in counts]
    for other in others:
        code, out, err = end_of(other, Log(other))
        assert (code, out) == (1, "")
        check_one_line(err, address, "taken")


class Callers:
    """Threads that classify with the SDK for as long as the `with` lasts; `failures` is to stay empty."""

    def __init__(self, address: str, golden: Golden, count: int = 4) -> None:
        self._address = address
        self._golden = golden
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(count)]
        self.answers = 0
        self.failures: list[Exception] = []

    def _call(self) -> None:
        pixels = self._golden[0].reshape(-1, 28, 28)
        with client.Client(self._address, timeout=TIMEOUT) as digits:
            number = 0
            while not self._end.is_set():
                try:
                    digits.classify(pixels[number % 20])
                except Exception as error:
                    self.failures.append(error)
                number += 1
                self.answers += 1
                self._end.wait(0.01)  # the workers that start need the cores, too

    def wait_for_more(self, count: int = 50) -> None:
        """Until so many further calls have ended."""
        goal = self.answers + count
        while self.answers < goal:
            time.sleep(0.01)

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(TIMEOUT)


# Serving ---------------------------------------------------------------------------


def test_the_supervisor_imports_neither_torch_nor_grpc(tmp_path: Path) -> None:
    code = "import server.cli, server.supervisor, sys; print(sorted({'torch', 'grpc', 'numpy'} & sys.modules.keys()))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT,
    ).stdout
    assert out == "[]\n"


def test_connections_are_spread_over_workers_whose_log_lines_carry_their_numbers(server_process: Start) -> None:
    address, process = server_process("--workers", "2", "--host", "localhost", "--log-format", "json")
    log = Log(process)
    assert address.startswith("localhost:")
    workers = workers_of(process)
    assert len(workers) == 2
    with channels_to(address, MANY) as channels:
        assert sum(versions_at(channels).values()) == MANY
        shares = [connections_of(worker) for worker in workers]
        assert sum(shares) == MANY
        assert min(shares) > 0
        assert connections_of(psutil.Process(process.pid)) == 0
    process.send_signal(signal.SIGTERM)
    code, out, err = end_of(process, log)
    assert (code, out) == (0, ""), "`serving on` is the only line"
    entries = [json.loads(line) for line in err.splitlines()]
    assert {entry["worker"] for entry in entries if "worker" in entry} == {1, 2}
    assert entries[-1]["message"] == "stopped"
    assert all(map(has_ended, workers))


def test_nobody_listens_before_a_model_serves_and_yet_the_port_is_taken(
    server_process: Start, weights: Path, tmp_path: Path
) -> None:
    content = weights.read_bytes()
    weights.unlink()
    os.mkfifo(weights)
    with socket.create_server(("127.0.0.1", 0)) as finder:
        port = finder.getsockname()[1]
    _, process = server_process("--workers", "2", "--port", str(port), "--weights", str(weights), wait=False)
    log = Log(process)
    with weights.open("wb") as file:  # open as soon as the weights are read, for which the workers are then ready
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        check_taken(server_process, f"127.0.0.1:{port}", "1", "2")
        file.write(content)
    assert process.stdout is not None
    assert process.stdout.readline() == f"serving on 127.0.0.1:{port}\n"
    check_taken(server_process, f"127.0.0.1:{port}", "1", "2")
    process.send_signal(signal.SIGTERM)
    assert end_of(process, log)[0] == 0


def test_workers_cannot_have_the_port_of_a_lone_server(server_process: Start) -> None:
    address, _ = server_process("--workers", "1")
    check_taken(server_process, address, "2")


# What cannot be served -------------------------------------------------------------


@pytest.mark.parametrize(("content", "words"), [(None, "cannot be read"), (b"no weights", "state dict")])
def test_weights_that_cannot_be_served_end_all_with_1_and_the_reason(
    content: bytes | None, words: str, server_process: Start, tmp_path: Path
) -> None:
    weights = tmp_path / "mnist_model.pth"
    if content is not None:
        weights.write_bytes(content)
    _, process = server_process("--workers", "2", "--weights", str(weights), wait=False)
    code, out, err = end_of(process, Log(process))  # which waits for all who have stderr open
    assert (code, out) == (1, "")
    check_one_line(err, str(weights), words)


def test_a_worker_that_dies_before_it_serves_ends_all_with_1(server_process: Start, weights: Path) -> None:
    content = weights.read_bytes()
    weights.unlink()
    os.mkfifo(weights)
    _, process = server_process("--workers", "2", "--weights", str(weights), wait=False)
    log = Log(process)
    with weights.open("wb") as file:
        workers_of(process)[1].kill()
        file.write(content)
    code, out, err = end_of(process, log)
    assert (code, out) == (1, "")
    check_one_line(err, "worker", "was killed by SIGKILL before it served")


def test_a_signal_while_the_weights_are_read_ends_all_promptly(server_process: Start, weights: Path) -> None:
    weights.unlink()
    os.mkfifo(weights)
    _, process = server_process("--workers", "2", "--weights", str(weights), wait=False)
    log = Log(process)
    with weights.open("wb"):
        process.send_signal(signal.SIGTERM)
        code, out, err = end_of(process, log)
    assert (code, out) == (0, "")
    assert "Traceback" not in err


# Workers come and go ---------------------------------------------------------------


def test_workers_that_are_killed_or_told_to_end_are_replaced_and_no_call_of_the_sdk_fails(
    server_process: Start, golden: Golden
) -> None:
    address, process = server_process("--workers", "2")
    log = Log(process)
    before = {worker.pid for worker in workers_of(process)}
    with Callers(address, golden) as callers:
        for number, (kind, words) in enumerate(
            [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGTERM, "leaves"), (signal.SIGKILL, "SIGKILL")], 1
        ):
            worker = workers_of(process)[0]
            worker.send_signal(kind)
            log.wait_for(f"(process {worker.pid}) ", words)
            log.wait_for("server.supervisor", ") serves", count=number)
            callers.wait_for_more()
    assert not callers.failures
    workers = workers_of(process)
    assert len(workers) == 2
    assert len({worker.pid for worker in workers} - before) >= 1
    with channels_to(address, MANY) as channels:
        versions_at(channels)
        assert all(connections_of(worker) for worker in workers)


def test_a_worker_that_no_longer_answers_is_killed_and_replaced(server_process: Start) -> None:
    address, process = server_process("--workers", "2", "--stuck-after", "0.1")
    log = Log(process)
    worker = workers_of(process)[0]
    worker.send_signal(signal.SIGSTOP)
    log.wait_for(f"(process {worker.pid})", "has not answered", "is killed")
    log.wait_for("server.supervisor", ") serves")
    with channels_to(address, MANY) as channels:
        assert sum(versions_at(channels).values()) == MANY


def test_without_their_supervisor_workers_drain_and_end(server_process: Start, golden: Golden) -> None:
    address, process = server_process("--workers", "2", "--max-wait-ms", "500")
    log = Log(process)
    workers = workers_of(process)
    with channels_to(address, MANY) as channels:
        versions_at(channels)
        stubs: list[Any] = [pb_grpc.DigitClassifierStub(channel) for channel in channels]
        request = pb.ClassifyRequest(pixels=golden[0].tobytes())
        calls = [stub.Classify.future(request, timeout=TIMEOUT) for stub in stubs]
        versions_at(channels)  # when these are answered, the calls before have arrived
        process.kill()
        assert all(len(call.result().digits) == 20 for call in calls)
    assert process.wait(TIMEOUT) == -signal.SIGKILL
    err = log.text()  # to its end, when the last worker has ended
    assert err.count("the supervisor is gone") == 2
    assert "Traceback" not in err
    assert all(map(has_ended, workers))


# The end of all ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_drains_all_workers(kind: signal.Signals, server_process: Start, golden: Golden) -> None:
    address, process = server_process("--workers", "2", "--max-wait-ms", "700", "--grace", "60")
    log = Log(process)
    with channels_to(address, MANY) as channels:
        versions_at(channels)
        stubs: list[Any] = [pb_grpc.DigitClassifierStub(channel) for channel in channels]
        streams = [stub.StreamClassify(iter([]), timeout=TIMEOUT) for stub in stubs[:4]]
        request = pb.ClassifyRequest(pixels=golden[0].tobytes())
        calls = [stub.Classify.future(request, timeout=TIMEOUT) for stub in stubs]
        versions_at(channels)
        if kind == signal.SIGINT:  # as of a terminal, to every process
            for each in [*workers_of(process), psutil.Process(process.pid)]:
                each.send_signal(kind)
        else:
            process.send_signal(kind)
        assert all(len(call.result().digits) == 20 for call in calls)
        for stream in streams:
            stream.cancel()
    code, out, err = end_of(process, log)
    assert (code, out) == (0, "")
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].endswith("stopped")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_signal_waits_for_no_call(workers: str, server_process: Start) -> None:
    address, process = server_process("--workers", workers, "--max-wait-ms", "60000", "--drain-delay", "600")
    log = Log(process)
    with channels_to(address, MANY) as channels:
        versions_at(channels)
        stubs: list[Any] = [pb_grpc.DigitClassifierStub(channel) for channel in channels]
        calls = [stub.Classify.future(pb.ClassifyRequest(pixels=bytes(784)), timeout=600) for stub in stubs]
        versions_at(channels)
        process.send_signal(signal.SIGTERM)
        log.wait_for("draining 2 workers" if workers == "2" else "told to end")
        process.send_signal(signal.SIGTERM)
        code, out, err = end_of(process, log)
        for call in calls:
            call.exception(timeout=TIMEOUT)  # answered or not, each has ended
    assert (code, out) == (0, "")
    assert "Traceback" not in err


def test_as_the_first_process_of_a_container_it_drains_and_ends_the_dead(tmp_path: Path) -> None:
    """A new process namespace is what a container has; strangers whose parents end become children of process 1."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("process namespaces are not for us here")
    with (
        subprocess.Popen(
            [*unshare, sys.executable, "-m", "server", "--port", "0", "--workers", "2"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as inner,
        contextlib.ExitStack() as cleanup,
    ):
        cleanup.callback(inner.kill)
        log = Log(inner)
        assert inner.stdout is not None
        assert "serving on" in inner.stdout.readline()
        (first,) = psutil.Process(inner.pid).children()
        assert len(first.children()) == 2
        orphan = "import subprocess; print(subprocess.Popen(['true'], stdin=-3, stdout=-3, stderr=-3).pid)"
        subprocess.run(
            ["nsenter", "--pid", "--target", str(first.pid), sys.executable, "-c", orphan],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=TIMEOUT,
        )
        victim = first.children()[0]
        victim.kill()
        log.wait_for("was killed by SIGKILL")
        log.wait_for("server.supervisor", ") serves")
        assert all(each.status() != psutil.STATUS_ZOMBIE for each in first.children())
        assert len(first.children()) == 2
        first.send_signal(signal.SIGTERM)
        code, out, err = end_of(inner, log)
        assert (code, out) == (0, "")
        assert err.strip().splitlines()[-1].endswith("stopped")


# One version -------------------------------------------------------------------------


def test_all_workers_exchange_their_model_or_none_does(server_process: Start, weights: Path) -> None:
    address, process = server_process("--workers", "2", "--weights", str(weights), "--reload-interval", "0", "--admin")
    log = Log(process)
    with channels_to(address, MANY) as channels:
        ((first, _),) = versions_at(channels).items()
        admin: Any = admin_pb_grpc.ModelAdminStub(channels[0])
        new = write_variant(weights, 1)
        assert set(versions_at(channels)) == {first}
        served = admin.Reload(admin_pb.ReloadRequest(), timeout=TIMEOUT)
        assert (served.version, served.previous_version) == (new, first)
        assert set(versions_at(channels)) == {new}
        back = admin.Rollback(admin_pb.RollbackRequest(), timeout=TIMEOUT)
        assert (back.version, back.previous_version) == (first, new)
        assert set(versions_at(channels)) == {first}
        manifest_path(weights).unlink()
        weights.write_bytes(b"rubbish")
        with pytest.raises(grpc.RpcError) as refused:
            admin.Reload(admin_pb.ReloadRequest(), timeout=TIMEOUT)
        error: Any = refused.value
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert str(weights) in error.details()
        assert set(versions_at(channels)) == {first}
        worker = workers_of(process)[1]
        worker.kill()  # the other one comes with the weights that are served, not with those that lie there
        log.wait_for("server.supervisor", ") serves")
    with channels_to(address, MANY) as channels:
        assert set(versions_at(channels)) == {first}
        newest = write_variant(weights, 2)
        process.send_signal(signal.SIGHUP)
        log.wait_for("serves in place of", newest)
        assert set(versions_at(channels)) == {newest}


@pytest.mark.parametrize("victim", [0, 1], ids=["the first to try it", "another one"])
def test_a_worker_that_dies_while_the_model_is_exchanged_comes_back_with_the_new_one(
    victim: int, server_process: Start, weights: Path
) -> None:
    address, process = server_process("--workers", "2", "--weights", str(weights), "--reload-interval", "0")
    log = Log(process)
    worker = workers_of(process)[victim]
    worker.send_signal(signal.SIGSTOP)  # what it is asked for takes until it dies
    new = write_variant(weights, 1)
    process.send_signal(signal.SIGHUP)
    if victim:
        log.wait_for(f"model {new} loaded", "worker=1")
    worker.kill()
    log.wait_for("server.supervisor", ") serves")
    log.wait_for("serves in place of", new)
    with channels_to(address, MANY) as channels:
        assert set(versions_at(channels)) == {new}


class FakeWorkers:
    """Stands for the processes' inside: they hold bytes for a model, take random time, and die at random moments."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.serving: dict[Worker, bytes] = {}
        self.listening: set[Worker] = set()
        self.processes: list[subprocess.Popen[bytes]] = []
        self._lines: dict[Worker, Line] = {}
        self._dead: set[Worker] = set()
        self._changed = asyncio.Event()

    async def some_turns(self) -> None:
        for _ in range(self.random.randrange(8)):
            await asyncio.sleep(0)
        if self.random.random() < 0.5:
            await asyncio.sleep(self.random.random() * 0.01)

    async def spawn(self, keeper: Supervisor, number: int) -> Worker:
        """As `Supervisor._spawn`, with a process that does nothing and a line that is answered here."""
        ours, theirs = socket.socketpair()
        worker: Worker
        prepared: list[bytes] = []

        async def answer(question: str, fields: Fields, blobs: Sequence[bytes]) -> Fields:
            match question:
                case "prepare":
                    await self.some_turns()
                    if blobs[0].startswith((b"bad for all", b"bad for %d" % number)) or (
                        blobs[0].startswith(b"bad for some") and self.random.random() < 0.5
                    ):
                        raise CannotServe("bad weights")
                    if blobs[0].startswith(b"deadly"):
                        self.die(worker)
                        await asyncio.Event().wait()
                    prepared[:] = [blobs[0]]
                    await self.some_turns()
                case "serve":
                    self.serving[worker] = prepared.pop()
                    await self.some_turns()
                case "listen":
                    await self.some_turns()
                    if worker not in self._dead:
                        self.listening.add(worker)
                        self._changed.set()
                case "begin":
                    await self.some_turns()
                case "stop":
                    self.die(worker)
            return {}

        async def nothing(question: str, fields: Fields, blobs: Sequence[bytes]) -> Fields:
            raise AssertionError(question)

        line = await Line.over(theirs, answer)
        worker = Worker(number, self._process(), await Line.over(ours, nothing))
        self._lines[worker] = line
        keeper._workers.add(worker)
        return worker

    def _process(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL)
        self.processes.append(process)
        return process

    def die(self, worker: Worker) -> None:
        self._dead.add(worker)
        self.listening.discard(worker)
        worker.process.kill()
        self._lines[worker]._writer.close()

    async def wait_for(self, count: int) -> None:
        """Until so many listen."""
        while len(self.listening) < count:
            self._changed.clear()
            await self._changed.wait()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("seed", range(8))
async def test_whoever_dies_whenever_all_serve_the_version_of_the_last_exchange(
    seed: int, monkeypatch: pytest.MonkeyPatch, no_stray_errors: None
) -> None:
    """Exchanges, some of them refused, while workers die in every state; the processes are real, their work is not."""
    fakes = FakeWorkers(seed)
    monkeypatch.setattr(Supervisor, "_spawn", lambda keeper, number: fakes.spawn(keeper, number))
    monkeypatch.setattr(supervisor, "PAUSES", (0.0,))
    kinds = [b"good", b"good", b"good", b"bad for all", b"bad for some"]
    contents = iter([b"first", *(b"%s %d" % (fakes.random.choice(kinds), n) for n in range(1000))])
    monkeypatch.setattr("server.deployment.take_snapshot", lambda path: Snapshot(path, next(contents), manifest=None))
    keeper = Supervisor(Settings(grace=0, drain_delay=0), 3)
    ended = False

    async def kill_some() -> None:
        while not ended:
            await asyncio.sleep(fakes.random.random() * 0.02)
            if living := [worker for worker in keeper._workers if worker.lives]:
                fakes.die(fakes.random.choice(living))

    await keeper.start()
    killing = asyncio.create_task(kill_some())
    try:
        outcomes = Counter[str]()
        for _ in range(20):
            try:
                if fakes.random.random() < 0.2:
                    await keeper.deployment.rollback()
                else:
                    await keeper.deployment.reload()
                outcomes["exchanged"] += 1
            except CannotServe:
                outcomes["refused"] += 1
            await asyncio.sleep(fakes.random.random() * 0.01)
        ended = True
        await killing
        assert min(outcomes["exchanged"], outcomes["refused"]) > 0
        await fakes.wait_for(3)
        assert keeper.deployment.current is not None
        assert {fakes.serving[worker] for worker in fakes.listening} == {keeper.deployment.current.weights}
    finally:
        ended = True
        await keeper.stop(asyncio.Event())
        fakes.end()


async def test_what_one_worker_refuses_no_worker_serves(monkeypatch: pytest.MonkeyPatch, no_stray_errors: None) -> None:
    fakes = FakeWorkers(0)
    monkeypatch.setattr(Supervisor, "_spawn", lambda keeper, number: fakes.spawn(keeper, number))
    contents = iter([b"first", b"bad for 2", b"second"])
    monkeypatch.setattr("server.deployment.take_snapshot", lambda path: Snapshot(path, next(contents), manifest=None))
    keeper = Supervisor(Settings(grace=0, drain_delay=0), 3)
    try:
        await keeper.start()
        with pytest.raises(CannotServe, match="bad weights"):
            await keeper.deployment.reload()
        assert [fakes.serving[worker] for worker in keeper._workers] == [b"first"] * 3
        await keeper.deployment.reload()
        assert [fakes.serving[worker] for worker in keeper._workers] == [b"second"] * 3
    finally:
        await keeper.stop(asyncio.Event())
        fakes.end()


async def test_weights_that_kill_a_worker_are_refused_before_they_have_killed_all(
    monkeypatch: pytest.MonkeyPatch, no_stray_errors: None
) -> None:
    fakes = FakeWorkers(0)
    monkeypatch.setattr(Supervisor, "_spawn", lambda keeper, number: fakes.spawn(keeper, number))
    contents = iter([b"first", b"deadly"])
    monkeypatch.setattr("server.deployment.take_snapshot", lambda path: Snapshot(path, next(contents), manifest=None))
    keeper = Supervisor(Settings(grace=0, drain_delay=0), 3)
    try:
        await keeper.start()
        third = next(worker for worker in keeper._workers if worker.number == 3)
        with pytest.raises(CannotServe, match="was killed by SIGKILL when it tried the weights"):
            await keeper.deployment.reload()
        assert third.lives
        await fakes.wait_for(3)
        assert {fakes.serving[worker] for worker in fakes.listening} == {b"first"}
        assert third in fakes.listening
    finally:
        await keeper.stop(asyncio.Event())
        fakes.end()


# Metrics -----------------------------------------------------------------------------


def test_the_supervisor_tells_what_all_workers_counted_also_the_dead(server_process: Start, weights: Path) -> None:
    address, process = server_process(
        "--workers", "2", "--metrics-port", "0", "--weights", str(weights), "--reload-interval", "0"
    )
    log = Log(process)
    page = log.wait_for("metrics on http://")[0].split()[-1]

    def samples() -> dict[str, float]:
        """The metrics without labels, and calls by method and code."""
        with urllib.request.urlopen(page, timeout=TIMEOUT) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in families
            for sample in family.samples
        }

    calls = "mnist_grpc_calls_total OK mnist.v1.DigitClassifier/Classify"
    with channels_to(address, MANY) as channels:
        stubs: list[Any] = [pb_grpc.DigitClassifierStub(channel) for channel in channels]
        for stub in stubs:
            stub.Classify(pb.ClassifyRequest(pixels=bytes(784)), timeout=TIMEOUT)
        first = samples()
        assert first[calls] == first["mnist_grpc_rows_computed_total"] == MANY
        assert (first["mnist_grpc_workers"], first["mnist_grpc_serving"]) == (2, 2)
        assert first["mnist_grpc_worker_restarts_total"] == 0
    workers_of(process)[0].kill()
    log.wait_for("server.supervisor", ") serves")
    new = write_variant(weights, 1)
    process.send_signal(signal.SIGHUP)
    log.wait_for("serves in place of", new)
    with channels_to(address, 1) as (channel,):
        stub = pb_grpc.DigitClassifierStub(channel)
        stub.Classify(pb.ClassifyRequest(pixels=bytes(784)), timeout=TIMEOUT)
    second = samples()
    assert second[calls] == MANY + 1
    assert (second["mnist_grpc_workers"], second["mnist_grpc_serving"]) == (2, 2)
    assert second["mnist_grpc_worker_restarts_total"] == 1
    assert second["mnist_grpc_reloads_total served"] == 1
    assert second[f"mnist_grpc_model_info {new}"] == 1
    process.send_signal(signal.SIGTERM)
    assert end_of(process, log)[0] == 0
