"""What can go wrong, for callers to tell apart.

MnistGrpcError
├── InvalidImageError      the image breaks a rule; the same call fails again
├── DeadlineExceededError  no answer in time
├── OverloadedError        the server has no room now; try again later
├── UnavailableError       no server is reached, or it is not serving
├── UnauthenticatedError   the server does not accept who calls
├── OvertakenError         a newer frame of a live stream came before this one's turn
└── ServerError            the server failed; its log knows `incident_id`

Each keeps the gRPC error that it stands for as `__cause__`.
"""

from __future__ import annotations


class MnistGrpcError(Exception):
    """Base of every error that a call raises.

    >>> try:
    ...     client.classify("no-such-file.png")
    ... except client.InvalidImageError as error:  # the caller's fault
    ...     print(error)
    ... except client.MnistGrpcError as error:  # whatever else went wrong
    ...     print(error.code, error.incident_id)
    'no-such-file.png' cannot be read: No such file or directory
    """

    code: str | None = None
    """The name of the gRPC status code; None if the error arose on this side."""

    incident_id: str | None = None
    """What to search the server's log for."""

    request_id: str | None = None
    """The id of the call, which the server's log has, too; see `client.request_id`."""

    retry_after: float | None = None
    """Seconds after which the server wants to be asked again, if it said so."""


class InvalidImageError(MnistGrpcError, ValueError):
    """The image cannot be read or breaks a rule; the message names rule and value."""

    index: int | None = None
    """Which image of a batch it was, counted from 0; None for a single one."""


class DeadlineExceededError(MnistGrpcError, TimeoutError):
    """No answer came within `timeout` seconds."""


class OverloadedError(MnistGrpcError):
    """The server has no room for the call, also after the automatic retries."""


class UnavailableError(MnistGrpcError, ConnectionError):
    """The server cannot be reached, is not ready, or is about to stop."""


class UnauthenticatedError(MnistGrpcError):
    """The server wants credentials, or other ones."""


class OvertakenError(MnistGrpcError):
    """A frame of a stream with `latest_only` was not read, as a newer one came before its turn."""


class ServerError(MnistGrpcError):
    """The server failed in a way that the caller cannot mend."""
