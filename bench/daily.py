"""The measures of `python -m bench`: each a list of figures, a value a round.

What is compared is measured side by side in each round, and takes turns in
going first, so that what else the machine does falls on both.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cold_start import start
from bench.figures import Figure
from bench.forward import Forward, OneImage
from bench.processes import Generator, Server, generator, server
from bench.rounds import Sample, in_turn, sample
from bench.scenarios import SCENARIOS
from client.load.report import NEAR
from server.settings import EMBEDDED_WEIGHTS

NOOP, RESPONDER, FORWARD = "no-op", "generator's ceiling", "bare forward"
FORWARD_SECONDS = 0.4
FORWARD_BATCH = 256
WITH_NOOP = ("unary @1", "unary @64", "stream 1x64")
WITH_FORWARD = "256 images @4"
OF_LOADS = {1: ["unary @1"], 2: ["unary @64"], 4: [WITH_FORWARD], 5: ["stream 1x64", "stream 64x8"]}
"""Which loads a row of the goals needs."""


def flags(transport: str) -> list[str]:
    """Of a server of ours."""
    ours = ["--port", "0", "--workers", "1", "--weights", EMBEDDED_WEIGHTS, "--log-level", "warning"]
    return [*ours, "--transport", transport]


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    rows: Sequence[int]
    transports: Sequence[str]
    rounds: int
    seconds: float
    """Of each measurement."""
    noop_loop: str = "asyncio"
    """The event loop of the server that does nothing."""


@dataclass
class Loads:
    """What the servers were measured at, by scenario, then by who answered, a sample a round."""

    samples: dict[str, dict[str, list[Sample]]]
    forward: list[float]
    """Images a second of the bare network."""


def measure_loads(plan: Plan) -> Loads:
    """Rows 1, 2, 4 and 5: our server with each transport, one that does nothing, and the generator's ceiling."""
    scenarios = [name for row, names in OF_LOADS.items() if row in plan.rows for name in names]
    loads = Loads({name: {} for name in scenarios}, [])
    if not scenarios:
        return loads
    forward = Forward()
    digits = forward.digits()
    with ExitStack() as stack:
        servers: dict[str, Server] = {RESPONDER: stack.enter_context(server("client.load.responder"))}
        servers[NOOP] = stack.enter_context(server("bench.noop_server", ["--noop-loop", plan.noop_loop]))
        for transport in plan.transports:
            servers[transport] = stack.enter_context(server("server", flags(transport)))
        load: Generator = stack.enter_context(generator())
        for number in range(plan.rounds):
            for name in scenarios:
                anchors = [NOOP] if name in WITH_NOOP else [FORWARD] if name == WITH_FORWARD else []
                for who in (*in_turn([*anchors, *plan.transports], number), RESPONDER):
                    if who == FORWARD:
                        loads.forward.append(forward.rate(FORWARD_BATCH, FORWARD_SECONDS))
                        continue
                    expected = digits if who in plan.transports else None
                    one = sample(load, servers[who], SCENARIOS[name], plan.seconds, expected)
                    loads.samples[name].setdefault(who, []).append(one)
    return loads


def load_figures(plan: Plan, loads: Loads) -> list[Figure]:
    """The goals that these loads are for."""
    figures: list[Figure] = []
    for name, scenario, key in (
        ("lone p50", "unary @1", "p50_us"),
        ("many", "unary @64", "rate"),
        ("bulk", WITH_FORWARD, "rate"),
        ("stream", "stream 1x64", "rate"),
        ("packed", "stream 64x8", "rate"),
    ):
        found = loads.samples.get(scenario)
        for transport in plan.transports if found else ():
            assert found is not None
            figure = Figure(name, transport)
            ours = [_value(one, key) for one in found[transport]]
            if name == "packed":
                for value in ours:
                    figure.add(value)
            else:
                bases = loads.forward if name == "bulk" else [_value(one, key) for one in found[NOOP]]
                unit, other = "us" if key == "p50_us" else "a second", FORWARD if name == "bulk" else NOOP
                for value, base in zip(ours, bases, strict=True):
                    figure.add(value / base, {unit: value, other: base})
            figures.append(figure)
    return figures


