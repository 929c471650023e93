"""The load: a closed loop of requests, whose answers are all checked.

`LoadGenerator` is all that the bench knows of it, so that another one can take
its place. `Loop` is ours, and `process()` runs it in a process of its own
(`python -m bench.peers.load`), which reads one order a line from stdin and
answers each with one line on stdout.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from bench.peers.dialects import DIALECTS
from bench.peers.links import Answer, Link
from bench.processes import started
from bench.rounds import percentiles_us
from client.load.images import images, rows_of

WARM_UP_SECONDS = 0.3
SILENCE_SECONDS = 30.0
CONNECTIONS = 16
"""At most, where one takes many requests: servers with several workers spread connections, not requests."""
MESSAGES = 32
"""Distinct messages, of which each carries other images; of single images there are eight times as many."""


class LoadError(Exception):
    """The load could not be kept up."""


class WrongAnswer(LoadError):
    """The server said something else than the network."""


@dataclass(frozen=True)
class Target:
    """A server, and how it is spoken to."""

    address: str
    """As `host:port`."""
    dialect: str
    """A key of `DIALECTS`."""


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    rate: float
    """Images a second."""
    p50_us: float
    p99_us: float


class LoadGenerator(Protocol):
    """Whatever can keep a load up."""

    def closed_loop(self, target: Target, images_per_request: int, in_flight: int, seconds: float) -> Sample:
        """Keep so many requests unanswered at any time.

        Raises:
            WrongAnswer: at the first one.
            LoadError: if the server refuses a request, ends a connection or falls silent.
        """


class Loop:
    """A load generator in this process."""

    def __init__(self, digits: list[int]) -> None:
        """Expect these digits of `client.load.images.images()`."""
        self._digits = np.array(digits)

    def closed_loop(self, target: Target, images_per_request: int, in_flight: int, seconds: float) -> Sample:
        dialect = DIALECTS[target.dialect]
        connections = min(in_flight, CONNECTIONS) if dialect.is_multiplexed else in_flight
        with ExitStack() as stack:
            stack.enter_context(_faults_are_the_peers())
            links = [stack.enter_context(closing(dialect.connect(target.address))) for _ in range(connections)]
            run = _Run(links, target, self._digits, images_per_request)
            run.keep_up(in_flight, WARM_UP_SECONDS)
            elapsed = run.keep_up(in_flight, seconds)
        return Sample(len(run.latencies) * images_per_request / elapsed, *percentiles_us(run.latencies))


@contextmanager
def _faults_are_the_peers() -> Iterator[None]:
    """Whatever goes wrong with what a peer sends is told of that peer, and ends nothing else."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{type(error).__name__}: {error}") from error


