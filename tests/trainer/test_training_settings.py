"""Each value has a rule; an error names the flag, the rule and the value."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from trainer.flags import settings_of, training_parser
from trainer.run import toml_of
from trainer.settings import RECIPES, InvalidSetting, TrainingSettings, settings_from


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("architecture", "LeNet", "--architecture is one of ImprovedNN.*, not LeNet"),
        ("epochs", 0, "--epochs is 1 or more, not 0"),
        ("batch_size", 0, "--batch-size is 1 or more, not 0"),
        ("learning_rate", 0.0, "--learning-rate is a finite number above 0, not 0.0"),
        ("learning_rate", math.nan, "--learning-rate is a finite number above 0, not nan"),
        ("learning_rate", math.inf, "--learning-rate is a finite number above 0, not inf"),
        ("warmup_epochs", -1.0, "--warmup-epochs is from 0 to 1000000, not -1.0"),
        ("warmup_epochs", 1e308, r"--warmup-epochs is from 0 to 1000000, not 1e\+308"),
        ("momentum", 1.0, "--momentum is from 0 to below 1, not 1.0"),
        ("momentum", -0.1, "--momentum is from 0 to below 1, not -0.1"),
        ("weight_decay", -1e-4, "--weight-decay is a finite number of 0 or more, not -0.0001"),
        ("dropout", 1.0, "--dropout is from 0 to below 1, not 1.0"),
        ("teacher", "", "--teacher is none, cnn, or the paths of weights files parted by commas, not ''"),
        ("lessons", 0, "--lessons is 1 or more, not 0"),
        ("softness", 0.0, "--softness is a finite number above 0, not 0.0"),
        ("taught", 1.1, "--taught is from 0 to 1, not 1.1"),
        ("drawn", -0.1, "--drawn is from 0 to below 1, not -0.1"),
        ("outliers", 0.9, "--outliers is below 1 together with --drawn, not 0.9"),
        ("damaged", 1.5, "--damaged is from 0 to 1, not 1.5"),
        ("validation_size", 0, "--validation-size is 1 or more, not 0"),
        ("patience", -1, r"--patience is 0 \(never stop early\) or more, not -1"),
        ("seed", -1, "--seed is from 0 to 2.63-1, not -1"),
        ("seed", 2**63, "--seed is from 0 to 2.63-1, not 9223372036854775808"),
        ("device", "tpu", "--device is cpu, cuda, cuda:N or mps, not tpu"),
    ],
)
def test_a_bad_value_names_the_flag_the_rule_and_the_value(name: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        TrainingSettings(**{name: value})


def test_the_flags_defaults_are_the_settings_defaults() -> None:
    assert settings_of(training_parser().parse_args([])) == TrainingSettings()


def test_every_setting_has_a_flag_and_the_manual_tells_its_default() -> None:
    manual = " ".join(training_parser().format_help().split())
    for field in dataclasses.fields(TrainingSettings):
        assert f"--{field.name.replace('_', '-')}" in manual
        default = (
            ("yes" if field.default else "no")
            if isinstance(field.default, bool)
            else format(field.default, "g" if isinstance(field.default, (int, float)) else "")
        )
        assert field.name in ("architecture", "device") or re.search(rf"\(default: {re.escape(default)}[,)]", manual)


def test_flags_set_what_they_say() -> None:
    options = training_parser().parse_args(["--epochs", "3", "--no-augment", "--learning-rate", "1e-2", "--seed", "9"])
    assert settings_of(options) == TrainingSettings(epochs=3, augment=False, learning_rate=0.01, seed=9)


def parsed(*arguments: str) -> TrainingSettings:
    return settings_of(training_parser().parse_args(arguments))


def test_flags_beat_the_file_which_beats_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("epochs = 7\nlearning_rate = 1  # a whole number is a number\nseed = 5\n")
    settings = parsed("--recipe", "origin", "--config", str(file), "--seed", "9")
    assert settings == TrainingSettings(**RECIPES["origin"] | {"epochs": 7, "learning_rate": 1.0, "seed": 9})
    assert type(settings.learning_rate) is float


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_written_as_toml_are_read_as_they_were(recipe: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(parsed("--recipe", recipe), weight_decay=1e-5, seed=2**62)
    (tmp_path / "settings.toml").write_text(toml_of(dataclasses.asdict(settings)))
    assert settings_from(tmp_path / "settings.toml") == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "epoch is no setting; there are architecture, normalise, "),
        ("epochs = 3.0", "epochs is a whole number, not 3.0"),
        ("epochs = true", "epochs is a whole number, not True"),
        ("momentum = '0.9'", "momentum is a number, not '0.9'"),
        ("augment = 1", "augment is true or false, not 1"),
        ("device = 1", "device is a text, not 1"),
        ("epochs = 0", "--epochs is 1 or more, not 0"),
        ("epochs", "is a TOML file of settings"),
        ("[training]\nepochs = 1", "training is no setting"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused_with_it(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InvalidSetting, match=message):
        settings_from(file)