def _value(one: Sample, key: str) -> float:
    value: float = one[key]  # type: ignore[literal-required]
    return value


def sdk_figures(plan: Plan) -> list[Figure]:
    """Row 6, by `bench.client` as a process of its own: a client has no torch."""
    figures = []
    for transport in plan.transports:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "coalescing.json"
            command = [sys.executable, "-m", "bench.client", "coalescing", "--callers", "64", "--transport", transport]
            command += ["--rounds", str(plan.rounds), "--seconds", str(plan.seconds / 2), "--json", str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip() or "bench.client ended before it had measured")
            found: dict[str, dict[str, list[float]]] = json.loads(path.read_text())["coalescing"]
        for kind in ("tasks", "threads"):
            of = found[f"{kind} @64"]
            figure = Figure(kind, transport)
            for together, alone in zip(of["together"], of["alone"], strict=True):
                figure.add(together / alone, {"a second": together, "with an RPC each": alone})
            figures.append(figure)
    return figures


def one_image_figure(plan: Plan) -> Figure:
    """Row 7."""
    one = OneImage()
    figure = Figure("one image")
    for number in range(plan.rounds):
        times = {way.__name__: way() for way in in_turn((one.served_us, one.products_us), number)}
        served, products = times["served_us"], times["products_us"]
        figure.add(served / products, {"us": served, "for the products": products})
    return figure


def start_figures(plan: Plan) -> list[Figure]:
    """Row 8: processes that are started one after the other, files in the cache."""
    start("bench.imports")  # brings the files into the cache
    of = {transport: (Figure("start", transport), Figure("memory", transport)) for transport in plan.transports}
    for number in range(plan.rounds):
        found = {}
        for who in in_turn(("", *plan.transports), number):
            found[who] = start("server", flags(who)) if who else start("bench.imports")
        for transport, (seconds, memory) in of.items():
            ours, imports = found[transport], found[""]
            milliseconds = {"ms": ours.seconds * 1e3, "to import": imports.seconds * 1e3}
            megabytes = {"MB": ours.resident_mb, "of the imports": imports.resident_mb}
            seconds.add(ours.seconds / imports.seconds, milliseconds)
            memory.add(ours.resident_mb / imports.resident_mb, megabytes)
    return [figure for pair in zip(*of.values(), strict=True) for figure in pair]


def loads_table(loads: Loads) -> str:
    """Medians of all samples, with the generator's ceiling beside each rate."""
    lines = [
        f"{'':16}{'':10}{'images/s':>11}{'p50 us':>9}{'p99 us':>9}{'cpu us':>9}{'ceiling':>11}{'used':>7}",
    ]
    for name, found in loads.samples.items():
        ceiling = _median(found[RESPONDER], "rate")
        for who, samples in found.items():
            if who == RESPONDER:
                continue
            rate, *others = (_median(samples, key) for key in ("rate", "p50_us", "p99_us", "cpu_us"))
            columns = "".join(f"{value:>9,.0f}" for value in others)
            doubt = "  near the ceiling: the server may be faster" if rate > NEAR * ceiling else ""
            lines.append(f"{name:16}{who:10}{rate:>11,.0f}{columns}{ceiling:>11,.0f}{rate / ceiling:>7.0%}{doubt}")
    lines += ["", "cpu us: the server's processor time a message; ceiling: what the generator itself can do,"]
    lines += ["at a server that computes nothing and on the same cores"]
    return "\n".join(lines)


def _median(samples: Sequence[Sample], key: str) -> float:
    return statistics.median(_value(one, key) for one in samples)


def loads_json(loads: Loads) -> dict[str, Any]:
    """For programs."""
    return {"samples": loads.samples, "forward": loads.forward}