class _Run:
    """The requests to one server."""

    def __init__(self, links: list[Link], target: Target, digits: Any, count: int) -> None:
        self._links = links
        self._dialect = DIALECTS[target.dialect]
        pixels = images()
        rows = [rows_of(message, count) for message in range(MESSAGES * 8 if count == 1 else MESSAGES)]
        self._messages = [self._dialect.request(pixels[chosen]) for chosen in rows]
        self._expected = [digits[chosen].tolist() for chosen in rows]
        self._sent = 0
        self._answered = 0.0
        """When there was an answer last."""
        self._starts: dict[int, float] = {}
        self.latencies: list[float] = []

    def keep_up(self, in_flight: int, seconds: float) -> float:
        """Return the seconds until the last answer."""
        self.latencies.clear()
        start = self._answered = time.perf_counter()
        end = start + seconds
        with selectors.DefaultSelector() as selector:
            for number in range(in_flight):
                self._send(self._links[number % len(self._links)])
            for link in self._links:
                selector.register(link, selectors.EVENT_READ, link)
                self._serve(link, selector, end)
            while self._starts:
                events = selector.select(max(self._answered + SILENCE_SECONDS - time.perf_counter(), 0))
                if not events or time.perf_counter() > self._answered + SILENCE_SECONDS:
                    raise LoadError(f"no answer in {SILENCE_SECONDS:.0f} s")
                for key, _ in events:
                    self._serve(key.data, selector, end)
        return time.perf_counter() - start

    def _send(self, link: Link) -> None:
        self._starts[self._sent] = time.perf_counter()
        link.call(self._messages[self._sent % len(self._messages)], self._sent)
        self._sent += 1

    def _serve(self, link: Link, selector: selectors.BaseSelector, end: float) -> None:
        while answers := link.exchange():
            now = self._answered = time.perf_counter()
            for answer in answers:
                self.latencies.append(now - self._starts.pop(answer.tag))
                self._check(answer)
                if now < end:
                    self._send(link)
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.wants_to_write else 0)
        if selector.get_key(link).events != wanted:
            selector.modify(link, wanted, link)

    def _check(self, answer: Answer) -> None:
        if answer.error:
            raise LoadError(answer.error)
        expected = self._expected[answer.tag % len(self._messages)]
        try:
            digits = self._dialect.digits(answer.content)
        except Exception as error:
            raise WrongAnswer(f"an answer of {len(answer.content)} bytes that cannot be read: {error}") from error
        if digits != expected:
            raise WrongAnswer(f"{digits[:8]} instead of {expected[:8]}")


def ask(target: Target, timeout: float) -> list[int]:
    """The digits that a server reads on all of `images()`, in one request.

    Raises:
        LoadError: if there is no answer.
    """
    dialect = DIALECTS[target.dialect]
    end = time.monotonic() + timeout
    with (
        _faults_are_the_peers(),
        closing(dialect.connect(target.address)) as link,
        selectors.DefaultSelector() as selector,
    ):
        link.call(dialect.request(images()), 0)
        while not (answers := link.exchange()):
            both = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.wants_to_write else 0)
            selector.register(link, both)
            if (left := end - time.monotonic()) <= 0 or not selector.select(left):
                raise LoadError(f"no answer in {timeout} s")
            selector.unregister(link)
    if answers[0].error:
        raise LoadError(answers[0].error)
    try:
        return dialect.digits(answers[0].content)
    except Exception as error:
        raise WrongAnswer(f"an answer of {len(answers[0].content)} bytes that cannot be read: {error}") from error


class Remote:
    """A load generator in another process, which is started when it is wanted, and anew when it has ended."""

    def __init__(self, digits: list[int], module: str) -> None:
        self._digits = digits
        self._module = module
        self._stack = ExitStack()
        self._process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):  # an order that it did not read
            self._stack.close()
        self._process = None

    def closed_loop(self, target: Target, images_per_request: int, in_flight: int, seconds: float) -> Sample:
        order = {"target": asdict(target), "digits": self._digits, "load": [images_per_request, in_flight, seconds]}
        if not (line := self._answer(json.dumps(order))):
            assert self._process is not None
            code = self._process.wait()
            self.close()
            raise LoadError(f"the load generator ended with code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise (WrongAnswer if answer["wrong"] else LoadError)(answer["error"])
        return Sample(**answer)

    def _answer(self, order: str) -> str:
        if self._process is None:
            self._process = self._stack.enter_context(started(self._module))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except BrokenPipeError:
            return ""


@contextmanager
def process(digits: list[int], module: str = "bench.peers.load") -> Iterator[Remote]:
    """Run a load generator in a process of its own: a module that calls `obey`."""
    with closing(Remote(digits, module)) as remote:
        yield remote


def obey(generator: Callable[[list[int]], LoadGenerator]) -> None:
    """Carry out the orders that come in."""
    for line in sys.stdin:
        order = json.loads(line)
        try:
            sample = generator(order["digits"]).closed_loop(Target(**order["target"]), *order["load"])
            answer: dict[str, Any] = asdict(sample)
        except LoadError as error:
            answer = {"error": str(error), "wrong": isinstance(error, WrongAnswer)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    obey(Loop)
