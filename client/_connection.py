"""What both clients are while nobody calls: not yet open, open, or closed, in one process.

Knows nothing of calls, and opens nothing: that is the work of each client.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from client import _core, _fork, _request_id
from client._channel import ChannelSettings
from client._errors import MnistGrpcError


class Connection:
    """The state of a client. A forked child begins as if it had not been opened."""

    def __init__(self, settings: ChannelSettings, timeout: float) -> None:
        self.target = settings.target
        self.timeout = _core.checked_timeout(timeout)
        self._settings = settings
        self._closed = False
        self._opened: Any = None
        self._opening = threading.Lock()
        _fork.watch(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "not yet open" if self._opened is None else "open"
        return f"<{type(self).__name__} to {self.target}, {state}>"

    def __del__(self) -> None:
        # Only a word: a call or a closing from here, in the middle of whatever runs, could wait for itself.
        if getattr(self, "_opened", None) is not None and not self._closed:
            warnings.warn(
                f"{self!r} was never closed; use `with`, or close()", ResourceWarning, stacklevel=2, source=self
            )

    def _enter(self) -> None:
        if self._closed:
            raise RuntimeError(_core.CLOSED)

    @contextmanager
    def _call(self, timeout: float | None) -> Iterator[float]:
        """What every call happens in; gives its timeout."""
        seconds = self._seconds(timeout)
        with _request_id.bound(_request_id.given() or _request_id.new()):
            try:
                with _core.translate_errors(self.target, seconds):
                    yield seconds
            except (MnistGrpcError, ValueError) as error:
                # gRPC cancels the calls of a channel that is closed, and raises ValueError for new ones.
                if self._closed and getattr(error, "code", "none") is not None:
                    raise RuntimeError(_core.CLOSED) from error
                raise

    def _seconds(self, timeout: float | None) -> float:
        """The timeout of a call that begins now."""
        if self._closed:
            raise RuntimeError(_core.CLOSED)
        return self.timeout if timeout is None else _core.checked_timeout(timeout)

    def _after_fork(self) -> None:
        """In a forked child: forget what is the parent's, also locks, which another thread of it may have held."""
        _fork.leave_to_parent(self._opened)
        self._opened = None
        self._opening = threading.Lock()
