"""Every rule of the batcher, with lists of ints for blocks of rows and no model."""

from __future__ import annotations

import asyncio
import random
import selectors
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import server.gathering
from server.batching import (
    Answer,
    DeadlineExpired,
    DynamicBatcher,
    Flow,
    QueueClosed,
    QueueFull,
)
from server.gathering import ENOUGH_ITEMS, LOOK_AT_LEAST, LOOK_EVERY, MOST_WAITS, PAUSE_SECONDS, QUIET_SECONDS
from server.observer import Observer

Block = list[int]
Batcher = DynamicBatcher[Block, Block]
Run = Callable[[list[Block]], Sequence[Block]]

pytestmark = pytest.mark.usefixtures("no_stray_errors")


class Engine:
    """Answers [1, 2] with [10, 20], remembers its batches, and waits to be let go when held."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[Block]] = []
        self.threads: list[threading.Thread] = []
        self._held = held
        self._begun = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def __call__(self, items: list[Block]) -> list[Block]:
        self.batches.append(items)
        self.threads.append(threading.current_thread())
        self._begun.release()
        if self._held:
            assert self._go.acquire(timeout=20), "nobody let the engine go"
        return [[10 * value for value in item] for item in items]

    async def begun(self) -> None:
        """Wait until one more batch has begun."""
        assert await asyncio.to_thread(self._begun.acquire, timeout=20)

    def let_go(self, batches: int = 1) -> None:
        self._go.release(batches)

    @property
    def rows(self) -> list[list[int]]:
        """The size of each item of each batch."""
        return [[len(item) for item in batch] for batch in self.batches]


def batcher_of(
    run: Run,
    *,
    max_batch_size: int = 8,
    max_wait_ms: float = 0,
    max_queue_size: int = 100,
    inline_size: int = 0,
    company: Callable[[], bool] = lambda: False,
    observer: Observer | None = None,
) -> Batcher:
    return DynamicBatcher(
        run,
        max_batch_size=max_batch_size,
        max_wait_ms=max_wait_ms,
        max_queue_size=max_queue_size,
        inline_size=inline_size,
        company=company,
        observer=observer,
    )


def results(answers: Sequence[Answer[Block]]) -> list[Block]:
    return [answer.result for answer in answers]


class _ClockSelector(selectors.SelectSelector):
    """Where the loop would wait for a timer, its clock jumps instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            self.now += timeout
            timeout = 0
        return super().select(timeout)


