"""Several workers at one port, kept alive and on one version of the model.

The supervisor serves nothing itself and imports neither torch nor grpc. It
takes the port, starts the workers (new processes, never forks of this one),
says over a socket to each what is to be done, and replaces those that die or
no longer answer.

What no await may come between: a worker is counted among those that serve, or
all of these are told to exchange the model, in the same step of the event loop
in which it was seen that they have prepared the model that is then served. So
there is no moment at which a worker could die, or come, and be left with
another version than the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from digits.snapshot import Snapshot
from server.control import Failed, Fields, Line, LineLost
from server.deployment import Deployment
from server.errors import CannotServe
from server.observer import Observer
from server.ports import Reservation
from server.settings import Settings, bracketed
from server.signals import Told, unless

logger = logging.getLogger(__name__)

PING_SECONDS = 1.0
"""How often a worker is asked whether it is there."""

SILENCE_SECONDS = 10.0
"""For how long beyond `stuck_after` a worker may leave that unanswered."""

PREPARE_SECONDS = 300.0
"""For how long a worker may load and try a model, or begin: disks and devices may be slow."""

LEEWAY_SECONDS = 5.0
"""For how long a worker may go on beyond the time in which it has to end."""

STEADY_SECONDS = 10.0
"""A worker that dies sooner has failed, and the next one waits longer."""

PAUSES = (0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before a worker is replaced, by how many failed in a row before."""

TRIALS = 2
"""How many workers may die of new weights before they are refused."""


class WorkerLost(Exception):
    """A worker died; the message says which, and how."""


