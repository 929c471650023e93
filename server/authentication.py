"""Bearer tokens: who may call, by a file of secrets that is read again when it changes.

An interceptor that is there only when tokens are configured. It knows paths of
methods, nothing of what they do: `grpc.health.v1.Health` is open to everybody,
as probes have no tokens, and all else is closed, be it known or not.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import grpc

from server.errors import CannotServe
from server.observer import Observer
from server.secret_files import Contents, WatchedFiles
from server.settings import Settings

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

OPEN_PREFIX = "/grpc.health.v1.Health/"

MIN_TOKEN_CHARACTERS = 16
MAX_TOKENS = 1000
"""Each call is compared with all of them, which takes some 50 µs for as many as this, and 1.5 µs for a few."""

LOOK_SECONDS = 1.0
"""How long a change of the file may go unnoticed."""

ANY_METHOD = "*"
"""As what a refused call is counted: the name that it gives is a stranger's, and there is no end of such names."""

REFUSAL = "a valid token is needed: send the metadata `authorization: Bearer TOKEN`"

_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
_SCHEME = "bearer "


def interceptors(settings: Settings, observer: Observer) -> list[BearerTokens]:
    """The interceptor that asks for a token; none without `auth_token_file`.

    Raises:
        CannotServe: the file cannot be read, holds no token, or one that is not to be used.
    """
    if not settings.auth_token_file:
        return []
    return [BearerTokens(settings.auth_token_file, observer)]


class BearerTokens(grpc.aio.ServerInterceptor):
    """Ends calls that carry none of the file's tokens with UNAUTHENTICATED."""

    def __init__(self, path: str, observer: Observer, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._files = token_file(path)
        self._observer = observer
        self._clock = clock
        self._next_look = clock() + LOOK_SECONDS
        # Of this kind for all methods, because it is the only one for which gRPC does not read a message first.
        self._refusing: Handler = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        if handler_call_details.method.startswith(OPEN_PREFIX) or self.accepts(handler_call_details):
            return await continuation(handler_call_details)
        self._observer.call_ended(ANY_METHOD, "UNAUTHENTICATED", 0.0)
        return self._refusing

    def accepts(self, call: grpc.HandlerCallDetails) -> bool:
        """Whether the call carries exactly one `authorization`, and it is one of the tokens."""
        if self._clock() >= self._next_look:
            self._files.look()
            self._next_look = self._clock() + LOOK_SECONDS
        given = [value for key, value in call.invocation_metadata if key == "authorization"]
        if len(given) != 1:
            return False
        # gRPC gives bytes where a value is no UTF-8.
        value = given[0] if isinstance(given[0], str) else given[0].decode("latin-1")
        if value[: len(_SCHEME)].lower() != _SCHEME:
            return False
        presented = _digest(value[len(_SCHEME) :].strip())
        # All of them, found or not: how long it takes is not to tell which one was nearly right.
        return sum(hmac.compare_digest(presented, digest) for digest in self._files.value) > 0


def token_file(path: str) -> WatchedFiles[Sequence[bytes]]:
    """The digests of a file's tokens.

    Raises:
        CannotServe: the file cannot be read, holds no token, or one that is not to be used.
    """
    return WatchedFiles({path: "token file"}, lambda contents: _parse(path, contents))


def _parse(path: str, contents: Contents) -> Sequence[bytes]:
    """Sentences about the file name lines, never what stands there."""
    try:
        lines = contents[path].decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CannotServe(f"the token file {path} is no UTF-8 text") from error
    digests = set()
    for number, line in enumerate(lines, 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if not _TOKEN.fullmatch(token):
            raise CannotServe(
                f"the token file {path} has on line {number} what is no token: one a line, of letters, digits "
                "and -._~+/, with = at the end only; a comment has a line of its own"
            )
        if len(token) < MIN_TOKEN_CHARACTERS:
            raise CannotServe(
                f"the token file {path} has on line {number} a token of {len(token)} characters; "
                f"{MIN_TOKEN_CHARACTERS} is the least, and `openssl rand -hex 32` makes one"
            )
        digests.add(_digest(token))
    if not digests:
        raise CannotServe(f"the token file {path} holds no token")
    if len(digests) > MAX_TOKENS:
        raise CannotServe(f"the token file {path} holds {len(digests)} tokens; {MAX_TOKENS} is the most")
    return tuple(digests)


def _digest(token: str) -> bytes:
    """Of one length for all tokens, so that a comparison does not tell how long they are."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


async def _refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)
    raise AssertionError("abort always raises")
