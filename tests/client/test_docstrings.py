"""The examples in the docstrings of what is public, run against a real server.

They speak of `client` without importing it, of a server at localhost:50051, of
the images in docs/examples, and of authorities in `ca.pem`.
"""

from __future__ import annotations

import doctest
import inspect
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import client
import client.testing
from client import _default

ROOT = Path(__file__).parents[2]
SHOWN_TARGET = "localhost:50051"

WITHOUT = {
    r"AsyncClient\..*": "as those of Client; the class shows how they are awaited",
    r"Client\.close": "a `with` block calls it",
    r"(?!MnistGrpcError)\w+Error": "MnistGrpcError shows how they are caught",
    r"testing\.FakeServer\..*": "the class shows a test, docs/testing.md the rest",
    r"testing\.Request": "FakeServer shows one",
}
"""What needs no example of its own, and why."""


def public() -> dict[str, Any]:
    """Whatever users call by name: modules, functions, classes, and methods."""
    found: dict[str, Any] = {"client": client, "client.testing": client.testing}
    for module in (client, client.testing):
        prefix = module.__name__.removeprefix("client").removeprefix(".")
        for name in module.__all__:
            thing = getattr(module, name)
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            full = f"{prefix}.{name}".removeprefix(".")
            found[full] = thing
            for member, value in vars(thing).items() if inspect.isclass(thing) else ():
                if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                    found[f"{full}.{member}"] = value
    return found


def docstring(thing: Any) -> str:
    return inspect.getdoc(thing) or ""


EXAMPLES = {name: thing for name, thing in public().items() if ">>>" in docstring(thing)}


@pytest.fixture
def at_the_server(server_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MNIST_GRPC_TARGET", server_address)
    monkeypatch.chdir(tmp_path)
    for image in (ROOT / "docs" / "examples").glob("*.png"):
        shutil.copy(image, tmp_path)
    with resources.files("grpc").joinpath("_cython/_credentials/roots.pem").open("rb") as authorities:
        (tmp_path / "ca.pem").write_bytes(authorities.read())
    yield server_address
    _default.forget(server_address)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_gives_what_it_shows(name: str, at_the_server: str) -> None:
    shown = docstring(EXAMPLES[name]).replace(SHOWN_TARGET, at_the_server)
    example = doctest.DocTestParser().get_doctest(shown, {"client": client}, name, None, None)
    said: list[str] = []
    failed, tried = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert tried
    assert not failed, "".join(said)


def test_all_that_is_public_is_described_and_has_an_example_where_that_helps() -> None:
    assert [name for name, thing in public().items() if not docstring(thing)] == []
    assert [name for name in public() if name not in EXAMPLES and not any(re.fullmatch(x, name) for x in WITHOUT)] == []


def test_what_needs_no_example_exists() -> None:
    assert [pattern for pattern in WITHOUT if not any(re.fullmatch(pattern, name) for name in public())] == []
