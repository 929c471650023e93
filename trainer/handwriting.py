"""Digits drawn by a model of a pen, to train on beside MNIST's.

MNIST's writers were Americans of about 1990. People elsewhere write a 1 with a
long upstroke or a foot, a 7 with a bar, an open 4, a 9 with a straight leg, and
on a screen their strokes are thinner or thicker than a pencil's. `STYLES` holds
the ways of writing each digit as strokes through a few points; each drawing
moves the points, slants and turns the whole, and takes a pen of its own width.
Nothing of it is measured from anybody's pictures.

Knows nothing of data sets or training.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from digits.preprocessing import CLASSES, INK_SIDE, SIDE

Stroke = list[tuple[float, float]]

STYLES = """
0 3: 50,0 20,12 5,50 20,88 50,100 80,88 95,50 80,12 50,0 36,4
0 2: 45,0 20,20 15,50 22,85 45,100 68,80 75,50 68,15 45,0 30,8
0 1: 62,4 30,6 6,40 14,85 50,100 86,82 94,42 74,10 45,6
1 2: 50,0 50,50 50,100
1 3: 22,28 50,0 50,0 50,50 50,100
1 3: 0,52 26,27 50,0 50,0 50,50 50,100
1 1: 12,38 32,20 50,0 50,0 50,50 50,100
1 2: 25,25 50,0 50,0 50,50 50,100 / 20,100 50,100 80,100
1 1: 50,0 50,50 50,100 / 25,100 50,100 75,100
1 1: 30,12 50,0 50,0 50,50 50,100
2 3: 10,25 25,5 50,0 80,10 85,32 65,60 35,82 8,100 8,100 50,98 95,98
2 2: 10,22 30,3 55,2 82,20 75,50 50,78 20,97 6,90 15,78 40,85 65,98 95,90
2 1: 8,6 45,2 85,5 85,5 50,50 10,97 10,97 50,97 92,95
2 1: 15,30 20,8 50,0 78,10 80,35 55,65 10,96 10,96 50,92 90,100
3 3: 12,12 40,0 75,6 82,25 65,43 38,47 38,47 72,54 88,75 70,95 38,100 8,88
3 2: 12,2 50,2 85,2 85,2 60,22 42,40 42,40 75,45 90,70 72,95 40,100 10,88
3 2: 15,15 40,1 72,10 70,35 45,45 35,44 60,48 82,70 65,95 35,100 12,86
4 2: 30,0 20,30 8,58 8,58 50,58 95,56 / 70,18 68,60 64,100
4 2: 65,0 35,35 5,68 5,68 50,68 95,68 / 66,0 66,50 66,100
4 2: 20,2 17,30 20,50 20,50 50,53 78,48 / 78,2 76,50 74,100
4 1: 55,0 30,35 10,62 10,62 50,64 90,60 / 62,35 56,70 50,100
4 1: 12,5 10,35 20,52 50,50 74,40 80,5 80,5 78,50 72,100
5 2: 22,2 20,22 17,42 17,42 45,36 78,48 85,72 65,95 35,100 8,90 / 22,2 50,2 88,0
5 2: 88,2 55,2 22,4 22,4 20,22 16,43 16,43 50,38 82,55 80,82 50,100 10,93
5 1: 85,6 50,0 25,15 22,38 45,46 72,60 72,85 45,100 12,92
5 1: 25,8 22,25 18,44 18,44 50,42 80,60 75,88 45,100 10,93 / 30,0 60,2 95,-4
6 3: 70,0 40,20 17,50 12,78 30,98 60,100 85,82 80,60 55,50 28,60 14,80
6 2: 40,0 22,30 14,65 25,94 55,100 80,85 78,65 50,56 22,68
6 1: 82,8 55,2 25,25 12,62 22,92 50,100 82,88 85,65 60,50 30,56 14,74
7 3: 5,4 50,3 92,2 92,2 70,35 50,68 38,100
7 2: 5,4 50,3 92,2 92,2 70,35 50,68 38,100 / 28,50 55,48 85,46
7 1: 10,20 8,3 8,3 50,5 90,2 90,2 65,40 52,70 48,100
7 1: 10,18 10,2 10,2 50,4 92,2 92,2 65,40 50,70 42,100 / 25,52 55,50 85,48
7 1: 8,10 30,2 60,10 92,2 92,2 68,35 45,65 30,100 / 20,55 50,52 85,50
7 1: 12,6 50,2 82,3 85,10 75,40 66,70 62,100
8 3: 75,12 50,0 22,10 20,30 50,48 80,66 82,88 50,100 18,88 20,66 50,48 78,30 75,12 60,3
8 1: 50,0 25,6 20,25 35,42 50,45 65,42 80,25 75,6 50,0 / 50,45 22,55 12,75 25,95 50,100 75,95 88,75 78,55 50,45
8 1: 80,5 45,0 25,18 45,42 70,62 75,85 48,100 25,85 35,62 60,42 80,20 82,5
9 2: 80,20 55,2 25,10 15,32 32,52 62,48 80,22 80,22 78,60 72,100
9 2: 78,18 50,0 22,12 16,35 40,52 70,42 80,18 82,55 72,88 45,100 18,90
9 1: 70,8 42,2 20,20 25,42 50,46 72,28 75,8 68,40 50,75 35,100
9 1: 50,0 25,5 15,25 25,45 50,50 75,42 84,22 74,4 50,0 / 82,10 82,55 80,100
9 1: 80,15 50,0 20,14 20,36 50,48 80,30 80,10 80,10 80,60 68,92 40,100 15,82
"""
"""Each digit's styles: how often one is drawn, and its strokes, parted by a slash, through points `x,y` in hundredths
of the height of a box, y downwards. A stroke is smooth, but at a point that is given twice it has a corner."""

STEPS = 7
"""Pieces of the curve between two given points."""

CURVE_POINTS = 144
"""Points of a whole digit, less than half a pixel from one to the next, so that the pen leaves no gaps."""


@dataclass(frozen=True)
class Pen:
    """How drawings of one style differ; amounts are standard deviations unless said otherwise."""

    jitter: float = 0.04
    """Of each point, in heights of the digit; each drawing has its own share of it."""

    narrowest: float = 0.4
    widest: float = 1.1
    """The width of the box in heights is drawn evenly between these; a 1 takes four fifths of it."""

    rotation_degrees: float = 6.0

    slant: float = 0.15
    """Columns moved by so many rows a row."""

    thinnest: float = 0.05
    thickest: float = 0.28
    """The pen's width in heights; its logarithm is drawn evenly."""


