"""The grpc.aio skin of DigitService: messages in, messages or a status out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from protos.mnist.v1 import digit_classifier_pb2 as pb
from server import logs
from server.errors import InvalidArgument, ServiceError
from server.intake import Intake, Methods
from server.service import CLASSIFY, GET_MODEL, SERVICE_NAME, STREAM_CLASSIFY, DigitService
from server.statuses import status_of

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)
T = TypeVar("T")


class DigitClassifierServicer:
    """Translates between grpc.aio and the service; decides nothing.

    A request is a message, or the error that stands for bytes which are none.
    """

    def __init__(self, service: DigitService, intake: Intake) -> None:
        self._service = service
        self.intake = intake

    async def Classify(self, request: pb.ClassifyRequest | ServiceError, context: Context) -> pb.ClassifyResponse:
        self.intake.arrived()
        try:
            return await self._service.classify(message(request), context.time_remaining())
        except ServiceError as error:
            await refuse(context, error)

    async def StreamClassify(self, _: object, context: Context) -> None:
        async def read() -> pb.StreamClassifyRequest | None:
            request = await context.read()
            return None if request is grpc.aio.EOF else message(request)

        # The transport of our own gets many messages at a time; grpc.aio has one after the other.
        read_ready = getattr(context, "read_ready", None)
        try:
            await self._service.stream_classify(read, writer(context), context.time_remaining(), read_ready)
        except ServiceError as error:
            await refuse(context, error)

    async def GetModel(self, request: pb.GetModelRequest | ServiceError, context: Context) -> pb.GetModelResponse:
        try:
            message(request)
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
            logged(CLASSIFY, servicer.Classify), reader(pb.ClassifyRequest), pb.ClassifyResponse.SerializeToString
        ),
        "StreamClassify": grpc.stream_stream_rpc_method_handler(
            logged(STREAM_CLASSIFY, servicer.StreamClassify),
            reader(pb.StreamClassifyRequest),
            pb.StreamClassifyResponse.SerializeToString,
        ),
        "GetModel": grpc.unary_unary_rpc_method_handler(
            logged(GET_MODEL, servicer.GetModel), reader(pb.GetModelRequest), pb.GetModelResponse.SerializeToString
        ),
    }
    methods = Methods(SERVICE_NAME, handlers, servicer.intake, ["Classify"], refusing)
    server.add_generic_rpc_handlers((methods,))


def refusing(method: str, error: ServiceError) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that ends a call of `package.Service/Method` with an error, and reads no message."""

    async def handle(_: object, context: Context) -> None:
        await refuse(context, error)

    return grpc.stream_stream_rpc_method_handler(logged(method, handle))


def reader(kind: type[M]) -> Callable[[bytes], M | ServiceError]:
    """A deserialiser that gives bytes which are no message as the error to answer them with."""

    def read(content: bytes) -> M | ServiceError:
        try:
            return kind.FromString(content)
        except DecodeError:
            name = kind.DESCRIPTOR.full_name
            return InvalidArgument("request", f"a request is a {name} message, these {len(content)} bytes are none")

    return read


def writer(context: Context) -> Callable[[Any], Awaitable[None]]:
    """The context's `write`; to a caller who has just left, it ends the call as its cancellation is about to."""

    async def write(response: Any) -> None:
        try:
            await context.write(response)
        except grpc.aio.InternalError as error:  # gRPC could not send; the handler is cancelled a moment later
            raise asyncio.CancelledError from error

    return write


def message(request: M | ServiceError) -> M:
    """The message, or raise the error that `reader` gave in its place."""
    if isinstance(request, ServiceError):
        raise request
    return request


def logged(method: str, handle: Callable[[Any, Context], Awaitable[T]]) -> Callable[[Any, Context], Awaitable[T]]:
    """A handler that also logs how each call ended: at debug level, and a fault of ours at error level.

    `method` is `package.Service/Method`.
    """

    async def handle_and_log(request: Any, context: Context) -> T:
        start = time.perf_counter()
        try:
            answer = await handle(request, context)
        except BaseException as error:
            _log_failure(method, context, error, time.perf_counter() - start)
            raise
        if logs.tells_calls():
            _log_call(logging.DEBUG, method, context, "OK", time.perf_counter() - start)
        return answer

    return handle_and_log


def _log_failure(method: str, context: Context, error: BaseException, seconds: float) -> None:
    if not isinstance(error, grpc.aio.AbortError):  # the caller left, or its deadline passed
        if logs.tells_calls():
            _log_call(logging.DEBUG, method, context, code_of_interruption(context), seconds)
        return
    code = code_of(context)
    # Of a fault, that is; the transport calls what is no gRPC INTERNAL, too.
    level = logging.ERROR if "incident-id" in dict(context.trailing_metadata() or ()) else logging.DEBUG
    if level == logging.ERROR or logs.tells_calls():
        _log_call(level, method, context, code, seconds)


def _log_call(level: int, method: str, context: Context, code: str, seconds: float) -> None:
    given = dict(context.trailing_metadata() or ())
    request_id = given.get(logs.REQUEST_ID_KEY) or logs.request_id(context.invocation_metadata())
    details = context.details()
    logs.log_call(
        level,
        method,
        code,
        seconds,
        str(request_id),
        context.peer(),
        message=details.decode() if isinstance(details, bytes) else str(details or ""),
        incident_id=str(given.get("incident-id", "")),
    )


def code_of_interruption(context: Context) -> str:
    """What a call ends with whose handler was cancelled: its caller left, or its deadline passed."""
    remaining = context.time_remaining()
    return "CANCELLED" if remaining is None or remaining > 0 else "DEADLINE_EXCEEDED"


def code_of(context: Context) -> str:
    """The name of the status that a handler gave its call; grpc.aio gives it as a number, whatever its type says."""
    code: Any = context.code()
    return next((each.name for each in grpc.StatusCode if code in (each, each.value[0])), "UNKNOWN")


async def refuse(context: Context, error: ServiceError) -> NoReturn:
    """End a call with an error's status, its google.rpc details and the hint when to try again."""
    status = status_of(error)
    metadata: list[tuple[str, str | bytes]] = []
    if error.retry_after_seconds is not None:
        metadata.append(("grpc-retry-pushback-ms", str(int(error.retry_after_seconds * 1000))))
    metadata.append((logs.REQUEST_ID_KEY, logs.request_id(context.invocation_metadata())))
    if error.incident_id:
        metadata.append(("incident-id", error.incident_id))
    if status.details:
        metadata.append(("grpc-status-details-bin", status.SerializeToString()))
    try:
        await context.abort(grpc.StatusCode[error.code], str(error), tuple(metadata))
    except grpc.aio.InternalError as failure:  # gRPC could not send; the handler is cancelled a moment later
        raise asyncio.CancelledError from failure
    raise AssertionError("abort always raises")
