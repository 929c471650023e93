"""Clients of streams that behave badly: that never read, leave early, send bad frames, or want everything.

Each is a process of its own where its death or its greed matters.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import numpy as np

from bench.reliability import loads
from bench.reliability.common import (
    CHANNEL_OPTIONS,
    HANG_SECONDS,
    STREAMS_GAUGE,
    TRANSPORT,
    BrokenRule,
    Generators,
    Known,
    Latencies,
    Report,
    Server,
    check_health,
    connect,
    known,
    processes,
    serving,
)
from client.load.images import IMAGES
from protos.mnist.v1 import digit_classifier_pb2 as pb

NEVER_READING = 8
MESSAGE_FRAMES = 64
FEW_FRAMES = 20_000
"""More than the answers of which 64 kB hold, the server's window, and what the kernel keeps of both directions."""
GREEDY_IN_FLIGHT = 1_000
"""Messages; far more than the server's window."""
LEAVE_SECONDS = 10.0
INVALID_ARGUMENT = 3


def run(
    report: Report,
    *,
    seconds: float = 60.0,
    rounds: int = 5,
    frames: int = 20_000,
    memory_limit: float = 0.05,
    transport: str = TRANSPORT,
) -> None:
    """`seconds` of never reading, `rounds` of greed of a tenth of that, `frames` in order with bad ones between."""
    answers = known()
    with serving(transport=transport) as server, processes(3) as pool:
        counted = pool.submit(order, server.target, answers, frames).result()
        report.row("frames answered in order, good / bad", f"{counted[0]:,} / {counted[1]:,}")
        _never_reading(report, server, pool, answers, seconds, memory_limit)
        _greedy(report, server, pool, answers, seconds / 10, rounds)
        for leave in LEAVES:
            _leaving(report, server, pool, answers, leave)
        check_health(report, server)


# Order ------------------------------------------------------------------------


def order(target: str, answers: Known, frames: int) -> tuple[int, int]:
    """Send good and bad frames in messages of random sizes; return how many of each were answered rightly."""
    return asyncio.run(_order(target, answers, frames))


@dataclass(frozen=True)
class _Sent:
    """A message, and what has to come back: the rows of its good frames, and None for bad ones."""

    request: pb.StreamClassifyRequest
    expected: list[int | None]


def _mixed(answers: Known, frames: int) -> list[_Sent]:
    random_ = random.Random(1)
    sent: list[_Sent] = []
    first = 1 << 40
    while frames > 0:
        expected: list[int | None]
        match random_.randrange(6):
            case 0:  # a buffer that is no whole number of images
                count = random_.randrange(1, 4)
                images = pb.ClassifyRequest(pixels=answers.pixels[:count].tobytes()[:-1])
                expected = [None] * count
            case 1:
                images, expected = pb.ClassifyRequest(), [None]
            case 2:  # features, of which some are not finite
                features = np.zeros((5, answers.pixels.shape[1]), "<f4")
                features[3, 7] = np.nan
                images = pb.ClassifyRequest(features=features.tobytes())
                expected = [-1, -1, -1, None, -1]
            case 3:
                images = pb.ClassifyRequest(encoded=pb.EncodedImages(files=[loads.png(answers, 0), b"no image"]))
                expected = [-1, None]
            case _:
                start, count = (random_.randrange(IMAGES), random_.choice([1, 1, 2, 9, 64, 300]))
                expected = answers.rows(start, count).tolist()
                images = answers.request(answers.rows(start, count), logits=True)
        sent.append(_Sent(pb.StreamClassifyRequest(first_sequence=first, frames=images), expected))
        first += len(expected) + random_.choice([0, 0, 5])  # numbers are the client's to choose
        frames -= len(expected)
    return sent


async def _order(target: str, answers: Known, frames: int) -> tuple[int, int]:
    sent = _mixed(answers, frames)
    expected = iter(
        (message.request.first_sequence + index, row) for message in sent for index, row in enumerate(message.expected)
    )
    good = bad = 0

    async def messages() -> AsyncIterator[pb.StreamClassifyRequest]:
        for message in sent:
            yield message.request

    async with connect(target) as channel:
        async for response in loads.stub_of(channel).StreamClassify(messages(), timeout=10 * HANG_SECONDS):
            for block in response.blocks:
                rows = []
                for index in range(block.frame_count):
                    number, row = next(expected, (-1, None))
                    if number != block.first_sequence + index:
                        raise BrokenRule(f"frame {number} was to be answered, {block.first_sequence + index} was")
                    if (row is None) != (block.WhichOneof("outcome") == "error"):
                        raise BrokenRule(f"frame {number}, a {'bad' if row is None else 'good'} one, got {block}")
                    rows.append(row)
                if block.WhichOneof("outcome") == "error":
                    if block.error.code != INVALID_ARGUMENT:
                        raise BrokenRule(f"a bad frame was answered with {block.error}")
                    bad += block.frame_count
                else:
                    if len(block.result.digits) != block.frame_count:
                        raise BrokenRule(f"{block.frame_count} frames have {len(block.result.digits)} digits")
                    if -1 not in rows:  # of those, what they show is not known beforehand
                        answers.check(block.result, [row for row in rows if row is not None])
                    good += block.frame_count
    if (left := next(expected, None)) is not None:
        raise BrokenRule(f"frame {left[0]} was never answered")
    return good, bad


