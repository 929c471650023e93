"""What batching costs a lone caller and gives many, what an idle server uses, and small calls beside large ones.

Beside each figure of ours stands that of a server that does nothing, or of the
same server without the disturbance, measured in turn in the same run.
"""

from __future__ import annotations

import asyncio
import statistics
import time

from bench.processes import generator
from bench.processes import server as bench_server
from bench.reliability import loads
from bench.reliability.common import (
    HANG_SECONDS,
    TRANSPORT,
    Known,
    Latencies,
    Report,
    check_health,
    connect,
    known,
    processes,
    serving,
)
from bench.rounds import in_turn

LONE, MANY = "unary @1", "unary @64"
BULK_CALLERS, BULK_IMAGES = 4, 1024
IDLE_SETTLE_SECONDS = 2.0
ROWS, BATCHES = "mnist_grpc_rows_computed_total", "mnist_grpc_batches_total"


def run(
    report: Report, *, rounds: int = 7, seconds: float = 3.0, idle_seconds: float = 10.0, transport: str = TRANSPORT
) -> None:
    """Measure in rounds of `seconds` a figure; the servers take turns in going first."""
    answers = known()
    (logits,) = answers.logits.values()
    digits = logits.argmax(axis=1).tolist()
    with serving(transport=transport) as ours, bench_server("bench.noop_server") as noop, generator() as load:
        ratios = []
        medians: dict[str, list[float]] = {ours.target: [], noop.target: []}
        for number in range(rounds):
            turns = [(ours.target, digits), (noop.target, None)]
            for target, expected in in_turn(turns, number):
                answer = load.measure(target=target, scenario=LONE, seconds=seconds, digits=expected)
                medians[target].append(answer["p50_us"])
            ratios.append(medians[ours.target][-1] / medians[noop.target][-1])
        report.row("single image, 1 caller: p50, ours", f"{statistics.median(medians[ours.target]):.0f} us")
        report.row("  a server that does nothing", f"{statistics.median(medians[noop.target]):.0f} us")
        report.row("  ratio, median", f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}")

        rows: list[float] = []
        for _ in range(rounds):
            before = ours.metrics()
            load.measure(target=ours.target, scenario=MANY, seconds=seconds, digits=digits)
            after = ours.metrics()
            computed, batches = (
                after[name] - before[name] for name in ("mnist_grpc_rows_computed_total", "mnist_grpc_batches_total")
            )
            rows.append(computed / batches)
        report.row(
            "64 callers: images in a batch, mean",
            f"{statistics.median(rows):.1f}",
            f"{min(rows):.1f} to {max(rows):.1f}",
        )

        time.sleep(IDLE_SETTLE_SECONDS)
        before_cpu = ours.cpu_seconds()
        time.sleep(idle_seconds)
        report.row("an idle server's share of a core", f"{(ours.cpu_seconds() - before_cpu) / idle_seconds:.2%}")
        check_health(report, ours)
    with serving(transport=transport) as ours, processes(2) as pool:
        alone, beside = [], []
        for _ in range(rounds):
            alone.append(pool.submit(single, ours.target, answers, seconds).result())
            bulk_load = pool.submit(bulk, ours.target, answers, seconds + 1)
            beside.append(pool.submit(single, ours.target, answers, seconds).result())
            images = bulk_load.result()
        p99 = [statistics.median(Latencies(one).p(99) for one in found) * 1e3 for found in (alone, beside)]
        report.row("single image, 1 caller: p99", f"{p99[0]:.2f} ms")
        report.row(
            f"  beside {BULK_CALLERS} callers of {BULK_IMAGES:,} images each",
            f"{p99[1]:.2f} ms",
            f"x{p99[1] / p99[0]:.2f}",
        )
        report.row("  images/s of those", f"{images:,.0f}")
        check_health(report, ours)


def single(target: str, answers: Known, seconds: float) -> list[float]:
    """One caller of single images for so long; return how long each call took."""

    async def calls() -> list[float]:
        latencies: list[float] = []
        async with connect(target) as channel:
            stub = loads.stub_of(channel)
            await channel.channel_ready()
            end = time.monotonic() + seconds
            while (start := time.monotonic()) < end:
                await loads.unary(stub, answers, len(latencies), 1, timeout=HANG_SECONDS)
                latencies.append(time.monotonic() - start)
        return latencies

    return asyncio.run(calls())


def bulk(target: str, answers: Known, seconds: float) -> float:
    """Callers of large requests for so long; return images a second."""

    async def calls() -> float:
        done = 0
        start = time.monotonic()

        async def caller(number: int) -> None:
            nonlocal done
            while time.monotonic() < start + seconds:
                await loads.unary(stub, answers, number, BULK_IMAGES, timeout=HANG_SECONDS)
                done += BULK_IMAGES

        async with connect(target) as channel:
            stub = loads.stub_of(channel)
            async with asyncio.TaskGroup() as group:
                for number in range(BULK_CALLERS):
                    group.create_task(caller(number))
        return done / (time.monotonic() - start)

    return asyncio.run(calls())
