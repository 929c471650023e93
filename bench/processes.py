"""The processes of a run: two servers and the load generator, started and ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil


class Server:
    """A server process that has said where it serves."""

    def __init__(self, process: subprocess.Popen[str], target: str) -> None:
        self.target = target
        self._process = psutil.Process(process.pid)

    def cpu_seconds(self) -> float:
        """Processor time used so far, by all its threads."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def resident_mb(self) -> float:
        """Resident memory."""
        return float(self._process.memory_info().rss / 1e6)


class Generator:
    """The load generator; see `bench.generator`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def measure(self, **order: Any) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "the load generator died"}')
        if "error" in answer:
            raise RuntimeError(f"{order['scenario']} at {order['target']}: {answer['error']}")
        return answer


@contextmanager
def started(module: str, arguments: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run `python -m module`; end it when left."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.terminate()


@contextmanager
def server(module: str, arguments: Sequence[str] = ()) -> Iterator[Server]:
    """Run a server; it is ready when it says so."""
    with started(module, arguments) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "serving on " in line:
                yield Server(process, line.split("serving on ")[1].strip())
                return
        raise RuntimeError(f"python -m {module} ended before it served")


@contextmanager
def generator() -> Iterator[Generator]:
    """Run the load generator."""
    with started("bench.generator") as process:
        yield Generator(process)