def in_virtual_time(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario whose clock starts at 0 and stands still while anything is to be done. No threads."""

    selector = _ClockSelector()
    clock = SimpleNamespace(monotonic=lambda: selector.now, perf_counter=time.perf_counter)

    def make_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.SelectorEventLoop(selector)
        loop.time = lambda: selector.now  # type: ignore[method-assign]
        return loop

    with (
        mock.patch.object(server.batching, "time", clock),
        mock.patch.object(server.gathering, "time", clock),
        asyncio.Runner(loop_factory=make_loop) as runner,
    ):
        runner.run(scenario)


def now() -> float:
    return round(asyncio.get_running_loop().time(), 6)


# Work-conserving --------------------------------------------------------------


async def test_an_idle_engine_runs_a_lone_item_at_once() -> None:
    engine = Engine()
    async with batcher_of(engine) as batcher:
        answer = await batcher.submit([1, 2])
    assert (answer.result, answer.batch_rows) == ([10, 20], 2)
    assert engine.batches == [[[1, 2]]]


async def test_items_that_come_while_a_batch_runs_make_up_the_next_one() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine) as batcher:
        futures = batcher.enqueue([[1]])
        await engine.begun()
        for value in (2, 3, 4):
            futures += batcher.enqueue([[value]])
        engine.let_go(2)
        answers = await asyncio.gather(*futures)
    assert engine.batches == [[[1]], [[2], [3], [4]]]
    assert results(answers) == [[10], [20], [30], [40]]
    assert [answer.batch_rows for answer in answers] == [1, 3, 3, 3]


async def test_a_batch_is_cut_in_order_before_the_item_that_no_longer_fits() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=8) as batcher:
        first = batcher.enqueue([[0]])
        await engine.begun()
        sizes = [3, 3, 3, 2, 8, 1]
        rest = batcher.enqueue([[number] * size for number, size in enumerate(sizes)])
        engine.let_go(5)
        answers = await asyncio.gather(*first, *rest)
    assert engine.rows == [[1], [3, 3], [3, 2], [8], [1]]
    assert results(answers)[1:] == [[10 * number] * size for number, size in enumerate(sizes)]


@given(sizes=st.lists(st.integers(1, 8), max_size=40), max_batch_size=st.integers(8, 20))
def test_every_cut_takes_all_that_fits_and_keeps_the_order(sizes: list[int], max_batch_size: int) -> None:
    expected: list[list[int]] = []
    for size in sizes:
        if expected and sum(expected[-1]) + size <= max_batch_size:
            expected[-1].append(size)
        else:
            expected.append([size])

    async def scenario() -> None:
        engine = Engine()
        async with batcher_of(engine, max_batch_size=max_batch_size, max_queue_size=1000, inline_size=20) as batcher:
            answers = await asyncio.gather(*batcher.enqueue([[n] * size for n, size in enumerate(sizes)]))
        assert engine.rows == expected
        assert results(answers) == [[10 * n] * size for n, size in enumerate(sizes)]

    in_virtual_time(scenario())


# The window -------------------------------------------------------------------


def test_the_window_opens_with_the_first_item_and_gathers_the_others() -> None:
    async def scenario() -> None:
        starts: list[float] = []
        engine = Engine()

        def run(items: list[Block]) -> list[Block]:
            starts.append(now())
            return engine(items)

        async with batcher_of(run, max_wait_ms=10, inline_size=8) as batcher:
            await asyncio.sleep(5)
            futures = batcher.enqueue([[1]])
            await asyncio.sleep(0.009)
            futures += batcher.enqueue([[2]])
            answers = await asyncio.gather(*futures)
        assert starts == [5.01]
        assert engine.batches == [[[1], [2]]]
        assert [round(answer.queue_seconds, 6) for answer in answers] == [0.01, 0.001]

    in_virtual_time(scenario())


def test_the_window_closes_when_the_batch_is_full() -> None:
    async def scenario() -> None:
        engine = Engine()
        async with batcher_of(engine, max_batch_size=4, max_wait_ms=60_000, inline_size=4) as batcher:
            futures = batcher.enqueue([[1, 2], [3]])
            await asyncio.sleep(1)
            assert engine.batches == []
            await asyncio.gather(*futures, *batcher.enqueue([[4]]))
            assert now() == 1
        (batch,) = engine.batches
        assert sorted(batch) == [[1, 2], [3], [4]]

    in_virtual_time(scenario())


def test_a_window_whose_first_item_was_cancelled_is_that_of_the_next_item() -> None:
    async def scenario() -> None:
        engine = Engine()
        async with batcher_of(engine, max_wait_ms=10, inline_size=8) as batcher:
            (gone,) = batcher.enqueue([[1]])
            await asyncio.sleep(0.009)
            (kept,) = batcher.enqueue([[2]])
            gone.cancel()
            await kept
            assert now() == 0.019
        assert engine.batches == [[[2]]]

    in_virtual_time(scenario())


def test_the_window_does_not_use_up_an_items_deadline() -> None:
    async def scenario() -> None:
        async with batcher_of(Engine(), max_wait_ms=10, inline_size=8) as batcher:
            answer = await batcher.submit([1], deadline=0.005)
            assert answer.result == [10]
            assert now() <= 0.005

    in_virtual_time(scenario())


def test_closing_closes_the_window() -> None:
    async def scenario() -> None:
        batcher = batcher_of(Engine(), max_wait_ms=60_000, inline_size=8)
        async with batcher:
            (future,) = batcher.enqueue([[1]])
            await asyncio.sleep(1)
        assert (await future).result == [10]
        assert now() == 1

    in_virtual_time(scenario())


# Fairness -----------------------------------------------------------------------


async def test_a_single_row_that_comes_late_goes_before_the_rest_of_a_bulk_request() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=4) as batcher:
        bulk = batcher.enqueue([[part] * 4 for part in range(1, 6)])
        await engine.begun()
        single = asyncio.create_task(batcher.submit([9]))
        await asyncio.sleep(0)
        engine.let_go(6)
        assert (await single).result == [90]
        await asyncio.gather(*bulk)
    assert engine.batches == [[[1] * 4], [[9]], [[2] * 4], [[3] * 4], [[4] * 4], [[5] * 4]]


async def test_of_bulk_requests_that_are_alike_the_first_is_finished_first() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=4) as batcher:
        one = batcher.enqueue([[1] * 4] * 3)
        await engine.begun()
        other = batcher.enqueue([[2] * 4] * 3)
        engine.let_go(6)
        await asyncio.gather(*one, *other)
    assert [batch[0][0] for batch in engine.batches] == [1, 1, 1, 2, 2, 2]


async def test_a_smaller_request_that_comes_later_goes_before_the_rest_of_a_larger_one() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=4) as batcher:
        large = batcher.enqueue([[1] * 4] * 6)
        await engine.begun()
        small = batcher.enqueue([[2] * 4] * 2)
        engine.let_go(8)
        await asyncio.gather(*large, *small)
    assert [batch[0][0] for batch in engine.batches] == [1, 2, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("bulks", [1, 4, 16])
async def test_a_single_row_waits_for_no_whole_bulk_request_however_far_they_are(bulks: int) -> None:
    """Also when one of them has just been finished, and the others are nearly as far in virtual time."""
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=4, max_queue_size=10_000) as batcher:
        large = [future for _ in range(bulks) for future in batcher.enqueue([[1] * 4] * 20)]
        first = batcher.enqueue([[2] * 4] * 19 + [[2] * 3])
        for _ in first:
            await engine.begun()
            engine.let_go()
        await engine.begun()  # the one behind
        single = batcher.enqueue([[9]])
        await asyncio.sleep(0)
        before = len(engine.batches)
        engine.let_go(1000)
        await asyncio.gather(*single)
        assert [batch for batch in engine.batches[before : before + 2] if [9] in batch]
        await asyncio.gather(*large, *first)


async def test_large_requests_without_end_do_not_starve_a_larger_one() -> None:
    engine = Engine()
    async with batcher_of(engine, max_batch_size=4) as batcher:

        async def larges() -> None:
            while True:
                await asyncio.gather(*batcher.enqueue([[7] * 4] * 3))

        crowd = [asyncio.create_task(larges()) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*batcher.enqueue([[1] * 4] * 10)), 20)
        for task in crowd:
            task.cancel()
    last = max(turn for turn, batch in enumerate(engine.batches) if batch[0][0] == 1)
    assert last <= 4 * 10 + 3 * 3 + 1, "it has a quarter of the engine, whatever the others ask"


async def test_single_rows_without_end_do_not_starve_a_bulk_request() -> None:
    engine = Engine()
    async with batcher_of(engine, max_batch_size=4) as batcher:

        async def singles() -> None:
            while True:
                await asyncio.gather(*(batcher.submit([7]) for _ in range(4)))

        crowd = asyncio.create_task(singles())
        await asyncio.sleep(0)
        answers = await asyncio.wait_for(asyncio.gather(*batcher.enqueue([[1] * 4] * 5)), 20)
        crowd.cancel()
        assert results(answers) == [[10] * 4] * 5
    turns = [batch[0][0] for batch in engine.batches]
    parts = [turn for turn, value in enumerate(turns) if value == 1]
    assert parts[-1] - parts[0] <= 20, turns


async def test_the_rows_of_one_flow_share_its_part_of_the_engine() -> None:
    """A greedy stream of many messages counts as one caller."""
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=2) as batcher:
        (running,) = batcher.enqueue([[0]])
        await engine.begun()
        greedy = Flow()
        futures = [batcher.enqueue([[1, 1]], flow=greedy)[0] for _ in range(8)]
        modest = [batcher.enqueue([[2, 2]], flow=flow)[0] for flow in (Flow(), Flow())]
        engine.let_go(11)
        await asyncio.gather(running, *futures, *modest)
    assert sorted(batch[0][0] for batch in engine.batches[1:4]) == [1, 2, 2]


async def test_a_flow_does_not_pay_for_what_it_got_while_it_was_alone() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=4, max_queue_size=1000) as batcher:
        old, new = Flow(), Flow()
        engine.let_go(100)
        for _ in range(50):
            await asyncio.gather(*batcher.enqueue([[1]] * 8, flow=old))
        before = len(engine.batches)
        for _ in range(before):
            await engine.begun()
        (running,) = batcher.enqueue([[0] * 4])
        await engine.begun()
        pairs = [(batcher.enqueue([[1]], flow=old), batcher.enqueue([[2]], flow=new)) for _ in range(40)]
        futures = [future for pair in pairs for futures in pair for future in futures]
        engine.let_go(100)
        await asyncio.gather(running, *futures)
    first = [item[0] for batch in engine.batches[before + 1 : before + 5] for item in batch]
    assert first.count(1) in range(6, 11), engine.batches[before:]


# A lone caller --------------------------------------------------------------------


async def test_a_lone_item_is_computed_on_the_spot() -> None:
    engine = Engine()
    async with batcher_of(engine, inline_size=4) as batcher:
        answer = batcher.run_now([1, 2])
        assert answer is not None
        assert (answer.result, answer.batch_rows, answer.queue_seconds) == ([10, 20], 2, 0)
        await asyncio.sleep(0)
        again = batcher.run_now([3])
        assert again is not None
        assert again.result == [30]


async def test_what_is_not_alone_is_to_be_enqueued() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, inline_size=0) as batcher:
        assert batcher.run_now([1]) is None, "larger than what runs on the loop"
    async with batcher_of(engine, max_wait_ms=1, inline_size=4) as batcher:
        assert batcher.run_now([1]) is None, "a window is to be kept open"
    async with batcher_of(engine, inline_size=1) as batcher:
        waiting = batcher.enqueue([[1, 1]])
        assert batcher.run_now([2]) is None, "another one waits"
        await engine.begun()
        assert batcher.run_now([2]) is None, "another one is computed"
        engine.let_go()
        await asyncio.gather(*waiting)
    assert batcher.run_now([1]) is None, "closed"


async def test_items_that_come_sooner_than_one_caller_could_are_put_together_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server.gathering, "ROUND_TRIP_SECONDS", 1000.0)  # on any machine
    engine = Engine()

    async with batcher_of(engine, max_batch_size=16, inline_size=16) as batcher:

        async def caller(value: int) -> None:
            if batcher.run_now([value]) is None:
                await batcher.submit([value])

        await asyncio.gather(*(caller(value) for value in range(LOOK_EVERY + 8)))
        assert engine.rows == [[1]] * LOOK_EVERY + [[1] * 8]
        assert batcher.run_now([1]) is None, "the next ones are waited for, too"


async def test_items_that_come_while_others_are_coming_are_put_together_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server.gathering, "ROUND_TRIP_SECONDS", 0.0)
    engine = Engine()
    coming = False
    async with batcher_of(engine, max_batch_size=16, inline_size=16, company=lambda: coming) as batcher:
        for _ in range(2 * LOOK_EVERY):
            assert batcher.run_now([1]) is not None
        coming = True
        assert batcher.run_now([1]) is None
        await asyncio.gather(*batcher.enqueue([[1]] * 8))
        assert engine.rows[-1] == [1] * 8


async def test_looks_that_find_nobody_become_rarer_until_one_finds_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone caller over a fast transport looks like several, and would wait in one batch of 33."""
    monkeypatch.setattr(server.gathering, "ROUND_TRIP_SECONDS", 1000.0)
    async with batcher_of(Engine(), max_batch_size=16, inline_size=16) as batcher:

        async def batches_until_a_look(items: int) -> int:
            batches = 0
            while batcher.run_now([1]) is not None:
                batches += 1
            await asyncio.gather(*batcher.enqueue([[1]] * items))
            return batches

        looks = [await batches_until_a_look(1) for _ in range(7)]
        assert looks == [32, 64, 128, 256, 512, 512, 512]
        assert looks[-1] == LOOK_AT_LEAST
        await batches_until_a_look(8)
        assert batcher.run_now([1]) is None, "the next ones are waited for"


async def test_a_caller_who_takes_its_time_is_never_put_together_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.gathering, "ROUND_TRIP_SECONDS", 0.0)
    engine = Engine()
    async with batcher_of(engine, inline_size=8) as batcher:
        for _ in range(3 * LOOK_EVERY):
            assert batcher.run_now([1]) is not None


