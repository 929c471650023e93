"""Several worker processes behind one port: balance, a worker that is killed, metrics that add up."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from pathlib import Path

import grpc
import psutil

from bench.reliability import loads, sdk
from bench.reliability.common import (
    HANG_SECONDS,
    TRANSPORT,
    BrokenRule,
    Known,
    Report,
    Server,
    check_health,
    connect,
    known,
    processes,
    serving,
    wait_for_file,
)

CONNECTIONS = (8, 32, 128)
CALLS_EACH = 4
SERVING_GAUGE = "mnist_grpc_serving"
CALLS = 'mnist_grpc_calls_total{code="OK",method="mnist.v1.DigitClassifier/Classify"}'


def run(report: Report, *, workers: int = 2, kills: int = 5, rounds: int = 5, transport: str = TRANSPORT) -> None:
    """Measure the balance `rounds` times for each number of connections; kill a worker so often."""
    answers = known()
    with (
        serving("--workers", str(workers), "--log-level", "error", transport=transport) as server,
        processes(2) as pool,
    ):
        _wait_for_workers(server, workers, set())
        made = 0
        for connections in CONNECTIONS:
            shares = []
            for _ in range(rounds):
                with tempfile.TemporaryDirectory() as folder:
                    done = Path(folder) / "done"
                    holding = pool.submit(hold, server.target, answers, connections, str(done))
                    made += connections * CALLS_EACH
                    _wait_for_calls(server, made)
                    counts = [_connections(pid, server.target) for pid in _listening(server)]
                    done.touch()
                    holding.result()
                shares.append(max(counts) / connections)
                report.require(sum(counts) == connections, f"{connections} connections are open, here {counts}")
            report.row(
                f"{connections} connections: share of the busiest worker, median / max",
                f"{sorted(shares)[len(shares) // 2]:.2f} / {max(shares):.2f}",
                f"{1 / workers:.2f} is even",
            )
        report.row("calls counted over all workers", f"{made:,} of {made:,}")
        _kill(report, server, workers, kills)
        counted = server.metrics().get("mnist_grpc_worker_restarts_total")
        report.require(counted == kills, f"{kills} workers were killed, the metric says {counted}")
        check_health(report, server)


def _kill(report: Report, server: Server, workers: int, kills: int) -> None:
    golden = sdk.golden()
    with tempfile.TemporaryDirectory() as folder, processes(2) as pool:
        done = Path(folder) / "done"
        futures = [
            pool.submit(sdk.load_async, server.target, golden, 4, 2, str(done)),
            pool.submit(sdk.load_sync, server.target, golden, 4, 1, str(done)),
        ]
        back = []
        for _ in range(kills):
            time.sleep(1)
            before = set(_listening(server))
            victim = max(before, key=lambda pid: _connections(pid, server.target))
            start = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            _wait_for_workers(server, workers, {victim})
            back.append(time.monotonic() - start)
        time.sleep(1)
        done.touch()
        outcome = sdk.Outcome()
        for future in futures:
            outcome.add(future.result())
    report.row("workers killed under load", kills)
    report.row("  back after, max", f"{max(back):.1f} s")
    report.row("  right answers / failed calls", f"{outcome.calls:,} / {outcome.failed:,}")
    report.row("  slowest call", f"{outcome.slowest_seconds * 1e3:.0f} ms")
    report.require(outcome.failed == 0, f"{outcome.failed} calls failed: {outcome.reasons()}")


def _listening(server: Server) -> list[int]:
    """The processes that accept connections at the server's port."""
    port = int(server.target.rsplit(":", 1)[1])
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in child.net_connections("inet")):
                found.append(child.pid)
        except psutil.NoSuchProcess:
            pass
    return found


def _connections(pid: int, target: str) -> int:
    port = int(target.rsplit(":", 1)[1])
    connections = psutil.Process(pid).net_connections("inet")
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in connections)


def _wait_for_workers(server: Server, workers: int, gone: set[int]) -> None:
    end = time.monotonic() + HANG_SECONDS
    while time.monotonic() < end:
        listening = set(_listening(server))
        if len(listening) == workers and not listening & gone and server.gauge(SERVING_GAUGE) == workers:
            return
        time.sleep(0.02)
    raise BrokenRule(f"{workers} workers serve, here {_listening(server)}")


def _wait_for_calls(server: Server, calls: int) -> None:
    end = time.monotonic() + HANG_SECONDS
    while (counted := server.metrics().get(CALLS, 0)) != calls:
        if time.monotonic() > end:
            raise BrokenRule(f"{calls} calls were answered, the metrics of all workers count {counted:g}")
        time.sleep(0.02)


def hold(target: str, answers: Known, connections: int, done: str) -> None:
    """Open connections, make some calls on each, keep them open until a file appears."""

    async def open_all() -> None:
        channels = [connect(target) for _ in range(connections)]
        try:
            async with asyncio.TaskGroup() as group:
                for number, channel in enumerate(channels):
                    group.create_task(_calls(channel, answers, number))
            await asyncio.to_thread(wait_for_file, done)
        finally:
            for channel in channels:
                await channel.close()

    asyncio.run(open_all())


async def _calls(channel: grpc.aio.Channel, answers: Known, number: int) -> None:
    for _ in range(CALLS_EACH):
        await loads.unary(loads.stub_of(channel), answers, number, 1, timeout=HANG_SECONDS)
