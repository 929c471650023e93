"""From whatever a person hands in to what the network takes, in two halves.

`to_pixels` is geometry: image -> canonical pixels, `uint8[28, 28]`, ink bright
on black. It runs where the image is, normally in the client.

`normalize` is photometry: pixels -> features, `float32[n, 784]`. It runs where
the weights are, in the server and in the trainer.

Each half has this one implementation. Neither knows of networks or transports.

Canonical pixels are what MNIST's makers produced: the ink scaled, aspect kept,
so that its longer side is 20 pixels, and placed with its centre of mass in the
middle of 28x28 (Y. LeCun, C. Cortes, C. Burges, "The MNIST database of
handwritten digits").
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

from digits.canonical import PIXELS as PIXELS
from digits.canonical import SIDE as SIDE
from digits.canonical import is_canonical as is_canonical

CLASSES = 10

INK_SIDE = 20
"""The longer side of the ink's box in canonical pixels."""

MEAN = 0.5
STD = 0.5
"""`features = (pixel / 255 - MEAN) / STD` unless a model's manifest says otherwise."""

MAX_IMAGE_PIXELS = 24_000_000
"""Larger files are refused before they are decoded, which would take seconds and a gigabyte."""

MAX_JPEG_PIXELS = 64_000_000
"""The same for JPEG, which is decoded at an eighth of its size, and for arrays and PIL images."""

MIN_SIDE = 4
"""An image with a shorter side than this cannot show a digit."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
"""File formats that are opened."""

_WORKING_SIDE = 280  # to which pictures are shrunk before their ink is measured
_MIN_CONTRAST = 16  # of 255: less than this between paper and ink is a blank image

GreyImage: TypeAlias = npt.NDArray[np.uint8]
ImageLike: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | npt.NDArray[Any]
)
"""A path, the bytes of a file, a binary file object, a PIL image, or an array:
`uint8[h, w]`, `uint8[h, w, 1|3|4]`, or floats of these shapes in [0, 1]."""


class InvalidImage(ValueError):
    """The image breaks a rule; the message names the rule and the value."""


def to_pixels(image: ImageLike) -> npt.NDArray[np.uint8]:
    """Return the canonical pixels, `uint8[28, 28]`, of an image of one digit.

    An image that already is as MNIST's are passes unchanged, byte for byte. Any
    other is turned upright (EXIF), laid over white where transparent, made
    grey, turned to bright ink on black, cropped to its ink, scaled into a 20x20
    box and centred by its centre of mass.

    Raises:
        InvalidImage: it cannot be read, is too large or too small, has several
            frames, is blank, or is an array of the wrong shape, type or range.
    """
    if type(image) is np.ndarray and image.dtype == np.uint8 and image.shape == (SIDE, SIDE):
        grey = image  # nothing to read: what follows is all that a canonical image costs
    else:
        grey = _grey_of_array(image) if _is_array(image) else _grey_of_file(image)
    if is_canonical(grey):
        return grey.copy()  # never the caller's own memory
    ink = _bright_on_black(grey)
    if is_canonical(ink):
        return ink
    return _center(_scale_to_box(_crop_to_ink(ink)))


def normalize(pixels: npt.NDArray[np.uint8], mean: float = MEAN, std: float = STD) -> npt.NDArray[np.float32]:
    """Return features, `float32[n, 784]`, of pixels `uint8[n, 784]`.

    The operations and their order are those of torchvision's `ToTensor` and
    `Normalize`, so the features are equal to theirs bit for bit.
    """
    features = pixels.astype(np.float32)
    features /= np.float32(255)
    features -= np.float32(mean)
    features /= np.float32(std)
    return features


# Reading --------------------------------------------------------------------


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
        # A JPEG decodes at 1/2, 1/4 or 1/8 of its size for much less work.
        opened.draft(None, (2 * _WORKING_SIDE, 2 * _WORKING_SIDE))
        return _grey_of_pil(ImageOps.exif_transpose(opened))


_RAISED_BY_BROKEN_FILES = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    IndexError,
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
        image = image.convert("RGBA")
        grey = _over(image, 255)
        # White ink on nothing is invisible over white.
        return grey if np.ptp(grey) >= _MIN_CONTRAST else _over(image, 0)
    return np.asarray(image.convert("L"))


def _over(image: Image.Image, background: int) -> GreyImage:
    paper = Image.new("RGBA", image.size, (background,) * 3 + (255,))
    return np.asarray(Image.alpha_composite(paper, image).convert("L"))


def _grey_of_deep(image: Image.Image) -> GreyImage:
    """Grey of 16- or 32-bit integers (full scale 65535 if above 255) or floats (1 or 255)."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InvalidImage(f"an image of mode {image.mode} has finite values, this one holds NaN or infinity")
    if image.mode == "F":
        scale = 255.0 if values.max() <= 1 else 1.0
    else:
        scale = 1 / 257 if image.mode.startswith("I;16") or values.max() > 255 else 1.0
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)


