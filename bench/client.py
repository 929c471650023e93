"""`python -m bench.client [coalescing|batch]`: what the SDK makes of many calls, and of many images.

coalescing: callers in a closed loop, one client: tasks of an AsyncClient and
threads of a Client, alone and 64 at a time, with an RPC for each call beside
calls that go together.

batch: 10,000 images as arrays through `classify_batch`, beside the bare forward
of the network in batches of 256 in one thread of another process: a client has
no torch, whose many objects would have to be gone through by each collection of
garbage.

Both against a server process of our own with the embedded weights; what is
compared is measured in turns, in several rounds, and every answer is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import client
from bench.options import duration, positive, writable
from bench.processes import server
from bench.rounds import in_turn, percentiles_us, ratios, spread
from server.golden import golden_digits
from server.settings import EMBEDDED_WEIGHTS, TRANSPORTS

WARM_UP_SECONDS = 0.3
CALLERS = (1, 64)
FORWARD_SECONDS = 0.5
FORWARD_BATCH = 256
IMAGES = 10_000

Pixels: TypeAlias = npt.NDArray[np.uint8]
Samples: TypeAlias = "dict[str, dict[str, list[float]]]"


class WrongAnswer(Exception):
    """The server said something else than the network."""


# Coalescing -----------------------------------------------------------------


class Callers:
    """A closed loop of callers who share a client."""

    def __init__(self, target: str, images: list[Pixels], digits: list[int]) -> None:
        self._target = target
        self._images = images
        self._digits = digits
        self._latencies: list[float] = []

    def measure(self, kind: str, callers: int, seconds: float, coalesce: bool) -> dict[str, float]:
        """Calls a second, and two percentiles of their latencies in microseconds."""
        if kind == "tasks":
            rate = asyncio.run(self._tasks(callers, seconds, coalesce))
        else:
            rate = self._threads(callers, seconds, coalesce)
        p50, p99 = percentiles_us(self._latencies)
        return {"rate": rate, "p50_us": p50, "p99_us": p99}

    async def _tasks(self, callers: int, seconds: float, coalesce: bool) -> float:
        async with client.AsyncClient(self._target, coalesce=coalesce) as shared:

            async def call(number: int, end: float) -> None:
                while True:  # once in any case
                    start = time.perf_counter()
                    number = (number + 1) % len(self._images)
                    prediction = await shared.classify(self._images[number])
                    self._note(number, prediction, time.perf_counter() - start)
                    if time.perf_counter() >= end:
                        return

            for duration in (WARM_UP_SECONDS, seconds):
                self._latencies.clear()
                start = time.perf_counter()
                await asyncio.gather(*(call(number, start + duration) for number in range(callers)))
            return len(self._latencies) / (time.perf_counter() - start)

    def _threads(self, callers: int, seconds: float, coalesce: bool) -> float:
        failures: list[BaseException] = []
        with client.Client(self._target, coalesce=coalesce) as shared:

            def call(number: int, end: float) -> None:
                try:
                    while True:
                        start = time.perf_counter()
                        number = (number + 1) % len(self._images)
                        prediction = shared.classify(self._images[number])
                        self._note(number, prediction, time.perf_counter() - start)
                        if failures or time.perf_counter() >= end:
                            return
                except BaseException as error:
                    failures.append(error)

            for duration in (WARM_UP_SECONDS, seconds):
                self._latencies.clear()
                start = time.perf_counter()
                threads = [threading.Thread(target=call, args=(number, start + duration)) for number in range(callers)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            if failures:
                raise failures[0]
            return len(self._latencies) / (time.perf_counter() - start)

    def _note(self, number: int, prediction: client.Prediction, seconds: float) -> None:
        if prediction.digit != self._digits[number]:
            raise WrongAnswer(f"image {number}: {prediction.digit} instead of {self._digits[number]}")
        self._latencies.append(seconds)


def measure_coalescing(target: str, rounds: int, seconds: float, counts: Sequence[int] = CALLERS) -> Samples:
    """`{"tasks @64": {"alone": [calls/s of each round], "together": [...], ...}}`."""
    pixels, digits = golden_digits()
    callers = Callers(target, [*pixels.reshape(-1, 28, 28)], digits.tolist())
    samples: Samples = {}
    for number in range(rounds):
        for kind, count in itertools.product(("tasks", "threads"), counts):
            ways = [("alone", False), ("together", True)]
            for way, coalesce in in_turn(ways, number):
                sample = callers.measure(kind, count, seconds, coalesce)
                of_way = samples.setdefault(f"{kind} @{count}", {})
                of_way.setdefault(way, []).append(sample["rate"])
                of_way.setdefault(f"{way} p50_us", []).append(sample["p50_us"])
    return samples


def print_coalescing(samples: Samples) -> None:
    print(f"\n{'':14}{'an RPC a call':>24}{'together':>24}{'calls/s':>24}{'p50':>24}")
    print(f"{'':14}{'calls/s':>14}{'p50 us':>10}{'calls/s':>14}{'p50 us':>10}{'ratio':>24}{'ratio':>24}")
    for name, of in samples.items():
        columns = "".join(
            f"{statistics.median(of[way]):>14,.0f}{statistics.median(of[f'{way} p50_us']):>10,.0f}"
            for way in ("alone", "together")
        )
        rates = spread(ratios(of["together"], of["alone"]))
        medians = spread(ratios(of["together p50_us"], of["alone p50_us"]))
        print(f"{name:14}{columns}{rates:>24}{medians:>24}")


# Batch ----------------------------------------------------------------------


def batch_images(data_dir: Path | None) -> tuple[str, Pixels]:
    """10,000 images, `uint8[10000, 28, 28]`: MNIST's test images, or the golden digits again and again."""
    if data_dir is None:
        golden = golden_digits()[0].reshape(-1, 28, 28)
        return "the golden digits", golden[np.arange(IMAGES) % len(golden)]
    from trainer.data import load_mnist

    return "MNIST's test images", load_mnist(data_dir, download=False).test.pixels.numpy().reshape(-1, 28, 28)[:IMAGES]


