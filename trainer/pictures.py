"""Pictures of one digit as people hand them in, made with a known answer.

Photos with shadows, lined paper, neighbours and the edge of a table; drawings of
all sizes, inks and papers; scans of a few pixels. Half of the digits are written
by `trainer.handwriting`, half come from MNIST where it is given. The same seed
makes the same pictures, each of them whatever else is made beside it.

To measure and to test `to_pixels` with; nothing is trained on them. Knows
nothing of how digits are found or read.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFilter

from digits.preprocessing import SIDE
from trainer.data import LabelledPixels
from trainer.handwriting import Pen, write

Grey: TypeAlias = npt.NDArray[np.floating[Any]]
Bools: TypeAlias = npt.NDArray[np.bool_]
Range: TypeAlias = tuple[float, float]

EXIF_ORIENTATION = 0x0112
TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""How a phone lays down an upright picture, by the orientation that it notes."""

FINE, MEDIUM, BROAD = (0.025, 0.06), (0.025, 0.2), (0.16, 0.26)
"""Widths of the pen in heights of the digit."""


@dataclass(frozen=True)
class Picture:
    """A file with a picture of one digit."""

    kind: str
    label: int
    name: str
    """Of the file; in the kind `extension` it ends as another format's do."""
    file: bytes
    ink: Bools
    """Where the digit is, upright: `bool[h, w]`."""


@dataclass(frozen=True)
class Kind:
    """How pictures of one kind come to be."""

    paint: Callable[[Sheet], Grey | Image.Image]
    """What is on the sheet: `float32[h, w]` from 0 to 255, or an image where there is more than grey."""
    sides: Range = (100, 420)
    """Pixels of the sheet's height."""
    part: Range = (0.35, 0.85)
    """The digit's height in parts of the sheet's shorter side."""
    pen: Range = MEDIUM
    spread: float = 0.8
    """How far from the middle the digit may lie: 1 is up to the edge."""
    turned_over: float = 0.0
    """How often the picture is the negative of what was painted."""
    quality: tuple[int, int] | None = (45, 95)
    """Of the JPEG that most of the pictures are; None for none."""
    save: Callable[[Image.Image, Sheet, str], tuple[str, bytes]] | None = None
    """File name and file, where they are out of the ordinary."""


class Sheet:
    """A sheet with a digit on it, before anything is painted."""

    def __init__(self, kind: Kind, random: np.random.Generator, scans: LabelledPixels | None) -> None:
        self.random, self.kind, self.scans = random, kind, scans
        height = int(random.integers(int(kind.sides[0]), int(kind.sides[1])))
        width = int(height * random.uniform(0.75, 1.35))
        self.digit_height = max(6, int(min(height, width) * random.uniform(*kind.part)))
        digit, self.label = self.digit()
        self.shape: tuple[int, int] = max(height, digit.shape[0] + 4), max(width, digit.shape[1] + 4)
        self._place(digit)

    def _place(self, digit: Grey) -> None:
        room = np.subtract(self.shape, digit.shape)
        shift = self.random.uniform(-0.5, 0.5, 2) * self.kind.spread
        self._lay(digit, *((room * (0.5 + shift)).astype(int)))

    def _lay(self, digit: Grey, top: int, left: int) -> None:
        height, width = digit.shape
        self.box = int(top), int(top) + height, int(left), int(left) + width
        self.ink = np.zeros(self.shape, np.float32)
        self.ink[self.box[0] : self.box[1], self.box[2] : self.box[3]] = digit
        rows, columns = np.mgrid[0 : self.shape[0], 0 : self.shape[1]].astype(np.float32)
        self.rows: Grey = rows
        self.columns: Grey = columns

    def crop(self, margins: npt.NDArray[Any]) -> None:
        """Cut the sheet off at so many pixels above, below, left and right of the digit."""
        digit = self.ink[self.box[0] : self.box[1], self.box[2] : self.box[3]]
        above, below, left, right = (int(margin) for margin in margins)
        self.shape = digit.shape[0] + above + below, digit.shape[1] + left + right
        self._lay(digit, above, left)

    @property
    def side(self) -> int:
        """What widths of lines and the like are measured by."""
        return min(self.shape)

    def digit(self) -> tuple[Grey, int]:
        """Ink from 0 to 1, `float32[h, w]`, cut out closely, and what it shows."""
        if self.scans is None or self.random.random() < 0.5:
            return _written(self.random, self.digit_height, self.kind.pen)
        return _scanned(self.random, self.digit_height, self.scans)

    def smooth(self, cells: int, amplitude: float) -> Grey:
        """Random unevenness with so many humps in a row."""
        humps = self.random.normal(0, 1, (max(2, cells), max(2, cells))).astype(np.float32)
        height, width = self.shape
        return np.asarray(Image.fromarray(humps).resize((width, height), Image.Resampling.BICUBIC)) * amplitude

    def along(self, angle: float) -> Grey:
        """From about -0.5 to 0.5 in the direction of an angle."""
        height, width = self.shape
        x, y = self.columns / np.float32(width) - np.float32(0.5), self.rows / np.float32(height) - np.float32(0.5)
        return x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))