async def test_a_failure_on_the_spot_is_the_callers_own() -> None:
    def fail(items: list[Block]) -> list[Block]:
        raise ValueError("broken")

    async with batcher_of(fail, inline_size=4) as batcher:
        with pytest.raises(ValueError, match="broken"):
            batcher.run_now([1])


# What an observer is told ---------------------------------------------------------


class Diary(Observer):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self.queue: list[int] = []

    def rejected(self, reason: str, rows: int) -> None:
        self.entries.append((reason, rows))

    def queued(self, rows: int) -> str:
        return f"token of {rows}"

    def queue_changed(self, rows: int) -> None:
        self.queue.append(rows)

    def dropped(self, reason: str, rows: int) -> None:
        self.entries.append((reason, rows))

    def batch_ended(
        self, rows: int, tokens: Sequence[Any], queue_seconds: Sequence[float], compute_seconds: float, failed: bool
    ) -> None:
        self.entries.append(("failed" if failed else "computed", rows, *tokens, len(queue_seconds)))


async def test_an_observer_is_told_of_all_that_happens_to_rows() -> None:
    engine, diary = Engine(held=True), Diary()
    async with batcher_of(engine, max_queue_size=6, observer=diary) as batcher:
        (running,) = batcher.enqueue([[1]])
        await engine.begun()
        gone, kept = batcher.enqueue([[2, 2], [3]])
        late = batcher.enqueue([[4, 4]], deadline=asyncio.get_running_loop().time())
        with pytest.raises(QueueFull):
            batcher.enqueue([[5, 5]])
        gone.cancel()
        await asyncio.sleep(0)
        engine.let_go(2)
        await asyncio.gather(running, kept)
        with pytest.raises(DeadlineExpired):
            await late[0]
    with pytest.raises(QueueClosed):
        batcher.enqueue([[6]])
    assert diary.entries == [
        ("queue_full", 2),
        ("cancelled", 2),
        ("computed", 1, "token of 1", 1),
        ("expired", 2),
        ("computed", 1, "token of 1", 1),
        ("closing", 1),
    ]
    assert diary.queue[-1] == 0


