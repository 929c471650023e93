"""Hostile messages, files and connections beside good neighbours: nobody crashes, hangs, or gets another's answer.

They are bytes that are no message, to every method that reflection tells of and
to some that are not there; damaged requests of both protocols; sound requests
with damaged images, alone and in streams; and connections that speak broken
HTTP/2. Meanwhile neighbours call and stream, and check every answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import grpc
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bench.reliability import loads
from bench.reliability.common import (
    HANG_SECONDS,
    TRANSPORT,
    BrokenRule,
    Known,
    Latencies,
    Report,
    check_growth,
    check_health,
    connect,
    known,
    processes,
    serving,
    unexpected,
)
from bench.reliability.hostile import FORGED, Hostile
from protos.inference import grpc_inference_service_pb2 as oip
from protos.mnist.v1 import digit_classifier_pb2 as pb

INFER = "/inference.GRPCInferenceService/ModelInfer"
CALLERS = 32
"""Hostile ones at a time."""
STREAM_MESSAGES = 50
WIRE_SECONDS = 0.5
"""How long a broken connection is listened to; that a server waits for more is no fault."""
NEIGHBOURS = 4

EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # of the decoder, or of gRPC for a message that is too long
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
}
"""Anything else is a fault of the server's own."""
FATAL = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
"""A crash, and a hang: they end the run."""


