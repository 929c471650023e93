"""Composition and lifecycle of one serving process: the pieces put together, started, and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from digits.snapshot import InvalidCheckpoint, Snapshot, take_snapshot
from server import admin, authentication, model_admin, open_inference_servicer, servicer
from server.credentials import server_credentials, tls_context
from server.errors import CannotServe, not_installed
from server.gathering import Arrivals
from server.grpcio import GrpcioServer
from server.intake import Intake
from server.limits import connection_options
from server.observer import HttpSpan, Observer, Observers
from server.open_inference import SERVICE_NAME as OPEN_INFERENCE_NAME
from server.open_inference import OpenInference
from server.ports import Reservation, literal_hosts
from server.service import CLASSIFY, SERVICE_NAME, STREAM_CLASSIFY, DigitService
from server.settings import Settings, bracketed
from server.statistics import Statistics
from server.threads import in_daemon_thread

if TYPE_CHECKING:
    from server.inference import Classifier

logger = logging.getLogger(__name__)

METHODS_WITH_IMAGES = (
    CLASSIFY,
    STREAM_CLASSIFY,
    f"{OPEN_INFERENCE_NAME}/ModelInfer",
    f"{OPEN_INFERENCE_NAME}/ModelStreamInfer",
)

HEALTH_NAMES = ("", SERVICE_NAME, OPEN_INFERENCE_NAME)

_TRANSPORT_MARGIN = 2
"""gRPC itself refuses messages longer than this times `max_message_bytes`, with
RESOURCE_EXHAUSTED; up to there the service refuses them with INVALID_ARGUMENT."""

_CLOSE_SECONDS = 1.0
"""For how long a stop waits for a batch of which no caller is left."""

_LOOKS_PER_LIMIT = 4
"""How often the watchdog looks at the engine in the time after which it calls it stuck."""


class DigitServer:
    """A server that listens from `start`, answers from `serve_prepared`, and ends with `stop`."""

    def __init__(
        self,
        settings: Settings,
        *,
        observer: Observer | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        exchange: model_admin.Exchange | None = None,
        shares_port: bool = False,
        metrics_page: Callable[[str], tuple[bytes, str]] | None = None,
        http_span: HttpSpan | None = None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Bind the address of the settings; `port` tells the port.

        Args:
            settings: everything that an operator may choose.
            observer: is told what happens.
            interceptors: of all calls, in this order, before that of the tokens.
            exchange: what ModelAdmin calls; without it, there is none.
            shares_port: other processes listen on the same port. It is then bound
                by `start`, as the kernel sends connections to whoever has bound it.
            metrics_page: gives the page of metrics and its content type for a
                scraper's header `Accept`, for a transport that speaks plain HTTP.
            http_span: traces requests over plain HTTP.
            on_lost: called when the server listens no more and cannot again, so that its process is to end.

        Raises:
            OSError: the address cannot be bound, for example because it is taken.
            CannotServe: the certificates or tokens cannot be used.
        """
        self._settings = settings
        statistics = Statistics()
        self._observer = statistics if observer is None else Observers([observer, statistics])
        self._prepared: Classifier | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._stuck = False
        self._serving = False
        self._stopping = False
        self._cut_short = asyncio.Event()
        self._health = admin.HealthServicer(HEALTH_NAMES)
        names = [SERVICE_NAME, OPEN_INFERENCE_NAME, *admin.SERVICES]
        if exchange is not None:
            names.append(model_admin.SERVICE_NAME)
        self._reflection = admin.ReflectionServicer(names)
        tokens = authentication.interceptors(settings, self._observer)
        interceptors = [*interceptors, *tokens]
        self._keeps_port = sys.platform == "linux" and settings.transport == "grpcio" and not shares_port
        self._kept: Reservation | None = None
        """The port, kept for us alone; to be shared with the server that takes the first one's place, if one has to."""
        arrivals = Arrivals(METHODS_WITH_IMAGES) if settings.transport == "asgi" else None  # grpc.aio cannot tell
        self._server, self._credentials = _transport(
            settings, interceptors, arrivals, shares_port=shares_port or self._keeps_port, on_lost=on_lost
        )
        self._service = DigitService(settings, self._observer, arrivals)
        inference = OpenInference(self._service, settings, statistics, self.is_serving)
        if settings.transport == "asgi":
            self._add_plain_http(tokens[0] if tokens else None, metrics_page, names, http_span)
        intake = Intake(self._service)
        servicer.add_to_server(servicer.DigitClassifierServicer(self._service, intake), self._server)
        open_inference_servicer.add_to_server(
            open_inference_servicer.OpenInferenceServicer(inference, intake), self._server
        )
        admin.add_to_server(self._health, self._reflection, self._server)
        if exchange is not None:
            model_admin.add_to_server(model_admin.ModelAdminServicer(exchange), self._server)
        self._shares_port = shares_port
        self.port = settings.port
        if not shares_port:
            self._bind()

    @property
    def address(self) -> str:
        """`host:port`, as a client takes it."""
        return f"{bracketed(self._settings.host)}:{self.port}"

    def _add_plain_http(
        self,
        tokens: authentication.BearerTokens | None,
        metrics_page: Callable[[str], tuple[bytes, str]] | None,
        grpc_services: Sequence[str],
        span: HttpSpan | None,
    ) -> None:
        from server.http2.plain import Routes

        async def metrics(accept: str) -> tuple[bytes, str]:
            assert metrics_page is not None
            return await in_daemon_thread(functools.partial(metrics_page, accept))

        server: Any = self._server
        server.routes = Routes(
            self._service,
            is_serving=self.is_serving,
            max_message_bytes=self._settings.max_message_bytes,
            observer=self._observer,
            tokens=tokens,
            metrics=metrics if metrics_page else None,
            grpc_services=grpc_services,
            span=span,
        )

    def _bind(self) -> None:
        """Listen at all addresses of the host, or at none."""
        host = self._settings.host
        try:
            if not self._shares_port and sys.platform == "linux":
                kept = Reservation(host, self.port)
                self.port = kept.port
                if self._keeps_port:
                    self._kept = kept
                else:
                    kept.close()
            for address in literal_hosts(host):
                self.port = self._bind_one(f"{address}:{self.port}")
        except CannotServe as error:
            raise OSError(str(error)) from error
        except RuntimeError as error:
            self._leave_port()
            raise OSError(
                f"cannot listen on {self.address}: the address is taken, or not one of this machine"
            ) from error

    def _leave_port(self) -> None:
        if self._kept is not None:
            self._kept.close()

    def _bind_one(self, address: str) -> int:
        if self._credentials is None:
            port: int = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, self._credentials)
        return port

    def is_serving(self) -> bool:
        """Whether health says SERVING."""
        return self._serving and not self._stuck

    async def start(self) -> None:
        """Listen: until a model serves, health answers NOT_SERVING and the methods UNAVAILABLE.

        Raises:
            OSError: a shared address cannot be bound.
        """
        if self._shares_port:
            self._bind()
        await self._service.start()
        await self._server.start()
        self._watchdog = asyncio.create_task(self._watch_engine(), name="watchdog")

    async def load(self) -> None:
        """Serve what lies at the settings' `weights`.

        Raises:
            CannotServe: torch is not installed, or the weights cannot be served.
        """
        try:
            snapshot = await in_daemon_thread(lambda: take_snapshot(self._settings.weights))
        except InvalidCheckpoint as error:
            raise CannotServe(str(error)) from error
        await self.deploy(snapshot)

    async def deploy(self, snapshot: Snapshot) -> None:
        """Prepare a model and serve it.

        Raises:
            CannotServe: as `prepare`.
        """
        await self.prepare(snapshot)
        self.serve_prepared()

    async def prepare(self, snapshot: Snapshot) -> None:
        """Load a model beside the one that serves, warm it up, have it read the golden digits.

        Raises:
            CannotServe: torch is not installed, or the weights cannot be served.
        """
        start = time.monotonic()
        self._prepared = await in_daemon_thread(lambda: _load(snapshot, self._settings))
        logger.info("model %s loaded and checked in %.2f s", snapshot.version, time.monotonic() - start)

    def serve_prepared(self) -> None:
        """Answer with the model prepared last, from the next batch on."""
        if self._prepared is None:
            raise RuntimeError("no model was prepared")
        self._service.serve_model(self._prepared)
        self._prepared = None
        self._serving = not self._stopping  # a reload may end while the server drains
        self._tell_health()

    async def stop(self, grace: float | None = None, delay: float = 0) -> None:
        """End in order.

        Health says NOT_SERVING; for `delay` seconds calls are still accepted,
        as those who send them have to hear of it; then streams are told and
        accepted calls finish, for up to `grace` seconds.
        """
        self._stopping = True
        self._serving = False
        self._tell_health()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._cut_short.wait()
        self._health.end()
        self._reflection.end()
        self._service.drain()
        await self._server.stop(self._settings.grace if grace is None else grace)
        self._leave_port()
        if self._watchdog is not None:
            self._watchdog.cancel()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._service.close()
        except TimeoutError:
            logger.error("the engine is stuck: its batch is not waited for")

    async def cut_short(self) -> None:
        """End a `stop` that is under way without waiting for the calls that go on."""
        self._cut_short.set()
        await self._server.stop(0)

    async def _watch_engine(self) -> None:
        """Have health say NOT_SERVING while one batch takes longer than it may."""
        limit = self._settings.stuck_after
        while True:
            busy = self._service.busy_seconds
            if (busy > limit) != self._stuck:
                self._stuck = not self._stuck
                if self._stuck:
                    logger.error("the engine is stuck: a batch has been computed for %.1f s", busy)
                else:
                    logger.warning("the engine is no longer stuck")
                self._tell_health()
            await asyncio.sleep(min(limit / _LOOKS_PER_LIMIT, 1.0))

    def _tell_health(self) -> None:
        self._health.set_serving(self.is_serving())
        self._observer.health_changed(self.is_serving())