def make_pictures(
    count: int, seed: int, kinds: Iterable[str] | None = None, scans: LabelledPixels | None = None
) -> list[Picture]:
    """Make so many pictures of each kind, of all `KINDS` unless some are named.

    `scans` are images as MNIST's are, for about half of the digits.
    """
    made = []
    for name in KINDS if kinds is None else kinds:
        for index in range(count):
            random = np.random.default_rng([seed, list(KINDS).index(name), index])
            sheet = Sheet(KINDS[name], random, scans)
            image = _painted(sheet)
            file_name, file = (sheet.kind.save or _save)(image, sheet, f"{name}-{index:03}")
            made.append(Picture(name, sheet.label, file_name, file, sheet.ink > sheet.ink.max() / 2))
    return made


def _painted(sheet: Sheet) -> Image.Image:
    painted = sheet.kind.paint(sheet)
    if isinstance(painted, Image.Image):
        return painted
    if sheet.random.random() < sheet.kind.turned_over:
        painted = 255 - painted
    return Image.fromarray(np.clip(painted, 0, 255).astype(np.uint8))


# Ink ------------------------------------------------------------------------


def _written(random: np.random.Generator, height: int, pen_widths: Range) -> tuple[Grey, int]:
    """A digit that `trainer.handwriting` writes, about so many pixels high or wide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random.integers(2**31)))
        writing = write(1, Pen(rotation_degrees=7, thinnest=pen_widths[0], thickest=pen_widths[1]))
    points = writing.points[0].double().numpy()
    low = points.min(axis=0)
    scale = height / max(float((points.max(axis=0) - low).max()), 1e-6)
    width = max(1.2, 2 * float(writing.half[0]) * height)
    finer = 2  # drawn at twice the size, for soft edges
    at = ((points - low) * scale + width / 2 + 1) * finer
    columns, rows = np.ceil(at.max(axis=0) / finer + width / 2 + 1).astype(int).tolist()
    image = Image.new("L", (columns * finer, rows * finer))
    pen = ImageDraw.Draw(image)
    radius = width * finer / 2
    for index, (x, y) in enumerate(at):
        if not writing.begins[0, index]:
            pen.line([tuple(at[index - 1]), (x, y)], fill=255, width=max(1, round(2 * radius)))
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    ink = np.asarray(image.resize((columns, rows), Image.Resampling.BOX), np.float32) / 255
    inked = ink > 0
    return ink[np.ix_(inked.any(axis=1), inked.any(axis=0))], int(writing.digits[0])


def _scanned(random: np.random.Generator, height: int, scans: LabelledPixels) -> tuple[Grey, int]:
    """One of the scans, enlarged and with strokes that are wider or narrower."""
    index = int(random.integers(len(scans)))
    pixels = scans.pixels[index].numpy().reshape(SIDE, SIDE)
    inked = pixels > 30
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = height / max(pixels.shape)
    size = max(2, round(pixels.shape[1] * scale)), max(2, round(pixels.shape[0] * scale))
    values = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    threshold, softness = random.uniform(0.25, 0.65), random.uniform(0.1, 0.5)
    ink: Grey = np.clip((values - threshold) / softness + 0.5, 0, 1).astype(np.float32)
    return ink, int(scans.labels[index])


# Paper and what else is on it -----------------------------------------------


def _photo(
    sheet: Sheet,
    shade: Grey | float = 1.0,
    marks: Grey | None = None,
    faint: bool = False,
    behind: Callable[[Sheet, Grey], Grey] | None = None,
    blur: Range = (0, 1 / 150),
) -> Grey:
    """Ink on uneven paper in uneven light, through a camera; `marks` are other ink, from 0 to 1."""
    random = sheet.random
    paper = random.uniform(130, 245)
    ink = paper - random.uniform(35, 70) if faint else random.uniform(20, 90)
    light = paper * (1 + random.uniform(0, 0.35) * sheet.along(random.uniform(0, 2 * math.pi)))
    light = light + sheet.smooth(4, random.uniform(0, 8)) + sheet.smooth(sheet.side // 6, random.uniform(0, 3))
    light = light * shade
    grey = light * (1 - sheet.ink) + ink * sheet.ink
    if marks is not None:
        grey = grey * (1 - marks) + np.minimum(grey, ink) * marks
    if behind is not None:
        grey = behind(sheet, grey)
    return _camera(sheet, grey, blur)


def _camera(sheet: Sheet, grey: Grey, blur: Range) -> Grey:
    """Out of focus and with noise; `blur` is in parts of the sheet's side."""
    image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(sheet.random.uniform(*blur) * sheet.side))
    return np.asarray(image, np.float32) + _noise(sheet, (0.5, 7))


