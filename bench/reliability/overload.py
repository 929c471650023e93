"""Three times the load that the server can do: what is refused is refused at once, what is accepted is answered.

Capacity is measured in a closed loop. Then calls are sent at times that were
set beforehand, whatever the answers do, and latencies count from those times:
a server that falls behind cannot slow down who measures it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from bench.reliability import loads
from bench.reliability.common import (
    HANG_SECONDS,
    QUEUE_GAUGE,
    BrokenRule,
    Known,
    Latencies,
    Report,
    check_back_to_zero,
    check_health,
    connect,
    known,
    processes,
    serving,
    unexpected,
)

OVERLOAD = 3.0
GENERATORS = 2
HEALTH_INTERVAL = 0.05
LOADS = {"256 images": (256, 16), "64 images": (64, 32), "single images": (1, 64)}
"""Images in a call, and calls at a time when capacity is measured: enough to keep the server busy."""


@dataclass
class Flood:
    """What became of calls that were sent whether the server was ready for them or not."""

    accepted: list[float] = field(default_factory=list)
    """Seconds from the time at which the call was meant to be sent to the answer."""
    refused: list[float] = field(default_factory=list)
    """The same to the refusal."""
    cut: Counter[str] = field(default_factory=Counter)
    """By code: calls that gRPC itself ended, as it does when too many wait to be taken in at all."""
    behind: list[float] = field(default_factory=list)
    """How much later than meant the calls were sent: the generator's own delay."""
    in_time: int = 0
    """Calls answered while the flood lasted."""


@dataclass
class Checks:
    """Of health, while all this went on."""

    latencies: list[float] = field(default_factory=list)
    """Seconds, of those that were answered."""
    refused: int = 0
    reason: str = ""


def run(report: Report, *, seconds: float = 10.0, images: int = 0) -> None:
    """Measure capacity, then overload, for `seconds` each and each kind of call; or for calls of so many images."""
    answers = known()
    with serving() as server, processes(GENERATORS + 1) as pool:
        for name, (count, callers) in LOADS.items():
            if images not in (0, count):
                continue
            tasks = [pool.submit(capacity, server.target, answers, count, callers, seconds) for _ in range(GENERATORS)]
            rate = sum(task.result() for task in tasks)
            per_generator = OVERLOAD * rate / GENERATORS
            begin = time.monotonic() + 0.5
            checks = pool.submit(health, server.target, begin, seconds)
            tasks_ = [
                pool.submit(flood, server.target, answers, count, per_generator, begin, seconds, seed)
                for seed in range(GENERATORS)
            ]
            floods = [task.result() for task in tasks_]
            accepted = Latencies([latency for one in floods for latency in one.accepted])
            refused = Latencies([latency for one in floods for latency in one.refused])
            behind = Latencies([latency for one in floods for latency in one.behind])
            goodput = sum(one.in_time for one in floods) / seconds
            healthy = Latencies(checks.result().latencies)
            refused_checks, reason = checks.result().refused, checks.result().reason
            report.require(refused_checks == 0, f"{name}: {refused_checks} health checks failed: {reason}")
            report.row(f"{name}: capacity", f"{rate:,.0f} calls/s")
            report.row(
                f"  sent at {OVERLOAD:g} times that: accepted / refused",
                f"{len(accepted.seconds):,} / {len(refused.seconds):,}",
            )
            report.row("  goodput / capacity", f"{goodput / rate:.2f}")
            report.row("  time to refusal, p50 / p99", f"{refused.at(50)} / {refused.at(99)}")
            report.row("  accepted, p50 / p99", f"{accepted.at(50)} / {accepted.at(99)}")
            report.row(
                "  health check, p99 / max", f"{healthy.at(99)} / {healthy.at(100)}", f"{len(healthy.seconds)} checks"
            )
            report.row("  the generators' own delay, p50 / p99", f"{behind.at(50)} / {behind.at(99)}")
            report.require(len(accepted.seconds) > 0, f"{name}: some calls are accepted")
            check_back_to_zero(report, server, QUEUE_GAUGE)
        check_health(report, server)


