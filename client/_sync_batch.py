"""`Client.classify_batch` and `classify_iter`: several messages under way, answers in order."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing
from typing import Any

from client import _core, _fork, _request_id
from client._batch import Chunk, Chunks, Progress
from client._errors import InvalidImageError
from client._types import Prediction
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierStub

LET_GO_SECONDS = 1.0
"""At most; it takes a fraction of a millisecond."""


def exchange(
    chunks: Chunks,
    stub: DigitClassifierStub,
    call: Callable[[], AbstractContextManager[float]],
    most: int,
    target: str,
    make_bar: Callable[[], Progress],
) -> Generator[list[Prediction], None, None]:
    """Yield the predictions of each message, in order.

    Args:
        chunks: closed in the end.
        call: what the parts of a call happen in; gives its timeout.
        most: messages under way at a time.
    """
    request_id = _request_id.given() or _request_id.new()
    sent: deque[tuple[Chunk, Any]] = deque()
    ended: Exception | None = None
    process = os.getpid()
    bar = make_bar()

    def send(chunk: Chunk) -> tuple[Chunk, Any]:
        with _request_id.bound(request_id), call() as seconds:
            return chunk, stub.Classify.future(pb.ClassifyRequest(pixels=chunk.pixels), timeout=seconds)

    try:
        while True:
            while ended is None and len(sent) < most:
                try:
                    chunk = next(chunks)
                except Exception as error:  # StopIteration, or what is to be raised after the answers before it
                    ended = error
                else:
                    sent.append(send(chunk))
            if not sent:
                break
            chunk, under_way = sent[0]
            _fork.check_process(process)
            try:
                with _request_id.bound(request_id), call():
                    response = under_way.result()
            except InvalidImageError as error:
                if not _core.is_too_long(error, chunk.count):
                    error.index = chunk.first
                    raise
                chunks.limit(chunk.count // 2)
                sent.popleft()
                sent.extendleft(send(half) for half in reversed(chunk.halves()))
                continue
            sent.popleft()
            predictions = _core.parse_response(response, chunk.count, target)
            bar.update(chunk.count)
            yield predictions
        if ended is not None and not isinstance(ended, StopIteration):
            raise ended
    finally:
        bar.close()
        chunks.close()
        if os.getpid() != process:  # they are the parent's
            sent.clear()
        _call_off([under_way for _, under_way in sent])


def _call_off(calls: list[Any]) -> None:
    """Cancel the calls, and wait until gRPC's thread has let go of each.

    A program that ends at once would else stop that thread while it holds the
    lock of a call, for which the interpreter then waits in vain when it tidies
    up: of some thousand runs of `mnist-grpc classify … | head -1` one hung.
    """
    let_go = [threading.Event() for _ in calls]
    for call, event in zip(calls, let_go, strict=True):
        getattr(call, "inner", call).add_done_callback(lambda _, event=event: event.set())
        call.cancel()
    for event in let_go:
        event.wait(LET_GO_SECONDS)


def flat(chunks: Generator[list[Prediction], None, None]) -> Generator[Prediction, None, None]:
    """The predictions one by one; leaving ends the calls that are under way."""
    with closing(chunks):
        for chunk in chunks:
            yield from chunk
