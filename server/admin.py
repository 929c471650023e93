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
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from server.errors import ServiceError
from server.servicer import message, reader, refuse

HEALTH_NAME = "grpc.health.v1.Health"
SERVICES = (HEALTH_NAME, reflection.SERVICE_NAME)

# Untyped, as types-grpcio-reflection has its async generator as a coroutine.
_ReflectionServicer: Any = reflection.aio.ReflectionServicer

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)


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

    async def Check(
        self, request: health_pb2.HealthCheckRequest | ServiceError, context: Context
    ) -> health_pb2.HealthCheckResponse:
        request = await _sound(request, context)
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} is here")
        return self._response(request)

    # grpc.aio also takes a coroutine that writes to the context; the stub's type knows generators only.
    async def Watch(self, request: health_pb2.HealthCheckRequest | ServiceError, context: Context) -> None:
        request = await _sound(request, context)
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
        requests = _all_sound(_until(self._ended, request_iterator), context)
        async for response in super().ServerReflectionInfo(requests, context):
            yield response


async def _until(ended: asyncio.Event, messages: AsyncIterator[M]) -> AsyncIterator[M]:
    """The messages, up to the last one before `ended`."""
    end = asyncio.ensure_future(ended.wait())
    try:
        while True:
            next_message = asyncio.ensure_future(anext(messages, None))
            try:
                await asyncio.wait((next_message, end), return_when=asyncio.FIRST_COMPLETED)
                if not next_message.done() or (message := next_message.result()) is None:
                    return
            finally:  # also of a call that was cancelled: nobody else would wait for it
                if next_message.cancel():
                    await asyncio.wait((next_message,))
            yield message
    finally:
        end.cancel()


async def _sound(request: M | ServiceError, context: Context) -> M:
    """The message; or end the call, as the bytes were none."""
    try:
        return message(request)
    except ServiceError as error:
        await refuse(context, error)


async def _all_sound(requests: AsyncIterator[M | ServiceError], context: Context) -> AsyncIterator[M]:
    async for request in requests:
        yield await _sound(request, context)


def add_to_server(health: HealthServicer, reflection_: ReflectionServicer, server: grpc.aio.Server) -> None:
    """Register the methods; not by the generated functions, for the reason that `servicer.add_to_server` has."""
    check, response = reader(health_pb2.HealthCheckRequest), health_pb2.HealthCheckResponse.SerializeToString
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Check": grpc.unary_unary_rpc_method_handler(health.Check, check, response),
        "Watch": grpc.unary_stream_rpc_method_handler(health.Watch, check, response),
    }
    streams: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
            reflection_.ServerReflectionInfo,
            reader(reflection_pb2.ServerReflectionRequest),
            reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
    }
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(HEALTH_NAME, methods),
            grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, streams),
        )
    )
