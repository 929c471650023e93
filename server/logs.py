"""Logs: lines for people or JSON objects for programs, on stderr.

Every line is one record. What callers control (request ids, peers, messages)
cannot begin a line of its own or move a terminal's cursor: control characters
are escaped. Image data has no way in: of bytes, arrays and messages only the
kind and the length are told.

    logger.info("weights replaced", extra={"version": "1c98f7a36632"})

gives `... INFO server.app: weights replaced version=1c98f7a36632`, or an object
with a field `version` beside `time`, `level`, `logger` and `message`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Any, TextIO

from server.settings import Settings

MAX_REQUEST_ID = 128
"""Characters of a request id that a caller may give."""

REQUEST_ID_KEY = "x-request-id"

OURS = ("server", "digits")
"""The loggers that `--log-level debug` is about; it leaves libraries, which tell of files and packets, at info."""

_calls = logging.getLogger("server.calls")

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime"}
"""What every record has, so that the rest is `extra`."""

_MAX_TEXT = 2000
"""Characters of a field; longer ones are cut."""


def configure(settings: Settings, *, worker: int | None = None) -> None:
    """Send the logs of this process to stderr, in the settings' format and from their level on.

    With `worker`, each record has that number as a field.
    """
    handler = make_handler(settings, sys.stderr, worker=worker)
    level = logging.getLevelName(settings.log_level.upper())
    logging.captureWarnings(True)
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_not_of_a_caller)
    logging.getLogger("py.warnings").addFilter(_is_not_of_a_picture)


def _is_not_of_a_caller(record: logging.LogRecord) -> bool:
    """gRPC writes a traceback for what a caller did, and goes on; callers could fill the disk.

    It does for each header value that is no UTF-8, and for each answer that it cannot send because
    the deadline passed or the caller left at that very moment. Of a path that is no UTF-8 it tells
    the error alone; `server.grpcio` has a sentence for it.
    """
    if isinstance(record.msg, UnicodeDecodeError):
        return False
    return not str(record.msg).startswith(("Invalid encoding on", "ExecuteBatchError raised in core"))


def _is_not_of_a_picture(record: logging.LogRecord) -> bool:
    """Pillow warns of what is odd in a picture; what counts is told to the caller."""
    return "/PIL/" not in record.getMessage()


def make_handler(settings: Settings, stream: TextIO, *, worker: int | None = None) -> logging.Handler:
    """What writes records to a stream in the settings' format."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(worker) if settings.log_format == "json" else TextFormatter(worker))
    return handler


# Calls ----------------------------------------------------------------------------


def request_id(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The id that a call's metadata gives in `x-request-id`, else a new one.

    An id has 1 to 128 printable ASCII characters; anything else is as good as
    none.
    """
    for key, value in metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _is_good_id(value):
            return value
    return os.urandom(8).hex()


def _is_good_id(text: str) -> bool:
    return 1 <= len(text) <= MAX_REQUEST_ID and text.isascii() and text.isprintable()


def tells_calls() -> bool:
    """Whether calls that ended well are told of, too."""
    return _calls.isEnabledFor(logging.DEBUG)


def log_call(
    level: int,
    method: str,
    code: str,
    seconds: float,
    request_id: str,
    peer: str,
    message: str = "",
    incident_id: str = "",
) -> None:
    """One line about a call that ended: which, how, for whom.

    `level` is DEBUG for most calls and ERROR for those that ended with a fault
    of ours, whose incident id is the one of the traceback's record.
    """
    if not _calls.isEnabledFor(level):
        return
    fields = {
        "method": method,
        "code": code,
        "seconds": round(seconds, 6),
        "request_id": request_id,
        "peer": peer,
    }
    if incident_id:
        fields["incident_id"] = incident_id
    _calls.log(level, "%s", message or "call ended", extra=fields)


# Formats --------------------------------------------------------------------------


class _Formatter(logging.Formatter):
    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._always: dict[str, Any] = {} if worker is None else {"worker": worker}

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """The fields that the record brings, fit to be written as JSON."""
        given = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        return {name: _plain(value) for name, value in (self._always | given).items()}

    def _traceback(self, record: logging.LogRecord) -> str:
        parts = []
        if record.exc_info:
            parts.append(self.formatException(record.exc_info))
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return "\n".join(parts)


class TextFormatter(_Formatter):
    """`2025-01-31T12:00:00.123+00:00 INFO server.app: message name=value`; a traceback follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {_escape(name)}={_word(value)}" for name, value in self._fields(record).items())
        line = f"{_time(record)} {record.levelname} {_escape(record.name)}: {_escape(_message(record))}{fields}"
        traceback = self._traceback(record)
        # No line of it may look like a record, whatever the exception says.
        return "\n".join([line, *(f"  {_escape(part)}" for part in traceback.split("\n") if part)])


class JsonFormatter(_Formatter):
    """One JSON object a line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        entry = self._fields(record) | entry
        if traceback := self._traceback(record):
            entry["traceback"] = traceback
        return json.dumps(entry)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # arguments that do not fit: the line is worth more than its rest
        return f"{record.msg!s} (its arguments do not fit: {type(error).__name__})"


def _plain(value: Any, depth: int = 3) -> Any:
    """A value that JSON can hold; of what it does not know, the kind."""
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= 64 else f"<int of {value.bit_length()} bits>"
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else f"{value[:_MAX_TEXT]}... ({len(value)} characters)"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if depth and isinstance(value, Mapping):
        return {str(_plain(name)): _plain(part, depth - 1) for name, part in value.items()}
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [_plain(part, depth - 1) for part in value]
    if isinstance(value, os.PathLike | BaseException):
        try:
            return _plain(str(value))
        except Exception:
            pass
    return f"<{type(value).__name__}>"


def _word(value: Any) -> str:
    """A field's value in a text line: itself if it is one word, else as JSON, so that none can pass for two fields."""
    text = value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, str) and (not text or not text.isprintable() or any(sign in text for sign in ' ="\\')):
        return json.dumps(text)
    return text


def _escape(text: str) -> str:
    """The text with what is no printable character, line breaks among them, as escapes."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
