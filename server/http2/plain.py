"""Plain HTTP at the port of gRPC, without any I/O: `GET /healthz`, `GET /metrics`, `POST /v1/classify`.

For those who have no gRPC: probes, scrapers, `curl`. It is the same service
core with the same limits and tokens. Knows neither HTTP/1.1 nor HTTP/2: who does
begins an `Exchange` with the head of a request, gives it the body, and gets an
answer. What can be refused by the head alone is refused before the body.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import formatdate

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from protos.mnist.v1 import digit_classifier_pb2 as pb
from server import limits, logs
from server.authentication import ANY_METHOD, BearerTokens
from server.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    NotOffered,
    NotServing,
    ServiceError,
    Unauthenticated,
)
from server.http2 import wire
from server.http2.wire import Header
from server.observer import HttpSpan, Observer
from server.service import CLASSIFY, DigitService, deadline_after, named_errors
from server.statuses import status_of

HEALTH, METRICS, CLASSIFY_PATH = "/healthz", "/metrics", "/v1/classify"

HTTP_STATUSES = {
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "UNAUTHENTICATED": 401,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
}
"""As `google/rpc/code.proto` maps them."""

LINGER_SECONDS = 2.0
"""How long what is left of a refused request is read and thrown away: to close at once could lose the answer."""

JSON_MARGIN = 2
"""A body of JSON has up to this times the bytes of its images: base64 takes four for three."""

INLINE_PROBABILITIES = 320
"""Answers with more, which 32 images of digits have, are written in a thread: a number costs a microsecond or two."""

MAX_TOLD = 300
"""Characters of what the JSON parser says that a caller is told."""

REFUSAL = "a valid token is needed: send the header `authorization: Bearer TOKEN`"

_READS = ("GET", "HEAD")
_METHODS = {HEALTH: _READS, METRICS: _READS, CLASSIFY_PATH: ("POST",)}
_TEXT = (b"content-type", b"text/plain; charset=utf-8")
_JSON = (b"content-type", b"application/json")


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a request."""

    method: str
    target: str
    """As it stands there: a path, with a query or without, or a whole URL."""
    headers: Sequence[Header]
    """In order; names are in lower case."""
    peer: str = "unknown"

    def values(self, name: bytes) -> list[bytes]:
        """Of all headers of a name."""
        return [value for key, value in self.headers if key == name]

    def value(self, name: bytes) -> str:
        """Of the first header of a name; empty where there is none."""
        return next((value.decode("latin-1") for key, value in self.headers if key == name), "")

    @property
    def path(self) -> str:
        """Without the query, and without the server's name."""
        path = self.target.partition("?")[0]
        if not path.startswith("/"):
            _, found, rest = path.partition("://")
            path = "/" + rest.partition("/")[2] if found else path
        return path


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent: the header `content-length` is among the headers, and the body is there also for HEAD."""

    status: int
    headers: Sequence[Header]
    body: bytes


class Credentials(grpc.HandlerCallDetails):
    """What a request is judged by, as an interceptor of gRPC sees a call."""

    def __init__(self, request: Request) -> None:
        self.method = request.path
        self.invocation_metadata = tuple(("authorization", _text(value)) for value in request.values(b"authorization"))


class Routes:
    """What is where."""

    def __init__(
        self,
        service: DigitService,
        *,
        is_serving: Callable[[], bool],
        max_message_bytes: int,
        observer: Observer,
        tokens: BearerTokens | None = None,
        metrics: Callable[[str], Awaitable[tuple[bytes, str]]] | None = None,
        grpc_services: Collection[str] = (),
        span: HttpSpan | None = None,
    ) -> None:
        """Put them over a service.

        Args:
            service: what answers.
            is_serving: whether health says SERVING.
            max_message_bytes: of the images of a request.
            observer: is told of those who have no token; of calls, the service tells.
            tokens: who may ask for more than health; without it, everybody.
            metrics: is given the header `accept`; gives the page of metrics and its content type.
            grpc_services: full names of those whose methods are at this port, too.
            span: traces calls that are not refused by their head alone.
        """
        self.service = service
        self.is_serving = is_serving
        self.max_message_bytes = max_message_bytes
        self.observer = observer
        self.tokens = tokens
        self.metrics = metrics
        self.span = span
        self._grpc_paths = tuple(f"/{name}/" for name in grpc_services)
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="json")

    def begin(self, request: Request) -> Exchange:
        """Take the head of a request."""
        return Exchange(self, request)

    def is_grpc_method(self, path: str) -> bool:
        """Whether a path is one of a gRPC service."""
        return path.startswith(self._grpc_paths)


class Exchange:
    """A request, from its head to its answer.

    `answer` is called once, with the whole body, unless there is a `refusal`;
    `abandon` where there will be no answer.
    """

    def __init__(self, routes: Routes, request: Request) -> None:
        self._routes = routes
        self._request = request
        self._start = time.perf_counter()
        self._deadline: float | None = None
        self._is_json = False
        self._is_announced = False
        self._id = logs.request_id(
            [(logs.REQUEST_ID_KEY, value.decode("latin-1")) for value in request.values(b"x-request-id")]
        )
        self.body_limit = routes.max_message_bytes
        """Bytes of the body; with one more, the answer is `too_large`."""
        self.refusal = self._refuse()
        """The answer, where it does not depend on the body."""

    @property
    def has_images(self) -> bool:
        """Whether the body, which is still to come, is one of images."""
        return self._is_announced

    # By the head ------------------------------------------------------------------------

    def _refuse(self) -> Answer | None:
        routes, request = self._routes, self._request
        path = request.path
        if path != HEALTH and routes.tokens is not None and not routes.tokens.accepts(Credentials(request)):
            routes.observer.call_ended(ANY_METHOD, Unauthenticated.code, 0.0)
            return self._failed(Unauthenticated(REFUSAL), headers=[(b"www-authenticate", b"Bearer")])
        if (methods := self._methods(path)) is None:
            return self._failed(NotFound(f"nothing is at {path[:MAX_TOLD]}: {', '.join(_METHODS)} are here"))
        if request.method not in methods:
            return self._failed(
                NotOffered(f"{path[:MAX_TOLD]} takes {' and '.join(methods)}, not {request.method[:MAX_TOLD]}"),
                405,
                [(b"allow", ", ".join(methods).encode())],
            )
        if routes.is_grpc_method(path):
            message = "methods of gRPC are called over HTTP/2, with a content type that begins with application/grpc"
            return self._failed(InvalidArgument("content-type", message), 415)
        if path != CLASSIFY_PATH:
            return self._refuse_size()
        return self._refuse_call()

    def _methods(self, path: str) -> Sequence[str] | None:
        return ("POST",) if self._routes.is_grpc_method(path) else _METHODS.get(path)

    def _refuse_call(self) -> Answer | None:
        request = self._request
        kind = request.value(b"content-type").partition(";")[0].strip().lower()
        self._is_json = kind == "application/json"
        if not (self._is_json or kind == "application/octet-stream" or kind.startswith("image/")):
            message = (
                "a body is a request of content type application/json, or an image file of image/* or "
                f"application/octet-stream; this one is {f'of {kind[:MAX_TOLD]}' if kind else 'of none'}"
            )
            return self._failed(InvalidArgument("content-type", message), 415)
        coding = request.value(b"content-encoding").strip().lower()
        if coding not in ("", "identity"):
            message = f"a body comes as it is, not in the coding {coding[:MAX_TOLD]}"
            return self._failed(InvalidArgument("content-encoding", message), 415)
        if self._is_json:
            self.body_limit *= JSON_MARGIN
        if (refusal := self._refuse_size()) is not None:
            return refusal
        if timeout := request.value(b"grpc-timeout"):
            try:
                self._deadline = deadline_after(wire.seconds_of(timeout.encode("latin-1")))
            except wire.WireError as error:
                return self._failed(InvalidArgument("grpc-timeout", str(error)))
        if (no_room := self._routes.service.announce(self, CLASSIFY)) is not None:
            self._log(no_room)
            return self._failed(no_room)
        self._is_announced = True
        return None

    def _refuse_size(self) -> Answer | None:
        length = self._request.value(b"content-length")
        return self.too_large() if length.isdecimal() and int(length[:20]) > self.body_limit else None

    # With the body ----------------------------------------------------------------------

    async def answer(self, body: bytes) -> Answer:
        """The answer, whatever comes in between; only a cancellation goes through."""
        if self.refusal is not None:
            return self.refusal
        path = self._request.path
        if path == HEALTH:
            return self._health()
        if path == METRICS:
            return await self._metrics()
        if self._routes.span is None:
            return await self._classify(body)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self._request.headers}
        with self._routes.span("POST", CLASSIFY_PATH, headers) as answered:
            answer = await self._classify(body)
            answered(answer.status)
            return answer

    def too_large(self) -> Answer:
        """The answer to a body over the limit."""
        self.abandon()
        return self._failed(InvalidArgument("body", f"a body here has at most {self.body_limit} bytes"), 413)

    def wrong_length(self, size: int) -> Answer | None:
        """The answer to a whole body of so many bytes, if its head announced another number (RFC 9113, 8.1.1)."""
        told = self._request.value(b"content-length")
        if not told or (told.isdecimal() and int(told[:20]) == size):
            return None
        self.abandon()
        message = f"a body of {told[:20]} bytes was announced, {size} came"
        return self._failed(InvalidArgument("content-length", message))

    def cut_off(self, reason: str) -> Answer:
        """The answer to a request that is still under way when the server or the connection ends."""
        return self._failed(NotServing(reason))

    def abandon(self) -> None:
        """The body will never be whole."""
        if self._is_announced:
            self._is_announced = False
            self._routes.service.arrived(self)

    def _health(self) -> Answer:
        serving = self._routes.is_serving()
        return self._answered(200 if serving else 503, [_TEXT], b"SERVING\n" if serving else b"NOT_SERVING\n")

    async def _metrics(self) -> Answer:
        if self._routes.metrics is None:
            return self._failed(NotFound("metrics are off; --metrics-port switches them on"))
        try:
            with named_errors():
                page, kind = await self._routes.metrics(self._request.value(b"accept"))
        except ServiceError as error:
            return self._failed(error)
        return self._answered(200, [(b"content-type", kind.encode("latin-1"))], page)

    async def _classify(self, body: bytes) -> Answer:
        self.abandon()  # the whole message is here
        failure: BaseException | None = None
        try:
            async with asyncio.timeout_at(self._deadline):
                with named_errors():
                    request = self._read(body)
                    response = await self._routes.service.classify(request, self._remaining())
                    return self._answered(200, [_JSON], await self._written(response))
        except TimeoutError:
            failure = DeadlineExceeded("the deadline passed")
            return self._failed(failure)
        except ServiceError as error:
            failure = error
            return self._failed(error)
        except BaseException as error:
            failure = error
            raise
        finally:
            self._log(failure)

    def _remaining(self) -> float | None:
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def _read(self, body: bytes) -> pb.ClassifyRequest:
        """Make a request of a body.

        Raises:
            InvalidArgument: it is none.
        """
        if not self._is_json:
            return pb.ClassifyRequest(encoded=pb.EncodedImages(files=[body]))
        # The parser works through every value before anybody can count images, and millions of empty ones fit in
        # a body. In a request, only files come in numbers, with two quotes and a comma each.
        most = self._routes.service.max_images + 64
        if body.count(b'"') > 2 * most or body.count(b",") > most:
            raise InvalidArgument("body", f"a request carries at most {self._routes.service.max_images} images")
        try:
            return json_format.Parse(body.decode(), pb.ClassifyRequest())
        except (json_format.ParseError, ValueError, TypeError, AttributeError, RecursionError, SystemError) as error:
            name = pb.ClassifyRequest.DESCRIPTOR.full_name
            raise InvalidArgument("body", f"no {name} in JSON: {_told(error)}") from error

    async def _written(self, response: pb.ClassifyResponse) -> bytes:
        if len(response.probabilities) <= INLINE_PROBABILITIES:
            return _json(response, with_all=True)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._routes.writer, lambda: _json(response, with_all=True))

    # Answers ----------------------------------------------------------------------------

    def _failed(self, error: ServiceError, status: int | None = None, headers: Sequence[Header] = ()) -> Answer:
        more = [_JSON, *headers]
        if error.retry_after_seconds is not None:
            more.append((b"retry-after", retry_after(error.retry_after_seconds)))
        return self._answered(status or HTTP_STATUSES[error.code], more, _json(status_of(error)))

    def _answered(self, status: int, headers: Sequence[Header], body: bytes) -> Answer:
        return Answer(status, [*headers, (b"x-request-id", self._id.encode()), *_always(body)], body)

    def _log(self, failure: BaseException | None) -> None:
        """Tell how a call ended, as of calls of gRPC."""
        code = "OK" if failure is None else failure.code if isinstance(failure, ServiceError) else "CANCELLED"
        level = logging.ERROR if code == "INTERNAL" else logging.DEBUG
        if level == logging.ERROR or logs.tells_calls():
            told = failure if isinstance(failure, ServiceError) else None
            logs.log_call(
                level,
                CLASSIFY,
                code,
                time.perf_counter() - self._start,
                self._id,
                self._request.peer,
                message=str(told) if told else "",
                incident_id=told.incident_id if told else "",
            )


def _told(error: Exception) -> str:
    """What the JSON parser says, without what Python says of a value of another type."""
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TypeError | AttributeError | SystemError) and str(cause):
            text = text.replace(str(cause), "a value of a wrong type").replace(f"{type(cause).__name__}: ", "")
        cause = cause.__cause__ or cause.__context__
    return " ".join(text.split())[:MAX_TOLD].encode("utf-8", "replace").decode()  # JSON can write what UTF-8 cannot


def retry_after(seconds: float) -> bytes:
    """A header `retry-after`, which knows whole seconds only."""
    return b"%d" % max(1, math.ceil(seconds))


def broken(status: int, message: str) -> Answer:
    """The answer to what is no request."""
    body = _json(status_of(NotOffered(message) if status == 501 else InvalidArgument("request", message)))
    return Answer(status, [_JSON, *_always(body)], body)


def head_too_large(size: int) -> Answer:
    """The answer to a head over `limits.MAX_METADATA_BYTES`."""
    return broken(431, f"a request has at most {limits.MAX_METADATA_BYTES} bytes of headers, this one has {size}")


def _always(body: bytes) -> list[Header]:
    return [(b"content-length", b"%d" % len(body)), (b"date", formatdate(usegmt=True).encode())]


def _json(message: Message, *, with_all: bool = False) -> bytes:
    """A line of JSON; with all fields, also those that are 0 or empty."""
    text = json_format.MessageToJson(message, indent=None, always_print_fields_with_no_presence=with_all)
    return text.encode() + b"\n"


def _text(value: bytes) -> str | bytes:
    """As gRPC gives the values of metadata."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
