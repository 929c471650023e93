"""Processes that train together make what one process makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from digits.checkpoint import load_checkpoint
from trainer.cli import main
from trainer.data import DataError
from trainer.datasets import load_scans
from trainer.material import Material
from trainer.ranks import Ranks
from trainer.settings import InvalidSetting, TrainingSettings
from trainer.training import train

ROOT = Path(__file__).parents[2]

EXACT = TrainingSettings(
    epochs=2,
    batch_size=61,
    learning_rate=0.005,
    momentum=0,
    validation_size=201,
    warmup_epochs=0.5,
    normalise=False,
    bfloat16=False,
    augment=False,
    drawn=0,
    outliers=0,
    damaged=0,
)
"""Nothing in it is drawn by each process for itself. The numbers of images are odd, so that shares differ."""

FLAGS = ["--dataset", "sklearn", "--validation-size", "1100", "--epochs", "3", "--lessons", "2", "--batch-size", "128"]

TOGETHER = """
import dataclasses, sys
import torch
from tests.trainer.test_ranks import EXACT
from trainer.datasets import load_scans
from trainer.ranks import joined
from trainer.training import train

torch.set_num_threads(1)
folder = sys.argv[1]
with joined() as ranks:
    data = load_scans(None, None)
    training = train(EXACT, data, ranks=ranks)

    states = []  # of a training in which all there is is drawn
    real = dataclasses.replace(EXACT, augment=True, drawn=0.15, outliers=0.1, damaged=0.2, dropout=0.2, normalise=True)
    def keep(state):
        torch.save(state, f"{folder}/state-{ranks.number}.pt")
        states.append(torch.load(f"{folder}/state-{ranks.number}.pt", weights_only=True))
    whole = train(real, data, ranks=ranks, on_state=keep)
    resumed = train(real, data, ranks=ranks, state=states[0])
    torch.save({
        "exact": training.network.state_dict(),
        "losses": [(epoch.train_loss, epoch.validation_loss) for epoch in training.epochs],
        "whole": whole.network.state_dict(),
        "resumed": resumed.network.state_dict(),
        "processes": 1 + len(states[0]["others"]),
    }, f"{folder}/{ranks.number}.pt")
"""

ONE_FAILS = """
from trainer.data import DataError
from trainer.ranks import joined

with joined() as ranks:
    if ranks.number == 1:
        raise DataError("the disk of this machine is empty")
    ranks.mean(1.0)
    print("went on")
"""


def start(*arguments: str | Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(*arguments: str | Path, folder: Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of two processes."""
    process = start(*arguments, folder=folder)
    out, err = process.communicate(timeout=110)
    return process.returncode, out, err


def test_two_processes_make_the_weights_that_one_makes_and_go_on_to_the_same(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    status, _, err = torchrun("together.py", tmp_path, folder=tmp_path)
    assert status == 0, err
    alone = train(EXACT, load_scans(tmp_path, False))
    losses = [(epoch.train_loss, epoch.validation_loss) for epoch in alone.epochs]
    made = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2)]
    for process in made:
        # The same but for the order in which floating-point numbers are added, of which the steps make little here.
        torch.testing.assert_close(process["exact"], alone.network.state_dict(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.tensor(process["losses"]), torch.tensor(losses), rtol=1e-3, atol=1e-4)
        assert process["processes"] == 2
        for name in ("whole", "resumed"):  # also where each process draws for itself
            assert all(torch.equal(process[name][key], made[0]["whole"][key]) for key in made[0]["whole"])


def test_the_command_goes_on_after_ctrl_c_and_one_process_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = torchrun("-m", "trainer", "--out", "whole", *FLAGS, folder=tmp_path)
    assert status == 0, err
    assert out.count(" 1/3 ") == out.count(" 3/3 ") == out.count("test accuracy") == 2, "the teacher's and the pupil's"
    teacher, pupil = (load_checkpoint(tmp_path / "whole" / at / "mnist_model.pth") for at in ("teacher", "."))
    assert pupil.manifest.training["settings"]["teacher"] == [f"CNN {teacher.version}"]
    assert pupil.manifest.training["processes"] == 2
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["processes"] == 2

    process = start("-m", "trainer", "--out", "run", *FLAGS, folder=tmp_path)
    assert process.stdout is not None
    while " 1/3 " not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err.count("interrupted; what was learnt up to the last whole epoch is kept") == 1, err
    assert "-m trainer --resume run --data-dir data" in err

    # The number of processes is part of what decides the weights.
    arguments = ["--resume", str(tmp_path / "run"), "--data-dir", str(tmp_path)]
    assert main(arguments) == 1
    assert "is a run of 2 processes that train together; it goes on with as many, not with 1" in capsys.readouterr().err

    status, out, err = torchrun("-m", "trainer", *arguments, folder=tmp_path)
    assert status == 0, err
    assert load_checkpoint(tmp_path / "run" / "teacher" / "mnist_model.pth").sha256 == teacher.sha256
    assert load_checkpoint(tmp_path / "run" / "mnist_model.pth").sha256 == pupil.sha256


def test_an_error_of_the_first_ends_all_and_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.toml").touch()
    status, _, err = torchrun("-m", "trainer", "--out", "run", *FLAGS, folder=tmp_path)
    assert status == 1
    assert err.count("error: run holds a run already") == 1, err


def test_an_error_that_all_make_is_told_once(tmp_path: Path) -> None:
    status, _, err = torchrun("-m", "trainer", *FLAGS, "--teacher", "none", "--batch-size", "3", folder=tmp_path)
    assert status == 1
    assert err.count("--normalise needs 2 or more images a step for each of 2 processes, and 337") == 1, err


def test_an_error_in_one_process_ends_the_other_which_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(ONE_FAILS)
    status, out, err = torchrun("fails.py", folder=tmp_path)
    assert status == 1
    assert err.count("DataError: the disk of this machine is empty") == 1, err
    assert "went on" not in out


@pytest.mark.parametrize(("size", "rows"), [(1, 7), (2, 7), (3, 7), (4, 4), (4, 2)])
def test_every_row_belongs_to_one_process(size: int, rows: int) -> None:
    ranks = [Ranks(number, size) for number in range(size)]
    shares = [rank.share(torch.arange(rows)) for rank in ranks]
    assert torch.cat(shares).tolist() == list(range(rows))
    assert [len(share) for share in shares] == [rank.count(rows) for rank in ranks]


def test_too_few_images_for_so_many_processes_are_refused() -> None:
    images = load_scans(Path(), False).train
    with pytest.raises(DataError, match="a step of 6 images is too small for 7 processes"):
        Material(TrainingSettings(batch_size=6, normalise=False), images, False, Ranks(0, 7))


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_processes_cannot_share_one_gpu(device: str) -> None:
    with pytest.raises(InvalidSetting, match=f"--device is cpu or cuda for several processes, .*, not {device}"):
        Ranks(1, 2, 1).use(device)
    assert Ranks().use(device) == device
