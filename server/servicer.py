"""The grpc.aio skin of DigitService: messages in, messages or a status out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server.errors import ServiceError
from server.service import DigitService

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class DigitClassifierServicer(pb_grpc.DigitClassifierServicer):
    """Translates between grpc.aio and the service; decides nothing."""

    def __init__(self, service: DigitService) -> None:
        self._service = service

    async def Classify(
        self,
        request: pb.ClassifyRequest,
        context: Context,
    ) -> pb.ClassifyResponse:
        try:
            return await self._service.classify(request, context.time_remaining())
        except ServiceError as error:
            await refuse(context, error)

    # grpc.aio also takes a coroutine that reads and writes the context; the stub's type knows generators only.
    async def StreamClassify(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[pb.StreamClassifyRequest],
        context: Context,
    ) -> None:
        async def read() -> pb.StreamClassifyRequest | None:
            request = await context.read()
            return None if request is grpc.aio.EOF else request

        try:
            await self._service.stream_classify(read, context.write, context.time_remaining())
        except ServiceError as error:
            await refuse(context, error)

    async def GetModel(
        self,
        request: pb.GetModelRequest,
        context: Context,
    ) -> pb.GetModelResponse:
        try:
            return self._service.get_model()
        except ServiceError as error:
            await refuse(context, error)


async def refuse(context: Context, error: ServiceError) -> NoReturn:
    """End a call with an error's status, its google.rpc details and the hint when to try again."""
    status = status_pb2.Status(code=error.number, message=str(error))
    metadata: list[tuple[str, str | bytes]] = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        _add(status, error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
        metadata.append(("grpc-retry-pushback-ms", str(int(error.retry_after_seconds * 1000))))
    if error.incident_id:
        metadata.append(("incident-id", error.incident_id))
    if status.details:
        metadata.append(("grpc-status-details-bin", status.SerializeToString()))
    await context.abort(grpc.StatusCode[error.code], str(error), tuple(metadata))
    raise AssertionError("abort always raises")


def _add(status: status_pb2.Status, detail: error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
