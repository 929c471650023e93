"""The figures as tables and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.figures import PEER_GOALS
from bench.peers.load import Sample
from bench.peers.measure import SCENARIOS, Result, Scenario
from bench.rounds import spread

Row = list[str]
Rounds = list[dict[str, Sample]]


def tables(ours: Sequence[Result], peers: Sequence[Result], markdown: bool = False) -> str:
    """A table for each scenario, and one of what the systems take at rest, with what failed and why."""
    layout = _markdown if markdown else _text
    parts = [layout(*_rates(scenario, ours, peers)) for scenario in SCENARIOS]
    if goals := _goals(ours, peers):
        parts.append(layout(["of the goals", "ours", "the best peer", "ours / best peer", "goal", "reached"], goals))
    parts.append(layout(*_rest(ours, peers)))
    notes = [f"{peer.name}, {name}: {error}" for peer in peers for name, error in peer.errors.items()]
    return "\n\n".join([*parts, *notes])


def _rates(scenario: Scenario, ours: Sequence[Result], peers: Sequence[Result]) -> tuple[Row, list[Row]]:
    names = [way.name for way in scenario.ways(one.name for one in ours)]
    unit = "calls/s" if scenario.images == 1 else "images/s"
    rows = []
    for peer in peers:
        rounds = peer.rounds.get(scenario.name, [])
        if not rounds:
            rows.append([peer.name, "not measured" if peer.errors else "failed", *[""] * (1 + 3 * len(names))])
            continue
        row = [peer.name, *_rate_and_latency(rounds, peer.name)]
        for name in names:
            row += [*_rate_and_latency(rounds, name), spread([_ratio(one, name, peer.name) for one in rounds])]
        rows.append(row)
    head = [f"{scenario.name}, {unit}", "peer", "p50, p99 us"]
    for name in names:
        head += [name, "p50, p99 us", "ours / peer"]
    return head, rows


def _rate_and_latency(rounds: Rounds, name: str) -> Row:
    p50, p99 = _median(rounds, name, lambda sample: sample.p50_us), _median(rounds, name, lambda sample: sample.p99_us)
    return [f"{_median(rounds, name, _rate):,.0f}", f"{p50:,.0f}, {p99:,.0f}"]


def _goals(ours: Sequence[Result], peers: Sequence[Result]) -> list[Row]:
    """The best peer is the one with most a second in this scenario."""
    rows = []
    for scenario in SCENARIOS:
        measured = {peer.name: rounds for peer in peers if (rounds := peer.rounds.get(scenario.name))}
        if scenario.name not in PEER_GOALS or not measured:
            continue
        goal = PEER_GOALS[scenario.name]
        best = max(measured, key=lambda name: _median(measured[name], name, _rate))
        for way in scenario.ways(one.name for one in ours):
            if way.is_sdk == scenario.with_sdk:
                ratios = [_ratio(one, way.name, best) for one in measured[best]]
                reached = "yes" if statistics.median(ratios) >= goal.limit else "no"
                rows.append([f"{goal.row}: {goal.measure}", way.name, best, spread(ratios), goal.text, reached])
    return rows


def _rest(ours: Sequence[Result], peers: Sequence[Result]) -> tuple[Row, list[Row]]:
    rows = []
    for one in (*ours, *peers):
        figures = [one.failed, ""] if one.failed else [f"{one.ready_seconds:.1f}", f"{one.memory_mb:,.0f}"]
        rows.append([one.name, *figures, one.settings])
    return ["at rest", "start to first answer, s", "resident, MB", "settings"], rows


def _rate(sample: Sample) -> float:
    return sample.rate


def _median(rounds: Rounds, name: str, figure: Callable[[Sample], float]) -> float:
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
        for way in scenario.ways(one.name for one in ours):
            rounds = [samples for peer in measured for samples in peer.rounds.get(scenario.name, ())]
            if rates := [samples[way.name].rate for samples in rounds if way.name in samples]:
                bars.append((f"ours, {way.name}", statistics.median(rates), "tab:blue"))
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
