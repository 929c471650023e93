"""Weights that are exchanged under load, every third of them broken: no call fails, each answer is of one version."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.reliability import loads
from bench.reliability.common import (
    HANG_SECONDS,
    QUEUE_GAUGE,
    TRANSPORT,
    BrokenRule,
    Known,
    Latencies,
    Report,
    Server,
    check_back_to_zero,
    check_health,
    connect,
    known,
    processes,
    serving,
    wait_for_file,
)

CALLERS = 8
STEADY_SHARE = 0.5
"""How much of the time that the reloads take is measured beforehand without any."""
BIAS = 0.3
"""Deviation of what is added to the last layer's biases: versions differ by far more than a float's rounding."""


@dataclass
class Outcome:
    """What the callers saw."""

    latencies: list[float] = field(default_factory=list)
    """Of calls with a single image, in seconds."""
    versions: Counter[str] = field(default_factory=Counter)
    """Right answers by version."""


def run(report: Report, *, reloads: int = 100, workers: int = 1, seed: int = 0, transport: str = TRANSPORT) -> None:
    """Replace the weights file so often."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        good = make_weights(place / "good", reloads - reloads // 3 + 1, seed)
        bad = itertools.cycle(_make_broken(place / "bad"))
        answers = known(good)
        versions = list(answers.logits)
        served = place / "served" / "mnist_model.pth"
        install(good[0], served)
        with (
            serving(
                *("--weights", str(served), "--reload-interval", "0.05", "--workers", str(workers)),
                *("--log-level", "error"),
                transport=transport,
            ) as server,
            processes(1) as pool,
        ):
            done = place / "done"
            load_ = pool.submit(load, server.target, answers, str(done))
            time.sleep(1)
            latest = 0
            refused = 0
            waits: list[float] = []
            for number in range(1, reloads + 1):
                start = time.monotonic()
                if number % 3:
                    latest += 1
                    install(good[latest], served)
                    wait_for_version(server, versions[latest])
                else:
                    install(next(bad), served)
                    refused += 1
                    _wait_for_refusal(server, refused)
                waits.append(time.monotonic() - start)
                if load_.done():
                    break
            done.touch()
            outcome = load_.result()
            done.unlink()
            steady = pool.submit(load, server.target, answers, str(done))
            time.sleep(max(1.0, STEADY_SHARE * sum(waits)))
            done.touch()
            quiet = Latencies(steady.result().latencies)
            latencies = Latencies(outcome.latencies)
            report.row("weights served / refused", f"{latest} / {refused}")
            report.row(
                "from the file to its first answer, p50 / max",
                f"{Latencies(waits).at(50)} / {Latencies(waits).at(100)}",
            )
            report.row("right answers", f"{sum(outcome.versions.values()):,}", f"of {len(outcome.versions)} versions")
            report.row("single images, p99 while weights change", latencies.at(99))
            report.row("  afterwards", quiet.at(99), f"x{latencies.p(99) / quiet.p(99):.2f}")
            report.require(latest == len(versions) - 1 and refused == reloads // 3, "every file was looked at")
            report.require(server.gauge("mnist_grpc_reloads_total") >= reloads, "the metric counts them all")
            check_back_to_zero(report, server, QUEUE_GAUGE)
            check_health(report, server)


def make_weights(folder: Path, count: int, seed: int) -> list[Path]:
    """The embedded weights, each time with other biases in the last layer; they still read digits."""
    import torch

    from digits.checkpoint import load_checkpoint, save_checkpoint
    from server.settings import EMBEDDED_WEIGHTS

    checkpoint = load_checkpoint(EMBEDDED_WEIGHTS)
    state = {key: tensor.clone() for key, tensor in checkpoint.network.state_dict().items()}
    random_ = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        noise = random_.normal(0, BIAS, state["fc3.bias"].shape).astype(np.float32)
        checkpoint.network.load_state_dict(state | {"fc3.bias": state["fc3.bias"] + torch.from_numpy(noise)})
        paths.append(folder / f"{number}.pth")
        save_checkpoint(paths[-1], checkpoint.network, checkpoint.manifest)
    return paths


def _make_broken(folder: Path) -> list[Path]:
    """Cut off, of the wrong shape, of another file's manifest, unable to read digits, no file of weights at all."""
    import torch
    from torch import nn

    from digits.checkpoint import load_checkpoint, save_checkpoint
    from digits.snapshot import manifest_path
    from server.settings import EMBEDDED_WEIGHTS

    folder.mkdir()
    checkpoint = load_checkpoint(EMBEDDED_WEIGHTS)
    content = Path(EMBEDDED_WEIGHTS).read_bytes()
    cut, shape, foreign, unfit, text = (folder / f"{name}.pth" for name in ("cut", "shape", "foreign", "unfit", "text"))
    cut.write_bytes(content[: len(content) // 2])
    save_checkpoint(shape, nn.Linear(3, 3), checkpoint.manifest)
    save_checkpoint(foreign, checkpoint.network, checkpoint.manifest)
    foreign.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    checkpoint.network.load_state_dict({k: torch.zeros_like(v) for k, v in checkpoint.network.state_dict().items()})
    save_checkpoint(unfit, checkpoint.network, checkpoint.manifest)
    text.write_text("no weights\n")
    manifest_path(text).write_text("{}\n")
    return [cut, shape, foreign, unfit, text]


def install(weights: Path, served: Path) -> None:
    """Replace the files that are served by these."""
    from digits.checkpoint import write_atomically
    from digits.snapshot import manifest_path

    write_atomically(served, weights.read_bytes())
    if manifest_path(weights).exists():
        write_atomically(manifest_path(served), manifest_path(weights).read_bytes())
    else:
        manifest_path(served).unlink(missing_ok=True)


def wait_for_version(server: Server, version: str) -> None:
    label = f'mnist_grpc_model_info{{version="{version}"}}'
    _wait(lambda: server.metrics().get(label) == 1, f"version {version} serves")


def _wait_for_refusal(server: Server, count: int) -> None:
    label = 'mnist_grpc_reloads_total{outcome="refused"}'
    _wait(lambda: server.metrics().get(label, 0) >= count, f"{count} broken files are refused")


def _wait(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + HANG_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise BrokenRule(f"it does not come that {what}")
        time.sleep(0.02)


def load(target: str, answers: Known, done: str) -> Outcome:
    """Call and stream until a file appears; each answer has to be that of the version that its receipt names."""
    return asyncio.run(_load(target, answers, done))


async def _load(target: str, answers: Known, done: str) -> Outcome:
    outcome = Outcome()
    running = True
    numbers = itertools.count()

    async def single() -> None:
        while running:
            start = time.monotonic()
            version = await loads.unary(stub, answers, next(numbers), 1, timeout=HANG_SECONDS, logits=True)
            outcome.latencies.append(time.monotonic() - start)
            outcome.versions[version] += 1

    async def large() -> None:
        """Larger than a batch, so that an exchange may come between its parts."""
        while running:
            version = await loads.unary(stub, answers, next(numbers), 600, timeout=HANG_SECONDS, logits=True)
            outcome.versions[version] += 1
            await asyncio.sleep(0.02)

    async def streaming() -> None:
        while running:
            counts = [1, 30, 2, 300, 1]
            versions = await loads.stream(stub, answers, next(numbers), counts, timeout=HANG_SECONDS, logits=True)
            outcome.versions.update(versions)
            await asyncio.sleep(0.01)

    async def watch() -> None:
        nonlocal running
        await asyncio.to_thread(wait_for_file, done)
        running = False

    async with connect(target) as channel:
        stub = loads.stub_of(channel)
        async with asyncio.TaskGroup() as group:
            for task in (*[single] * CALLERS, large, streaming, watch):
                group.create_task(task())
    return outcome