async def test_an_observer_is_told_of_a_batch_that_fails() -> None:
    diary = Diary()

    def fail(items: list[Block]) -> list[Block]:
        raise ValueError("broken")

    async with batcher_of(fail, inline_size=4, observer=diary) as batcher:
        for _ in range(2):
            with pytest.raises(ValueError, match="broken"):
                batcher.run_now([1])
            with pytest.raises(ValueError, match="broken"):
                await batcher.submit([1])
    assert diary.entries == [("failed", 1, "token of 1", 1)] * 4


async def test_how_long_a_batch_has_been_computed_is_known() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine) as batcher:
        assert batcher.busy_seconds == 0
        (running,) = batcher.enqueue([[1]])
        await engine.begun()
        assert batcher.busy_seconds > 0
        engine.let_go()
        await running
        assert batcher.busy_seconds == 0
        assert batcher.backlog_seconds == 0


# Callers who leave, deadlines that pass -----------------------------------------


async def test_a_cancelled_caller_is_not_computed_and_makes_room_at_once() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_queue_size=5) as batcher:
        (running,) = batcher.enqueue([[1]])
        await engine.begun()
        gone, kept = batcher.enqueue([[2, 2, 2], [3, 3]])
        assert batcher.queued_rows == 5
        gone.cancel()
        await asyncio.sleep(0)
        assert batcher.queued_rows == 2
        (late,) = batcher.enqueue([[4, 4, 4]])
        engine.let_go(2)
        assert results(await asyncio.gather(running, kept, late)) == [[10], [30, 30], [40, 40, 40]]
    first, second = engine.batches
    assert (first, sorted(second)) == ([[1]], [[3, 3], [4, 4, 4]])
    assert batcher.queued_rows == 0


