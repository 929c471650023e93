"""The console script `mnist-grpc-server`: settings, exit codes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import NoReturn

from server import exposure, logs
from server.cpus import usable_cpus
from server.errors import CannotServe, not_installed
from server.loop import run
from server.memory import use_one_arena
from server.settings import InvalidSetting, Settings, read_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; return 0 after an ordered stop, 2 for a bad setting, 1 when the server cannot serve."""
    try:
        settings, sources = read_settings(sys.argv[1:] if arguments is None else arguments, os.environ)
    except InvalidSetting as error:
        print(f"mnist-grpc-server: {error}", file=sys.stderr)
        return 2
    # gRPC would copy what strangers send in a GOAWAY frame into the log, line breaks and all.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for number in (signal.SIGTERM, signal.SIGINT):  # until the event loop takes them over
        signal.signal(number, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until then; the weights are read later than this in any case
    logs.configure(settings)
    workers = _workers(settings)
    effective = asdict(settings) | {"workers": workers}
    values = " ".join(f"{name}={value} ({sources[name]})" for name, value in effective.items())
    fields = {name: {"value": value, "source": sources[name]} for name, value in effective.items()}
    extra = {"settings": fields} if settings.log_format == "json" else {}
    logging.getLogger(__name__).info("starting with %s", values, extra=extra)
    try:
        _serve(settings, workers)
    except CannotServe as error:
        print(f"mnist-grpc-server: {error}", file=sys.stderr)
        return 1
    return 0


def script() -> NoReturn:
    """`main` as a program: ends when the work is done, as taking torch apart would take longer than to stop."""
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _workers(settings: Settings) -> int:
    """How many processes are to serve."""
    # Elsewhere than on Linux the kernel does not spread connections, and an accelerator is not split by itself.
    alone = sys.platform != "linux" or settings.device != "cpu"
    return settings.workers or (1 if alone else usable_cpus())


def _serve(settings: Settings, workers: int) -> None:
    """Serve in this process, or have several workers serve, until told to stop.

    Raises:
        CannotServe: something that the settings name cannot be used.
    """
    # Of NumPy's products, as of torch's: the threads of a product would wait for cores that others work on.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    use_one_arena()
    for warning in exposure.warnings(settings):
        logging.getLogger(__name__).warning("%s", warning)
    try:
        if workers > 1:
            from server.supervisor import supervise

            asyncio.run(supervise(settings, workers))
        else:
            from server.lifecycle import serve  # needs what the base install, the client, does not bring

            run(serve(settings))
    except ModuleNotFoundError as error:
        raise CannotServe(not_installed(error)) from error


if __name__ == "__main__":
    script()
