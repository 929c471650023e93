"""A million images through every door, with cancellations and new weights between them: memory stays where it is."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import grpc

from bench.reliability import loads
from bench.reliability.common import (
    HANG_SECONDS,
    QUEUE_GAUGE,
    STREAMS_GAUGE,
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
from bench.reliability.reload import install, make_weights, wait_for_version
from protos.inference import grpc_inference_service_pb2_grpc as oip_grpc
from protos.mnist.v1 import digit_classifier_pb2 as pb

CALLERS = 16
VERSIONS = 20
"""Weights that take turns."""
CANCELLED_SHARE = 0.1
SIZES = (1, 1, 1, 2, 8, 32, 64, 300)
PARTS = 20


def run(report: Report, *, images: int = 1_000_000, seed: int = 0, memory_limit: float = 0.05) -> None:
    """Send so many images; new weights at every twentieth part of them."""
    with tempfile.TemporaryDirectory() as folder:
        weights = make_weights(Path(folder) / "weights", VERSIONS, seed)
        answers = known(weights)
        versions = list(answers.logits)
        served = Path(folder) / "served" / "mnist_model.pth"
        install(weights[0], served)
        with (
            # A queue in which all that is in flight has room: a refusal would not be a fault.
            serving("--weights", str(served), "--reload-interval", "0.2", "--max-queue-size", "1000000") as server,
            processes(1) as pool,
        ):
            outcomes: Counter[str] = Counter()
            memory = []
            start = time.monotonic()
            for part in range(PARTS):
                attack = pool.submit(load, server.target, answers, images // PARTS, seed + part)
                install(weights[(part + 1) % VERSIONS], served)
                wait_for_version(server, versions[(part + 1) % VERSIONS])
                outcomes += attack.result()
                memory.append(server.rss_mb())
                report.row(
                    f"after {outcomes['images']:,} images, {time.monotonic() - start:.0f} s", f"{memory[-1]:.0f} MB"
                )
            for outcome, count in sorted(outcomes.items()):
                report.row(outcome, f"{count:,}")
            check_growth(
                report, memory[0], max(memory[-3:]), memory_limit, f"after the first {images // PARTS:,} images"
            )
            check_back_to_zero(report, server, QUEUE_GAUGE)
            check_back_to_zero(report, server, STREAMS_GAUGE)
            check_health(report, server)


def load(target: str, answers: Known, images: int, seed: int) -> Counter[str]:
    """Send so many images; return how many calls of which kind ended how, and the images."""
    return asyncio.run(_load(target, answers, images, seed))


async def _load(target: str, answers: Known, images: int, seed: int) -> Counter[str]:
    random_ = random.Random(seed)
    outcomes: Counter[str] = Counter()

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
        while outcomes["images"] < images:
            name = random_.choice(list(kinds))
            count = random_.choice(SIZES)
            cancelled = random_.random() < CANCELLED_SHARE
            cancel_after = random_.choice([0, random_.uniform(0, 0.05)]) if cancelled else None
            outcomes["images"] += {"StreamClassify": 4 * count, "Classify with files": min(count, 8)}.get(name, count)
            try:
                await kinds[name](count, cancel_after)
                outcomes[f"{name}, right answers"] += 1
            except asyncio.CancelledError:
                if not cancelled:
                    raise BrokenRule(f"a {name} call that nobody cancelled was cancelled") from None
                outcomes[f"{name}, cancelled"] += 1
            except grpc.RpcError as error:
                if not (cancelled and error.code() is grpc.StatusCode.CANCELLED):
                    unexpected(error, name)
                outcomes[f"{name}, cancelled"] += 1

    async with connect(target) as channel:
        stub = loads.stub_of(channel)
        inference = oip_grpc.GRPCInferenceServiceStub(channel)
        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(caller())
    return outcomes
