"""The one place where serving meets torch: pixels or features in, scores out."""

from __future__ import annotations

import itertools
import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from digits.checkpoint import Checkpoint, Manifest, parse_checkpoint
from digits.network import ImprovedNN
from digits.preprocessing import DIGITS, MAX_CLASSES, PIXELS, normalize
from digits.snapshot import InvalidCheckpoint, Snapshot
from server.errors import CannotServe
from server.golden import golden_digits
from server.inputs import Rows

GOLDEN_NEEDED = 0.9
"""The share of golden digits that a model has to read correctly to be served.

Not 1: weights made elsewhere may differ from ours on a digit or two.
"""

GOLDEN_TOGETHER = (1, 20, 80)
"""The golden digits are read in batches of so many, in the last one four times: alone, few and many images are computed
in different ways."""

REFUSED_AT_MOST = 0.5
"""The share of golden digits that may score below the model's own threshold."""

CACHED_ROWS = 32
"""A CPU takes so many images at a time through a CNN; what the layers give for more does not stay in its cache."""

MANY_ROWS = 64
"""Images from which torch computes a batch; NumPy's way to the products is shorter (docs/performance.md). They are
oneDNN's where torch has it: on an AMD EPYC (Zen 5) 0.51 ms for 256 images, MKL's 1.12, as that one leaves half of the
width of such a processor unused."""

ROWS = (64, 96, 128, 160, 192, 224, 256)
"""A batch has as many rows there, the last ones empty, and a larger one is several: oneDNN compiles a product for each
number of rows and keeps it, which takes milliseconds and 2 MB."""

_CLASS_NUMBERS = np.arange(MAX_CLASSES, dtype=np.uint8)
_CLASS_NUMBERS.flags.writeable = False

# Named once: to write such a type out in a function takes 2.6 us each time.
_Pixels: TypeAlias = npt.NDArray[np.uint8]
_Array: TypeAlias = npt.NDArray[np.float32]


