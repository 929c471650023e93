"""Load through the product's own clients: what their users see while servers come and go."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from dataclasses import dataclass, field

import numpy as np

import client
from bench.reliability.common import Known, known, wait_for_file
from digits.preprocessing import SIDE
from server.golden import golden_digits

MAX_COMPLAINTS = 20


@dataclass
class Outcome:
    """What callers of the SDK saw."""

    calls: int = 0
    """Answered, and rightly."""
    complaints: list[str] = field(default_factory=list)
    """What calls failed with, the first of them."""
    failed: int = 0
    slowest_seconds: float = 0.0

    def add(self, other: Outcome) -> None:
        self.calls += other.calls
        self.failed += other.failed
        self.complaints = (self.complaints + other.complaints)[:MAX_COMPLAINTS]
        self.slowest_seconds = max(self.slowest_seconds, other.slowest_seconds)

    def reasons(self) -> str:
        return " | ".join(sorted(set(self.complaints)))

    def note(self, start: float, error: Exception | None) -> None:
        self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - start)
        if error is None:
            self.calls += 1
        else:
            self.failed += 1
            self.complaints = [*self.complaints, f"{type(error).__name__}: {error}"][:MAX_COMPLAINTS]


def golden() -> Known:
    """Digits that the SDK sends as they are, and what the embedded weights say of them."""
    return known(pixels=golden_digits()[0])


def check(answers: Known, row: int, prediction: client.Prediction) -> None:
    answers.check_columns(prediction.model_version, [row], [prediction.digit], prediction.probabilities)


def load_async(target: str, answers: Known, clients: int, tasks: int, done: str) -> Outcome:
    """So many `AsyncClient`s with so many callers each, until a file appears."""
    return asyncio.run(_load_async(target, answers, clients, tasks, done))


async def _load_async(target: str, answers: Known, clients: int, tasks: int, done: str) -> Outcome:
    outcome = Outcome()
    images = answers.pixels.reshape(-1, SIDE, SIDE)
    numbers = itertools.count()
    running = True

    async def caller(one: client.AsyncClient) -> None:
        while running:
            row = next(numbers) % len(images)
            start = time.monotonic()
            try:
                check(answers, row, await one.classify(images[row]))
                outcome.note(start, None)
            except client.MnistGrpcError as error:
                outcome.note(start, error)

    async def watch() -> None:
        nonlocal running
        await asyncio.to_thread(wait_for_file, done)
        running = False

    opened = [client.AsyncClient(target) for _ in range(clients)]
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            for one in opened:
                for _ in range(tasks):
                    group.create_task(caller(one))
    finally:
        for one in opened:
            await one.close()
    return outcome


def load_sync(target: str, answers: Known, clients: int, threads: int, done: str) -> Outcome:
    """So many `Client`s, each with so many threads that call, until a file appears."""
    outcomes: list[Outcome] = []
    faults: list[BaseException] = []
    images = answers.pixels.reshape(-1, SIDE, SIDE)
    ended = threading.Event()

    def caller(one: client.Client, row: int) -> None:
        outcome = Outcome()
        outcomes.append(outcome)
        try:
            while not ended.is_set():
                row = (row + 1) % len(images)
                start = time.monotonic()
                try:
                    check(answers, row, one.classify(np.array(images[row])))
                    outcome.note(start, None)
                except client.MnistGrpcError as error:
                    outcome.note(start, error)
        except BaseException as fault:
            faults.append(fault)

    opened = [client.Client(target) for _ in range(clients)]
    callers = [threading.Thread(target=caller, args=(one, 7 * n)) for one in opened for n in range(threads)]
    for thread in callers:
        thread.start()
    wait_for_file(done)
    ended.set()
    for thread in callers:
        thread.join()
    for one in opened:
        one.close()
    if faults:
        raise faults[0]
    total = Outcome()
    for outcome in outcomes:
        total.add(outcome)
    return total
