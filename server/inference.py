"""The one place where serving meets torch: pixels or features in, scores out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from digits.checkpoint import Checkpoint, InvalidCheckpoint, load_checkpoint
from digits.preprocessing import PIXELS, normalize
from server.errors import CannotServe
from server.golden import golden_digits
from server.inputs import Rows

GOLDEN_NEEDED = 0.9
"""The share of golden digits that a model has to read correctly to be served.

Not 1: weights made elsewhere may differ from ours on a digit or two.
"""


class UnfitModel(CannotServe):
    """The weights do not load, or do not read digits."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the network says of n images."""

    digits: npt.NDArray[np.uint8]
    """[n]: the class with the largest logit."""
    probabilities: npt.NDArray[np.float32]
    """[n, 10]: softmax(logits / temperature)."""
    logits: npt.NDArray[np.float32]
    """[n, 10]: raw outputs."""
    model_version: str

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, rows: slice) -> Scores:
        return Scores(self.digits[rows], self.probabilities[rows], self.logits[rows], self.model_version)


class Classifier:
    """A model on a device, ready to classify. Used by one thread at a time."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self._device = torch.device(device)
        self._network = checkpoint.network.to(self._device).eval()

    def predict(self, rows: Rows) -> Scores:
        """Return the scores of a block of images."""
        return self._forward(self._features(rows))

    def run_batch(self, blocks: Sequence[Rows]) -> list[Scores]:
        """Classify blocks of pixels and of features together; `run_batch` of a DynamicBatcher."""
        if len(blocks) == 1:
            return [self.predict(blocks[0])]
        scores = self._forward(np.concatenate([self._features(block) for block in blocks]))
        ends = itertools.accumulate(len(block) for block in blocks)
        return [scores[end - len(block) : end] for block, end in zip(blocks, ends, strict=True)]

    def _features(self, rows: Rows) -> npt.NDArray[np.float32]:
        if rows.dtype == np.float32:
            return cast(npt.NDArray[np.float32], rows)
        manifest = self.checkpoint.manifest
        return normalize(cast(npt.NDArray[np.uint8], rows), manifest.mean, manifest.std)

    @torch.inference_mode()
    def _forward(self, features: npt.NDArray[np.float32]) -> Scores:
        # torch warns of arrays that it may not write to, such as views of a message; nothing here writes.
        features = features if features.flags.writeable else features.copy()
        output = self._network(torch.from_numpy(features).to(self._device))  # (n, 10)
        probabilities = torch.softmax(output / self.checkpoint.manifest.temperature, dim=1).cpu().numpy()
        logits = output.cpu().numpy()
        return Scores(logits.argmax(axis=1).astype(np.uint8), probabilities, logits, self.checkpoint.version)


def load_classifier(weights: str | os.PathLike[str], *, device: str = "cpu", max_batch_size: int) -> Classifier:
    """Load weights, warm them up and have them read the golden digits.

    One torch thread: more of them would fight over the cores with the rest of a
    server this small.

    Raises:
        UnfitModel: the file cannot be loaded, the device does not exist, or the
            model reads too few golden digits.
    """
    torch.set_num_threads(1)
    try:
        checkpoint = load_checkpoint(weights)
    except InvalidCheckpoint as error:
        raise UnfitModel(str(error)) from error
    try:
        classifier = Classifier(checkpoint, device)
        for n in (1, max_batch_size):
            classifier.predict(np.zeros((n, PIXELS), np.uint8))
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it does not have
        raise UnfitModel(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    check_golden(classifier, os.fspath(weights))
    return classifier


def check_golden(classifier: Classifier, name: str) -> None:
    """Raise UnfitModel unless the model reads the golden digits."""
    pixels, labels = golden_digits()
    scores = classifier.predict(pixels)
    right = int((scores.digits == labels).sum())
    if not np.isfinite(scores.probabilities).all() or right < GOLDEN_NEEDED * len(labels):
        raise UnfitModel(
            f"{name}: a model reads at least {GOLDEN_NEEDED:.0%} of the {len(labels)} golden digits, "
            f"this one reads {right}"
        )
