"""A server of one process from its start to its end: signals, the weights that are watched, the order of things."""

from __future__ import annotations

import asyncio
import logging

from server.app import DigitServer
from server.deployment import Deployment
from server.errors import CannotServe
from server.instruments import Instruments
from server.memory import spare_collections
from server.settings import Settings
from server.signals import Told, unless

logger = logging.getLogger(__name__)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cuts that short. SIGHUP reloads the weights.

    Raises:
        CannotServe: the address cannot be bound, or the weights, certificates,
            tokens or the metrics port cannot be used; or the port is lost.
    """
    told = Told()
    lost = asyncio.Event()
    with Instruments(settings) as instruments:
        deployment = Deployment(settings.weights, lambda snapshot: server.deploy(snapshot), instruments.observer)
        try:
            server = DigitServer(
                settings,
                observer=instruments.observer,
                interceptors=instruments.interceptors,
                exchange=deployment if settings.admin else None,
                metrics_page=instruments.page,
                http_span=instruments.http_span,
                on_lost=lost.set,
            )
        except OSError as error:
            raise CannotServe(str(error)) from error
        delay = 0.0
        try:
            if await unless(told.to_stop, deployment.first()):
                # Only now: a client that has another server would spend its retries on one that is not ready.
                spare_collections()
                await server.start()
                print(f"serving on {server.address}", flush=True)
                delay = settings.drain_delay
                watching = deployment.watch(settings.reload_interval, told.to_reload)
                await unless(told.to_stop, unless(lost, watching))
            if lost.is_set():
                raise CannotServe(f"{server.address} cannot be had again")
            logger.info("told to end: draining for up to %g s", settings.grace)
        finally:
            deployment.close()
            stopping = asyncio.create_task(server.stop(delay=delay))
            if not await unless(told.again, asyncio.shield(stopping)):
                logger.info("told again: not waiting for the calls that go on")
                await server.cut_short()
                await stopping
    logger.info("stopped")
