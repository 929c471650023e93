"""What errors say: where it went wrong, why, and what to do; and what they carry for programs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration

import client
from client import _advice

if TYPE_CHECKING:
    from tests.client.conftest import Connect, Fakes

GreyImage = npt.NDArray[np.uint8]

DO = {
    "CANCELLED": "try again",
    "UNKNOWN": "the server's log tells more under incident abc",
    "INVALID_ARGUMENT": "",  # the reason is what to do
    "DEADLINE_EXCEEDED": "give a longer timeout",
    "NOT_FOUND": "the server's log tells more",
    "ALREADY_EXISTS": "the server's log tells more",
    "PERMISSION_DENIED": "another token or certificate",
    "UNAUTHENTICATED": r"Client\(token=…\)",
    "RESOURCE_EXHAUSTED": r"try again in 1\.5 s",
    "FAILED_PRECONDITION": "the server's log tells more",
    "ABORTED": "try again",
    "UNIMPLEMENTED": "is it mnist-grpc that serves there",
    "OUT_OF_RANGE": "the server's log tells more",
    "INTERNAL": "the server's log tells more under incident abc",
    "UNAVAILABLE": r"wait_ready\(\)",
    "DATA_LOSS": "the server's log tells more under incident abc",
}


@pytest.mark.parametrize("method", ["classify", "classify_batch", "get_model", "is_serving", "stream_classify"])
@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name != "OK"], ids=lambda code: code.name)
def test_each_status_says_where_why_and_what_to_do(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], code: grpc.StatusCode, method: str
) -> None:
    def refuse(_: Any, context: Any) -> None:
        status = b"\x1a" + bytes([len(retry_info(1.5))]) + retry_info(1.5)
        context.set_trailing_metadata(
            (
                ("incident-id", "abc"),
                ("x-request-id", "seven"),
                ("grpc-retry-pushback-ms", "-1"),
                ("grpc-status-details-bin", status),
            )
        )
        context.abort(code, "the reason")

    address = fakes.serve(classify=refuse, get_model=refuse, check=refuse, stream=refuse)
    twin = connect(address)
    arguments: Any = {"classify": (digits[7],), "classify_batch": (digits,), "stream_classify": (digits,)}

    def call() -> None:
        result = getattr(twin, method)(*arguments.get(method, ()))
        if method == "stream_classify":
            list(result)

    with pytest.raises(client.MnistGrpcError, match=rf"^{address}: the reason.*{DO[code.name]}") as caught:
        call()
    error = caught.value
    assert (error.code, error.incident_id, error.request_id) == (code.name, "abc", "seven")
    assert "abc" in str(error)
    assert error.retry_after == 1.5
    assert isinstance(error.__cause__, grpc.RpcError)


# When to come again ---------------------------------------------------------------


def retry_info(seconds: float) -> bytes:
    """A google.protobuf.Any with a google.rpc.RetryInfo."""
    delay = Duration()
    delay.FromNanoseconds(round(seconds * 1e9))
    content = delay.SerializeToString()
    detail = AnyMessage(
        type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\x0a" + bytes([len(content)]) + content
    )
    return detail.SerializeToString()


def status_with(*details: bytes) -> bytes:
    """A google.rpc.Status of code 8 with a message and these details."""
    return b"\x08\x08\x12\x03why" + b"".join(b"\x1a" + bytes([len(detail)]) + detail for detail in details)


OTHER = AnyMessage(type_url="type.googleapis.com/google.rpc.BadRequest", value=b"\x0a\x00").SerializeToString()


@pytest.mark.parametrize(
    ("trailers", "seconds"),
    [
        ({}, None),
        ({"grpc-retry-pushback-ms": "250"}, 0.25),
        ({"grpc-retry-pushback-ms": "0"}, 0.0),
        ({"grpc-retry-pushback-ms": "-1"}, None),
        ({"grpc-retry-pushback-ms": "soon"}, None),
        ({"grpc-retry-pushback-ms": "9" * 99}, None),
        ({"grpc-status-details-bin": status_with(OTHER, retry_info(2.5))}, 2.5),
        ({"grpc-status-details-bin": status_with(retry_info(0.0))}, 0.0),
        ({"grpc-status-details-bin": status_with(OTHER)}, None),
        ({"grpc-status-details-bin": status_with()}, None),
        ({"grpc-retry-pushback-ms": "-1", "grpc-status-details-bin": status_with(retry_info(2.5))}, 2.5),
        ({"grpc-retry-pushback-ms": "250", "grpc-status-details-bin": status_with(retry_info(2.5))}, 0.25),
    ],
)
def test_a_server_may_say_when_to_come_again(trailers: dict[str, Any], seconds: float | None) -> None:
    assert _advice.retry_after(trailers) == seconds


def test_details_that_are_no_status_tell_nothing() -> None:
    whole = status_with(OTHER, retry_info(2.5))
    for end in range(len(whole)):
        assert _advice.retry_after({"grpc-status-details-bin": whole[:end]}) in (None, 2.5)
    random = np.random.default_rng(4)
    for length in range(64):
        for _ in range(20):
            _advice.retry_after({"grpc-status-details-bin": random.bytes(length)})
    for place in range(len(whole)):
        for value in range(0, 256, 5):
            _advice.retry_after({"grpc-status-details-bin": whole[:place] + bytes([value]) + whole[place + 1 :]})


def test_an_overloaded_server_is_asked_again_and_then_the_error_says_when(
    connect: Connect, fakes: Fakes, digits: list[GreyImage]
) -> None:
    calls = 0

    def refuse(_: Any, context: Any) -> None:
        nonlocal calls
        calls += 1
        context.set_trailing_metadata((("grpc-retry-pushback-ms", "20"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")

    address = fakes.serve(classify=refuse)
    with pytest.raises(client.OverloadedError, match=rf"^{address}: no room; try again in 0\.02 s$") as caught:
        connect(address).classify(digits[7])
    assert caught.value.retry_after == 0.02
    assert calls == 4


# Where no server answers ----------------------------------------------------------


@pytest.fixture
def web_server() -> Iterator[str]:
    """An address that answers all with an error of HTTP/1, as a web server and a proxy do."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_a_server_that_is_not_there_is_asked_about(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    address = fakes.nobody()
    with pytest.raises(client.UnavailableError, match=rf"^{address}: no server answers there; is it running, .*TLS"):
        connect(address).classify(digits[7])


