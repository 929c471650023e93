"""The programs of `bench.reliability` on a small scale: the same servers, loads and rules, for seconds."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def transport(pytestconfig: pytest.Config) -> str:
    """What the servers of the scenarios speak gRPC with."""
    given: str = pytestconfig.getoption("--transport")
    return given


@pytest.fixture
def broken_rules(monkeypatch: pytest.MonkeyPatch, transport: str) -> Callable[..., list[str]]:
    """Run a scenario by its name with these arguments; return the rules that it found broken."""
    monkeypatch.syspath_prepend(str(ROOT))  # the programs are no part of what is installed

    def run(name: str, **arguments: float) -> list[str]:
        from bench.reliability.common import Report

        report = Report()
        importlib.import_module(f"bench.reliability.{name}").run(report, transport=transport, **arguments)
        return report.failures

    return run
