"""Processes that train together make what one process makes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from digits.checkpoint import load_checkpoint
from tests.trainer.conftest import draw_bars
from trainer.cli import main
from trainer.data import Data, DataError
from trainer.material import Material
from trainer.ranks import Ranks
from trainer.settings import InvalidSetting, TrainingSettings
from trainer.training import train

pytestmark = pytest.mark.timeout(300)  # starts of several processes, which all tests but the first find done

ROOT = Path(__file__).parents[2]

EXACT = TrainingSettings(
    epochs=2,
    batch_size=61,
    learning_rate=0.005,
    momentum=0,
    validation_size=101,
    warmup_epochs=0.5,
    normalise=False,
    bfloat16=False,
    augment=False,
    drawn=0,
    outliers=0,
    damaged=0,
)
"""Nothing in it is drawn by each process for itself. The numbers of images are odd, so that shares differ."""

FLAGS = ["--dataset", "folder:pictures", "--validation-size", "15", "--epochs", "2", "--lessons", "1"]

TOGETHER = """
import contextlib, dataclasses, sys
import torch
from tests.trainer.test_ranks import EXACT, FLAGS
from trainer import cli
from trainer.ranks import joined
from trainer.training import train

torch.set_num_threads(1)
folder = sys.argv[1]
with joined() as ranks:
    data = torch.load(f"{folder}/data.pt", weights_only=False)
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

    cli.joined = lambda: contextlib.nullcontext(ranks)  # one start for all that these processes do
    for arguments in (["--out", "run", *FLAGS], ["--resume", "stopped"]):
        if status := cli.main(arguments):
            sys.exit(status)
"""
"""What two processes do that are not disturbed: trainings by the function, then by the command one that is whole and
one that had been stopped."""

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


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=150)
    finally:
        process.terminate()  # if it hangs; torchrun then ends its processes
    return process.returncode, out, err


def torchrun(*arguments: str | Path, folder: Path) -> tuple[int, str, str]:
    return finished(start(*arguments, folder=folder))


@pytest.fixture(scope="module")
def few(digits_data: Data) -> Data:
    return Data(digits_data.train[:500], digits_data.test[:100])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of a pupil whose teacher is trained first, of pictures, stopped by Ctrl-C; and what was said then."""
    folder = tmp_path_factory.mktemp("together")
    draw_bars(folder / "pictures", 80)
    process = start("-m", "trainer", "--out", "stopped", *FLAGS, folder=folder)
    assert process.stdout is not None
    for line in process.stdout:
        if " 1/2 " in line:
            break
    process.send_signal(signal.SIGINT)
    return folder / "stopped", finished(process)[2]


@pytest.fixture(scope="module")
def whole(stopped: tuple[Path, str], few: Data) -> Path:
    """What `TOGETHER` makes: a run as the one that was stopped, and the end of that one."""
    folder = stopped[0].parent
    (folder / "together.py").write_text(TOGETHER)
    torch.save(few, folder / "data.pt")
    status, out, err = torchrun("together.py", folder, folder=folder)
    assert status == 0, err
    out = out[: out.index("--weights run/mnist_model.pth")]
    assert out.count(" 1/2 ") == out.count(" 2/2 ") == out.count("test accuracy") == 2, "the teacher's and the pupil's"
    return folder / "run"


def test_two_processes_make_the_weights_that_one_makes_and_go_on_to_the_same(few: Data, whole: Path) -> None:
    alone = train(EXACT, few)
    losses = [(epoch.train_loss, epoch.validation_loss) for epoch in alone.epochs]
    made = [torch.load(whole.parent / f"{number}.pt", weights_only=True) for number in range(2)]
    for process in made:
        # The same but for the order in which floating-point numbers are added, of which the steps make little here.
        torch.testing.assert_close(process["exact"], alone.network.state_dict(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.tensor(process["losses"]), torch.tensor(losses), rtol=1e-3, atol=1e-4)
        assert process["processes"] == 2
        for name in ("whole", "resumed"):  # also where each process draws for itself
            assert all(torch.equal(process[name][key], made[0]["whole"][key]) for key in made[0]["whole"])


def test_the_command_trains_teacher_and_pupil_in_two_processes_of_which_one_tells(whole: Path) -> None:
    teacher, pupil = (load_checkpoint(whole / at / "mnist_model.pth") for at in ("teacher", "."))
    assert (teacher.manifest.architecture, pupil.manifest.architecture) == ("CNN", "ImprovedNN")
    assert pupil.manifest.training["settings"]["teacher"] == [f"CNN {teacher.version}"]
    assert pupil.manifest.training["processes"] == 2
    assert json.loads((whole / "run.json").read_text())["processes"] == 2


def test_two_processes_go_on_after_ctrl_c_and_no_other_number_does(
    stopped: tuple[Path, str], whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, err = stopped
    assert err.count("interrupted; what was learnt up to the last whole epoch is kept") == 1, err
    assert "-m trainer --resume stopped --data-dir data" in err
    for name in ("teacher/mnist_model.pth", "mnist_model.pth"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()

    monkeypatch.chdir(run.parent)
    assert main(["--resume", "stopped"]) == 1
    message = "is a run of 2 processes that train together; it goes on with as many, not with 1"
    assert message in capsys.readouterr().err


def test_an_error_of_the_first_ends_all_and_is_told_once(tmp_path: Path) -> None:
    status, _, err = torchrun("-m", "trainer", "--resume", "nowhere", folder=tmp_path)
    assert status == 1
    assert err.count("error: --resume takes the folder of a run") == 1, err


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


def test_too_few_images_for_so_many_processes_are_refused(digits_data: Data) -> None:
    settings = TrainingSettings(batch_size=6)
    with pytest.raises(DataError, match="a step of 6 images is too small for 7 processes"):
        Material(dataclasses.replace(settings, normalise=False), digits_data.train, False, Ranks(0, 7))
    with pytest.raises(DataError, match="2 or more images a step for each of 4 processes, and 1500 give one of 1"):
        Material(settings, digits_data.train, False, Ranks(3, 4))


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_processes_cannot_share_one_gpu(device: str) -> None:
    with pytest.raises(InvalidSetting, match=f"--device is cpu or cuda for several processes, .*, not {device}"):
        Ranks(1, 2, 1).use(device)
    assert Ranks().use(device) == device
