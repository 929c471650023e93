"""The programs themselves: how they are called, and that they notice what they are for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(name: str, transport: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.reliability", name, "--transport", transport, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_a_run_ends_with_ok_and_exit_code_0(transport: str) -> None:
    ended = run("cancellation", transport, "--calls", "50", "--memory-limit", "0.5")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "ok"


def test_a_broken_rule_is_named_in_the_last_line_and_gives_exit_code_1(transport: str) -> None:
    ended = run("cancellation", transport, "--calls", "50", "--memory-limit", "-1")
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1].startswith("failed: the server's memory grew")


def test_a_wrong_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.reliability.common import BrokenRule, known
    from protos.mnist.v1 import digit_classifier_pb2 as pb

    answers = known()
    ((version, logits),) = answers.logits.items()
    digits = logits.argmax(axis=1)
    good = pb.ClassifyResponse(
        digits=digits[:2].tolist(),
        logits=logits[:2].ravel().tolist(),
        probabilities=answers.probabilities(version, [0, 1]).ravel().tolist(),
        receipt=pb.Receipt(model_version=version),
    )
    assert answers.check(good, [0, 1]) == version
    with pytest.raises(BrokenRule, match="digits"):
        answers.check(good, [1, 0])
    for field, value in (("digits", (int(digits[0]) + 1) % 10), ("probabilities", 0.5), ("logits", 99.0)):
        wrong = pb.ClassifyResponse()
        wrong.CopyFrom(good)
        getattr(wrong, field)[0] = value
        with pytest.raises(BrokenRule, match=field):
            answers.check(wrong, [0, 1])
    good.receipt.model_version = "0" * 12
    with pytest.raises(BrokenRule, match="unknown version"):
        answers.check(good, [0, 1])


def test_a_stream_that_loses_or_doubles_a_frame_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.reliability.common import known
    from bench.reliability.resume import Caller, film
    from client import Prediction

    answers = known(pixels=film())
    ((version, logits),) = answers.logits.items()

    def outcome_of(*numbers: int) -> tuple[int, int, int, bool]:
        caller = Caller(answers, str(tmp_path / "done"))
        for _ in zip(range(5), caller.frames(), strict=False):
            pass
        for number in numbers:
            row = answers.probabilities(version, [number])[0]
            caller.take(Prediction(int(logits[number].argmax()), float(row.max()), row, version, 1, 0.0, 0.0))
        outcome = caller.end()
        return outcome.answered, outcome.doubled, outcome.lost, bool(outcome.complaints)

    assert outcome_of(0, 1, 2, 3, 4) == (5, 0, 0, False)
    assert outcome_of(0, 1, 3, 4) == (4, 0, 1, True)
    assert outcome_of(0, 1, 1, 2, 3, 4) == (6, 1, 0, True)
    assert outcome_of(0, 2, 1, 3, 4) == (5, 0, 0, True)
    assert outcome_of(0, 1, 2, 3, 77) == (5, 0, 1, True)