async def test_cancelling_the_task_that_submits_cancels_its_item() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine) as batcher:
        running = asyncio.create_task(batcher.submit([1]))
        await engine.begun()
        gone = asyncio.create_task(batcher.submit([2]))
        await asyncio.sleep(0)
        assert batcher.queued_rows == 1
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await asyncio.sleep(0)
        assert batcher.queued_rows == 0
        engine.let_go()
        await running
    assert engine.batches == [[[1]]]


async def test_a_caller_who_leaves_while_its_batch_is_computed_harms_nobody() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine) as batcher:
        (first,) = batcher.enqueue([[0]])
        await engine.begun()
        gone, kept = batcher.enqueue([[1], [2]])
        engine.let_go()
        await first
        await engine.begun()
        gone.cancel()
        engine.let_go()
        assert (await kept).result == [20]
        engine.let_go()
        assert (await batcher.submit([3])).result == [30]
    assert engine.batches == [[[0]], [[1], [2]], [[3]]]


async def test_an_item_whose_deadline_has_passed_is_not_computed() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine) as batcher:
        (running,) = batcher.enqueue([[1]])
        await engine.begun()
        loop_time = asyncio.get_running_loop().time()
        (late,) = batcher.enqueue([[2]], deadline=loop_time - 1)
        (in_time,) = batcher.enqueue([[3]], deadline=loop_time + 60)
        engine.let_go(2)
        await running
        with pytest.raises(DeadlineExpired, match="waited in the queue"):
            await late
        assert (await in_time).result == [30]
    assert engine.batches == [[[1]], [[3]]]
    assert batcher.queued_rows == 0


async def test_a_queue_of_expired_items_is_cleared_without_a_batch() -> None:
    engine = Engine()
    async with batcher_of(engine) as batcher:
        futures = batcher.enqueue([[1], [2], [3]], deadline=asyncio.get_running_loop().time())
        failures = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(failure) for failure in failures] == [DeadlineExpired] * 3
    assert engine.batches == []


# Failing batches ------------------------------------------------------------------


async def test_a_batch_that_raises_fails_its_own_callers_and_the_loop_goes_on() -> None:
    engine = Engine(held=True)

    def run(items: list[Block]) -> list[Block]:
        answers = engine(items)
        if [13] in items:
            raise RuntimeError("thirteen")
        return answers

    async with batcher_of(run, max_batch_size=2) as batcher:
        futures = batcher.enqueue([[1]])
        await engine.begun()
        futures += batcher.enqueue([[13], [2], [3], [4]])
        engine.let_go(3)
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [getattr(outcome, "result", str(outcome)) for outcome in outcomes] == [
        [10],
        "thirteen",
        "thirteen",
        [30],
        [40],
    ]


@pytest.mark.parametrize("inline_size", [0, 8])
@pytest.mark.parametrize(
    ("wrong", "told"),
    [([], r"returned results of \[\] rows"), ([[1], [2]], r"\[1, 1\]"), ([[1, 2, 3]], r"\[3\]"), ([[1]], r"\[1\]")],
    ids=["none", "too many", "too many rows", "too few rows"],
)
async def test_results_of_the_wrong_size_fail_only_their_batch(wrong: list[Block], told: str, inline_size: int) -> None:
    engine = Engine()
    async with batcher_of(lambda items: wrong if items == [[1, 1]] else engine(items), inline_size=inline_size) as good:
        with pytest.raises(RuntimeError, match=r"items of \[2\] rows.*" + told):
            await good.submit([1, 1])
        assert (await good.submit([2])).result == [20]


