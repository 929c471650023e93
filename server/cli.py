"""The console script `mnist-grpc-server`: settings, logging, exit codes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict

from server.errors import CannotServe, not_installed
from server.settings import InvalidSetting, Settings, read_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; return 0 after an ordered stop, 2 for a bad setting, 1 when the server cannot serve."""
    try:
        settings, sources = read_settings(sys.argv[1:] if arguments is None else arguments, os.environ)
    except InvalidSetting as error:
        print(f"mnist-grpc-server: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):  # until the event loop takes them over
        signal.signal(number, lambda *_: sys.exit(0))
    _configure_logging(settings)
    values = " ".join(f"{name}={value} ({sources[name]})" for name, value in asdict(settings).items())
    logging.getLogger(__name__).info("starting with %s", values)
    try:
        from server.app import serve  # needs what the base install, the client, does not bring
    except ModuleNotFoundError as error:
        print(f"mnist-grpc-server: {not_installed(error)}", file=sys.stderr)
        return 1
    try:
        asyncio.run(serve(settings))
    except CannotServe as error:
        print(f"mnist-grpc-server: {error}", file=sys.stderr)
        return 1
    return 0


def _configure_logging(settings: Settings) -> None:
    handler = logging.StreamHandler()  # stdout is for `serving on`
    if settings.log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.captureWarnings(True)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


if __name__ == "__main__":
    raise SystemExit(main())
