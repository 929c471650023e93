"""Dynamic batching: many small submissions, few runs.

Generic in what is batched: an item is a block of rows (anything with a length)
and so is a result. Knows neither gRPC nor torch nor NumPy, only asyncio.

The rules, each with a test of its own in `tests/server/test_batching.py`:

- Work-conserving: a free engine takes all that waits, up to `max_batch_size`
  rows, and waits for no clock. A lone item runs at once. For what is about to
  come it waits by one of the rules in `server/gathering.py`.
- Fair: every request, and every stream, is a flow of its own, and requests are
  finished in the order in which they would be if all flows were computed side
  by side, row by row. The hundredth part of a bulk request waits for a single
  image that came later, and never the other way round for long; of two alike,
  the first is finished first, so that its caller can send the next meanwhile.
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
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from server.gathering import ENOUGH_ITEMS, Arrivals, ByLooks, ByTurns, Gathering
from server.observer import Observer

logger = logging.getLogger(__name__)

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


class Flow:
    """Items that share one part of the engine, such as the frames of a stream.

    `finish` is the virtual time at which the last of its items would be done if
    all flows were computed side by side.
    """

    __slots__ = ("finish", "waiting")

    def __init__(self) -> None:
        self.finish = 0.0
        self.waiting = 0  # items in the queue


class _Entry(Generic[Item, Result]):
    __slots__ = ("arrived", "deadline", "entered", "flow", "future", "item", "order", "queued", "rows", "token")

    def __init__(
        self,
        item: Item,
        arrived: float,
        deadline: float | None,
        future: asyncio.Future[Answer[Result]],
        order: tuple[float, int],
        flow: Flow,
        token: Any,
    ) -> None:
        self.item = item
        self.rows = len(item)
        self.arrived = arrived  # on the loop's clock, which may tick in milliseconds
        self.entered = time.monotonic()
        self.deadline = deadline
        self.future = future
        self.order = order  # the lowest is computed first; no two are equal
        self.flow = flow
        self.queued = True
        self.token = token  # the observer's

    def __lt__(self, other: _Entry[Item, Result]) -> bool:
        return self.order < other.order


@dataclass(slots=True)
class _Cut(Generic[Item, Result]):
    """What was taken out of the queue."""

    batch: list[_Entry[Item, Result]] = field(default_factory=list)
    dead: list[tuple[_Entry[Item, Result], str]] = field(default_factory=list)
    """Those that are not computed, and why."""
    queued_rows: int = 0
    """Rows that wait after it."""


@dataclass(slots=True)
class _Computed(Generic[Item, Result]):
    """A batch and what came of it."""

    batch: list[_Entry[Item, Result]]
    results: Sequence[Result]
    queue_seconds: list[float]
    compute_seconds: float
    error: BaseException | None


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
            itself, and of many items of one row larger ones, too; others in a
            thread. A thread costs more than a small batch takes, but leaves
            the loop free meanwhile. With 0, all batches run in the thread.
        arrivals: of items that are about to come in this turn of the event
            loop; None where nobody knows.
        company: tells, where nobody knows how many, whether more items than
            those here are known to be coming.
        observer: is told what happens.
    """

    def __init__(
        self,
        run_batch: Callable[[list[Item]], Sequence[Result]],
        *,
        max_batch_size: int,
        max_wait_ms: float = 0,
        max_queue_size: int,
        inline_size: int = 0,
        arrivals: Arrivals | None = None,
        company: Callable[[], bool] = lambda: False,
        observer: Observer | None = None,
    ) -> None:
        self._run_batch = run_batch
        self._max_batch_size = max_batch_size
        self._max_wait_seconds = max_wait_ms / 1000
        self._max_queue_size = max_queue_size
        self.inline_size = inline_size
        """May be set at any time, for the batches from then on."""
        self._gathering: Gathering = ByLooks(company) if arrivals is None else ByTurns(arrivals)
        self._observer = observer or Observer()
        self._queue: list[_Entry[Item, Result]] = []  # a heap; those that left it otherwise are still in it
        self._entries = 0  # in the queue, without those that left it
        self._numbers = itertools.count()
        self._now = 0.0  # virtual time: the rows that each flow would have had computed, side by side
        self._flows = 0  # that have something in the queue
        self._queued_rows = 0
        self._wake_at = 1  # items; what waits for items is woken by no fewer
        self._hurried = False
        self._busy_since: float | None = None
        self._is_computing = False  # from the loop's point of view: one batch, or several in the thread
        self._clock = 0.0  # of the loop, less the monotonic one
        self._lock = threading.Lock()  # over the queue, its counts and virtual time: the thread cuts, too
        self._seconds_per_row = 0.0  # of recent batches
        self._closed = False
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch")
        self._loop: asyncio.AbstractEventLoop  # from when it is entered; to ask for it takes CPython 3.11 a system call
        self._task: asyncio.Task[None] | None = None

    # A `server.gathering.Queue`

    @property
    def items(self) -> int:
        """How many wait now."""
        return self._entries

    def has(self, items: int) -> bool:
        """Whether so many items wait, or as many rows as a batch takes, or nothing is to be waited for."""
        return self._entries >= items or self._queued_rows >= self._max_batch_size or self._hurried

    async def wait_for(self, items: int, seconds: float) -> None:
        """Wait until `has`, for so long at most."""
        self._wake_at = items
        self._arrived.clear()
        timer = self._loop.call_later(seconds, self._arrived.set)
        await self._arrived.wait()
        timer.cancel()
        self._wake_at = 1

    @property
    def queued_rows(self) -> int:
        """Rows that wait now, without those of the running batch."""
        return self._queued_rows

    @property
    def busy_seconds(self) -> float:
        """How long the running batch has been computed; 0 when none is."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def backlog_seconds(self) -> float:
        """About how long the rows that wait will take, going by recent batches."""
        return self._queued_rows * self._seconds_per_row

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run(), name="dynamic-batcher")
        self._task.add_done_callback(self._ended_early)
        return self

    def _ended_early(self, task: asyncio.Task[None]) -> None:
        """What must not happen: let nobody wait for a loop that is gone."""
        if task.cancelled() or task.exception() is None:
            return
        logger.critical("the batcher has a fault and takes nothing more", exc_info=task.exception())
        self._closed = True
        for entry in self._queue:
            if not entry.future.done():
                entry.future.set_exception(QueueClosed("the batcher has a fault"))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def hurry(self) -> None:
        """Open no more windows, and close the one that is open."""
        self._max_wait_seconds = 0
        self._hurried = True
        self._arrived.set()

    async def close(self) -> None:
        """Refuse new items, finish those that wait, then end."""
        self._closed = self._hurried = True
        self._arrived.set()
        if self._task is not None:
            await asyncio.shield(self._task)  # who waits here may be cancelled, the callers' answers not
        self._thread.shutdown(wait=False)

    def run_now(self, item: Item) -> Answer[Result] | None:
        """Compute an item on the spot if nobody else is about; else None, and it is to be enqueued.

        What a lone caller would otherwise wait for is its turn of the event
        loop, twice.

        Raises:
            Exception: what `run_batch` raised.
        """
        rows = len(item)
        if rows > min(self.inline_size, self._max_batch_size) or self._max_wait_seconds or self._closed:
            return None
        if self._entries or self._is_computing or self._task is None or not self._gathering.may_run_now(rows):
            return None
        self._gathering.ran_now()
        token = self._observer.queued(rows)
        try:
            (result,), compute_seconds = self._run_timed([item])
            _check_rows([item], [result])
        except Exception:
            self._observer.batch_ended(rows, [token], [0.0], 0.0, failed=True)
            raise
        finally:
            self._gathering.was_computed()
        self._observer.batch_ended(rows, [token], [0.0], compute_seconds, failed=False)
        return Answer(result, rows, 0.0, compute_seconds)

    def enqueue(
        self, items: Sequence[Item], *, deadline: float | None = None, flow: Flow | None = None
    ) -> list[asyncio.Future[Answer[Result]]]:
        """Take all the items or none; return a future for each, in order.

        Cancelling a future takes its item out of the queue. `deadline` is a
        time of the event loop's clock. Without a `flow`, the items are one.

        Raises:
            QueueFull: there is no room for all of them.
            QueueClosed: after `close`.
            ValueError: an item has no rows, or more than `max_batch_size`.
        """
        rows = 0
        for item in items:
            if not 1 <= len(item) <= self._max_batch_size:
                raise ValueError(f"an item has 1 to {self._max_batch_size} rows, this one has {len(item)}")
            rows += len(item)
        if self._closed:
            self._observer.rejected("closing", rows)
            raise QueueClosed("the batcher is closed")
        with self._lock:
            return self._take_in(items, rows, deadline, flow or Flow())

    def _take_in(
        self, items: Sequence[Item], rows: int, deadline: float | None, flow: Flow
    ) -> list[asyncio.Future[Answer[Result]]]:
        if self._queued_rows + rows > self._max_queue_size:
            self._observer.rejected("queue_full", rows)
            raise QueueFull(rows, self._queued_rows, self._max_queue_size)
        loop = self._loop
        now = loop.time()
        if not self._entries:
            self._gathering.first_came()
        flow.finish = max(self._now, flow.finish) + rows
        self._flows += not flow.waiting
        flow.waiting += len(items)
        futures = []
        for item in items:
            entry: _Entry[Item, Result] = _Entry(
                item,
                now,
                deadline,
                loop.create_future(),
                (flow.finish, next(self._numbers)),
                flow,
                self._observer.queued(len(item)),
            )
            heapq.heappush(self._queue, entry)
            entry.future.add_done_callback(lambda _, entry=entry: self._cancelled(entry))  # type: ignore[misc]
            futures.append(entry.future)
        self._entries += len(items)
        self._queued_rows += rows
        self._observer.queue_changed(self._queued_rows)
        if self._entries >= self._wake_at or self._queued_rows >= self._max_batch_size:
            self._arrived.set()
        return futures

    async def submit(self, item: Item, *, deadline: float | None = None, flow: Flow | None = None) -> Answer[Result]:
        """Enqueue one item and wait for its answer.

        Raises:
            QueueFull, QueueClosed, ValueError: as `enqueue`.
            DeadlineExpired: the deadline passed before the item's batch began.
            Exception: what `run_batch` raised for the item's batch.
        """
        (future,) = self.enqueue([item], deadline=deadline, flow=flow)
        return await future

    def _cancelled(self, entry: _Entry[Item, Result]) -> None:
        """Its caller is gone, unless it has left the queue before."""
        with self._lock:
            if not entry.queued:
                return
            self._leave(entry)
            rows = self._queued_rows
            if len(self._queue) > 2 * self._entries + 64:  # or the heap would keep what a flood left behind
                self._queue = [kept for kept in self._queue if kept.queued]
                heapq.heapify(self._queue)
        self._observer.queue_changed(rows)
        self._observer.dropped("cancelled", entry.rows)

    def _leave(self, entry: _Entry[Item, Result]) -> None:
        """Count an entry out of the queue."""
        entry.queued = False
        entry.flow.waiting -= 1
        self._flows -= not entry.flow.waiting
        self._entries -= 1
        self._queued_rows -= entry.rows

    async def _run(self) -> None:
        while True:
            if not self._entries:
                if self._closed:
                    return
                await self._idle()
                continue
            await self._gathering.gather(self, looks_pay=self.inline_size > 0)
            await self._keep_window_open()
            with self._lock:
                cut = self._cut(self._loop.time())
            self._tell(cut)
            if cut.batch:
                await self._answer(cut.batch)
                # Let the callers take their answers before the next batch is cut.
                await asyncio.sleep(0)

    async def _idle(self) -> None:
        """Wait for an item."""
        self._arrived.clear()
        idle_since = time.monotonic()
        await self._arrived.wait()
        self._gathering.was_idle(time.monotonic() - idle_since)

    async def _keep_window_open(self) -> None:
        """Wait until the first item is `max_wait_ms` old, an item has half of its time left, or the batch is full."""
        loop = self._loop
        while (
            self._max_wait_seconds and self._entries and not self._closed and self._queued_rows < self._max_batch_size
        ):
            waiting = [entry for entry in self._queue if entry.queued]
            closes = min(entry.arrived for entry in waiting) + self._max_wait_seconds
            for entry in waiting:
                if entry.deadline is not None:
                    closes = min(closes, (entry.arrived + entry.deadline) / 2)
            remaining = closes - loop.time()
            if remaining <= 0:
                return
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):  # the first item may be another one by now
                async with asyncio.timeout(remaining):
                    await self._arrived.wait()

    def _cut(self, now: float) -> _Cut[Item, Result]:
        """Take the next batch out of the queue, in the order of virtual time, and the dead; the lock is held.

        Weighted fair queueing (A. Demers, S. Keshav, S. Shenker, SIGCOMM 1989)
        with rows for bits, requests for packets, and items as parts of packets
        between which another one may go first: requests go in the order in
        which they would be done if the flows were computed side by side, and
        virtual time is how far that would be.
        """
        cut: _Cut[Item, Result] = _Cut()
        rows, flows, last = 0, self._flows, self._now
        while self._queue:
            entry = self._queue[0]
            if not entry.queued:
                pass  # it was cancelled
            elif entry.future.done():
                cut.dead.append((entry, "cancelled"))
            elif entry.deadline is not None and entry.deadline <= now:
                cut.dead.append((entry, "expired"))
            elif rows + entry.rows > self._max_batch_size:
                break
            else:
                cut.batch.append(entry)
                rows += entry.rows
                last = max(last, entry.order[0])
            heapq.heappop(self._queue)
            if entry.queued:
                self._leave(entry)
        # When all is done, it is as far as the last one: nobody pays later for what nobody else wanted.
        self._now = self._now + rows / max(flows, 1) if self._entries else last
        self._gathering.was_cut(len(cut.batch))
        cut.queued_rows = self._queued_rows
        return cut

    def _tell(self, cut: _Cut[Item, Result]) -> None:
        """On the loop: those who are not computed, and whoever watches, hear of it."""
        self._observer.queue_changed(cut.queued_rows)
        for entry, reason in cut.dead:
            self._observer.dropped(reason, entry.rows)
            if reason == "expired" and not entry.future.done():
                entry.future.set_exception(DeadlineExpired("the deadline passed while the request waited in the queue"))

    async def _answer(self, batch: list[_Entry[Item, Result]]) -> None:
        """Run a batch, and in the thread those behind it; give each caller that still waits its own rows."""
        loop = self._loop
        self._is_computing = True
        try:
            if self._is_for_the_loop(sum(entry.rows for entry in batch), len(batch)):
                computed = self._compute(batch)
                self._deliver(computed)
                if computed.error is not None and not isinstance(computed.error, Exception):
                    raise computed.error
            else:
                self._clock = loop.time() - time.monotonic()
                await loop.run_in_executor(self._thread, self._compute_on, batch, loop)
        finally:
            self._is_computing = False

    def _compute_on(self, batch: list[_Entry[Item, Result]], loop: asyncio.AbstractEventLoop) -> None:
        """In the thread: compute a batch, and go on as long as the next one is not one for the loop.

        The loop is busy with messages: an engine that waits for it between two
        batches stands still for a quarter of the time.
        """
        while True:
            computed = self._compute(batch)
            loop.call_soon_threadsafe(self._deliver, computed)
            if computed.error is not None and not isinstance(computed.error, Exception):
                raise computed.error
            with self._lock:
                if not self._goes_on():
                    return
                cut = self._cut(time.monotonic() + self._clock)
            loop.call_soon_threadsafe(self._tell, cut)
            if not cut.batch:
                return
            batch = cut.batch

    def _goes_on(self) -> bool:
        """Whether what waits is worth the thread, and there is nothing to wait for."""
        if self._is_for_the_loop(self._queued_rows, self._entries):
            return False
        return not self._gathering.is_expecting and not self._max_wait_seconds

    def _is_for_the_loop(self, rows: int, items: int) -> bool:
        """Whether the loop computes so much by itself.

        With hundreds of callers of an image each it is busy with their messages
        all the time: a thread would then do nothing but take turns with it.
        """
        return rows <= self.inline_size or (self.inline_size > 0 and rows == items >= ENOUGH_ITEMS)

    def _compute(self, batch: list[_Entry[Item, Result]]) -> _Computed[Item, Result]:
        items = [entry.item for entry in batch]
        self._busy_since = start = time.monotonic()
        waited = [start - entry.entered for entry in batch]
        try:
            results, seconds = self._run_timed(items)
            _check_rows(items, results)
        except BaseException as error:
            return _Computed(batch, (), waited, 0.0, error)
        finally:
            self._busy_since = None
        return _Computed(batch, results, waited, seconds, None)

    def _deliver(self, computed: _Computed[Item, Result]) -> None:
        """On the loop: callers get their rows, or the error."""
        self._gathering.was_computed()
        batch, seconds, error = computed.batch, computed.compute_seconds, computed.error
        rows = sum(entry.rows for entry in batch)
        tokens = [entry.token for entry in batch]
        if error is not None:
            self._observer.batch_ended(rows, tokens, computed.queue_seconds, 0.0, failed=True)
            waiting = [entry for entry in batch if not entry.future.done()]
            for entry in waiting:
                entry.future.set_exception(error)
            if not waiting:
                message = "a batch of %d rows failed, and nobody waits for it any more"
                logger.error(message, rows, exc_info=error)
            return
        self._seconds_per_row += (seconds / rows - self._seconds_per_row) / 8
        for entry, result, waited in zip(batch, computed.results, computed.queue_seconds, strict=True):
            if not entry.future.done():
                entry.future.set_result(Answer(result, rows, waited, seconds))
        self._observer.batch_ended(rows, tokens, computed.queue_seconds, seconds, failed=False)

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
