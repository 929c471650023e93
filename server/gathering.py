"""When a batch waits for more items: two rules, by what the transport knows of those that are about to come.

In Python the engine is hardly ever busy: a call costs the event loop several
times what its image costs the network, so that calls would be computed one by
one however many there are. Where the transport can tell what it has taken in,
nothing is waited for but that (`ByTurns`); where it cannot, a batch now and then
looks whether company pays (`ByLooks`). docs/design.md has the figures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Protocol

ENOUGH_ITEMS = 32
"""So many gathered items are worth no more waiting: larger batches make an image hardly cheaper."""

MANY_COMING = 8
"""So many rows that are about to come are worth a batch: fewer are computed sooner one by one than they are queued."""

MOST_TURNS = 4
"""Of the event loop, which a batch waits for what has been taken in."""

FEW_ITEMS = 8
"""Batches that gather fewer by a look are not worth waiting for: such callers are computed as they come."""

QUIET_SECONDS = 0.002
"""After so long without a new item, none is on its way."""

MOST_WAITS = 2
"""A batch waits so many times for QUIET_SECONDS, however many items come meanwhile: those of callers in step are here
by then, and those that come at random would be waited for in vain."""

LOOK_EVERY = 32
"""One in so many batches gathers without knowing whether it pays."""

LOOK_AT_LEAST = 512
"""Looks that find few become rarer, down to one in so many batches: each costs QUIET_SECONDS."""

PAUSE_SECONDS = 0.01
"""Items that come after a longer pause come alone, until a batch shows otherwise."""

ROUND_TRIP_SECONDS = 0.00015
"""An item that comes sooner than this after the last answer is not from the caller who got that: there are several."""


class Queue(Protocol):
    """As much of a batcher as a rule needs."""

    @property
    def items(self) -> int:
        """How many wait."""

    def has(self, items: int) -> bool:
        """Whether so many wait, or for another reason no more are to be waited for."""

    async def wait_for(self, items: int, seconds: float) -> None:
        """Wait until `has`, for so long at most."""


class Gathering:
    """A rule; this one waits for nothing."""

    @property
    def is_expecting(self) -> bool:
        """Whether the next batch is to wait for more than what is there."""
        return False

    def may_run_now(self, rows: int) -> bool:
        """Whether an item that comes now, and finds none before it, is computed by itself at once."""
        return True

    def ran_now(self) -> None:
        """One was."""

    def first_came(self) -> None:
        """The first item of the next batch is here."""

    def was_idle(self, seconds: float) -> None:
        """There was none for so long."""

    async def gather(self, queue: Queue, looks_pay: bool) -> None:
        """Wait until a batch is to be cut; `looks_pay` says whether waiting without a reason may be tried."""

    def was_cut(self, items: int) -> None:
        """A batch of so many was."""

    def was_computed(self) -> None:
        """Its answers are there."""


class Arrivals:
    """Counts the tasks for which images were read, and which have not had their turn since."""

    def __init__(self, methods: Iterable[str] = ()) -> None:
        """`methods` of gRPC, `package.Service/Method`, are those with images; all other calls are not counted."""
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._paths = {f"/{method}".encode() for method in methods}

    def of_call(self, path: bytes) -> Arrivals | None:
        """These, if a call of the path is counted."""
        return self if path in self._paths else None

    def count_one(self) -> None:
        """To be called right before a task is made or woken: the loop keeps that order."""
        self.count += 1
        self._loop.call_soon(self._has_its_turn)

    def _has_its_turn(self) -> None:
        self.count -= 1


class ByTurns(Gathering):
    """For a transport that reads all that has come in one turn of the event loop, and says for how many tasks.

    Nothing waits for a clock: what has been read is here after a turn or two.
    """

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals

    def may_run_now(self, rows: int) -> bool:
        return self._arrivals.count * rows < MANY_COMING

    async def gather(self, queue: Queue, looks_pay: bool) -> None:
        for _ in range(MOST_TURNS):
            if queue.has(ENOUGH_ITEMS):
                return
            await asyncio.sleep(0)
            if not self._arrivals.count:
                return


class ByLooks(Gathering):
    """For a transport that takes in one item in each turn of the event loop, and cannot tell what is behind it.

    Where a batch had many items, the next one waits for as many; and one in
    LOOK_EVERY batches does so to see, if there is a sign of several callers.
    """

    def __init__(self, company: Callable[[], bool]) -> None:
        """`company` tells whether more items than those here are known to be coming."""
        self._company = company
        self._expected = 1  # items that the next batch waits for; with 1, it takes what is there
        self._since_look = 0  # batches
        self._look_every = LOOK_EVERY
        self._in_company = False  # the first item of the next batch
        self._computed = 0.0  # when the last batch was

    @property
    def is_expecting(self) -> bool:
        return self._expected > 1

    def may_run_now(self, rows: int) -> bool:
        if self._expected > 1:
            return False
        return self._since_look < self._look_every or not self._several_callers()  # else see how many there are

    def ran_now(self) -> None:
        self._since_look += 1

    def first_came(self) -> None:
        self._in_company = self._several_callers()

    def was_idle(self, seconds: float) -> None:
        if seconds > PAUSE_SECONDS:  # the company that the last batch had means nothing
            self._expected = 1

    async def gather(self, queue: Queue, looks_pay: bool) -> None:
        self._since_look += 1
        expected = min(self._expected, ENOUGH_ITEMS)
        looks = self._since_look > self._look_every and self._in_company and looks_pay
        if looks:
            self._since_look = 0
            expected = ENOUGH_ITEMS
        if expected == 1:
            return
        for _ in range(MOST_WAITS):
            before = queue.items
            if queue.has(expected):
                break
            await queue.wait_for(expected, QUIET_SECONDS)
            if queue.items <= before:
                break
        if looks:
            found = queue.items >= FEW_ITEMS
            self._look_every = LOOK_EVERY if found else min(2 * self._look_every, LOOK_AT_LEAST)

    def was_cut(self, items: int) -> None:
        self._expected = items if items >= FEW_ITEMS else 1

    def was_computed(self) -> None:
        self._computed = time.monotonic()

    def _several_callers(self) -> bool:
        """Whether an item that comes now shows that there is more than one caller."""
        return self._company() or time.monotonic() - self._computed < ROUND_TRIP_SECONDS
