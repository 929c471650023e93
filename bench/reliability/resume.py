"""Streams of the SDK whose connections are cut and whose servers are restarted: no frame is lost or doubled."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

import client
from bench.reliability.common import (
    TOLERANCE,
    TRANSPORT,
    Generators,
    Known,
    Report,
    Server,
    check_health,
    free_port,
    known,
    processes,
    serving,
)
from bench.reliability.proxy import Fault, Proxy
from digits.preprocessing import PIXELS, SIDE, to_pixels
from server.golden import golden_digits

FILM = 2_000
"""Different frames, shown again and again."""
FRAME_SECONDS = 0.002
"""Between two frames, so that a stream lasts as long as what happens to it."""
TIMEOUT = 60.0
"""Seconds without an answer: far more than a server takes to start."""
LEAST_BYTES, MOST_BYTES = 100, 10_000
"""Of answers, after which a connection is cut; sometimes before the first of them."""
PAUSE_SECONDS = 0.5
"""Between two restarts."""
LIVES = 4
"""Every so many restarts, a server is killed in place of told to stop."""
MAX_COMPLAINTS = 5


@dataclass
class Outcome:
    """What the caller of one stream saw."""

    sent: int = 0
    answered: int = 0
    doubled: int = 0
    lost: int = 0
    longest_pause: float = 0.0
    """Seconds between two results."""
    complaints: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.sent += other.sent
        self.answered += other.answered
        self.doubled += other.doubled
        self.lost += other.lost
        self.longest_pause = max(self.longest_pause, other.longest_pause)
        self.complaints += other.complaints


def run(report: Report, *, cuts: int = 200, restarts: int = 8, transport: str = TRANSPORT) -> None:
    """Cut the connections of streams so often, then restart their servers so often."""
    answers = known(pixels=film())
    with processes(2) as pool, Fleet(report, transport) as fleet:
        fleet.add()
        _cut(report, pool, answers, fleet.servers[0], cuts)
        _restart(report, pool, answers, fleet, max(restarts // LIVES, 1))
        fleet.add()
        _restart(report, pool, answers, fleet, restarts)


def film() -> npt.NDArray[np.uint8]:
    """Frames, `uint8[2000, 784]`, as the SDK sends them: digits whose ink fades here and there, all different."""
    random_ = np.random.default_rng(4)
    golden, _ = golden_digits()
    frames = golden[np.arange(FILM) % len(golden)]
    faded = (frames > 0) & (frames < 250) & (random_.random(frames.shape) < 0.3)
    frames = np.where(faded, frames * 0.7, frames).astype(np.uint8)
    return np.stack([to_pixels(frame.reshape(SIDE, SIDE)).reshape(PIXELS) for frame in frames])


def _cut(report: Report, pool: Generators, answers: Known, server: Server, cuts: int) -> None:
    def faults(seed: int) -> Iterator[Fault]:
        random_ = random.Random(seed)
        yield Fault(MOST_BYTES)  # the first connection lives to see an answer
        for _ in range(cuts // 2 - 1):
            yield Fault(random_.randrange(LEAST_BYTES, MOST_BYTES), how=random_.choice(("reset", "close")))

    with Proxy(server.target, faults(1)) as first, Proxy(server.target, faults(2)) as second:
        with _streaming(pool, answers, [first.address, second.address]) as streams:
            while first.broken + second.broken < 2 * (cuts // 2) and not streams.is_over():
                time.sleep(PAUSE_SECONDS)
        _tell(report, f"{first.broken + second.broken} cut connections", streams.outcome)
        report.require(first.broken + second.broken >= 2 * (cuts // 2), "as many connections were cut as was said")
    check_health(report, server)


def _restart(report: Report, pool: Generators, answers: Known, fleet: Fleet, restarts: int) -> None:
    with _streaming(pool, answers, [fleet.target, fleet.target]) as streams:
        for number in range(restarts):
            time.sleep(PAUSE_SECONDS)
            if streams.is_over():
                break
            fleet.restart(number % len(fleet.servers), kill=number % LIVES == LIVES - 1)
        time.sleep(PAUSE_SECONDS)
    _tell(report, f"{restarts} restarts, servers: {len(fleet.servers)}", streams.outcome)


class Fleet:
    """Servers with these flags that come back at the ports that they had; a context manager."""

    def __init__(self, report: Report, transport: str, *flags: str) -> None:
        self.servers: list[Server] = []
        self._report = report
        self._transport = transport
        self._flags = flags
        self._ports: list[int] = []
        self._places: list[contextlib.ExitStack] = []  # of each server one, as it ends when it is restarted

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place in self._places:
            place.close()

    @property
    def target(self) -> str:
        return "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in self._ports)

    def add(self) -> None:
        self._ports.append(free_port())
        self._places.append(contextlib.ExitStack())
        self.servers.append(self._places[-1].enter_context(self._serving(self._ports[-1])))

    def restart(self, which: int, kill: bool) -> None:
        """End a server, by SIGKILL or as an operator does, and start it again."""
        server = self.servers[which]
        server.stop(signal.SIGKILL if kill else signal.SIGTERM)
        if not kill:
            self._report.require(server.process.returncode == 0, "a drained server ends with exit code 0")
            check_health(self._report, server, alive=False)
        self._places[which].close()
        self.servers[which] = self._places[which].enter_context(self._serving(self._ports[which]))

    def _serving(self, port: int) -> contextlib.AbstractContextManager[Server]:
        return serving(*self._flags, port=port, transport=self._transport)


def _tell(report: Report, what: str, outcome: Outcome) -> None:
    report.row(f"{what}: frames sent / answered", f"{outcome.sent:,} / {outcome.answered:,}")
    report.row("  doubled / lost", f"{outcome.doubled} / {outcome.lost}")
    report.row("  longest pause between two results", f"{outcome.longest_pause * 1e3:.0f} ms")
    report.require(not outcome.complaints, f"{what}: {' | '.join(outcome.complaints)}")
    report.require(outcome.doubled == 0, f"{what}: {outcome.doubled} frames were answered more than once")
    report.require(outcome.lost == 0, f"{what}: {outcome.lost} frames were not answered")
    report.require(outcome.answered == outcome.sent, f"{what}: {outcome.answered} answers to {outcome.sent} frames")


# Load -------------------------------------------------------------------------


class Streams:
    """Streams that run in other processes, until they are told to end."""

    def __init__(self, futures: list[Future[Outcome]]) -> None:
        self._futures = futures
        self.outcome = Outcome()
        """Of all of them, once they have ended."""

    def is_over(self) -> bool:
        """Whether one has ended although nobody told it to."""
        return any(future.done() for future in self._futures)

    def wait(self) -> None:
        for future in self._futures:
            self.outcome.add(future.result())


@contextlib.contextmanager
def _streaming(pool: Generators, answers: Known, targets: list[str]) -> Iterator[Streams]:
    """One stream of an `AsyncClient` and one of a `Client` to these targets, until left."""
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / "done"
        loads = (load_async, load_sync)
        streams = Streams(
            [pool.submit(load, target, answers, str(done)) for load, target in zip(loads, targets, strict=True)]
        )
        try:
            yield streams
        finally:
            done.touch()
            streams.wait()


class Caller:
    """What both loads do: show the film until a file appears, and look at each result."""

    def __init__(self, answers: Known, done: str) -> None:
        self.outcome = Outcome()
        self._answers = answers
        ((self._version, _),) = answers.logits.items()
        self._expected = answers.probabilities(self._version, range(len(answers.pixels)))
        self._done = done
        self._seen: list[int] = []  # how often each frame was answered
        self._last = time.monotonic()

    def frames(self) -> Iterable[npt.NDArray[np.uint8]]:
        images = self._answers.pixels.reshape(-1, SIDE, SIDE)
        for image in itertools.cycle(images):
            if os.path.exists(self._done):
                return
            self._seen.append(0)
            self.outcome.sent += 1
            yield image
            time.sleep(FRAME_SECONDS)

    def take(self, result: client.Prediction | client.MnistGrpcError) -> None:
        now = time.monotonic()
        self.outcome.longest_pause = max(self.outcome.longest_pause, now - self._last)
        self._last = now
        place = self.outcome.answered
        self.outcome.answered += 1
        if isinstance(result, client.MnistGrpcError):
            self.complain(f"frame {place}: {type(result).__name__}: {result}")
        elif (number := self._number(result, place)) is None:
            self.complain(f"frame {place}: an answer to no frame that was sent")
        else:
            self._seen[number] += 1
            if number != place:
                self.complain(f"the answer to frame {number} came as that to frame {place}")

    def _number(self, result: client.Prediction, place: int) -> int | None:
        """The frame that an answer is for: the one in whose place it comes, else the next one before or after."""
        if self._fits(result, place):
            return place
        others = sorted(range(len(self._seen)), key=lambda number: abs(number - place))
        return next((number for number in others if self._fits(result, number)), None)

    def _fits(self, result: client.Prediction, number: int) -> bool:
        if number >= len(self._seen):
            return False
        expected = self._expected[number % FILM]
        return result.model_version == self._version and bool(np.abs(result.probabilities - expected).max() < TOLERANCE)

    def complain(self, complaint: str) -> None:
        self.outcome.complaints = [*self.outcome.complaints, complaint][:MAX_COMPLAINTS]

    def end(self) -> Outcome:
        self.outcome.doubled = sum(count - 1 for count in self._seen if count > 1)
        self.outcome.lost = self._seen.count(0)
        return self.outcome


def load_async(target: str, answers: Known, done: str) -> Outcome:
    """One stream of an `AsyncClient`, until a file appears."""
    caller = Caller(answers, done)

    async def stream() -> None:
        async with client.AsyncClient(target, timeout=TIMEOUT) as asked:
            async for result in asked.stream_classify(caller.frames()):
                caller.take(result)

    try:
        asyncio.run(stream())
    except client.MnistGrpcError as error:
        caller.complain(f"{type(error).__name__}: {error}")
    return caller.end()


def load_sync(target: str, answers: Known, done: str) -> Outcome:
    """One stream of a `Client`, until a file appears."""
    caller = Caller(answers, done)
    try:
        with client.Client(target, timeout=TIMEOUT) as asked:
            for result in asked.stream_classify(caller.frames()):
                caller.take(result)
    except client.MnistGrpcError as error:
        caller.complain(f"{type(error).__name__}: {error}")
    return caller.end()
