"""Three times the load that the server can do: what is refused is refused at once, what is accepted is answered.

Capacity is measured in a closed loop. Then calls are sent at times that were
set beforehand, whatever the answers do, and latencies count from those times:
a server that falls behind cannot slow down who measures it. As real callers do,
each has a deadline, and waits on its own side while the server allows no more
calls on its connection.
"""

from __future__ import annotations

import base64
import heapq
import random
import selectors
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from bench.reliability.common import (
    HANG_SECONDS,
    QUEUE_GAUGE,
    TRANSPORT,
    BrokenRule,
    Known,
    Latencies,
    Report,
    check_back_to_zero,
    check_health,
    known,
    processes,
    serving,
)
from client.load.images import IMAGES, rows_of
from client.load.wire import Call, Connection
from protos.mnist.v1 import digit_classifier_pb2 as pb

CONNECTIONS = 4
DEADLINE_SECONDS = 1.0
TIMER_SECONDS = 0.02
"""By so much gRPC's timers may be early."""

HEALTH_INTERVAL = 0.05
POLL_SECONDS = 0.05
PATH = "/mnist.v1.DigitClassifier/Classify"
LOADS = {"256 images": (256, 16), "64 images": (64, 32), "single images": (1, 128)}
"""Images in a call, and calls at a time when capacity is measured: enough to keep the server busy."""


@dataclass
class Flood:
    """What became of calls that were sent whether the server was ready for them or not."""

    accepted: list[float] = field(default_factory=list)
    """Seconds from the time at which the call was meant to be sent to the answer."""
    refused: list[float] = field(default_factory=list)
    """Seconds from when the call was sent to the refusal."""
    expired: int = 0
    """Calls whose deadline passed, sent or not."""
    in_time: int = 0
    """Calls answered while the flood lasted."""
    share_of_a_core: float = 0.0
    """What the generator itself took."""


@dataclass
class Checks:
    """Of health, while all this went on."""

    latencies: list[float] = field(default_factory=list)
    """Seconds, of those that were answered."""
    refused: int = 0
    reason: str = ""


def run(
    report: Report, *, seconds: float = 10.0, images: int = 0, factor: float = 3.0, transport: str = TRANSPORT
) -> None:
    """Measure capacity, then `factor` times that, for `seconds` each and each kind of call; or for so many images."""
    answers = known()
    with serving(transport=transport) as server, processes(2) as pool:
        for name, (count, callers) in LOADS.items():
            if images not in (0, count):
                continue
            rate = pool.submit(capacity, server.target, answers, count, callers, seconds).result()
            begin = time.monotonic() + 0.5
            checking = pool.submit(health, server.target, begin, seconds)
            outcome = pool.submit(flood, server.target, answers, count, factor * rate, begin, seconds).result()
            checks = checking.result()
            accepted, refused = Latencies(outcome.accepted), Latencies(outcome.refused)
            healthy = Latencies(checks.latencies)
            report.require(checks.refused == 0, f"{name}: {checks.refused} health checks failed: {checks.reason}")
            report.row(f"{name}: capacity", f"{rate:,.0f} calls/s")
            report.row(
                f"  sent at {factor:g} times that: answered / refused / expired",
                f"{len(accepted.seconds):,} / {len(refused.seconds):,} / {outcome.expired:,}",
            )
            report.row("  goodput / capacity", f"{outcome.in_time / seconds / rate:.2f}")
            report.row("  time to refusal, p50 / p99", f"{refused.at(50)} / {refused.at(99)}")
            report.row("  answered, p50 / p99", f"{accepted.at(50)} / {accepted.at(99)}")
            report.row(
                "  health check, p50 / p99", f"{healthy.at(50)} / {healthy.at(99)}", f"{len(healthy.seconds)} checks"
            )
            report.row("  the generator's own share of a core", f"{outcome.share_of_a_core:.0%}")
            report.require(len(accepted.seconds) > 0, f"{name}: some calls are answered")
            check_back_to_zero(report, server, QUEUE_GAUGE)
        check_health(report, server)


class Requests:
    """Messages of so many images, and the digits that stand in the answers."""

    def __init__(self, answers: Known, count: int) -> None:
        (logits,) = answers.logits.values()
        rows = [rows_of(number, count) for number in range(IMAGES)]
        self.messages = [answers.request(chosen).SerializeToString() for chosen in rows]
        self._digits = [logits[chosen].argmax(axis=1).tolist() for chosen in rows]

    def check(self, number: int, call: Call) -> None:
        """Raise BrokenRule unless the call was answered with the digits of the message of this number."""
        if (status := call.metadata().get("grpc-status")) != b"0":
            raise BrokenRule(f"a call ended with {status!r}: {call.metadata().get('grpc-message')!r}")
        if list(pb.ClassifyResponse.FromString(call.message).digits) != self._digits[number % IMAGES]:
            raise BrokenRule("an answer has other digits than the network")


@contextmanager
def connections(target: str) -> Iterator[tuple[list[Connection], selectors.BaseSelector]]:
    """Open connections whose settings have come."""
    with selectors.DefaultSelector() as selector:
        opened = [Connection(target, PATH) for _ in range(CONNECTIONS)]
        for connection in opened:
            selector.register(connection, selectors.EVENT_READ)
        try:
            while not all(connection.is_ready for connection in opened):
                _exchange(opened, selector, POLL_SECONDS)
            yield opened, selector
        finally:
            for connection in opened:
                connection.close()


