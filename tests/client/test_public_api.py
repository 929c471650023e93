"""The names that others build on, and that importing them does nothing else."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import client

NAMES = [
    "AsyncClient",
    "Client",
    "DeadlineExceededError",
    "Image",
    "InvalidImageError",
    "MnistGrpcError",
    "Model",
    "OverloadedError",
    "OvertakenError",
    "Prediction",
    "ServerError",
    "TLS",
    "UnauthenticatedError",
    "UnavailableError",
    "classify",
    "explain",
    "request_id",
]
METHODS = [
    "classify",
    "classify_batch",
    "classify_iter",
    "close",
    "explain",
    "get_model",
    "is_serving",
    "stream_classify",
    "wait_ready",
]


def public_methods(kind: type) -> list[str]:
    return sorted(name for name in vars(kind) if not name.startswith("_"))


def test_the_exported_names_are_these() -> None:
    assert sorted(client.__all__) == NAMES
    assert all(hasattr(client, name) for name in NAMES)


@pytest.mark.parametrize("kind", [client.Client, client.AsyncClient])
def test_both_clients_have_these_methods(kind: type) -> None:
    assert public_methods(kind) == METHODS


@pytest.mark.parametrize("name", ["__init__", *METHODS])
def test_both_clients_take_the_same_arguments(name: str) -> None:
    sync, asynchronous = (
        [
            (parameter.name, parameter.kind, parameter.default)
            for parameter in inspect.signature(getattr(kind, name)).parameters.values()
        ]
        for kind in (client.Client, client.AsyncClient)
    )
    assert sync == asynchronous


def test_arguments_after_the_first_are_named() -> None:
    for name in METHODS:
        _, *arguments = inspect.signature(getattr(client.Client, name)).parameters.values()
        assert all(argument.kind is inspect.Parameter.KEYWORD_ONLY for argument in arguments[1:]), name


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("classify_iter", "stream_classify")])
def test_the_methods_of_the_async_client_are_awaited(name: str) -> None:
    assert inspect.iscoroutinefunction(getattr(client.AsyncClient, name))


def test_both_clients_are_context_managers() -> None:
    assert hasattr(client.Client, "__enter__")
    assert hasattr(client.AsyncClient, "__aenter__")


def test_everything_public_has_a_docstring() -> None:
    things: dict[str, Any] = {name: getattr(client, name) for name in NAMES if name != "Image"}
    for kind in (client.Client, client.AsyncClient):
        things |= {f"{kind.__name__}.{name}": getattr(kind, name) for name in METHODS}
    assert [name for name, thing in things.items() if not (thing.__doc__ or "").strip()] == []


def test_the_errors_form_one_tree() -> None:
    families = {
        client.InvalidImageError: ValueError,
        client.DeadlineExceededError: TimeoutError,
        client.OverloadedError: Exception,
        client.UnavailableError: ConnectionError,
        client.UnauthenticatedError: Exception,
        client.ServerError: Exception,
    }
    for kind, family in families.items():
        assert issubclass(kind, client.MnistGrpcError)
        assert issubclass(kind, family)
        assert (kind("why").code, kind("why").incident_id) == (None, None)
    assert client.InvalidImageError("why").index is None


def test_the_types_ship() -> None:
    assert resources.files("client").joinpath("py.typed").is_file()


def test_importing_does_nothing_and_loads_nothing_heavy() -> None:
    script = """
import socket, sys, threading
sys.argv = ["program", "--flag-of-another-program"]
def refuse(*_): raise AssertionError("the import opens a socket")
socket.socket.connect = refuse
before = threading.active_count()
import client
heavy = {"torch", "torchvision", "server", "trainer", "sklearn", "matplotlib"}
print(sorted(heavy & {*sys.modules, *(name.split(".")[0] for name in sys.modules)}))
print(threading.active_count() - before, sys.argv)
"""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=Path(client.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stderr == ""
    assert process.stdout.splitlines() == ["[]", "0 ['program', '--flag-of-another-program']"]
