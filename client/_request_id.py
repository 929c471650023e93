"""The id under which the server's log knows a call.

Knows nothing of calls: it is a variable of the context, so that it follows a
thread's or a task's own calls, streams included, and nobody else's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

KEY = "x-request-id"
MAX_CHARACTERS = 128  # the server takes a longer one for none

_current: ContextVar[str | None] = ContextVar("mnist_grpc_request_id", default=None)


@contextmanager
def request_id(value: str) -> Iterator[None]:
    """Give the calls that this block makes an id, by which the logs of all services find them.

        >>> headers = {"x-request-id": "4bf92f35"}
        >>> with client.request_id(headers["x-request-id"]):
        ...     client.classify("7.png").digit
        7

    Without, each call has an id of its own. The server logs it, and an error
    has it as `request_id`. It is a context variable: it holds for the thread or
    task that enters the block. Calls of one id, such as the messages of one
    `classify_batch`, share it; calls that are sent together as one message all
    have the same id, as calls of different ids are never sent together.

    Raises:
        ValueError: the id is not 1 to 128 printable ASCII characters.
    """
    with bound(checked(value)):
        yield


def checked(value: str) -> str:
    if not (1 <= len(value) <= MAX_CHARACTERS and value.isascii() and value.isprintable()):
        raise ValueError(f"a request id is 1 to {MAX_CHARACTERS} printable ASCII characters, not {value!r:.200}")
    return value


def given() -> str | None:
    """The id that the caller gave to what runs now, if any."""
    return _current.get()


def new() -> str:
    return os.urandom(8).hex()


@contextmanager
def bound(value: str | None) -> Iterator[None]:
    """Let what runs in this block, and what it begins, have this id; None for one of its own."""
    before = _current.get()
    _current.set(value)
    try:
        yield
    finally:
        # Not by a token, which another context refuses: that of the garbage collector, where a coroutine may end.
        _current.set(before)
