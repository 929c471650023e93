"""Health and reflection: what operators and tools ask, not what callers use.

Both are grpcio's own protocols with one difference: their open streams end when
the server stops. Clients keep a health watch open for as long as they run, and
each would otherwise cost every stop its whole grace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeAlias, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

SERVICES = ("grpc.health.v1.Health", reflection.SERVICE_NAME)

# Untyped, as types-grpcio-reflection has its async generator as a coroutine.
_ReflectionServicer: Any = reflection.aio.ReflectionServicer
_add_reflection: Any = reflection_pb2_grpc.add_ServerReflectionServicer_to_server

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Message = TypeVar("Message")


class HealthServicer(health_pb2_grpc.HealthServicer):
    """`grpc.health.v1.Health` with one status for all names; born NOT_SERVING.

    A watcher that stopped reading holds up nobody else: each compares what it
    last told with what holds now.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._serving = False
        self._ended = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Answer SERVING or NOT_SERVING from now on."""
        self._serving = serving and not self._ended
        self._wake()

    def end(self) -> None:
        """Tell all watchers NOT_SERVING and let them go."""
        self._ended = True
        self.set_serving(False)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} is here")
        return self._response(request)

    # grpc.aio also takes a coroutine that writes to the context; the stub's type knows generators only.
    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        told = None
        while True:
            changed = self._changed
            response = self._response(request)
            if response != told:
                await context.write(response)
                told = response
            elif self._ended:
                return
            else:
                await changed.wait()

    def _response(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        response = health_pb2.HealthCheckResponse
        if request.service not in self._names:
            return response(status=response.SERVICE_UNKNOWN)
        return response(status=response.SERVING if self._serving else response.NOT_SERVING)


class ReflectionServicer(_ReflectionServicer):  # type: ignore[misc]
    """grpcio's reflection; `end` lets go of tools that keep their stream open."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(service_names=names)
        self._ended = asyncio.Event()

    def end(self) -> None:
        self._ended.set()

    async def ServerReflectionInfo(self, request_iterator: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for response in super().ServerReflectionInfo(_until(self._ended, request_iterator), context):
            yield response


async def _until(ended: asyncio.Event, messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    """The messages, up to the last one before `ended`."""
    end = asyncio.ensure_future(ended.wait())
    try:
        while True:
            next_message = asyncio.ensure_future(anext(messages, None))
            await asyncio.wait((next_message, end), return_when=asyncio.FIRST_COMPLETED)
            if not next_message.done():
                next_message.cancel()
                return
            if (message := next_message.result()) is None:
                return
            yield message
    finally:
        end.cancel()


def add_to_server(health: HealthServicer, reflection_: ReflectionServicer, server: grpc.aio.Server) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    _add_reflection(reflection_, server)
