"""The anchor: a grpc.aio server with our options and messages that computes nothing.

`python -m bench.noop_server` serves on a free port until it is terminated. What
it costs is what gRPC itself costs; the answers are made before it starts. It
runs on asyncio's own event loop, where ours runs on uvloop: that is one of our
means, and `--noop-loop uvloop` tells how much of a figure is due to it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeAlias

import grpc
import numpy as np

from bench.scenarios import SCENARIOS
from client.load.images import fixed_digits
from digits.preprocessing import CLASSES, PIXELS
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server.answers import build_response
from server.app import server_options
from server.batching import Answer
from server.inference import Scores
from server.settings import Settings

LOOPS = ("asyncio", "uvloop")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def fixed_answer(count: int) -> pb.ClassifyResponse:
    """An answer of the size and form of ours."""
    scores = Scores(
        digits=np.array(fixed_digits(count), np.uint8),
        probabilities=np.full((count, CLASSES), 0.1, np.float32),
        logits=np.zeros((count, CLASSES), np.float32),
        digit_scores=np.zeros(count, np.float32),
        model_version="0" * 12,
    )
    return build_response([Answer(scores, count, queue_seconds=1e-4, compute_seconds=1e-4)], include_logits=False)


class NoopServicer(pb_grpc.DigitClassifierServicer):
    """Answers by the number of images, whatever they show."""

    def __init__(self) -> None:
        self._answers = {count: fixed_answer(count) for count in {scenario.images for scenario in SCENARIOS.values()}}

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        return self._answers[len(request.pixels) // PIXELS]

    async def StreamClassify(  # type: ignore[override]  # as in server.servicer
        self, request_iterator: AsyncIterator[pb.StreamClassifyRequest], context: Context
    ) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            count = len(request.frames.pixels) // PIXELS
            block = pb.FrameBlock(first_sequence=request.first_sequence, frame_count=count, result=self._answers[count])
            await context.write(pb.StreamClassifyResponse(blocks=[block]))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        return pb.GetModelResponse()


async def serve() -> None:
    """Serve until SIGTERM; the options are those of `server.app`."""
    server = grpc.aio.server(options=server_options(Settings()))
    pb_grpc.add_DigitClassifierServicer_to_server(NoopServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    told_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_stop.set)
    await server.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    await told_to_stop.wait()
    await server.stop(0)


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes an event loop of this kind.

    Raises:
        ModuleNotFoundError: without uvloop.
    """
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.noop_server")
    parser.add_argument("--noop-loop", choices=LOOPS, default=LOOPS[0], help="event loop (default: %(default)s)")
    with asyncio.Runner(loop_factory=loop_factory(parser.parse_args(arguments).noop_loop)) as runner:
        runner.run(serve())


if __name__ == "__main__":
    main()