# Geometry -------------------------------------------------------------------


def _bright_on_black(grey: GreyImage) -> GreyImage:
    """Turn to bright ink on black: the border shows which side the paper is on."""
    if np.ptp(grey) < _MIN_CONTRAST:
        raise InvalidImage(
            f"an image of a digit has a contrast of {_MIN_CONTRAST} of 255 or more, this one has {np.ptp(grey)}"
        )
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    paper = float(np.median(border))
    small = _thumbnail(grey)  # averages noise away, keeps thin ink
    return 255 - grey if paper - float(small.min()) > float(small.max()) - paper else grey


def _crop_to_ink(ink: GreyImage) -> Image.Image:
    """Cut out the ink's box, paper at 0 and ink at up to 255."""
    small = _thumbnail(ink)
    if np.ptp(small) < 1:
        raise InvalidImage(
            f"an image of a digit shows ink also at {_WORKING_SIDE}x{_WORKING_SIDE} pixels, this one is blank there"
        )
    threshold = _otsu(small)
    mask = small > threshold
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    shrunk = max(ink.shape) / max(small.shape)
    if shrunk > 1 and max(bottom - top, right - left) < _WORKING_SIDE / 4:
        # A small digit on a large page: look again, closer, with some paper around it.
        margin = max(bottom - top, right - left) / 2
        y0, y1 = max(0, round((top - margin) * shrunk)), round((bottom + margin) * shrunk)
        x0, x1 = max(0, round((left - margin) * shrunk)), round((right + margin) * shrunk)
        return _crop_to_ink(ink[y0:y1, x0:x1])
    paper = float(np.median(small[~mask]))
    full = float(np.percentile(small[mask], 90))
    # What lies nearer to the paper than to the threshold is paper's texture.
    floor = paper + 0.5 * (threshold - paper)
    scaled = np.clip((small.astype(np.float32) - floor) * (255 / max(full - floor, 1)), 0, 255)
    return Image.fromarray(np.rint(scaled[top:bottom, left:right]).astype(np.uint8))


def _thumbnail(grey: GreyImage) -> GreyImage:
    image = Image.fromarray(grey)
    image.thumbnail((_WORKING_SIDE, _WORKING_SIDE), Image.Resampling.BOX)
    return np.asarray(image)


def _otsu(grey: GreyImage) -> int:
    """The threshold that parts two classes best (N. Otsu, IEEE Trans. SMC 9(1), 1979)."""
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    above = below[-1] - below
    mass = np.cumsum(counts * np.arange(256))
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = mass / below - (mass[-1] - mass) / above
        between = np.nan_to_num(below * above * gap**2)
    return int(np.argmax(between))


def _scale_to_box(image: Image.Image) -> GreyImage:
    """Scale to a longer side of 20 and a peak of 255, aspect kept."""
    scale = INK_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    box = np.asarray(image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC))
    full: GreyImage = np.rint(box * (255 / box.max())).astype(np.uint8)
    return full


def _center(box: GreyImage) -> GreyImage:
    """Place the box in 28x28 with its centre of mass in the middle."""
    y, x = _center_of_mass(box)
    height, width = box.shape
    top = min(max(round(SIDE / 2 - y), 0), SIDE - height)
    left = min(max(round(SIDE / 2 - x), 0), SIDE - width)
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[top : top + height, left : left + width] = box
    return pixels


def _center_of_mass(grey: GreyImage) -> tuple[float, float]:
    """Row and column, in pixel indices."""
    values = grey.astype(np.float64)
    total = values.sum()
    by_row, by_column = values.sum(axis=1), values.sum(axis=0)
    return float(by_row @ np.arange(len(by_row)) / total), float(by_column @ np.arange(len(by_column)) / total)
