"""What can be chosen about a training, with the rule for each value.

The defaults are those of the weights that the server ships with. Knows nothing
of flags but their names, which its errors speak.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from digits.network import ARCHITECTURES

DEVICES = re.compile(r"cpu|mps|cuda(:\d+)?")


class InvalidSetting(ValueError):
    """A value breaks its rule; the message names the flag, the rule and the value."""


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides the weights, beside the data and the machine.

    Raises:
        InvalidSetting: a value breaks its rule.
    """

    # Network
    architecture: str = "ImprovedNN"
    """A name in `digits.network.ARCHITECTURES`."""

    normalise: bool = True
    """Whether to learn with batch normalisation, which the layers take up afterwards (`trainer.normalisation`)."""

    dropout: float = 0.0
    """Share of the values that the architecture's dropout leaves out in training; from 0 to below 1."""

    # Teacher
    teacher: str = "cnn"
    """`none`; `cnn`, which is trained first, by the recipe of that name; or weights files, parted by commas."""

    lessons: int = 24
    """Epochs of pictures for which the teacher's answers are collected; 1 or more."""

    softness: float = 2.0
    """The temperature at which teacher and pupil are compared; above 0."""

    taught: float = 0.9
    """The share of the loss that is the difference from the teacher; from 0 to 1."""

    # Optimiser: SGD with Nesterov's momentum
    epochs: int = 800
    """Passes over the training images; 1 or more."""

    batch_size: int = 256
    """Images a step; 1 or more."""

    learning_rate: float = 0.1
    """The highest, reached after the warm-up; above 0."""

    warmup_epochs: float = 1.0
    """Epochs in which the rate climbs to its highest; then it falls to 0 along a cosine."""

    momentum: float = 0.9
    """From 0 to below 1."""

    weight_decay: float = 1e-4
    """L2 penalty; 0 or more."""

    averaging: float = 0.9995
    """The weights that are kept are a running mean over the steps, which forgets all but this part at each; 0: none."""

    bfloat16: bool = True
    """Whether products are computed in bfloat16, twice as fast on a CPU or GPU that has it."""

    # Data
    dataset: str = "mnist"
    """A name in `trainer.datasets.DATASETS`, or `folder:PATH`."""

    drawn: float = 0.15
    """Share of each batch that is drawn by `trainer.handwriting`, if the data are digits; from 0 to below 1."""

    outliers: float = 0.1
    """Share of each batch that shows no digit (`trainer.outliers`), if the data are digits; from 0 to below 1."""

    damaged: float = 0.2
    """Share of the pictures that are damaged (`trainer.damage`); from 0 to 1."""

    augment: bool = True
    """Whether each image is turned, scaled, sheared, shifted, bent and written with another pen anew in every epoch."""

    standardise: bool = True
    """Whether to train on features of mean 0 and deviation 1 (`trainer.scaling`), in place of those that are served."""

    validation_size: int = 5000
    """Images held back from the training part to choose the best epoch; 1 or more."""

    # Run
    patience: int = 0
    """Epochs without a lower validation loss after which to stop; 0 never stops early."""

    seed: int = 1
    """Of the initial weights, the order, dropout and augmentation; 0 to 2^63-1."""

    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:N` or `mps`."""

    def __post_init__(self) -> None:
        def require(name: str, rule: str, holds: bool) -> None:
            if not holds:
                raise InvalidSetting(f"--{name.replace('_', '-')} is {rule}, not {getattr(self, name)}")

        require("architecture", f"one of {', '.join(ARCHITECTURES)}", self.architecture in ARCHITECTURES)
        require("epochs", "1 or more", self.epochs >= 1)
        require("batch_size", "1 or more", self.batch_size >= 1)
        require("learning_rate", "a finite number above 0", 0 < self.learning_rate < math.inf)
        require("warmup_epochs", "from 0 to 1000000", 0 <= self.warmup_epochs <= 1_000_000)
        require("momentum", "from 0 to below 1", 0 <= self.momentum < 1)
        require("weight_decay", "a finite number of 0 or more", 0 <= self.weight_decay < math.inf)
        require("averaging", "from 0 to below 1", 0 <= self.averaging < 1)
        require("dropout", "from 0 to below 1", 0 <= self.dropout < 1)
        if not all(part.strip() for part in self.teacher.split(",")):
            raise InvalidSetting(
                f"--teacher is none, cnn, or the paths of weights files parted by commas, not {self.teacher!r}"
            )
        require("lessons", "1 or more", self.lessons >= 1)
        require("softness", "a finite number above 0", 0 < self.softness < math.inf)
        require("taught", "from 0 to 1", 0 <= self.taught <= 1)
        require("drawn", "from 0 to below 1", 0 <= self.drawn < 1)
        require("outliers", "from 0 to below 1", 0 <= self.outliers < 1)
        require("outliers", "below 1 together with --drawn", self.drawn + self.outliers < 1)
        require("damaged", "from 0 to 1", 0 <= self.damaged <= 1)
        require("validation_size", "1 or more", self.validation_size >= 1)
        require("patience", "0 (never stop early) or more", self.patience >= 0)
        require("seed", "from 0 to 2^63-1", 0 <= self.seed < 2**63)
        require("device", "cpu, cuda, cuda:N or mps", DEVICES.fullmatch(self.device) is not None)


RECIPES: dict[str, dict[str, Any]] = {
    "best": {},
    "cnn": {
        "architecture": "CNN",
        "teacher": "none",
        "dropout": 0.2,
        "epochs": 36,
        "averaging": 0.999,
        "learning_rate": 0.15,
        "warmup_epochs": 5.0,
        "weight_decay": 3e-4,
    },
    "origin": {
        "bfloat16": False,
        "normalise": False,
        "dropout": 0.2,
        "teacher": "none",
        "epochs": 20,
        "batch_size": 64,
        "learning_rate": 0.01,
        "warmup_epochs": 0.0,
        "weight_decay": 1e-4,
        "averaging": 0.0,
        "drawn": 0.0,
        "outliers": 0.0,
        "damaged": 0.0,
        "augment": False,
        "standardise": False,
    },
}
"""Settings that belong together, by name, as far as they differ from the defaults. `best` makes the weights that the
server ships with; `origin` is an ordinary training: images as they are, SGD with momentum, weight decay, dropout."""


def settings_from(path: Path) -> TrainingSettings:
    """The settings in a TOML file: a flat table of names as in `TrainingSettings`; others have their defaults.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidSetting: it is no TOML, or a name, a type or a value breaks its rule.
    """
    return TrainingSettings(**settings_in(path))


def settings_in(path: Path) -> Mapping[str, Any]:
    """As `settings_from`, only what stands in the file, and values unchecked but for their type."""
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"{path} is a TOML file of settings: {error}") from error
    types = {field.name: type(field.default) for field in fields(TrainingSettings)}
    for name, value in values.items():
        if name not in types:
            raise InvalidSetting(f"{path}: {name} is no setting; there are {', '.join(types)}")
        kind = types[name]
        if kind is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not kind:
            words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
            raise InvalidSetting(f"{path}: {name} is {words[kind]}, not {value!r}")
    return values
