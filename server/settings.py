"""The server's settings: a flag beats the environment beats the default.

`--max-batch-size 64`, `MNIST_GRPC_MAX_BATCH_SIZE=64` and
`Settings(max_batch_size=64)` say the same. Errors name the setting, the rule
and the value.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any

from server.version import server_version

ENVIRONMENT_PREFIX = "MNIST_GRPC_"
EMBEDDED_WEIGHTS = str(resources.files("server").joinpath("weights", "mnist_model.pth"))


class InvalidSetting(ValueError):
    """A setting's value breaks its rule."""


def _setting(default: object, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that an operator may choose; each field is also a flag."""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(50051, "port to listen on; 0 picks a free one and prints it")
    weights: str = _setting(EMBEDDED_WEIGHTS, "weights file to serve, with its manifest (.json) beside it")
    device: str = _setting("cpu", "torch device that computes, for example cpu or cuda:0")
    max_batch_size: int = _setting(256, "most images in one batch; larger requests are split")
    max_wait_ms: float = _setting(
        0.0, "how long a first image waits for others, in milliseconds; 0 takes what is there"
    )
    max_queue_size: int = _setting(8192, "most images that wait for a batch; more are refused with RESOURCE_EXHAUSTED")
    stream_window: int = _setting(512, "most unanswered frames of one stream; then the server stops reading it")
    max_message_bytes: int = _setting(4 * 1024 * 1024, "longest request message that is accepted, in bytes")
    grace: float = _setting(8.0, "how long accepted calls may go on after SIGTERM, in seconds")
    log_format: str = _setting("text", "text or json")
    log_level: str = _setting("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        self._require("port", "from 0 to 65535", 0 <= self.port <= 65535)
        self._require("max_batch_size", "from 1 to 65536", 1 <= self.max_batch_size <= 65536)
        self._require("max_wait_ms", "from 0 to 60000", 0 <= self.max_wait_ms <= 60_000)
        self._require("max_queue_size", "1 or more", self.max_queue_size >= 1)
        self._require("stream_window", "1 or more", self.stream_window >= 1)
        self._require("max_message_bytes", "from 1024 to 1073741824", 1024 <= self.max_message_bytes <= 1 << 30)
        self._require("grace", "0 or more", self.grace >= 0 and math.isfinite(self.grace))
        self._require("log_format", "text or json", self.log_format in ("text", "json"))
        self._require(
            "log_level", "debug, info, warning or error", self.log_level in ("debug", "info", "warning", "error")
        )

    def _require(self, name: str, rule: str, holds: bool) -> None:
        if not holds:
            raise InvalidSetting(f"{flag(name)} is {rule}, not {getattr(self, name)!r}")


def flag(name: str) -> str:
    """`max_batch_size` -> `--max-batch-size`."""
    return "--" + name.replace("_", "-")


def environment_variable(name: str) -> str:
    """`max_batch_size` -> `MNIST_GRPC_MAX_BATCH_SIZE`."""
    return ENVIRONMENT_PREFIX + name.upper()


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Settings, dict[str, str]]:
    """Return the settings and, for each, where its value came from: flag, environment or default.

    Raises:
        InvalidSetting: a value breaks its rule.
        SystemExit: `--help`, `--version` or an unknown flag.
    """
    given = vars(_parser().parse_args(arguments))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, cast in _CASTS.items():
        variable = environment_variable(name)
        if given[name] is not None:
            values[name], sources[name] = _cast(flag(name), given[name], cast), "flag"
        elif variable in environment and not _is_service_link(name, environment[variable]):
            values[name], sources[name] = _cast(variable, environment[variable], cast), "environment"
        else:
            sources[name] = "default"
    return Settings(**values), sources


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes set the variable: for a Service named mnist-grpc it gives pods MNIST_GRPC_PORT=tcp://..."""
    return name == "port" and value.startswith("tcp://")


def _cast(name: str, text: str, cast: Callable[[str], Any]) -> Any:
    try:
        return cast(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[cast]  # type: ignore[index]
        raise InvalidSetting(f"{name} is {kind}, not {text!r}") from None


_CASTS: dict[str, Callable[[str], Any]] = {
    setting.name: {"int": int, "float": float, "str": str}[str(setting.type)] for setting in fields(Settings)
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mnist-grpc-server",
        allow_abbrev=False,
        description="Serve handwritten-digit classification over gRPC.",
        epilog=f"Each flag is also an environment variable, for example {environment_variable('port')}; "
        "a flag beats the environment, which beats the default.",
    )
    parser.add_argument("--version", action="version", version=f"mnist-grpc {server_version()}")
    for setting in fields(Settings):
        default = "the embedded ones" if setting.name == "weights" else setting.default
        parser.add_argument(
            flag(setting.name),
            dest=setting.name,
            metavar={"int": "N", "float": "X", "str": "TEXT"}[str(setting.type)],
            help=f"{setting.metadata['help']} (default: {default})",
        )
    return parser
