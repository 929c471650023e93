"""Refusing calls before their message is read.

To read a message of 256 images and refuse it costs half of what it costs to
answer it. So a unary call for which there will hardly be room ends before: by
then gRPC has taken in its headers, and of its message what came with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import grpc

from server.errors import ServiceError
from server.service import DigitService

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Intake:
    """Tells the service which unary calls have come, before their messages have."""

    def __init__(self, service: DigitService) -> None:
        self._service = service
        self._loop = asyncio.get_running_loop()  # to ask for it takes CPython 3.11 a system call

    def announce(self, method: str) -> ServiceError | None:
        """The current task's call of `package.Service/Method` has come; return why it is refused, if it is."""
        task = asyncio.current_task(self._loop)
        assert task is not None
        if (error := self._service.announce(task, method)) is not None:
            return error
        task.add_done_callback(self._service.arrived)  # the caller may leave before all has come
        return None

    def arrived(self) -> None:
        """The current task has its message."""
        self._service.arrived(asyncio.current_task(self._loop))


class Methods(grpc.GenericRpcHandler):
    """The methods of a gRPC service, of which some are refused unread.

    gRPC asks for a call's handler before it reads its message, and reads none
    for a handler of streams.
    """

    def __init__(
        self,
        service_name: str,
        handlers: Mapping[str, Handler],
        intake: Intake,
        refusable: Collection[str],
        refusing: Callable[[str, ServiceError], Handler],
    ) -> None:
        """`handlers` by the methods' names, some of which are `refusable`; `refusing` makes a handler that does it."""
        self._handlers = {f"/{service_name}/{name}": handler for name, handler in handlers.items()}
        self._refusable = {f"/{service_name}/{name}": f"{service_name}/{name}" for name in refusable}
        self._intake = intake
        self._refusing = refusing

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        path = handler_call_details.method
        if (method := self._refusable.get(path)) and (error := self._intake.announce(method)) is not None:
            return self._refusing(method, error)
        return self._handlers.get(path)
