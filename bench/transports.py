"""`python -m bench.transports`: the two transports beside each other, by a client that is neither.

One worker each, real digits whose answers are checked. The load
is that of `client.load`, since Python's gRPC client costs more than the server
it would measure. Rounds take turns, so that what else the machine does falls on
both.
"""

from __future__ import annotations

import json
import statistics
from contextlib import ExitStack

from bench.forward import Forward
from bench.processes import generator, server
from bench.rounds import Sample, in_turn, sample, spread
from bench.scenarios import SCENARIOS
from server.settings import TRANSPORTS

ROUNDS = 7
SECONDS = 1.0
MEASURES = (
    ("one call at a time", "unary @1", 1),
    ("64 calls in flight on one connection", "unary @64", 1),
    ("64 calls in flight on four connections", "unary @64", 4),
    ("one stream, 64 frames in flight", "stream 1x64", 1),
)
"""Of each its name, the scenario and the connections."""


def main() -> None:
    """Print medians over the rounds: a second, processor time of the server, and ratios within each round."""
    digits = Forward().digits()
    figures = {}
    with ExitStack() as stack:
        servers = {}
        for transport in TRANSPORTS:
            flags = ("--port", "0", "--workers", "1", "--transport", transport, "--log-level", "warning")
            servers[transport] = stack.enter_context(server("server", flags))
        load = stack.enter_context(generator())
        for name, scenario, connections in MEASURES:
            rounds: list[dict[str, Sample]] = [
                {
                    transport: sample(
                        load, servers[transport], SCENARIOS[scenario], SECONDS, digits, connections=connections
                    )
                    for transport in in_turn(TRANSPORTS, number)
                }
                for number in range(ROUNDS)
            ]
            figures[name] = {
                transport: {
                    "a second": round(statistics.median(one[transport]["rate"] for one in rounds)),
                    "processor us each": round(statistics.median(one[transport]["cpu_us"] for one in rounds)),
                }
                for transport in TRANSPORTS
            } | {"asgi / grpcio": spread([one["asgi"]["rate"] / one["grpcio"]["rate"] for one in rounds])}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
