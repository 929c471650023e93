"""What the fake answers to an image, and the digits that it can read; knows nothing of calls."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from client._errors import MnistGrpcError
from digits.preprocessing import CLASSES, PIXELS, SIDE

Row: TypeAlias = npt.NDArray[np.float32]
"""`float32[10]`, the probability of each digit."""

Answer: TypeAlias = (
    int | tuple[int, float] | Sequence[float] | npt.NDArray[np.floating[Any]] | MnistGrpcError | type[MnistGrpcError]
)
"""The answer to one image: a digit, a digit and its confidence, ten probabilities, or an error."""

Answers: TypeAlias = int | Iterable[Answer] | Callable[[npt.NDArray[np.uint8]], Answer]
"""One digit for all images, an answer for each, or a function of an image's pixels, `uint8[784]`."""

CONFIDENCE = 0.99
"""Of a digit that is given without one."""


class ScriptError(ValueError):
    """What the fake was told makes no sense; the message says the rule."""


def digit_png(digit: int) -> bytes:
    """Return a PNG file of a handwritten digit, 0 to 9, that the fake and every sound model read.

        >>> client.classify(client.testing.digit_png(7)).digit
        7

    From the UCI "Optical Recognition of Handwritten Digits" data set (E.
    Alpaydin, C. Kaynak, 1998; CC BY 4.0), as canonical pixels.

    Raises:
        ValueError: there is no such digit.
    """
    buffer = io.BytesIO()
    Image.fromarray(samples()[checked_digit(digit)].reshape(SIDE, SIDE)).save(buffer, "PNG")
    return buffer.getvalue()


def nearest_sample(pixels: npt.NDArray[np.uint8]) -> int:
    """The digit of that one of twenty samples which is most like `uint8[784]`."""
    difference = samples().astype(np.int32) - pixels
    return int(np.square(difference).sum(axis=1).argmin()) % CLASSES


def row_of(answer: Answer) -> Row | MnistGrpcError:
    """Return probabilities, or the error.

    Raises:
        ScriptError: this is no answer.
    """
    if isinstance(answer, MnistGrpcError):
        return answer
    if isinstance(answer, type) and issubclass(answer, MnistGrpcError):
        return answer("FakeServer was told to answer with this error")
    if isinstance(answer, int | np.integer):
        return _row(answer, CONFIDENCE)
    if isinstance(answer, tuple) and len(answer) == 2:
        return _row(*answer)
    try:
        row = np.array(answer, np.float32)
    except (TypeError, ValueError):
        row = np.empty(0, np.float32)
    if row.shape != (CLASSES,) or not (np.all((row >= 0) & (row <= 1)) and abs(float(row.sum()) - 1) < 1e-3):
        raise ScriptError(
            "an answer is a digit, a pair (digit, confidence), ten probabilities that sum to 1, "
            f"or an error of client, not {answer!r}"
        )
    return row


def checked_digit(digit: object) -> int:
    """The digit, if it is one."""
    if isinstance(digit, bool) or not isinstance(digit, int | np.integer) or not 0 <= digit < CLASSES:
        raise ScriptError(f"a digit is a whole number from 0 to 9, not {digit!r}")
    return int(digit)


def _row(digit: object, confidence: float) -> Row:
    checked = checked_digit(digit)
    if not 1 / CLASSES < confidence <= 1:
        raise ScriptError(f"the confidence in a digit is above 0.1, what all ten would share, to 1, not {confidence!r}")
    row = np.full(CLASSES, (1 - confidence) / (CLASSES - 1), np.float32)
    row[checked] = confidence
    return row


@functools.cache
def samples() -> npt.NDArray[np.uint8]:
    """`uint8[20, 784]`; sample i shows the digit i % 10."""
    with resources.files("client.testing").joinpath("digits.png").open("rb") as file, Image.open(file) as sheet:
        pixels = np.array(sheet, np.uint8)
    return pixels.reshape(-1, SIDE, CLASSES, SIDE).swapaxes(1, 2).reshape(-1, PIXELS)
