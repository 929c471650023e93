"""Live video that outruns the server: the newest frame is answered, overtaken ones are told to be, none is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np

from bench.reliability import loads
from bench.reliability.common import (
    HANG_SECONDS,
    TRANSPORT,
    BrokenRule,
    Known,
    Latencies,
    Report,
    check_health,
    connect,
    known,
    processes,
    serving,
)
from bench.reliability.stall import stall_image
from protos.mnist.v1 import digit_classifier_pb2 as pb

MODEL_SECONDS = 0.03
"""What the stalled model needs for a message."""
TOO_FAST = 10
"""How many messages come in that time."""
PATIENT = 5
"""Messages before the first that wants the latest only: they are answered, however late."""
PLACES = {"in a thread": 80, "on the event loop": 1}
"""Frames of a message, and where a batch of so many is computed: up to `server.service.INLINE_SIZE` on the loop."""
ABORTED = 10


@dataclass
class Video:
    """What came back."""

    lags: list[float] = field(default_factory=list)
    """Seconds from sending a frame to its answer, of those that were computed."""
    told: list[float] = field(default_factory=list)
    """The same of those that were overtaken."""


def run(report: Report, *, messages: int = 300, transport: str = TRANSPORT) -> None:
    """Send the messages ten times as fast as the model computes them."""
    answers = known()
    for place, frames in PLACES.items():
        with serving(module="bench.reliability.stalling_server", transport=transport) as server, processes(1) as pool:
            video: Video = pool.submit(load, server.target, answers, messages, frames).result()
            report.row(f"model {place}: answered / overtaken", f"{len(video.lags)} / {len(video.told)}", "messages")
            lags, told = Latencies(video.lags), Latencies(video.told)
            report.row("  lag of the answers, p50 / max", f"{lags.at(50)} / {lags.at(100)}")
            report.row("  lag of the news of being overtaken, p50 / max", f"{told.at(50)} / {told.at(100)}")
            dropped = server.gauge("mnist_grpc_frames_dropped_total")
            report.require(dropped == len(video.told) * (frames + 1), f"the metric of dropped frames is {dropped:g}")
            report.require(len(video.told) > len(video.lags), "most messages are overtaken")
            check_health(report, server)


def load(target: str, answers: Known, messages: int, frames: int) -> Video:
    """Send a video, check each answer."""
    return asyncio.run(_load(target, answers, messages, frames))


async def _load(target: str, answers: Known, messages: int, frames: int) -> Video:
    video = Video()
    sent: list[float] = []
    size = 1 + frames  # one image stalls the model, the others are known

    async def source() -> AsyncIterator[pb.StreamClassifyRequest]:
        start = time.monotonic()
        for number in range(messages):
            await asyncio.sleep(start + number * MODEL_SECONDS / TOO_FAST - time.monotonic())
            pixels = stall_image(MODEL_SECONDS) + answers.pixels[answers.rows(number, frames)].tobytes()
            sent.append(time.monotonic())
            yield pb.StreamClassifyRequest(
                first_sequence=number * size,
                frames=pb.ClassifyRequest(pixels=pixels),
                latest_only=number == PATIENT,  # holds for those after it
            )

    number = 0
    async with connect(target) as channel:
        async for response in loads.stub_of(channel).StreamClassify(source(), timeout=HANG_SECONDS):
            for block in response.blocks:
                count = max(block.frame_count // size, 1)  # of messages: those that came together may share a block
                if (block.first_sequence, block.frame_count) != (number * size, count * size):
                    raise BrokenRule(f"message {number} was answered with {block}")
                lag = time.monotonic() - sent[number]
                if block.WhichOneof("outcome") == "result":
                    version = block.result.receipt.model_version
                    digits = np.array(block.result.digits).reshape(count, size)
                    probabilities = np.array(block.result.probabilities, np.float32).reshape(count, size, -1)
                    for index in range(count):
                        rows = answers.rows(number + index, frames)
                        answers.check_columns(version, rows, digits[index, 1:], probabilities[index, 1:])
                    if number >= PATIENT:
                        video.lags.append(lag)
                elif block.error.code != ABORTED:
                    raise BrokenRule(f"message {number} was answered with {block.error}")
                elif number < PATIENT:
                    raise BrokenRule("a frame was dropped before anybody asked for the latest only")
                else:
                    video.told += [lag] * count
                answered = block.WhichOneof("outcome") == "result"
                number += count
    if number != messages:
        raise BrokenRule(f"{messages} messages were sent, {number} were answered")
    if not answered:
        raise BrokenRule("the last frame was not answered with a result")
    return video
