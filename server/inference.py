"""The one place where serving meets torch: pixels or features in, scores out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from digits.checkpoint import Checkpoint, Manifest, parse_checkpoint
from digits.network import ImprovedNN
from digits.preprocessing import MAX_CLASSES, PIXELS, normalize
from digits.snapshot import InvalidCheckpoint, Snapshot
from server.errors import CannotServe
from server.golden import golden_digits
from server.inputs import Rows

GOLDEN_NEEDED = 0.9
"""The share of golden digits that a model has to read correctly to be served.

Not 1: weights made elsewhere may differ from ours on a digit or two.
"""

REFUSED_AT_MOST = 0.5
"""The share of golden digits that may score below the model's own threshold."""

DIGITS = Manifest().labels
"""What the classes mean where nothing else is said."""

CACHED_ROWS = 32
"""A CPU takes so many images at a time through a CNN; what the layers give for more does not stay in its cache."""

_CLASS_NUMBERS = np.arange(MAX_CLASSES, dtype=np.uint8)
_CLASS_NUMBERS.flags.writeable = False

# Named once: to write such a type out in a function takes 2.6 us each time.
_Pixels: TypeAlias = npt.NDArray[np.uint8]
_Array: TypeAlias = npt.NDArray[np.float32]


class UnfitModel(CannotServe):
    """The weights do not load, or do not read digits."""


_Common: TypeAlias = tuple[str, float | None, tuple[str, ...]]
"""What all images have in common, as the last fields of Scores."""


@dataclass(slots=True)
class Scores:
    """What the network says of n images. To be left as it is; not frozen, as that takes half a microsecond a call."""

    digits: npt.NDArray[np.uint8]
    """[n]: the class with the largest logit."""
    probabilities: npt.NDArray[np.float32]
    """[n, classes]: softmax(logits / temperature)."""
    logits: npt.NDArray[np.float32]
    """[n, classes]: raw outputs."""
    digit_scores: npt.NDArray[np.float32]
    """[n]: logsumexp(logits / temperature), how much each image looks like a digit."""
    model_version: str
    digit_threshold: float | None = None
    """An image with a lower digit score looks like no digit; None where the model does not say."""
    labels: tuple[str, ...] = ()
    """[classes]: the meaning of each class; empty where these are the digits."""

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, rows: slice) -> Scores:
        return Scores(
            self.digits[rows],
            self.probabilities[rows],
            self.logits[rows],
            self.digit_scores[rows],
            self.model_version,
            self.digit_threshold,
            self.labels,
        )


