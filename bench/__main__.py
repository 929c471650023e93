"""Measure the goals of docs/performance.md that need no peer; fail if any answer was wrong."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Sequence

import grpc
import torch

from bench.daily import (
    Plan,
    load_figures,
    loads_json,
    loads_table,
    measure_loads,
    one_image_figure,
    sdk_figures,
    start_figures,
)
from bench.figures import GOALS, LAST, as_json, load_last, save, table, with_kept
from bench.noop_server import LOOPS
from bench.options import duration, positive, writable
from server.settings import TRANSPORTS

ROWS = sorted({goal.row for goal in GOALS.values()})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3, help="how often everything is measured (default: 3)")
    parser.add_argument("--seconds", type=duration, default=1.0, help="for each measurement (default: 1)")
    parser.add_argument("--row", type=int, choices=ROWS, action="append", help="this row alone; may be repeated")
    parser.add_argument("--transport", choices=TRANSPORTS, action="append", help="this one alone")
    parser.add_argument(
        "--noop-loop", choices=LOOPS, default=LOOPS[0], help="of the server that does nothing (default: %(default)s)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the goals as docs/performance.md has them")
    parser.add_argument("--json", type=writable, help="also write the figures here")
    parser.add_argument(
        "--last", type=writable, default=str(LAST), help="figures of the last run, replaced (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    plan = Plan(
        options.row or ROWS, options.transport or TRANSPORTS, options.rounds, options.seconds, options.noop_loop
    )
    setting = {
        "machine": _machine(),
        "plan": {"rounds": plan.rounds, "seconds": plan.seconds, "noop loop": plan.noop_loop},
    }
    last = load_last(options.last, setting)
    began = time.monotonic()
    try:
        loads = measure_loads(plan)
        figures = load_figures(plan, loads)
        figures += sdk_figures(plan) if 6 in plan.rows else []
        figures += [one_image_figure(plan)] if 7 in plan.rows else []
        figures += start_figures(plan) if 8 in plan.rows else []
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - began
    print(table(figures, last.medians, markdown=options.markdown))
    if loads.samples and not options.markdown:
        print(f"\n{loads_table(loads)}")
    print(f"\n{plan.rounds} rounds side by side in {seconds:.0f} s; medians of the ratios, the least and the greatest")
    if last.unlike:
        print(f"The last run does not stand beside: {last.unlike}")
    run = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds),
        **setting,
        "figures": as_json(figures),
        "loads": loads_json(loads),
    }
    if options.json:
        save(options.json, run)
    save(options.last, run | {"figures": with_kept(as_json(figures), last)})
    return 0


def _machine() -> dict[str, object]:
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "grpcio": grpc.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(main())
