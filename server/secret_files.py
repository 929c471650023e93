"""Small files of secrets that are read again when they change: certificates, keys, tokens.

Knows nothing of what is in them: whoever watches them gives the function that
makes something of their contents.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeAlias, TypeVar

from server.errors import CannotServe

T = TypeVar("T")

Contents: TypeAlias = Mapping[str, bytes]
"""Paths, and what the files there hold."""

MAX_BYTES = 1 << 20
"""The longest file that is read: secrets are short, and a wrong path may lead to anything."""

logger = logging.getLogger(__name__)


class WatchedFiles(Generic[T]):
    """What is made of some files, made anew when one of them changes.

    Each look reads the files and compares. They are small; their times and
    sizes can stay the same when their contents do not, and a directory of
    Kubernetes changes all of them at once by one link. May be used by several
    threads.
    """

    def __init__(self, paths: Mapping[str, str], parse: Callable[[Contents], T]) -> None:
        """Read the files for the first time.

        Args:
            paths: of each path, what a sentence is to call the file, for example `certificate chain`.
            parse: makes the value, or raises CannotServe.

        Raises:
            CannotServe: a file cannot be read, or `parse` refused.
        """
        self._paths = paths
        self._parse = parse
        self._lock = threading.Lock()
        self._seen = self._read()
        self._failure = ""
        self.value = parse(self._seen)

    def look(self) -> bool:
        """Whether the files changed and `value` with them; files that cannot be used are logged once and left alone."""
        with self._lock:
            try:
                contents = self._read()
                if contents == self._seen:
                    self._failure = ""
                    return False
                self._seen = contents  # also when it is refused: it is parsed and logged once
                value = self._parse(contents)
            except CannotServe as error:
                if str(error) != self._failure:
                    self._failure = str(error)
                    logger.error("%s; what was read before stays in use", error)
                return False
            self.value = value
            self._failure = ""
            logger.info("read again: %s", ", ".join(self._paths))
            return True

    def _read(self) -> Contents:
        return {path: _read(path, what) for path, what in self._paths.items()}


def _read(path: str, what: str) -> bytes:
    try:
        # Asked before it is opened: to open a pipe may take for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CannotServe(f"the {what} {path} is no regular file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CannotServe(f"the {what} {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise CannotServe(f"the {what} {path!r} cannot be read: {error}") from error
    if len(content) > MAX_BYTES:
        raise CannotServe(f"the {what} {path} is longer than {MAX_BYTES} bytes")
    return content


def permission_warning(path: str, what: str) -> str | None:
    """What to tell an operator whose secret can be read by every user of the machine."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # whoever needs the file says so
        return None
    if not mode & stat.S_IROTH:
        return None
    return f"every user of this machine can read the {what} {path} (mode {stat.S_IMODE(mode):04o}): chmod o= it"
