"""The load generator of the benches: `client.load` in a process of its own.

Reads one order a line from stdin (`{"target", "scenario", "seconds", "digits"}`, and `connections` if it matters)
and answers each with one line on stdout: `{"rate", "p50_us", "p99_us", "all_messages"}`, rate in images a second, or
`{"error"}` if an answer was wrong, an error or lost. `digits` is what to expect of each of the images; null expects
the fixed answer of a server that computes nothing.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from bench.scenarios import SCENARIOS
from client.load.measure import Door, measure, require_right

WARM_UP_SECONDS = 0.3


def obey(order: dict[str, Any]) -> dict[str, float]:
    """Measure once.

    Raises:
        OSError: nobody can be reached.
        LoadFailed: an answer was not right.
    """
    load = SCENARIOS[order["scenario"]].load(order["seconds"], WARM_UP_SECONDS, order.get("connections", 0))
    found = measure(Door(order["target"]), load, order["digits"])
    require_right(found)
    return {
        "rate": found["images_per_second"],
        "p50_us": found["latency_us"]["p50"],
        "p99_us": found["latency_us"]["p99"],
        "all_messages": found["all_messages"],
    }


def main() -> None:
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = obey(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
