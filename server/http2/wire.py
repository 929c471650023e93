"""gRPC's wire format, without any I/O: bytes in, messages out; a status in, headers out.

What goes over an HTTP/2 stream: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
Knows neither connections nor services.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
import zlib
from collections.abc import Iterable
from typing import TypeAlias

from server.errors import ServiceError

Header: TypeAlias = tuple[bytes, bytes]
Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

OK, CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = (
    0,
    1,
    2,
    4,
    8,
    12,
    13,
    14,
)

_NAMES = {
    RESOURCE_EXHAUSTED: "RESOURCE_EXHAUSTED",
    UNIMPLEMENTED: "UNIMPLEMENTED",
    INTERNAL: "INTERNAL",
}

PREFIX_BYTES = 5
"""Before each message: whether it is compressed, and its length."""

ACCEPTED_ENCODINGS = b"identity,deflate,gzip"
"""Without spaces, as the specification has it: Node's client takes them for parts of the names."""

MAX_BINARY_VALUES = 128
"""Of all metadata of a call whose keys end in `-bin`."""

_PREFIX = struct.Struct(">BI")
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
_UNSAFE = re.compile(rb"[^ -$&-~]|\A | \Z")
_OURS = {
    b":method",
    b":path",
    b":scheme",
    b":authority",
    b"te",
    b"host",
    b"content-type",
    b"grpc-timeout",
    b"grpc-encoding",
    b"grpc-accept-encoding",
}
"""Headers of the protocol itself, which are no metadata."""


class WireError(ServiceError):
    """What came breaks the protocol or a limit."""

    def __init__(self, number: int, message: str) -> None:
        """`number` is RESOURCE_EXHAUSTED, UNIMPLEMENTED or INTERNAL."""
        super().__init__(message)
        self.number = number
        self.code = _NAMES[number]
        self.messages: list[bytes] = []
        """Of `Deframer.feed`: those that came whole before what is wrong."""


class Packed(bytes):
    """A message that is still compressed."""


