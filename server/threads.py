"""Work that a process does not wait for at its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread that the process does not wait for at its end: a disk may hang."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # whoever waits may be cancelled, this work not

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await asyncio.wrap_future(outcome)
