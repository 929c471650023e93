"""The event loop that a serving process runs on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)


def run(main: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, on uvloop where it is installed: the server's extra brings it wherever it exists."""
    with asyncio.Runner(loop_factory=_factory()) as runner:
        runner.run(main)


def _factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ModuleNotFoundError:  # as on Windows
        logger.info("uvloop is not installed: serving on asyncio's own event loop")
        return None
    return uvloop.new_event_loop