class Deframer:
    """Joins bytes that were cut anywhere to messages of at most `limit` bytes."""

    __slots__ = ("_encoding", "_limit", "_needed", "_parts", "buffered")

    def __init__(self, limit: int, encoding: bytes = b"identity") -> None:
        """Take the call's `grpc-encoding`.

        Raises:
            WireError: UNIMPLEMENTED, it is an unknown one.
        """
        if encoding != b"identity" and encoding not in _WINDOW_BITS:
            shown = encoding[:32].decode("ascii", "replace")
            raise WireError(UNIMPLEMENTED, f"grpc-encoding is one of identity, deflate, gzip, not {shown}")
        self._limit = limit
        self._encoding = encoding
        self._parts: list[bytes] = []
        self._needed = PREFIX_BYTES  # bytes, of which the parts are the first, before there is anything to do
        self.buffered = 0
        """Bytes of the message that is not whole yet."""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages that are whole with these bytes, each for `opened`.

        Raises:
            WireError: RESOURCE_EXHAUSTED for a message over the limit, as soon as
                its length is known; INTERNAL for what is no message. Nothing is
                to be fed after it.
        """
        end = self.buffered + len(data)
        if end < self._needed:
            self._parts.append(data)
            self.buffered = end
            return []
        if self._parts:
            self._parts.append(data)
            data = b"".join(self._parts)
            self._parts.clear()
        messages: list[bytes] = []
        start = 0
        try:
            while True:
                self._needed = PREFIX_BYTES
                if end - start < PREFIX_BYTES:
                    break
                compressed, length = _PREFIX.unpack_from(data, start)
                if length > self._limit:
                    raise self._too_large(length)
                self._needed = PREFIX_BYTES + length
                if (stop := start + self._needed) > end:
                    break
                messages.append(self._checked(compressed, data[start + PREFIX_BYTES : stop]))
                start = stop
        except WireError as error:
            error.messages = messages
            start = end  # else the end of the stream would be one more error
            raise
        finally:
            self.buffered = end - start
            if self.buffered:
                self._parts.append(data[start:])
        return messages

    def end(self) -> None:
        """Nothing more comes.

        Raises:
            WireError: INTERNAL, a message is not whole.
        """
        if self.buffered:
            raise WireError(INTERNAL, f"the stream ended within a message, after {self.buffered} bytes of it")

    def opened(self, message: bytes) -> bytes:
        """What a message says. Only for one that is wanted now: a thousandth of its bytes may have come.

        Raises:
            WireError: RESOURCE_EXHAUSTED, it is over the limit; INTERNAL, it is not what it says.
        """
        return self._inflated(message) if type(message) is Packed else message

    def _checked(self, compressed: int, content: bytes) -> bytes:
        if not compressed:
            return content
        if compressed != 1:
            raise WireError(INTERNAL, f"a message begins with 0 or 1 (compressed), not {compressed}")
        if self._encoding == b"identity":
            raise WireError(INTERNAL, "a message is marked as compressed, and the call has no grpc-encoding")
        return Packed(content)

    def _inflated(self, content: bytes) -> bytes:
        """Never more than the limit, whatever the content says."""
        inflater = zlib.decompressobj(_WINDOW_BITS[self._encoding])
        try:
            inflated = inflater.decompress(content, self._limit + 1)
        except zlib.error as error:
            raise WireError(INTERNAL, f"a message is no {self._encoding.decode()}: {error}") from error
        if len(inflated) > self._limit:
            raise self._too_large(len(inflated), "or more")
        if not inflater.eof or inflater.unused_data:
            raise WireError(INTERNAL, f"a message is one whole {self._encoding.decode()} stream")
        return inflated

    def _too_large(self, length: int, more: str = "") -> WireError:
        # With these words the SDK knows that it is not worth a retry; they are gRPC's.
        more = f" {more}" if more else ""
        return WireError(
            RESOURCE_EXHAUSTED, f"SERVER: Received message larger than max ({length}{more} vs. {self._limit})"
        )


def framed(message: bytes, encoding: bytes = b"identity") -> bytes:
    """The bytes that carry a message; compressed, unless `encoding` is identity."""
    if encoding == b"identity":
        return _PREFIX.pack(0, len(message)) + message
    deflater = zlib.compressobj(wbits=_WINDOW_BITS[encoding])
    content = deflater.compress(message) + deflater.flush()
    return _PREFIX.pack(1, len(content)) + content


def seconds_of(timeout: bytes) -> float:
    """The value of a `grpc-timeout`, in seconds.

    Raises:
        WireError: INTERNAL, it is none.
    """
    if (match := _TIMEOUT.fullmatch(timeout)) is None:
        shown = timeout[:32].decode("ascii", "replace")
        raise WireError(INTERNAL, f"grpc-timeout is 1 to 8 digits and one of the letters HMSmun, not {shown}")
    return int(match[1]) * _SECONDS[match[2]]


def metadata_of(headers: Iterable[Header]) -> tuple[tuple[str, str | bytes], ...]:
    """What callers gave beside the protocol's own headers, in order.

    Values of keys that end in `-bin` are bytes, and so are those that are no UTF-8.

    Raises:
        WireError: INTERNAL, a value of such a key is no base64; RESOURCE_EXHAUSTED, there are
            more than `MAX_BINARY_VALUES` of them, which a few bytes of commas can stand for.
    """
    metadata: list[tuple[str, str | bytes]] = []
    binary = 0
    for name, value in headers:
        if name in _OURS:
            continue
        key = name.decode("ascii", "replace")
        if name.endswith(b"-bin"):
            binary += 1 + value.count(b",")
            if binary > MAX_BINARY_VALUES:
                raise WireError(RESOURCE_EXHAUSTED, f"a call has at most {MAX_BINARY_VALUES} values of binary metadata")
            metadata += [(key, _decoded(key, part.strip())) for part in value.split(b",")]
            continue
        try:
            metadata.append((key, value.decode()))
        except UnicodeDecodeError:
            metadata.append((key, value))
    return tuple(metadata)


def _decoded(key: str, value: bytes) -> bytes:
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error as error:
        raise WireError(INTERNAL, f"the metadata {key} is no base64") from error


def trailers_of(code: int, message: str = "", metadata: Metadata = ()) -> list[Header]:
    """The headers that end a call."""
    headers = [(b"grpc-status", str(code).encode())]
    if message:
        headers.append((b"grpc-message", percent_encoded(message)))
    for key, value in metadata:
        name = key.encode("ascii")
        if name.endswith(b"-bin"):
            assert isinstance(value, bytes)
            headers.append((name, base64.b64encode(value).rstrip(b"=")))
        else:
            headers.append((name, value.encode("ascii", "replace") if isinstance(value, str) else value))
    return headers


def percent_encoded(message: str) -> bytes:
    """A `grpc-message`: all but printable ASCII, and `%` itself, as `%` and two hexadecimal digits a byte.

    So are spaces at its ends, where HTTP/2 allows none.
    """
    return _UNSAFE.sub(lambda match: b"%%%02X" % ord(match[0]), message.encode("utf-8", "replace"))