async def test_a_failed_batch_that_nobody_waits_for_any_more_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    held = Engine(held=True)

    def run(items: list[Block]) -> list[Block]:
        held(items)
        raise RuntimeError("broken engine")

    async with batcher_of(run) as batcher:
        (future,) = batcher.enqueue([[1, 2]])
        await held.begun()
        future.cancel()
        held.let_go()
    assert "a batch of 2 rows failed" in caplog.text
    assert "RuntimeError: broken engine" in caplog.text


@pytest.mark.parametrize(
    ("together", "batches"), [(7, [7, 1, 1]), (8, [8, 2])], ids=["after a few items", "after many items"]
)
def test_where_many_items_come_together_the_next_batch_waits_for_more(together: int, batches: list[int]) -> None:
    async def scenario() -> None:
        engine = Engine()
        async with batcher_of(engine, max_batch_size=16, inline_size=16) as batcher:
            await asyncio.gather(*batcher.enqueue([[0]] * together))
            (first,) = batcher.enqueue([[1]])
            await asyncio.sleep(QUIET_SECONDS / 2)
            (second,) = batcher.enqueue([[2]])
            assert results(await asyncio.gather(first, second)) == [[10], [20]]
            assert now() <= 4 * QUIET_SECONDS, "not for longer than no more come"
        assert [len(batch) for batch in engine.batches] == batches

    in_virtual_time(scenario())


@asynccontextmanager
async def batcher_that_had_many() -> AsyncIterator[Batcher]:
    """Its last batch had 32 items, so that the next one waits for as many."""
    async with batcher_of(Engine(), max_batch_size=64, inline_size=64) as batcher:
        await asyncio.gather(*batcher.enqueue([[0]] * 32))
        yield batcher


def test_a_batch_waits_no_longer_than_a_moment_in_which_nothing_comes() -> None:
    async def scenario() -> None:
        async with batcher_that_had_many() as batcher:
            start = now()
            await batcher.submit([1])
            assert now() - start == pytest.approx(QUIET_SECONDS)
            start = now()
            await batcher.submit([2])
            assert now() == start, "the last batch was small: nobody is waited for any more"

    in_virtual_time(scenario())


def test_a_batch_that_waits_for_more_is_cut_when_there_is_hurry() -> None:
    async def scenario() -> None:
        async with batcher_that_had_many() as batcher:
            start = now()
            (waiting,) = batcher.enqueue([[1]])
            await asyncio.sleep(QUIET_SECONDS / 4)
            batcher.hurry()
            await waiting
            assert now() - start == pytest.approx(QUIET_SECONDS / 4)
            await asyncio.gather(*batcher.enqueue([[2]] * 32))
            await batcher.submit([3])
            assert now() - start == pytest.approx(QUIET_SECONDS / 4), "nor is anything waited for after it"

    in_virtual_time(scenario())


def test_after_a_pause_nobody_is_waited_for() -> None:
    async def scenario() -> None:
        async with batcher_that_had_many() as batcher:
            await asyncio.sleep(2 * PAUSE_SECONDS)
            start = now()
            await batcher.submit([1])
            assert now() == start

    in_virtual_time(scenario())


def test_a_batch_does_not_wait_for_long_where_items_trickle_in() -> None:
    async def scenario() -> None:
        async with batcher_that_had_many() as batcher:
            first = batcher.enqueue([[1]])
            start = now()
            trickling = asyncio.create_task(trickle(batcher))
            await asyncio.gather(*first)
            assert now() - start == pytest.approx(MOST_WAITS * QUIET_SECONDS)
            trickling.cancel()

    async def trickle(batcher: Batcher) -> None:
        while True:
            await asyncio.sleep(QUIET_SECONDS / 4)
            batcher.enqueue([[2]])

    in_virtual_time(scenario())


def test_a_batch_waits_for_no_more_than_enough() -> None:
    async def scenario() -> None:
        engine = Engine()
        async with batcher_of(engine, max_batch_size=64, inline_size=64) as batcher:
            await asyncio.gather(*batcher.enqueue([[0]] * 64))
            start = now()
            await asyncio.gather(*batcher.enqueue([[1]] * ENOUGH_ITEMS))
            assert now() == start
        assert [len(batch) for batch in engine.batches] == [64, ENOUGH_ITEMS]

    in_virtual_time(scenario())


@pytest.mark.parametrize("inline_size", [0, 8])
async def test_a_stop_iteration_fails_its_batch_like_any_error(inline_size: int) -> None:
    def run(items: list[Block]) -> list[Block]:
        if items == [[1]]:
            raise StopIteration
        return items

    async with batcher_of(run, inline_size=inline_size) as batcher:
        with pytest.raises(RuntimeError, match="StopIteration"):
            await batcher.submit([1])
        assert (await batcher.submit([2])).result == [2]


