"""The grpc.aio skin of DigitService: messages in, messages or a status out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.errors import InvalidArgument, ServiceError
from server.service import DigitService

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["DigitClassifier"].full_name

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)


class DigitClassifierServicer:
    """Translates between grpc.aio and the service; decides nothing.

    A request is a message, or the error that stands for bytes which are none.
    """

    def __init__(self, service: DigitService) -> None:
        self._service = service

    async def Classify(self, request: pb.ClassifyRequest | ServiceError, context: Context) -> pb.ClassifyResponse:
        try:
            return await self._service.classify(_message(request), context.time_remaining())
        except ServiceError as error:
            await refuse(context, error)

    async def StreamClassify(self, _: object, context: Context) -> None:
        async def read() -> pb.StreamClassifyRequest | None:
            request = await context.read()
            return None if request is grpc.aio.EOF else _message(request)

        try:
            await self._service.stream_classify(read, context.write, context.time_remaining())
        except ServiceError as error:
            await refuse(context, error)

    async def GetModel(self, request: pb.GetModelRequest | ServiceError, context: Context) -> pb.GetModelResponse:
        try:
            _message(request)
            return self._service.get_model()
        except ServiceError as error:
            await refuse(context, error)


def add_to_server(servicer: DigitClassifierServicer, server: grpc.aio.Server) -> None:
    """Register the methods.

    Not by the generated function, whose parser lets grpc.aio answer bytes that
    are no message with the text of a Python exception.
    """
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Classify": grpc.unary_unary_rpc_method_handler(
            servicer.Classify, _reader(pb.ClassifyRequest), pb.ClassifyResponse.SerializeToString
        ),
        "StreamClassify": grpc.stream_stream_rpc_method_handler(
            servicer.StreamClassify, _reader(pb.StreamClassifyRequest), pb.StreamClassifyResponse.SerializeToString
        ),
        "GetModel": grpc.unary_unary_rpc_method_handler(
            servicer.GetModel, _reader(pb.GetModelRequest), pb.GetModelResponse.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


def _reader(kind: type[M]) -> Callable[[bytes], M | ServiceError]:
    def read(content: bytes) -> M | ServiceError:
        try:
            return kind.FromString(content)
        except DecodeError:
            name = kind.DESCRIPTOR.full_name
            return InvalidArgument("request", f"a request is a {name} message, these {len(content)} bytes are none")

    return read


def _message(request: M | ServiceError) -> M:
    if isinstance(request, ServiceError):
        raise request
    return request


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


def _add(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