def run(
    report: Report, *, messages: int = 200_000, seed: int = 0, memory_limit: float = 0.05, transport: str = TRANSPORT
) -> None:
    """Send so many hostile messages, and call from the neighbourhood meanwhile."""
    answers = known()
    with serving("--admin", "true", transport=transport) as server, processes(2) as pool:
        methods = pool.submit(find_methods, server.target).result()
        report.row("methods under attack", len(methods))
        outcomes: Counter[str] = Counter()
        faults: dict[str, str] = {}
        neighbourhood: list[Future[list[float]]] = []
        memory: list[float] = []
        parts = max(4, messages // 10_000)
        for part in range(parts):
            attack = pool.submit(load, server.target, answers, methods, messages // parts, seed + part)
            while not attack.done():
                neighbour = pool.submit(neighbours, server.target, answers, 1.0)
                neighbourhood.append(neighbour)
                neighbour.result()
                memory.append(server.rss_mb())
            outcomes += attack.result()[0]
            faults = attack.result()[1] | faults
            report.require(server.is_alive, "the server lives")
        report.row("hostile messages", f"{sum(outcomes.values()):,}")
        for outcome, count in sorted(outcomes.items()):
            report.row(f"  {outcome}", f"{count:,}")
        for fault, details in faults.items():
            report.require(False, f"{fault}: {details}")
        latencies = Latencies([seconds for future in neighbourhood for seconds in future.result()])
        report.row("right answers to neighbours", f"{len(latencies.seconds):,}", f"p99 {latencies.at(99)}")
        report.require(len(latencies.seconds) > 0, "neighbours were answered")
        quarter = -(-len(memory) // 4)
        before, after = statistics.median(memory[quarter : 2 * quarter + 1]), statistics.median(memory[-quarter:])
        check_growth(report, before, after, memory_limit, "medians of the second and the last quarter")
        report.require(FORGED not in server.log, "a stranger's text stands in the server's log as a line of its own")
        check_health(report, server)


# Neighbours -----------------------------------------------------------------


def neighbours(target: str, answers: Known, seconds: float) -> list[float]:
    """Call and stream for so long, a little at a time; return how long the calls took."""
    return asyncio.run(_neighbours(target, answers, seconds))


async def _neighbours(target: str, answers: Known, seconds: float) -> list[float]:
    end = time.monotonic() + seconds
    latencies: list[float] = []

    async def calling(number: int) -> None:
        while (start := time.monotonic()) < end:
            number += 1
            await loads.unary(stub, answers, number, 1 + number % 3, timeout=HANG_SECONDS)
            latencies.append(time.monotonic() - start)
            await loads.stream(stub, answers, number, [1, 3, 1, 2], timeout=HANG_SECONDS)
            await asyncio.sleep(0.01)

    async with connect(target) as channel:
        stub = loads.stub_of(channel)
        async with asyncio.TaskGroup() as group:
            for number in range(NEIGHBOURS):
                group.create_task(calling(50 * number))
    return latencies


# Hostile load ---------------------------------------------------------------


def find_methods(target: str) -> list[tuple[str, bool]]:
    """All methods that reflection tells of, as paths, and whether each takes a stream."""
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo

        def answer(question: reflection_pb2.ServerReflectionRequest) -> reflection_pb2.ServerReflectionResponse:
            (response,) = ask(iter([question]), timeout=HANG_SECONDS)
            result: reflection_pb2.ServerReflectionResponse = response
            return result

        ask_for = reflection_pb2.ServerReflectionRequest
        methods = []
        for service in answer(ask_for(list_services="")).list_services_response.service:
            files = answer(ask_for(file_containing_symbol=service.name)).file_descriptor_response.file_descriptor_proto
            for file in map(descriptor_pb2.FileDescriptorProto.FromString, files):
                for described in file.service:
                    if f"{file.package}.{described.name}" == service.name:
                        methods += [
                            (f"/{service.name}/{method.name}", method.client_streaming) for method in described.method
                        ]
        return methods


def load(
    target: str, answers: Known, methods: list[tuple[str, bool]], messages: int, seed: int
) -> tuple[Counter[str], dict[str, str]]:
    """Send hostile messages; return how many of which kind ended how, and an example of each answer that is a fault."""
    return asyncio.run(_Attack(target, answers, methods, messages, seed).run())


class _Attack:
    def __init__(self, target: str, answers: Known, methods: list[tuple[str, bool]], messages: int, seed: int) -> None:
        self._target = target
        self._methods = [*methods, ("/mnist.v1.DigitClassifier/Nothing", False), ("/none.Such/Method", True)]
        self._left = messages
        self._random = random.Random(seed)
        self._hostile = Hostile(answers, self._random)
        self._outcomes: Counter[str] = Counter()
        self._faults: dict[str, str] = {}

    async def run(self) -> tuple[Counter[str], dict[str, str]]:
        async with connect(self._target) as channel:
            self._channel: Any = channel  # its types know no calls without serializers
            self._stub = loads.stub_of(self._channel)
            async with asyncio.TaskGroup() as group:
                for _ in range(CALLERS):
                    group.create_task(self._caller())
        return self._outcomes, self._faults

    async def _caller(self) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [
            *[self._any_method] * 1,
            *[self._message] * 1,
            *[self._inference] * 1,
            *[self._images] * 3,
            *[self._wire] * 2,
        ]
        while self._left > 0:
            # A stream has many messages, so it is chosen rarely.
            await (self._stream() if self._random.random() < 1 / STREAM_MESSAGES else self._random.choice(kinds)())

    def _count(self, kind: str, outcome: str, messages: int = 1) -> None:
        self._left -= messages
        self._outcomes[f"{kind}: {outcome}"] += messages

    def _check_status(self, kind: str, error: grpc.RpcError) -> str:
        if error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core":
            return "cut off"  # this side's, when the call ends while it writes (grpc#36066)
        if error.code() in FATAL:
            unexpected(error, kind)
        if error.code() not in EXPECTED:
            self._faults.setdefault(f"{kind} is answered with {error.code().name}", error.details() or "")
        name: str = error.code().name
        return name

    async def _any_method(self) -> None:
        """Bytes that are no message, to any method."""
        path, takes_stream = self._random.choice(self._methods)
        make = self._channel.stream_stream if takes_stream else self._channel.unary_stream
        content = self._hostile.noise()
        outgoing = _single(content) if takes_stream else content
        call = make(path, request_serializer=None, response_deserializer=None)(outgoing, timeout=HANG_SECONDS)
        kind = f"noise to {path}"
        try:
            if await call.read() is grpc.aio.EOF or not path.endswith("Watch"):
                while await call.read() is not grpc.aio.EOF:
                    pass
            self._count(kind, "OK")
        except grpc.RpcError as error:
            self._count(kind, self._check_status(kind, error))
        finally:
            call.cancel()  # a health watch that was accepted never ends

    async def _message(self) -> None:
        """A damaged request."""
        content = self._hostile.message()
        call = self._channel.unary_unary("/mnist.v1.DigitClassifier/Classify", None, pb.ClassifyResponse.FromString)
        try:
            response = await call(content, timeout=HANG_SECONDS)
            if len(response.probabilities) != 10 * len(response.digits) or not response.digits:
                raise BrokenRule(f"a damaged request was answered with {response}")
            self._count("damaged request", "OK")
        except grpc.RpcError as error:
            self._count("damaged request", self._check_status("damaged request", error))

    async def _inference(self) -> None:
        """A damaged request of the Open Inference Protocol."""
        call = self._channel.unary_unary(INFER, None, oip.ModelInferResponse.FromString)
        try:
            response = await call(self._hostile.inference(), timeout=HANG_SECONDS)
            if not response.raw_output_contents:
                raise BrokenRule(f"a damaged inference request was answered with {response}")
            self._count("damaged inference request", "OK")
        except grpc.RpcError as error:
            self._count("damaged inference request", self._check_status("damaged inference request", error))

    async def _images(self) -> None:
        """A sound request that holds damaged images."""
        request = self._hostile.request()
        try:
            response = await self._stub.Classify(request, timeout=HANG_SECONDS)
            if request.encoded.files and len(response.digits) != len(request.encoded.files):
                raise BrokenRule(f"{len(request.encoded.files)} files were answered with {len(response.digits)} digits")
            self._count("damaged images", "OK")
        except grpc.RpcError as error:
            self._count("damaged images", self._check_status("damaged images", error))

    async def _stream(self) -> None:
        """A stream of damaged images, each answered in its place, and at times a damaged message at the end."""
        requests = [self._hostile.request() for _ in range(STREAM_MESSAGES)]
        broken = self._random.random() < 0.3
        contents = [
            pb.StreamClassifyRequest(first_sequence=number, frames=request).SerializeToString()
            for number, request in enumerate(requests)
        ]
        contents += [self._hostile.message()] if broken else []

        async def outgoing() -> AsyncIterator[bytes]:
            for content in contents:
                yield content

        call = self._channel.stream_stream(
            "/mnist.v1.DigitClassifier/StreamClassify", None, pb.StreamClassifyResponse.FromString
        )(outgoing(), timeout=HANG_SECONDS)
        answered: list[int] = []
        status = "OK"
        try:
            async for response in call:
                for block in response.blocks:
                    answered += range(block.first_sequence, block.first_sequence + block.frame_count)
        except grpc.RpcError as error:
            status = self._check_status("a stream of damaged images", error)
        firsts = sorted({first for first in answered if first < STREAM_MESSAGES})
        if not broken and (status != "OK" or len(firsts) < STREAM_MESSAGES // 2):
            raise BrokenRule(f"a stream of {STREAM_MESSAGES} messages ended with {status} after {len(firsts)} answers")
        self._count("damaged images in a stream", status, len(contents))

    async def _wire(self) -> None:
        """A connection that speaks no HTTP/2, or broken HTTP/2."""
        host, port = self._target.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        outcome = "listened to"
        try:
            writer.write(self._hostile.wire())
            with contextlib.suppress(OSError):
                await writer.drain()
                if self._random.random() < 0.2:
                    writer.write_eof()
                if self._random.random() < 0.8:
                    async with asyncio.timeout(WIRE_SECONDS * self._random.random()):
                        while await reader.read(65_536):
                            pass
                outcome = "closed"
        except TimeoutError:
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._count("broken connection", outcome)


async def _single(content: bytes) -> AsyncIterator[bytes]:
    yield content
