"""`python -m bench.peers`: measure ours and other serving systems in turn, and print tables."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict

from bench.forward import Forward
from bench.options import duration, positive, writable
from bench.peers.adapters import OURS, PEERS
from bench.peers.load import LoadError, process
from bench.peers.measure import Loads, measure
from bench.peers.peer import CannotStart
from bench.peers.report import draw, tables
from server.golden import golden_digits


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--only", choices=PEERS, nargs="+", default=list(PEERS), help="these peers alone")
    parser.add_argument("--ours", choices=OURS, nargs="+", default=list(OURS), help="transport and number of workers")
    parser.add_argument("--rounds", type=positive, default=3, help="how often everything is measured (default: 3)")
    parser.add_argument("--seconds", type=duration, default=1.5, help="for each measurement (default: 1.5)")
    parser.add_argument("--json", type=writable, help="also write the figures here, as bench/results/peers.json")
    parser.add_argument("--picture", type=writable, help="also draw them here, as bench/results/peers.png")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end what was started
    digits = Forward().digits()
    try:
        with process(digits) as direct, process(golden_digits()[1].tolist(), "bench.peers.sdk") as sdk:
            ours, peers = measure(
                [PEERS[name] for name in options.only],
                {name: OURS[name] for name in options.ours},
                Loads(direct, sdk),
                digits,
                options.rounds,
                options.seconds,
            )
    except (CannotStart, LoadError) as error:
        print(f"bench.peers: ours: {error}", file=sys.stderr)
        return 1
    print(tables(ours, peers, options.markdown))
    if options.json:
        figures = {"ours": [asdict(one) for one in ours], "peers": [asdict(one) for one in peers]}
        options.json.write_text(json.dumps({"cores": os.cpu_count(), **figures}, indent=2) + "\n")
    if options.picture:
        try:
            draw(ours, peers, options.picture)
        except ImportError:
            print("bench.peers: the picture needs matplotlib", file=sys.stderr)
            return 1
    return int(any(peer.is_wrong for peer in peers))


if __name__ == "__main__":
    raise SystemExit(main())
