"""Many calls, some cancelled at random moments: the others are right, nobody hangs, nothing stays behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import grpc

from bench.reliability import loads
from bench.reliability.common import (
    HANG_SECONDS,
    QUEUE_GAUGE,
    STREAMS_GAUGE,
    TRANSPORT,
    BrokenRule,
    Known,
    Report,
    check_back_to_zero,
    check_growth,
    check_health,
    connect,
    known,
    processes,
    serving,
    unexpected,
)

CANCELLED_SHARE = 0.3
STREAM_SHARE = 0.25
CALLERS = 64


def run(
    report: Report, *, calls: int = 30_000, seed: int = 0, memory_limit: float = 0.05, transport: str = TRANSPORT
) -> None:
    """Send the calls; a quarter are streams of ten messages."""
    answers = known()
    # A queue in which all that is in flight has room: a refusal would not be a fault.
    with serving("--max-queue-size", "1000000", transport=transport) as server, processes(1) as pool:
        outcomes: Counter[str] = pool.submit(load, server.target, answers, max(500, calls // 5), seed).result()
        before = server.rss_mb()
        outcomes = pool.submit(load, server.target, answers, calls, seed + 1).result()
        check_back_to_zero(report, server, QUEUE_GAUGE)
        check_back_to_zero(report, server, STREAMS_GAUGE)
        for outcome, count in sorted(outcomes.items()):
            report.row(outcome, f"{count:,}")
        report.require(sum(outcomes.values()) == calls, f"{calls} calls were made, {sum(outcomes.values())} ended")
        report.require(outcomes["unary, cancelled"] > 0 and outcomes["stream, cancelled"] > 0, "some are cancelled")
        check_growth(report, before, server.rss_mb(), memory_limit, "over all calls after a warm-up")
        check_health(report, server)


def load(target: str, answers: Known, calls: int, seed: int) -> Counter[str]:
    """Make the calls; return how many ended how. A process of its own."""
    return asyncio.run(_load(target, answers, calls, seed))


async def _load(target: str, answers: Known, calls: int, seed: int) -> Counter[str]:
    random_ = random.Random(seed)
    outcomes: Counter[str] = Counter()
    numbers = iter(range(calls))

    async with connect(target) as channel:
        stub = loads.stub_of(channel)

        async def caller() -> None:
            for number in numbers:
                cancelled = random_.random() < CANCELLED_SHARE
                cancel_after = random_.choice([0, random_.uniform(0, 0.01), random_.uniform(0, 0.2)])
                is_stream = random_.random() < STREAM_SHARE
                kind = "stream" if is_stream else "unary"
                limits = {"timeout": HANG_SECONDS, "cancel_after": cancel_after if cancelled else None}
                try:
                    if is_stream:
                        counts = [loads.random_size(random_) for _ in range(10)]
                        await loads.stream(stub, answers, number, counts, **limits)  # type: ignore[arg-type]
                    else:
                        count = loads.random_size(random_)
                        await loads.unary(stub, answers, number, count, **limits)  # type: ignore[arg-type]
                    outcomes[f"{kind}, {'answered before it was cancelled' if cancelled else 'answered'}"] += 1
                except asyncio.CancelledError:
                    if not cancelled:
                        raise BrokenRule(f"a {kind} call that nobody cancelled was cancelled") from None
                    outcomes[f"{kind}, cancelled"] += 1
                except grpc.RpcError as error:
                    unexpected(error, f"a {kind} call{' that was cancelled' if cancelled else ''}")

        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(caller())
    return outcomes
