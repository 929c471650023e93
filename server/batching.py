"""Dynamic batching: many small submissions, few runs.

Generic in what is batched: an item is a block of rows (anything with a length)
and so is a result. Knows neither gRPC nor torch nor NumPy, only asyncio.

The rules, each with a test of its own in `tests/server/test_batching.py`:

- Work-conserving: a free engine takes all that waits, up to `max_batch_size`
  rows, and waits for no clock. A lone item runs at once. After a batch of
  several, the event loop first takes in what has already reached the process.
- A window (`max_wait_ms`) is opt-in, opens with the first item and closes when
  full.
- A queue entry owns its future. Entries whose caller is gone or whose deadline
  has passed leave the queue and are not computed.
- A full queue refuses at once.
- The rows of each result are counted; a batch that fails, or answers with the
  wrong number of rows, fails its own callers and nobody else.
- Closing refuses new items and finishes those that wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

logger = logging.getLogger(__name__)

TURNS_PER_ITEM, MAX_QUIET_TURNS, MAX_TURNS = 4, 32, 128
"""How long a batch gathers, in turns of the event loop: until so many for each item of the last batch, at most so many,
brought no new item, and never longer than so many (docs/design.md has the figures)."""

PAUSE_SECONDS = 0.01
"""Items that come after a longer pause come alone, until a batch shows otherwise."""

Item = TypeVar("Item", bound=Sized)
Result = TypeVar("Result", bound=Sized)


class QueueFull(Exception):
    """There is no room for these rows now."""

    def __init__(self, rows: int, queued: int, limit: int) -> None:
        super().__init__(f"the queue holds {queued} of at most {limit} rows: no room for {rows} more")


class QueueClosed(Exception):
    """The batcher takes nothing more."""


class DeadlineExpired(Exception):
    """The deadline passed while the item waited; it was not computed."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[Result]):
    """A result and how it was computed."""

    result: Result
    batch_rows: int
    """Rows in the batch that this result was part of."""
    queue_seconds: float
    """From submission to the start of the batch."""
    compute_seconds: float
    """How long `run_batch` took."""


class _Entry(Generic[Item, Result]):
    __slots__ = ("arrived", "deadline", "future", "item", "rows")

    def __init__(
        self, item: Item, arrived: float, deadline: float | None, future: asyncio.Future[Answer[Result]]
    ) -> None:
        self.item = item
        self.rows = len(item)
        self.arrived = arrived
        self.deadline = deadline
        self.future = future


