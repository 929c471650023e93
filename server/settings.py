"""The server's settings: a flag beats the environment beats the default.

`--max-batch-size 64`, `MNIST_GRPC_MAX_BATCH_SIZE=64` and
`Settings(max_batch_size=64)` say the same. Errors name the setting, the rule
and the value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import PurePath
from typing import Any

from server.version import server_version

MAX_SECONDS = 1e9  # longer ones overflow in gRPC, and mean never
ENVIRONMENT_PREFIX = "MNIST_GRPC_"
TRANSPORTS = ("grpcio", "asgi")
MODELS = {
    model: str(resources.files("server").joinpath("weights", file))
    for model, file in (("improvednn", "mnist_model.pth"), ("cnn", "mnist_cnn.pth"))
}
"""The paths of the embedded weights, by the values of `--model`."""
EMBEDDED_WEIGHTS = MODELS["improvednn"]


class InvalidSetting(ValueError):
    """A setting's value breaks its rule."""


def _setting(default: object, help_text: str, default_text: str = "") -> Any:
    return field(default=default, metadata={"help": help_text, "default": default_text or str(default)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that an operator may choose; each field is also a flag."""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(50051, "port to listen on; 0 picks a free one and prints it")
    transport: str = _setting(
        "grpcio",
        "what speaks gRPC: grpcio, or asgi, which is several times as fast and needs the extra [fast]",
    )
    model: str = _setting(
        "improvednn", "embedded weights to serve: improvednn, or cnn, which errs less and takes far longer"
    )
    weights: str = _setting(
        EMBEDDED_WEIGHTS,
        "weights file to serve in place of embedded ones, with its manifest (.json) beside it",
        "those of --model",
    )
    device: str = _setting("cpu", "torch device that computes, for example cpu or cuda:0")
    workers: int = _setting(
        0, "processes that share the port; 0 takes as many as there are CPUs for this process", "all usable CPUs"
    )
    max_batch_size: int = _setting(256, "most images in one batch; larger requests are split")
    max_wait_ms: float = _setting(
        0.0, "how long a first image waits for others, in milliseconds; 0 takes what is there"
    )
    max_queue_size: int = _setting(8192, "most images that wait for a batch; more are refused with RESOURCE_EXHAUSTED")
    stream_window: int = _setting(512, "most unanswered frames of one stream; then the server stops reading it")
    max_message_bytes: int = _setting(4 * 1024 * 1024, "longest request message that is accepted, in bytes")
    drain_delay: float = _setting(
        0.2, "how long calls are still accepted after SIGTERM, when health already says NOT_SERVING, in seconds"
    )
    grace: float = _setting(8.0, "how long accepted calls may go on after that, in seconds")
    reload_interval: float = _setting(
        1.0, "how often to look whether the weights file was replaced, in seconds; 0 never looks"
    )
    min_accuracy: float = _setting(
        0.0, "least test accuracy, 0 to 1, that the manifest of weights has to give for them to be served"
    )
    stuck_after: float = _setting(
        5.0, "how long a batch may compute in its thread before health says NOT_SERVING until it ends, in seconds"
    )
    admin: bool = _setting(False, "offer mnist.v1.ModelAdmin, by which weights are reloaded and rolled back")
    metrics_port: int | None = _setting(None, "port of Prometheus metrics over HTTP; 0 picks a free one", "no metrics")
    tracing: bool = _setting(False, "send OpenTelemetry traces; OTEL_EXPORTER_OTLP_ENDPOINT and its like say where to")
    tls_cert: str = _setting("", "certificate chain (PEM) to serve with TLS; read again when it changes", "no TLS")
    tls_key: str = _setting("", "private key (PEM) of --tls-cert", "no TLS")
    tls_client_ca: str = _setting(
        "", "authorities (PEM) of which every client needs a certificate", "no client needs one"
    )
    auth_token_file: str = _setting(
        "", "file of bearer tokens, one a line, of which every call needs one; read again when it changes", "no token"
    )
    max_connection_age: float = _setting(
        0.0, "how old a connection may become before the client is told to make a new one, in seconds", "any age"
    )
    max_connection_age_grace: float = _setting(
        30.0, "how long the calls of a connection that is too old may go on, in seconds"
    )
    log_format: str = _setting("text", "text or json")
    log_level: str = _setting("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        self._require("port", "from 0 to 65535", 0 <= self.port <= 65535)
        self._require("max_batch_size", "from 1 to 65536", 1 <= self.max_batch_size <= 65536)
        self._require("max_wait_ms", "from 0 to 60000", 0 <= self.max_wait_ms <= 60_000)
        self._require("max_queue_size", "1 or more", self.max_queue_size >= 1)
        self._require("stream_window", "1 or more", self.stream_window >= 1)
        self._require("max_message_bytes", "from 1024 to 1073741824", 1024 <= self.max_message_bytes <= 1 << 30)
        self._require("host", "an address or a name", bool(self.host))
        self._require("weights", "the path of a file", bool(PurePath(self.weights).name))
        self._require("transport", " or ".join(TRANSPORTS), self.transport in TRANSPORTS)
        self._require("model", " or ".join(MODELS), self.model.lower() in MODELS)
        object.__setattr__(self, "model", self.model.lower())
        if self.weights == EMBEDDED_WEIGHTS:
            object.__setattr__(self, "weights", MODELS[self.model])
        self._require("workers", "from 0 to 1024", 0 <= self.workers <= 1024)
        for name in ("grace", "drain_delay", "reload_interval", "max_connection_age", "max_connection_age_grace"):
            self._require(name, "0 or more", 0 <= getattr(self, name) <= MAX_SECONDS)
        self._require("min_accuracy", "from 0 to 1", 0 <= self.min_accuracy <= 1)
        self._require("stuck_after", "above 0", 0 < self.stuck_after <= MAX_SECONDS)
        self._require("metrics_port", "from 0 to 65535", self.metrics_port is None or 0 <= self.metrics_port <= 65535)
        self._require("tls_cert", "given together with --tls-key", bool(self.tls_cert) == bool(self.tls_key))
        self._require("tls_client_ca", "given with --tls-cert only", bool(self.tls_cert) or not self.tls_client_ca)
        self._require("log_format", "text or json", self.log_format in ("text", "json"))
        self._require(
            "log_level", "debug, info, warning or error", self.log_level in ("debug", "info", "warning", "error")
        )

    def _require(self, name: str, rule: str, holds: bool) -> None:
        if not holds:
            raise InvalidSetting(f"{flag(name)} is {rule}, not {getattr(self, name)!r}")


def bracketed(host: str) -> str:
    """A host as it stands before a colon and a port: `::1` -> `[::1]`."""
    return f"[{host}]" if ":" in host else host


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
    if "model" in values and "weights" in values:
        raise InvalidSetting(
            "--model, which names embedded weights, and --weights, a file, are not given together: "
            + " and ".join(f"{flag(name)} is {values[name]!r} ({sources[name]})" for name in ("model", "weights"))
        )
    return Settings(**values), sources


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes set the variable: for a Service named mnist-grpc it gives pods MNIST_GRPC_PORT=tcp://..."""
    return name in ("port", "metrics_port") and value.startswith("tcp://")


def _cast(name: str, text: str, cast: Callable[[str], Any]) -> Any:
    try:
        return cast(text)
    except (ValueError, KeyError):
        kind = {float: "a number", _switch: "true or false"}.get(cast, "a whole number")
        raise InvalidSetting(f"{name} is {kind}, not {text!r}") from None


def _number_or_none(text: str) -> int | None:
    return None if text.lower() in ("", "none") else int(text)


def _switch(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


_TYPES: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "N"),
    "int | None": (_number_or_none, "N"),
    "float": (float, "X"),
    "str": (str, "TEXT"),
    "bool": (_switch, "BOOL"),
}
_CASTS: dict[str, Callable[[str], Any]] = {setting.name: _TYPES[str(setting.type)][0] for setting in fields(Settings)}


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
        cast, metavar = _TYPES[str(setting.type)]
        parser.add_argument(
            flag(setting.name),
            dest=setting.name,
            metavar=metavar,
            help=f"{setting.metadata['help']} (default: {setting.metadata['default']})",
            nargs="?" if cast is _switch else None,
            const="true" if cast is _switch else None,
        )
    return parser
