"""`bench.peers` from start to table: systems that answer, lie, refuse or do not start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from bench.peers import measure as peers_measure
from bench.peers import peer as peers
from bench.peers.adapters import OURS, PEERS
from bench.peers.load import LoadError, LoadGenerator, Sample, Target, WrongAnswer, ask, process
from bench.peers.measure import SCENARIOS, Loads, Result, measure
from bench.peers.peer import CannotStart, Command, Peer, Place
from bench.peers.report import draw, tables
from bench.peers.running import running
from server.golden import golden_digits

SECONDS = 0.1
LIAR = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
ThreadingHTTPServer.request_queue_size = 128
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    def do_POST(self):
        count = int(self.headers["content-length"]) // 784
        self.rfile.read(count * 784)
        self.send_response(200)
        self.send_header("content-length", str(count * 40))
        self.end_headers()
        self.wfile.write(bytes(count * 40))
    def log_message(self, *arguments):
        pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def system(program: str, start_seconds: float = 60) -> Peer:
    """A peer that is a few lines of Python."""

    def start(place: Place) -> Command:
        return Command([str(place.python), "-c", program, place.port])

    return Peer("Made up", "raw /classify", start, "none", start_seconds=start_seconds)


@pytest.fixture(scope="module")
def load(digits: list[int]) -> Iterator[LoadGenerator]:
    with process(digits) as generator:
        yield generator


def test_a_peer_that_lies_is_not_measured(load: LoadGenerator, digits: list[int]) -> None:
    _, [result] = measure([system(LIAR)], {}, Loads(load, load), digits, 1, SECONDS)
    assert result.is_wrong
    assert result.failed.startswith("wrong answer: ")
    assert not result.rounds
    assert "wrong answer: " in tables([], [result])


def test_a_peer_that_speaks_no_http_costs_none_but_itself() -> None:
    """It answers well at first, and then single images with a length that is none."""
    broken = LIAR.replace("str(count * 40)", "'x' if count == 1 else str(count * 40)")
    zeros = [0] * 256  # what both read
    with process(zeros) as load:
        _, [first, second] = measure([system(broken), system(LIAR)], {}, Loads(load, load), zeros, 1, SECONDS)
    assert sorted(first.errors) == ["1 caller", "64 callers"]
    assert "does not say how long it is: content-length b'x'" in first.errors["1 caller"]
    assert sorted(first.rounds) == ["256 images, 4 in flight", "64 images, 4 in flight"]
    assert len(second.rounds) == len(SCENARIOS)
    assert "Made up, 1 caller: ConnectionEnded: an answer does not say how long" in tables([], [first, second])


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        (system("raise SystemExit('no such model')"), "ended with code 1: no such model"),
        (system("import signal; print('loading', flush=True); signal.pause()", 0.5), "no answer in 0 s"),
        (Peer("Made up", "raw /classify", lambda place: Command(["/no/such/program"]), ""), "No such file"),
        (Peer("Made up", "raw /classify", PEERS["fastapi"].start, "", environment="none"), "not installed: scripts/"),
    ],
)
def test_a_peer_that_cannot_start_is_told_in_the_table(
    load: LoadGenerator, digits: list[int], peer: Peer, reason: str
) -> None:
    _, [result] = measure([peer], {}, Loads(load, load), digits, 1, SECONDS)
    assert reason in result.failed
    assert not result.is_wrong
    for markdown in (False, True):
        assert reason in tables([], [result], markdown)


def test_a_failed_installation_tells_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fastapi").mkdir()
    (tmp_path / "fastapi" / "failed").write_text("ERROR: No matching distribution\n")
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    with pytest.raises(CannotStart, match="not installed: ERROR: No matching distribution"):
        PEERS["fastapi"].python()


def test_nothing_of_a_system_is_left(digits: list[int], tmp_path: Path) -> None:
    """Also not a process that has left its group."""
    child = "import subprocess, sys; one = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']"
    program = f"{child}, start_new_session=True); open({str(tmp_path / 'pid')!r}, 'w').write(str(one.pid))\n{LIAR}"
    with pytest.raises(WrongAnswer), running(system(program), digits):
        pass
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


class Failing:
    """A load generator that fails with requests of so many images."""

    def __init__(self, images: int, error: LoadError) -> None:
        self._images, self._error = images, error

    def closed_loop(self, target: Target, images_per_request: int, in_flight: int, seconds: float) -> Sample:
        if images_per_request == self._images:
            raise self._error
        return Sample(100.0, 10.0, 20.0)


def test_a_scenario_that_a_peer_refuses_costs_it_that_scenario_alone(digits: list[int]) -> None:
    failing = Loads(*[Failing(256, LoadError("too large"))] * 2)
    _, [result] = measure([OURS["grpcio x1"]], {}, failing, digits, 2, SECONDS)
    assert result.errors == {"256 images, 4 in flight": "too large"}
    assert [len(result.rounds[scenario.name]) for scenario in SCENARIOS[:3]] == [2, 2, 2]
    assert "grpcio x1, 256 images, 4 in flight: too large" in tables([], [result])


def test_a_lie_while_it_is_timed_costs_a_peer_all_its_figures(digits: list[int]) -> None:
    failing = Loads(*[Failing(256, WrongAnswer("3, not 5"))] * 2)
    _, [result] = measure([OURS["grpcio x1"]], {}, failing, digits, 2, SECONDS)
    assert (result.failed, result.is_wrong, result.rounds) == ("wrong answer: 3, not 5", True, {})


class Noting:
    """Systems that are nothing, and loads that note what is measured and what stands still meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.loads = Loads(self._load(""), self._load(" by the SDK"))
        self._paused: list[str] = []
        monkeypatch.setattr(peers_measure, "running", self._running)

    @contextmanager
    def _running(self, peer: Peer, digits: list[int]) -> Iterator[Any]:
        @contextmanager
        def paused() -> Iterator[None]:
            self._paused.append(peer.name)
            yield
            self._paused.remove(peer.name)

        self.events.append(f"{peer.name} starts")
        count = self.events.count(f"{peer.name} starts")
        target = Target(peer.name, peer.dialect)
        yield SimpleNamespace(target=target, ready_seconds=float(count), memory_mb=lambda: 1.0, paused=paused)
        self.events.append(f"{peer.name} ends")

    def _load(self, how: str) -> LoadGenerator:
        def closed_loop(target: Target, images_per_request: int, in_flight: int, seconds: float) -> Sample:
            still = f", {self._paused[0]} stands still" if self._paused else ""
            self.events.append(f"{in_flight}x{images_per_request} at {target.address}{how}{still}")
            return Sample(100.0, 10.0, 20.0)

        return cast(LoadGenerator, SimpleNamespace(closed_loop=closed_loop))

    def measure(self, rounds: int) -> tuple[list[Result], list[Result]]:
        return measure([PEER], {name: OURS[name] for name in ("asgi x1", "asgi x2")}, self.loads, [], rounds, 1.0)


