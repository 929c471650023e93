"""`mnist-grpc bench`: what people and programs see of it."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("hpack")

from client import cli
from client.load import plot
from client.load.histogram import Histogram
from client.load.images import IMAGES
from client.load.measure import Load, LoadFailed
from client.testing import FakeServer
from client.testing._answers import nearest_sample
from tests.client.certificates import Authority
from tests.client.conftest import real_server

QUICK = ["--seconds", "0.2", "--warm-up", "0.1", "--no-ceiling"]


def bench(target: str, *arguments: str) -> int:
    return cli.main(["bench", "--target", target, *QUICK, *arguments])


def test_people_get_a_line_for_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert bench(server.target, "--callers", "1,4", "--images", "1,3") == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert [line[:28].strip() for line in out.splitlines()[3:]] == [
        "classify, 1 image, 1 caller",
        "classify, 1 image, 4 callers",
        "classify, 3 images, 1 caller",
        "classify, 3 images, 4 caller",
    ]


def test_the_generator_s_own_ceiling_stands_beside_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        arguments = ["--seconds", "0.2", "--warm-up", "0.1", "--callers", "2", "--json"]
        assert cli.main(["bench", "--target", server.target, *arguments]) == 0
    (run,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert run["ceiling"]["messages_per_second"] > 0


@pytest.mark.parametrize("kind", ["classify", "stream"])
def test_programs_get_an_object_for_each_run(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert bench(server.target, "--kind", kind, "--rate", "50", "--even", "--json") == 0
    (run,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (run["kind"], run["rate"], run["callers"], run["faults"]) == (kind, 50, None, {})
    assert 9 <= run["latency_us"]["count"] <= 11
    assert run["late_us"]["count"] > 0


def test_a_rate_may_be_a_share_of_what_64_callers_get(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert bench(server.target, "--rate", "10%", "--json") == 0
    capacity, run = map(json.loads, capsys.readouterr().out.splitlines())
    assert (capacity["callers"], capacity["rate"]) == (64, None)
    assert run["rate"] == pytest.approx(max(0.1 * capacity["messages_per_second"], 1))


def test_another_digit_under_load_than_alone_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    images = itertools.count()

    def wrong_once(pixels: npt.NDArray[np.uint8]) -> int:
        digit = nearest_sample(pixels)
        return (digit + 1) % 10 if next(images) == IMAGES + 5 else digit

    with FakeServer(wrong_once) as server:
        assert bench(server.target, "--rate", "100", "--seconds", "0.5") == 1
    assert "FAILED: 1 x wrong answer: message " in capsys.readouterr().err


def test_a_server_that_reads_no_digits_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(3) as server:
        assert bench(server.target) == 1
    out, error = capsys.readouterr()
    assert "reads 26 of 256 known digits right" in error
    assert out == ""


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "bench.png"
    with FakeServer() as server:
        assert bench(server.target, "--callers", "1,4", "--plot", str(file)) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_told_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'mnist-grpc\[bench\]'"):
        plot.check_plot("a.png")
    for name in [name for name in sys.modules if name.startswith("client.load.") and name != "client.load.command"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hpack", None)
    assert bench("127.0.0.1:1") == 2
    assert "pip install 'mnist-grpc[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--callers", "0"], "a whole number, 1 or more, not '0'"),
        (["--images", "1,x"], "a whole number, 1 or more, not 'x'"),
        (["--rate", "1", "--callers", "1"], "not allowed with"),
        (["--seconds", "nan"], "a number above 0, not 'nan'"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench("127.0.0.1:1", *arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--even"], "--even is for --rate"),
        (["--plot", "/nowhere/at/all/a.png"], "there is no folder '/nowhere/at/all'"),
        (["--plot", "a.bmpx"], "a file that ends with .png"),
    ],
)
def test_what_cannot_be_measured_is_told_before_the_server_is_asked(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert bench("127.0.0.1:1", *arguments) == 2
    assert complaint in capsys.readouterr().err


def test_a_picture_that_is_a_folder_is_told_before(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        plot.check_plot(tmp_path / "a.png")


Measured = Callable[[Load], dict[str, Any]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Measured], list[Load]]:
    """Measure by a function; return the list of what is measured."""

    def script(measured: Measured) -> list[Load]:
        loads: list[Load] = []

        def found(door: object, load: Load, digits: object) -> dict[str, Any]:
            loads.append(load)
            return measured(load)

        monkeypatch.setattr("client.load.measure.measure", found)
        monkeypatch.setattr("client.load.command.known_digits", lambda client: [])
        return loads

    return script


def figures(load: Load, count: int = 2000, per_second: float = 100.0, **others: Any) -> dict[str, Any]:
    latencies = Histogram()
    for number in range(count):
        latencies.add(1_000_000 + number)
    callers = load.callers if load.rate is None else None
    return {
        "kind": load.kind,
        "images": load.images,
        "callers": callers,
        "rate": load.rate,
        "messages_per_second": per_second,
        "images_per_second": per_second,
        "latency_us": latencies.summary(),
        "late_us": Histogram().summary() if load.rate is not None else None,
        "sent_again": 0,
        "generator_core_share": 0.1,
        "faults": {},
        "examples": {},
    } | others


FAULTS: dict[str, Any] = {"faults": {"reset": 2}, "examples": {"reset": "error 2"}}


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("the server allows 8"), 2), (LoadFailed("the server allows 8"), 1), (OSError("allows 8"), 1)],
)
def test_what_was_measured_before_a_run_that_is_refused_is_kept(
    scripted: Callable[[Measured], list[Load]],
    error: Exception,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")

    def measured(load: Load) -> dict[str, Any]:
        if load.callers == 64:
            raise error
        return figures(load, generator_core_share=0.99)

    scripted(measured)
    file = tmp_path / "bench.png"
    assert bench("127.0.0.1:1", "--callers", "1,64,128", "--plot", str(file)) == code
    out, complaints = capsys.readouterr()
    assert "1 caller" in out
    assert "allows 8" in complaints
    assert "the generator used 99% of a core" in complaints
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_before_one_that_cannot_be_measured_decides_the_exit_code(
    scripted: Callable[[Measured], list[Load]],
) -> None:
    def measured(load: Load) -> dict[str, Any]:
        if load.callers == 64:
            raise ValueError("no")
        return figures(load, **FAULTS)

    scripted(measured)
    assert bench("127.0.0.1:1") == 1


def test_no_share_is_taken_of_a_capacity_that_is_not_known(
    scripted: Callable[[Measured], list[Load]], capsys: pytest.CaptureFixture[str]
) -> None:
    loads = scripted(lambda load: figures(load, **FAULTS))
    assert bench("127.0.0.1:1", "--rate", "70%,90%") == 1
    assert [(load.callers, load.rate) for load in loads] == [(64, None)]
    error = capsys.readouterr().err
    assert "FAILED: 2 x reset: error 2" in error
    assert "what 64 callers get is not known" in error


def test_a_small_rate_and_few_answers_are_printed_as_they_are(
    scripted: Callable[[Measured], list[Load]], capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(lambda load: figures(load, count=7, per_second=0.5))
    assert bench("127.0.0.1:1", "--rate", "0.5") == 0
    line = capsys.readouterr().out.splitlines()[3]
    assert line.startswith("classify, 1 image, 0.5/s at random ")
    assert line.split()[-6:] == ["0.5", "0.5", "1.00", "-", "-", "1.00"]


def test_a_server_that_breaks_http_2_fails_the_command_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, faulty: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("client.load.command.known_digits", lambda client: None)
    for fault, complaint in [("short goodbye", "no HTTP/2"), ("unreadable headers", "cannot be read")]:
        assert bench(faulty(fault), "--callers", "2") == 1
        assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("target", ["dns:///localhost:1", "a:1,b:2", "localhost:x"])
def test_one_server_with_a_port_is_measured(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = bench(target)
    except SystemExit as ended:  # no target at all
        code = int(ended.code or 0)
    assert code == 2


def test_a_real_server_behind_tls_that_wants_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cryptography")
    authority = Authority("authority", tmp_path)
    pair = authority.issue("localhost")
    token = tmp_path / "token"
    token.write_text("longer-than-127-bytes-" * 10)
    token.chmod(0o600)
    flags: list[str | Path] = ["--tls-cert", pair.certificate, "--tls-key", pair.key, "--auth-token-file", token]
    with real_server(tmp_path, *flags) as address:
        target = address.replace("127.0.0.1", "localhost")
        secure = ["--ca", str(authority.file), "--token-file", str(token), "--json"]
        assert bench(target, "--callers", "4", *secure) == 0
        assert bench(target, "--kind", "infer", "--rate", "100", "--images", "3", *secure) == 0
        assert bench(target, "--callers", "4", "--images", "256", *secure) == 0
    runs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(run["latency_us"]["count"] > 0 for run in runs)
