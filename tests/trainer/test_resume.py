"""A training that is stopped at any moment goes on to the very weights that it would have made."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.cli import main
from trainer.data import Data
from trainer.run import Run
from trainer.settings import TrainingSettings
from trainer.training import State, train

ROOT = Path(__file__).parents[2]
WriteMnist = Callable[..., dict[str, np.ndarray]]
FLAGS = [
    "--teacher",
    "none",
    "--epochs",
    "6",
    "--batch-size",
    "4",
    "--learning-rate",
    "0.001",
    "--validation-size",
    "10",
    "--no-download",
]
SHORT = TrainingSettings(epochs=4, batch_size=64, validation_size=200, learning_rate=0.05)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_in", [1, 3])
def test_the_weights_are_those_of_a_training_that_was_not_stopped(
    digits_data: Data, tmp_path: Path, stop_in: int
) -> None:
    states: list[State] = []
    path = tmp_path / "state.pt"

    def stop_amid(steps: Iterable[int], epoch: int) -> Iterable[int]:
        for step in steps:
            if epoch == stop_in and step == 5:
                raise Stopped
            yield step

    def keep(state: State) -> None:
        torch.save(state, path)
        states.append(torch.load(path, weights_only=True))

    with pytest.raises(Stopped):
        train(SHORT, digits_data, progress=stop_amid, on_state=keep)
    assert len(states) == stop_in - 1
    torch.manual_seed(torch.seed())
    resumed = train(SHORT, digits_data, state=states[-1] if states else None)
    whole = train(SHORT, digits_data)
    kept, expected = resumed.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(kept[key], expected[key]) for key in expected)

    def figures(epochs: list[object]) -> list[object]:
        return [dataclasses.replace(epoch, seconds=0) for epoch in epochs]  # type: ignore[type-var]

    assert figures([*resumed.epochs]) == figures([*whole.epochs])


def test_a_training_that_stopped_for_want_of_patience_is_over(digits_data: Data) -> None:
    settings = dataclasses.replace(SHORT, epochs=50, patience=1)
    states: list[State] = []
    training = train(settings, digits_data, on_state=lambda state: states.append(state))
    again = train(settings, digits_data, state=states[-1])
    assert again.epochs == training.epochs
    assert len(again.epochs) < 50


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "--data-dir", str(folder), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_after(process: subprocess.Popen[str], epoch: int, number: int) -> str:
    """Send a signal once the log tells of an epoch, while a later one is under way; return stderr."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().startswith(f"{epoch}/"):
            process.send_signal(number)
            break
    return process.communicate(timeout=60)[1]


@pytest.mark.usefixtures("torchvision")
def test_killed_twice_it_ends_with_the_weights_of_an_undisturbed_run(tmp_path: Path, write_mnist: WriteMnist) -> None:
    write_mnist(tmp_path, train=400)
    undisturbed = start(tmp_path, "--out", "whole", *FLAGS)
    _, err = undisturbed.communicate(timeout=60)
    assert undisturbed.returncode == 0, err

    first = start(tmp_path, "--out", "run", *FLAGS)
    stop_after(first, 2, signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    second = start(tmp_path, "--resume", "run", "--no-download")
    stop_after(second, 4, signal.SIGKILL)
    assert second.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "mnist_model.pth").exists()
    last = start(tmp_path, "--resume", "run", "--no-download")
    out, err = last.communicate(timeout=60)
    assert last.returncode == 0, err
    assert [f" {number}/6 " in out for number in range(1, 7)] == [True] * 6, "the log is whole"
    weights = [(tmp_path / name / "mnist_model.pth").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.usefixtures("torchvision")
def test_ctrl_c_keeps_what_was_learnt_and_says_how_to_go_on(tmp_path: Path, write_mnist: WriteMnist) -> None:
    write_mnist(tmp_path, train=400)
    process = start(tmp_path, "--out", "a run", *FLAGS)
    err = stop_after(process, 2, signal.SIGINT)
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"python -m trainer --resume 'a run' --data-dir {tmp_path} --no-download"
    assert "Traceback" not in err
    run = Run.go_on(tmp_path / "a run")
    state = run.state()
    assert state is not None
    assert len(state["epochs"]) >= 2
    lines = (tmp_path / "a run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == state["epochs"]


@pytest.mark.usefixtures("torchvision")
class TestWhatCannotGoOn:
    @pytest.fixture(autouse=True)
    def a_run(self, tmp_path: Path, write_mnist: WriteMnist) -> None:
        write_mnist(tmp_path)
        assert self.train(tmp_path, "--out", str(tmp_path / "run"), *FLAGS, "--epochs", "1") == 0

    def train(self, folder: Path, *arguments: str) -> int:
        return main(["--data-dir", str(folder), *arguments])

    def test_a_run_that_is_over_is_told_again(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = (tmp_path / "run" / "mnist_model.pth").read_bytes()
        assert self.train(tmp_path, "--resume", str(tmp_path / "run"), "--no-download") == 0
        assert " 1/1 " in capsys.readouterr().out
        assert (tmp_path / "run" / "mnist_model.pth").read_bytes() == before

    def test_a_folder_with_a_run_is_not_begun_again(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.train(tmp_path, "--out", str(tmp_path / "run"), *FLAGS) == 1
        assert "holds a run already; go on with it by --resume" in capsys.readouterr().err

    def test_other_data_is_noticed(
        self, tmp_path: Path, write_mnist: WriteMnist, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_mnist(tmp_path / "other", train=50)
        assert self.train(tmp_path / "other", "--resume", str(tmp_path / "run"), "--no-download") == 1
        assert "was begun with other data: MNIST, SHA-256 " in capsys.readouterr().err

    def test_a_folder_without_a_run_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.train(tmp_path, "--resume", str(tmp_path)) == 1
        assert "--resume takes the folder of a run, with settings.toml in it" in capsys.readouterr().err

    def test_a_flag_that_differs_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            self.train(tmp_path, "--resume", str(tmp_path / "run"), "--epochs", "9")
        assert "--resume goes on as begun, with --epochs 1, not 9" in capsys.readouterr().err
