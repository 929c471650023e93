"""For what a batch waits where the transport says for how many tasks it has read something.

The other rule, for transports that cannot say it, is tested with the batcher (`test_batching.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from server.batching import DynamicBatcher
from server.gathering import ENOUGH_ITEMS, MANY_COMING, MOST_TURNS, Arrivals, ByTurns

pytestmark = pytest.mark.usefixtures("no_stray_errors")

Block = list[int]


class Transport:
    """Reads for some callers at a time, each of whom has an item of so many rows."""

    def __init__(self) -> None:
        self.arrivals = Arrivals()
        self.batches: list[list[int]] = []
        """The rows of each item of each batch."""
        self.batcher: DynamicBatcher[Block, Block] = DynamicBatcher(
            self._run, max_batch_size=256, max_queue_size=1000, inline_size=64, arrivals=self.arrivals
        )

    def _run(self, items: list[Block]) -> list[Block]:
        self.batches.append([len(item) for item in items])
        return items

    async def _call(self, rows: int) -> None:
        item = [1] * rows
        if self.batcher.run_now(item) is None:
            await self.batcher.submit(item)

    def read(self, callers: int, rows: int = 1) -> list[asyncio.Task[None]]:
        tasks = []
        for _ in range(callers):
            self.arrivals.count_one()
            tasks.append(asyncio.create_task(self._call(rows)))
        return tasks


@pytest.fixture
async def transport() -> AsyncIterator[Transport]:
    transport = Transport()
    async with transport.batcher:
        yield transport
    assert transport.arrivals.count == 0


@pytest.mark.parametrize(
    ("callers", "rows", "batches"),
    [
        (1, 1, [[1]]),
        (MANY_COMING, 1, [[1]] * MANY_COMING),
        (MANY_COMING + 1, 1, [[1] * (MANY_COMING + 1)]),
        (1, 64, [[64]]),
        (2, 4, [[4]] * 2),
        (3, 4, [[4] * 3]),
        (2, MANY_COMING, [[MANY_COMING] * 2]),
    ],
)
async def test_few_are_computed_one_by_one_and_many_together(
    transport: Transport, callers: int, rows: int, batches: list[list[int]]
) -> None:
    await asyncio.gather(*transport.read(callers, rows))
    assert transport.batches == batches


async def test_what_is_read_in_the_next_turn_goes_with_what_waits(transport: Transport) -> None:
    first = transport.read(MANY_COMING + 1)
    await asyncio.sleep(0)  # these have had their turn, and the batch has not been cut
    second = transport.read(3)
    await asyncio.gather(*first, *second)
    assert transport.batches == [[1] * (MANY_COMING + 4)]


async def test_a_batch_waits_for_no_turn_in_which_nothing_comes(transport: Transport) -> None:
    tasks = transport.read(MANY_COMING + 1)
    turns = 0
    while not transport.batches:
        await asyncio.sleep(0)
        turns += 1
    assert turns == 3, "the tasks', the batcher's, and the one in which it sees that nothing was read"
    await asyncio.gather(*tasks)


async def test_a_batch_waits_for_some_turns_only_where_more_come_in_each(transport: Transport) -> None:
    tasks = transport.read(MANY_COMING + 1)
    for _ in range(MOST_TURNS + 4):
        await asyncio.sleep(0)
        tasks += transport.read(1)
    await asyncio.gather(*tasks)
    together = len(transport.batches[0])
    assert MANY_COMING + 1 < together <= MANY_COMING + 1 + MOST_TURNS


async def test_a_batch_waits_for_no_more_than_enough(transport: Transport) -> None:
    tasks = transport.read(ENOUGH_ITEMS)
    for _ in range(MOST_TURNS):
        await asyncio.sleep(0)
        tasks += transport.read(ENOUGH_ITEMS)
    await asyncio.gather(*tasks)
    assert len(transport.batches[0]) == ENOUGH_ITEMS


async def test_a_task_that_is_cancelled_before_its_turn_is_not_waited_for(transport: Transport) -> None:
    for task in transport.read(100):
        task.cancel()
    await asyncio.sleep(0)
    assert transport.arrivals.count == 0
    await asyncio.gather(*transport.read(1))
    assert transport.batches == [[1]]


async def test_no_batch_is_left_to_wait_for_more_once_it_could_be_cut() -> None:
    """Or the thread would not go on by itself with what waits."""
    assert not ByTurns(Arrivals()).is_expecting
