"""`python -m bench.reliability NAME`: run one scenario, print its figures, fail if a rule was broken."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

from bench.reliability import common
from server.settings import TRANSPORTS

SCENARIOS = {
    "latency": "what batching costs a lone caller and gives many; an idle server; small calls beside large ones",
    "deadlines": "a stalled model: what is too late is told so in time, and not computed",
    "cancellation": "many calls, some cancelled at random moments",
    "overload": "three times the load that the server can do",
    "metrics": "what it costs to count",
    "streams": "clients that never read, that leave, that send bad frames, that want everything",
    "latest_only": "live video that is faster than the server",
    "workers": "several processes: balance, a killed one, added metrics",
    "rolling": "two servers that are restarted in turn under load",
    "resume": "streams whose connections are cut and whose servers are restarted",
    "reload": "weights that are exchanged under load, some of them broken",
    "fuzz": "hostile messages, files and connections beside good ones",
    "soak": "a million calls through every door, with cancellations, new weights and restarts",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:<14} {summary}" for name, summary in SCENARIOS.items()),
    )
    parser.add_argument("name", choices=SCENARIOS, metavar="NAME", help="one of those below; NAME --help has its flags")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    name: str = given.name
    options = _options(name, given.flags)
    report = common.Report()
    print(f"{name}: {SCENARIOS[name]}")
    try:
        _runner(name)(report, **options)
    except (common.BrokenRule, ExceptionGroup) as error:
        report.require(False, str(common.first_error(error)))
    return report.end()


def _options(name: str, flags: list[str]) -> dict[str, Any]:
    """The keyword arguments of a scenario's `run`: each has a default and is a flag."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.reliability {name}", description=SCENARIOS[name])
    for parameter in list(inspect.signature(_runner(name)).parameters.values())[1:]:
        parser.add_argument(
            "--" + parameter.name.replace("_", "-"),
            type=type(parameter.default),
            default=parameter.default,
            choices=TRANSPORTS if parameter.name == "transport" else None,
            metavar=" or ".join(TRANSPORTS) if parameter.name == "transport" else "N",
            help=f"default: {parameter.default}",
        )
    return vars(parser.parse_args(flags))


def _runner(name: str) -> common.Scenario:
    scenario: common.Scenario = importlib.import_module(f"bench.reliability.{name}").run
    return scenario


if __name__ == "__main__":
    sys.exit(main())
