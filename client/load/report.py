"""The table that people see: a line a run, and what to think of it."""

from __future__ import annotations

from typing import Any

NEAR = 0.8
"""From this share of the ceiling on, a figure may be the generator's own limit."""
LATE = 0.1
"""Sent later than this share of the latency, the generator is part of what was measured."""
LATE_US = 100
"""What is not later than that is not told."""
BUSY = 0.9
"""From this share of a core on, the generator is the limit."""
NEEDED = {"p99": 100, "p99.9": 1000, "p99.99": 10_000}
"""A percentile of fewer answers would be the slowest of them."""

HEAD = (
    f"{'':40} {'calls/s':>9} {'images/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'p99.9':>8} {'max':>8}"
    f"   {'ceiling/s':>9} {'used':>5}"
)


def number(value: float) -> str:
    """For people; small ones to three digits."""
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def has(summary: dict[str, Any], percentile: str) -> bool:
    """Whether there are enough answers for this percentile."""
    return bool(summary["count"] >= NEEDED.get(percentile, 1))


def line(run: dict[str, Any]) -> str:
    """A run's figures, and beside them how many messages a second the generator can do at most."""
    found = run["latency_us"]
    columns = ("p50", "p99", "p99.9", "max")
    latency = "".join(f" {found[name] / 1e3:>8.2f}" if has(found, name) else f" {'-':>8}" for name in columns)
    text = f"{run['name']:40} {number(run['messages_per_second']):>9} {number(run['images_per_second']):>10}{latency}"
    if run.get("ceiling"):
        most = run["ceiling"]["messages_per_second"]
        text += f"   {most:>9,.0f} {run['messages_per_second'] / most:>5.0%}"
    return text


def remarks(run: dict[str, Any]) -> list[str]:
    """What makes a figure doubtful, or the run a failed one; nothing of a good one."""
    found = [f"FAILED: {count:,} x {what}: {run['examples'][what]}" for what, count in run["faults"].items()]
    if not found and not run["latency_us"]["count"]:
        found = ["FAILED: nothing was answered"]
    if run.get("sent_again"):
        found.append(
            f"{run['sent_again']:,} messages were sent again, as the server did not begin with them (REFUSED_STREAM)"
        )
    most = run["ceiling"]["messages_per_second"] if run.get("ceiling") else None
    if most is not None and run["rate"] is not None and run["rate"] > most:
        found.append(
            f"{number(run['rate'])} messages a second are more than the {number(most)} that the generator can send: "
            "it is a limit, whatever the server does"
        )
    elif most is not None and run["messages_per_second"] > NEAR * most:
        found.append(f"more than {NEAR:.0%} of what the generator can do: the server may be faster than this figure")
    elif run["generator_core_share"] > BUSY:
        found.append(
            f"the generator used {run['generator_core_share']:.0%} of a core: it is the limit, "
            "and the server may be faster than this figure"
        )
    return found + _late(run)


def _late(run: dict[str, Any]) -> list[str]:
    """What to say of messages that were sent late; of half of them rather than of a few."""
    late, latency = run["late_us"], run["latency_us"]
    for name, who in (("p50", "half of all messages were"), ("p99", "one message of a hundred was")):
        if late and has(late, name) and late[name] > max(LATE * latency[name], LATE_US):
            return [
                f"{who} sent more than {late[name] / 1e3:.2f} ms late, which counts as latency: "
                "the server allows no more calls at a time, or this machine is busy"
            ]
    return []
