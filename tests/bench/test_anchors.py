"""The anchors of `python -m bench`: what they run on, and when each is measured."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.rounds import Sample


def sample_of(rate: float) -> Sample:
    return {"rate": rate, "p50_us": 1.0, "p99_us": 1.0, "cpu_us": 1.0}


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who was measured, in order; nothing is started."""
    from bench import daily

    found: list[str] = []

    @contextmanager
    def server(module: str, arguments: Sequence[str] = ()) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(name=arguments[-1] if module == "server" else module)

    class Forward:
        def digits(self) -> list[int]:
            return []

        def rate(self, batch: int, seconds: float) -> float:
            found.append("forward")
            return 1.0

    def sample(load: Any, server: SimpleNamespace, *arguments: Any) -> Sample:
        found.append(server.name)
        return sample_of(1.0)

    monkeypatch.setattr(daily, "server", server)
    monkeypatch.setattr(daily, "generator", lambda: server("generator"))
    monkeypatch.setattr(daily, "Forward", Forward)
    monkeypatch.setattr(daily, "sample", sample)
    return found


def measured(turns: list[str], row: int) -> list[str]:
    from bench.daily import Plan, measure_loads

    measure_loads(Plan([row], ["grpcio", "asgi"], 2, 1.0))
    return [who for who in turns if who != "client.load.responder"]


def test_the_servers_take_turns_in_going_first(turns: list[str]) -> None:
    assert measured(turns, 1) == ["bench.noop_server", "grpcio", "asgi", "asgi", "grpcio", "bench.noop_server"]


def test_the_bare_forward_takes_turns_in_going_first(turns: list[str]) -> None:
    assert measured(turns, 4) == ["forward", "grpcio", "asgi", "asgi", "grpcio", "forward"]


def test_the_no_op_server_runs_on_the_loop_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import noop_server

    uvloop = pytest.importorskip("uvloop")
    on_uvloop: list[bool] = []

    async def serve() -> None:
        on_uvloop.append(isinstance(asyncio.get_running_loop(), uvloop.Loop))

    monkeypatch.setattr(noop_server, "serve", serve)
    for arguments in ([], ["--noop-loop", "asyncio"], ["--noop-loop", "uvloop"]):
        noop_server.main(arguments)
    assert on_uvloop == [False, False, True]


def test_the_loop_is_handed_on_to_the_no_op_server(monkeypatch: pytest.MonkeyPatch, turns: list[str]) -> None:
    from bench import daily

    loops: list[str] = []

    @contextmanager
    def server(module: str, arguments: Sequence[str] = ()) -> Iterator[SimpleNamespace]:
        if module == "bench.noop_server":
            loops.extend(arguments)
        yield SimpleNamespace(name=module)

    monkeypatch.setattr(daily, "server", server)
    daily.measure_loads(daily.Plan([1], [], 1, 1.0, "uvloop"))
    assert loops == ["--noop-loop", "uvloop"]


def test_a_ratio_is_of_its_own_round() -> None:
    from bench.daily import NOOP, Loads, Plan, load_figures

    ours, anchors = [100.0, 900.0, 400.0], [200.0, 300.0, 100.0]
    loads = Loads(
        {
            "unary @64": {
                "asgi": [sample_of(rate) for rate in ours],
                NOOP: [sample_of(rate) for rate in anchors],
            },
            "256 images @4": {"asgi": [sample_of(rate) for rate in ours]},
        },
        anchors,
    )
    many, bulk = load_figures(Plan([2, 4], ["asgi"], 3, 1.0), loads)
    assert many.values == bulk.values == [0.5, 3.0, 4.0]


def test_the_bare_forward_counts_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that shows a quarter of a second more each time: three times all 256 images in a second."""
    from bench import forward

    clock = iter([0.0, 0.25, 0.5, 0.75, 1.0])
    monkeypatch.setattr(forward, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert forward.Forward().rate(64, 1.0) == 3 * 256


def test_the_bare_forward_has_one_thread() -> None:
    from bench.forward import Forward

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Forward()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