def _noise(sheet: Sheet, deviations: Range) -> Grey:
    noise: Grey = sheet.random.normal(0, sheet.random.uniform(*deviations), sheet.shape).astype(np.float32)
    return noise


def _shadow(sheet: Sheet) -> Grey:
    """An edge, sharp or soft, at any angle; a fifth to a half of the light is missing beyond it."""
    random = sheet.random
    distance = sheet.along(random.uniform(0, 2 * math.pi)) - random.uniform(-0.35, 0.35)
    shadow: Grey = 1 - random.uniform(0.2, 0.5) * (0.5 + 0.5 * np.tanh(distance * random.uniform(8, 100)))
    return shadow


def _lines(sheet: Sheet, squared: bool, tilt_degrees: float = 0.0) -> Grey:
    """Printed lines, and others across them."""
    random = sheet.random
    step = random.uniform(0.12, 0.45) * sheet.side
    width = max(1, sheet.side / 200 * random.uniform(0.6, 1.6))
    tilt = math.radians(random.uniform(-tilt_degrees, tilt_degrees))
    down = sheet.rows * math.cos(tilt) + sheet.columns * math.sin(tilt)
    across = sheet.columns * math.cos(tilt) - sheet.rows * math.sin(tilt)
    lined = (down + random.uniform(0, step)) % step < width
    if squared:
        lined |= (across + random.uniform(0, step)) % step < width
    return lined.astype(np.float32) * np.float32(random.uniform(0.12, 0.4))


