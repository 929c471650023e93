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

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from digits import morphology
from digits.canonical import PIXELS as PIXELS
from digits.canonical import SIDE as SIDE
from digits.canonical import center_of_mass
from digits.canonical import is_canonical as is_canonical
from digits.ink import Ink, box_of
from digits.reading import MIN_CONTRAST, GreyImage, read_grey
from digits.reading import ImageLike as ImageLike
from digits.reading import InvalidImage as InvalidImage
from digits.segmentation import find_ink

CLASSES = 10
"""The digits: the classes of a model that says nothing else."""

DIGITS = tuple(str(digit) for digit in range(CLASSES))
"""What they mean: the labels of such a model."""

MAX_CLASSES = 100
"""Classes of a model at most. The number of one is then a single byte on the wire, on which `server/answers.py` relies,
and an image's probabilities and logits together, 800 bytes, are hardly longer than its pixels."""

INK_SIDE = 20
"""The longer side of the ink's box in canonical pixels."""

MEAN = 0.5
STD = 0.5
"""`features = (pixel / 255 - MEAN) / STD` unless a model's manifest says otherwise."""

THINNEST = 1.9
THICKEST = 4.5
"""Strokes are brought to between these widths in canonical pixels, as `morphology.stroke_width`
measures them. In MNIST's training images it gives 1.9 to 4.0 for nine in ten of them."""

_MAX_THINNING = 0.25  # of a stroke's width on each side, so that no stroke is broken


@dataclass(frozen=True)
class Preprocessing:
    """The stages on the way of one image, for people to look at."""

    grey: GreyImage
    """As it was read: `uint8[h, w]`."""

    ink: Ink | None
    """Where the digit was found; None for an image that already was as MNIST's."""

    pixels: npt.NDArray[np.uint8]
    """Canonical: `uint8[28, 28]`."""


def to_pixels(image: ImageLike) -> npt.NDArray[np.uint8]:
    """Return the canonical pixels, `uint8[28, 28]`, of an image of one digit.

    An image that already is as MNIST's are passes unchanged, byte for byte, and
    so does its negative, as its negative. In any other the digit is searched for
    (`digits.segmentation`), its strokes are made as wide as MNIST's, and it is
    scaled into a 20x20 box and centred by its centre of mass.

    Raises:
        InvalidImage: it cannot be read, is too large or too small, has several
            frames, is blank, or is an array of the wrong shape, type or range.
    """
    return preprocess(image).pixels


def preprocess(image: ImageLike) -> Preprocessing:
    """What `to_pixels` does, with the stages in between. The same errors."""
    if type(image) is np.ndarray and image.dtype == np.uint8 and image.shape == (SIDE, SIDE):
        grey = image  # nothing to read: what follows is all that a canonical image costs
    else:
        grey = read_grey(image)
    if is_canonical(grey):
        return Preprocessing(grey, None, grey.copy())  # never the caller's own memory
    if is_canonical(negative := 255 - grey):
        return Preprocessing(grey, None, negative)
    if (contrast := int(grey.max()) - int(grey.min())) < MIN_CONTRAST:
        raise InvalidImage(
            f"an image of a digit has a contrast of {MIN_CONTRAST} of 255 or more, this one has {contrast}"
        )
    if (ink := find_ink(grey)) is None:
        raise InvalidImage("an image of a digit shows ink also when it is made small, this one is blank then")
    return Preprocessing(grey, ink, _center(_scale_to_box(_normalize_strokes(_soften(ink)))))


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


# Geometry -------------------------------------------------------------------


def _soften(ink: Ink) -> GreyImage:
    """The digit alone, cut out: 0 on paper, 255 where the ink is strong, in between at the edges of strokes."""
    top, bottom, left, right = ink.box
    strength, mask = ink.strength[top:bottom, left:right], ink.mask[top:bottom, left:right]
    floor = 0.5 * ink.threshold
    full = max(morphology.percentile(strength[mask], 70), floor + 1)
    values = (np.clip(strength, np.float32(floor), np.float32(full)) - np.float32(floor)) * (255 / (full - floor))
    digit: GreyImage = values.astype(np.uint8)
    if not ink.is_alone:
        digit *= morphology.dilate(mask.view(np.uint8), 3)  # the soft edge of a stroke lies outside of the mask
    return digit


def _normalize_strokes(digit: GreyImage) -> GreyImage:
    """Strokes as wide as MNIST's will be, once the digit is scaled; the digit with some black around it."""
    scale = INK_SIDE / max(digit.shape)
    width = morphology.stroke_width(digit / np.float32(255)) * scale
    if width < THINNEST:
        radius = (THINNEST - width) / 2 / scale
    elif width > THICKEST:
        radius = -min((width - THICKEST) / 2, _MAX_THINNING * width) / scale
    else:
        return digit
    return morphology.grow(np.pad(digit, int(abs(radius)) + 2), radius)


def _scale_to_box(digit: GreyImage) -> GreyImage:
    """Scale the ink to a longer side of 20 and a peak of 255, aspect kept."""
    top, bottom, left, right = box_of(digit > min(80, int(digit.max()) // 2))
    height, width = bottom - top, right - left
    scale = INK_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    box = morphology.resized(digit[top:bottom, left:right], size, method)
    full: GreyImage = np.rint(box * (255 / max(box.max(), 1))).astype(np.uint8)
    return full


def _center(box: GreyImage) -> GreyImage:
    """Place the box in 28x28 with its centre of mass in the middle."""
    height, width = box.shape
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[:height, :width] = box
    y, x = center_of_mass(pixels)
    top = min(max(round(SIDE / 2 - y), 0), SIDE - height)
    left = min(max(round(SIDE / 2 - x), 0), SIDE - width)
    pixels[:height, :width] = 0
    pixels[top : top + height, left : left + width] = box
    return pixels
