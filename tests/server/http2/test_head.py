"""The headers of a request, as calls of gRPC see them."""

from __future__ import annotations

import pytest

from server.http2.head import Head
from server.http2.wire import INTERNAL, MAX_BINARY_VALUES, RESOURCE_EXHAUSTED, Header, WireError
from tests.server.http2.peer import REQUEST


def head(*more: Header, without: bytes = b"") -> Head:
    return Head([*(header for header in REQUEST if header[0] != without), *more], 0)


def test_a_call_s_headers_are_read_once() -> None:
    call = head((b"grpc-encoding", b"gzip"), (b"grpc-timeout", b"20m"), (b"key", b"value"), (b"raw-bin", b"AP8"))
    assert (call.is_request, call.is_grpc, call.wrong) == (True, True, None)
    assert (call.method, call.path, call.encoding, call.timeout) == (b"POST", b"/a/B", b"gzip", 0.02)
    assert call.metadata() == (("key", "value"), ("raw-bin", b"\0\xff"))
    assert call.metadata() is call.metadata()


def test_what_is_not_said_has_its_default() -> None:
    call = head()
    assert (call.encoding, call.timeout, call.metadata()) == (b"identity", None, ())


@pytest.mark.parametrize(
    ("content_type", "is_grpc"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc;charset=utf-8", True),
        (b"application/grpc-web", False),
        (b"application/grpc-web+proto", False),
        (b"application/json", False),
        (b"", False),
    ],
)
def test_a_call_is_known_by_its_content_type(content_type: bytes, is_grpc: bool) -> None:
    assert head((b"content-type", content_type), without=b"content-type").is_grpc == is_grpc


def test_only_a_post_is_a_call() -> None:
    other = Head([(b":method", b"GET"), *(header for header in REQUEST if header[0] != b":method")], 0)
    assert (other.is_request, other.is_grpc) == (True, False)


def test_a_wrong_timeout_is_an_error_of_its_own_for_each_call() -> None:
    call = head((b"grpc-timeout", b"soon"))
    assert call.is_request
    assert call.timeout is None
    errors = [call.wrong, call.wrong]
    assert [(type(error), error.number) for error in errors if error] == [(WireError, INTERNAL)] * 2
    assert errors[0] is not errors[1]  # one that is raised again and again keeps every frame that it went through


def test_metadata_that_is_no_base64_is_an_error_whoever_looks_at_it() -> None:
    call = head((b"key-bin", b"A"))
    assert call.is_request
    assert call.wrong is not None
    assert (call.wrong.number, str(call.wrong)) == (INTERNAL, "the metadata key-bin is no base64")


def test_commas_do_not_stand_for_any_number_of_binary_values() -> None:
    assert len(head((b"key-bin", b"," * (MAX_BINARY_VALUES - 1))).metadata()) == MAX_BINARY_VALUES
    half = b"," * (MAX_BINARY_VALUES // 2)
    call = head((b"key-bin", half), (b"other-bin", half))
    assert call.wrong is not None
    assert (call.wrong.number, call.wrong.code) == (RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED")


def test_encodings_that_are_accepted_may_be_written_with_spaces() -> None:
    assert head((b"grpc-accept-encoding", b"identity, deflate,gzip")).accepted == [b"identity", b"deflate", b"gzip"]
    assert head().accepted == ()
