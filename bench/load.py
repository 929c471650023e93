"""The load generator: a process of its own that sends, waits, checks and counts.

Reads one order a line from stdin (`{"target", "scenario", "seconds", "digits"}`)
and answers each with one line on stdout (`{"rate", "p50_us", "p99_us", "all_messages"}`, or
`{"error"}` at the first wrong answer). `digits` is what to expect of each of
the images; null expects the no-op server's fixed answer.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import cast

import grpc
import numpy as np

from bench.scenarios import IMAGES, SCENARIOS, Scenario, fixed_digits, images, rows_of
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc

WARM_UP_SECONDS = 0.2


class WrongAnswer(Exception):
    """The server said something else than the network."""


class Load:
    """One scenario against one server."""

    def __init__(self, stub: pb_grpc.DigitClassifierAsyncStub, scenario: Scenario, digits: list[int] | None) -> None:
        self._stub = stub
        self._scenario = scenario
        count = scenario.images
        pixels = images()
        rows = [rows_of(message, count) for message in range(IMAGES)]
        self._requests = [pb.ClassifyRequest(pixels=pixels[chosen].tobytes()) for chosen in rows]
        known = None if digits is None else np.array(digits)
        self._expected = [fixed_digits(count) if known is None else known[chosen].tolist() for chosen in rows]
        self._sent = 0
        self.latencies: list[float] = []

    async def run(self, seconds: float) -> float:
        """Keep the load up for so long; return images a second."""
        self.latencies.clear()
        start = time.perf_counter()
        end = start + seconds
        if self._scenario.stream:
            await self._stream(end)
        else:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._scenario.in_flight):
                    group.create_task(self._call(end))
        return len(self.latencies) * self._scenario.images / (time.perf_counter() - start)

    async def _call(self, end: float) -> None:
        while (start := time.perf_counter()) < end:
            message = self._sent
            self._sent += 1
            response = await self._stub.Classify(self._requests[message % IMAGES])
            self.latencies.append(time.perf_counter() - start)
            self._check(message, response)

    async def _stream(self, end: float) -> None:
        first = self._sent
        window = asyncio.Semaphore(self._scenario.in_flight)
        starts: deque[float] = deque()

        async def messages() -> AsyncIterator[pb.StreamClassifyRequest]:
            while True:
                await window.acquire()
                if (now := time.perf_counter()) >= end:
                    return
                starts.append(now)
                message = self._sent
                self._sent += 1
                yield pb.StreamClassifyRequest(first_sequence=message, frames=self._requests[message % IMAGES])

        answered = first
        async for response in self._stub.StreamClassify(messages()):
            for block in response.blocks:
                if block.first_sequence != answered:
                    raise WrongAnswer(f"message {answered} was answered with {block.first_sequence}")
                self._check(answered, block.result)
                self.latencies.append(time.perf_counter() - starts.popleft())
                answered += 1
                window.release()
        if answered != self._sent:
            raise WrongAnswer(f"{self._sent - answered} messages of a stream were not answered")

    def _check(self, message: int, response: pb.ClassifyResponse) -> None:
        expected = self._expected[message % IMAGES]
        if list(response.digits) != expected:
            raise WrongAnswer(f"message {message}: {list(response.digits)} instead of {expected}")


async def measure(target: str, scenario: Scenario, seconds: float, digits: list[int] | None) -> dict[str, float]:
    """Warm up, then measure."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = cast("pb_grpc.DigitClassifierAsyncStub", pb_grpc.DigitClassifierStub(channel))
        load = Load(stub, scenario, digits)
        await load.run(WARM_UP_SECONDS)
        warm_up = len(load.latencies)
        rate = await load.run(seconds)
        p50, p99 = np.percentile(load.latencies, [50, 99]) * 1e6
        return {"rate": rate, "p50_us": float(p50), "p99_us": float(p99), "all_messages": warm_up + len(load.latencies)}


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer: dict[str, float] | dict[str, str] = asyncio.run(
                measure(order["target"], SCENARIOS[order["scenario"]], order["seconds"], order["digits"])
            )
        except Exception as error:
            answer = {"error": _reason(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
