"""All that is told of a model: how it reads digits that are whole, damaged, moved, photographed, and what is no digit.

Takes pixels and a model; draws nothing and writes nothing.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from digits.checkpoint import Checkpoint
from digits.preprocessing import INK_SIDE, PIXELS, SIDE, InvalidImage, to_pixels
from trainer import outliers
from trainer.calibration import reliability
from trainer.corruptions import CORRUPTIONS, corrupt
from trainer.data import DataError, LabelledPixels
from trainer.evaluation import Evaluation, evaluation_of, read

THROUGH_CLIENT = 2000
"""So many damaged images of a kind are also read after `to_pixels`, which takes a millisecond for some."""

OUTLIERS = 1000
"""Pictures without a digit of each kind."""

OTHER_FONTS = ("cmr10", "cmtt10", "STIXGeneral", "STIXGeneralItalic")
"""Fonts that come with matplotlib and that no training saw."""

Progress = Callable[[Iterable[str], int], Iterable[str]]


@dataclass(frozen=True)
class Measurement:
    """Figures of one model; shares are from 0 to 1."""

    checkpoint: Checkpoint
    test: Evaluation
    logits: Tensor
    """`float32[n, 10]` of the test images."""
    calibration_error: float
    """Expected calibration error of the test images."""
    refused_digits: float | None
    """Share of the test images that look like no digit to the model; None where it has no threshold."""
    refused: dict[str, float]
    """Share of the pictures without a digit that are refused, by kind; empty where the model has no threshold."""
    damaged: dict[str, float]
    """Accuracy by kind of damage, as pixels."""
    damaged_through_client: dict[str, float]
    """The same after `to_pixels`, of the first `THROUGH_CLIENT` images."""
    lost: dict[str, float]
    """By how much the accuracy is lower for images that were moved."""
    pictures: tuple[int, int] | None
    """Pictures of the user's that were read rightly, and all."""
    pictures_calibration_error: float | None
    pictures_refused: float | None


def measure(
    checkpoint: Checkpoint,
    test: LabelledPixels,
    pictures: LabelledPixels | None = None,
    other_things: dict[str, Tensor] | None = None,
    progress: Progress = lambda names, count: names,
) -> Measurement:
    """Read everything.

    Args:
        pictures: of digits, as the client makes pixels of them.
        other_things: pixels `uint8[n, 784]` by name that show no digits, beside those that are made here.
        progress: wraps the names of the kinds of damage.
    """
    manifest = checkpoint.manifest

    def logits_of(pixels: Tensor) -> Tensor:
        return read(checkpoint.network, pixels, manifest.mean, manifest.std)

    def accuracy(pixels: Tensor) -> float:
        return evaluation_of(logits_of(pixels), test.labels[: len(pixels)]).accuracy

    def refused(logits: Tensor) -> float | None:
        if manifest.digit_threshold is None:
            return None
        return float((digit_scores(logits, manifest.temperature) < manifest.digit_threshold).float().mean())

    logits = logits_of(test.pixels)
    whole = evaluation_of(logits, test.labels)
    things = other_pictures(test) | (other_things or {})
    seen = {name: refused(logits_of(pixels)) for name, pixels in things.items()}
    damaged, through_client = {}, {}
    for kind in progress(CORRUPTIONS, len(CORRUPTIONS)):
        harmed = corrupt(test.pixels, kind)
        damaged[kind] = accuracy(harmed)
        through_client[kind] = accuracy(_as_clients_do(harmed[:THROUGH_CLIENT]))
    lost = {
        name: whole.accuracy - sum(accuracy(moved(test.pixels, **way)) for way in ways) / len(ways)
        for name, ways in MOVES.items()
    }
    of_pictures, pictures_error, pictures_refused = None, None, None
    if pictures is not None:
        read_there = logits_of(pictures.pixels)
        of_pictures = evaluation_of(read_there, pictures.labels).correct, len(pictures)
        pictures_error = reliability(read_there, pictures.labels, manifest.temperature).expected_error
        pictures_refused = refused(read_there)
    return Measurement(
        checkpoint=checkpoint,
        test=whole,
        logits=logits,
        calibration_error=reliability(logits, test.labels, manifest.temperature).expected_error,
        refused_digits=refused(logits),
        refused={name: share for name, share in seen.items() if share is not None},
        damaged=damaged,
        damaged_through_client=through_client,
        lost=lost,
        pictures=of_pictures,
        pictures_calibration_error=pictures_error,
        pictures_refused=pictures_refused,
    )


def digit_scores(logits: Tensor, temperature: float) -> Tensor:
    """How much each image looks like a digit, `float32[n]`, of logits `float32[n, classes]`.

    W. Liu, X. Wang, J. Owens, Y. Li, "Energy-based Out-of-distribution Detection", NeurIPS 2020.
    """
    return (logits / temperature).logsumexp(dim=1)