PEER = system("", 1)


def test_a_peer_stands_still_while_ours_is_measured_and_takes_turns_in_going_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noting = Noting(monkeypatch)
    noting.measure(rounds=2)
    one = ["1x1 at Made up", "1x1 at asgi x1, Made up stands still"]
    many = [
        "64x1 at Made up",
        "64x1 at asgi x1, Made up stands still",
        "64x1 at asgi x1 by the SDK, Made up stands still",
        "64x1 at asgi x2, Made up stands still",
    ]
    assert [event for event in noting.events if event.startswith("1x1 ")] == [*one, *reversed(one)]
    assert [event for event in noting.events if event.startswith("64x1 ")] == [*many, *reversed(many)]


def test_of_every_system_the_second_start_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    noting = Noting(monkeypatch)
    ours, [peer] = noting.measure(rounds=1)
    assert [one.ready_seconds for one in (*ours, peer)] == [2.0, 2.0, 2.0]


def test_what_is_paused_stands_still(digits: list[int]) -> None:
    zeros = [0] * 256
    with running(system(LIAR), zeros) as one:
        with one.paused():
            _, status = os.waitpid(one._process.pid, os.WUNTRACED)  # returns when it has stopped
            assert os.WIFSTOPPED(status)
        _, status = os.waitpid(one._process.pid, os.WCONTINUED)
        assert os.WIFCONTINUED(status)
        assert ask(one.target, 10) == zeros


