"""Two servers that are restarted in turn under load of the SDK: no call fails. And how soon a drained server ends."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import grpc

from bench.reliability import loads, sdk
from bench.reliability.common import (
    HANG_SECONDS,
    TRANSPORT,
    Latencies,
    Report,
    Server,
    check_health,
    connect,
    free_port,
    processes,
    serving,
)
from bench.reliability.stall import stall_image
from protos.mnist.v1 import digit_classifier_pb2 as pb

PAUSE_SECONDS = 0.5
"""Between two restarts."""
STALL_SECONDS = 1.5


def run(report: Report, *, calls: int = 20_000, restarts: int = 8, transport: str = TRANSPORT) -> None:
    """Restart so often, and at least until so many calls were made."""
    _exit_time(report, transport)
    answers = sdk.golden()
    ports = [free_port(), free_port()]
    target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack, processes(2) as pool:
        done = Path(folder) / "done"
        # Each in a stack of its own, as it ends when it is restarted.
        places = [contextlib.ExitStack(), contextlib.ExitStack()]
        servers = [
            place.enter_context(serving(port=port, transport=transport))
            for place, port in zip(places, ports, strict=True)
        ]
        for place in places:
            stack.callback(place.close)
        futures: list[Future[sdk.Outcome]] = [
            pool.submit(sdk.load_async, target, answers, 3, 4, str(done)),
            pool.submit(sdk.load_sync, target, answers, 3, 2, str(done)),
        ]
        exits = []
        number = served = 0
        while number < restarts or served + _answered(servers) < calls:
            time.sleep(PAUSE_SECONDS)
            which = number % 2
            served += int(_answered([servers[which]]))
            exits.append(servers[which].stop())
            report.require(servers[which].process.returncode == 0, "a drained server ends with exit code 0")
            check_health(report, servers[which], alive=False)
            places[which].close()
            servers[which] = places[which].enter_context(serving(port=ports[which], transport=transport))
            number += 1
            if any(future.done() for future in futures):
                break
        time.sleep(PAUSE_SECONDS)
        done.touch()
        outcome = sdk.Outcome()
        for future in futures:
            outcome.add(future.result())
        report.row("restarts under load", number)
        report.row("right answers / failed calls", f"{outcome.calls:,} / {outcome.failed:,}")
        report.row("slowest call", f"{outcome.slowest_seconds * 1e3:.0f} ms")
        report.row("SIGTERM to exit under load, p50 / max", f"{Latencies(exits).at(50)} / {Latencies(exits).at(100)}")
        report.require(
            outcome.failed == 0, f"{outcome.failed} calls failed: {' | '.join(sorted(set(outcome.complaints)))}"
        )
        report.require(outcome.calls >= calls, f"{calls} calls were to be made, {outcome.calls} were")


def _answered(servers: list[Server]) -> float:
    label = "mnist_grpc_calls_total"
    return sum(server.gauge(label) for server in servers)


def _exit_time(report: Report, transport: str, rounds: int = 3) -> None:
    """How soon a server ends: after the last call that it answered, and with a call that is being computed."""
    after = []
    for _ in range(rounds):
        with serving(transport=transport) as server, processes(1) as pool:
            refused = pool.submit(call_until_refused, server.target)
            time.sleep(PAUSE_SECONDS)
            server.stop()
            after.append(time.monotonic() - refused.result())
            check_health(report, server, alive=False)
    report.row("exit after the last answer, p50 / max", f"{Latencies(after).at(50)} / {Latencies(after).at(100)}")
    with serving(module="bench.reliability.stalling_server", transport=transport) as server, processes(1) as pool:
        answer = pool.submit(call_stalled, server.target)
        server.next_line()  # it stalls
        server.stop()
        ended = time.monotonic()
        report.require(answer.result() < ended, "an accepted call is answered before the server ends")
        check_health(report, server, alive=False)


def call_until_refused(target: str) -> float:
    """Call again and again; return when the last answer came."""

    async def calls() -> float:
        answered = 0.0
        async with connect(target) as channel:
            stub = loads.stub_of(channel)
            while True:
                try:
                    await stub.GetModel(pb.GetModelRequest(), timeout=HANG_SECONDS)
                except grpc.RpcError:
                    return answered
                answered = time.monotonic()

    return asyncio.run(calls())


def call_stalled(target: str) -> float:
    """Stall the model; return when that was answered."""

    async def stalled() -> float:
        async with connect(target) as channel:
            request = pb.ClassifyRequest(pixels=64 * stall_image(STALL_SECONDS))
            await loads.stub_of(channel).Classify(request, timeout=HANG_SECONDS)
            return time.monotonic()

    return asyncio.run(stalled())
