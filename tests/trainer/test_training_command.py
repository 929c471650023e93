"""The command line from end to end, on a tiny made data set."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from digits.checkpoint import Manifest, load_checkpoint, save_checkpoint
from digits.network import ImprovedNN
from trainer.cli import main

ROOT = Path(__file__).parents[2]
WriteMnist = Callable[..., dict[str, np.ndarray]]
QUICK = ["--teacher", "none", "--epochs", "2", "--batch-size", "8", "--validation-size", "10", "--no-download"]


def python_m_trainer(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.usefixtures("torchvision")
def test_training_from_a_shell_writes_a_model_that_loads_and_says_how_to_serve_it(
    tmp_path: Path, write_mnist: WriteMnist
) -> None:
    write_mnist(tmp_path / "data", ".gz")
    done = python_m_trainer("--out", "out dir", *QUICK, cwd=tmp_path)  # --data-dir is `data` by default
    assert done.returncode == 0, done.stderr
    assert "steps" not in done.stderr, "no progress bar where stderr is no terminal"
    assert " 1/2 " in done.stdout
    assert " 2/2 " in done.stdout
    assert done.stdout.rstrip().endswith("mnist-grpc-server --weights 'out dir/mnist_model.pth'")
    out = tmp_path / "out dir"
    files = {path.name for path in out.iterdir()}
    assert {name for name in files if not name.startswith("events.out.tfevents.")} == {
        "calibration.png",
        "confusion.png",
        "coverage.png",
        "curves.png",
        "metrics.json",
        "metrics.jsonl",
        "mistakes.png",
        "mnist_model.json",
        "mnist_model.pth",
        "report.html",
        "run.json",
        "settings.toml",
        "state.pt",
    }

    # As any other torch program would load it.
    weights = torch.load(out / "mnist_model.pth", weights_only=True)
    assert list(weights) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias"]
    ImprovedNN().load_state_dict(weights)

    # As the server does.
    checkpoint = load_checkpoint(out / "mnist_model.pth")
    manifest = checkpoint.manifest
    assert manifest.sha256 == hashlib.sha256((out / "mnist_model.pth").read_bytes()).hexdigest()
    assert (manifest.architecture, manifest.dataset) == ("ImprovedNN", "MNIST")
    assert (manifest.mean, manifest.std) == (0.5, 0.5)
    assert 0.1 <= manifest.temperature <= 10
    training = manifest.training
    assert training["seed"] == 1
    assert training["settings"]["epochs"] == 2
    assert training["images"] == {"train": 30, "validation": 10, "test": 20}
    assert training["versions"]["torch"] == torch.__version__
    assert manifest.test_accuracy == training["test_correct"] / 20
    assert str(tmp_path) not in (out / "mnist_model.json").read_text()

    metrics = json.loads((out / "metrics.json").read_text())
    assert [epoch["number"] for epoch in metrics["epochs"]] == [1, 2]
    assert np.sum(metrics["test"]["confusion"]) == metrics["test"]["total"] == 20
    assert metrics["test"]["accuracy"] == manifest.test_accuracy
    assert [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] == metrics["epochs"]
    report = (out / "report.html").read_text()
    for name in ("curves", "confusion", "mistakes", "calibration", "coverage"):
        content = (out / f"{name}.png").read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            assert min(picture.size) > 250
        assert base64.b64encode(content).decode() in report
    assert manifest.sha256 in report

    events = EventAccumulator(str(out)).Reload()
    assert [event.step for event in events.Scalars("validation_accuracy")] == [1, 2]


def test_by_default_a_teacher_is_trained_first_in_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", "sklearn", "--epochs", "2", "--validation-size", "300"]
    out = tmp_path / "run"
    assert main(["--out", str(out), *flags]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" 1/2 ") == shown.count(" 2/2 ") == shown.count("test accuracy") == 2
    teacher = load_checkpoint(out / "teacher" / "mnist_model.pth")
    assert teacher.manifest.architecture == "CNN"
    pupil = load_checkpoint(out / "mnist_model.pth")
    assert pupil.manifest.architecture == "ImprovedNN"
    assert pupil.manifest.training["settings"]["teacher"] == [f"CNN {teacher.version}"]

    # The teacher is there already, and the pupil over: nothing is learnt anew.
    assert main(["--resume", str(out)]) == 0
    assert load_checkpoint(out / "mnist_model.pth").sha256 == pupil.sha256
    (out / "state.pt").unlink()
    assert main(["--resume", str(out)]) == 0
    assert load_checkpoint(out / "mnist_model.pth").sha256 == pupil.sha256, "trained anew, by the same answers"

    named = ["--teacher", f"{out / 'teacher' / 'mnist_model.pth'}", "--out", str(tmp_path / "other"), *flags]
    assert main(named) == 0
    assert load_checkpoint(tmp_path / "other" / "mnist_model.pth").sha256 == pupil.sha256, "as by the same teacher"
    assert str(tmp_path) not in (tmp_path / "other" / "mnist_model.json").read_text()


@pytest.mark.parametrize("teacher", ["none.pth", "none.pth,other.pth"])
def test_a_teacher_that_is_none_is_named(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset", "sklearn", "--teacher", teacher, "--out", str(tmp_path / "run")]) == 1
    assert "none.pth" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights" / "mnist_model.pth"
    save_checkpoint(path, ImprovedNN(), Manifest())
    return path


@pytest.mark.usefixtures("torchvision")
def test_evaluation_prints_a_table_and_writes_nothing(
    tmp_path: Path, write_mnist: WriteMnist, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["evaluate", "--weights", str(weights), "--data-dir", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "of 20 images" in table
    assert [line.split()[:2] for line in table.splitlines()[-10:]] == [[str(digit), "2"] for digit in range(10)]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("torchvision")
def test_evaluation_speaks_json_and_writes_where_it_is_told(
    tmp_path: Path, write_mnist: WriteMnist, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path)
    out = tmp_path / "out"
    arguments = ["evaluate", "--weights", weights, "--data-dir", tmp_path, "--json", "--out", out]
    assert main([str(argument) for argument in arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert np.sum(record["confusion"]) == record["total"] == 20
    assert record["correct"] / 20 == record["accuracy"]
    assert record["version"] == load_checkpoint(weights).version
    assert json.loads((out / "evaluation.json").read_text()) == record
    assert (out / "confusion.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs is 1 or more, not 0"),
        (["train", "--epochs", "ten"], "--epochs: takes a whole number, not 'ten'"),
        (["--learning-rate", "fast"], "--learning-rate: takes a number, not 'fast'"),
        (["--momentum", "1"], "--momentum is from 0 to below 1, not 1.0"),
        (["--threads", "0"], "--threads is 1 or more, not 0"),
        (["--device", "tpu"], "--device: takes cpu, cuda, cuda:N or mps, not 'tpu'"),
        (["--device", "cuda:99"], "--device is one that torch can use here, not cuda:99: "),
        (["--architecture", "LeNet"], "invalid choice: 'LeNet'"),
        (["evaluate"], "--weights"),
        (["evaluate", "--weights", "w.pth", "--device", "tpu"], "--device: takes cpu, cuda, cuda:N or mps, not 'tpu'"),
        (["serve"], "unrecognized arguments: serve"),
        (["--config", "none.toml"], "--config is a TOML file, and there is none at none.toml"),
        (["--resume", "run", "--out", "other"], "no --out, --config or --recipe"),
        (["promote", "run"], "--to"),
    ],
)
def test_a_bad_flag_names_itself_its_rule_and_its_value(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("torchvision")
def test_missing_data_ends_with_one_message_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--data-dir", str(tmp_path / "none"), "--out", str(out), "--no-download"]) == 1
    assert "train-images-idx3-ubyte" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.usefixtures("torchvision")
def test_an_out_that_is_no_folder_is_refused_before_training(
    tmp_path: Path, write_mnist: WriteMnist, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["--data-dir", str(tmp_path), "--out", str(tmp_path / "file"), *QUICK])
    captured = capsys.readouterr()
    assert "--out is a folder that can be written to" in captured.err
    assert captured.out == ""


@pytest.mark.usefixtures("torchvision")
def test_training_that_diverges_leaves_no_weights(
    tmp_path: Path, write_mnist: WriteMnist, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path)
    out = tmp_path / "out"
    assert main(["--data-dir", str(tmp_path), "--out", str(out), "--learning-rate", "1e30", *QUICK]) == 1
    assert "--learning-rate" in capsys.readouterr().err
    assert not list(out.glob("mnist_model*"))


def test_weights_that_are_none_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.pth"
    assert main(["evaluate", "--weights", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"]])
def test_help_is_the_manual(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    manual = capsys.readouterr().out
    assert "--data-dir" in manual
    assert "(default: data)" in manual


def test_importing_every_module_prints_nothing_and_starts_nothing() -> None:
    modules = "trainer.cli, trainer.report"
    code = f"import {modules}, threading, sys; print(threading.active_count(), 'torchvision' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "--nonsense"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "1 False\n"), done.stderr
