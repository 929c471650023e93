"""Each value has a rule; an error names the flag, the rule and the value."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from trainer.flags import settings_of, training_parser
from trainer.settings import InvalidSetting, TrainingSettings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("architecture", "LeNet", "--architecture is one of ImprovedNN.*, not LeNet"),
        ("epochs", 0, "--epochs is 1 or more, not 0"),
        ("batch_size", 0, "--batch-size is 1 or more, not 0"),
        ("learning_rate", 0.0, "--learning-rate is a finite number above 0, not 0.0"),
        ("learning_rate", math.nan, "--learning-rate is a finite number above 0, not nan"),
        ("learning_rate", math.inf, "--learning-rate is a finite number above 0, not inf"),
        ("warmup_epochs", -1.0, "--warmup-epochs is a finite number of 0 or more, not -1.0"),
        ("momentum", 1.0, "--momentum is from 0 to below 1, not 1.0"),
        ("momentum", -0.1, "--momentum is from 0 to below 1, not -0.1"),
        ("weight_decay", -1e-4, "--weight-decay is a finite number of 0 or more, not -0.0001"),
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
            "yes"
            if field.name == "augment"
            else format(field.default, "g" if isinstance(field.default, (int, float)) else "")
        )
        assert field.name in ("architecture", "device") or f"(default: {default})" in manual


def test_flags_set_what_they_say() -> None:
    options = training_parser().parse_args(["--epochs", "3", "--no-augment", "--learning-rate", "1e-2", "--seed", "9"])
    assert settings_of(options) == TrainingSettings(epochs=3, augment=False, learning_rate=0.01, seed=9)