def _exchange(opened: Sequence[Connection], selector: selectors.BaseSelector, wait: float) -> list[Call]:
    """Send what is to be sent, wait for something to come, return the calls that have ended."""
    ended = [call for connection in opened if connection.wants_to_write for call in connection.exchange()]
    blocked = any(connection.wants_to_write for connection in opened)
    for key, _ in selector.select(0 if ended else 0.001 if blocked else wait):
        ended += key.fileobj.exchange()  # type: ignore[union-attr]
    return ended


def capacity(target: str, answers: Known, count: int, callers: int, seconds: float) -> float:
    """So many calls under way at a time, for so long; return calls a second."""
    requests = Requests(answers, count)
    with connections(target) as (opened, selector):
        waiting, number, done = callers, 0, 0
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            for connection in opened:
                while waiting and connection.has_room and len(connection.open) < -(-callers // len(opened)):
                    connection.call(requests.messages[number % IMAGES], tag=number)
                    waiting, number = waiting - 1, number + 1
            for call in _exchange(opened, selector, POLL_SECONDS):
                waiting += 1
                if not call.was_not_begun:
                    requests.check(call.tag, call)
                    done += 1
        return done / (time.monotonic() - start)


def flood(target: str, answers: Known, count: int, rate: float, begin: float, seconds: float) -> Flood:
    """From `begin` on the machine's clock, send calls at random times, `rate` a second on average."""
    requests = Requests(answers, count)
    random_ = random.Random(0)
    outcome = Flood()
    refusals: Counter[bytes] = Counter()
    end = begin + seconds
    meant = begin
    held: list[float] = []  # a heap of when each was meant to be sent
    number = 0
    started = time.process_time()
    with connections(target) as (opened, selector):
        time.sleep(max(begin - time.monotonic(), 0))
        while (now := time.monotonic()) < end or held or any(connection.open for connection in opened):
            if now > end + HANG_SECONDS:
                raise BrokenRule(f"{sum(len(connection.open) for connection in opened)} calls were never answered")
            while meant < min(now, end):
                heapq.heappush(held, meant)
                meant += random_.expovariate(rate)
            while held and held[0] + DEADLINE_SECONDS <= now:
                heapq.heappop(held)
                outcome.expired += 1
            while held and (roomy := [connection for connection in opened if connection.has_room]):
                first = heapq.heappop(held)
                connection = min(roomy, key=lambda one: len(one.open))
                timeout = first + DEADLINE_SECONDS - now
                connection.call(requests.messages[number % IMAGES], tag=(number, first, now), timeout=timeout)
                number += 1
            wait = POLL_SECONDS if now >= end else min(max(meant - time.monotonic(), 0), POLL_SECONDS)
            for call in _exchange(opened, selector, wait):
                now = call.ended_at
                sent, first, at = call.tag
                status = call.metadata().get("grpc-status")
                if call.was_not_begun:
                    heapq.heappush(held, first)
                elif status == b"8":
                    outcome.refused.append(now - at)
                    refusals[call.headers] += 1
                elif status == b"4" or call.reset is not None:  # gRPC resets a call whose deadline has passed
                    outcome.expired += 1
                    if now < first + DEADLINE_SECONDS - TIMER_SECONDS:
                        raise BrokenRule(f"a call was ended {now - first:.3f} s after its time, before its deadline")
                elif now >= first + DEADLINE_SECONDS:  # the caller would have given up
                    outcome.expired += 1
                else:
                    requests.check(sent, call)
                    outcome.accepted.append(now - first)
                    outcome.in_time += now < end
        outcome.share_of_a_core = (time.process_time() - started) / seconds
    for block in refusals:
        _check_refusal(Call(None, headers=block).metadata())
    return outcome


def _check_refusal(metadata: dict[str, bytes]) -> None:
    """Raise BrokenRule unless this is an overload that says when to come again."""
    if int(metadata.get("grpc-retry-pushback-ms", 0)) <= 0:
        raise BrokenRule("a refusal has no grpc-retry-pushback-ms")
    encoded = metadata.get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(base64.b64decode(encoded + b"=" * (-len(encoded) % 4)))
    info = error_details_pb2.RetryInfo()
    if not any(detail.Unpack(info) for detail in status.details) or info.retry_delay.ToNanoseconds() <= 0:
        raise BrokenRule("a refusal has no RetryInfo")


def health(target: str, begin: float, seconds: float) -> Checks:
    """Ask for health all the while, on a connection of its own."""
    checks = Checks()
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        while (start := time.monotonic()) < begin + seconds:
            try:
                response = check(health_pb2.HealthCheckRequest(), timeout=HANG_SECONDS)
            except grpc.RpcError as error:
                checks.refused += 1
                checks.reason = f"{error.code().name}: {error.details()}"
                time.sleep(HEALTH_INTERVAL)
                continue
            if start >= begin:
                checks.latencies.append(time.monotonic() - start)
            if response.status != health_pb2.HealthCheckResponse.SERVING:
                raise BrokenRule("health says NOT_SERVING of a server that is merely busy")
            time.sleep(HEALTH_INTERVAL)
    return checks