# Moved digits -------------------------------------------------------------------

MOVES: dict[str, list[dict[str, float]]] = {
    "shifted by 2 pixels": [{"right": 2}, {"right": -2}, {"down": 2}, {"down": -2}],
    "turned by 10 degrees": [{"degrees": 10}, {"degrees": -10}],
    "a tenth larger or smaller": [{"scale": 1.1}, {"scale": 0.9}],
}
"""By name, ways of `moved` whose losses are averaged."""


def moved(pixels: Tensor, right: float = 0, down: float = 0, degrees: float = 0, scale: float = 1) -> Tensor:
    """Return pixels `uint8[n, 784]` shifted by so many pixels, turned and scaled about the middle."""
    angle = torch.tensor(degrees).deg2rad()
    cos, sin = float(torch.cos(angle)) / scale, float(torch.sin(angle)) / scale
    matrix = torch.tensor([[cos, sin, -2 * right / SIDE], [-sin, cos, -2 * down / SIDE]])
    images = pixels.reshape(-1, 1, SIDE, SIDE).float()
    grid = F.affine_grid(matrix[None], [1, 1, SIDE, SIDE], align_corners=False).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, align_corners=False).round().to(torch.uint8).reshape(-1, PIXELS)


# Pictures that show no digit ----------------------------------------------------


def other_pictures(digits: LabelledPixels) -> dict[str, Tensor]:
    """Pixels `uint8[n, 784]` of the kinds that training uses, made anew of these digits, and of kinds it does not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20_000)
        made = {name.replace("_", " "): make(OUTLIERS, digits) for name, make in outliers.KINDS.items()}
    made["letters in other fonts"] = _letters()
    made["blank"] = torch.arange(0, 256, 16, dtype=torch.uint8)[:, None].expand(-1, PIXELS).contiguous()
    if (photographs := _photographs()) is not None:
        made["pieces of photographs"] = photographs
    return made


def _letters() -> Tensor:
    pictures = []
    for name in OTHER_FONTS:
        font = outliers.font_of(name, 6 * INK_SIDE)
        for letter in "ACEFGHKLMNPRTUVWXYacdefhkmnprtuvwxy":
            page = Image.new("L", (10 * INK_SIDE, 10 * INK_SIDE), 255)
            ImageDraw.Draw(page).text((INK_SIDE, INK_SIDE), letter, font=font, fill=0)
            pictures.append(to_pixels(page).reshape(PIXELS))
    return torch.from_numpy(np.stack(pictures))


def _photographs() -> Tensor | None:
    """Squares of scikit-learn's two photographs; None without scikit-learn."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        return None
    pictures = []
    for photograph in load_sample_images().images:
        grey = Image.fromarray(photograph).convert("L")
        for left in range(0, grey.width - 112, 56):
            for top in range(0, grey.height - 112, 56):
                square = grey.crop((left, top, left + 112, top + 112)).resize((SIDE, SIDE), Image.Resampling.BOX)
                pictures.append(np.asarray(square).reshape(PIXELS))
    return torch.from_numpy(np.stack(pictures))


# Pictures of digits ---------------------------------------------------------------


def read_pictures(folder: Path) -> LabelledPixels:
    """Pictures of a digit each, which a `manifest.csv` in the folder names: columns file and label.

    Raises:
        DataError: there is no such list, or a picture cannot be read.
    """
    listed = folder / "manifest.csv"
    try:
        with open(listed, newline="") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise DataError(f"{listed} lists the pictures, with the columns file and label: {error}") from error
    if not rows or not {"file", "label"} <= rows[0].keys():
        raise DataError(f"{listed}: its first line names file and label, and a line follows for each picture")
    pixels, labels = [], []
    for row in rows:
        try:
            pixels.append(to_pixels(folder / row["file"]).reshape(PIXELS))
            labels.append(int(row["label"]))
        except (InvalidImage, OSError, ValueError) as error:
            raise DataError(f"{folder / row['file']}: {error}") from error
    return LabelledPixels(torch.from_numpy(np.stack(pixels)), torch.tensor(labels))


def _as_clients_do(pixels: Tensor) -> Tensor:
    """What `to_pixels` makes of images that come as arrays of 28x28; a blank one stays as it is."""
    made: list[np.ndarray[Any, Any]] = []
    for image in pixels.reshape(-1, SIDE, SIDE).numpy():
        try:
            made.append(to_pixels(image).reshape(PIXELS))
        except InvalidImage:
            made.append(image.reshape(PIXELS))
    return torch.from_numpy(np.stack(made))
