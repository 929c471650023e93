"""Which weights are served: taken from the disk, tried, exchanged, taken back.

Knows the files and two functions that it is given; knows neither torch nor
processes, so that a supervisor of many workers uses it as a lone server does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from digits.snapshot import InvalidCheckpoint, Snapshot, manifest_path, take_snapshot
from server.errors import CannotServe
from server.observer import Observer
from server.threads import in_daemon_thread

logger = logging.getLogger(__name__)

SETTLED_SECONDS = 0.2
"""Files that changed are read once they have not changed any more for so long: two files are not replaced at once."""

READ_SECONDS = 30.0
"""For how long new files may take to be read; a pipe that nobody writes to, or a disk that hangs, takes for ever."""

Deploy = Callable[[Snapshot], Awaitable[None]]
"""Loads a model beside the one that serves, checks it, exchanges the two; or raises CannotServe and changes nothing."""


class NothingToRollBackTo(CannotServe):
    """No other weights were served before."""


@dataclass(frozen=True)
class Served:
    """The outcome of a reload or a rollback."""

    version: str
    """Of the model that now answers."""
    previous_version: str
    """Of the one that a rollback would bring back; empty if there is none."""


class Deployment:
    """The weights that are served now, and those that were served before.

    Reloads and rollbacks take turns; each either succeeds as a whole or changes
    nothing.
    """

    def __init__(self, path: str, deploy: Deploy, observer: Observer | None = None) -> None:
        """`path` is that of the weights file; its manifest is looked for beside it."""
        self._path = path
        self._deploy = deploy
        self._observer = observer or Observer()
        self._turn = asyncio.Lock()
        self._closed = False
        self._seen = self._signature()
        self.current: Snapshot | None = None
        self.previous: Snapshot | None = None

    async def first(self) -> None:
        """Serve what lies on the disk.

        Raises:
            CannotServe: it cannot be read, or does not pass the checks.
        """
        async with self._turn:
            self._seen = self._signature()
            self.current = await self._exchange(await self._read())

    async def reload(self) -> Served:
        """Serve what lies on the disk now, in place of what is served.

        Raises:
            CannotServe: the new weights cannot be read, or do not pass the
                checks; the old ones go on serving.
        """
        async with self._turn:
            self._seen = self._signature()
            try:
                snapshot = await self._read()
                if self.current is not None and _same(snapshot, self.current):
                    self._observer.reload_ended("unchanged")
                    logger.info("the weights at %s are those that are served: version %s", self._path, snapshot.version)
                    return self._served()
                await self._exchange(snapshot)
            except CannotServe as error:
                self._observer.reload_ended("refused")
                logger.error("new weights are refused, and version %s goes on serving: %s", self._version(), error)
                raise
            if self.current is None or self.current.weights != snapshot.weights:
                self.previous = self.current  # another manifest alone is no other version to go back to
            self.current = snapshot
            self._observer.reload_ended("served")
            logger.info("version %s serves in place of %s", snapshot.version, self._served().previous_version)
            return self._served()

    async def rollback(self) -> Served:
        """Serve the weights again that were served before; a second rollback takes the first one back.

        The file on the disk is left as it is, and is looked at again when it changes.

        Raises:
            NothingToRollBackTo: no other weights were served before.
            CannotServe: the old weights no longer pass the checks.
        """
        async with self._turn:
            if self.previous is None:
                raise NothingToRollBackTo(f"version {self._version()} is the first that is served: none was before it")
            try:
                await self._exchange(self.previous)
            except CannotServe as error:
                self._observer.reload_ended("refused")
                logger.error("the rollback is refused, and version %s goes on serving: %s", self._version(), error)
                raise
            self.previous, self.current = self.current, self.previous
            self._observer.reload_ended("rolled_back")
            logger.info(
                "rolled back: version %s serves in place of %s", self._version(), self._served().previous_version
            )
            return self._served()

    async def watch(self, interval: float, told: asyncio.Event) -> None:
        """Reload whenever somebody was `told` to, or one of the files was replaced or written.

        Looks at the files every `interval` seconds; with 0, never.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval or None):
                    await told.wait()
            if told.is_set():
                told.clear()
            elif self._signature() == self._seen:
                continue
            else:
                await self._settle()
            try:
                await self.reload()
            except CannotServe:
                pass  # told already; the next change is tried again
            except Exception:
                logger.exception("the new weights could not be tried, and version %s goes on serving", self._version())

    async def _settle(self) -> None:
        last = None
        while (signature := self._signature()) != last:
            last = signature
            await asyncio.sleep(SETTLED_SECONDS)

    async def _read(self) -> Snapshot:
        try:
            async with asyncio.timeout(READ_SECONDS if self.current else None):
                return await in_daemon_thread(lambda: take_snapshot(self._path))
        except TimeoutError as error:
            raise CannotServe(f"{self._path}: cannot be read within {READ_SECONDS:g} s") from error
        except InvalidCheckpoint as error:
            raise CannotServe(str(error)) from error

    def close(self) -> None:
        """Exchange nothing any more: the server is about to stop."""
        self._closed = True

    async def _exchange(self, snapshot: Snapshot) -> Snapshot:
        if self._closed:
            raise CannotServe("this server is about to stop")
        await self._deploy(snapshot)
        return snapshot

    def _version(self) -> str:
        return "" if self.current is None else self.current.version

    def _served(self) -> Served:
        return Served(self._version(), "" if self.previous is None else self.previous.version)

    def _signature(self) -> tuple[object, ...]:
        """Differs after either file was replaced or written."""
        return tuple(_stat(path) for path in (self._path, str(manifest_path(self._path))))


def _same(one: Snapshot, other: Snapshot) -> bool:
    return one.weights == other.weights and one.manifest == other.manifest


def _stat(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
