"""`python -m bench`: measure, print a table, and fail if any answer was wrong."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch

from bench.forward import Forward
from bench.processes import Generator, Server, generator, server
from bench.scenarios import SCENARIOS, Scenario
from server.settings import EMBEDDED_WEIGHTS

FORWARD_SECONDS = 0.4
OURS = ("--port", "0", "--workers", "1", "--weights", EMBEDDED_WEIGHTS, "--log-level", "warning")
COLUMNS = (("rate", 10), ("p50_us", 9), ("p99_us", 9), ("cpu_us", 8))


class Sample(TypedDict):
    """One measurement of one server."""

    rate: float
    p50_us: float
    p99_us: float
    cpu_us: float
    """Of the server, a message."""


class Round(TypedDict):
    """Everything measured side by side."""

    forward: dict[str, float]
    """The bare network's images a second, in batches as large as the scenario's."""
    noop: dict[str, Sample]
    ours: dict[str, Sample]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default: 3)")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each measurement (default: 1.5)")
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="this scenario alone; may be repeated")
    parser.add_argument("--json", type=Path, help="also write the figures here, for example bench/results/today.json")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error(f"--rounds is 1 or more and --seconds above 0, not {options.rounds} and {options.seconds}")
    scenarios = [SCENARIOS[name] for name in options.only or SCENARIOS]
    forward = Forward()
    try:
        with (
            server("bench.noop_server") as noop,
            server("server", OURS) as ours,
            generator() as load,
        ):
            rounds = [
                _round(number, scenarios, options.seconds, forward, noop, ours, load)
                for number in range(options.rounds)
            ]
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    _print(scenarios, rounds)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": _machine(), "rounds": rounds}, indent=2) + "\n")
    return 0


def _round(
    number: int,
    scenarios: list[Scenario],
    seconds: float,
    forward: Forward,
    noop: Server,
    ours: Server,
    load: Generator,
) -> Round:
    """Measure all; the two servers take turns in going first."""
    digits = forward.digits()
    result: Round = {"forward": {}, "noop": {}, "ours": {}}
    for scenario in scenarios:
        turns = [(noop, None, result["noop"]), (ours, digits, result["ours"])]
        for one, expected, samples in turns if number % 2 == 0 else turns[::-1]:
            before = one.cpu_seconds()
            answer = load.measure(target=one.target, scenario=scenario.name, seconds=seconds, digits=expected)
            samples[scenario.name] = {
                "rate": answer["rate"],
                "p50_us": answer["p50_us"],
                "p99_us": answer["p99_us"],
                "cpu_us": (one.cpu_seconds() - before) * 1e6 / answer["all_messages"],
            }
        result["forward"][scenario.name] = forward.rate(scenario.forward, FORWARD_SECONDS)
    return result


def _print(scenarios: list[Scenario], rounds: list[Round]) -> None:
    print(f"{len(rounds)} rounds; medians; ratios with their smallest and largest\n")
    print(
        f"{'':14} {'images/s':>10} {'p50 us':>9} {'p99 us':>9} {'cpu us':>8}"
        f"   {'no-op':>9} {'p50 us':>9} {'cpu us':>8} {'bare':>11}   {'ours / no-op':>19}   {'ours / bare':>19}"
    )
    for scenario in scenarios:
        name = scenario.name
        ours = [one["ours"][name] for one in rounds]
        noop = [one["noop"][name] for one in rounds]
        to_noop = [a["rate"] / b["rate"] for a, b in zip(ours, noop, strict=True)]
        bare = [one["forward"][name] for one in rounds]
        to_bare = [a["rate"] / b for a, b in zip(ours, bare, strict=True)]
        columns = "".join(f" {_median(ours, key):>{width},.0f}" for key, width in COLUMNS)
        anchor = "".join(f" {_median(noop, key):>9,.0f}" for key in ("rate", "p50_us"))
        print(
            f"{name:14}{columns}  {anchor} {_median(noop, 'cpu_us'):>8,.0f} {statistics.median(bare):>11,.0f}"
            f"   {_spread(to_noop):>19}   {_spread(to_bare):>19}"
        )
    print("\nimages/s of our server, of a server that does nothing, and of the bare network in batches as large;")
    print("cpu us: the server's processor time a message")


def _median(samples: list[Sample], key: str) -> float:
    values: list[float] = [sample[key] for sample in samples]  # type: ignore[literal-required]
    return statistics.median(values)


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"


def _machine() -> dict[str, object]:
    return {"cores": os.cpu_count(), "python": platform.python_version(), "torch": str(torch.__version__)}


if __name__ == "__main__":
    raise SystemExit(main())
