"""Forks: what a child process may do with gRPC, and how it forgets what is its parent's.

Knows nothing of calls. A child that only dropped its parent's channels would
close connections that the parent uses, so they are kept, untouched.

What gRPC can do in a child was tried with grpcio 1.51.1 to 1.85.3. With all of
them a child may call if at the fork no thread of its parent was inside a call,
and none had used gRPC for asyncio. Else gRPC leaves its work at the fork undone
("skipping fork() handlers"): the child's calls wait for ever or abort it, and
as both processes poll one set of sockets, the parent may crash as soon as the
child calls. So such a child is told so, before it touches gRPC.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import grpc

SETTLE_SECONDS = 0.05
"""Before a fork right after a channel was closed, whose threads are still ending: of 36 children made then one hung.
And before each with grpcio below 1.57, which in 4 of 10 forks right after a call waited for a thread of its own that
waited for the forking one; with 0.02 s between in none. And so long a thread that is still in gRPC is waited for."""

_INSTEAD = 'start the process with multiprocessing\'s "spawn", or fork before the first call'

FORKED = "what was begun before the fork belongs to the process that this one was forked from; begin it anew here"


class Forkable(Protocol):
    def _after_fork(self) -> None: ...


_known: weakref.WeakSet[Forkable] = weakref.WeakSet()
_functions: list[Callable[[], None]] = []
_inherited: list[Any] = []
_watching = False
_used_asyncio = False
_was_busy = False
_refusal: str | None = None
_closed_at = -SETTLE_SECONDS


def watch(forkable: Forkable) -> None:
    """Call its `_after_fork` in each child process, while it lives."""
    global _watching
    if not _watching and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before, after_in_child=_in_child)
    _watching = True
    _known.add(forkable)


def in_child(function: Callable[[], None]) -> None:
    """Call this, too, in each child process of one that made a client."""
    _functions.append(function)


def closed() -> None:
    """A channel was closed."""
    global _closed_at
    _closed_at = time.monotonic()


def leave_to_parent(thing: Any) -> None:
    """Keep what the parent opened from being closed here."""
    if thing is not None:
        _inherited.append(thing)


def check(*, asyncio: bool) -> None:
    """Before a channel is opened.

    Raises:
        RuntimeError: this process was forked from one after which gRPC does not work.
    """
    global _used_asyncio
    if _refusal is not None:
        raise RuntimeError(_refusal)
    _used_asyncio |= asyncio


def check_process(process: int) -> None:
    """Before more is taken of what the process of that number began.

    Raises:
        RuntimeError: it was another one.
    """
    if os.getpid() != process:
        check(asyncio=False)
        raise RuntimeError(FORKED)


def _before() -> None:
    """In the parent."""
    global _was_busy
    if grpc_version() < (1, 57) or time.monotonic() - _closed_at < SETTLE_SECONDS:
        time.sleep(SETTLE_SECONDS)
    until = time.monotonic() + SETTLE_SECONDS
    while (busy := _threads_are_in_grpc()) and time.monotonic() < until:
        time.sleep(0.002)  # it may be a thread of gRPC's that is still ending, after a call that is over
    _was_busy = busy


def _in_child() -> None:
    global _refusal
    if _used_asyncio or _was_busy:
        what = "used gRPC for asyncio" if _used_asyncio else "had a call under way in another thread"
        _refusal = f"this process was forked from one that {what}, after which gRPC does not work here; {_INSTEAD}"
    for function in _functions:
        function()
    for forkable in list(_known):
        forkable._after_fork()


def grpc_version() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", grpc.__version__)[:2]))


def _threads_are_in_grpc() -> bool:
    """Whether another thread is inside gRPC: it waits for an answer, or for what to send."""
    folder = os.path.dirname(grpc.__file__) + os.sep
    mine = threading.get_ident()
    for thread, innermost in sys._current_frames().items():
        frame: Any = innermost if thread != mine else None
        while frame is not None:
            if frame.f_code.co_filename.startswith(folder):
                return True
            frame = frame.f_back
    return False
