"""What a call can end with, without a word of any transport.

`code` is the name of a `google.rpc.Code`, which gRPC's status codes share. The
message goes to the caller as it is, so it never holds text of an unforeseen
Python exception.
"""

from __future__ import annotations


class ServiceError(Exception):
    """A call ends without an answer."""

    code: str
    number: int
    field: str = ""
    incident_id: str = ""
    retry_after_seconds: float | None = None


class InvalidArgument(ServiceError):
    """The request breaks a rule; `field` names the place in the request."""

    code = "INVALID_ARGUMENT"
    number = 3

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class DeadlineExceeded(ServiceError):
    """The deadline passed before the work began."""

    code = "DEADLINE_EXCEEDED"
    number = 4


class Overloaded(ServiceError):
    """There is no room now; try again after `retry_after_seconds`."""

    code = "RESOURCE_EXHAUSTED"
    number = 8

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Overtaken(ServiceError):
    """A newer frame of the same stream came before this one's turn."""

    code = "ABORTED"
    number = 10


class Internal(ServiceError):
    """A fault of ours; `incident_id` stands beside the traceback in the log."""

    code = "INTERNAL"
    number = 13

    def __init__(self, incident_id: str) -> None:
        super().__init__(f"the server failed to answer; its log has the reason under incident {incident_id}")
        self.incident_id = incident_id


class Refused(ServiceError):
    """What was asked for cannot be done as things are; `message` says why."""

    code = "FAILED_PRECONDITION"
    number = 9


class NotFound(ServiceError):
    """What was asked for by name is not here."""

    code = "NOT_FOUND"
    number = 5


class NotServing(ServiceError):
    """No model is ready, or the server is about to stop."""

    code = "UNAVAILABLE"
    number = 14


class Unauthenticated(ServiceError):
    """There is no token, or none that is known."""

    code = "UNAUTHENTICATED"
    number = 16


class NotOffered(ServiceError):
    """There is no such method."""

    code = "UNIMPLEMENTED"
    number = 12


class CannotServe(Exception):
    """The server cannot start: its address or its weights cannot be used."""


def not_installed(error: ModuleNotFoundError) -> str:
    """What to tell a person who has the client only."""
    return f"{error.name} is not installed; pip install 'mnist-grpc[server]' brings it"
