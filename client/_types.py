"""What the SDK takes and gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from digits.preprocessing import DIGITS, ImageLike

Image: TypeAlias = ImageLike
"""A path, the bytes of a file, a binary file object, a PIL image, or an array:
`uint8[h, w]`, `uint8[h, w, 1|3|4]`, or floats of these shapes in [0, 1]."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Prediction:
    """The answer to one image.

    >>> prediction = client.classify("7.png")
    >>> prediction
    Prediction(digit=7, confidence=...)
    >>> float(prediction.probabilities[prediction.digit]) == prediction.confidence
    True
    """

    digit: int
    """The most probable digit, 0 to 9; of a model of other things, the number of the class, from 0."""

    confidence: float
    """Its probability, 0 to 1."""

    probabilities: npt.NDArray[np.float32]
    """`float32[classes]`, the probability of each class; of digits `float32[10]`. Read-only."""

    model_version: str
    """First 12 hexadecimal digits of the SHA-256 of the weights that answered."""

    batch_rows: int
    """Images in the batch in which the server computed this one."""

    queue_seconds: float
    """How long the image waited for that batch."""

    compute_seconds: float
    """How long the batch took."""

    digit_score: float = math.nan
    """How much the image looks like a digit: logsumexp(logits / temperature), unbounded; NaN from older servers."""

    is_digit: bool | None = None
    """False where the image looks like no digit: `digit` is still the best guess.

    None where the model does not say, or a server that is older than this.
    """

    labels: tuple[str, ...] = DIGITS
    """What each class means to the model that answered, mostly "0" to "9"; as many as `probabilities`."""

    @property
    def label(self) -> str:
        """What `digit` means to the model that answered, for example "Trouser".

        >>> client.classify("7.png").label
        '7'
        """
        return self.labels[self.digit]

    def __repr__(self) -> str:
        label = "" if self.label in ("", str(self.digit)) else f"label={self.label!r}, "
        return f"Prediction(digit={self.digit}, {label}confidence={self.confidence:.4f})"


PredictionDraft: Any = make_dataclass("PredictionDraft", [field.name for field in fields(Prediction)], slots=True)
"""A prediction that may still be written to, and becomes one by a change of its class.

To fill a frozen dataclass takes three times as long, which is most of the time
that it takes to make 256 predictions of a message.
"""


@dataclass(frozen=True, slots=True)
class Model:
    """What a server serves.

    >>> with client.Client() as digits:
    ...     model = digits.get_model()
    >>> model.version == model.weights_sha256[:12] == client.classify("7.png").model_version
    True
    """

    name: str
    """For example `mnist`."""

    version: str
    """First 12 hexadecimal digits of `weights_sha256`."""

    architecture: str
    """For example `ImprovedNN`."""

    weights_sha256: str
    """SHA-256 of the weights file."""

    parameter_count: int

    labels: tuple[str, ...]
    """The meaning of each of the 10 to 100 classes; empty where there is no such class."""

    normalization_mean: float
    """For callers that send features: `features = (pixel / 255 - mean) / std`."""

    normalization_std: float
    """See `normalization_mean`."""

    temperature: float
    """`probabilities = softmax(logits / temperature)`; `digit_score = logsumexp(logits / temperature)`."""

    test_accuracy: float | None
    """On the test part of the data set, 0 to 1; None if unknown."""

    dataset: str
    """The data set of the training; empty if unknown."""

    server_version: str

    max_batch_size: int
    """The most images that the server computes together."""

    max_message_bytes: int
    """The longest request message that the server accepts."""

    digit_threshold: float | None = None
    """An image with a lower `digit_score` looks like no digit; None if the model does not say."""
