"""From whatever a person hands in to a grey picture, `uint8[h, w]`.

Files, PIL images and arrays are checked, turned upright (EXIF), laid over paper
where they are transparent, and made grey. Knows nothing of digits.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_PIXELS = 24_000_000
"""Larger files are refused before they are decoded, which would take seconds and a gigabyte."""

MAX_JPEG_PIXELS = 64_000_000
"""The same for JPEG, which is decoded at an eighth of its size, and for arrays and PIL images."""

MIN_SIDE = 4
"""An image with a shorter side than this cannot show a digit."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
"""File formats that are opened."""

MIN_CONTRAST = 16
"""Less than this of 255 between paper and ink is a blank image."""

DECODED_SIDE = 400
"""A JPEG is decoded at the smallest scale of 1, 1/2, 1/4 and 1/8 at which both sides are at least this."""

DEEP_SCALES = (255, 1023, 4095, 16383, 65535)
"""White, in images of more than 8 bits: the first of these that no pixel exceeds."""

GreyImage: TypeAlias = npt.NDArray[np.uint8]
ImageLike: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | npt.NDArray[Any]
)
"""A path, the bytes of a file, a binary file object, a PIL image, or an array:
`uint8[h, w]`, `uint8[h, w, 1|3|4]`, or floats of these shapes in [0, 1]."""


class InvalidImage(ValueError):
    """The image breaks a rule; the message names the rule and the value."""


def read_grey(image: ImageLike) -> GreyImage:
    """Return a grey picture, `uint8[h, w]`, of anything that `ImageLike` names.

    Raises:
        InvalidImage: it cannot be read, is too large or too small, has several
            frames, or is an array of the wrong shape, type or range.
    """
    return _grey_of_array(image) if _is_array(image) else _grey_of_file(image)


def _is_array(image: object) -> bool:
    """Whether it is a NumPy array or, like a torch tensor, becomes one."""
    return hasattr(image, "__array__") and not isinstance(image, Image.Image)


def _grey_of_array(image: Any) -> GreyImage:
    with _reading("the array"):
        array = np.asarray(image)
    given = f"{array.dtype}{list(array.shape)}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InvalidImage(f"an array has the shape [h, w] or [h, w, 1|3|4], this one is {given}")
    _check_size(array.shape[1], array.shape[0], MAX_JPEG_PIXELS)
    if np.issubdtype(array.dtype, np.floating):
        if not (low := float(array.min())) >= 0 or not (high := float(array.max())) <= 1:
            bad = low if not low >= 0 else high
            raise InvalidImage(f"an array of floats has values from 0 to 1, this {given} holds {bad:g}")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype != np.uint8:
        raise InvalidImage(f"an array is uint8, or float from 0 to 1; this one is {given}")
    if array.ndim == 3:
        array = array[:, :, 0] if array.shape[2] == 1 else _grey_of_pil(Image.fromarray(array))
    return np.ascontiguousarray(array)


def _grey_of_file(image: Any) -> GreyImage:
    if isinstance(image, Image.Image):
        _check_size(*image.size, MAX_JPEG_PIXELS)
        with _reading("the image"):
            return _grey_of_pil(ImageOps.exif_transpose(image))
    name = repr(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else "the file"
    if isinstance(image, (bytes, bytearray, memoryview)):
        if not len(image):
            raise InvalidImage("the file is empty (0 bytes)")
        with _reading("the file"):
            image = io.BytesIO(image)
    elif not isinstance(image, (str, os.PathLike)) and not hasattr(image, "read"):
        raise InvalidImage(
            "an image is a path, the bytes of a file, a binary file object, a PIL image or an array; "
            f"this is of type {type(image).__name__}"
        )
    with _reading(name), Image.open(image, formats=FORMATS) as opened:
        _check_size(*opened.size, MAX_JPEG_PIXELS if opened.format in ("JPEG", "MPO") else MAX_IMAGE_PIXELS)
        # Not n_frames: to count the pages of a TIFF takes time quadratic in their number.
        if getattr(opened, "is_animated", False) and opened.format != "MPO":  # a phone's JPEG with previews behind it
            raise InvalidImage(f"an image file has a single frame, {name} ({opened.format}) has several")
        # A large JPEG decodes at 1/2, 1/4 or 1/8 of its size, and without its colours, for much less work. One that
        # is decoded in full keeps them, so that its file gives the same grey as an image or array made of it.
        if min(opened.size) >= 2 * DECODED_SIDE:
            opened.draft("L", (DECODED_SIDE, DECODED_SIDE))
        return _grey_of_pil(ImageOps.exif_transpose(opened))


_RAISED_BY_BROKEN_FILES = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    RuntimeError,
    BufferError,
    struct.error,
    Warning,  # where warnings are errors
)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what Pillow raises for a broken file, and only that, into InvalidImage."""
    try:
        yield
    except InvalidImage:
        raise
    except UnidentifiedImageError as error:
        raise InvalidImage(f"{name} is no image file of a known format ({', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit, checked before ours can be; its message begins with the number of pixels.
        found = re.search(r"\d+", str(error))
        raise InvalidImage(
            f"an image has at most {MAX_JPEG_PIXELS} pixels, {name} has {found[0] if found else 'more'}"
        ) from error
    except _RAISED_BY_BROKEN_FILES as error:
        raise InvalidImage(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _check_size(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise InvalidImage(f"an image has at most {limit} pixels, this one has {width}x{height}")
    if min(width, height) < MIN_SIDE:
        raise InvalidImage(f"an image is at least {MIN_SIDE}x{MIN_SIDE} pixels, this one is {width}x{height}")


def _grey_of_pil(image: Image.Image) -> GreyImage:
    """Grey `uint8[h, w]`, transparent parts laid over white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_of_deep(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        grey = _over(image, 255)
        # White ink on nothing is invisible over white.
        return grey if np.ptp(grey) >= MIN_CONTRAST else _over(image, 0)
    return np.asarray(image.convert("L"))


def _over(image: Image.Image, background: int) -> GreyImage:
    paper = Image.new("RGBA", image.size, (background,) * 3 + (255,))
    return np.asarray(Image.alpha_composite(paper, image).convert("L"))


def _grey_of_deep(image: Image.Image) -> GreyImage:
    """Grey of 16- or 32-bit integers, whose full scale is that of 8, 10, 12, 14 or 16 bits, or floats (1 or 255).

    Cameras and scanners write 10 to 14 bits into files of 16.
    """
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InvalidImage(f"an image of mode {image.mode} has finite values, this one holds NaN or infinity")
    peak = float(values.max())
    if image.mode == "F":
        scale = 255.0 if peak <= 1 else 1.0
    else:
        scale = 255 / next((full for full in DEEP_SCALES if peak <= full), DEEP_SCALES[-1])
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
