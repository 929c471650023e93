"""Processes that train together make what one process makes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import digits.network
from trainer.datasets import load_scans
from trainer.ranks import Ranks
from trainer.settings import TrainingSettings
from trainer.training import train

ROOT = Path(__file__).parents[2]

EXACT = TrainingSettings(
    epochs=3, batch_size=60, learning_rate=0.05, validation_size=200, drawn=0, augment=False, warmup_epochs=0.5
)
"""With nothing in it that each process draws for itself, but for dropout."""

TOGETHER = """
import sys, torch
import digits.network
digits.network.DROPOUT = 0.0
from tests.trainer.test_ranks import EXACT
from trainer.datasets import load_scans
from trainer.ranks import joined
from trainer.training import train
with joined("cpu") as (ranks, device):
    states = []
    training = train(EXACT, load_scans(None, None), ranks=ranks, on_state=states.append)
    torch.save((training.network.state_dict(), training.epochs[-1].train_loss), f"{sys.argv[1]}/{ranks.number}.pt")
    assert len(states[0]["random"]) == ranks.size
"""


def torchrun(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_two_processes_make_the_weights_that_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    done = torchrun("together.py", tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(digits.network, "DROPOUT", 0.0)
    alone = train(EXACT, load_scans(tmp_path, False))
    for number in range(2):
        weights, _ = torch.load(tmp_path / f"{number}.pt", weights_only=False)
        for key, expected in alone.network.state_dict().items():
            # The same but for the order in which floating-point numbers are added.
            torch.testing.assert_close(weights[key], expected, rtol=1e-3, atol=1e-4)


def test_the_command_trains_in_two_processes_and_one_of_them_tells(tmp_path: Path) -> None:
    flags = ["--dataset", "sklearn", "--epochs", "2", "--validation-size", "200", "--learning-rate", "0.05"]
    done = torchrun("-m", "trainer", "--out", "run", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" 1/2 ") == done.stdout.count("test accuracy") == 1
    assert (tmp_path / "run" / "mnist_model.pth").is_file()
    again = torchrun("-m", "trainer", "--resume", "run", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    other = torchrun("-m", "trainer", "--out", "run", *flags, folder=tmp_path)
    assert other.returncode == 1
    assert "holds a run already" in other.stderr


@pytest.mark.parametrize(("size", "rows"), [(1, 7), (2, 7), (3, 7), (4, 4)])
def test_every_row_belongs_to_one_process(size: int, rows: int) -> None:
    every = torch.arange(rows)
    ranks = [Ranks(number, size) for number in range(size)]
    assert sorted(torch.cat([rank.share(every) for rank in ranks]).tolist()) == every.tolist()
    assert sum(rank.count(rows) for rank in ranks) == rows


def test_nobody_goes_without_a_row() -> None:
    assert [len(Ranks(number, 4).share(torch.arange(2))) for number in range(4)] == [1, 1, 1, 1]


def test_alone_nothing_is_exchanged() -> None:
    alone = Ranks()
    assert alone.is_first
    assert alone.mean(3.5) == 3.5
    assert torch.equal(alone.agreed(torch.arange(3)), torch.arange(3))
    assert dataclasses.astuple(alone) == (0, 1)
