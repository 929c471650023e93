"""The pytest fixture `digit_server`: a `FakeServer` for one test. In the top `conftest.py`:

    pytest_plugins = ["client.testing.pytest_plugin"]

It is asked for by name and not an entry point of the package, because pytest
imports those in every run of everybody who has the SDK installed, gRPC and all.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from client import _default
from client._channel import TARGET_VARIABLE
from client.testing._server import FakeServer


@pytest.fixture
def digit_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A running `FakeServer`, to which `client.classify`, `Client()` and `AsyncClient()` go by default.

    For that it is the value of `MNIST_GRPC_TARGET` during the test. At its end
    the test fails if a fault was ordered and never came, or if answers were used
    up or broken.
    """
    with FakeServer() as server:
        monkeypatch.setenv(TARGET_VARIABLE, server.target)
        yield server
        _default.forget(server.target)