_Layers: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Weights `float32[outputs, inputs]` and bias `float32[outputs]` of each."""


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
        layers = _layers_of(self._network)
        folded = layers and _fold_normalisation(layers, checkpoint.manifest)
        self._of_features = _Perceptron(layers) if layers else None
        self._of_pixels = _Perceptron(folded) if folded else None
        self._temperature = np.float32(checkpoint.manifest.temperature)
        manifest = checkpoint.manifest
        meanings = manifest.labels if manifest.labels != DIGITS else ()
        self._common: _Common = (checkpoint.version, manifest.digit_threshold, meanings)
        self._one_image = self._few_images = None
        if folded and self._device.type == "cpu":
            carried = _carry_biases(folded)
            self._one_image = _OneImage(carried, manifest.temperature, self._common)
            self._few_images = _FewImages(carried)

    @property
    def is_quick(self) -> bool:
        """Whether an image takes so little that a few of them need no thread, as with an ImprovedNN on a CPU."""
        return self._one_image is not None

    def warm_up(self, max_batch_size: int) -> None:
        """Have all that is compiled or laid out at first use be done, for batches of up to so many."""
        sizes = {1, max_batch_size}
        if self.is_quick:
            sizes.update(rows for rows in ROWS if rows <= max_batch_size)
        for count in sorted(sizes):
            self.predict(np.zeros((count, PIXELS), np.uint8))

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

    def _predict_pixels(self, blocks: Sequence[_Pixels]) -> Scores:
        count = sum(map(len, blocks))
        if self._few_images is None or count >= MANY_ROWS:
            return self._predict_many(blocks, count)
        pixels = np.empty((count, PIXELS), np.float32)
        # Joined and cast in one go: between two steps another thread may take the interpreter.
        np.concatenate(blocks, out=pixels, casting="unsafe")
        return self._scores(self._few_images(pixels))

    @torch.inference_mode()
    def _predict_many(self, blocks: Sequence[_Pixels], count: int) -> Scores:
        if self._of_pixels is None:
            return self._predict_features(self._features(np.concatenate(blocks)))
        _use_one_thread()
        pixels = np.empty((self._of_pixels.rows_for(count), PIXELS), np.float32)
        np.concatenate(blocks, out=pixels[:count], casting="unsafe")
        pixels[count:] = 0
        return self._scores(self._of_pixels(torch.from_numpy(pixels).to(self._device))[:count].cpu().numpy())

    @torch.inference_mode()
    def _predict_features(self, features: _Array) -> Scores:
        _use_one_thread()
        # torch warns of arrays that it may not write to, such as views of a message; nothing here writes.
        features = features if features.flags.writeable else features.copy()
        x = torch.from_numpy(features).to(self._device)
        if self._of_features is not None:
            more = self._of_features.rows_for(len(x)) - len(x)
            padded = functional.pad(x, (0, 0, 0, more)) if more else x
            return self._scores(self._of_features(padded)[: len(x)].cpu().numpy())
        if self._device.type == "cpu":
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


class _Perceptron:
    """The layers of an ImprovedNN for a batch, with nothing between the products that could be left out."""

    def __init__(self, layers: _Layers) -> None:
        self._layers = [(weights.t(), bias) for weights, bias in layers]
        self._laid_out: list[tuple[Tensor, Tensor]] = []
        if layers[0][0].device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            lay_out = torch.ops.mkldnn._reorder_linear_weight
            self._laid_out = [(lay_out(weights), bias) for weights, bias in layers[:-1]]

    def rows_for(self, count: int) -> int:
        """In how many rows so many images are to be handed in; what the rows behind them hold is all the same."""
        if not self._laid_out or count < MANY_ROWS:
            return count
        whole, rest = divmod(count, ROWS[-1])
        return whole * ROWS[-1] + (ROWS[bisect_left(ROWS, rest)] if rest else 0)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits `float32[n, classes]` of `float32[n, 784]`, where n is as `rows_for` says."""
        if self._laid_out and len(x) >= MANY_ROWS:
            if len(x) <= ROWS[-1]:
                return self._many(x)
            return torch.cat([self._many(part) for part in torch.split(x, ROWS[-1])])
        (w1, b1), (w2, b2), (w3, b3) = self._layers
        x = torch.addmm(b1, x, w1).relu_()  # (n, 256)
        x = torch.addmm(b2, x, w2).relu_()  # (n, 128)
        return torch.addmm(b3, x, w3)  # (n, classes)

    def _many(self, x: Tensor) -> Tensor:
        # As torch's own compiler calls it: a product, its bias and ReLU in one step.
        product = torch.ops.mkldnn._linear_pointwise
        (w1, b1), (w2, b2) = self._laid_out
        x = product(x, w1, b1, "relu", [], "")  # (n, 256)
        x = product(x, w2, b2, "relu", [], "")  # (n, 128)
        w3, b3 = self._layers[-1]  # so small that the way to oneDNN takes longer than the product
        return torch.addmm(b3, x, w3)  # (n, classes)


class _Carried(NamedTuple):
    """The layers of an ImprovedNN, of which only the last one adds a bias."""

    w1: _Array
    w2: _Array
    w3: _Array
    """`float32[outputs, inputs]`"""
    floor1: _Array
    floor2: _Array
    """`float32[outputs]`, in the place of the 0 of ReLU."""
    b3: _Array


def _carry_biases(layers: _Layers) -> _Carried:
    """No layer adds its bias b to its products y, as relu(y + b) = max(y, -b) + b.

    What is left to add goes through the next layer's weights into its bias.
    """
    (w1, b1), (w2, b2), (w3, b3) = ((weights.numpy(), bias.double().numpy()) for weights, bias in layers)
    b2 = b2 + w2 @ b1
    b3 = b3 + w3 @ b2
    return _Carried(w1, w2, w3, -b1.astype(np.float32), -b2.astype(np.float32), b3.astype(np.float32))


class _FewImages:
    """An ImprovedNN for some images, in NumPy: torch takes longer to find its way to the products."""

    def __init__(self, layers: _Carried) -> None:
        """`layers` take pixels."""
        # Laid out by columns: OpenBLAS takes half of the time for a few rows.
        self._w1, self._w2, self._w3 = (np.ascontiguousarray(weights.T) for weights in layers[:3])
        self._layers = layers

    def __call__(self, x: _Array) -> _Array:
        """Logits `float32[n, classes]` of pixels `float32[n, 784]`."""
        h1 = x.dot(self._w1)  # (n, 256)
        np.maximum(h1, self._layers.floor1, out=h1)
        h2 = h1.dot(self._w2)  # (n, 128)
        np.maximum(h2, self._layers.floor2, out=h2)
        logits: _Array = h2.dot(self._w3)  # (n, classes)
        logits += self._layers.b3
        return logits


