"""The rows of the goals: what was measured in each round, beside the last run and the goal."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LAST = Path(__file__).parent / "results" / "last.json"
"""The figures of the last run on this machine; git ignores them."""

NOTHING: Mapping[str, float] = {}


@dataclass(frozen=True)
class Goal:
    """A measure, and what is wanted of it."""

    row: int
    """In the table of docs/performance.md."""
    measure: str
    limit: float
    at_most: bool = False
    """Whether less is better."""
    digits: int = 2
    """After the point."""

    @property
    def text(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:,.{self.digits}f}"


GOALS = {
    "lone p50": Goal(1, "one image, 1 caller: p50 ÷ that of a gRPC server that does nothing", 1.15, at_most=True),
    "many": Goal(2, "one image, 64 callers: calls/s ÷ those of the server that does nothing", 0.90),
    "bulk": Goal(4, "256 images a call: images/s ÷ the bare forward's", 0.80),
    "stream": Goal(5, "one stream, an image a message, 64 unanswered: ÷ the server that does nothing", 0.90),
    "packed": Goal(5, "one stream, 64 images a message, 8 unanswered: images/s", 100_000, digits=0),
    "tasks": Goal(6, "64 tasks of one `AsyncClient`: calls/s ÷ with an RPC a call", 8.0),
    "threads": Goal(6, "64 threads of one `Client`: calls/s ÷ with an RPC a call", 8.0),
    "one image": Goal(7, "forward of one image as served ÷ three bare matrix products", 1.5, at_most=True),
    "start": Goal(8, "start to `serving on` ÷ `import torch, grpc`", 1.3, at_most=True),
    "memory": Goal(8, "resident memory ÷ that of `import torch, grpc`", 1.25, at_most=True),
}

PEER_GOALS = {
    "64 callers": Goal(6, "64 tasks of one `AsyncClient`: calls/s ÷ those of the best peer's 64 callers", 3.0),
    "256 images, 4 in flight": Goal(4, "256 images a call: images/s ÷ the best peer's", 2.0),
}
"""The halves that `python -m bench.peers` measures, by its scenarios."""


@dataclass
class Figure:
    """A goal's measure with one transport, or without any."""

    name: str
    """In `GOALS`."""
    transport: str = ""
    values: list[float] = field(default_factory=list)
    """One a round."""
    absolute: dict[str, list[float]] = field(default_factory=dict)
    """What the values are ratios of, by name and unit."""

    @property
    def goal(self) -> Goal:
        return GOALS[self.name]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_reached(self) -> bool:
        return self.median <= self.goal.limit if self.goal.at_most else self.median >= self.goal.limit

    def add(self, value: float, absolute: Mapping[str, float] = NOTHING) -> None:
        """Another round."""
        self.values.append(value)
        for name, one in absolute.items():
            self.absolute.setdefault(name, []).append(one)

    def cells(self, last: float | None) -> list[str]:
        """Row, measure, transport, median with span, what it is made of, last run, goal, whether that is reached."""

        def number(value: float) -> str:
            return f"{value:,.{self.goal.digits}f}"

        span = f"{number(self.median)} ({number(min(self.values))} to {number(max(self.values))})"
        parts = ", ".join(f"{statistics.median(values):,.0f} {name}" for name, values in self.absolute.items())
        before = "" if last is None else number(last)
        reached = "yes" if self.is_reached else "no"
        return [str(self.goal.row), self.goal.measure, self.transport, span, parts, before, self.goal.text, reached]


COLUMNS = ("#", "measure", "transport", "median (span)", "of", "last run", "goal", "reached")


def table(figures: Sequence[Figure], last: dict[tuple[str, str], float], *, markdown: bool = False) -> str:
    """What people read, or what goes into docs/performance.md, which has no use for the last run.

    Without figures of a last run its column is left out.
    """
    rows = [list(COLUMNS), *(figure.cells(last.get((figure.name, figure.transport))) for figure in figures)]
    if markdown or not last:
        before = COLUMNS.index("last run")
        rows = [row[:before] + row[before + 1 :] for row in rows]
    if markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """For programs."""
    return [
        asdict(figure)
        | {"row": figure.goal.row, "measure": figure.goal.measure, "median": figure.median}
        | {"goal": figure.goal.text, "reached": figure.is_reached}
        for figure in figures
    ]


@dataclass(frozen=True)
class Last:
    """What the last run found, where it can be compared with this one."""

    figures: list[dict[str, Any]] = field(default_factory=list)
    """As `as_json` gave them."""
    unlike: str = ""
    """Why it cannot be compared."""

    @property
    def medians(self) -> dict[tuple[str, str], float]:
        """By name and transport."""
        return {(row["name"], row["transport"]): float(row["median"]) for row in self.figures}


def load_last(path: Path, setting: Mapping[str, Mapping[str, Any]]) -> Last:
    """The last run, if there was one of the same setting: the machine and the plan, as they are saved."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        for part, now in setting.items():
            for name in sorted({*now, *run[part]}):
                if (before := run[part].get(name)) != now.get(name):
                    return Last(unlike=f"it was measured with {name} {before}, this one with {now.get(name)}")
        last = Last(list(run["figures"]))
        if not all(map(math.isfinite, last.medians.values())):
            raise ValueError
    except FileNotFoundError:
        return Last()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return Last(unlike=f"{path} is of another form")
    return last


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a run's figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def with_kept(figures: list[dict[str, Any]], last: Last) -> list[dict[str, Any]]:
    """These, and those of the last run that were not measured this time."""
    measured = {(figure["name"], figure["transport"]) for figure in figures}
    return figures + [figure for figure in last.figures if (figure["name"], figure["transport"]) not in measured]
