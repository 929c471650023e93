"""One load at one server: connect, warm up, measure, and say what was found."""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from client.load.jobs import Job
from client.load.lanes import Lane, StreamLane, UnaryLane
from client.load.loop import Closed, Open, Outcome, Times, at_random, evenly, run
from client.load.report import number
from client.load.wire import Connection, ConnectionEnded

CONNECTIONS = 4
CALLERS_A_CONNECTION = 64
"""At most, where nothing else is said; servers allow a hundred or more."""
SETTINGS_SECONDS = 10.0


class LoadFailed(Exception):
    """The run does not count: an answer was wrong, an error or lost."""


@dataclass(frozen=True)
class Load:
    """What is sent, and how."""

    kind: str = "classify"
    """A key of `client.load.jobs.KINDS`."""
    images: int = 1
    """In each message."""
    callers: int = 1
    """Closed loop: so many messages are unanswered at any time, on all connections together."""
    rate: float | None = None
    """Open loop: so many messages a second are meant to be sent."""
    even: bool = False
    """Whether these times are as far apart from each other, and not random."""
    connections: int = 0
    """0: four, as many as callers if these are fewer, and more for more than 256; one for a stream. A stream each."""
    seconds: float = 5.0
    warm_up: float = 1.0
    patience: float = 10.0

    @property
    def connection_count(self) -> int:
        if self.connections or self.kind == "stream":
            return self.connections or 1
        if self.rate is not None:
            return CONNECTIONS
        return max(min(self.callers, CONNECTIONS), -(-self.callers // CALLERS_A_CONNECTION))

    @property
    def name(self) -> str:
        """For people, in a few words."""
        images = f"{self.images:,} image{'s' if self.images > 1 else ''}"
        if self.rate is not None:
            return f"{self.kind}, {images}, {number(self.rate)}/s {'evenly' if self.even else 'at random'}"
        callers = "in flight" if self.kind == "stream" else "caller" if self.callers == 1 else "callers"
        return f"{self.kind}, {images}, {self.callers:,} {callers}"


@dataclass(frozen=True)
class Door:
    """How the server is reached."""

    target: str
    tls: ssl.SSLContext | None = None
    server_name: str | None = None
    metadata: Sequence[tuple[str, str]] = ()


def measure(door: Door, load: Load, digits: Sequence[int] | None) -> dict[str, Any]:
    """Run a load; digits are what to expect of each of the bench's images, None of a server that computes nothing.

    Returns:
        The load, and what was found, ready for JSON: messages and images a
        second, latencies in microseconds, faults.

    Raises:
        OSError: nobody can be reached.
        ValueError: the server does not allow so many callers on so many connections.
    """
    job = Job(load.kind, load.images, digits)
    times = Times(load.warm_up, load.seconds, load.patience)
    with ExitStack() as stack:
        connections = connect(door, job.path, load.connection_count)
        for connection in connections:
            stack.callback(connection.close)
        if load.kind == "stream":
            lanes: list[Lane] = [StreamLane(connection, job) for connection in connections]
        else:
            lanes = [UnaryLane(connection, job) for connection in connections]
            share = -(-load.callers // len(lanes))
            if load.rate is None and share > (most := min(connection.max_streams for connection in connections)):
                raise ValueError(
                    f"{load.callers} callers on {len(lanes)} connections are {share} each, and the server allows {most}"
                )
        start = time.monotonic()
        if load.rate is None:
            outcome = run(lanes, Closed(lanes, load.callers), start, times)
        else:
            schedule = evenly(start, load.rate) if load.even else at_random(start, load.rate)
            outcome = run(lanes, Open(lanes, schedule), start, times)
    callers = load.callers if load.rate is None else None
    return asdict(load) | {"callers": callers, "connections": load.connection_count} | _figures(load, outcome)


def connect(door: Door, path: str, count: int) -> list[Connection]:
    """Connections whose settings have come.

    Raises:
        OSError: nobody can be reached, or who is there speaks no HTTP/2.
    """
    opened: list[Connection] = []
    try:
        end = time.monotonic() + SETTINGS_SECONDS
        for _ in range(count):
            connection = Connection(
                door.target, path, tls=door.tls, server_name=door.server_name, metadata=door.metadata
            )
            opened.append(connection)
            while not connection.is_ready:
                if time.monotonic() > end:
                    raise OSError(f"{door.target}: no HTTP/2 within {SETTINGS_SECONDS:g} s")
                connection.exchange()
                time.sleep(0.001)
    except BaseException as error:
        for connection in opened:
            connection.close()
        if isinstance(error, ConnectionEnded):
            raise OSError(f"{door.target}: {error}") from error
        raise
    return opened


def _figures(load: Load, outcome: Outcome) -> dict[str, Any]:
    rate = outcome.answered / load.seconds
    return {
        "messages_per_second": round(rate, 1),
        "images_per_second": round(rate * load.images, 1),
        "latency_us": outcome.latencies.summary(),
        "late_us": outcome.late.summary() if load.rate is not None else None,
        "all_messages": outcome.all_answered,
        "sent_again": outcome.sent_again,
        "generator_core_share": round(outcome.cpu_seconds / load.seconds, 3),
        "faults": dict(outcome.faults),
        "examples": outcome.examples,
    }


def require_right(figures: dict[str, Any]) -> None:
    """Raise LoadFailed if anything but right answers came, or nothing."""
    faults = [f"{count} x {what} ({figures['examples'][what]})" for what, count in figures["faults"].items()]
    if not faults and not figures["latency_us"]["count"]:
        faults = ["nothing was answered"]
    if faults:
        raise LoadFailed("; ".join(faults))
