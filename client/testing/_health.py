"""Whether the fake serves, for its calls and for grpc.health.v1.Health, and how calls wait for something to change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from client import _core
from client._types import Model

# grpc.health.v1.HealthCheckResponse, as bytes
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"
_WHOLE_SERVER = b""  # HealthCheckRequest without a name


class State:
    """What all calls of one fake look at."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._serving = True
        self._closing = False
        self._changed = threading.Condition()

    @property
    def serving(self) -> bool:
        return self._serving

    def set_serving(self, serving: bool) -> None:
        with self._changed:
            self._serving = serving
            self._changed.notify_all()

    def close(self) -> None:
        """Let go the calls that wait."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def wait(self, context: Any, over: Callable[[], bool] = lambda: False, timeout: float | None = None) -> bool:
        """Wait until the call has ended or something else is over; tell whether the call goes on."""

        def wake() -> None:
            with self._changed:
                self._changed.notify_all()

        context.add_callback(wake)
        with self._changed:
            self._changed.wait_for(lambda: self._closing or not context.is_active() or over(), timeout)
            return not self._closing and bool(context.is_active())


def health_handler(state: State) -> grpc.GenericRpcHandler:
    """grpc.health.v1.Health, by hand as in the client."""
    known = {_WHOLE_SERVER, _core.health_request()}

    def status(name: bytes) -> bytes:
        return (_SERVING if state.serving else _NOT_SERVING) if name in known else _SERVICE_UNKNOWN

    def check(name: bytes, context: Any) -> bytes:
        if name not in known:
            context.abort(grpc.StatusCode.NOT_FOUND, "no service of this name")
        return status(name)

    def watch(name: bytes, context: Any) -> Iterator[bytes]:
        said = b""

        def changed() -> bool:
            return status(name) != said

        while state.wait(context, changed):
            said = status(name)
            yield said

    return grpc.method_handlers_generic_handler(
        "grpc.health.v1.Health",
        {
            "Check": grpc.unary_unary_rpc_method_handler(check),
            "Watch": grpc.unary_stream_rpc_method_handler(watch),
        },
    )
