"""Rounds in turn: each scenario is measured of a peer and of ours right after one another."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.peers.load import LoadError, LoadGenerator, Sample, WrongAnswer
from bench.peers.peer import CannotStart, Peer
from bench.peers.running import Running, running
from bench.rounds import in_turn


@dataclass(frozen=True)
class Scenario:
    """A closed loop."""

    name: str
    images: int
    """In each request."""
    in_flight: int
    with_sdk: bool = False
    """Whether ours is also measured through the SDK, whose calls go together; the peers have nothing like it."""

    def ways(self, ours: Iterable[str]) -> list[Way]:
        """How ours are measured."""
        ways = []
        for name in ours:
            if self.in_flight > 1 or not name.endswith("x2"):  # one caller has one worker
                ways.append(Way(name, name, is_sdk=False))
            if self.with_sdk and name.endswith("x1"):  # as one client has one connection
                ways.append(Way(f"{name}, SDK", name, is_sdk=True))
        return ways


class Way(NamedTuple):
    """One system of ours under one load."""

    name: str
    """Of its samples."""
    system: str
    is_sdk: bool


SCENARIOS = (
    Scenario("1 caller", 1, 1),
    Scenario("64 callers", 1, 64, with_sdk=True),
    Scenario("64 images, 4 in flight", 64, 4),
    Scenario("256 images, 4 in flight", 256, 4),
)


class Loads(NamedTuple):
    """What makes the load."""

    direct: LoadGenerator
    sdk: LoadGenerator


@dataclass
class Result:
    """What was found out about a system."""

    name: str
    settings: str
    failed: str = ""
    """Why there are no figures."""
    is_wrong: bool = False
    """Whether it gave a wrong answer."""
    ready_seconds: float = 0.0
    memory_mb: float = 0.0
    errors: dict[str, str] = field(default_factory=dict)
    """By scenario: why it has no figures there."""
    rounds: dict[str, list[dict[str, Sample]]] = field(default_factory=dict)
    """By scenario, one entry a round: the samples of this system and of ours, by name."""


def measure(
    peers: Iterable[Peer],
    ours: Mapping[str, Peer],
    loads: Loads,
    digits: list[int],
    rounds: int,
    seconds: float,
) -> tuple[list[Result], list[Result]]:
    """Return the results of ours, without rounds, and of the peers.

    Raises:
        CannotStart, LoadError: of ours.
    """
    with ExitStack() as stack:
        systems = {name: stack.enter_context(_second_start(one, digits)) for name, one in ours.items()}
        results = [_measure_peer(peer, systems, loads, digits, rounds, seconds) for peer in peers]
        mine = [
            Result(name, one.settings, ready_seconds=systems[name].ready_seconds, memory_mb=systems[name].memory_mb())
            for name, one in ours.items()
        ]
    return mine, results


@contextmanager
def _second_start(peer: Peer, digits: list[int]) -> Iterator[Running]:
    """The second of two: what it reads is in the cache, for all alike, whoever was the first with a file."""
    with running(peer, digits):
        pass
    with running(peer, digits) as system:
        yield system


def _measure_peer(
    peer: Peer, ours: Mapping[str, Running], loads: Loads, digits: list[int], rounds: int, seconds: float
) -> Result:
    result = Result(peer.name, peer.settings)
    _tell(f"{peer.name} ...")
    try:
        with _second_start(peer, digits) as system:
            result.ready_seconds = system.ready_seconds
            for number in range(rounds):
                for scenario in SCENARIOS:
                    _round(number, scenario, result, system, ours, loads, seconds)
                if number == 0:  # now all its workers have come up
                    result.memory_mb = system.memory_mb()
    except CannotStart as error:
        result.failed = str(error)
    except WrongAnswer as error:
        result.failed, result.is_wrong = f"wrong answer: {error}", True
        result.rounds.clear()
    _tell(f"{peer.name}: {result.failed or f'ready in {result.ready_seconds:.1f} s, measured'}")
    return result


def _round(
    number: int,
    scenario: Scenario,
    result: Result,
    system: Running,
    ours: Mapping[str, Running],
    loads: Loads,
    seconds: float,
) -> None:
    """Measure one scenario; who goes first changes from round to round."""
    if scenario.name in result.errors:
        return
    turns = [(result.name, system, loads.direct)]
    turns += [(way.name, ours[way.system], loads.sdk if way.is_sdk else loads.direct) for way in scenario.ways(ours)]
    samples: dict[str, Sample] = {}
    for name, one, load in in_turn(turns, number):
        try:
            with nullcontext() if one is system else system.paused():
                samples[name] = load.closed_loop(one.target, scenario.images, scenario.in_flight, seconds)
        except WrongAnswer as error:
            if one is not system:
                raise LoadError(f"{name}, {scenario.name}: wrong answer: {error}") from error
            raise
        except LoadError as error:
            if one is not system:
                raise LoadError(f"{name}, {scenario.name}: {error}") from error
            result.errors[scenario.name] = str(error)
            result.rounds.pop(scenario.name, None)
            return
    result.rounds.setdefault(scenario.name, []).append(samples)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
