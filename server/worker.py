"""One worker: a process that serves at a port which it shares with others, as its supervisor says.

`python -m server.worker NUMBER FD`, started by `server.supervisor` with one end
of a socket pair as FD. It listens once it has a model that serves, and ends in
order when it is told to, when it gets SIGTERM, or when the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from digits.snapshot import Snapshot
from server import logs
from server.control import Fields, Line, LineLost
from server.deployment import Served
from server.errors import CannotServe, not_installed
from server.loop import run
from server.memory import spare_collections, use_one_arena
from server.settings import Settings
from server.signals import unless
from server.threads import in_daemon_thread

if TYPE_CHECKING:
    from server.app import DigitServer
    from server.instruments import Instruments

logger = logging.getLogger("server.worker")  # not __name__: this file is run

ORPHAN_SECONDS = 10.0
"""For how long beyond its grace a worker whose supervisor is gone may live, even if its event loop is stuck."""


class Worker:
    """Answers the supervisor's questions. Also an `Exchange`, which passes on what ModelAdmin is asked."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._settings = Settings()
        self._line: Line | None = None
        self._server: DigitServer | None = None
        self._instruments: Instruments | None = None
        self._listens = False
        self._told_to_stop = asyncio.Event()
        self._told_again = asyncio.Event()

    async def work(self, end: socket.socket) -> None:
        """Serve until told to stop, or until nobody is there who could tell."""
        watched = os.dup(end.fileno())
        self._line = line = await Line.over(end, self.answer)
        threading.Thread(target=self._outlive_nobody, args=(watched,), name="orphan", daemon=True).start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._leave)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        waiting = [asyncio.create_task(event.wait()) for event in (line.lost, self._told_to_stop)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if line.lost.is_set():
            logger.error("the supervisor is gone: draining for up to %g s", self._settings.grace)
        if self._server is not None and self._listens:
            await self._drain(self._server)
        if self._instruments is not None:
            self._instruments.__exit__(None, None, None)

    async def answer(self, question: str, fields: Fields, blobs: Sequence[bytes]) -> Fields:
        """Do what the supervisor asks for; see `server.control.Answer`."""
        match question:
            case "begin":
                await self._begin(Settings(**fields))
            case "prepare":
                weights, *manifest = blobs
                await self._begun.prepare(Snapshot(fields["path"], weights, manifest[0] if manifest else None))
            case "serve":
                self._begun.serve_prepared()
            case "listen":
                spare_collections()
                await self._begun.start()
                self._listens = True
            case "stop":
                self._told_to_stop.set()
            case "cut_short":
                self._told_to_stop.set()
                self._told_again.set()
            case "ping":
                pass
            case _:
                raise ValueError(f"unknown question {question!r}")
        return {}

    async def reload(self) -> Served:
        """Have all workers serve what lies on the disk."""
        return await self._exchange("reload")

    async def rollback(self) -> Served:
        """Have all workers serve what was served before."""
        return await self._exchange("rollback")

    async def _exchange(self, step: str) -> Served:
        assert self._line is not None
        try:
            return Served(**await self._line.ask(step))
        except LineLost as lost:
            raise CannotServe("this server is about to stop") from lost

    @property
    def _begun(self) -> DigitServer:
        if self._server is None:
            raise RuntimeError("asked before it was told to begin")
        return self._server

    async def _begin(self, settings: Settings) -> None:
        """Put a server together, and import what it needs for models, so that they can be tried quickly."""
        self._settings = settings
        logs.configure(settings, worker=self._number)
        try:
            from server.app import DigitServer
            from server.instruments import Instruments

            self._instruments = Instruments(settings, self._number)
            self._server = DigitServer(
                settings,
                observer=self._instruments.observer,
                interceptors=self._instruments.interceptors,
                exchange=self if settings.admin else None,
                shares_port=True,
                metrics_page=self._instruments.page,
                http_span=self._instruments.http_span,
                on_lost=self._leave,
            )
            await in_daemon_thread(_import_torch)
        except ModuleNotFoundError as error:
            raise CannotServe(not_installed(error)) from error
        except OSError as error:
            raise CannotServe(str(error)) from error

    def _leave(self) -> None:
        """SIGTERM to this process alone, or its port is lost: have another one take its place, and end."""
        if self._told_to_stop.is_set():
            self._told_again.set()
            return
        logger.info("told to end: draining for up to %g s", self._settings.grace)
        self._told_to_stop.set()
        if self._line is not None:
            self._line.tell("leaving")

    async def _drain(self, server: DigitServer) -> None:
        stopping = asyncio.create_task(server.stop(delay=self._settings.drain_delay))
        if not await unless(self._told_again, asyncio.shield(stopping)):
            await server.cut_short()

    def _outlive_nobody(self, end: int) -> None:
        """In a thread of its own, as the event loop may be stuck when the supervisor dies."""
        poll = select.poll()
        poll.register(end, 0)  # that the other end is gone is told in any case
        poll.poll()
        time.sleep(self._settings.drain_delay + self._settings.grace + ORPHAN_SECONDS)
        os._exit(1)


def _import_torch() -> None:
    import server.inference  # noqa: F401


def main(arguments: Sequence[str]) -> None:
    """Work, with the worker's number and the file descriptor of the socket as arguments."""
    for kind in (signal.SIGINT, signal.SIGHUP):  # of a terminal, they go to all processes: the supervisor decides
        signal.signal(kind, signal.SIG_IGN)
    use_one_arena()
    number, end = map(int, arguments)
    run(Worker(number).work(socket.socket(fileno=end)))
    sys.stderr.flush()
    os._exit(0)  # everything is done; to take torch apart would take longer than to stop


if __name__ == "__main__":
    main(sys.argv[1:])
