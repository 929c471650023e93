"""Rounds in turn: each scenario is measured of a peer and of ours right after one another."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

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


SCENARIOS = (
    Scenario("1 caller", 1, 1),
    Scenario("64 callers", 1, 64),
    Scenario("64 images, 4 in flight", 64, 4),
    Scenario("256 images, 4 in flight", 256, 4),
)


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
    load: LoadGenerator,
    digits: list[int],
    rounds: int,
    seconds: float,
) -> tuple[list[Result], list[Result]]:
    """Return the results of ours, without rounds, and of the peers.

    Raises:
        CannotStart, LoadError: of ours.
    """
    with ExitStack() as stack:
        systems = {name: stack.enter_context(running(one, digits)) for name, one in ours.items()}
        results = [_measure_peer(peer, systems, load, digits, rounds, seconds) for peer in peers]
        mine = [
            Result(name, one.settings, ready_seconds=systems[name].ready_seconds, memory_mb=systems[name].memory_mb())
            for name, one in ours.items()
        ]
    return mine, results


def _measure_peer(
    peer: Peer, ours: Mapping[str, Running], load: LoadGenerator, digits: list[int], rounds: int, seconds: float
) -> Result:
    result = Result(peer.name, peer.settings)
    _tell(f"{peer.name} ...")
    try:
        with running(peer, digits) as system:
            result.ready_seconds = system.ready_seconds
            for number in range(rounds):
                for scenario in SCENARIOS:
                    _round(number, scenario, result, system, ours, load, seconds)
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
    load: LoadGenerator,
    seconds: float,
) -> None:
    """Measure one scenario; who goes first changes from round to round."""
    if scenario.name in result.errors:
        return
    systems = [(result.name, system), *ours.items()]
    samples: dict[str, Sample] = {}
    for name, one in in_turn(systems, number):
        if one is not system and scenario.in_flight == 1 and name.endswith("x2"):
            continue  # one caller has one worker
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
