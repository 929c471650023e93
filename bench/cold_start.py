"""How long a process takes until it says that it serves, and the memory that it then has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from bench.processes import server


class Start(NamedTuple):
    """Of one process, from nothing to its words."""

    seconds: float
    resident_mb: float


def start(module: str, arguments: Sequence[str] = ()) -> Start:
    """Run `python -m module` until it says `serving on`, and end it."""
    begin = time.perf_counter()
    with server(module, arguments) as running:
        return Start(time.perf_counter() - begin, running.resident_mb())
