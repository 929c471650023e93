"""How the process keeps its memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys

_M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


def use_one_arena() -> None:
    """Have glibc keep the memory of all threads in one arena, unless `MALLOC_ARENA_MAX` says otherwise.

    By default a thread that finds the others busy gets an arena of its own, up
    to eight a core, and what is freed in one serves no other: each exchange of
    weights, in a thread of its own, left a little more behind. There is hardly
    any waiting, as the threads here seldom work at the same time.
    """
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError):  # other C libraries have no arenas
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def spare_collections() -> None:
    """Have the garbage collector look no more at what is there when serving begins.

    With torch that are hundreds of thousands of objects which live as long as
    the process, and calls in flight make collections frequent: a fifth of what
    a call takes went into looking at them.
    """
    gc.collect()
    gc.freeze()