def capacity(target: str, answers: Known, count: int, callers: int, seconds: float) -> float:
    """So many callers, each with one call at a time, for so long; return calls a second."""

    async def measure() -> float:
        done = 0
        start = time.monotonic()

        async def caller() -> None:
            nonlocal done
            while time.monotonic() < start + seconds:
                await loads.unary(stub, answers, done, count, timeout=HANG_SECONDS)
                done += 1

        async with connect(target) as channel:
            stub = loads.stub_of(channel)
            async with asyncio.TaskGroup() as group:
                for _ in range(callers):
                    group.create_task(caller())
        return done / (time.monotonic() - start)

    return asyncio.run(measure())


def flood(target: str, answers: Known, count: int, rate: float, begin: float, seconds: float, seed: int) -> Flood:
    """From `begin` on the machine's clock, send calls at random times, `rate` a second on average."""
    return asyncio.run(_flood(target, answers, count, rate, begin, seconds, seed))


async def _flood(
    target: str, answers: Known, count: int, rate: float, begin: float, seconds: float, seed: int
) -> Flood:
    random_ = random.Random(seed)
    outcome = Flood()
    end = begin + seconds
    async with connect(target) as channel, asyncio.TaskGroup() as group:
        stub = loads.stub_of(channel)
        await channel.channel_ready()

        async def call(number: int, meant: float) -> None:
            outcome.behind.append(time.monotonic() - meant)
            try:
                await loads.unary(stub, answers, number, count, timeout=HANG_SECONDS)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.CANCELLED or "RST_STREAM" in (error.details() or ""):
                    outcome.cut[error.code().name] += 1
                    return
                outcome.refused.append(time.monotonic() - meant)
                _check_refusal(error)
            else:
                now = time.monotonic()
                outcome.accepted.append(now - meant)
                outcome.in_time += now < end

        meant = begin
        number = 0
        while (meant := meant + random_.expovariate(rate)) < end:
            if (wait := meant - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            group.create_task(call(number, meant))
            number += 1
            if number % 16 == 0:
                await asyncio.sleep(0)  # also when late, or nothing would be sent
    return outcome


def _check_refusal(error: grpc.RpcError) -> None:
    """Raise BrokenRule unless this is an overload that says when to come again."""
    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        unexpected(error, "a call in a flood")
    trailing: Any = error.trailing_metadata() or ()  # pairs, whatever its type says
    metadata = dict(trailing)
    if int(metadata.get("grpc-retry-pushback-ms", 0)) <= 0:
        raise BrokenRule("a refusal has no grpc-retry-pushback-ms")
    status = status_pb2.Status.FromString(metadata.get("grpc-status-details-bin", b""))
    info = error_details_pb2.RetryInfo()
    if not any(detail.Unpack(info) for detail in status.details) or info.retry_delay.ToNanoseconds() <= 0:
        raise BrokenRule("a refusal has no RetryInfo")


def health(target: str, begin: float, seconds: float) -> Checks:
    """Ask for health all the while, on a connection of its own."""
    checks = Checks()
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        while (start := time.monotonic()) < begin + seconds:
            try:
                response = check(health_pb2.HealthCheckRequest(), timeout=HANG_SECONDS)
            except grpc.RpcError as error:
                checks.refused += 1
                checks.reason = f"{error.code().name}: {error.details()}"
                time.sleep(HEALTH_INTERVAL)
                continue
            if start >= begin:
                checks.latencies.append(time.monotonic() - start)
            if response.status != health_pb2.HealthCheckResponse.SERVING:
                raise BrokenRule("health says NOT_SERVING of a server that is merely busy")
            time.sleep(HEALTH_INTERVAL)
    return checks
