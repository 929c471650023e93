"""What to do about an error of gRPC's: its own words, and those of the server, made plain.

Knows codes, texts and trailers of calls, nothing of the clients.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

import grpc
from google.protobuf.duration_pb2 import Duration

from client._channel import NO_PROXY_VARIABLES, is_local, proxy_in_use

_CONNECTING = re.compile(
    r"failed to connect|connections to all backends|all addresses|[Dd]omain name|resol|handshake", re.I
)
"""How gRPC tells that a call did not reach any server."""

_REASONS = (
    (
        r"WRONG_VERSION_NUMBER",
        "what answers there speaks no TLS; leave tls out if that is this server, else look at the port",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "its certificate is not from an authority that this client trusts; give tls=client.TLS(ca='ca.pem')",
    ),
    (
        r"Hostname Verification|not in peer certificate",
        "its certificate is of another name; use the name that is in it, or give tls=client.TLS(server_name='…')",
    ),
    (
        r"HTTP proxy returned|proxy",
        "{proxy} refuses to connect; name the server in no_proxy if it is reached without one",
    ),
    (
        r"http1|HTTP/1|http response",
        "what answers there speaks HTTP/1 and no gRPC; is it the right port?",
    ),
    (
        r"resol|[Dd]omain name",
        "the name of the server cannot be resolved; is it spelled right?",
    ),
    (
        r"Socket closed|Connection reset|recvmsg|handshake",
        "what answers there closes the connection; a server with TLS does so to a client without (tls=True), "
        "and one that wants certificates to a client without one (tls=client.TLS(certificate=…, key=…))",
    ),
)

_DO = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "give a longer timeout, or see whether the server is well (mnist-grpc health)",
    grpc.StatusCode.UNAUTHENTICATED: "give Client(token=…), or the certificate that this server asks for",
    grpc.StatusCode.PERMISSION_DENIED: "this caller may not; give another token or certificate",
    grpc.StatusCode.UNIMPLEMENTED: "is it mnist-grpc that serves there, and as new as this client?",
    grpc.StatusCode.UNAVAILABLE: "the server is starting or stopping; try again, or wait_ready() first",
    grpc.StatusCode.CANCELLED: "the server, or what is before it, ended the call; try again",
    grpc.StatusCode.ABORTED: "try again",
}
_OTHER = "the server's log tells more"


def explain(code: grpc.StatusCode, details: str, target: str, timeout: float, retry_after: float | None) -> str:
    """A sentence with what happened and what to do."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and details == "Deadline Exceeded":
        details = f"no answer within {timeout:g} s"
    if code is grpc.StatusCode.UNAVAILABLE and _CONNECTING.search(details):
        return f"{_why_unreachable(details, target)} ({details})"
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return details  # which names rule and value
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if is_refused_for_length(details):
            return f"{details}; send fewer images in one message"
        return f"{details}; try again {'later' if retry_after is None else f'in {retry_after:g} s'}"
    return f"{details}; {_DO.get(code, _OTHER)}"


def is_refused_for_length(details: str) -> bool:
    """Whether it is gRPC's own refusal of a long message, which no retry mends."""
    return "larger than max" in details


def _why_unreachable(details: str, target: str) -> str:
    proxy = proxy_of(target)
    for pattern, advice in _REASONS:
        if re.search(pattern, details):
            return advice.format(proxy=f"the proxy of {proxy}" if proxy else "a proxy")
    through = f", by the proxy of {proxy}, which no_proxy={_host(target)} leaves out" if proxy else ""
    return f"no server answers there{through}; is it running, and is TLS on at both ends, or at none?"


def proxy_of(target: str) -> str | None:
    """The environment variable whose proxy stands between this process and the target."""
    variable = proxy_in_use()
    if variable is None or is_local(target) or re.match(r"unix|ip(v4|v6):.*,", target):
        return None
    excepted = next((os.environ[name] for name in NO_PROXY_VARIABLES if os.environ.get(name)), "")
    host = _host(target)
    return None if any(name.strip() and host.endswith(name.strip()) for name in excepted.split(",")) else variable


def _host(target: str) -> str:
    return re.sub(r"^\w+:(//[^/]*/)?(?=.*:)", "", target.split(",")[0]).rpartition(":")[0].strip("[]")


# When to come again ---------------------------------------------------------------


def retry_after(trailers: Mapping[str, str | bytes]) -> float | None:
    """Seconds after which the server wants to be asked again; None if it does not say.

    From `grpc-retry-pushback-ms`, else from a google.rpc.RetryInfo in
    `grpc-status-details-bin`.
    """
    pushback = trailers.get("grpc-retry-pushback-ms")
    if pushback is not None and re.fullmatch(r"\d{1,9}", text := _text(pushback)):
        return int(text) / 1000
    status = trailers.get("grpc-status-details-bin")
    return _retry_delay(status) if isinstance(status, bytes) else None


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("ascii", "replace")


def _retry_delay(status: bytes) -> float | None:
    """The delay of the RetryInfo in a serialized google.rpc.Status.

    By hand, because the package that has these messages ties its users to few
    versions of protobuf: Status has `Any details = 3`, Any has a name as field
    1 and bytes as field 2, RetryInfo has `Duration retry_delay = 1`.
    """
    try:
        for number, detail in _fields(status):
            parts = dict(_fields(detail)) if number == 3 else {}
            if parts.get(1, b"").endswith(b"/google.rpc.RetryInfo"):
                delay = Duration.FromString(dict(_fields(parts[2]))[1])
                return max(delay.ToNanoseconds() / 1e9, 0.0)
    except (ValueError, IndexError, KeyError, TypeError, ArithmeticError):
        return None
    except Exception as error:  # protobuf's DecodeError has moved between its versions
        if type(error).__name__ != "DecodeError":
            raise
    return None


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of the fields of a message that have a length."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            _, position = _varint(message, position)
            continue
        if kind == 2:
            length, position = _varint(message, position)
        else:
            length = {1: 8, 5: 4}[kind]
        if position + length > len(message):
            raise ValueError("a field is longer than its message")
        if kind == 2:
            yield tag >> 3, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
