"""The card tells by which command it was made, and each model has a picture of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from digits.checkpoint import Checkpoint, Manifest, load_checkpoint, save_checkpoint
from digits.network import ARCHITECTURES
from trainer import cli, flags
from trainer.cli import main
from trainer.data import Data, LabelledPixels
from trainer.evaluation import evaluation_of, read
from trainer.measurement import Measurement


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, digits_data: Data) -> None:
    """Few images, and no figures but the accuracy."""

    def measure(checkpoint: Checkpoint, test: LabelledPixels, *_: object) -> Measurement:
        logits = read(checkpoint.network, test.pixels)
        result = evaluation_of(logits, test.labels)
        return Measurement(checkpoint, result, logits, 0.1, None, {}, {}, {}, {}, None, None, None)

    few = Data(digits_data.train, digits_data.test[:12])
    monkeypatch.setattr(cli, "load_data", lambda *_: few)
    monkeypatch.setattr(cli, "measure", measure)


def test_the_line_has_all_flags_and_models_of_one_architecture_have_pictures_of_their_own(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.pth", "two.pth", "cnn.pth")]
    for path, architecture in zip(paths, ("ImprovedNN", "ImprovedNN", "CNN"), strict=True):
        save_checkpoint(path, ARCHITECTURES[architecture](), Manifest(architecture=architecture))
    arguments = ["card", "--others", "kmnist", "--out", str(tmp_path / "out"), "--weights", *map(str, paths)]
    assert main(arguments) == 0
    card = (tmp_path / "out" / "model-card.md").read_text()
    command = "python -m trainer card --weights one.pth two.pth cnn.pth --others kmnist"
    assert f"\nWritten by `{command}`; do not edit.\n" in card
    versions = [load_checkpoint(path).version for path in paths[:2]]
    assert f"|  | ImprovedNN {versions[0]} | ImprovedNN {versions[1]} | CNN |" in card
    pictures = {f"mistakes-improvednn-{version}.png" for version in versions} | {"mistakes-cnn.png"}
    assert {path.name for path in (tmp_path / "out" / "pictures").iterdir()} == pictures
    assert all(f"(pictures/{name})" in card for name in pictures)


def test_by_default_the_servers_weights_are_measured_wherever_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["card"]) == 0
    card = (tmp_path / "docs" / "model-card.md").read_text()
    assert "\nWritten by `python -m trainer card`; do not edit.\n" in card
    assert "|  | ImprovedNN | CNN |" in card

    monkeypatch.setattr(flags, "EMBEDDED", missing := [tmp_path / "none.pth"])
    monkeypatch.setattr(cli, "EMBEDDED", missing)
    with pytest.raises(SystemExit):
        main(["card"])
    message = f"--weights names the files to measure; those of the server are not in {tmp_path}"
    assert message in capsys.readouterr().err
