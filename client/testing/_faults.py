"""What can go wrong with a call to the fake, and the statuses that stand for the client's errors."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import grpc

from client._errors import (
    DeadlineExceededError,
    InvalidImageError,
    MnistGrpcError,
    OverloadedError,
    OvertakenError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
)
from client.testing._answers import ScriptError

_CODES: dict[type[MnistGrpcError], grpc.StatusCode] = {
    InvalidImageError: grpc.StatusCode.INVALID_ARGUMENT,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    OvertakenError: grpc.StatusCode.ABORTED,
    ServerError: grpc.StatusCode.INTERNAL,
}
INCIDENT = "fake-incident"
"""`incident_id` of an INTERNAL error that was given none."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a call or a frame ends without an answer."""

    code: grpc.StatusCode
    message: str
    incident_id: str = ""
    retry_after: float | None = None
    """Seconds after which to try again; None: not to."""

    @property
    def number(self) -> int:
        """The `google.rpc.Code`."""
        number: int = self.code.value[0]
        return number


class Hang:
    """Never answer."""


class Drop:
    """Cut the connection."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Answer later."""

    seconds: float


Action = Status | Delay | Hang | Drop


@dataclass(slots=True, eq=False)
class Fault:
    """What goes wrong with the next calls."""

    action: Action
    name: str
    after: int
    left: int
    times: int


def status_of(
    error: type[MnistGrpcError] | MnistGrpcError | str | enum.Enum, retry_after: float | None = None
) -> Status:
    """The status over the wire that becomes this error in the client.

    Raises:
        ScriptError: it is no error that a server gives.
    """
    if isinstance(error, grpc.StatusCode):
        error = error.name
    if isinstance(error, str):
        code = next((code for code in grpc.StatusCode if code.name == error and error != "OK"), None)
    else:
        kind = error if isinstance(error, type) else type(error)
        code = next((_CODES[base] for base in kind.__mro__ if base in _CODES), None)
    if code is None:
        raise ScriptError(
            f"a server fails with one of the errors below MnistGrpcError or with a gRPC status such as "
            f"'DATA_LOSS', not with {error!r}"
        )
    message = str(error) if isinstance(error, MnistGrpcError) else ""
    incident = (error.incident_id if isinstance(error, MnistGrpcError) else None) or ""
    return Status(
        code,
        message or "FakeServer was told to fail so",
        incident or (INCIDENT if code is grpc.StatusCode.INTERNAL else ""),
        retry_after,
    )