@dataclass(frozen=True)
class Writing:
    """The ways of a pen, each that of one digit; lengths are in heights of the digit before it was slanted."""

    points: Tensor
    """`float32[n, CURVE_POINTS, 2]`, x and y, y downwards."""

    begins: Tensor
    """Where the pen is set down: the points that no line leads to, `bool[n, CURVE_POINTS]`."""

    half: Tensor
    """Half of the pen's width, `float32[n]`."""

    digits: Tensor
    """`int64[n]`."""


def write(count: int, pen: Pen | None = None) -> Writing:
    """Write so many digits, as many of each. Draws from torch's global CPU generator."""
    pen = pen or Pen()
    chosen = torch.multinomial(_WEIGHTS, count, replacement=True)
    digits = _DIGITS[chosen]
    points = torch.empty(count, CURVE_POINTS, 2)
    begins = torch.empty(count, CURVE_POINTS, dtype=torch.bool)
    for index in sorted(set(chosen.tolist())):
        rows = torch.nonzero(chosen == index)[:, 0]
        style = _STYLES[index]
        moved = torch.randn(len(rows), len(style.points), 2) * (pen.jitter * 2 * torch.rand(len(rows), 1, 1))
        points[rows] = style.curve @ (style.points + moved[:, style.same])  # (n, CURVE_POINTS, 2)
        begins[rows] = style.begins
    points = _slant(points, digits, pen)
    half = torch.exp(_evenly(count, math.log(pen.thinnest), math.log(pen.thickest))) / 2
    return Writing(points, begins, half, digits)


def draw(count: int, pen: Pen | None = None) -> tuple[Tensor, Tensor]:
    """Return canonical pixels, `uint8[n, 784]`, and digits, `int64[n]`, of so many drawings; as many of each digit.

    Draws from torch's global CPU generator.
    """
    writing = write(count, pen)
    points, half = writing.points, writing.half
    # To a longer side of 20, pen included, and the middle of the strokes to the middle of the image.
    size = (points.amax(1) - points.amin(1)).amax(1) + 2 * half
    scale = INK_SIDE / size
    points = points * scale[:, None, None]
    points = points - points.mean(dim=1, keepdim=True) + SIDE / 2
    return ink_of(points, half * scale, 0.5 + 0.4 * torch.rand(count)), writing.digits


def _slant(points: Tensor, digits: Tensor, pen: Pen) -> Tensor:
    """Points narrowed, slanted and turned, each drawing in its own way."""
    count = len(points)
    width = _evenly(count, pen.narrowest, pen.widest) * torch.where(digits == 1, 0.8, 1.0)
    slant = torch.randn(count) * pen.slant
    angle = torch.randn(count) * math.radians(pen.rotation_degrees)
    x = points[..., 0] * width[:, None] - points[..., 1] * slant[:, None]
    y = points[..., 1]
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)


