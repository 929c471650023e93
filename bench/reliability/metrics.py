"""What metrics cost: two servers that differ in nothing else, measured in turn."""

from __future__ import annotations

import statistics

from bench.reliability.common import TRANSPORT, Report, check_health, known, processes, serving
from bench.reliability.overload import capacity
from bench.rounds import in_turn

CALLERS = 64


def run(report: Report, *, rounds: int = 15, seconds: float = 3.0, transport: str = TRANSPORT) -> None:
    """Have 64 callers of single images ask both servers, for `seconds` a round."""
    answers = known()
    with serving(transport=transport) as on, serving(metrics=False, transport=transport) as off, processes(1) as pool:
        ratios = []
        rates: dict[str, list[float]] = {on.target: [], off.target: []}
        for number in range(rounds):
            for server in in_turn((on, off), number):
                rate = pool.submit(capacity, server.target, answers, 1, CALLERS, seconds).result()
                rates[server.target].append(rate)
            ratios.append(rates[on.target][-1] / rates[off.target][-1])
        report.row("calls/s with metrics", f"{statistics.median(rates[on.target]):,.0f}")
        report.row("  without", f"{statistics.median(rates[off.target]):,.0f}")
        low, _, high = statistics.quantiles(ratios, n=4)
        report.row("  ratio, median", f"{statistics.median(ratios):.3f}", f"half of them from {low:.3f} to {high:.3f}")
        check_health(report, on)
        check_health(report, off)
