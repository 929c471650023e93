"""Send, wait, count: a closed loop, and an open one that does not care how the server is.

In a closed loop a server that stands still is asked nothing meanwhile, so that
the pause is one slow answer among thousands. In an open loop messages are meant
to be sent at times that were set beforehand, and latency counts from those: a
pause is then in the latency of each message that was meant to be sent during it.
"""

from __future__ import annotations

import math
import random
import selectors
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from client.load.histogram import Histogram
from client.load.jobs import Fault
from client.load.lanes import Answer, Lane
from client.load.wire import ConnectionEnded

LOST = "lost answer"
POLL_SECONDS = 0.05
BLOCKED_SECONDS = 0.001
"""How soon to try again to send what the socket did not take."""
LANES_TO_SELECT = 64
"""So many are waited for by select, to the microsecond; more by epoll, to the millisecond."""


@dataclass(frozen=True)
class Times:
    """Of a run, in seconds."""

    warm_up: float
    """What is meant to be sent by then is checked, and not in the figures."""
    seconds: float
    """For so long is measured."""
    patience: float
    """What is not answered so long after that is lost."""


@dataclass
class Outcome:
    """What a run has found."""

    latencies: Histogram = field(default_factory=Histogram)
    """Of right answers to messages that were meant to be sent while it was measured, nanoseconds."""
    late: Histogram = field(default_factory=Histogram)
    """How much later than meant messages were sent, of the same time."""
    answered: int = 0
    """Right answers that came while it was measured."""
    all_answered: int = 0
    """Right answers, with those of the warm-up and of the time after."""
    cpu_seconds: float = 0.0
    """Of this process, while it was measured."""
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first fault of each kind."""

    def note(self, fault: Fault, times: int = 1) -> None:
        self.faults[fault.what] += times
        self.examples.setdefault(fault.what, fault.detail)


class Sender(Protocol):
    """Decides what is sent when."""

    late: Histogram

    def turn(self, now: float, end: float) -> float:
        """Put into the lanes what is to be sent; return when the next turn is due at the latest."""

    @property
    def held(self) -> int:
        """Messages that are meant to have been sent, and wait until the server allows them."""


class Closed:
    """So many messages are unanswered at any time; each lane has its share of them, so that callers stay on theirs."""

    def __init__(self, lanes: Sequence[Lane], callers: int) -> None:
        self.late = Histogram()
        self._lanes = [
            (lane, callers // len(lanes) + (number < callers % len(lanes))) for number, lane in enumerate(lanes)
        ]
        self._number = 0

    def turn(self, now: float, end: float) -> float:
        for lane, share in self._lanes:
            sent = False
            while lane.under_way < share and lane.has_room:
                if lane.returned:
                    lane.send(*lane.returned.popleft())
                elif now < end:
                    lane.send(self._number, now)
                    self._number += 1
                else:
                    break
                sent = True
            if sent:
                lane.flush()
        return end if now < end else math.inf

    @property
    def held(self) -> int:
        return sum(len(lane.returned) for lane, _ in self._lanes)


class Open:
    """Messages have their times, whatever the answers do; what the server does not allow yet keeps its time."""

    def __init__(self, lanes: Sequence[Lane], times: Iterator[float]) -> None:
        """Times are seconds on the machine's monotonic clock, ascending and without an end."""
        self.late = Histogram()
        self._lanes = lanes
        self._times = times
        self._next = next(times)
        self._held: deque[tuple[int, float]] = deque()
        self._number = 0
        self._lane = 0

    def turn(self, now: float, end: float) -> float:
        while self._next <= now and self._next < end:
            self._held.append((self._number, self._next))
            self._number += 1
            self._next = next(self._times)
        for lane in self._lanes:
            if lane.returned:
                self._held.extendleft(reversed(lane.returned))
                lane.returned.clear()
        used = set()
        while self._held and (lane_ := self._roomy()) is not None:
            number, meant = self._held.popleft()
            lane_.send(number, meant)
            self.late.add(int((now - meant) * 1e9))
            used.add(lane_)
        for lane in used:
            lane.flush()
        return min(self._next, end) if now < end else math.inf

    def _roomy(self) -> Lane | None:
        """The next lane in turn that has room."""
        for _ in self._lanes:
            self._lane = (self._lane + 1) % len(self._lanes)
            if self._lanes[self._lane].has_room:
                return self._lanes[self._lane]
        return None

    @property
    def held(self) -> int:
        return len(self._held) + sum(len(lane.returned) for lane in self._lanes)


def evenly(start: float, rate: float) -> Iterator[float]:
    """So many times a second, all as far apart."""
    number = 0
    while True:
        yield start + number / rate
        number += 1


def at_random(start: float, rate: float, seed: int = 0) -> Iterator[float]:
    """So many times a second on average, as callers come who know nothing of each other (a Poisson process)."""
    source = random.Random(seed)
    while True:
        start += source.expovariate(rate)
        yield start


def run(lanes: Sequence[Lane], sender: Sender, start: float, times: Times) -> Outcome:
    """Keep the load up from `start` on the machine's monotonic clock; return when all is answered or lost."""
    outcome = Outcome()
    begin = start + times.warm_up
    end = begin + times.seconds
    cpu_at_begin = cpu_at_end = None
    with _selector(lanes) as selector:
        while (now := time.monotonic()) < end + times.patience:
            if cpu_at_begin is None and now >= begin:
                cpu_at_begin, sender.late = time.process_time(), Histogram()
            if cpu_at_end is None and now >= end:
                cpu_at_end = time.process_time()
            if now >= end and not sender.held and not any(lane.under_way for lane in lanes):
                break
            try:
                due = sender.turn(now, end)
                for answer in _answers(lanes, selector, min(due - time.monotonic(), POLL_SECONDS)):
                    _count(outcome, answer, begin, end)
            except ConnectionEnded as error:
                outcome.note(Fault("connection ended", str(error)))
                break
    lost = sender.held + sum(lane.under_way for lane in lanes)
    if lost:
        outcome.note(Fault(LOST, f"not answered within {times.patience:g} s of the end"), lost)
    elif not outcome.faults:
        for lane in lanes:
            if (fault := lane.finish(times.patience)) is not None:
                outcome.note(fault)
    outcome.cpu_seconds = (cpu_at_end or time.process_time()) - (cpu_at_begin or 0.0)
    outcome.late = sender.late
    return outcome


def _selector(lanes: Sequence[Lane]) -> selectors.BaseSelector:
    selector = selectors.SelectSelector() if len(lanes) <= LANES_TO_SELECT else selectors.DefaultSelector()
    for lane in lanes:
        selector.register(lane, selectors.EVENT_READ)
    return selector


def _answers(lanes: Sequence[Lane], selector: selectors.BaseSelector, wait: float) -> Iterator[Answer]:
    """Wait for something to come, or for room in a socket; what has been answered."""
    for lane in lanes:
        if lane.wants_to_write:
            lane.flush()
            wait = min(wait, BLOCKED_SECONDS)
    for key, _ in selector.select(max(wait, 0)):
        lane: Lane = key.fileobj  # type: ignore[no-redef]
        yield from lane.exchange()


def _count(outcome: Outcome, answer: Answer, begin: float, end: float) -> None:
    if answer.fault is not None:
        outcome.note(answer.fault)
        return
    outcome.all_answered += 1
    outcome.answered += begin <= answer.at < end
    if begin <= answer.meant < end:
        outcome.latencies.add(int((answer.at - answer.meant) * 1e9))
