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
from trainer import cli
from trainer.cli import main
from trainer.data import Data
from trainer.settings import settings_from
from trainer.training import validation_size_for

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
    assert "Perhaps no server takes it: a model has to read 90% of the server's own test digits." in done.stdout
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
def pictures(tmp_path: Path) -> Path:
    """Of three classes that are no digits, 40 in all."""
    for number in range(40):
        path = tmp_path / "pictures" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("L", (28, 28))
        picture.paste(200 + number, (8, 4, 11 + number % 3 * 4, 24))
        picture.save(path)
    return tmp_path / "pictures"


def of_letters(path: Path, labels: str) -> Path:
    save_checkpoint(path, ImprovedNN(), Manifest(labels=(*labels, *[""] * (10 - len(labels)))))
    return path


def test_of_few_images_a_tenth_is_held_back_and_the_run_holds_the_number(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = ["--dataset", f"folder:{pictures}", "--teacher", "none", "--epochs", "1", "--batch-size", "8"]
    assert main([*flags, "--out", str(out)]) == 0
    images = load_checkpoint(out / "mnist_model.pth").manifest.training["images"]
    assert images["validation"] == (images["train"] + images["validation"]) // 10 >= 1
    assert settings_from(out / "settings.toml").validation_size == images["validation"]
    assert main(["--resume", str(out)]) == 0

    assert main([*flags, "--out", str(tmp_path / "other"), "--validation-size", "5000"]) == 1
    assert "--validation-size is below the number of training images" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("images", "held_back"), [(60_000, 5000), (1438, 143), (40, 4), (3, 1)])
def test_mnist_keeps_its_validation_images(images: int, held_back: int) -> None:
    assert validation_size_for(images) == held_back


def test_a_teacher_of_other_things_is_refused(
    tmp_path: Path, pictures: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = of_letters(tmp_path / "letters.pth", "abcd")
    teachers = f"{letters}, {weights}"
    out = tmp_path / "run"
    assert main(["--dataset", f"folder:{pictures}", "--teacher", teachers, "--out", str(out)]) == 1
    message = f"the data set, a, b, c (pictures), and {weights} has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_weights_are_not_measured_on_other_things(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["evaluate", "--dataset", f"folder:{pictures}", "--weights"]
    assert main([*evaluate, str(of_letters(tmp_path / "letters.pth", "abcd"))]) == 0
    other = of_letters(tmp_path / "other.pth", "acb")
    capsys.readouterr()
    assert main([*evaluate, str(other)]) == 1
    message = f"the classes of {other} are a, c, b, and those of pictures are a, b, c; --dataset names the data set"
    assert message in capsys.readouterr().err


def test_a_model_of_another_number_of_classes_neither_teaches_nor_is_measured(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tuple(f"{number:02}" for number in range(40))
    path = tmp_path / "other.pth"
    save_checkpoint(path, ImprovedNN(40), Manifest(labels=("a", "b", "c", *labels[3:])))
    data = ["--dataset", f"folder:{pictures}"]
    assert main([*data, "--teacher", str(path), "--out", str(tmp_path / "run")]) == 1
    told = ", ".join(["a", "b", "c", *labels[3:30]])
    assert f"the data set, a, b, c (pictures), and {path} has {told} and 10 more" in capsys.readouterr().err
    assert main(["evaluate", *data, "--weights", str(path)]) == 1
    assert f"the classes of {path} are {told} and 10 more, and those of pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("named", "read"),
    [
        ("", "mnist"),
        ("MNIST", "mnist"),
        ("FashionMNIST", "fashion-mnist"),
        ("EMNIST", "emnist-digits"),
        ("EMNIST Letters", "emnist-letters"),
        ("my", "mnist"),
    ],
)
def test_evaluation_takes_the_data_set_that_the_manifest_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_data: Data, named: str, read: str
) -> None:
    asked: list[str] = []

    def load(dataset: str, *_: object) -> Data:
        asked.append(dataset)
        return digits_data

    monkeypatch.setattr(cli, "load_data", load)
    save_checkpoint(tmp_path / "x.pth", ImprovedNN(), Manifest(dataset=named))
    assert main(["evaluate", "--weights", str(tmp_path / "x.pth")]) == 0
    assert main(["evaluate", "--weights", str(tmp_path / "x.pth"), "--dataset", "qmnist"]) == 0
    assert asked == [read, "qmnist"]


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
        (["--threads", "0"], "--threads is from 1 to 1024, not 0"),
        (["--threads", "1000000000000"], "--threads is from 1 to 1024, not 1000000000000"),
        (["evaluate", "--weights", "w.pth", "--threads", "1025"], "--threads is from 1 to 1024, not 1025"),
        (["--warmup-epochs", "1e308"], "--warmup-epochs is from 0 to 1000000, not 1e+308"),
        (["--out", ""], "--out: takes a path, not ''"),
        (["promote", "run", "--to", "x.pth", "--tolerance", "nan"], "--tolerance is from 0 to 1, not nan"),
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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--help"], "With the defaults that takes an hour or more on one core."),
        (
            ["--help"],
            "python -m trainer evaluate --help, python -m trainer card --help, python -m trainer promote --help",
        ),
        (["evaluate", "--help"], "Measure weights on the test images of a data set"),
        (["evaluate", "--help"], "write evaluation.json, report.html and its pictures to this folder"),
        (
            ["evaluate", "--help"],
            "(default: the one that the weights' manifest names, if it is one of these, else mnist)",
        ),
    ],
)
def test_the_manual_tells_what_is_so(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert told in " ".join(capsys.readouterr().out.split())


def test_importing_every_module_prints_nothing_and_starts_nothing() -> None:
    modules = "trainer.cli, trainer.report"
    code = f"import {modules}, threading, sys; print(threading.active_count(), 'torchvision' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "--nonsense"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "1 False\n"), done.stderr
