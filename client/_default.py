"""`client.classify`: the one-liner, over clients that stay open for the next call."""

from __future__ import annotations

import atexit
import threading

import PIL.Image

from client import _fork
from client._channel import resolve_target
from client._sync import Client
from client._types import Image, Prediction

_lock = threading.Lock()
_clients: dict[str, Client] = {}


def classify(image: Image, *, target: str | None = None, timeout: float | None = None) -> Prediction:
    """Read the digit in one image.

        >>> client.classify("7.png").digit
        7

    Args:
        image: see `client.Image`.
        target: as for `Client`; the connection is kept for the next call.
        timeout: seconds for this call, 10 by default.

    Raises:
        MnistGrpcError: see `Client`.
    """
    return _client(resolve_target(target)).classify(image, timeout=timeout)


def explain(image: Image, *, target: str | None = None, timeout: float | None = None) -> PIL.Image.Image:
    """Draw how an image is read, for people: an RGB picture. See `Client.explain`.

        >>> client.explain("7.png").save("why.png")

    Args and errors are those of `classify`.
    """
    return _client(resolve_target(target)).explain(image, timeout=timeout)


def _client(target: str) -> Client:
    with _lock:
        if target not in _clients:
            if not _clients:
                atexit.register(_close_all)
            _clients[target] = Client(target)
        return _clients[target]


def forget(target: str) -> None:
    """Close the client that is kept for a target that is gone."""
    with _lock:
        client = _clients.pop(target, None)
    if client is not None:
        client.close()


def _close_all() -> None:
    with _lock:
        for client in _clients.values():
            client.close()
        _clients.clear()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it; the clients see to themselves


_fork.in_child(_after_fork)
