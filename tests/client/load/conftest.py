"""Servers that do something wrong when it is time for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def faulty() -> Iterator[Callable[[str], str]]:
    """Start a `faulty_responder` of this kind; return its `host:port`."""
    with ExitStack() as stack:

        def start(fault: str) -> str:
            command = [sys.executable, str(Path(__file__).with_name("faulty_responder.py")), fault]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
            stack.callback(process.kill)
            assert process.stdout is not None
            return process.stdout.readline().split()[-1]

        yield start
