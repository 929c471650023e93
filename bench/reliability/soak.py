"""A million calls through every door, with cancellations, new weights and restarts between them.

Two servers have the same weights file. One runs from beginning to end, and its
memory has to stay where it is; the other is told to end again and again, as an
operator does it, and comes back. Most calls are made over bare connections
(`bench.reliability.bulk`), some by Python's gRPC, and some by the SDK.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path

import grpc

from bench.reliability import bulk, loads, sdk
from bench.reliability.bulk import Tally
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
)
from bench.reliability.reload import install, make_weights, wait_for_version
from bench.reliability.resume import Fleet
from protos.inference import grpc_inference_service_pb2_grpc as oip_grpc
from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.golden import golden_digits

VERSIONS = 20
"""Weights that take turns."""
GRPC_SHARE = 0.05
"""Of the calls, by Python's gRPC. What the SDK makes meanwhile comes on top."""
CALLERS = 16
SIZES = (1, 1, 1, 2, 8, 32, 64, 300)
CANCELLED_SHARE = 0.1
SDK_CLIENTS, SDK_TASKS = 1, 2
STEADY, RESTARTED = 0, 1


def run(
    report: Report,
    *,
    calls: int = 1_000_000,
    parts: int = 20,
    seed: int = 0,
    memory_limit: float = 0.05,
    transport: str = TRANSPORT,
) -> None:
    """Make so many calls in so many parts; in each of them, new weights come and a server is restarted."""
    with tempfile.TemporaryDirectory() as folder:
        weights = make_weights(Path(folder) / "weights", min(VERSIONS, parts + 1), seed)
        answers, golden = known(weights), known(weights, golden_digits()[0])
        versions = list(answers.logits)
        served = Path(folder) / "served" / "mnist_model.pth"
        install(weights[0], served)
        # A queue in which all that is in flight has room: a refusal would not be a fault.
        flags = ("--weights", str(served), "--reload-interval", "0.2", "--max-queue-size", "1000000")
        with Fleet(report, transport, *flags) as fleet, processes(3) as pool:
            fleet.add()
            fleet.add()
            steady = fleet.servers[STEADY]
            total, memory = Tally(), []
            start = time.monotonic()
            for part in range(parts):
                done = Path(folder) / f"done {part}"
                by_grpc = int(calls / parts * GRPC_SHARE)
                in_bulk = -(-calls // parts) - by_grpc
                targets = [server.target for server in fleet.servers]
                attacks = [
                    pool.submit(bulk.load, targets, answers, in_bulk, seed + part, str(done), transport),
                    pool.submit(load, steady.target, answers, by_grpc, seed + part),
                ]
                users = pool.submit(sdk.load_async, fleet.target, golden, SDK_CLIENTS, SDK_TASKS, str(done))
                latest = (part + 1) % len(weights)
                install(weights[latest], served)
                for server in fleet.servers:
                    wait_for_version(server, versions[latest])
                lived_mb = fleet.servers[RESTARTED].rss_mb()
                fleet.restart(RESTARTED, kill=False)
                done.touch()
                for attack in attacks:
                    total.add(attack.result())
                total.add(_tally_of(users.result()))
                memory.append(steady.rss_mb())
                report.row(
                    f"after {total.calls:,} calls, {time.monotonic() - start:.0f} s",
                    f"{memory[-1]:.0f} MB",
                    f"wrong {total.wrong}, lost {total.lost}; the restarted server ended at {lived_mb:.0f} MB",
                )
            for outcome, count in sorted(total.ended.items()):
                report.row(outcome, f"{count:,}")
            report.row("calls / their images", f"{total.calls:,} / {total.images:,}")
            for reason, count in sorted(total.again.items()):
                report.row(f"  made again: {reason} by a server that drained", f"{count:,}")
            report.row("  wrong / lost", f"{total.wrong} / {total.lost}")
            report.row("new weights / restarts", f"{parts} / {parts}")
            report.require(total.wrong == total.lost == 0, " | ".join(total.complaints))
            report.require(total.calls >= calls, f"{calls:,} calls were to be made, {total.calls:,} were")
            check_growth(report, memory[0], max(memory[-3:]), memory_limit, f"after the first of {parts} parts")
            for server in fleet.servers:
                check_back_to_zero(report, server, QUEUE_GAUGE)
                check_back_to_zero(report, server, STREAMS_GAUGE)
                check_health(report, server)


def _tally_of(outcome: sdk.Outcome) -> Tally:
    tally = Tally(images=outcome.calls, lost=outcome.failed, complaints=outcome.complaints)
    tally.ended["SDK, right answers"] = outcome.calls
    return tally


def load(target: str, answers: Known, calls: int, seed: int) -> Tally:
    """Make so many calls by Python's gRPC."""
    return asyncio.run(_load(target, answers, calls, seed))


async def _load(target: str, answers: Known, calls: int, seed: int) -> Tally:
    random_ = random.Random(seed)
    tally = Tally()
    numbers = iter(range(calls))

    async def unary(count: int, cancel_after: float | None) -> None:
        await loads.unary(stub, answers, random_.randrange(256), count, timeout=HANG_SECONDS, cancel_after=cancel_after)

    async def stream(count: int, cancel_after: float | None) -> None:
        counts = [count] * 4
        start = random_.randrange(256)
        await loads.stream(stub, answers, start, counts, timeout=HANG_SECONDS, cancel_after=cancel_after)

    async def infer(count: int, cancel_after: float | None) -> None:
        start = random_.randrange(256)
        await loads.infer(inference, answers, start, count, timeout=HANG_SECONDS, cancel_after=cancel_after)

    async def files(count: int, cancel_after: float | None) -> None:
        """As PNG files, whose answers are not known beforehand; there are as many as files."""
        images = [loads.png(answers, random_.randrange(256)) for _ in range(min(count, 8))]
        call = stub.Classify(pb.ClassifyRequest(encoded=pb.EncodedImages(files=images)), timeout=HANG_SECONDS)
        if cancel_after is not None:
            asyncio.get_running_loop().call_later(cancel_after, call.cancel)
        if len((await call).digits) != len(images):
            raise BrokenRule("files were answered with another number of digits")

    kinds = {"Classify": unary, "StreamClassify": stream, "ModelInfer": infer, "Classify with files": files}

    async def caller() -> None:
        for _ in numbers:
            kind = random_.choice(list(kinds))
            name = f"{kind} by grpc.aio"
            count = random_.choice(SIZES)
            cancelled = random_.random() < CANCELLED_SHARE
            cancel_after = random_.choice([0, random_.uniform(0, 0.05)]) if cancelled else None
            try:
                await kinds[kind](count, cancel_after)
                tally.ended[f"{name}, right answers"] += 1
                tally.images += {"StreamClassify": 4 * count, "Classify with files": min(count, 8)}.get(kind, count)
            except BrokenRule as error:
                tally.note_wrong(f"{name}: {error}")
            except asyncio.CancelledError:
                if not cancelled:
                    raise BrokenRule(f"a {name} call that nobody cancelled was cancelled") from None
                tally.ended[f"{name}, cancelled"] += 1
            except grpc.RpcError as error:
                if cancelled and error.code() is grpc.StatusCode.CANCELLED:
                    tally.ended[f"{name}, cancelled"] += 1
                else:
                    tally.note_lost(f"{name}: {error.code().name}: {error.details()}")

    async with connect(target) as channel:
        stub = loads.stub_of(channel)
        inference = oip_grpc.GRPCInferenceServiceStub(channel)
        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(caller())
    return tally