def forward_digits(pixels: Pixels) -> list[int]:
    """What the bare network reads."""
    from bench.forward import Forward

    return Forward().digits_of(pixels.reshape(-1, 784))


def forward_rate() -> float:
    """Images a second of the bare network."""
    from bench.forward import Forward

    return Forward().rate(FORWARD_BATCH, FORWARD_SECONDS)


def measure_batch(target: str, rounds: int, connections: int, data_dir: Path | None) -> Samples:
    """`{"Client, list": {"rate": [images/s of each round], "forward": [...]}}`."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as torch_process:
        return _measure_batch(target, rounds, connections, data_dir, torch_process)


def _measure_batch(
    target: str, rounds: int, connections: int, data_dir: Path | None, torch_process: ProcessPoolExecutor
) -> Samples:
    name, array = torch_process.submit(batch_images, data_dir).result()
    print(f"{IMAGES:,} images, {name}")
    expected = torch_process.submit(forward_digits, array).result()
    forms: dict[str, Any] = {"list": list(array), "array": array}
    samples: Samples = {}

    async def read(images: Any) -> tuple[list[client.Prediction], float]:
        async with client.AsyncClient(target, connections=connections) as twin:
            await twin.classify_batch(array[:1000])
            start = time.perf_counter()
            return await twin.classify_batch(images), time.perf_counter() - start

    with client.Client(target, connections=connections) as reader:
        reader.classify_batch(array[:1000])

        def read_now(images: Any) -> tuple[list[client.Prediction], float]:
            start = time.perf_counter()
            return reader.classify_batch(images), time.perf_counter() - start

        ways: dict[str, Callable[[Any], tuple[list[client.Prediction], float]]] = {
            "Client": read_now,
            "AsyncClient": lambda images: asyncio.run(read(images)),
        }
        for _ in range(rounds):
            for kind, way in ways.items():
                for form, images in forms.items():
                    predictions, seconds = way(images)
                    digits = [prediction.digit for prediction in predictions]
                    if wrong := sum(map(int.__ne__, digits, expected)):
                        raise WrongAnswer(f"{wrong} of {IMAGES} answers differ from the network's")
                    of = samples.setdefault(f"{kind}, {form}", {"rate": [], "forward": []})
                    of["rate"].append(IMAGES / seconds)
                    of["forward"].append(torch_process.submit(forward_rate).result())
    return samples


def print_batch(samples: Samples) -> None:
    print(f"\n{'':20}{'images/s':>12}{'bare forward':>14}{'ratio':>24}")
    for name, of in samples.items():
        rates = "".join(f"{statistics.median(of[key]):>{width},.0f}" for key, width in (("rate", 12), ("forward", 14)))
        print(f"{name:20}{rates}{spread(ratios(of['rate'], of['forward'])):>24}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("coalescing", "batch"), help="measure this alone")
    parser.add_argument("--rounds", type=positive, default=5, help="how often everything is measured (default: 5)")
    parser.add_argument("--seconds", type=duration, default=1.0, help="for each way of calling (default: 1)")
    parser.add_argument("--workers", type=positive, default=1, help="processes of the server (default: 1)")
    parser.add_argument("--transport", choices=TRANSPORTS, default=TRANSPORTS[0], help="of the server")
    parser.add_argument("--callers", type=positive, action="append", help="for coalescing (default: 1 and 64)")
    parser.add_argument("--connections", type=positive, default=1, help="of the client, for batch (default: 1)")
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST/raw, for batch; else the golden digits")
    parser.add_argument("--json", type=writable, help="also write the figures here")
    options = parser.parse_args(arguments)
    ours = ["--port", "0", "--workers", str(options.workers), "--weights", EMBEDDED_WEIGHTS, "--log-level", "warning"]
    ours += ["--transport", options.transport]
    figures: dict[str, Samples] = {}
    print(f"{options.rounds} rounds; medians; ratios with their smallest and largest")
    try:
        with server("server", ours) as running:
            if options.what != "batch":
                figures["coalescing"] = measure_coalescing(
                    running.target, options.rounds, options.seconds, options.callers or CALLERS
                )
                print_coalescing(figures["coalescing"])
            if options.what != "coalescing":
                figures["batch"] = measure_batch(running.target, options.rounds, options.connections, options.data_dir)
                print_batch(figures["batch"])
    except (RuntimeError, WrongAnswer, client.MnistGrpcError) as error:
        print(f"bench.client: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
