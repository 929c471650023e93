"""The headers of a request, read once for all calls that send the same ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from server.http2 import wire
from server.http2.wire import Header, Metadata, WireError

_PSEUDO = {b":method", b":path", b":scheme", b":authority"}
_NAME = re.compile(rb"[!-9;-@\[-~]+")  # no capitals, no colon
_FORBIDDEN = {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
_GRPC = re.compile(rb"application/grpc(?:[+;].*)?")


class Head:
    """What stands in a block of headers."""

    __slots__ = (
        "_metadata",
        "_wrong",
        "accepted",
        "content_type",
        "encoding",
        "headers",
        "is_grpc",
        "is_request",
        "method",
        "path",
        "size",
        "timeout",
    )

    def __init__(self, headers: Sequence[Header], size: int) -> None:
        """`size` is of all headers that came, with 32 bytes for each beside its name and value (RFC 9113, 6.5.2)."""
        self.headers = headers
        self.size = size
        self.method = self.path = self.content_type = b""
        self.encoding = b"identity"
        """`grpc-encoding`."""
        self.accepted: Sequence[bytes] = ()
        """`grpc-accept-encoding`."""
        self.timeout: float | None = None
        """`grpc-timeout`, in seconds."""
        self._wrong: WireError | None = None
        self._metadata: Metadata | None = None
        self.is_request = self._read()
        """Whether they are those of a request of HTTP/2 (RFC 9113, 8.2 and 8.3)."""
        self.is_grpc = self.method == b"POST" and _GRPC.fullmatch(self.content_type) is not None
        """Whether it is a call."""

    def _read(self) -> bool:
        pseudo: set[bytes] = set()
        has_binary = False
        for position, (name, value) in enumerate(self.headers):
            if b"\n" in value or b"\r" in value or b"\0" in value:
                return False
            if name[:1] == b":":
                if position != len(pseudo) or name not in _PSEUDO or name in pseudo:  # they are first, and once each
                    return False
                pseudo.add(name)
                if name == b":path":
                    self.path = value
                elif name == b":method":
                    self.method = value
                continue
            if _NAME.fullmatch(name) is None or name in _FORBIDDEN or (name == b"te" and value != b"trailers"):
                return False
            if name == b"content-type":
                self.content_type = value
            elif name == b"grpc-encoding":
                self.encoding = value
            elif name == b"grpc-timeout":
                try:
                    self.timeout = wire.seconds_of(value)
                except WireError as error:
                    self._wrong = error
            elif name == b"grpc-accept-encoding":
                self.accepted = value.replace(b" ", b"").split(b",")
            elif name.endswith(b"-bin"):
                has_binary = True
        if has_binary:
            try:
                self._metadata = wire.metadata_of(self.headers)
            except WireError as error:
                self._wrong = error
        return {b":method", b":path", b":scheme"} <= pseudo

    @property
    def wrong(self) -> WireError | None:
        """What is wrong with them for gRPC; a new one each time, as one that is raised again keeps all its frames."""
        return None if self._wrong is None else WireError(self._wrong.number, str(self._wrong))

    def metadata(self) -> Metadata:
        """What the caller gave beside the protocol's own headers; only where nothing is `wrong`."""
        if self._metadata is None:
            self._metadata = wire.metadata_of(self.headers)
        return self._metadata
