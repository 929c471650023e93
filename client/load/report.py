"""The table that people see: a line a run, and what to think of it."""

from __future__ import annotations

from typing import Any

NEAR = 0.8
"""From this share of the ceiling on, a figure may be the generator's own limit."""
LATE = 0.1
"""Sent later than this share of the median latency, the generator is part of what was measured."""

HEAD = (
    f"{'':40} {'calls/s':>9} {'images/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'p99.9':>8} {'max':>8}"
    f"   {'ceiling/s':>9} {'used':>5}"
)


def line(run: dict[str, Any]) -> str:
    """A run's figures, and beside them how many messages a second the generator can do at most."""
    latency = "".join(f" {run['latency_us'][name] / 1e3:>8.2f}" for name in ("p50", "p99", "p99.9", "max"))
    text = f"{run['name']:40} {run['messages_per_second']:>9,.0f} {run['images_per_second']:>10,.0f}{latency}"
    if run.get("ceiling"):
        most = run["ceiling"]["messages_per_second"]
        text += f"   {most:>9,.0f} {run['messages_per_second'] / most:>5.0%}"
    return text


def remarks(run: dict[str, Any]) -> list[str]:
    """What makes a figure doubtful, or the run a failed one; nothing of a good one."""
    found = [f"FAILED: {count:,} x {what}: {run['examples'][what]}" for what, count in run["faults"].items()]
    if not found and not run["latency_us"]["count"]:
        found = ["FAILED: nothing was answered"]
    if run.get("ceiling") and run["messages_per_second"] > NEAR * run["ceiling"]["messages_per_second"]:
        found.append(f"more than {NEAR:.0%} of what the generator can do: the server may be faster than this figure")
    if run["late_us"] and run["late_us"]["p50"] > max(LATE * run["latency_us"]["p50"], 100):
        found.append(
            f"half of all messages were sent more than {run['late_us']['p50'] / 1e3:.2f} ms late, which counts as "
            "latency: the server allows no more calls at a time, or this machine is busy"
        )
    return found