def ink_of(points: Tensor, half_width: Tensor, softness: Tensor) -> Tensor:
    """Pixels, `uint8[n, 784]`, of a round pen's way through points `float32[n, k, 2]`."""
    middles = torch.arange(SIDE) + 0.5
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    places = torch.stack([x, y], dim=-1).reshape(SIDE * SIDE, 2)
    pixels = torch.empty(len(points), SIDE * SIDE, dtype=torch.uint8)
    for start in range(0, len(points), 256):
        rows = slice(start, start + 256)
        distance = torch.cdist(places.expand(len(points[rows]), -1, -1), points[rows]).amin(dim=2)  # (n, 784)
        ink = ((half_width[rows, None] - distance) / softness[rows, None] + 0.5).clamp(0, 1)
        pixels[rows] = (ink * (255 / ink.amax(dim=1, keepdim=True).clamp_min(0.2))).round().to(torch.uint8)
    return pixels


def smooth_curve(points: Tensor, count: int) -> Tensor:
    """So many points of a curve through each row of k points: `float32[n, count, 2]` of `float32[n, k, 2]`."""
    weights = _spline([(float(i), 0.0) for i in range(points.shape[1])])  # (m, k)
    places = torch.linspace(0, len(weights) - 1, count)
    before = places.long().clamp_max(len(weights) - 2)
    part = (places - before)[:, None]
    between: Tensor = (weights[before] * (1 - part) + weights[before + 1] * part) @ points
    return between


def _evenly(count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count)


class _Style:
    """The strokes of one style as a matrix: points on the curve are weighted means of the given points."""

    def __init__(self, strokes: list[Stroke]) -> None:
        given = [point for stroke in strokes for point in stroke]
        self.points = torch.tensor(given)  # (k, 2)
        # Points at the same place stay together: corners, and strokes that meet.
        self.same = torch.tensor([given.index(point) for point in given])
        curves = []
        first = 0
        for stroke in strokes:
            weights = _spline(stroke)
            curve = torch.zeros(len(weights), len(given))
            curve[:, first : first + len(stroke)] = weights
            curves.append(curve)
            first += len(stroke)
        lengths = torch.tensor([float((curve @ self.points).diff(dim=0).norm(dim=1).sum()) for curve in curves])
        counts = (lengths / lengths.sum() * CURVE_POINTS).round().int().tolist()
        counts[0] += CURVE_POINTS - sum(counts)
        self.curve = torch.cat([_evenly_spaced(c, self.points, n) for c, n in zip(curves, counts, strict=True)])
        self.begins = torch.zeros(CURVE_POINTS, dtype=torch.bool)
        self.begins[[sum(counts[:stroke]) for stroke in range(len(counts))]] = True


def _evenly_spaced(curve: Tensor, points: Tensor, count: int) -> Tensor:
    """As many points at equal distances along a curve: `float32[count, k]` of `float32[m, k]`."""
    steps = (curve @ points).diff(dim=0).norm(dim=1)
    along = torch.cat([torch.zeros(1), steps.cumsum(0)])
    wanted = torch.linspace(0, float(along[-1]), count)
    before = (torch.searchsorted(along, wanted, right=True) - 1).clamp(0, len(steps) - 1)
    part = ((wanted - along[before]) / steps[before]).clamp(0, 1)[:, None]
    between: Tensor = curve[before] * (1 - part) + curve[before + 1] * part
    return between


def _spline(stroke: Stroke) -> Tensor:
    """Weights of a stroke's points in each point of its curve.

    E. Catmull, R. Rom, "A Class of Local Interpolating Splines", 1974.
    """
    unit = torch.eye(len(stroke))
    t = torch.linspace(0, 1, STEPS + 1)[:-1, None]
    rows = []
    for i in range(len(stroke) - 1):
        if stroke[i] == stroke[i + 1]:
            continue
        b, c = unit[i], unit[i + 1]
        # Beyond an end or a corner the curve goes straight on.
        a = unit[i - 1] if i > 0 and stroke[i - 1] != stroke[i] else 2 * b - c
        d = unit[i + 2] if i + 2 < len(stroke) and stroke[i + 2] != stroke[i + 1] else 2 * c - b
        rows.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    return torch.cat([*rows, unit[-1:]])


def _parse(text: str) -> list[tuple[int, int, list[Stroke]]]:
    """Digit, how often, and strokes of each style."""
    styles = []
    for digit, often, strokes in re.findall(r"(\d) (\d+): ([^:]+)(?=\n\d \d+:|$)", text.strip()):
        parted = [
            [(int(x) / 100, int(y) / 100) for x, y in re.findall(r"(-?\d+),(-?\d+)", stroke)]
            for stroke in strokes.split("/")
        ]
        styles.append((int(digit), int(often), parted))
    return styles


_PARSED = _parse(STYLES)
_STYLES = [_Style(strokes) for _, _, strokes in _PARSED]
_DIGITS = torch.tensor([digit for digit, _, _ in _PARSED])
_OFTEN = torch.tensor([float(often) for _, often, _ in _PARSED])
_WEIGHTS = _OFTEN / torch.zeros(CLASSES).index_add(0, _DIGITS, _OFTEN)[_DIGITS]