def _neighbours(sheet: Sheet) -> Grey:
    """Parts of one or two other digits at the edges, apart from ours."""
    random = sheet.random
    apart = 2 * (sheet.side // 30) + 3
    near = np.asarray(Image.fromarray((sheet.ink > 0).astype(np.uint8)).filter(ImageFilter.MaxFilter(apart))) > 0
    marks = np.zeros(sheet.shape, np.float32)
    height, width = sheet.shape
    for edge in random.permutation(4)[: random.integers(1, 3)]:
        other, _ = sheet.digit()
        rows, columns = (max(1, int(side * random.uniform(0.2, 0.5))) for side in other.shape)
        other = (other[:, -columns:], other[:, :columns], other[-rows:], other[:rows])[edge]
        other = other[:height, :width]
        free = height - other.shape[0], width - other.shape[1]
        top = (0, 0, 0, free[0])[edge] if edge > 1 else int(random.uniform(0, free[0] + 1))
        left = (0, free[1], 0, 0)[edge] if edge < 2 else int(random.uniform(0, free[1] + 1))
        placed = np.zeros(sheet.shape, np.float32)
        placed[top : top + other.shape[0], left : left + other.shape[1]] = other
        if not (placed[near] > 0).any():
            marks = np.maximum(marks, placed)
    return marks


def _specks(sheet: Sheet) -> Grey:
    random = sheet.random
    marks = np.zeros(sheet.shape, np.float32)
    for _ in range(random.integers(3, 25)):
        y, x = random.uniform(0, sheet.shape[0]), random.uniform(0, sheet.shape[1])
        speck = np.hypot(sheet.rows - y, sheet.columns - x) < random.uniform(0.003, 0.018) * sheet.side
        marks = np.maximum(marks, speck * np.float32(random.uniform(0.3, 1)))
    return marks


def _table(sheet: Sheet, grey: Grey) -> Grey:
    """Dark beyond one or two slanting edges of the sheet, which leave room to the digit."""
    random = sheet.random
    height, width = sheet.shape
    top, bottom, left, right = sheet.box
    y, x = sheet.rows / height, sheet.columns / width
    for edge in random.permutation(4)[: random.integers(1, 3)]:
        room = (top / height, 1 - bottom / height, left / width, 1 - right / width)[edge]
        depth, dark, tilt = min(random.uniform(0.02, 0.1), 0.8 * room), random.uniform(15, 80), random.uniform(0, 0.05)
        away = (y + tilt * x, 1 - y + tilt * x, x + tilt * y, 1 - x + tilt * y)[edge]
        grey = np.where(away < depth, dark + sheet.smooth(8, 6), grey)
    return grey


# Kinds ----------------------------------------------------------------------


def _drawing(sheet: Sheet) -> Grey:
    """Black on white, as paint programs export it."""
    grey: Grey = 255 * (1 - sheet.ink)
    return grey


def _pale(sheet: Sheet) -> Grey:
    paper: Grey = sheet.random.uniform(60, 220) - sheet.random.uniform(25, 60) * sheet.ink
    return paper


def _chalk(sheet: Sheet, unevenness: Grey) -> Grey:
    """Bright on a dark board."""
    board, chalk = sheet.random.uniform(10, 70), sheet.random.uniform(150, 255)
    grey: Grey = board * unevenness * (1 - sheet.ink) + chalk * sheet.ink + _noise(sheet, (1, 6))
    return grey


def _vignette(sheet: Sheet) -> Grey:
    """A small picture, darker or brighter towards its corners."""
    height, width = sheet.shape
    away = (sheet.rows / height - 0.5) ** 2 + (sheet.columns / width - 0.5) ** 2
    amount = sheet.random.uniform(0, 0.6) * sheet.random.choice([-1, 1])
    return _chalk(sheet, 1 - amount * 2 * away)


def _frame(sheet: Sheet) -> Grey:
    """A box drawn around the digit, where there is room for one."""
    random = sheet.random
    grey = _drawing(sheet)
    thick, value = max(1, int(sheet.side * random.uniform(0.004, 0.02))), random.uniform(0, 140)
    inset = int(random.uniform(0, 0.03) * sheet.side)
    height, width = sheet.shape
    top, bottom, left, right = sheet.box
    if min(top, height - bottom, left, width - right) > inset + thick + 1:
        box = grey[inset : height - inset, inset : width - inset]
        inside = box[thick:-thick, thick:-thick].copy()
        box[:] = value
        box[thick:-thick, thick:-thick] = inside
    return grey


def _pasted(sheet: Sheet) -> Grey:
    """A greyish cut-out on white."""
    top, bottom, left, right = sheet.box
    margin = int(sheet.side * 0.06)
    grey = _drawing(sheet)
    cut = (slice(max(0, top - margin), bottom + margin), slice(max(0, left - margin), right + margin))
    noise: Grey = sheet.random.normal(0, 2, sheet.shape).astype(np.float32)
    grey[cut] = (np.minimum(grey, sheet.random.uniform(205, 235)) + noise)[cut]
    return grey


def _coloured(sheet: Sheet, paper: npt.NDArray[Any], ink: npt.NDArray[Any]) -> Image.Image:
    covered = sheet.ink[..., None]
    return Image.fromarray((paper * (1 - covered) + ink * covered).astype(np.uint8))


def _colours(sheet: Sheet) -> Image.Image:
    """Any ink on white or pale paper that is brighter or darker by 45 of 255 or more."""
    random = sheet.random
    paper = np.full(3, 255) if random.random() < 0.5 else random.integers(170, 256, 3)
    while True:
        ink = random.integers(0, 256, 3)
        if abs(float((paper - ink) @ (0.299, 0.587, 0.114))) >= 45:
            return _coloured(sheet, paper, ink)


def _highlighter(sheet: Sheet) -> Image.Image:
    """Yellow or as light another colour on white: 25 to 60 of 255 darker than the paper."""
    inks = np.array(
        [[255, 235, 40], [250, 220, 90], [255, 205, 215], [190, 235, 180], [175, 225, 250], [255, 215, 165]]
    )
    return _coloured(sheet, np.full(3, 255), inks[sheet.random.integers(len(inks))])


def _transparent(sheet: Sheet) -> Image.Image:
    """Black, white or grey ink on nothing."""
    value = (0, 255, 90)[sheet.random.integers(3)]
    alpha = (sheet.ink * 255).astype(np.uint8)
    return Image.fromarray(np.dstack([np.full((*sheet.shape, 3), value, np.uint8), alpha]))


def _tight(sheet: Sheet) -> Grey:
    """A broad marker that all but fills the picture."""
    sheet.crop(sheet.random.uniform(0.01, 0.1, 4) * sheet.digit_height + 1)
    return _photo(sheet)


def _touching(sheet: Sheet) -> Grey:
    """One or two ends of the digit lie on the picture's edge."""
    margins = sheet.random.uniform(0.05, 0.4, 4) * sheet.digit_height
    margins[sheet.random.permutation(4)[: sheet.random.integers(1, 3)]] = 0
    sheet.crop(margins)
    return _photo(sheet)


def _tiny(sheet: Sheet) -> Grey:
    """A scan of 8 to 14 pixels that the digit fills, in 17 shades of grey."""
    sheet.crop(sheet.random.integers(0, 2, 4) * sheet.digit_height / 10)
    height = int(sheet.random.integers(8, 15))
    width = max(5, round(height * sheet.shape[1] / sheet.shape[0]))
    small = np.asarray(Image.fromarray(sheet.ink).resize((width, height), Image.Resampling.BOX))
    sheet.shape, sheet.ink = (height, width), small
    return 255 - np.rint(small / max(float(small.max()), 1e-6) * 16) * np.float32(255 / 16)


# Files ----------------------------------------------------------------------


def _save(image: Image.Image, sheet: Sheet, name: str) -> tuple[str, bytes]:
    if image.mode == "RGBA" or sheet.kind.quality is None or sheet.random.random() < 0.4:
        return f"{name}.png", _encode(image, "PNG")
    return f"{name}.jpg", _encode(image, "JPEG", quality=int(sheet.random.integers(*sheet.kind.quality)))


def _save_jpeg(image: Image.Image, sheet: Sheet, name: str) -> tuple[str, bytes]:
    return f"{name}.jpg", _encode(image, "JPEG", quality=int(sheet.random.integers(8, 22)))


def _save_turned(image: Image.Image, sheet: Sheet, name: str) -> tuple[str, bytes]:
    """As a phone does that is held another way: the picture lies, and a note says how."""
    orientation = int(sheet.random.choice(list(TURNS)))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return f"{name}.jpg", _encode(image.transpose(TURNS[orientation]), "JPEG", quality=85, exif=exif)


def _save_misnamed(image: Image.Image, sheet: Sheet, name: str) -> tuple[str, bytes]:
    if sheet.random.random() < 0.5:
        return f"{name}.png", _encode(image, "JPEG", quality=85)
    return f"{name}.jpg", _encode(image, str(sheet.random.choice(["PNG", "WEBP", "BMP"])))


def _encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


SMALL = (24, 48)

KINDS: dict[str, Kind] = {
    "photo": Kind(_photo),
    "shadow": Kind(lambda sheet: _photo(sheet, shade=_shadow(sheet))),
    "ruled": Kind(lambda sheet: _photo(sheet, marks=_lines(sheet, squared=False))),
    "squared": Kind(lambda sheet: _photo(sheet, marks=_lines(sheet, squared=True))),
    "tilted": Kind(lambda sheet: _photo(sheet, marks=_lines(sheet, squared=True, tilt_degrees=8))),
    "neighbours": Kind(lambda sheet: _photo(sheet, marks=_neighbours(sheet))),
    "specks": Kind(lambda sheet: _photo(sheet, marks=_specks(sheet))),
    "table": Kind(lambda sheet: _photo(sheet, behind=_table)),
    "pencil": Kind(lambda sheet: _photo(sheet, faint=True)),
    "marker": Kind(_photo, pen=BROAD),
    "blurred": Kind(lambda sheet: _photo(sheet, blur=(0.01, 0.03))),
    "jpeg": Kind(_photo, save=_save_jpeg),
    "rotated": Kind(_photo, sides=(300, 900), save=_save_turned),
    "extension": Kind(_photo, save=_save_misnamed),
    "tight": Kind(_tight, pen=BROAD),
    "touching": Kind(_touching),
    "canvas": Kind(_drawing, turned_over=0.35),
    "corner": Kind(_drawing, part=(0.15, 0.35), spread=1.0, turned_over=0.35),
    "export28": Kind(_drawing, sides=SMALL, turned_over=0.35),
    "thin28": Kind(_drawing, sides=SMALL, pen=FINE, turned_over=0.35),
    "tiny": Kind(_tiny, quality=None, turned_over=0.5),
    "lowcontrast": Kind(_pale, turned_over=0.35),
    "chalk": Kind(lambda sheet: _chalk(sheet, 1 + sheet.smooth(4, 0.12))),
    "vignette": Kind(_vignette, sides=SMALL),
    "frame": Kind(_frame),
    "pasted": Kind(_pasted),
    "colour": Kind(_colours),
    "highlighter": Kind(_highlighter),
    "transparent": Kind(_transparent),
}