# Never reading ----------------------------------------------------------------


def _never_reading(
    report: Report, server: Server, pool: Generators, answers: Known, seconds: float, memory_limit: float
) -> None:
    before = server.rss_mb()
    attack = pool.submit(never_read, server.target, answers, NEVER_READING, seconds)
    neighbour = pool.submit(calls, server.target, answers, seconds)
    memory = []
    while not attack.done():
        memory.append(server.rss_mb())
        time.sleep(0.05)
    taken = attack.result()
    latencies = Latencies(neighbour.result())
    third = len(memory) // 3
    early, late = max(memory[:third]), max(memory[-third:])
    report.row(f"{NEVER_READING} clients that never read: frames taken from each", f"{max(taken):,}", "at most")
    report.row("  server memory without them", f"{before:.0f} MB")
    report.row("  highest in the first / last third of the time", f"{early:.0f} / {late:.0f} MB", f"of {seconds:g} s")
    report.row("  single images beside them, p99", latencies.at(99), f"{len(latencies.seconds):,} right answers")
    report.require(late < (1 + memory_limit) * early, f"memory grows from {early:.0f} to {late:.0f} MB")
    report.require(max(taken) < FEW_FRAMES, f"a client that never reads hands over {max(taken):,} frames")


def never_read(target: str, answers: Known, clients: int, seconds: float) -> list[int]:
    """Write for so long and never read; return how many frames each client could hand over."""
    return asyncio.run(_never_read(target, answers, clients, seconds))