class Classifier:
    """A model on a device, ready to classify. Used by one thread at a time."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self._device = torch.device(device)
        # Convolutions take a third less time with weights of this format than with those of a file.
        self._network = checkpoint.network.to(self._device).to(memory_format=torch.channels_last).eval()
        self._layers = _fold_normalisation(self._network, checkpoint.manifest)
        self._temperature = np.float32(checkpoint.manifest.temperature)
        manifest = checkpoint.manifest
        meanings = manifest.labels if manifest.labels != DIGITS else ()
        self._common: _Common = (checkpoint.version, manifest.digit_threshold, meanings)
        self._one_image = None
        if self._layers is not None and self._device.type == "cpu":
            self._one_image = _OneImage(self._layers, manifest.temperature, self._common)

    @property
    def is_quick(self) -> bool:
        """Whether an image takes so little that a few of them need no thread, as with an ImprovedNN on a CPU."""
        return self._one_image is not None

    def predict(self, rows: Rows) -> Scores:
        """Return the scores of a block of images."""
        if rows.dtype == np.uint8:
            pixels = cast(_Pixels, rows)
            if self._one_image is not None and len(rows) == 1:
                return self._one_image(pixels[0])
            return self._predict_pixels([pixels])
        return self._predict_features(cast(_Array, rows))

    def run_batch(self, blocks: Sequence[Rows]) -> list[Scores]:
        """Classify blocks of pixels and of features together; `run_batch` of a DynamicBatcher."""
        if len(blocks) == 1:
            return [self.predict(blocks[0])]
        if all(block.dtype == np.uint8 for block in blocks):
            scores = self._predict_pixels(cast(Sequence[_Pixels], blocks))
        else:
            scores = self._predict_features(np.concatenate([self._features(block) for block in blocks]))
        ends = itertools.accumulate(len(block) for block in blocks)
        return [scores[end - len(block) : end] for block, end in zip(blocks, ends, strict=True)]

    def _features(self, rows: Rows) -> _Array:
        if rows.dtype == np.float32:
            return cast(_Array, rows)
        manifest = self.checkpoint.manifest
        return normalize(cast(_Pixels, rows), manifest.mean, manifest.std)

    @torch.inference_mode()
    def _predict_pixels(self, blocks: Sequence[_Pixels]) -> Scores:
        _use_one_thread()
        if self._layers is None:
            return self._predict_features(self._features(np.concatenate(blocks)))
        # Joined and cast in one go: between two steps another thread may take the interpreter.
        pixels = np.concatenate(blocks, dtype=np.float32, casting="unsafe")
        x = torch.from_numpy(pixels).to(self._device)  # (n, 784)
        (w1, b1), (w2, b2), (w3, b3) = self._layers
        x = torch.addmm(b1, x, w1.t()).relu_()  # (n, 256)
        x = torch.addmm(b2, x, w2.t()).relu_()  # (n, 128)
        return self._scores(torch.addmm(b3, x, w3.t()).cpu().numpy())  # (n, classes)

    @torch.inference_mode()
    def _predict_features(self, features: _Array) -> Scores:
        _use_one_thread()
        # torch warns of arrays that it may not write to, such as views of a message; nothing here writes.
        features = features if features.flags.writeable else features.copy()
        x = torch.from_numpy(features).to(self._device)
        if self._one_image is None and self._device.type == "cpu":
            return self._scores(torch.cat([self._network(part) for part in torch.split(x, CACHED_ROWS)]).numpy())
        return self._scores(self._network(x).cpu().numpy())

    def _scores(self, logits: _Array) -> Scores:
        # In NumPy, where these steps take half of what torch takes for a single image.
        largest = logits.max(axis=1, keepdims=True)
        probabilities = logits - largest
        if self._temperature != 1:
            probabilities /= self._temperature
        np.exp(probabilities, out=probabilities)
        total = probabilities.sum(axis=1, keepdims=True)
        probabilities /= total
        digit_scores = (largest / self._temperature + np.log(total))[:, 0]
        return Scores(logits.argmax(axis=1).astype(np.uint8), probabilities, logits, digit_scores, *self._common)


def _use_one_thread() -> None:
    """More of them would fight over the cores with the rest of a server this small.

    Said before each forward, as OpenMP knows it of the thread that says it, and of no other.
    """
    torch.set_num_threads(1)


class _OneImage:
    """An ImprovedNN for one image at a time, in NumPy: torch takes twice as long to find its way to the products.

    No layer adds its bias b to its products y, as relu(y + b) = max(y, -b) + b:
    what is left to add goes through the next layer's weights into its bias, and
    only the last one is added.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], temperature: float, common: _Common) -> None:
        """`layers` take pixels: the result of `_fold_normalisation`; `common` are the last fields of Scores."""
        (w1, b1), (w2, b2), (w3, b3) = ((weights.numpy(), bias.double().numpy()) for weights, bias in layers)
        b2 = b2 + w2 @ b1
        b3 = b3 + w3 @ b2
        self._w1, self._w2 = w1, w2
        self._w3_and_b3: _Array = np.column_stack((w3, b3)).astype(np.float32)
        self._floor1: _Array = -b1.astype(np.float32)
        self._floor2: _Array = -b2.astype(np.float32)
        self._x, self._h1 = (np.empty(weights.shape[1], np.float32) for weights in (w1, w2))
        self._h2_and_1 = np.ones(len(w2) + 1, np.float32)
        self._h2 = self._h2_and_1[:-1]
        self._temperature = temperature
        self._common = common

    def __call__(self, pixels: _Pixels) -> Scores:
        """The scores of `uint8[784]`.

        Without a general case, and with Python's floats where there is one for
        each class: a step of NumPy takes as long as ten of them.
        """
        x, h1, h2 = self._x, self._h1, self._h2
        x[:] = pixels
        self._w1.dot(x, h1)  # (256,)
        np.maximum(h1, self._floor1, out=h1)
        self._w2.dot(h1, h2)  # (128,)
        np.maximum(h2, self._floor2, out=h2)
        logits = self._w3_and_b3.dot(self._h2_and_1)  # (classes,)
        values: list[float] = logits.tolist()
        largest = max(values)
        digit = values.index(largest)
        temperature = self._temperature
        powers = [exp((value - largest) / temperature) for value in values]
        total = sum(powers)
        return Scores(
            _CLASS_NUMBERS[digit : digit + 1],
            np.array([[power / total for power in powers]], np.float32),
            logits[np.newaxis],
            np.array([largest / temperature + log(total)], np.float32),
            *self._common,
        )


