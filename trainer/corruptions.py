"""Damaged digits, by which a model is measured: fifteen kinds of damage, pixels in, pixels out.

The kinds and their strengths are those of N. Mu, J. Gilmer, "MNIST-C: A
Robustness Benchmark for Computer Vision", 2019 (arXiv:1906.02337), whose images
are made at one strength a kind; the code is our own, so figures are comparable
to theirs and not equal. Whole batches are damaged at once. Knows nothing of
labels or networks, and nothing here is used in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from digits.preprocessing import SIDE

MIDDLE = (SIDE - 1) / 2


def corrupt(pixels: Tensor, kind: str, seed: int = 1) -> Tensor:
    """Return the images with one kind of damage, `uint8[n, 784]`, of pixels `uint8[n, 784]`.

    The same kind, seed and images give the same result.

    Raises:
        KeyError: `kind` is not in `CORRUPTIONS`.
    """
    damage = CORRUPTIONS[kind]
    random = torch.Generator().manual_seed(seed)
    images = damage(pixels.reshape(-1, SIDE, SIDE).float() / 255, random)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).reshape(len(pixels), -1)


# Noise ----------------------------------------------------------------------


def shot_noise(images: Tensor, random: Generator) -> Tensor:
    """As of a camera to which white is three photons."""
    return torch.poisson(images * 3, generator=random) / 3


def impulse_noise(images: Tensor, random: Generator) -> Tensor:
    """17 in 100 pixels are black or white."""
    chance = torch.rand(images.shape, generator=random)
    return torch.where(chance < 0.085, 0.0, torch.where(chance < 0.17, 1.0, images))


# Blur -----------------------------------------------------------------------


def glass_blur(images: Tensor, random: Generator) -> Tensor:
    """As through frosted glass: blurred, neighbours exchanged at random in two rounds, blurred."""
    images = _blur(images, 0.7)
    every = torch.arange(len(images))
    for _ in range(2):
        for row in range(SIDE - 1, 1, -1):
            for column in range(SIDE - 1, 1, -1):
                exchanged = torch.rand(len(images), generator=random) < 0.5
                which = every[exchanged]
                up, left = torch.randint(2, (2, len(which)), generator=random)
                here = images[which, row, column]
                images[which, row, column] = images[which, row - up, column - left]
                images[which, row - up, column - left] = here
    return _blur(images, 0.7)


def motion_blur(images: Tensor, random: Generator) -> Tensor:
    """Drawn out to one side, less and less over ten pixels, along a line that is turned by up to 45 degrees."""
    angle = (torch.rand(len(images), generator=random) * 2 - 1) * math.pi / 4
    weights = torch.exp(-(torch.arange(11) ** 2) / (2 * 3.0**2))
    blurred = torch.zeros_like(images)
    for distance, weight in enumerate((weights / weights.sum()).tolist()):
        blurred += weight * _shift(images, distance * torch.cos(angle), distance * torch.sin(angle))
    return blurred


# Geometry -------------------------------------------------------------------


def shear(images: Tensor, random: Generator) -> Tensor:
    """Slanted by 0.4 pixels a row, to either side."""
    zero, one = torch.zeros(len(images)), torch.ones(len(images))
    return _warp(images, [[one, 0.4 * _sign(images, random)], [zero, one]])


def scale(images: Tensor, random: Generator) -> Tensor:
    """Shrunk to seven tenths."""
    zero, larger = torch.zeros(len(images)), torch.full((len(images),), 1 / 0.7)
    return _warp(images, [[larger, zero], [zero, larger]])


def rotate(images: Tensor, random: Generator) -> Tensor:
    """Turned by 0.4 radians (23 degrees), either way."""
    angle = 0.4 * _sign(images, random)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return _warp(images, [[cos, -sin], [sin, cos]])


def translate(images: Tensor, random: Generator) -> Tensor:
    """Moved by 3 pixels along both axes, each either way."""
    return _shift(images, 3 * _sign(images, random), 3 * _sign(images, random))


# Light and dirt ---------------------------------------------------------------


def brightness(images: Tensor, random: Generator) -> Tensor:
    """All brighter by half of the range."""
    return images + 0.5


def stripe(images: Tensor, random: Generator) -> Tensor:
    """A negative in its left and right quarters."""
    images = images.clone()
    for columns in (slice(0, SIDE // 4), slice(3 * SIDE // 4, SIDE)):
        images[:, :, columns] = 1 - images[:, :, columns]
    return images


def fog(images: Tensor, random: Generator) -> Tensor:
    """Clouds three times as bright as the ink: noise of many widths, each half as wide and 1.4 times weaker."""
    count = len(images)
    clouds = torch.zeros(count, 1, SIDE, SIDE)
    strength = 1.0
    for width in (128, 64, 32, 16, 8, 4, 2, 1):
        knots = math.ceil(SIDE / width) + 1
        noise = torch.rand((count, 1, knots, knots), generator=random) * 2 - 1
        full = F.interpolate(noise, size=((knots - 1) * width + 1,) * 2, mode="bilinear", align_corners=True)
        # Wide clouds are seen in part.
        top, left = torch.randint(full.shape[-1] - SIDE + 1, (2,), generator=random).tolist()
        clouds += strength * full[:, :, top : top + SIDE, left : left + SIDE]
        strength /= 1.4
    clouds = (clouds[:, 0] / 4 + 0.5).clamp(0, 1)  # their sum hardly leaves -2 to 2
    peak = images.amax(dim=(1, 2), keepdim=True)
    return (images + 3 * clouds) * peak / (peak + 3)


def spatter(images: Tensor, random: Generator) -> Tensor:
    """Blots of dark grey."""
    liquid = _blur(torch.randn(images.shape, generator=random) * 0.3 + 0.65, 1.0)
    blots = _blur((liquid > 0.65).float(), 1.5)
    blots = torch.where(blots < 0.8, 0.0, blots)
    return images * (1 - blots) + 0.25 * blots


def dotted_line(images: Tensor, random: Generator) -> Tensor:
    """A line from the left edge to the right, with gaps of two pixels."""
    rows = torch.randint(SIDE - 1, (2, len(images)), generator=random).float()
    points = torch.stack([torch.zeros(len(images)), rows[0], torch.full((len(images),), SIDE - 1.0), rows[1]], dim=1)
    line = _line(points)
    line[:, :, torch.arange(SIDE) % 4 < 2] = 0
    return images + line


def zigzag(images: Tensor, random: Generator) -> Tensor:
    """A zigzag line across, of teeth 2 pixels high and 4 wide."""
    count = len(images)
    first, last = 2.0, 25.0
    start = torch.randint(SIDE - 1, (count,), generator=random).float()
    slope = torch.randint(-5, 5, (count,), generator=random) / (last - first)
    columns = torch.arange(first, last, 2)
    for number, column in enumerate(columns.tolist()):
        ends = []
        for tooth, x in ((number, column), (number + 1, column + 2)):
            ends += [torch.full((count,), x), start + slope * (x - first) + 2 * math.sin(tooth * math.pi / 2)]
        images = (images + _line(torch.stack(ends, dim=1))).clamp(0, 1)
    return images


def canny_edges(images: Tensor, random: Generator) -> Tensor:
    """White where J. Canny's detector (1986) finds an edge, black elsewhere; deviation 1, thresholds 0.1 and 0.2."""
    smooth = F.pad(_blur(images, 1.0)[:, None], (1, 1, 1, 1), mode="replicate")
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    dx = F.conv2d(smooth, across[None, None])[:, 0]
    dy = F.conv2d(smooth, across.t()[None, None])[:, 0]
    size = torch.hypot(dx, dy)
    # An edge is where the slope is steepest along its own direction, of four.
    direction = torch.round(torch.atan2(dy, dx) / (math.pi / 4)).long() % 4
    padded = F.pad(size, (1, 1, 1, 1))
    thin = torch.zeros_like(size, dtype=torch.bool)
    for number, (down, right) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1)]):
        ahead = padded[:, 1 + down : SIDE + 1 + down, 1 + right : SIDE + 1 + right]
        behind = padded[:, 1 - down : SIDE + 1 - down, 1 - right : SIDE + 1 - right]
        thin |= (direction == number) & (size >= ahead) & (size > behind)
    weak, edges = thin & (size >= 0.1), thin & (size >= 0.2)
    while True:  # weak edges count where they go on from strong ones
        grown = weak & (F.max_pool2d(edges[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0)
        if bool((grown == edges).all()):
            return edges.float()
        edges = grown


CORRUPTIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    damage.__name__: damage
    for damage in (
        shot_noise,
        impulse_noise,
        glass_blur,
        motion_blur,
        shear,
        scale,
        rotate,
        brightness,
        translate,
        stripe,
        fog,
        spatter,
        dotted_line,
        zigzag,
        canny_edges,
    )
}
"""By name, in the paper's order; each takes and returns images `float32[n, 28, 28]` from 0 to 1."""


# Tools ----------------------------------------------------------------------


def _sign(images: Tensor, random: Generator) -> Tensor:
    """-1 or 1 for each image."""
    return torch.randint(2, (len(images),), generator=random).float() * 2 - 1


def _blur(images: Tensor, deviation: float) -> Tensor:
    """Gaussian, with the edge pixels continued outside."""
    radius = round(4 * deviation)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * deviation**2))
    kernel /= kernel.sum()
    padded = F.pad(images[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]


def _shift(images: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Each image moved by its own number of pixels, black behind it."""
    one, zero = torch.ones(len(images)), torch.zeros(len(images))
    matrix = torch.stack([one, zero, -2 * right / SIDE, zero, one, -2 * down / SIDE], dim=1).reshape(-1, 2, 3)
    return _sample(images, matrix)


def _warp(images: Tensor, matrix: list[list[Tensor]]) -> Tensor:
    """Each image as it is at its own linear map of each pixel's place, seen from the middle; black outside."""
    zero = torch.zeros(len(images))
    rows = [torch.stack([*row, zero], dim=1) for row in matrix]
    return _sample(images, torch.stack(rows, dim=1))


def _sample(images: Tensor, matrices: Tensor) -> Tensor:
    grid = F.affine_grid(matrices, [len(images), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _line(points: Tensor) -> Tensor:
    """White lines between points `[n, 4]` of column, row, column, row, from left to right: `float32[n, 28, 28]`."""
    column_0, row_0, column_1, row_1 = (values[:, None, None] for values in points.unbind(1))
    columns = torch.arange(SIDE).float()[None, None, :]
    rows = torch.arange(SIDE).float()[None, :, None]
    distance = (rows - row_0 - (row_1 - row_0) / (column_1 - column_0) * (columns - column_0)).abs()
    line = (torch.log1p(-(distance / 2.3).clamp(max=0.999)) + 1).clamp(0, 1)
    return line * ((columns >= column_0.floor()) & (columns < column_1.ceil()))
