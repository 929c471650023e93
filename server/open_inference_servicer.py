"""The grpc.aio skin of OpenInference: messages in, messages or a status out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from protos.inference import grpc_inference_service_pb2 as pb
from server.errors import ServiceError
from server.intake import Intake, Methods
from server.open_inference import SERVICE_NAME, OpenInference
from server.servicer import Context, logged, message, reader, refuse, refusing, writer

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class OpenInferenceServicer:
    """Translates between grpc.aio and the service; decides nothing.

    A request is a message, or the error that stands for bytes which are none.
    """

    def __init__(self, service: OpenInference, intake: Intake) -> None:
        self.service = service
        self.intake = intake

    async def ModelInfer(self, request: pb.ModelInferRequest | ServiceError, context: Context) -> pb.ModelInferResponse:
        self.intake.arrived()
        try:
            return await self.service.model_infer(message(request), context.time_remaining())
        except ServiceError as error:
            await refuse(context, error)

    async def ModelStreamInfer(self, _: object, context: Context) -> None:
        async def read() -> pb.ModelInferRequest | None:
            request = await context.read()
            return None if request is grpc.aio.EOF else message(request)

        try:
            await self.service.model_stream_infer(read, writer(context), context.time_remaining())
        except ServiceError as error:
            await refuse(context, error)


def add_to_server(servicer: OpenInferenceServicer, server: grpc.aio.Server) -> None:
    """Register the methods; not by the generated function, for the reason that `server.servicer` gives."""
    service = servicer.service
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ServerLive": _plain(service.server_live, pb.ServerLiveRequest, pb.ServerLiveResponse),
        "ServerReady": _plain(service.server_ready, pb.ServerReadyRequest, pb.ServerReadyResponse),
        "ModelReady": _plain(service.model_ready, pb.ModelReadyRequest, pb.ModelReadyResponse),
        "ServerMetadata": _plain(service.server_metadata, pb.ServerMetadataRequest, pb.ServerMetadataResponse),
        "ModelMetadata": _plain(service.model_metadata, pb.ModelMetadataRequest, pb.ModelMetadataResponse),
        "ModelConfig": _plain(service.model_config, pb.ModelConfigRequest, pb.ModelConfigResponse),
        "ModelStatistics": _plain(service.model_statistics, pb.ModelStatisticsRequest, pb.ModelStatisticsResponse),
        "ModelInfer": grpc.unary_unary_rpc_method_handler(
            logged(f"{SERVICE_NAME}/ModelInfer", servicer.ModelInfer),
            reader(pb.ModelInferRequest),
            pb.ModelInferResponse.SerializeToString,
        ),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
            logged(f"{SERVICE_NAME}/ModelStreamInfer", servicer.ModelStreamInfer),
            reader(pb.ModelInferRequest),
            pb.ModelStreamInferResponse.SerializeToString,
        ),
    }
    methods = Methods(SERVICE_NAME, handlers, servicer.intake, ["ModelInfer"], refusing)
    server.add_generic_rpc_handlers((methods,))


def _plain(
    answer: Callable[[Request], Response], kind: type[Request], response_kind: type[Response]
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler for a method that waits for nothing."""

    async def handle(request: Request | ServiceError, context: Context) -> Response:
        try:
            return answer(message(request))
        except ServiceError as error:
            await refuse(context, error)

    return grpc.unary_unary_rpc_method_handler(handle, reader(kind), response_kind.SerializeToString)
