"""Calls that check their answers: what the scenarios send, one at a time.

Everything here takes a stub and `Known` answers; nothing here decides how many
calls are made, when, or what it means when one is refused.
"""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import grpc
import numpy as np
from PIL import Image

from bench.reliability.common import BrokenRule, Known
from client.load.images import IMAGES
from digits.preprocessing import PIXELS, SIDE
from protos.inference import grpc_inference_service_pb2 as oip
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc

OUTPUTS = {"digit": "<i8", "probabilities": "<f4", "logits": "<f4", "digit_score": "<f4"}
"""Of the Open Inference Protocol."""


def stub_of(channel: grpc.aio.Channel) -> pb_grpc.DigitClassifierAsyncStub:
    return cast("pb_grpc.DigitClassifierAsyncStub", pb_grpc.DigitClassifierStub(channel))


async def unary(
    stub: pb_grpc.DigitClassifierAsyncStub,
    known: Known,
    start: int,
    count: int,
    *,
    timeout: float,
    logits: bool = False,
    cancel_after: float | None = None,
) -> str:
    """One `Classify`; return the version that answered.

    Raises:
        BrokenRule: the answer is wrong.
        asyncio.CancelledError: it was cancelled before it was answered.
        grpc.RpcError: it was refused.
    """
    rows = known.rows(start, count)
    call = stub.Classify(known.request(rows, logits=logits), timeout=timeout)
    cancelling = _cancel_later(call, cancel_after)
    try:
        return known.check(await call, rows)
    finally:
        call.cancel()
        if cancelling is not None:
            cancelling.cancel()


async def stream(
    stub: pb_grpc.DigitClassifierAsyncStub,
    known: Known,
    start: int,
    counts: Sequence[int],
    *,
    timeout: float,
    logits: bool = False,
    in_flight: int = 8,
    cancel_after: float | None = None,
) -> set[str]:
    """One `StreamClassify` of messages with so many frames each; return the versions that answered.

    Raises:
        BrokenRule: an answer is wrong, missing, doubled or out of order.
        asyncio.CancelledError: it was cancelled before its end.
        grpc.RpcError: it was refused, or ended by the server.
    """
    window = asyncio.Semaphore(in_flight)
    firsts = [start + sum(counts[:index]) for index in range(len(counts))]

    async def messages() -> AsyncIterator[pb.StreamClassifyRequest]:
        for first, count in zip(firsts, counts, strict=True):
            await window.acquire()
            yield pb.StreamClassifyRequest(
                first_sequence=first, frames=known.request(known.rows(first, count), logits=logits)
            )

    call = stub.StreamClassify(messages(), timeout=timeout)
    cancelling = _cancel_later(call, cancel_after)
    versions = set()
    expected = iter(zip(firsts, counts, strict=True))  # a block is of a message, or of several
    try:
        async for response in call:
            for block in response.blocks:
                first, count = next(expected, (-1, 0))
                window.release()
                while count < block.frame_count and (more := next(expected, None)) is not None:
                    count += more[1]
                    window.release()
                if (block.first_sequence, block.frame_count) != (first, count):
                    raise BrokenRule(f"frames {first}+{count} were answered with {block}")
                if block.WhichOneof("outcome") != "result":
                    raise BrokenRule(f"good frames were answered with {block.error}")
                versions.add(known.check(block.result, known.rows(first, count)))
        if (left := next(expected, None)) is not None:
            raise BrokenRule(f"a stream ended, and frame {left[0]} was never answered")
        return versions
    finally:
        call.cancel()
        if cancelling is not None:
            cancelling.cancel()


def _cancel_later(call: grpc.aio.Call, seconds: float | None) -> asyncio.TimerHandle | None:
    return None if seconds is None else asyncio.get_running_loop().call_later(seconds, call.cancel)


def png(known: Known, row: int) -> bytes:
    """One of the images as a file. Canonical ones pass through the server's preprocessing unchanged; these may not."""
    buffer = io.BytesIO()
    Image.fromarray(known.pixels[row % IMAGES].reshape(SIDE, SIDE)).save(buffer, "PNG")
    return buffer.getvalue()


def random_size(random_: random.Random) -> int:
    """Mostly small requests, some large, few beyond one batch."""
    return random_.choice([1, 1, 1, 1, 1, 1, 2, 7, 32, 64, 256, 300])


async def infer(
    stub: Any, known: Known, start: int, count: int, *, timeout: float, cancel_after: float | None = None
) -> str:
    """One `ModelInfer` of the Open Inference Protocol; return the version that answered; raises as `unary`."""
    rows = known.rows(start, count)
    tensor = oip.ModelInferRequest.InferInputTensor(name="pixels", datatype="UINT8", shape=[count, PIXELS])
    call = stub.ModelInfer(
        oip.ModelInferRequest(model_name="mnist", inputs=[tensor], raw_input_contents=[known.pixels[rows].tobytes()]),
        timeout=timeout,
    )
    cancelling = _cancel_later(call, cancel_after)
    try:
        response = await call
    finally:
        call.cancel()
        if cancelling is not None:
            cancelling.cancel()
    columns = {
        output.name: np.frombuffer(raw, OUTPUTS[output.name])
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    known.check_columns(
        response.model_version, rows, columns["digit"], columns["probabilities"], columns.get("logits", ())
    )
    version: str = response.model_version
    return version
