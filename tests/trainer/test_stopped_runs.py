"""Whatever a kill, Ctrl-C or a damaged disk left in a run's folder: it goes on, or says what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from digits.checkpoint import load_checkpoint
from tests.trainer.conftest import draw_bars
from trainer import cli, report
from trainer.cli import main
from trainer.run import Run

Resume = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is over, of a pupil whose teacher was trained first, of pictures in a folder."""
    folder = tmp_path_factory.mktemp("stopped")
    draw_bars(folder / "pictures", 60)
    flags = ["--epochs", "2", "--lessons", "1", "--validation-size", "10", "--batch-size", "32", "--no-augment"]
    assert main(["--dataset", f"folder:{folder / 'pictures'}", "--out", str(folder / "whole"), *flags]) == 0
    return folder / "whole"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def resume(run: Path, capsys: pytest.CaptureFixture[str]) -> Resume:
    """Go on; return the exit status and all that was said."""

    def call(*flags: str, at: Path = run) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["--resume", str(at), *flags])
        out, err = capsys.readouterr()
        return status, out + err

    return call


def same_weights(run: Path, whole: Path) -> bool:
    names = ("mnist_model.pth", "teacher/mnist_model.pth")
    return all((run / name).read_bytes() == (whole / name).read_bytes() for name in names)


def remove_results(folder: Path) -> None:
    """As before a training's end: only what it was told, and its state."""
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("settings.toml", "run.json", "state.pt", "metrics.jsonl"):
            path.unlink()


def test_a_teachers_folder_that_was_only_made_is_begun_anew(run: Path, whole: Path, resume: Resume) -> None:
    remove_results(run)
    (run / "state.pt").unlink()
    shutil.rmtree(run / "teacher")
    (run / "teacher").mkdir()
    assert resume()[0] == 0
    assert same_weights(run, whole)


@pytest.mark.parametrize("last", ["mnist_model.pth", "mnist_model.json"])
def test_a_teachers_results_are_written_again_where_the_last_are_missing(
    run: Path, whole: Path, resume: Resume, last: str
) -> None:
    """The weights are written first, then their manifest, then pictures, and last the figures."""
    kept = {name: (run / "teacher" / name).read_bytes() for name in ("mnist_model.pth", last)}
    remove_results(run)
    remove_results(run / "teacher")
    for name, content in kept.items():
        (run / "teacher" / name).write_bytes(content)
    assert not Run.go_on(run / "teacher").is_complete
    status, said = resume()
    assert status == 0, said
    assert same_weights(run, whole)
    assert load_checkpoint(run / "teacher" / "mnist_model.pth").manifest.architecture == "CNN"
    assert (run / "teacher" / "report.html").is_file()


def test_what_a_kill_left_of_files_is_put_right(run: Path, resume: Resume) -> None:
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics.splitlines(keepends=True)[0])
    for name in (".state.pt.abcd1234", ".mnist_model.pth.x_y_z_12", ".hidden", ".state.pt.of-mine"):
        (run / name).write_bytes(b"a part")
    assert resume()[0] == 0
    assert (run / "metrics.jsonl").read_text() == metrics
    assert sorted(path.name for path in run.glob(".*")) == [".hidden", ".state.pt.of-mine"]


