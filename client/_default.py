"""`client.classify`: the one-liner, over clients that stay open for the next call."""

from __future__ import annotations

import atexit
import os
import threading

from client._channel import resolve_target
from client._sync import Client
from client._types import Image, Prediction

_lock = threading.Lock()
_clients: dict[tuple[int, str], Client] = {}


def classify(image: Image, *, target: str | None = None, timeout: float | None = None) -> Prediction:
    """Read the digit in one image.

        client.classify("digit.png").digit

    Args:
        image: see `client.Image`.
        target: as for `Client`; the connection is kept for the next call.
        timeout: seconds for this call, 10 by default.

    Raises:
        MnistGrpcError: see `Client`.
    """
    return _client(resolve_target(target)).classify(image, timeout=timeout)


def _client(target: str) -> Client:
    key = (os.getpid(), target)  # a forked process cannot use its parent's connections
    with _lock:
        if key not in _clients:
            if not _clients:
                atexit.register(_close_all)
            _clients[key] = Client(target)
        return _clients[key]


def _close_all() -> None:
    with _lock:
        for (process, _), client in _clients.items():
            if process == os.getpid():
                client.close()
        _clients.clear()
