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
UNSENT = "not sent"
POLL_SECONDS = 0.05
BLOCKED_SECONDS = 0.001
"""How soon to try again to send what the socket did not take."""
LANES_TO_SELECT = 64
"""So many are waited for by select, to the microsecond; more by epoll, to the millisecond."""
MESSAGES_A_TURN = 64
"""An open loop reads what has come after so many, however many are late."""
MOST_UNDER_WAY = 1 << 16
"""Of an open loop, on a connection: what is unanswered takes memory. More wait and keep their times."""


class TooFewCallers(Exception):
    """A connection cannot hold its share of them any more."""


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
    sent_again: int = 0
    """Messages that the server did not begin with."""
    cpu_seconds: float = 0.0
    """Of this process, while it was measured."""
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first fault of each kind."""

    def note(self, fault: Fault, times: int = 1) -> None:
        self.faults[fault.what] += times
        self.examples.setdefault(fault.what, fault.detail)

    def count(self, answer: Answer, begin: float, end: float) -> None:
        """An answer, of a run that is measured between these times."""
        if answer.fault is not None:
            self.note(answer.fault)
            return
        self.all_answered += 1
        self.answered += begin <= answer.at < end
        if begin <= answer.meant < end:
            self.latencies.add(int((answer.at - answer.meant) * 1e9))


class Sender(Protocol):
    """Decides what is sent when."""

    late: Histogram
    sent_again: int
    """Messages that the server did not begin with."""

    def turn(self, now: float, end: float) -> float:
        """Put into the lanes what is to be sent; return when the next turn is due at the latest.

        Raises:
            ConnectionEnded: by the server, which takes no more messages on one of the connections.
            TooFewCallers: it does not allow as many as there are to be.
        """

    @property
    def refused(self) -> int:
        """Messages that the server did not begin with, and that are not sent again yet."""

    def unsent(self, end: float) -> Fault | None:
        """Why messages that were meant to be sent before the end are not, when it has come."""

    def count_unsent(self, end: float) -> int:
        """How many these are, about."""


class Closed:
    """So many messages are unanswered at any time; each lane has its share of them, so that callers stay on theirs."""

    def __init__(self, lanes: Sequence[Lane], callers: int) -> None:
        self.late = Histogram()
        self.sent_again = 0
        self._lanes = [
            (lane, callers // len(lanes) + (number < callers % len(lanes))) for number, lane in enumerate(lanes)
        ]
        self._number = 0

    def turn(self, now: float, end: float) -> float:
        for lane, share in self._lanes:
            if lane.most < share and (now < end or lane.returned):
                _require_open(lane)
                raise TooFewCallers(f"the server now allows {lane.most} on a connection that is to have {share}")
            sent = False
            while lane.under_way < share and lane.has_room:
                if lane.returned:
                    lane.send(*lane.returned.popleft())
                    self.sent_again += 1
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
    def refused(self) -> int:
        return sum(len(lane.returned) for lane, _ in self._lanes)

    def unsent(self, end: float) -> Fault | None:
        return None

    def count_unsent(self, end: float) -> int:
        return 0


class Open:
    """Messages have their times, whatever the answers do; what the server does not allow yet keeps its time.

    Times are drawn when a message can be sent: a backlog takes no memory.
    """

    def __init__(self, lanes: Sequence[Lane], times: Iterator[float]) -> None:
        """Times are seconds on the machine's monotonic clock, ascending and without an end."""
        self.late = Histogram()
        self._lanes = lanes
        self._times = times
        self._first = self._next = next(times)
        self._again: deque[tuple[int, float]] = deque()
        self.sent_again = 0
        self._number = 0
        self._lane = 0
        self._full_turns = 0  # that ended though more could have been sent: the generator is the limit
        self._blocked_turns = 0  # or for want of room: the server is

    def turn(self, now: float, end: float) -> float:
        for lane in self._lanes:
            if not lane.most and now < end:
                _require_open(lane)
            if lane.returned:
                self._again += lane.returned
                lane.returned.clear()
        sent: dict[Lane, list[float]] = {}
        left = MESSAGES_A_TURN
        waits = self._waits(now, end)
        while waits and left and (lane_ := self._roomy()) is not None:
            left -= 1
            number, meant = self._take()
            lane_.send(number, meant)
            sent.setdefault(lane_, []).append(meant)
            waits = self._waits(now, end)
        for lane, all_meant in sent.items():
            lane.flush()
            at = time.monotonic()
            for meant in all_meant:
                self.late.add(int((at - meant) * 1e9))
        if waits and not left:
            self._full_turns += 1
            return now
        self._blocked_turns += waits
        if waits or now >= end:  # for answers
            return end if now < end else math.inf
        return min(self._next, end)

    def _waits(self, now: float, end: float) -> bool:
        """Whether there is a message that is meant to be sent by now."""
        return bool(self._again) or (self._next <= now and self._next < end)

    def _take(self) -> tuple[int, float]:
        """The number of the next message, and when it was meant to be sent."""
        if self._again:
            self.sent_again += 1
            return self._again.popleft()
        number, meant = self._number, self._next
        self._number += 1
        self._next = next(self._times)
        return number, meant

    def _roomy(self) -> Lane | None:
        """The next lane in turn that has room."""
        for _ in self._lanes:
            self._lane = (self._lane + 1) % len(self._lanes)
            lane = self._lanes[self._lane]
            if lane.has_room and lane.under_way < MOST_UNDER_WAY and not lane.is_clogged:
                return lane
        return None

    @property
    def refused(self) -> int:
        return len(self._again) + sum(len(lane.returned) for lane in self._lanes)

    def unsent(self, end: float) -> Fault | None:
        if self._next >= end:
            return None
        if self._blocked_turns > self._full_turns:
            return Fault(UNSENT, "the server took no more messages at a time")
        return Fault(UNSENT, "the generator is the limit: it cannot send so many a second")

    def count_unsent(self, end: float) -> int:
        each = (self._next - self._first) / self._number if self._number else 0  # seconds
        return 1 + int((end - self._next) / each) if each else 1