async def _never_read(target: str, answers: Known, clients: int, seconds: float) -> list[int]:
    frames = answers.request(answers.rows(0, MESSAGE_FRAMES))

    async def client() -> int:
        taken = 0
        # A fixed window of HTTP/2: else this side's gRPC would read, and keep, ever more of what nobody asks for.
        options = [*CHANNEL_OPTIONS, ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(target, options=options) as channel:
            call = loads.stub_of(channel).StreamClassify()
            try:
                async with asyncio.timeout(seconds):
                    while True:
                        await call.write(pb.StreamClassifyRequest(first_sequence=taken, frames=frames))
                        taken += MESSAGE_FRAMES
            except TimeoutError:
                pass
            finally:
                call.cancel()
        return taken

    return await asyncio.gather(*(client() for _ in range(clients)))


# Greed ------------------------------------------------------------------------


def _greedy(report: Report, server: Server, pool: Generators, answers: Known, seconds: float, rounds: int) -> None:
    alone: list[Latencies] = []
    beside: list[Latencies] = []
    rates: dict[bool, list[float]] = {False: [], True: []}
    greedy_rates = []
    for _ in range(rounds):
        for is_greedy in (False, True):
            greed = pool.submit(flood, server.target, answers, seconds + 1) if is_greedy else None
            modest = pool.submit(stream_rate, server.target, answers, seconds)
            single = Latencies(pool.submit(calls, server.target, answers, seconds).result())
            (beside if is_greedy else alone).append(single)
            rates[is_greedy].append(modest.result())
            if greed is not None:
                greedy_rates.append(greed.result())
    p99 = [float(np.median([latencies.p(99) for latencies in found])) * 1e3 for found in (alone, beside)]
    report.row("single images beside a modest stream, p99", f"{p99[0]:.1f} ms")
    report.row("  and a greedy one", f"{p99[1]:.1f} ms", f"x{p99[1] / p99[0]:.2f}")
    modest_rates = [float(np.median(rates[is_greedy])) for is_greedy in (False, True)]
    report.row("frames/s of a modest stream", f"{modest_rates[0]:,.0f}")
    report.row("  beside a greedy one", f"{modest_rates[1]:,.0f}", f"x{modest_rates[1] / modest_rates[0]:.2f}")
    report.row("  frames/s of the greedy one", f"{np.median(greedy_rates):,.0f}")
    report.require(min(*rates[True], *(len(found.seconds) for found in beside)) > 0, "nobody starves")


def calls(target: str, answers: Known, seconds: float) -> list[float]:
    """One caller of single images for so long; return how long each call took."""

    async def call() -> list[float]:
        latencies: list[float] = []
        end = time.monotonic() + seconds
        async with connect(target) as channel:
            stub = loads.stub_of(channel)
            await channel.channel_ready()
            while (start := time.monotonic()) < end:
                await loads.unary(stub, answers, len(latencies), 1, timeout=HANG_SECONDS)
                latencies.append(time.monotonic() - start)
        return latencies

    return asyncio.run(call())


def stream_rate(target: str, answers: Known, seconds: float) -> float:
    """A stream of single frames, 8 unanswered, for so long; return frames a second."""

    async def stream() -> float:
        done = 0
        start = time.monotonic()
        async with connect(target) as channel:
            stub = loads.stub_of(channel)
            while time.monotonic() < start + seconds:
                await loads.stream(stub, answers, done, [1] * 200, timeout=HANG_SECONDS)
                done += 200
        return done / (time.monotonic() - start)

    return asyncio.run(stream())


def flood(target: str, answers: Known, seconds: float) -> float:
    """A stream that sends all it can, for so long; return the frames a second that were answered."""
    return asyncio.run(_flood(target, answers, seconds))


async def _flood(target: str, answers: Known, seconds: float) -> float:
    requests = [answers.request(answers.rows(start, MESSAGE_FRAMES)) for start in range(0, IMAGES, MESSAGE_FRAMES)]
    start = time.monotonic()
    room = asyncio.Semaphore(GREEDY_IN_FLIGHT)

    async def messages() -> AsyncIterator[pb.StreamClassifyRequest]:
        number = 0
        while time.monotonic() < start + seconds:
            await room.acquire()
            yield pb.StreamClassifyRequest(
                first_sequence=number * MESSAGE_FRAMES, frames=requests[number % len(requests)]
            )
            number += 1

    done = 0
    async with connect(target) as channel:
        async for response in loads.stub_of(channel).StreamClassify(messages(), timeout=seconds + HANG_SECONDS):
            for block in response.blocks:
                if block.first_sequence != done:
                    raise BrokenRule(f"frame {done} was to be answered, {block.first_sequence} was")
                answers.check(block.result, answers.rows(done, block.frame_count))
                done += block.frame_count
                for _ in range(block.frame_count // MESSAGE_FRAMES):  # a block may be of several messages
                    room.release()
    return done / (time.monotonic() - start)


# Leaving ----------------------------------------------------------------------

LEAVES = ("cancels", "closes its channel", "half-closes and leaves", "is killed")


def _leaving(report: Report, server: Server, pool: Generators, answers: Known, leave: str) -> None:
    """A client leaves in the middle of ten streams: how long the server takes to notice."""
    if leave == "is killed":
        with processes(1) as doomed:
            process = doomed.submit(os.getpid).result()
            future = doomed.submit(leave_early, server.target, answers, leave)
            waited = server.wait_for_gauge(STREAMS_GAUGE, 10, HANG_SECONDS)
            report.require(waited < HANG_SECONDS, "ten streams open")
            os.kill(process, signal.SIGKILL)
            ended = server.wait_for_gauge(STREAMS_GAUGE, 0, LEAVE_SECONDS)
            future.exception()
    else:
        pool.submit(leave_early, server.target, answers, leave).result()
        ended = server.wait_for_gauge(STREAMS_GAUGE, 0, LEAVE_SECONDS)
    report.row(f"a client {leave}: its streams are gone after", f"{ended * 1e3:.0f} ms")
    report.require(ended < LEAVE_SECONDS, f"streams of a client that {leave} end")


def leave_early(target: str, answers: Known, leave: str) -> None:
    """Open ten streams, take an answer from each, with more on the way; then leave."""
    asyncio.run(_leave_early(target, answers, leave))


async def _leave_early(target: str, answers: Known, leave: str) -> None:
    channel = connect(target)
    stub = loads.stub_of(channel)
    streams = []
    for _ in range(10):
        call = stub.StreamClassify()
        for number in range(20):
            await call.write(
                pb.StreamClassifyRequest(first_sequence=number * 8, frames=answers.request(answers.rows(number * 8, 8)))
            )
        response = await call.read()
        if not isinstance(response, pb.StreamClassifyResponse):
            raise BrokenRule("a stream ended before it was left")
        answers.check(response.blocks[0].result, answers.rows(0, response.blocks[0].frame_count))
        streams.append(call)
    if leave == "cancels":
        for call in streams:
            call.cancel()
    elif leave == "half-closes and leaves":
        for call in streams:
            await call.done_writing()
        await channel.close()
    elif leave == "is killed":
        await asyncio.sleep(HANG_SECONDS)
    if leave != "half-closes and leaves":
        await channel.close()