def test_the_sdk_is_a_load_whose_answers_are_checked(digits: list[int]) -> None:
    golden = golden_digits()[1].tolist()
    with running(OURS["asgi x1"], digits) as one:
        with process(golden, "bench.peers.sdk") as load:
            sample = load.closed_loop(one.target, 1, 64, SECONDS)
            assert sample.rate > 0
            assert 0 < sample.p50_us <= sample.p99_us
        wrong = [golden[0], (golden[1] + 1) % 10, *golden[2:]]
        with process(wrong, "bench.peers.sdk") as load, pytest.raises(WrongAnswer, match="image 1: "):
            load.closed_loop(one.target, 1, 64, SECONDS)


def test_the_tables_have_percentiles_of_both_and_the_halves_of_the_goals() -> None:
    ours = [Result("asgi x1", ""), Result("asgi x2", "")]
    slow, fast = Result("Slow", ""), Result("Fast", "")
    for peer, rate in ((slow, 100.0), (fast, 200.0)):
        for scenario in SCENARIOS:
            samples = {way.name: Sample(500.0, 31.0, 41.0) for way in scenario.ways(["asgi x1", "asgi x2"])}
            samples |= {"asgi x1, SDK": Sample(700.0, 32.0, 42.0), peer.name: Sample(rate, 51.0, 61.0)}
            peer.rounds[scenario.name] = [samples]
    lines = tables(ours, [slow, fast], markdown=True).splitlines()
    sdk, direct = "700 | 32, 42 | 7.00 (7.00 to 7.00)", "500 | 31, 41 | 5.00 (5.00 to 5.00)"
    assert f"| Slow | 100 | 51, 61 | {direct} | {sdk} | {direct} |" in lines
    of_goals = [line.split(" | ")[1:] for line in lines if line.startswith(("| 4: ", "| 6: "))]
    assert of_goals == [
        ["asgi x1, SDK", "Fast", "3.50 (3.50 to 3.50)", "≥ 3.00", "yes |"],
        ["asgi x1", "Fast", "2.50 (2.50 to 2.50)", "≥ 2.00", "yes |"],
        ["asgi x2", "Fast", "2.50 (2.50 to 2.50)", "≥ 2.00", "yes |"],
    ]


def test_ratios_are_of_the_same_rounds() -> None:
    mine = Result("asgi x1", "")
    peer = Result("Peer", "")
    for rates in ((100.0, 200.0), (300.0, 200.0), (50.0, 50.0)):
        samples = {name: Sample(rate, 1.0, 2.0) for name, rate in zip(("asgi x1", "Peer"), rates, strict=True)}
        peer.rounds.setdefault("64 images, 4 in flight", []).append(samples)
    assert "1.00 (0.50 to 1.50)" in tables([mine], [peer])


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    sample = Sample(100.0, 1.0, 2.0)
    peer = Result("Peer", "", rounds={scenario.name: [{"Peer": sample, "asgi x1": sample}] for scenario in SCENARIOS})
    draw([Result("asgi x1", "")], [peer, Result("Broken", "", failed="it did not start")], tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["asgi x1", *PEERS])
def test_a_real_system_answers_as_the_network_does(load: LoadGenerator, digits: list[int], name: str) -> None:
    peer = {**OURS, **PEERS}[name]
    try:
        python = peer.python()
    except CannotStart as error:
        pytest.skip(str(error))
    assert python.exists()
    with running(peer, digits) as one:
        with one.paused():
            pass
        for scenario in SCENARIOS:
            assert load.closed_loop(one.target, scenario.images, scenario.in_flight, SECONDS).rate > 0
        assert one.memory_mb() > 1


def test_each_adapter_is_named_in_the_script_and_in_the_docs() -> None:
    script = (peers.ROOT / "scripts" / "bench-peers").read_text()
    docs = (peers.ROOT / "docs" / "peers.md").read_text()
    for name, peer in PEERS.items():
        assert f"\n{name} " in script
        assert f"| {peer.name} |" in docs
