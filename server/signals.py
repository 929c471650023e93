"""What signals tell a process that serves, or that has others serve."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable
from typing import Any


class Told:
    """SIGTERM and SIGINT tell to stop, and at the second time to wait for nobody; SIGHUP tells to reload."""

    def __init__(self) -> None:
        """Listen for them, in the running event loop."""
        self.to_stop, self.again, self.to_reload = asyncio.Event(), asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self.to_reload.set)

    def _stop(self) -> None:
        (self.again if self.to_stop.is_set() else self.to_stop).set()


async def unless(told: asyncio.Event, work: Awaitable[Any], seconds: float | None = None) -> bool:
    """Whether the work ended before somebody was told, and in time; raises what the work raised, or cancels it."""
    working = asyncio.ensure_future(work)
    telling = asyncio.create_task(told.wait())
    try:
        await asyncio.wait((working, telling), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
            return True
        return False
    finally:
        for task in (working, telling):
            task.cancel()
        await asyncio.gather(working, telling, return_exceptions=True)
