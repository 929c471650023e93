"""New weights take the place of others only if they are no worse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from digits.checkpoint import InvalidCheckpoint, Manifest, load_checkpoint, manifest_path, save_checkpoint
from digits.network import ImprovedNN
from trainer.cli import main
from trainer.promotion import NotPromoted, promote
from trainer.settings import InvalidSetting


def weights(
    path: Path, accuracy: float | None, dataset: str = "MNIST", labels: tuple[str, ...] = Manifest.labels
) -> Path:
    save_checkpoint(path, ImprovedNN(), Manifest(test_accuracy=accuracy, dataset=dataset, labels=labels))
    return path


@pytest.mark.parametrize(("new", "old", "tolerance"), [(0.99, 0.98, 0), (0.98, 0.98, 0), (0.979, 0.98, 0.002)])
def test_weights_that_are_no_worse_take_the_place(new: float, old: float, tolerance: float, tmp_path: Path) -> None:
    candidate, in_place = weights(tmp_path / "new.pth", new), weights(tmp_path / "old.pth", old)
    before = load_checkpoint(in_place).version
    promoted, replaced = promote(candidate, in_place, tolerance)
    assert in_place.read_bytes() == candidate.read_bytes()
    assert load_checkpoint(in_place).manifest == load_checkpoint(candidate).manifest
    assert replaced is not None
    assert (promoted.version, replaced.version) == (load_checkpoint(candidate).version, before)


@pytest.mark.parametrize(
    ("new", "old", "message"),
    [
        ((0.979, "MNIST"), (0.98, "MNIST"), r"98.00% or more is asked for, this model has 97.90%.*--force"),
        ((None, "MNIST"), (0.98, "MNIST"), "gives no test accuracy"),
        ((0.99, "FashionMNIST"), (0.98, "MNIST"), "on FashionMNIST and on MNIST cannot be compared"),
    ],
)
def test_others_do_not_unless_forced(
    new: tuple[float | None, str], old: tuple[float, str], message: str, tmp_path: Path
) -> None:
    candidate, in_place = weights(tmp_path / "new.pth", *new), weights(tmp_path / "old.pth", *old)
    before = in_place.read_bytes(), manifest_path(in_place).read_bytes()
    with pytest.raises(NotPromoted, match=message):
        promote(candidate, in_place)
    assert (in_place.read_bytes(), manifest_path(in_place).read_bytes()) == before
    promote(candidate, in_place, force=True)
    assert in_place.read_bytes() == candidate.read_bytes()


@pytest.mark.parametrize("has_manifest", [True, False])
def test_other_classes_do_not_take_the_place_of_digits(has_manifest: bool, tmp_path: Path) -> None:
    letters = weights(tmp_path / "new.pth", 0.99, labels=tuple("abcdefghij"))
    in_place = weights(tmp_path / "old.pth", 0.9)
    if not has_manifest:
        manifest_path(in_place).unlink()
    with pytest.raises(NotPromoted, match=r"are a, b, .*, and those of the one in place are 0, 1, .*--force"):
        promote(letters, in_place)
    promote(letters, in_place, force=True)
    assert load_checkpoint(in_place).manifest.labels == tuple("abcdefghij")


@pytest.mark.parametrize("tolerance", [math.nan, math.inf, 5, -1])
def test_a_tolerance_is_a_share(tolerance: float, tmp_path: Path) -> None:
    new = weights(tmp_path / "new.pth", 0.1)
    with pytest.raises(InvalidSetting, match=f"--tolerance is from 0 to 1, not {tolerance}"):
        promote(new, tmp_path / "old.pth", tolerance)
    assert not (tmp_path / "old.pth").exists()


def test_weights_do_not_go_where_their_manifest_belongs(tmp_path: Path) -> None:
    new = weights(tmp_path / "new.pth", 0.9)
    with pytest.raises(InvalidSetting, match=r"--to is the path of a weights file.*, not .*old\.json"):
        promote(new, tmp_path / "old.json")
    assert not (tmp_path / "old.json").exists()


def test_a_bare_state_dict_gets_a_manifest_of_its_own(tmp_path: Path) -> None:
    in_place = weights(tmp_path / "old.pth", 0.98)
    torch.save(ImprovedNN().state_dict(), tmp_path / "bare.pth")
    promote(tmp_path / "bare.pth", in_place, force=True)
    promoted = load_checkpoint(in_place)
    assert promoted.manifest.test_accuracy is None, "the old manifest is gone"
    assert promoted.manifest.sha256 == promoted.sha256


def test_broken_weights_are_not_promoted_nor_taken_for_a_measure(tmp_path: Path) -> None:
    good, broken = weights(tmp_path / "good.pth", 0.99), tmp_path / "broken.pth"
    broken.write_bytes(b"no weights")
    for new, to in ((broken, good), (good, broken)):
        with pytest.raises(InvalidCheckpoint, match=r"broken\.pth"):
            promote(new, to)
    promote(good, broken, force=True)
    assert broken.read_bytes() == good.read_bytes()


def test_the_command_takes_the_folder_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, to = tmp_path / "run", tmp_path / "served" / "mnist_model.pth"
    new = weights(run / "mnist_model.pth", 0.99)
    assert main(["promote", str(run), "--to", str(to)]) == 0
    version = load_checkpoint(new).version
    assert capsys.readouterr().out == f"{to}: version {version}, test accuracy 99.00%\n"
    weights(run / "mnist_model.pth", 0.5)
    assert main(["promote", str(run), "--to", str(to)]) == 1
    assert load_checkpoint(to).version == version
    weights(run / "mnist_model.pth", 0.991)
    assert main(["promote", str(run), "--to", str(to)]) == 0
    assert capsys.readouterr().out.endswith(f"in place of {version}\n")