class Worker:
    """A worker as the supervisor sees it."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], line: Line) -> None:
        self.number = number
        self.process = process
        self.line = line
        self.prepared: Snapshot | None = None
        """What it would serve if it were told to."""
        self.gone = asyncio.Event()
        """It is about to end, or has."""
        self.ended = asyncio.Event()
        """Its process is no more."""

    def __str__(self) -> str:
        return f"worker {self.number} (process {self.process.pid})"

    @property
    def lives(self) -> bool:
        """Whether it can be asked."""
        return not self.line.lost.is_set()

    async def ask(self, question: str, fields: Fields | None = None, blobs: Sequence[bytes] = ()) -> Fields:
        """Ask it, and wait for the answer.

        Raises:
            CannotServe: it refused, or failed.
            WorkerLost: it died, or was killed as it did not answer in time.
        """
        return await self.answer(self.line.ask(question, fields, blobs), question)

    async def answer(self, asked: asyncio.Future[Fields], question: str) -> Fields:
        """Wait for the answer to what it was asked; raises as `ask`."""
        try:
            async with asyncio.timeout(PREPARE_SECONDS):
                return await asked
        except TimeoutError:
            logger.error("%s has not answered %r for %g s, and is killed", self, question, PREPARE_SECONDS)
        except LineLost:
            pass
        except Failed as failure:
            raise CannotServe(f"{self}: {failure}") from failure
        self.process.kill()  # in case that it has lost its line and goes on
        await self.ended.wait()
        raise WorkerLost(f"{self} {self.end}")

    async def prepare(self, snapshot: Snapshot) -> None:
        """Have it load and check a model; raises as `ask`."""
        blobs = [snapshot.weights] if snapshot.manifest is None else [snapshot.weights, snapshot.manifest]
        self.prepared = None
        await self.ask("prepare", {"path": snapshot.path}, blobs)
        self.prepared = snapshot

    def serve_prepared(self) -> asyncio.Future[Fields]:
        """Tell it now to serve what it has prepared; return what `answer` waits for."""
        self.prepared = None
        return self.line.ask("serve")

    @property
    def end(self) -> str:
        """How it ended, in words."""
        code = self.process.returncode
        if code is None:
            return "lives"
        if code >= 0:
            return f"ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"


class Supervisor:
    """Starts workers, keeps them, and ends them."""

    def __init__(
        self,
        settings: Settings,
        count: int,
        *,
        observer: Observer | None = None,
        metrics_directory: str | None = None,
    ) -> None:
        """Make `count` workers possible; `settings` are theirs, with the port that is kept for them.

        With `metrics_directory`, they count there.
        """
        self._settings = settings
        self._count = count
        self._metrics_directory = metrics_directory
        self._workers: set[Worker] = set()
        """All whose processes have not ended."""
        self._serving: set[Worker] = set()
        """Those that are on `_served`, or will be at the same moment as all others; some may be dead."""
        self._served: Snapshot | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._joined = asyncio.Event()
        self._stopping = False
        self.deployment = Deployment(settings.weights, self._deploy, observer)

    async def start(self) -> None:
        """Have all workers serve what lies on the disk.

        Raises:
            CannotServe: one of them cannot, or died.
        """
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)
        try:
            workers = [await self._spawn(number) for number in range(1, self._count + 1)]
            await asyncio.gather(*map(self._begin, workers))
            for worker in workers:
                self._join(worker)
            await self.deployment.first()
            await asyncio.gather(*(worker.ask("listen") for worker in workers))
        except WorkerLost as lost:
            raise CannotServe(f"{lost} before it served") from lost
        for worker in workers:
            self._go_on(self._watch(worker))
            self._go_on(self._keep(worker))
        logger.info("%s serve", ", ".join(map(str, workers)))

    async def stop(self, cut_short: asyncio.Event) -> None:
        """Have all workers drain at the same time, and wait for their ends, or as long as they may take.

        Those that do not serve yet are killed. With `cut_short`, calls that go on are not waited for.
        """
        self._stopping = True
        self.deployment.close()
        for task in self._tasks:
            task.cancel()
        for worker in self._workers:
            if worker in self._serving:
                worker.line.tell("stop")
            else:
                worker.process.kill()
        limit = self._settings.drain_delay + self._settings.grace + LEEWAY_SECONDS
        if not await unless(cut_short, self._all_ended(), limit) and cut_short.is_set():
            logger.info("told again: not waiting for the calls that go on")
            for worker in self._workers:
                worker.line.tell("cut_short")
            await unless(asyncio.Event(), self._all_ended(), LEEWAY_SECONDS)
        for worker in self._workers:
            logger.error("%s has not ended in time, and is killed", worker)
        await self.kill()

    async def kill(self) -> None:
        """End all workers at once."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        for worker in self._workers:
            worker.process.kill()
        await self._all_ended()

    # Workers come and go -------------------------------------------------------------

    async def _spawn(self, number: int) -> Worker:
        ours, theirs = socket.socketpair()
        environment: dict[str, str] = {}
        if self._metrics_directory is not None:
            from server.metrics import DIRECTORY_VARIABLE

            environment[DIRECTORY_VARIABLE] = self._metrics_directory
        with theirs:
            try:
                process = _start(["-m", "server.worker", str(number), str(theirs.fileno())], theirs, environment)
            except OSError as error:
                ours.close()
                raise CannotServe(f"worker {number} cannot be started: {error.strerror}") from error
        worker: Worker

        async def answer(question: str, fields: Fields, blobs: Sequence[bytes]) -> Fields:
            return await self._answer(worker, question)

        try:
            line = await Line.over(ours, answer)
        except BaseException:
            process.kill()
            raise
        worker = Worker(number, process, line)
        self._workers.add(worker)
        self._reap()  # it may have ended already
        return worker

    async def _begin(self, worker: Worker) -> None:
        await worker.ask("begin", asdict(self._settings))

    def _join(self, worker: Worker) -> None:
        self._serving.add(worker)
        self._joined.set()

    async def _answer(self, worker: Worker, question: str) -> Fields:
        """What a worker asks for."""
        match question:
            case "leaving":
                worker.gone.set()
                return {}
            case "reload":
                return asdict(await self.deployment.reload())
            case "rollback":
                return asdict(await self.deployment.rollback())
        raise ValueError(f"unknown question {question!r}")

    def _reap(self) -> None:
        """Learn which processes have ended."""
        for worker in [worker for worker in self._workers if worker.process.poll() is not None]:
            self._workers.discard(worker)
            self._serving.discard(worker)
            worker.ended.set()
            worker.gone.set()
            if self._metrics_directory is not None and not self._stopping:
                from server.metrics import worker_died

                worker_died(worker.process.pid, self._metrics_directory)
        if os.getpid() == 1:
            _reap_strangers({worker.process.pid for worker in self._workers})

    async def _keep(self, worker: Worker) -> None:
        """Have another worker take the place of one that is gone, again and again."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            began = loop.time()
            await worker.gone.wait()
            failures = failures + 1 if loop.time() - began < STEADY_SECONDS else 0
            if worker.ended.is_set():
                logger.error("%s %s: another one takes its place", worker, worker.end)
            else:
                logger.info("%s leaves: another one takes its place", worker)
            while True:
                await asyncio.sleep(PAUSES[min(failures, len(PAUSES) - 1)])
                try:
                    worker = await self._replacement(worker.number)
                    break
                except (CannotServe, WorkerLost) as error:
                    logger.error("worker %d is not replaced yet: %s", worker.number, error)
                except Exception:
                    logger.exception("worker %d is not replaced yet", worker.number)
                failures += 1
            logger.info("%s serves", worker)

    async def _replacement(self, number: int) -> Worker:
        """Return a new worker that serves what all others serve."""
        worker = await self._spawn(number)
        try:
            await self._begin(worker)
            snapshot: Snapshot | None = None
            while snapshot is not self._served:
                assert self._served is not None
                snapshot = self._served
                await worker.prepare(snapshot)
            # No await since the last look at what is served.
            serving = worker.serve_prepared()
            self._join(worker)
            await worker.answer(serving, "serve")
            await worker.ask("listen")
        except Exception:
            worker.process.kill()
            raise
        self._go_on(self._watch(worker))
        return worker

    async def _watch(self, worker: Worker) -> None:
        """Kill a worker that no longer answers, or that has lost its line and goes on."""
        limit = self._settings.stuck_after + SILENCE_SECONDS
        while worker.lives:
            asked = worker.line.ask("ping")
            # In steps, so that a pause of the whole machine counts as one of them.
            for _ in range(math.ceil(limit / PING_SECONDS)):
                if (await asyncio.wait((asked,), timeout=PING_SECONDS))[0]:
                    break
            else:
                logger.error("%s has not answered for %g s, and is killed", worker, limit)
                worker.process.kill()
                return
            if asked.exception() is None:
                await asyncio.sleep(PING_SECONDS)
        if not await unless(asyncio.Event(), worker.ended.wait(), LEEWAY_SECONDS):
            worker.process.kill()

    # One version --------------------------------------------------------------------

    async def _deploy(self, snapshot: Snapshot) -> None:
        """Have all workers exchange their model at the same time, once each has tried the new one; or none."""
        await self._try(snapshot)
        while waiting := [worker for worker in self._serving if worker.lives and worker.prepared is not snapshot]:
            outcomes = await asyncio.gather(*(worker.prepare(snapshot) for worker in waiting), return_exceptions=True)
            for outcome in outcomes:
                if outcome is not None and not isinstance(outcome, WorkerLost):
                    raise outcome
        # No await since the last look at who serves: whoever comes from here on comes with the new model.
        self._served = snapshot
        told = [(worker, worker.serve_prepared()) for worker in self._serving if worker.lives]
        for worker, serving in told:
            try:
                await worker.answer(serving, "serve")
            except WorkerLost:
                pass  # its replacement serves the new model
            except CannotServe as error:
                logger.error("%s; it is killed", error)
                worker.process.kill()

    async def _try(self, snapshot: Snapshot) -> None:
        """Have one worker prepare it, so that weights that kill a process do not kill all."""
        lost: WorkerLost | None = None
        for _ in range(TRIALS):
            while not (serving := [worker for worker in self._serving if worker.lives]):
                if self.deployment.current is None:
                    raise CannotServe("all workers died before they served")
                self._joined.clear()
                await self._joined.wait()
            try:
                await min(serving, key=lambda worker: worker.number).prepare(snapshot)
                return
            except WorkerLost as error:
                lost = error
        raise CannotServe(f"{snapshot.path}: {lost} when it tried the weights")

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the supervisor has a fault", exc_info=error)

    async def _all_ended(self) -> None:
        for worker in list(self._workers):
            await worker.ended.wait()


async def supervise(settings: Settings, workers: int) -> None:
    """Have `workers` processes serve until SIGTERM or SIGINT, then drain all; a second signal cuts that short.

    SIGHUP reloads the weights.

    Raises:
        CannotServe: the port, the weights, or something else that the settings
            name cannot be used.
    """
    if sys.platform != "linux":
        raise CannotServe("--workers is 1 where the kernel spreads no connections over processes, as on this system")
    told = Told()
    with Reservation(settings.host, settings.port) as reserved, _metrics(settings) as (observer, directory):
        supervisor = Supervisor(
            replace(settings, port=reserved.port), workers, observer=observer, metrics_directory=directory
        )
        try:
            if await unless(told.to_stop, supervisor.start()):
                print(f"serving on {reserved.address}", flush=True)
                watching = supervisor.deployment.watch(settings.reload_interval, told.to_reload)
                await unless(told.to_stop, watching)
                logger.info("draining %d workers for up to %g s", workers, settings.grace)
                await supervisor.stop(told.again)
        finally:
            await supervisor.kill()
    logger.info("stopped")


@contextlib.contextmanager
def _metrics(settings: Settings) -> Iterator[tuple[Observer | None, str | None]]:
    """Serve what all workers count; yield what counts for the supervisor, and the directory in which all do."""
    if settings.metrics_port is None:
        yield None, None
        return
    from server.metrics import Metrics, start_metrics_server

    with tempfile.TemporaryDirectory(prefix="mnist-grpc-metrics-") as directory:
        observer = Metrics(directory=directory, max_queue_size=None)
        page, port = start_metrics_server(settings.host, settings.metrics_port, multiprocess_dir=directory)
        logger.info("metrics on http://%s:%d/metrics", bracketed(settings.host), port)
        try:
            yield observer, directory
        finally:
            page.close()


def _start(arguments: Sequence[str], end: socket.socket, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a Python that finds what this one finds, and has one of our sockets.

    It begins with SIGTERM and SIGINT blocked, so that it misses none before it
    is ready for them.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    signals = {signal.SIGTERM, signal.SIGINT}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        return subprocess.Popen(
            [sys.executable, "-P", *arguments],
            pass_fds=[end.fileno()],
            env={**os.environ, **environment, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # which is for one line of the supervisor's
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _reap_strangers(ours: set[int]) -> None:
    """As the first process of a container: end the processes for good whose parents are gone."""
    with contextlib.suppress(ChildProcessError):
        while (
            ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        ) is not None and ended.si_pid not in ours:
            os.waitpid(ended.si_pid, 0)
