"""What the generator itself can do: the same load at a server that computes nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from client.load.measure import Door, Load, LoadFailed, measure, require_right

SECONDS = 1.0
WARM_UP_SECONDS = 0.3
CALLERS = 64
"""With so many the ceiling of an open loop is found."""


@contextmanager
def responder() -> Iterator[Door]:
    """Run `client.load.responder` as a process of its own."""
    command = [sys.executable, "-m", "client.load.responder"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "serving on " not in line:
                raise LoadFailed("the generator's own server ended before it served")
            yield Door(line.split("serving on ")[1].strip())
        finally:
            process.kill()


def ceiling(door: Door, load: Load) -> dict[str, Any]:
    """Messages and images a second, and latencies, of the same load at the responder; in a closed loop if it is open.

    Raises:
        LoadFailed: not even its answers came right.
    """
    callers = load.callers if load.rate is None else CALLERS
    figures = measure(
        door, replace(load, rate=None, callers=callers, seconds=SECONDS, warm_up=WARM_UP_SECONDS), digits=None
    )
    require_right(figures)
    return {name: figures[name] for name in ("messages_per_second", "images_per_second", "latency_us")}
