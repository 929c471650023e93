"""`python -m bench.models`: the embedded models beside each other, as images a second.

Bare, which is `Classifier.predict` on one thread, and asked by the SDK at a
server with one worker each; one image at a time, and 256 together. Rounds take
turns, so that what else the machine does falls on both.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

import client
from bench.processes import server
from digits.preprocessing import SIDE
from digits.snapshot import take_snapshot
from server.golden import golden_digits
from server.inference import load_classifier
from server.settings import MODELS

IMAGES = 256
ROUNDS = 7
ROUND_SECONDS = 0.5


def main() -> None:
    """Print medians over the rounds, and of the ratios within each round."""
    golden, _ = golden_digits()
    pixels = golden[np.arange(IMAGES) % len(golden)]  # as MNIST's are, so that the SDK has nothing to prepare
    frames = list(pixels.reshape(-1, SIDE, SIDE))
    tasks: dict[str, dict[str, tuple[int, Callable[[], object]]]] = {}
    with ExitStack() as stack:
        for model, weights in MODELS.items():
            classifier = load_classifier(take_snapshot(weights), max_batch_size=IMAGES)
            started = stack.enter_context(
                server("server", ("--port", "0", "--workers", "1", "--model", model, "--log-level", "warning"))
            )
            digits = stack.enter_context(client.Client(started.target))
            tasks[model] = {
                "bare, 1 image": (1, lambda c=classifier: c.predict(pixels[:1])),  # type: ignore[misc]
                "bare, 256 images": (IMAGES, lambda c=classifier: c.predict(pixels)),  # type: ignore[misc]
                "classify": (1, lambda d=digits: d.classify(frames[0])),  # type: ignore[misc]
                "classify_batch of 256": (IMAGES, lambda d=digits: d.classify_batch(frames)),  # type: ignore[misc]
            }
        figures = {}
        first, *others = MODELS
        for task in tasks[first]:
            rounds = [{model: _rate(*tasks[model][task]) for model in MODELS} for _ in range(ROUNDS)]
            figures[task] = {model: round(statistics.median(rates[model] for rates in rounds)) for model in MODELS} | {
                f"{first} / {other}": round(statistics.median(rates[first] / rates[other] for rates in rounds), 1)
                for other in others
            }
    print(json.dumps(figures, indent=2))


def _rate(count: int, call: Callable[[], object]) -> float:
    """Images a second of calls that take `count` images each."""
    done = 0
    start = time.perf_counter()
    while (now := time.perf_counter()) < start + ROUND_SECONDS:
        call()
        done += count
    return done / (now - start)


if __name__ == "__main__":
    main()