def test_a_name_that_is_none_is_told(connect: Connect, digits: list[GreyImage]) -> None:
    with pytest.raises(client.UnavailableError, match=r"^nosuch\.invalid:50051: the name .* is it spelled right"):
        connect("nosuch.invalid").classify(digits[7])


def test_a_web_server_is_told_from_ours(connect: Connect, digits: list[GreyImage], web_server: str) -> None:
    with pytest.raises(client.UnavailableError, match=rf"^{web_server}: what answers there speaks HTTP/1"):
        connect(web_server).classify(digits[7])


def test_a_proxy_that_refuses_is_named(
    connect: Connect, digits: list[GreyImage], web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{web_server}")
    with pytest.raises(client.UnavailableError, match=r"^digits\.example:50051: the proxy of http_proxy .*no_proxy"):
        connect("digits.example").classify(digits[7])


def test_a_proxy_that_is_not_there_is_named(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://{fakes.nobody()}")
    with pytest.raises(client.UnavailableError, match=r"proxy of https_proxy, which no_proxy=digits\.example leaves"):
        connect("digits.example").classify(digits[7])


@pytest.mark.parametrize(
    ("target", "excepted", "variable"),
    [
        ("digits.example:1", "", "http_proxy"),
        ("dns:///digits.example:1", "", "http_proxy"),
        ("digits.example:1", "other.example", "http_proxy"),
        ("digits.example:1", "other, .example", None),
        ("digits.example:1", "digits.example", None),
        ("10.0.0.1:1", "10.0.0.1", None),
        ("localhost:1", "", None),
        ("127.0.0.1:1", "", None),
        ("unix:/run/digits.sock", "", None),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", "", None),
    ],
)
def test_a_proxy_is_named_only_where_it_is_used(
    target: str, excepted: str, variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", excepted)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    assert _advice.proxy_of(target) == variable


def test_no_proxy_is_named_where_there_is_none() -> None:
    assert _advice.proxy_of("digits.example:1") is None