@pytest.mark.parametrize("where", ["draw_confusion", "draw_curves"])
def test_ctrl_c_while_results_are_drawn_says_how_to_go_on(
    run: Path, whole: Path, resume: Resume, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def stop(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, where, stop)
        status, said = resume("--data-dir", "some data", "--no-download")
    assert status == 130
    lines = said.splitlines()
    assert lines[-2].endswith("interrupted; what was learnt up to the last whole epoch is kept. Go on:")
    assert lines[-1] == f"python -m trainer --resume {run} --data-dir 'some data' --no-download"
    assert resume()[0] == 0
    assert same_weights(run, whole)


def test_ctrl_c_before_a_run_is_begun_tells_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_data", stop)
    assert main(["--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "\npython -m trainer: interrupted\n"
    assert not (tmp_path / "run").exists()


def other_torch_file(state: Path) -> None:
    torch.save({"fc1.weight": torch.zeros(2)}, state)


def other_network(state: Path) -> None:
    shutil.copy(state.parent / "teacher" / "state.pt", state)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.write_bytes(b""),
        lambda state: state.write_bytes(state.read_bytes()[:1000]),
        lambda state: torch.save([1, 2], state),
        other_torch_file,
        other_network,
    ],
)
def test_a_state_that_is_none_is_named_with_what_to_do(
    run: Path, whole: Path, resume: Resume, spoil: Callable[[Path], object]
) -> None:
    spoil(run / "state.pt")
    status, said = resume()
    assert status == 1
    assert f"{run / 'state.pt'} is damaged, or no state of this training (" in said
    assert said.endswith("delete it, and --resume trains from the beginning\n")


@pytest.mark.parametrize("content", ["", '{"threads": 1, "da', "[]", '{"threads": 1}', None])
def test_a_damaged_run_json_is_named_with_what_to_do(run: Path, resume: Resume, content: str | None) -> None:
    (run / "run.json").unlink()
    if content is not None:
        (run / "run.json").write_text(content)
    status, said = resume()
    assert status == 1
    assert f"error: {run / 'run.json'} is damaged or missing (" in said
    assert f"begin another one, by --config {run / 'settings.toml'}" in said


def test_a_file_is_no_run(run: Path, resume: Resume) -> None:
    status, said = resume(at=run / "mnist_model.pth")
    assert status == 1
    assert "--resume takes the folder of a run, with settings.toml in it, not" in said


def test_damaged_settings_are_named(run: Path, resume: Resume) -> None:
    (run / "settings.toml").write_text("epochs = ")
    status, said = resume()
    assert status == 1
    assert f"{run / 'settings.toml'} is a TOML file of settings" in said


def test_a_teacher_by_path_is_checked(run: Path, whole: Path, tmp_path: Path, resume: Resume) -> None:
    teacher = tmp_path / "teacher.pth"
    for suffix in (".pth", ".json"):
        shutil.copy(whole / "teacher" / f"mnist_model{suffix}", teacher.with_suffix(suffix))
    flags = ["--dataset", f"folder:{whole.parent / 'pictures'}", "--epochs", "1", "--lessons", "1"]
    taught = tmp_path / "taught"
    both = f"{whole / 'teacher' / 'mnist_model.pth'}, {teacher}"
    assert main(["--teacher", both, "--out", str(taught), "--validation-size", "10", *flags]) == 0
    sha256 = load_checkpoint(teacher).sha256
    assert json.loads((taught / "run.json").read_text())["teachers"] == [sha256, sha256]
    assert resume(at=taught)[0] == 0

    for suffix in (".pth", ".json"):
        shutil.copy(whole / f"mnist_model{suffix}", teacher.with_suffix(suffix))
    status, said = resume(at=taught)
    assert status == 1
    assert f"was begun with another teacher in {teacher}: SHA-256 {sha256[:12]}…, not " in said


def test_the_number_of_threads_is_the_runs_own(
    run: Path, resume: Resume, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["threads"] == 1
    (run / "run.json").write_text(json.dumps(record | {"threads": 2}))
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    assert resume()[0] == resume("--threads", "2")[0] == 0
    assert used == [2, 2]
    with pytest.raises(SystemExit):
        resume("--threads", "1")
    assert "--resume goes on as begun, with --threads 2, not 1" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["best", "origin"])
def test_a_recipe_is_refused_whatever_it_was(run: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--resume", str(run), "--recipe", recipe])
    assert "no --out, --config or --recipe" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mnist_model.pth", "curves.png", "events.out.tfevents.*", "metrics.json"])
def test_a_full_disk_is_told_with_the_file_that_found_it_full(
    run: Path, whole: Path, resume: Resume, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write = os.replace

    def replace(source: str, target: Path) -> None:
        if target.match(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        status, said = resume()
    assert status == 1
    assert re.search(rf"error: .*No space left on device: '{re.escape(str(run))}/{name.replace('*', '.*')}'", said)
    assert [*run.glob("events.out.tfevents.*")], "the old ones stay until the new ones are there"
    assert resume()[0] == 0
    assert same_weights(run, whole)
    assert len([*run.glob("events.out.tfevents.*")]) == 1


def test_a_temperature_at_its_limit_is_told(resume: Resume, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "Confidences say little: the temperature is at its limit, for it has to be from 0.1 to 10."
    for temperature, is_told in ((9.9995, True), (0.1, True), (1.0, False)):
        monkeypatch.setattr(cli, "fit_temperature", lambda *_, at=temperature: at)
        assert (line in resume()[1]) is is_told