async def test_failing_batches_leave_the_loop_free_between_them() -> None:
    order: list[str] = []

    def run(items: list[Block]) -> list[Block]:
        order.append("batch")
        raise RuntimeError

    async with batcher_of(run, max_batch_size=1, inline_size=1) as batcher:
        futures = batcher.enqueue([[1], [2], [3]])
        futures[0].add_done_callback(lambda _: order.append("first told"))
        await asyncio.gather(*futures, return_exceptions=True)
    assert order == ["batch", "first told", "batch", "batch"]


# A full queue, bad items -----------------------------------------------------------


async def test_a_full_queue_refuses_at_once_and_names_the_numbers() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_queue_size=4) as batcher:
        futures = batcher.enqueue([[0]])
        await engine.begun()
        futures += batcher.enqueue([[1, 1, 1]])
        with pytest.raises(QueueFull, match=r"holds 3 of at most 4 rows: no room for 2 more"):
            batcher.enqueue([[2, 2]])
        futures += batcher.enqueue([[3]])
        with pytest.raises(QueueFull, match=r"holds 4 of at most 4 rows: no room for 1 more"):
            await batcher.submit([4])
        engine.let_go(2)
        assert results(await asyncio.gather(*futures)) == [[0], [10, 10, 10], [30]]


async def test_items_go_in_together_or_not_at_all() -> None:
    engine = Engine()
    async with batcher_of(engine, max_queue_size=4) as batcher:
        with pytest.raises(QueueFull):
            batcher.enqueue([[1, 1], [2, 2], [3]])
        with pytest.raises(ValueError, match="this one has 0"):
            batcher.enqueue([[1], []])
        assert batcher.queued_rows == 0
    assert engine.batches == []


@pytest.mark.parametrize("rows", [0, 9])
async def test_an_item_has_a_row_and_fits_a_batch(rows: int) -> None:
    async with batcher_of(Engine(), max_batch_size=8) as batcher:
        with pytest.raises(ValueError, match=f"an item has 1 to 8 rows, this one has {rows}"):
            await batcher.submit([1] * rows)


# Closing --------------------------------------------------------------------------


async def test_closing_refuses_what_is_new_and_finishes_what_waits() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=2) as batcher:
        futures = batcher.enqueue([[1]])
        await engine.begun()
        futures += batcher.enqueue([[2], [3], [4]])
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(QueueClosed):
            batcher.enqueue([[5]])
        with pytest.raises(QueueClosed):
            await batcher.submit([5])
        engine.let_go(3)
        await closing
        assert all(future.done() for future in futures)
        assert results([future.result() for future in futures]) == [[10], [20], [30], [40]]
    assert engine.batches == [[[1]], [[2], [3]], [[4]]]


async def test_closing_an_idle_batcher_ends_and_may_be_repeated() -> None:
    batcher = batcher_of(Engine())
    async with batcher:
        await batcher.close()
    await batcher.close()


# Inline and in the thread ----------------------------------------------------------


async def test_small_batches_run_on_the_loop_and_larger_ones_in_a_thread() -> None:
    engine = Engine()
    async with batcher_of(engine, inline_size=2) as batcher:
        await batcher.submit([1, 2])
        await batcher.submit([1, 2, 3])
    assert engine.threads[0] is threading.current_thread()
    assert engine.threads[1] is not threading.current_thread()


@pytest.mark.parametrize(
    ("items", "rows", "inline_size", "on_the_loop"),
    [
        (ENOUGH_ITEMS, 1, 2, True),
        (ENOUGH_ITEMS, 2, 2, False),
        (ENOUGH_ITEMS - 1, 1, 2, False),
        (ENOUGH_ITEMS, 1, 0, False),
    ],
)
async def test_many_items_of_one_row_run_on_the_loop_however_large_their_batch(
    items: int, rows: int, inline_size: int, on_the_loop: bool
) -> None:
    engine = Engine()
    async with batcher_of(engine, max_batch_size=1000, max_queue_size=1000, inline_size=inline_size) as batcher:
        await asyncio.gather(*batcher.enqueue([[1] * rows] * items))
    assert engine.rows == [[rows] * items]
    assert (engine.threads == [threading.current_thread()]) == on_the_loop


async def test_the_thread_leaves_many_small_items_to_the_loop() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=100, inline_size=2) as batcher:
        large = batcher.enqueue([[1] * 4])
        await engine.begun()
        small = batcher.enqueue([[2]] * ENOUGH_ITEMS)
        engine.let_go(2)
        await asyncio.gather(*large, *small)
    assert engine.threads[0] is not threading.main_thread()
    assert engine.threads[1] is threading.main_thread()


async def test_the_thread_goes_on_by_itself_while_the_loop_is_busy() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=4, inline_size=2) as batcher:
        futures = batcher.enqueue([[1] * 4]) + batcher.enqueue([[2] * 4]) + batcher.enqueue([[3] * 4])
        await engine.begun()
        engine.let_go(2)
        for _ in range(2):  # without a turn of the loop
            assert engine._begun.acquire(timeout=20)
        assert [batch[0][0] for batch in engine.batches] == [1, 2, 3]
        assert not any(future.done() for future in futures)
        engine.let_go()
        assert results(await asyncio.gather(*futures)) == [[10] * 4, [20] * 4, [30] * 4]


