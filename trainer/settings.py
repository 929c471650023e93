"""What can be chosen about a training, with the rule for each value.

The defaults are those of the weights that the server ships with. Knows nothing
of flags but their names, which its errors speak.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

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

    # Optimiser: SGD with Nesterov's momentum
    epochs: int = 120
    """Passes over the training images; 1 or more."""

    batch_size: int = 256
    """Images a step; 1 or more."""

    learning_rate: float = 0.1
    """The highest, reached after the warm-up; above 0."""

    warmup_epochs: float = 1.0
    """Epochs in which the rate climbs to its highest; then it falls to 0 along a cosine."""

    momentum: float = 0.9
    """From 0 to below 1."""

    weight_decay: float = 1e-5
    """L2 penalty; 0 or more."""

    averaging: float = 0.999
    """The weights that are kept are a running mean over the steps, which forgets all but this part at each; 0: none."""

    # Data
    drawn: float = 0.3
    """Share of each batch that is drawn by `trainer.handwriting`; from 0 to below 1."""

    augment: bool = True
    """Whether each image is turned, scaled, sheared, shifted, bent and written with another pen anew in every epoch."""

    validation_size: int = 5000
    """Images held back from the training part to choose the best epoch; 1 or more."""

    # Run
    patience: int = 0
    """Epochs without a lower validation loss after which to stop; 0 never stops early."""

    seed: int = 1
    """Of the split, the initial weights, the order, dropout and augmentation; 0 to 2^63-1."""

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
        require("warmup_epochs", "a finite number of 0 or more", 0 <= self.warmup_epochs < math.inf)
        require("momentum", "from 0 to below 1", 0 <= self.momentum < 1)
        require("weight_decay", "a finite number of 0 or more", 0 <= self.weight_decay < math.inf)
        require("averaging", "from 0 to below 1", 0 <= self.averaging < 1)
        require("drawn", "from 0 to below 1", 0 <= self.drawn < 1)
        require("validation_size", "1 or more", self.validation_size >= 1)
        require("patience", "0 (never stop early) or more", self.patience >= 0)
        require("seed", "from 0 to 2^63-1", 0 <= self.seed < 2**63)
        require("device", "cpu, cuda, cuda:N or mps", DEVICES.fullmatch(self.device) is not None)
