"""The figures as tables and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.peers.load import Sample
from bench.peers.measure import SCENARIOS, Result, Scenario
from bench.rounds import spread

Row = list[str]


def tables(ours: Sequence[Result], peers: Sequence[Result], markdown: bool = False) -> str:
    """A table for each scenario, and one of what the systems take at rest, with what failed and why."""
    layout = _markdown if markdown else _text
    parts = [layout(*_rates(scenario, ours, peers)) for scenario in SCENARIOS]
    parts.append(layout(*_rest(ours, peers)))
    notes = [f"{peer.name}, {name}: {error}" for peer in peers for name, error in peer.errors.items()]
    return "\n\n".join([*parts, *notes])


def _rates(scenario: Scenario, ours: Sequence[Result], peers: Sequence[Result]) -> tuple[Row, list[Row]]:
    names = [one.name for one in ours if scenario.in_flight > 1 or not one.name.endswith("x2")]
    unit = "calls/s" if scenario.images == 1 else "images/s"
    rows = []
    for peer in peers:
        rounds = peer.rounds.get(scenario.name, [])
        if not rounds:
            rows.append([peer.name, "not measured" if peer.errors else "failed", *[""] * (1 + 2 * len(names))])
            continue
        row = [peer.name, f"{_median(rounds, peer.name, _rate):,.0f}", f"{_median(rounds, peer.name, _p50):,.0f}"]
        for name in names:
            row += [f"{_median(rounds, name, _rate):,.0f}", spread([_ratio(one, name, peer.name) for one in rounds])]
        rows.append(row)
    head = [f"{scenario.name}, {unit}", "peer", "its p50, us"]
    for name in names:
        head += [name, "ours / peer"]
    return head, rows


def _rest(ours: Sequence[Result], peers: Sequence[Result]) -> tuple[Row, list[Row]]:
    rows = []
    for one in (*ours, *peers):
        figures = [one.failed, ""] if one.failed else [f"{one.ready_seconds:.1f}", f"{one.memory_mb:,.0f}"]
        rows.append([one.name, *figures, one.settings])
    return ["at rest", "start to first answer, s", "resident, MB", "settings"], rows


def _rate(sample: Sample) -> float:
    return sample.rate


def _p50(sample: Sample) -> float:
    return sample.p50_us


def _median(rounds: list[dict[str, Sample]], name: str, figure: Callable[[Sample], float]) -> float:
    return statistics.median(figure(one[name]) for one in rounds)


def _ratio(samples: dict[str, Sample], name: str, peer: str) -> float:
    return samples[name].rate / samples[peer].rate


def _text(head: Row, rows: list[Row]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in [head, *rows])
    ]
    return "\n".join(line.rstrip() for line in lines)


def _markdown(head: Row, rows: list[Row]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def draw(ours: Sequence[Result], peers: Sequence[Result], path: Path) -> None:
    """Write a picture: a panel for each scenario, a bar for each system.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    measured = [peer for peer in peers if peer.rounds]
    for scenario, axes in zip(SCENARIOS, figure.subplots(2, 2).flat, strict=True):
        bars: list[tuple[str, float, str]] = []
        for one in ours:
            rounds = [samples for peer in measured for samples in peer.rounds.get(scenario.name, ())]
            if rates := [samples[one.name].rate for samples in rounds if one.name in samples]:
                bars.append((f"ours, {one.name}", statistics.median(rates), "tab:blue"))
        for peer in measured:
            if rounds := peer.rounds.get(scenario.name, []):
                bars.append((peer.name, _median(rounds, peer.name, _rate), "tab:gray"))
        bars.sort(key=lambda bar: bar[1])
        drawn = axes.barh([bar[0] for bar in bars], [bar[1] for bar in bars], color=[bar[2] for bar in bars])
        axes.bar_label(drawn, fmt="{:,.0f}", padding=3)
        axes.margins(x=0.18)
        axes.set_title(f"{scenario.name}: {'calls' if scenario.images == 1 else 'images'} a second")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
