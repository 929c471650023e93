"""`python -m bench.reliability.stalling_server`: the real server, whose model stalls when an image says so.

Takes the flags of `mnist-grpc-server`, of which `--workers` has to be 1. For
every batch it prints one JSON object to stdout: how many rows it had, and
whether it stalled; and one before it stalls. Everything but that is the product's own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bench.reliability.stall import stall_of
from server import cli, inference
from server.inputs import Rows


def main() -> int:
    run_batch = inference.Classifier.run_batch

    def stalling(self: inference.Classifier, blocks: Sequence[Rows]) -> list[inference.Scores]:
        seconds = max((stall_of(row) for block in blocks for row in _pixels(block)), default=0.0)
        if seconds:
            print(json.dumps({"stalls_for": seconds}), flush=True)
            time.sleep(seconds)
        results = run_batch(self, blocks)
        print(json.dumps({"rows": sum(len(block) for block in blocks), "stalled": seconds > 0}), flush=True)
        return results

    inference.Classifier.run_batch = stalling  # type: ignore[method-assign]
    return cli.main()


def _pixels(block: Rows) -> list[npt.NDArray[np.uint8]]:
    return list(block) if block.dtype == np.uint8 else []


if __name__ == "__main__":
    sys.exit(main())
