"""Composition and lifecycle: the pieces put together, started, and stopped in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

import grpc

from server import admin, servicer
from server.errors import CannotServe, not_installed
from server.service import DigitService
from server.settings import Settings

if TYPE_CHECKING:
    from server.inference import Classifier

logger = logging.getLogger(__name__)

HEALTH_NAMES = ("", servicer.SERVICE_NAME)

_TRANSPORT_MARGIN = 2
"""gRPC itself refuses messages longer than this times `max_message_bytes`, with
RESOURCE_EXHAUSTED; up to there the service refuses them with INVALID_ARGUMENT."""


class DigitServer:
    """A server that listens from `start`, answers from `load`, and ends with `stop`."""

    def __init__(self, settings: Settings) -> None:
        """Bind the address of the settings; `port` tells the port.

        Raises:
            OSError: the address cannot be bound, for example because it is taken.
        """
        self._settings = settings
        self._service = DigitService(settings)
        self._health = admin.HealthServicer(HEALTH_NAMES)
        self._reflection = admin.ReflectionServicer((servicer.SERVICE_NAME, *admin.SERVICES))
        self._server = grpc.aio.server(options=server_options(settings))
        servicer.add_to_server(servicer.DigitClassifierServicer(self._service), self._server)
        admin.add_to_server(self._health, self._reflection, self._server)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            self.port = self._server.add_insecure_port(f"{host}:{settings.port}")
        except RuntimeError as error:
            raise OSError(
                f"cannot listen on {host}:{settings.port}: the address is taken, or not one of this machine"
            ) from error
        self.address = f"{host}:{self.port}"

    async def start(self) -> None:
        """Listen: health answers NOT_SERVING, the methods UNAVAILABLE."""
        await self._service.start()
        await self._server.start()

    async def load(self) -> None:
        """Load the weights, warm up, read the golden digits; then serve.

        Raises:
            CannotServe: torch is not installed, or the weights cannot be served.
        """
        settings = self._settings
        start = time.monotonic()
        classifier = await _load_classifier(settings)
        self._service.serve_model(classifier)
        self._health.set_serving(True)
        logger.info("model %s ready after %.2f s", classifier.checkpoint.version, time.monotonic() - start)

    async def stop(self, grace: float | None = None) -> None:
        """Tell health and streams, finish accepted calls for up to `grace` seconds, end."""
        self._health.end()
        self._reflection.end()
        self._service.drain()
        await self._server.stop(self._settings.grace if grace is None else grace)
        await self._service.close()


def server_options(settings: Settings) -> list[tuple[str, int]]:
    """gRPC's options for a server."""
    limit = _TRANSPORT_MARGIN * settings.max_message_bytes
    return [
        # A second server on a taken port is to fail, not to share it.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        # What the SDK's keepalive of one ping a minute needs.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


async def _load_classifier(settings: Settings) -> Classifier:
    """Load in a thread that the process does not wait for at its end, as weights may lie on a disk that hangs."""
    loaded: Future[Classifier] = Future()
    loaded.set_running_or_notify_cancel()  # whoever waits may be cancelled, this work not

    def load() -> None:
        # Here, because torch takes seconds to import and the port can be open meanwhile.
        try:
            from server.inference import load_classifier

            loaded.set_result(
                load_classifier(settings.weights, device=settings.device, max_batch_size=settings.max_batch_size)
            )
        except ModuleNotFoundError as error:
            loaded.set_exception(CannotServe(not_installed(error)))
        except BaseException as error:
            loaded.set_exception(error)

    threading.Thread(target=load, name="load", daemon=True).start()
    return await asyncio.wrap_future(loaded)


def build_server(settings: Settings) -> tuple[DigitServer, int]:
    """Return a server that is bound but not started, and its port. Called in the event loop."""
    server = DigitServer(settings)
    return server, server.port


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        CannotServe: the address cannot be bound, or the weights cannot be served.
    """
    told_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    try:
        server, _ = build_server(settings)
    except OSError as error:
        raise CannotServe(str(error)) from error
    await server.start()
    try:
        loading = asyncio.create_task(server.load())
        stopping = asyncio.create_task(told_to_stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            await loading
            print(f"serving on {server.address}", flush=True)
            await stopping
        logger.info("draining for up to %g s", settings.grace)
    finally:
        loading.cancel()
        stopping.cancel()
        await server.stop()
    logger.info("stopped")
