"""What every bench of servers does: one load at one server, and the server's processor time meanwhile."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TypedDict, TypeVar

from bench.processes import Generator, Server
from bench.scenarios import Scenario
from client.load.histogram import Histogram

T = TypeVar("T")


class Sample(TypedDict):
    """One measurement of one server."""

    rate: float
    """Images a second."""
    p50_us: float
    p99_us: float
    cpu_us: float
    """Of the server, a message."""


def sample(
    load: Generator,
    server: Server,
    scenario: Scenario,
    seconds: float,
    digits: Sequence[int] | None,
    connections: int = 0,
) -> Sample:
    """Measure once; digits are what to expect, None of a server that computes nothing.

    Raises:
        RuntimeError: an answer was wrong, an error or lost.
    """
    before = server.cpu_seconds()
    answer = load.measure(
        target=server.target, scenario=scenario.name, seconds=seconds, digits=digits, connections=connections
    )
    cpu = server.cpu_seconds() - before
    return {
        "rate": answer["rate"],
        "p50_us": answer["p50_us"],
        "p99_us": answer["p99_us"],
        "cpu_us": cpu * 1e6 / answer["all_messages"],
    }


def percentiles_us(latencies: Iterable[float]) -> tuple[float, float]:
    """The median and the 99th percentile of seconds, in microseconds."""
    times = Histogram()
    for latency in latencies:
        times.add(round(latency * 1e9))
    return times.percentile(50) / 1e3, times.percentile(99) / 1e3


def in_turn(turns: Sequence[T], number: int) -> Sequence[T]:
    """Who is measured first changes from round to round, so that what else the machine does falls on all."""
    return turns if number % 2 == 0 else turns[::-1]


def ratios(values: Sequence[float], bases: Sequence[float]) -> list[float]:
    """Of each round."""
    return [value / base for value, base in zip(values, bases, strict=True)]


def spread(ratios: Sequence[float]) -> str:
    """The median, with the least and the greatest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
