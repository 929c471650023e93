"""What docs/testing.md shows is what happens: its blocks, as files of a user's project, under pytest."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import client

pytestmark = pytest.mark.timeout(300)  # each starts a pytest of its own; 3 s where nothing else runs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
HAS_FASTAPI = all(importlib.util.find_spec(name) for name in ("fastapi", "httpx2", "multipart"))


def run_pytest(project: Path, *arguments: str, autoload: bool = False) -> subprocess.CompletedProcess[str]:
    """As a user does, in a project that knows nothing of our configuration, nor of the plugins that we have."""
    (project / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MNIST_GRPC"))}
    environment = {} if autoload else {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    home = str(Path(client.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=project,
        env=outside | {"PYTHONPATH": os.pathsep.join([home, str(ROOT / "examples")])} | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_the_examples_of_the_page_pass(tmp_path: Path) -> None:
    assert len(BLOCKS) == PAGE.count("```python\n") == 6
    files = dict(BLOCKS)
    if not HAS_FASTAPI:  # where only the client is installed
        del files["test_fastapi_service.py"]
    for name, code in files.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    done = run_pytest(tmp_path)
    count = sum(code.count("def test_") for code in files.values())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} passed" in done.stdout, done.stdout


def test_the_fixture_is_the_default_target_and_only_during_its_test(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(BLOCKS["conftest.py"])
    (tmp_path / "test_default.py").write_text(
        """
import os
import threading

import client
from client import _default
from client.testing import digit_png

seen = []


def test_before():
    assert "MNIST_GRPC_TARGET" not in os.environ


def test_first(digit_server):
    digit_server.answers = 3
    assert client.classify(digit_png(7)).digit == 3
    assert client.Client().target == os.environ["MNIST_GRPC_TARGET"] == digit_server.target
    seen.append(digit_server.target)


def test_second(digit_server):
    assert digit_server.target not in seen
    assert client.classify(digit_png(7)).digit == 7
    assert len(digit_server.requests) == 1


def test_after():
    assert "MNIST_GRPC_TARGET" not in os.environ
    assert not _default._clients
    assert not [thread for thread in threading.enumerate() if thread.name == "fake-server-relay"]
"""
    )
    done = run_pytest(tmp_path)
    assert "4 passed" in done.stdout, done.stdout + done.stderr


def test_a_mistake_that_the_service_hides_fails_the_test_that_made_it(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(BLOCKS["conftest.py"])
    (tmp_path / "test_mistakes.py").write_text(
        """
import contextlib

import client
from client.testing import digit_png


def test_answers_used_up(digit_server):
    digit_server.answers = []
    with contextlib.suppress(client.MnistGrpcError):
        client.classify(digit_png(7))


def test_fault_never_came(digit_server):
    digit_server.hang_next()


def test_the_next_test_is_not_concerned(digit_server):
    assert client.classify(digit_png(7)).digit == 7
"""
    )
    done = run_pytest(tmp_path, "-rE")
    assert "3 passed, 2 errors" in done.stdout, done.stdout + done.stderr
    assert "the 0 answers that were given are used up" in done.stdout
    assert "hang_next was to come 1 times, and came 0 times" in done.stdout


def test_pytest_loads_the_plugin_only_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        """
import sys


def test_nothing():
    assert not {"client", "grpc"} & set(sys.modules)
"""
    )
    done = run_pytest(tmp_path, "-W", "default", autoload=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_files_that_the_page_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
