"""From a request to a block of rows: every rule of the wire, checked before queueing.

Knows the messages and NumPy; knows neither the queue nor a transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from digits.preprocessing import PIXELS, InvalidImage, to_pixels
from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.errors import InvalidArgument

FEATURE_BYTES = 4 * PIXELS

MAX_FEATURE = np.float32(1e6)
"""No normalisation gives larger values, and they might overflow on their way through the network."""

Rows: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""A block of images: pixels `uint8[n, 784]` or features `float32[n, 784]`."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The images of a request: good ones as rows, bad ones as errors."""

    count: int
    """Images in the request, good and bad."""
    rows: Rows
    """The good ones in order: pixels `uint8[m, 784]` or features `float32[m, 784]`."""
    errors: dict[int, InvalidArgument] = field(default_factory=dict)
    """By index in the request, what is wrong with each of the others."""


def count_images(request: pb.ClassifyRequest) -> int:
    """How many images a request means to carry, 1 or more, before any is checked."""
    form = request.WhichOneof("images")
    if form == "pixels":
        return max(1, -(-len(request.pixels) // PIXELS))
    if form == "features":
        return max(1, -(-len(request.features) // FEATURE_BYTES))
    return max(1, len(request.encoded.files))


def count_bytes(request: pb.ClassifyRequest) -> int:
    """The length of a request's images."""
    form = request.WhichOneof("images")
    if form == "encoded":
        return sum(len(file) for file in request.encoded.files)
    return len(request.pixels) + len(request.features)


def read_buffer(request: pb.ClassifyRequest) -> Inputs:
    """View the pixels or features of a request as rows.

    Raises:
        InvalidArgument: none of the three forms is set, or the buffer is empty
            or no whole number of images long.
    """
    form = request.WhichOneof("images")
    if form == "pixels":
        pixels = _view(form, request.pixels, np.dtype(np.uint8), PIXELS)
        return Inputs(len(pixels), pixels)
    if form == "features":
        features = _view(form, request.features, np.dtype("<f4"), FEATURE_BYTES)
        within = np.abs(features) <= MAX_FEATURE  # NaN is not
        good = within.all(axis=1)
        if good.all():
            return Inputs(len(features), features)
        errors = {}
        for row in np.flatnonzero(~good).tolist():
            column = int(np.argmin(within[row]))
            errors[row] = InvalidArgument(
                form,
                f"every value is finite and from {-MAX_FEATURE:.0f} to {MAX_FEATURE:.0f}, "
                f"but image {row} holds {features[row, column]} at position {column}",
            )
        return Inputs(len(features), features[good], errors)
    raise InvalidArgument("images", "exactly one of pixels, features and encoded is set, here none is")


def _view(name: str, buffer: bytes, dtype: np.dtype[np.generic], row_bytes: int) -> Rows:
    if not buffer:
        raise InvalidArgument(name, "a request carries 1 or more images, this one carries 0")
    if len(buffer) % row_bytes:
        raise InvalidArgument(
            name, f"{row_bytes} bytes an image, but {len(buffer)} bytes are no whole number of images"
        )
    rows: Rows = np.frombuffer(buffer, dtype).reshape(-1, PIXELS)
    return rows


def decode(file: bytes) -> npt.NDArray[np.uint8] | InvalidImage:
    """Make pixels, `uint8[784]`, of an image file, or say why not; slow, so not for the event loop."""
    try:
        return to_pixels(file).reshape(PIXELS)
    except InvalidImage as error:
        return error


def collect(decoded: Sequence[npt.NDArray[np.uint8] | InvalidImage]) -> Inputs:
    """The files of one request, put together again."""
    good = [pixels for pixels in decoded if not isinstance(pixels, InvalidImage)]
    errors = {
        index: InvalidArgument(f"encoded.files[{index}]", str(error))
        for index, error in enumerate(decoded)
        if isinstance(error, InvalidImage)
    }
    return Inputs(len(decoded), np.stack(good) if good else np.empty((0, PIXELS), np.uint8), errors)
