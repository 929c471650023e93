"""A weights file and its manifest as they lay on the disk at one moment: bytes, no torch.

Who loads a model from a snapshot loads what was looked at, whatever happens to
the files meanwhile; several processes given one snapshot load the same model.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

VERSION_DIGITS = 12
MAX_WEIGHTS_BYTES = 64 * 1024 * 1024
MAX_MANIFEST_BYTES = 1024 * 1024


class InvalidCheckpoint(ValueError):
    """The file cannot be served; the message names the file, the rule and the value."""


@dataclass(frozen=True)
class Snapshot:
    """The bytes of a checkpoint's two files."""

    path: str
    """Of the weights file, for messages."""
    weights: bytes
    manifest: bytes | None
    """None where there is no manifest."""

    @cached_property
    def sha256(self) -> str:
        """Of the weights, 64 hexadecimal digits."""
        return hashlib.sha256(self.weights).hexdigest()

    @property
    def version(self) -> str:
        """The first 12 digits of `sha256`."""
        return self.sha256[:VERSION_DIGITS]


def manifest_path(weights: str | os.PathLike[str]) -> Path:
    """Where the manifest of a weights file lies: `x/mnist_model.pth` -> `x/mnist_model.json`."""
    return Path(weights).with_suffix(".json")


def take_snapshot(weights: str | os.PathLike[str]) -> Snapshot:
    """Read a weights file and, where there is one, the manifest beside it.

    Raises:
        InvalidCheckpoint: a file cannot be read, or is too large.
    """
    path = Path(weights)
    content = _read(path, MAX_WEIGHTS_BYTES, "weights file")
    manifest = manifest_path(path)
    return Snapshot(str(path), content, _read(manifest, MAX_MANIFEST_BYTES, "manifest") if manifest.exists() else None)


def _read(path: Path, limit: int, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
            size = max(len(content), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: cannot be read: {error.strerror}") from error
    if size > limit:
        raise InvalidCheckpoint(f"{path}: a {name} has at most {limit} bytes, this has {size}")
    return content