class _OneImage:
    """The same for one image at a time."""

    def __init__(self, layers: _Carried, temperature: float, common: _Common) -> None:
        """`layers` take pixels; `common` are the last fields of Scores."""
        w1, w2, w3, self._floor1, self._floor2, b3 = layers
        self._w1, self._w2 = w1, w2
        self._w3_and_b3: _Array = np.column_stack((w3, b3))
        self._x, self._h1 = (np.empty(weights.shape[1], np.float32) for weights in (w1, w2))
        self._h2_and_1 = np.ones(len(w2) + 1, np.float32)
        self._h2 = self._h2_and_1[:-1]
        self._pack = struct.Struct(f"{len(w3)}f").pack
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
        # NumPy takes 0.3 us less to look at packed floats than at a list of Python's.
        probabilities = np.frombuffer(self._pack(*[power / total for power in powers]), np.float32)
        return Scores(
            _CLASS_NUMBERS[digit : digit + 1],
            probabilities[np.newaxis],
            logits[np.newaxis],
            np.array([largest / temperature + log(total)], np.float32),
            *self._common,
        )


def _layers_of(network: nn.Module) -> _Layers | None:
    """The layers of an ImprovedNN as (weights, bias); None for other architectures."""
    if not isinstance(network, ImprovedNN):
        return None
    return [(layer.weight.detach(), layer.bias.detach()) for layer in (network.fc1, network.fc2, network.fc3)]


def _fold_normalisation(layers: _Layers, manifest: Manifest) -> _Layers:
    """The same layers, but for the first, which takes pixels, 0 to 255, in place of features.

    `w (pixel / 255 - mean) / std + b` is linear in the pixel.
    """
    (first, bias), *others = layers
    weights = first.double() / (255 * manifest.std)
    bias = bias.double() - first.double().sum(dim=1) * (manifest.mean / manifest.std)
    return [(weights.float(), bias.float()), *others]


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
        classifier.warm_up(max_batch_size)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it does not have
        raise UnfitModel(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    check_golden(classifier, snapshot.path)
    return classifier


def check_golden(classifier: Classifier, name: str) -> None:
    """Raise UnfitModel unless the model reads the golden digits as digits, or tells other things and gives numbers."""
    pixels, labels = golden_digits()
    for count in GOLDEN_TOGETHER:
        batches = [np.resize(pixels[first : first + count], (count, PIXELS)) for first in range(0, len(pixels), count)]
        with np.errstate(all="ignore"):  # what is not finite is told
            _check_scores([classifier.predict(batch)[: len(pixels)] for batch in batches], labels, name)


def _check_scores(scores: Sequence[Scores], labels: _Pixels, name: str) -> None:
    """Raise UnfitModel unless these are what a good model says of the golden digits."""
    finite = all(np.isfinite(part.probabilities).all() for part in scores)
    if scores[0].labels:
        if not finite:
            raise UnfitModel(f"{name}: a model gives probabilities, this one gives what is no number")
        return
    right = int((np.concatenate([part.digits for part in scores]) == labels).sum())
    if not finite or right < GOLDEN_NEEDED * len(labels):
        raise UnfitModel(
            f"{name}: a model reads at least {GOLDEN_NEEDED:.0%} of the {len(labels)} golden digits, "
            f"this one reads {right}"
        )
    threshold = scores[0].digit_threshold
    if threshold is not None:
        digit_scores = np.concatenate([part.digit_scores for part in scores])
        refused = int((digit_scores < threshold).sum())
        if refused > REFUSED_AT_MOST * len(labels):
            raise UnfitModel(
                f"{name}: a model takes at most {REFUSED_AT_MOST:.0%} of the {len(labels)} golden digits for no digit, "
                f"this one takes {refused}: the digit_threshold of {threshold:g} in its manifest is too "
                f"high, their scores are {digit_scores.min():.3g} to {digit_scores.max():.3g}"
            )
