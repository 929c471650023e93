"""`AsyncClient.classify_batch` and `classify_iter`: several messages under way, answers in order."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from client import _core, _fork, _request_id
from client._batch import Chunk, Chunks, Progress
from client._errors import InvalidImageError
from client._types import Image, Prediction
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierAsyncStub


async def exchange(
    images: Iterable[Image] | AsyncIterable[Image],
    chunks: Chunks,
    stub: DigitClassifierAsyncStub,
    call: Callable[[], AbstractContextManager[float]],
    most: int,
    target: str,
    make_bar: Callable[[], Progress],
) -> AsyncGenerator[list[Prediction], None]:
    """As `client._sync_batch.exchange`; `chunks` are those of `images`, and made in a thread."""
    request_id = _request_id.given() or _request_id.new()
    sent: deque[tuple[Chunk, Any]] = deque()
    source = aiter(images) if isinstance(images, AsyncIterable) else None
    ended: Exception | None = None
    process = os.getpid()
    bar = make_bar()

    def send(chunk: Chunk) -> tuple[Chunk, Any]:
        with _request_id.bound(request_id), call() as seconds:
            return chunk, stub.Classify(pb.ClassifyRequest(pixels=chunk.pixels), timeout=seconds)

    # A thread of its own: an iterable that waits, for a queue perhaps, must not take those of the loop.
    thread = ThreadPoolExecutor(1, thread_name_prefix="batch-images")
    context = contextvars.copy_context()

    async def in_thread(function: Callable[..., Chunk | None], *arguments: Any) -> Chunk | None:
        return await asyncio.get_running_loop().run_in_executor(thread, partial(context.run, function, *arguments))

    async def next_chunk() -> Chunk | None:
        if source is not None and (taken := await _take(source, chunks)):
            return await in_thread(chunks.prepare, taken)
        return await in_thread(next, chunks, None)

    try:
        while True:
            while ended is None and len(sent) < most:
                try:
                    chunk = await next_chunk()
                except Exception as error:  # to be raised after the answers before it
                    ended = error
                    break
                if chunk is None:
                    ended = StopAsyncIteration()
                    break
                sent.append(send(chunk))
            if not sent:
                break
            chunk, under_way = sent.popleft()
            _fork.check_process(process)
            try:
                with _request_id.bound(request_id), call():
                    response = await under_way
            except InvalidImageError as error:
                if not _core.is_too_long(error, chunk.count):
                    error.index = chunk.first
                    raise
                chunks.limit(chunk.count // 2)
                sent.extendleft(send(half) for half in reversed(chunk.halves()))
                continue
            predictions = _core.parse_response(response, chunk.count, target)
            bar.update(chunk.count)
            yield predictions
        if ended is not None and not isinstance(ended, StopAsyncIteration):
            raise ended
    finally:
        bar.close()
        chunks.close()
        thread.shutdown(wait=False, cancel_futures=True)
        if os.getpid() != process:  # they are the parent's
            sent.clear()
        for _, under_way in sent:
            under_way.cancel()
        if isinstance(source, AsyncGenerator):
            await source.aclose()
        await asyncio.gather(*(under_way for _, under_way in sent), return_exceptions=True)


async def _take(source: AsyncIterator[Image], chunks: Chunks) -> list[Image]:
    taken: list[Image] = []
    try:
        async for image in source:
            taken.append(image)
            if len(taken) == chunks.size:
                break
    except Exception as error:  # the caller's own
        chunks.fail(error)
    return taken
