"""`mnist.v1.ModelAdmin`: reload and rollback by RPC, where `--admin` offers them."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import grpc

from protos.mnist.v1 import model_admin_pb2 as pb
from server.deployment import Served
from server.errors import CannotServe, Refused, ServiceError
from server.service import named_errors
from server.servicer import Context, logged, message, reader, refuse

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ModelAdmin"].full_name


class Exchange(Protocol):
    """What exchanges the model: a `Deployment`, or the way to the process that has it."""

    async def reload(self) -> Served: ...

    async def rollback(self) -> Served: ...


class ModelAdminServicer:
    """Translates between grpc.aio and an `Exchange`; decides nothing."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def Reload(self, request: pb.ReloadRequest | ServiceError, context: Context) -> pb.ReloadResponse:
        try:
            with named_errors():
                message(request)
                served = await _or_refused(self._exchange.reload)
                return pb.ReloadResponse(version=served.version, previous_version=served.previous_version)
        except ServiceError as error:
            await refuse(context, error)

    async def Rollback(self, request: pb.RollbackRequest | ServiceError, context: Context) -> pb.RollbackResponse:
        try:
            with named_errors():
                message(request)
                served = await _or_refused(self._exchange.rollback)
                return pb.RollbackResponse(version=served.version, previous_version=served.previous_version)
        except ServiceError as error:
            await refuse(context, error)


async def _or_refused(step: Any) -> Served:
    try:
        # Shielded: a caller who leaves must not leave new weights seen and not served.
        return await asyncio.shield(step())
    except CannotServe as error:
        raise Refused(str(error)) from error


def add_to_server(servicer: ModelAdminServicer, server: grpc.aio.Server) -> None:
    """Register the methods; see `server.servicer.add_to_server`."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Reload": grpc.unary_unary_rpc_method_handler(
            logged(f"{SERVICE_NAME}/Reload", servicer.Reload),
            reader(pb.ReloadRequest),
            pb.ReloadResponse.SerializeToString,
        ),
        "Rollback": grpc.unary_unary_rpc_method_handler(
            logged(f"{SERVICE_NAME}/Rollback", servicer.Rollback),
            reader(pb.RollbackRequest),
            pb.RollbackResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