async def test_the_thread_leaves_to_the_loop_what_is_the_loops() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=4, inline_size=2) as batcher:
        large = batcher.enqueue([[1] * 4])
        await engine.begun()
        small = batcher.enqueue([[2] * 2])
        assert batcher.run_now([3]) is None, "one batch at a time"
        engine.let_go(2)
        await asyncio.gather(*large, *small)
    assert engine.threads[0] is not threading.main_thread()
    assert engine.threads[1] is threading.main_thread()


async def test_those_who_leave_or_expire_while_the_thread_goes_on_are_not_computed() -> None:
    engine = Engine(held=True)
    async with batcher_of(engine, max_batch_size=4) as batcher:
        first = batcher.enqueue([[1] * 4])
        await engine.begun()
        late = batcher.enqueue([[2] * 4], deadline=asyncio.get_running_loop().time() - 1)
        gone = batcher.enqueue([[3] * 4])
        last = batcher.enqueue([[4] * 4])
        gone[0].cancel()
        engine.let_go(2)
        assert engine._begun.acquire(timeout=20)
        assert batcher.queued_rows == 0
        with pytest.raises(DeadlineExpired):
            await late[0]
        await asyncio.gather(*first, *last)
    assert [batch[0][0] for batch in engine.batches] == [1, 4]


async def test_one_batch_runs_at_a_time() -> None:
    running = threading.Lock()

    def run(items: list[Block]) -> list[Block]:
        assert running.acquire(blocking=False), "two batches at once"
        try:
            return items
        finally:
            running.release()

    async with batcher_of(run, max_batch_size=3, inline_size=1, max_queue_size=1000) as batcher:
        blocks = [[n] * (n % 3 + 1) for n in range(300)]
        assert results(await asyncio.gather(*map(batcher.submit, blocks))) == blocks


async def test_callers_of_an_inline_batch_are_answered_before_the_next_batch_runs() -> None:
    order: list[str] = []

    def run(items: list[Block]) -> list[Block]:
        order.append(f"batch {items[0][0]}")
        return items

    async with batcher_of(run, max_batch_size=1, inline_size=1) as batcher:

        async def call(value: int) -> None:
            await batcher.submit([value])
            order.append(f"answer {value}")

        await asyncio.gather(call(1), call(2))
    assert order == ["batch 1", "answer 1", "batch 2", "answer 2"]


# All of it at once -------------------------------------------------------------------


@pytest.mark.parametrize("max_wait_ms", [0, 1])
@pytest.mark.parametrize("inline_size", [0, 4, 8])
async def test_in_any_weather_each_survivor_gets_its_own_rows_and_nobody_hangs(
    inline_size: int, max_wait_ms: float
) -> None:
    chance = random.Random(f"{inline_size} {max_wait_ms}")
    engine = Engine()
    failed: set[int] = set()

    def run(items: list[Block]) -> list[Block]:
        answers = engine(items)
        lot = (items[0][0] * 7919) % 100
        if lot < 8:
            failed.update(item[0] for item in items)
            if lot < 4:
                raise RuntimeError("bad weather")
            return answers[:-1]
        return answers

    outcomes = dict.fromkeys(("answered", "failed", "cancelled", "expired", "refused"), 0)

    async def call(number: int) -> None:
        block = [number] * chance.randint(1, 8)
        deadline = asyncio.get_running_loop().time() - 1 if chance.random() < 0.05 else None
        for _ in range(chance.randint(0, 200)):
            await asyncio.sleep(0)
        task = asyncio.create_task(batcher.submit(block, deadline=deadline))
        if chance.random() < 0.2:
            for _ in range(chance.randint(0, 20)):
                await asyncio.sleep(0)
            task.cancel()
        try:
            answer = await task
        except asyncio.CancelledError:
            outcomes["cancelled"] += 1
        except DeadlineExpired:
            assert deadline is not None
            outcomes["expired"] += 1
        except QueueFull:
            outcomes["refused"] += 1
        except RuntimeError:
            assert number in failed
            outcomes["failed"] += 1
        else:
            assert answer.result == [10 * number] * len(block)
            assert len(block) <= answer.batch_rows <= 8
            assert number not in failed
            outcomes["answered"] += 1

    async with batcher_of(run, max_queue_size=2000, inline_size=inline_size, max_wait_ms=max_wait_ms) as batcher:
        async with asyncio.timeout(60):
            await asyncio.gather(*(call(number) for number in range(2000)))
        await asyncio.sleep(0)
        assert batcher.queued_rows == 0
    assert sum(outcomes.values()) == 2000
    assert all(outcomes[kind] > 0 for kind in ("answered", "failed", "cancelled", "expired"))
    assert all(1 <= sum(sizes) <= 8 for sizes in engine.rows)
