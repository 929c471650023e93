"""A stalled model: what is too late is told so in time and is not computed, nor is what was cancelled."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench.reliability import loads
from bench.reliability.common import (
    HANG_SECONDS,
    TRANSPORT,
    BrokenRule,
    Known,
    Latencies,
    Report,
    Server,
    check_health,
    connect,
    known,
    processes,
    serving,
    unexpected,
    wait_for_file,
)
from bench.reliability.stall import stall_image
from protos.mnist.v1 import digit_classifier_pb2 as pb

STALL_SECONDS = 0.5
DEADLINE_SECONDS = 0.05
HASTY = 100
"""Calls with that deadline, or cancelled after it."""
PATIENT = 10
"""Calls that wait."""
SETTLE_SECONDS = 0.2
CONNECTED, STALLED = "connected", "stalled"
"""Files by which the load and the scenario wait for each other."""

STALLS = {"in a thread": 128, "on the event loop": 1}
"""Rows of the request that stalls; up to `server.service.INLINE_SIZE` are computed on the event loop itself."""


@dataclass(frozen=True)
class Outcome:
    """What the callers with a deadline saw."""

    late_seconds: list[float]
    """Of each call that was refused for its deadline: how long after that it was told."""
    told: list[float]
    """When each of them was told, on the clock that the machine's processes share."""


def run(report: Report, *, rounds: int = 5, transport: str = TRANSPORT) -> None:
    """Stall the model, in each of the places where it runs, with many calls behind it."""
    answers = known()
    with serving(module="bench.reliability.stalling_server", transport=transport) as server, processes(2) as pool:
        for place, rows in STALLS.items():
            late: list[float] = []
            in_time = 0
            for deadline in [DEADLINE_SECONDS, None] * rounds:
                with tempfile.TemporaryDirectory() as folder:
                    loading = pool.submit(load, server.target, answers, deadline, folder)
                    wait_for_file(f"{folder}/{CONNECTED}")
                    stalled = pool.submit(stall, server.target, answers, rows)
                    _wait_for_stall(server)
                    Path(folder, STALLED).touch()
                    outcome = loading.result()
                    stall_ended = stalled.result()
                late += outcome.late_seconds
                in_time += sum(moment < stall_ended for moment in outcome.told)
                _check_computed(report, server, rows, place)
            report.row(f"stall {place}: DEADLINE_EXCEEDED", f"{len(late):,} of {rounds * HASTY:,}")
            report.require(len(late) == rounds * HASTY, "every call with a deadline is told that it passed")
            report.row("  told after the deadline, p50 / max", f"{Latencies(late).at(50)} / {Latencies(late).at(100)}")
            report.require(in_time == len(late), f"all are told before the stall ends, not {in_time}")
            report.row(
                "  rows computed afterwards", PATIENT, f"each of {rounds} times, and of {rounds} with cancelled calls"
            )
        check_health(report, server)


def _wait_for_stall(server: Server) -> None:
    while "stalls_for" not in json.loads(server.next_line()):
        pass


def _check_computed(report: Report, server: Server, stalled_rows: int, place: str) -> None:
    """Require that, after the stall, the rows of the patient were computed and no others."""
    batches: list[dict[str, int]] = []
    while sum(batch["rows"] for batch in batches) < stalled_rows + PATIENT:
        batches.append(json.loads(server.next_line()))
    time.sleep(SETTLE_SECONDS)  # what must not be computed would be by then
    while not server.lines.empty():
        batches.append(json.loads(server.lines.get()))
    stalled = [batch["rows"] for batch in batches if batch["stalled"]]
    after = sum(batch["rows"] for batch in batches if not batch["stalled"])
    report.require(stalled == [stalled_rows], f"stall {place}: a batch of {stalled_rows} rows stalls, here {stalled}")
    report.require(after == PATIENT, f"stall {place}: {PATIENT} rows are computed after it, here {after}")


def stall(target: str, answers: Known, rows: int) -> float:
    """Stall the model with a request of so many images; return when that was answered."""

    async def call() -> float:
        pixels = stall_image(STALL_SECONDS) + answers.pixels[answers.rows(0, rows - 1)].tobytes()
        async with connect(target) as channel:
            response = await loads.stub_of(channel).Classify(pb.ClassifyRequest(pixels=pixels), timeout=HANG_SECONDS)
            if len(response.digits) != rows:
                raise BrokenRule(f"{len(response.digits)} digits for {rows} images")
            return time.monotonic()

    return asyncio.run(call())


def load(target: str, answers: Known, deadline: float | None, folder: str) -> Outcome:
    """Send the hasty calls and the patient ones; with no deadline, the hasty ones are cancelled after that time.

    The connection is made before the stall, as one that is being made would use
    up the deadlines; files in the folder tell of both.
    """
    return asyncio.run(_load(target, answers, deadline, folder))


def _wait_for_the_stall_of_others(folder: str) -> None:
    Path(folder, CONNECTED).touch()
    wait_for_file(f"{folder}/{STALLED}")


async def _load(target: str, answers: Known, deadline: float | None, folder: str) -> Outcome:
    outcome = Outcome([], [])
    async with connect(target) as channel:
        stub = loads.stub_of(channel)
        await channel.channel_ready()
        await asyncio.to_thread(_wait_for_the_stall_of_others, folder)

        async def hasty(number: int) -> None:
            start = time.monotonic()
            cancel_after = None if deadline else DEADLINE_SECONDS
            timeout = deadline or HANG_SECONDS
            try:
                await loads.unary(stub, answers, number, 1, timeout=timeout, cancel_after=cancel_after)
            except asyncio.CancelledError:
                if deadline:
                    raise BrokenRule("a call that nobody cancelled was cancelled") from None
            except grpc.RpcError as error:
                if deadline is None or error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    unexpected(error, "a call behind a stalled model")
                outcome.told.append(time.monotonic())
                outcome.late_seconds.append(outcome.told[-1] - start - deadline)
            else:
                raise BrokenRule("a call was answered whose caller waited for less than the stall lasted")

        async def patient(number: int) -> None:
            await loads.unary(stub, answers, number, 1, timeout=HANG_SECONDS)

        async with asyncio.TaskGroup() as group:
            for number in range(HASTY):
                group.create_task(hasty(number))
            for number in range(PATIENT):
                group.create_task(patient(number))
    return outcome
