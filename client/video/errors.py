"""What can go wrong with a video, beside what can go wrong with a call."""

from __future__ import annotations

import importlib
from types import ModuleType

from client._errors import MnistGrpcError


class InvalidVideoError(MnistGrpcError, ValueError):
    """The video or camera cannot be read, or the annotated video cannot be written; the message says which and why."""


class MissingExtraError(MnistGrpcError, ImportError):
    """A package is missing that reading videos needs; the message says how to install it."""


def require(name: str) -> ModuleType:
    """The module of an optional package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # it is there, and lacks something itself
        raise MissingExtraError(
            f"videos need the package '{name}', which is not installed: pip install 'mnist-grpc[video]'"
        ) from error
