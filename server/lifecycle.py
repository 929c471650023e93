"""A server of one process from its start to its end: signals, the weights that are watched, the order of things."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Coroutine
from typing import Any

from server.app import DigitServer
from server.deployment import Deployment
from server.errors import CannotServe
from server.instruments import Instruments
from server.settings import Settings

logger = logging.getLogger(__name__)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cuts that short. SIGHUP reloads the weights.

    Raises:
        CannotServe: the address cannot be bound, or the weights, certificates,
            tokens or the metrics port cannot be used.
    """
    loop = asyncio.get_running_loop()
    told_to_stop, told_again, told_to_reload = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (told_again if told_to_stop.is_set() else told_to_stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, told_to_reload.set)
    with Instruments(settings) as instruments:
        deployment = Deployment(settings.weights, lambda snapshot: server.deploy(snapshot), instruments.observer)
        try:
            server = DigitServer(
                settings,
                observer=instruments.observer,
                interceptors=instruments.interceptors,
                exchange=deployment if settings.admin else None,
            )
        except OSError as error:
            raise CannotServe(str(error)) from error
        delay = 0.0
        try:
            if await _unless(told_to_stop, deployment.first()):
                # Only now: a client that has another server would spend its retries on one that is not ready.
                await server.start()
                print(f"serving on {server.address}", flush=True)
                delay = settings.drain_delay
                async with _running(deployment.watch(settings.reload_interval, told_to_reload)):
                    await told_to_stop.wait()
            logger.info("told to end: draining for up to %g s", settings.grace)
        finally:
            deployment.close()
            stopping = asyncio.create_task(server.stop(delay=delay))
            if not await _unless(told_again, stopping):
                logger.info("told again: not waiting for the calls that go on")
                await server.cut_short()
                await stopping
    logger.info("stopped")


async def _unless(told: asyncio.Event, work: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> bool:
    """Whether the work ended before somebody was told; raises what the work raised."""
    working = asyncio.ensure_future(work)
    telling = asyncio.create_task(told.wait())
    try:
        await asyncio.wait((working, telling), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
            return True
        return False
    finally:
        telling.cancel()


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> Any:
    """The work goes on while the `async with` does."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
