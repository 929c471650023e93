"""Systems as trees of processes: started, waited for, weighed, paused and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from bench.peers.load import LoadError, Target, WrongAnswer, ask
from bench.peers.peer import ROOT, CannotStart, Command, Peer, Place, variables

POLL_SECONDS = 0.02
PORTS = 6
"""As many as any peer wants."""
ASK_SECONDS = 2.0
END_SECONDS = 10.0
REASON_CHARACTERS = 200


class Running:
    """A system that has given its first right answer."""

    def __init__(self, process: subprocess.Popen[bytes], target: Target, ready_seconds: float) -> None:
        self.target = target
        self.ready_seconds = ready_seconds
        """From its start to its first right answer."""
        self._process = process

    def memory_mb(self) -> float:
        """Resident memory of all its processes; pages that several share count once."""
        total = 0
        for process in _tree(self._process.pid):
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / 1e6

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all its processes, so that one that spins while it is idle takes nothing from another."""
        processes = _tree(self._process.pid)
        _signal(processes, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(processes, signal.SIGCONT)


@contextmanager
def running(peer: Peer, digits: list[int]) -> Iterator[Running]:
    """Start a system, wait until it reads all of `client.load.images.images()` as `digits`, and end it when left.

    Raises:
        CannotStart: if it is not installed, ends, or does not answer in time.
        WrongAnswer: if it reads anything else.
    """
    python = peer.python()
    with tempfile.TemporaryDirectory(prefix="mnist-grpc-peer-", ignore_cleanup_errors=True) as folder:
        place = Place(python, Path(folder), _free_ports())
        command = peer.start(place)
        target = Target(f"127.0.0.1:{place.port}", peer.dialect)
        log = place.folder / "log"
        start = time.monotonic()
        with _started(command, place) as process:
            _wait(process, peer, target, digits, log)
            yield Running(process, target, time.monotonic() - start)


@contextmanager
def _started(command: Command, place: Place) -> Iterator[subprocess.Popen[bytes]]:
    with ExitStack() as stack:
        log = stack.enter_context((place.folder / "log").open("wb"))
        path = f"{place.python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        try:
            process = subprocess.Popen(
                command.arguments,
                cwd=ROOT,
                env={**os.environ, **variables(), "PATH": path, **command.variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise CannotStart(str(error)) from error
        try:
            yield process
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], peer: Peer, target: Target, digits: list[int], log: Path) -> None:
    end = time.monotonic() + peer.start_seconds
    last = ""
    while process.poll() is None and (left := end - time.monotonic()) > 0:
        try:
            answer = ask(target, min(ASK_SECONDS, left))
        except WrongAnswer:
            raise
        except LoadError as error:
            last = str(error)
            time.sleep(POLL_SECONDS)
            continue
        if answer != digits:
            wrong = sum(one != other for one, other in zip(answer, digits, strict=False))
            raise WrongAnswer(f"{wrong} of {len(digits)} digits, in {len(answer)} answers, are not the network's")
        return
    if process.poll() is not None:
        raise CannotStart(f"ended with code {process.returncode}: {_last_line(log)}")
    raise CannotStart(f"no answer in {peer.start_seconds:.0f} s ({last}): {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:REASON_CHARACTERS] if lines else "it said nothing"


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a system, then whatever it has left, processes with sessions of their own too."""
    processes = _tree(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    _signal(processes, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(processes, END_SECONDS)


def _free_ports() -> tuple[int, ...]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(PORTS)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return tuple(one.getsockname()[1] for one in sockets)
