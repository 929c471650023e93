"""`python -m bench` on a small scale: the programs, not their figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest


def bench(*arguments: str) -> int:
    from bench.__main__ import main

    return main(["--rounds", "1", "--seconds", "0.2", *arguments])


def test_rows_are_measured_printed_and_kept_beside_the_next_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, file = tmp_path / "results" / "last.json", tmp_path / "today.json"
    rows = ["--row", "1", "--row", "4", "--row", "5", "--row", "8", "--transport", "asgi"]
    assert bench(*rows, "--last", str(last), "--json", str(file)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines[1:7]] == ["1", "4", "5", "5", "8", "8"]
    figures = json.loads(file.read_text())["figures"]
    assert [(figure["name"], figure["transport"]) for figure in figures] == [
        (name, "asgi") for name in ("lone p50", "bulk", "stream", "packed", "start", "memory")
    ]
    assert all(figure["median"] > 0 for figure in figures)
    loads = json.loads(file.read_text())["loads"]["samples"]
    assert {name: sorted(found) for name, found in loads.items()} == {
        "unary @1": ["asgi", "generator's ceiling", "no-op"],
        "256 images @4": ["asgi", "generator's ceiling"],
        "stream 1x64": ["asgi", "generator's ceiling", "no-op"],
        "stream 64x8": ["asgi", "generator's ceiling"],
    }

    assert bench("--row", "7", "--last", str(last)) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("7 ")
    kept = json.loads(last.read_text())["figures"]
    assert [figure["name"] for figure in kept] == ["one image", *(figure["name"] for figure in figures)]


def test_the_sdk_s_callers_are_measured_in_a_process_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "today.json"
    assert bench("--row", "6", "--transport", "grpcio", "--last", str(tmp_path / "last.json"), "--json", str(file)) == 0
    assert [figure["name"] for figure in json.loads(file.read_text())["figures"]] == ["tasks", "threads"]


def test_a_wrong_answer_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.forward import Forward

    right = Forward.digits

    def another(self: Forward) -> list[int]:
        digits = right(self)
        return [(digits[0] + 1) % 10, *digits[1:]]

    monkeypatch.setattr(Forward, "digits", another)
    assert bench("--row", "1", "--transport", "asgi", "--last", str(tmp_path / "last.json")) == 1
    assert "unary @1 at 127.0.0.1:" in (error := capsys.readouterr().err)
    assert "wrong answer" in error
    assert not (tmp_path / "last.json").exists()


@pytest.mark.parametrize("content", ["[]", '{"figures": [{}]}'])
def test_a_last_run_of_another_form_does_not_lose_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (last := tmp_path / "last.json").write_text(content)
    assert bench("--row", "7", "--last", str(last)) == 0
    assert "of another form" in capsys.readouterr().out
    assert [figure["name"] for figure in json.loads(last.read_text())["figures"]] == ["one image"]


@pytest.mark.parametrize("program", ["bench.__main__", "bench.client", "bench.peers.__main__"])
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        *((["--seconds", seconds], "--seconds") for seconds in ("nan", "inf", "0", "-1", "x")),
        *((["--rounds", rounds], "--rounds") for rounds in ("0", "x")),
        (["--json", "/proc/x/l.json"], "/proc/x/l.json cannot be written"),
        (["--json", "/"], "/ cannot be written"),
    ],
)
def test_what_cannot_be_done_is_refused_before_measuring(
    capsys: pytest.CaptureFixture[str], program: str, arguments: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(program).main(arguments)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_last_run_that_cannot_be_written_is_refused_before_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench("--last", "/proc/x/l.json")
    assert "/proc/x/l.json cannot be written" in capsys.readouterr().err