def _transport(
    settings: Settings,
    interceptors: Sequence[grpc.aio.ServerInterceptor],
    arrivals: Arrivals | None,
    *,
    shares_port: bool,
    on_lost: Callable[[], None],
) -> tuple[Any, Any]:
    """What speaks gRPC, and the credentials that its ports are opened with; None without TLS.

    Raises:
        CannotServe: the certificates cannot be used, or the transport is not installed.
    """
    if settings.transport == "grpcio":
        options = server_options(settings, shares_port=shares_port)
        return GrpcioServer(interceptors=interceptors, options=options, on_lost=on_lost), server_credentials(settings)
    try:
        from server.http2.server import Http2Server
    except ModuleNotFoundError as error:
        raise CannotServe(f"{error.name} is not installed; pip install 'mnist-grpc[server,fast]' brings it") from error
    server: Any = Http2Server(
        interceptors=interceptors,
        max_message_bytes=_TRANSPORT_MARGIN * settings.max_message_bytes,
        arrivals=arrivals,
        max_connection_age=settings.max_connection_age,
        max_connection_age_grace=settings.max_connection_age_grace,
        shares_port=shares_port,
    )
    return server, tls_context(settings)


def server_options(settings: Settings, *, shares_port: bool = False) -> list[tuple[str, int]]:
    """gRPC's options for a server."""
    limit = _TRANSPORT_MARGIN * settings.max_message_bytes
    return [
        # Unless the other one is of our own, a second server on a taken port is to fail, not to share it. It is where
        # the port is kept (`server.ports`).
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        *connection_options(settings),
    ]


def _load(snapshot: Snapshot, settings: Settings) -> Classifier:
    try:
        # Here, because torch takes seconds to import and the port can be open meanwhile.
        from server.inference import load_classifier
    except ModuleNotFoundError as error:
        raise CannotServe(not_installed(error)) from error
    return load_classifier(
        snapshot,
        device=settings.device,
        max_batch_size=settings.max_batch_size,
        min_accuracy=settings.min_accuracy,
    )


def build_server(settings: Settings) -> tuple[DigitServer, int]:
    """Return a server that is bound but not started, and its port. Called in the event loop."""
    server = DigitServer(settings)
    return server, server.port