class DynamicBatcher(Generic[Item, Result]):
    """Gathers items and runs them in batches, one batch at a time.

    An async context manager that belongs to the event loop in which it is
    entered; `enqueue` and `submit` are called from that loop.

    Args:
        run_batch: takes a list of items and returns as many results, the i-th
            with as many rows as the i-th item. A plain function.
        max_batch_size: the most rows in a batch; also the most in an item.
        max_wait_ms: how long a first item waits for others, in milliseconds.
        max_queue_size: the most rows that wait.
        inline_size: batches of up to this many rows run on the event loop
            itself, larger ones in a thread. A thread costs more than a small
            batch takes, but leaves the loop free meanwhile.
    """

    def __init__(
        self,
        run_batch: Callable[[list[Item]], Sequence[Result]],
        *,
        max_batch_size: int,
        max_wait_ms: float = 0,
        max_queue_size: int,
        inline_size: int = 0,
    ) -> None:
        self._run_batch = run_batch
        self._max_batch_size = max_batch_size
        self._max_wait_seconds = max_wait_ms / 1000
        self._max_queue_size = max_queue_size
        self._inline_size = inline_size
        self._queue: OrderedDict[_Entry[Item, Result], None] = OrderedDict()
        self._queued_rows = 0
        self._last_items = 1  # of the last batch
        self._closed = False
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch")
        self._task: asyncio.Task[None] | None = None

    @property
    def queued_rows(self) -> int:
        """Rows that wait now, without those of the running batch."""
        return self._queued_rows

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="dynamic-batcher")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def hurry(self) -> None:
        """Open no more windows, and close the one that is open."""
        self._max_wait_seconds = 0
        self._arrived.set()

    async def close(self) -> None:
        """Refuse new items, finish those that wait, then end."""
        self._closed = True
        self._arrived.set()
        if self._task is not None:
            await asyncio.shield(self._task)  # who waits here may be cancelled, the callers' answers not
        self._thread.shutdown(wait=False)

    def enqueue(self, items: Sequence[Item], *, deadline: float | None = None) -> list[asyncio.Future[Answer[Result]]]:
        """Take all the items or none; return a future for each, in order.

        Cancelling a future takes its item out of the queue. `deadline` is a
        time of the event loop's clock.

        Raises:
            QueueFull: there is no room for all of them.
            QueueClosed: after `close`.
            ValueError: an item has no rows, or more than `max_batch_size`.
        """
        if self._closed:
            raise QueueClosed("the batcher is closed")
        rows = 0
        for item in items:
            if not 1 <= len(item) <= self._max_batch_size:
                raise ValueError(f"an item has 1 to {self._max_batch_size} rows, this one has {len(item)}")
            rows += len(item)
        if self._queued_rows + rows > self._max_queue_size:
            raise QueueFull(rows, self._queued_rows, self._max_queue_size)
        loop = asyncio.get_running_loop()
        now = loop.time()
        futures = []
        for item in items:
            entry = _Entry[Item, Result](item, now, deadline, loop.create_future())
            self._queue[entry] = None
            entry.future.add_done_callback(lambda _, entry=entry: self._leave(entry))  # type: ignore[misc]
            futures.append(entry.future)
        self._queued_rows += rows
        self._arrived.set()
        return futures

    async def submit(self, item: Item, *, deadline: float | None = None) -> Answer[Result]:
        """Enqueue one item and wait for its answer.

        Raises:
            QueueFull, QueueClosed, ValueError: as `enqueue`.
            DeadlineExpired: the deadline passed before the item's batch began.
            Exception: what `run_batch` raised for the item's batch.
        """
        (future,) = self.enqueue([item], deadline=deadline)
        return await future

    def _leave(self, entry: _Entry[Item, Result]) -> bool:
        """Take an entry out of the queue; False if it is no longer there."""
        if entry not in self._queue:
            return False
        del self._queue[entry]
        self._queued_rows -= entry.rows
        return True

    async def _run(self) -> None:
        while True:
            if not self._queue:
                if self._closed:
                    return
                await self._idle()
                continue
            await self._take_in_arrivals()
            await self._keep_window_open()
            batch = self._cut()
            if batch:
                self._last_items = len(batch)
                await self._answer(batch)
                # Let the callers take their answers before the next batch is cut.
                await asyncio.sleep(0)

    async def _idle(self) -> None:
        """Wait for an item; after a pause, the company that the last batch had means nothing."""
        self._arrived.clear()
        idle_since = time.monotonic()
        await self._arrived.wait()
        if time.monotonic() - idle_since > PAUSE_SECONDS:
            self._last_items = 1

    async def _take_in_arrivals(self) -> None:
        """While items come together, let the loop turn until no more come.

        Calls that have reached the process need a few turns of the event loop
        to get here, and those turns have to be made anyway: before the batch
        they make it larger, after it they make another one.
        """
        if self._last_items == 1:
            return
        quiet_turns = 0
        for _ in range(MAX_TURNS):
            before = self._queued_rows
            if before >= self._max_batch_size:
                return
            await asyncio.sleep(0)
            quiet_turns = 0 if self._queued_rows > before else quiet_turns + 1
            if quiet_turns >= min(TURNS_PER_ITEM * self._last_items, MAX_QUIET_TURNS):
                return

    async def _keep_window_open(self) -> None:
        """Wait until the first item is `max_wait_ms` old, an item has half of its time left, or the batch is full."""
        loop = asyncio.get_running_loop()
        while self._max_wait_seconds and self._queue and not self._closed and self._queued_rows < self._max_batch_size:
            closes = next(iter(self._queue)).arrived + self._max_wait_seconds
            for entry in self._queue:
                if entry.deadline is not None:
                    closes = min(closes, (entry.arrived + entry.deadline) / 2)
            remaining = closes - loop.time()
            if remaining <= 0:
                return
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):  # the first item may be another one by now
                async with asyncio.timeout(remaining):
                    await self._arrived.wait()

    def _cut(self) -> list[_Entry[Item, Result]]:
        """Take the next batch out of the queue, oldest first, leaving out the dead."""
        now = asyncio.get_running_loop().time()
        batch: list[_Entry[Item, Result]] = []
        rows = 0
        while self._queue:
            entry = next(iter(self._queue))
            if entry.future.done():
                self._leave(entry)
            elif entry.deadline is not None and entry.deadline <= now:
                self._leave(entry)
                entry.future.set_exception(DeadlineExpired("the deadline passed while the request waited in the queue"))
            elif rows + entry.rows > self._max_batch_size:
                break
            else:
                self._leave(entry)
                batch.append(entry)
                rows += entry.rows
        return batch

    async def _answer(self, batch: list[_Entry[Item, Result]]) -> None:
        """Run a batch and give each caller that still waits its own rows."""
        loop = asyncio.get_running_loop()
        rows = sum(entry.rows for entry in batch)
        items = [entry.item for entry in batch]
        start = loop.time()
        try:
            if rows <= self._inline_size:
                results, compute_seconds = self._run_timed(items)
            else:
                results, compute_seconds = await loop.run_in_executor(self._thread, self._run_timed, items)
            _check_rows(items, results)
        except Exception as error:
            waiting = [entry for entry in batch if not entry.future.done()]
            for entry in waiting:
                entry.future.set_exception(error)
            if not waiting:
                logger.exception("a batch of %d rows failed, and nobody waits for it any more", rows)
            return
        for entry, result in zip(batch, results, strict=True):
            if not entry.future.done():
                entry.future.set_result(Answer(result, rows, start - entry.arrived, compute_seconds))

    def _run_timed(self, items: list[Item]) -> tuple[Sequence[Result], float]:
        start = time.perf_counter()
        try:
            results = self._run_batch(items)
        except StopIteration as error:  # which no future can hold
            raise RuntimeError("run_batch raised StopIteration") from error
        return results, time.perf_counter() - start


def _check_rows(items: Sequence[Sized], results: Sequence[Sized]) -> None:
    expected, got = [len(item) for item in items], [len(result) for result in results]
    if expected != got:
        raise RuntimeError(f"run_batch was given items of {expected} rows and returned results of {got} rows")