def _require_open(lane: Lane) -> None:
    """Raise ConnectionEnded if it takes no more messages."""
    if lane.farewell:
        raise ConnectionEnded(lane.farewell)


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
        last = end + times.patience
        while (now := time.monotonic()) < last or _waits_for_late_ones(lanes, sender, now, end, times.patience):
            if cpu_at_begin is None and now >= begin:
                cpu_at_begin, sender.late = time.thread_time(), Histogram()
            if cpu_at_end is None and now >= end:
                cpu_at_end = time.thread_time()
            try:
                is_idle = now >= end and not any(lane.under_way for lane in lanes)
                if is_idle and not sender.refused and sender.unsent(end) is None:
                    break
                due = sender.turn(now, end) if now < last else math.inf
                for answer in _answers(lanes, selector, min(due - time.monotonic(), POLL_SECONDS)):
                    outcome.count(answer, begin, end)
            except ConnectionEnded as error:
                outcome.note(Fault("connection ended", str(error)))
                break
            except TooFewCallers as error:
                outcome.note(Fault("too few callers", str(error)))
                break
        else:
            _note_missing(outcome, lanes, sender, end, times.patience)
    if not outcome.faults:
        for lane in lanes:
            try:
                fault = lane.finish(times.patience)
            except ConnectionEnded as error:
                fault = Fault("connection ended", str(error))
            if fault is not None:
                outcome.note(fault)
    if cpu_at_begin is not None:
        outcome.cpu_seconds = (cpu_at_end or time.thread_time()) - cpu_at_begin
    outcome.late = sender.late
    outcome.sent_again = sender.sent_again
    return outcome


def _waits_for_late_ones(lanes: Sequence[Lane], sender: Sender, now: float, end: float, patience: float) -> bool:
    """Whether messages were sent to the very end, as there were too many: their answers have some time, too."""
    return now < end + 2 * patience and sender.unsent(end) is not None and any(lane.under_way for lane in lanes)


def _note_missing(outcome: Outcome, lanes: Sequence[Lane], sender: Sender, end: float, patience: float) -> None:
    """What is not answered, and what was not even sent, when patience is over."""
    if lost := sender.refused + sum(lane.under_way for lane in lanes):
        outcome.note(Fault(LOST, f"not answered within {patience:g} s of the end"), lost)
    if (fault := sender.unsent(end)) is not None:
        outcome.note(fault, sender.count_unsent(end))


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
