"""Small deformations of digits: pixels in, pixels out.

Each image of a batch gets its own affine map and its own smooth bend, and the
batch is resampled in one go. The result is rounded to `uint8`, so that what the
network learns from went the same way as what it will be served. Knows nothing
of labels, networks or epochs.

The elastic bend follows P. Simard, D. Steinkraus, J. Platt, "Best Practices for
Convolutional Neural Networks Applied to Visual Document Analysis", ICDAR 2003;
the smooth field is a coarse one, interpolated, which is cheaper than a blurred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from digits.preprocessing import SIDE

ELASTIC_KNOTS = 5
"""The bend is drawn on a grid of 5x5 points."""


@dataclass(frozen=True)
class Augmentation:
    """How far images are deformed at most.

    Every amount is drawn evenly from -x to +x and then taken down by a factor
    from `least` to 1, which an image has for its shape, and another one for its
    move: most images stay near to what people write, and the limits are seen too.
    """

    rotation_degrees: float = 14.0
    """Turn about the middle."""

    scale: float = 0.13
    """Each axis by its own factor from 1-x to 1+x."""

    shear: float = 0.2
    """Slant: columns moved by x pixels a row."""

    shift_pixels: float = 2.0
    """Move along each axis."""

    elastic_pixels: float = 1.5
    """Move of each of the bend's 5x5 points along each axis."""

    least: float = 0.0
    """The lowest factor; 1 takes nothing down."""

    pen: float = 0.5
    """Share of the images, 0 to 1, whose strokes are made thinner or thicker and whose greys darker or lighter."""


def augment(pixels: Tensor, amounts: Augmentation | None = None) -> Tensor:
    """Return deformed pixels, `uint8[n, 784]`, of pixels `uint8[n, 784]`.

    Draws from torch's global CPU generator. Amounts of 0 return the same image.
    """
    amounts = amounts or Augmentation()
    count = len(pixels)
    images = pixels.reshape(count, 1, SIDE, SIDE).float()
    strength = amounts.least + (1 - amounts.least) * torch.rand(count, 2)
    grid = _affine_grids(strength, amounts)  # (n, 2, 28, 28)
    if amounts.elastic_pixels:
        grid = grid + _bends(strength[:, 0], amounts)
    grid = grid.permute(0, 2, 3, 1)  # (n, 28, 28, 2)
    deformed = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if amounts.pen:
        deformed = _other_pens(deformed, amounts)
    return deformed.round().to(torch.uint8).reshape(count, SIDE * SIDE)


def _other_pens(images: Tensor, amounts: Augmentation) -> Tensor:
    """Some of the images `float32[n, 1, 28, 28]` as if written with another pen."""
    count = len(images)
    change = _evenly(count, 1, 1, 1)
    wider = _brightest_neighbour(images)
    narrower = -_brightest_neighbour(-images)
    changed = images + change.clamp_min(0) * (wider - images) - 0.9 * change.clamp_max(0) * (narrower - images)
    # A stroke made thinner has lost its peak; a pen does not write fainter for being finer.
    peak = changed.amax(dim=(2, 3), keepdim=True).clamp_min(60)
    changed = (changed * (255 / peak).clamp_min(1)).clamp_max(255)
    gamma = torch.exp(_evenly(count, 1, 1, 1) * 0.5)
    changed = 255 * (changed / 255) ** gamma
    return torch.where(torch.rand(count, 1, 1, 1) < amounts.pen, changed, images)


def _brightest_neighbour(images: Tensor) -> Tensor:
    """Of each pixel and the four beside, above and below it."""
    padded = F.pad(images, (1, 1, 1, 1), value=-255.0)
    beside = torch.maximum(padded[:, :, 1:-1, :-2], padded[:, :, 1:-1, 2:])
    above = torch.maximum(padded[:, :, :-2, 1:-1], padded[:, :, 2:, 1:-1])
    return torch.maximum(images, torch.maximum(beside, above))


def _affine_grids(strength: Tensor, amounts: Augmentation) -> Tensor:
    """Where in the image each pixel of the result lies, x and y from -1 to 1: `float32[n, 2, 28, 28]`.

    `strength` is of each image's shape and of its move, `float32[n, 2]`.
    """
    count = len(strength)
    shape, move = strength.T
    angle = _evenly(count) * shape * math.radians(amounts.rotation_degrees)
    scale_x = 1 + _evenly(count) * shape * amounts.scale
    scale_y = 1 + _evenly(count) * shape * amounts.scale
    shear = _evenly(count) * shape * amounts.shear
    shift = _evenly(count, 2) * move[:, None] * (amounts.shift_pixels * 2 / SIDE)
    cos, sin = torch.cos(angle), torch.sin(angle)
    x_row = torch.stack([cos / scale_x, (shear * cos - sin) / scale_x, shift[:, 0]], dim=1)
    y_row = torch.stack([sin / scale_y, (shear * sin + cos) / scale_y, shift[:, 1]], dim=1)
    maps = torch.stack([x_row, y_row], dim=1)  # (n, 2, 3)
    # One product for the whole batch; affine_grid makes n small ones and is many times slower.
    middles = (torch.arange(SIDE) * 2 + 1) / SIDE - 1  # of the pixels, from -27/28 to 27/28
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)]).reshape(3, SIDE * SIDE)
    return (maps.reshape(count * 2, 3) @ places).reshape(count, 2, SIDE, SIDE)


def _bends(strength: Tensor, amounts: Augmentation) -> Tensor:
    """Smooth displacements in the same coordinates, `float32[n, 2, 28, 28]`, for images of a strength `float32[n]`."""
    count = len(strength)
    knots = _evenly(count, 2, ELASTIC_KNOTS, ELASTIC_KNOTS) * (amounts.elastic_pixels * 2 / SIDE)
    knots = knots * strength.reshape(count, 1, 1, 1)
    # Interpolating unit vectors gives the matrix of every interpolation: two small
    # products instead of a bicubic resize, which took as long as all the rest.
    unit = torch.eye(ELASTIC_KNOTS)[None, None]
    spread = F.interpolate(unit, size=(SIDE, ELASTIC_KNOTS), mode="bicubic", align_corners=True)[0, 0]  # (28, 5)
    return spread @ knots @ spread.T


def _evenly(*shape: int) -> Tensor:
    """Numbers drawn evenly from -1 to 1."""
    return torch.rand(shape) * 2 - 1
