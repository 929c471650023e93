"""An engine that is stuck: health says so, goes on answering, and says when it is over."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server.app import build_server
from server.inference import Classifier, Scores
from server.inputs import Rows
from server.service import INLINE_SIZE
from server.settings import Settings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
TIMEOUT = 30


class Stall:
    """Holds up batches that run in a thread, as these are too large for the loop, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._go = threading.Event()
        run_batch = Classifier.run_batch

        def stalled(classifier: Classifier, blocks: Sequence[Rows]) -> list[Scores]:
            if sum(len(block) for block in blocks) > INLINE_SIZE:
                assert self._go.wait(TIMEOUT)
            return run_batch(classifier, blocks)

        monkeypatch.setattr(Classifier, "run_batch", stalled)

    def end(self) -> None:
        self._go.set()


@pytest.fixture
async def stalling(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[grpc.aio.Channel, Stall]]:
    stall = Stall(monkeypatch)
    server, port = build_server(Settings(port=0, stuck_after=0.05))
    await server.start()
    await server.load()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel, stall
    stall.end()
    await server.stop(grace=0)


async def test_health_says_not_serving_while_a_batch_is_stuck_and_serving_afterwards(
    stalling: tuple[grpc.aio.Channel, Stall],
) -> None:
    channel, stall = stalling
    health: Any = health_pb2_grpc.HealthStub(channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="mnist.v1.DigitClassifier"), timeout=TIMEOUT)
    assert (await watch.read()).status == SERVING
    classifier: Any = pb_grpc.DigitClassifierStub(channel)
    call = classifier.Classify(pb.ClassifyRequest(pixels=bytes(2 * INLINE_SIZE * 784)), timeout=TIMEOUT)
    assert (await watch.read()).status == NOT_SERVING
    assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)).status == NOT_SERVING
    assert not call.done()
    stall.end()
    assert len((await call).digits) == 2 * INLINE_SIZE
    assert (await watch.read()).status == SERVING


async def test_calls_that_a_stuck_engine_keeps_waiting_end_at_their_deadlines_and_are_not_computed(
    stalling: tuple[grpc.aio.Channel, Stall],
) -> None:
    channel, stall = stalling
    classifier: Any = pb_grpc.DigitClassifierStub(channel)
    image = pb.ClassifyRequest(pixels=bytes(784))
    stuck = classifier.Classify(pb.ClassifyRequest(pixels=bytes(2 * INLINE_SIZE * 784)), timeout=TIMEOUT)
    for _ in range(5):  # when later calls are answered, the one before has arrived
        await classifier.GetModel(pb.GetModelRequest(), timeout=TIMEOUT)
    impatient = [classifier.Classify(image, timeout=0.3) for _ in range(100)]
    patient = [classifier.Classify(image, timeout=TIMEOUT) for _ in range(10)]
    outcomes = await asyncio.gather(*impatient, return_exceptions=True)
    assert {outcome.code() for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)} == {
        grpc.StatusCode.DEADLINE_EXCEEDED
    }
    assert len(outcomes) == 100
    assert not any(call.done() for call in patient)
    stall.end()
    await stuck
    answers = await asyncio.gather(*patient)
    assert {answer.receipt.batch_rows for answer in answers} == {10}, "those ten rows and no other"