def _fold_normalisation(network: nn.Module, manifest: Manifest) -> list[tuple[Tensor, Tensor]] | None:
    """The layers of an ImprovedNN as (weights, bias) that take pixels, 0 to 255, in place of features.

    `w (pixel / 255 - mean) / std + b` is linear in the pixel, so the first layer
    takes the normalisation into itself. None for other architectures.
    """
    if not isinstance(network, ImprovedNN):
        return None
    first = network.fc1.weight.double()
    weights = first / (255 * manifest.std)
    bias = network.fc1.bias.double() - first.sum(dim=1) * (manifest.mean / manifest.std)
    layers = [(weights.float(), bias.float())]
    layers += [(layer.weight, layer.bias) for layer in (network.fc2, network.fc3)]
    return [(weight.detach(), bias.detach()) for weight, bias in layers]


def load_classifier(
    snapshot: Snapshot, *, device: str = "cpu", max_batch_size: int, min_accuracy: float = 0.0
) -> Classifier:
    """Load weights, warm them up and have them read the golden digits.

    Raises:
        UnfitModel: the weights cannot be loaded, the device does not exist, the
            manifest gives a lower test accuracy than `min_accuracy` or none, or
            the model reads too few golden digits, or takes them for none.
    """
    try:
        checkpoint = parse_checkpoint(snapshot)
    except InvalidCheckpoint as error:
        raise UnfitModel(str(error)) from error
    accuracy = checkpoint.manifest.test_accuracy
    if min_accuracy and (accuracy is None or accuracy < min_accuracy):
        raise UnfitModel(
            f"{snapshot.path}: the test accuracy that the manifest gives is at least {min_accuracy:g}, "
            f"not {'unknown' if accuracy is None else f'{accuracy:g}'}"
        )
    try:
        classifier = Classifier(checkpoint, device)
        for n in (1, max_batch_size):
            classifier.predict(np.zeros((n, PIXELS), np.uint8))
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it does not have
        raise UnfitModel(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    check_golden(classifier, snapshot.path)
    return classifier


def check_golden(classifier: Classifier, name: str) -> None:
    """Raise UnfitModel unless the model reads the golden digits as digits, or tells other things and gives numbers."""
    pixels, labels = golden_digits()
    with np.errstate(all="ignore"):  # what is not finite is told below
        scores = classifier.predict(pixels)
    finite = bool(np.isfinite(scores.probabilities).all())
    if scores.labels:
        if not finite:
            raise UnfitModel(f"{name}: a model gives probabilities, this one gives what is no number")
        return
    right = int((scores.digits == labels).sum())
    if not finite or right < GOLDEN_NEEDED * len(labels):
        raise UnfitModel(
            f"{name}: a model reads at least {GOLDEN_NEEDED:.0%} of the {len(labels)} golden digits, "
            f"this one reads {right}"
        )
    if scores.digit_threshold is not None:
        refused = int((scores.digit_scores < scores.digit_threshold).sum())
        if refused > REFUSED_AT_MOST * len(labels):
            raise UnfitModel(
                f"{name}: a model takes at most {REFUSED_AT_MOST:.0%} of the {len(labels)} golden digits for no digit, "
                f"this one takes {refused}: the digit_threshold of {scores.digit_threshold:g} in its manifest is too "
                f"high, their scores are {scores.digit_scores.min():.3g} to {scores.digit_scores.max():.3g}"
            )
