"""Damage to pictures, to train on: pixels in, pixels out.

What cameras, scanners, light, paper and careless hands do: noise, blur, uneven
light, fog, lines across, blots, parts in negative, outlines in place of strokes.
Each picture suffers one kind, at a strength of its own. A model is measured by
`trainer.corruptions`, whose kinds are related, but made in other ways.

Whole batches are damaged at once. Draws from torch's global CPU generator.
Knows nothing of labels or networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from digits.preprocessing import SIDE
from trainer.augmentation import Augmentation, augment

ASKEW = Augmentation(
    rotation_degrees=28.0, scale=0.35, shear=0.45, shift_pixels=3.5, elastic_pixels=0.0, least=1.0, pen=0.0
)  # further than a canonical digit may be


def damage(pixels: Tensor) -> Tensor:
    """Return pictures each of which suffered one kind of damage, `uint8[n, 784]`, of pixels `uint8[n, 784]`."""
    kinds = torch.randint(len(KINDS) + 1, (len(pixels),)) % len(KINDS)  # the first kind is twice as frequent
    images = pixels.reshape(-1, SIDE, SIDE).float() / 255
    for number, harm in enumerate(KINDS.values()):
        rows = torch.nonzero(kinds == number)[:, 0]
        if len(rows):
            images[rows] = harm(images[rows])
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).reshape(-1, SIDE * SIDE)


def askew(images: Tensor) -> Tensor:
    """Turned, slanted, shrunk, grown and moved further than a digit that was laid out well."""
    pixels = (images * 255).round().to(torch.uint8).reshape(-1, SIDE * SIDE)
    return augment(pixels, ASKEW).reshape(images.shape).float() / 255


def grain(images: Tensor) -> Tensor:
    """Noise of a sensor: everywhere, or only where there is light."""
    strength = 0.6 * torch.rand(len(images), 1, 1)
    where = torch.where(torch.rand(len(images), 1, 1) < 0.5, 1.0, images.sqrt() * 1.5)
    return images + torch.randn_like(images) * strength * where


def dead_pixels(images: Tensor) -> Tensor:
    """Pixels that are black or white, up to a quarter of them."""
    chance = torch.rand_like(images)
    share = 0.25 * torch.rand(len(images), 1, 1)
    return torch.where(chance < share / 2, 0.0, torch.where(chance < share, 1.0, images))


def unsharp(images: Tensor) -> Tensor:
    """Out of focus, or moved while the picture was taken: a blur that is round or long."""
    y, x = torch.meshgrid(torch.arange(9) - 4.0, torch.arange(9) - 4.0, indexing="ij")
    angle = torch.rand(len(images), 1, 1) * math.pi
    along = torch.cos(angle) * x + torch.sin(angle) * y
    across = torch.cos(angle) * y - torch.sin(angle) * x
    long = 0.5 + 2.5 * torch.rand(len(images), 1, 1)
    wide = torch.where(torch.rand(len(images), 1, 1) < 0.5, 0.4, (long * 0.6).clamp_max(1.4))
    kernels = torch.exp(-((along / long) ** 2) / 2 - (across / wide) ** 2 / 2)
    kernels = kernels / kernels.sum(dim=(1, 2), keepdim=True)
    return F.conv2d(images[None], kernels[:, None], padding=4, groups=len(images))[0]


def ragged(images: Tensor) -> Tensor:
    """Every pixel taken from somewhere near."""
    away = torch.randn(len(images), SIDE, SIDE, 2) * (1.2 * torch.rand(len(images), 1, 1, 1)) * 2 / SIDE
    made = F.grid_sample(images[:, None], _GRID + away, align_corners=False, padding_mode="border")[:, 0]
    return F.avg_pool2d(made[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0] * 0.5 + made * 0.5


def light(images: Tensor) -> Tensor:
    """Paper that is not black, or lit from one side, and less contrast."""
    paper = 0.7 * torch.rand(len(images), 1, 1)
    slope = (torch.rand(2, len(images), 1, 1) - 0.5) * (torch.rand(len(images), 1, 1) < 0.5)
    places = torch.arange(SIDE) / (SIDE - 1) - 0.5
    paper = (paper + slope[0] * places[:, None] + slope[1] * places).clamp(0, 0.8)
    added = (torch.rand(len(images), 1, 1) < 0.5).float()  # light over the ink as well, or beneath it
    return paper + images * (added + (1 - added) * (1 - paper))


def clouds(images: Tensor) -> Tensor:
    """Brighter and darker patches of several sizes over the picture, and less contrast."""
    made = torch.rand(len(images), 1, 1) * torch.ones_like(images)
    strength = 0.5
    for knots in (2, 4, 7, 14, 28):
        noise = torch.rand(len(images), 1, knots, knots) - 0.5
        made = made + strength * F.interpolate(noise, (SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0]
        strength *= 0.3 + 0.6 * float(torch.rand(()))
    kept = 0.15 + 0.6 * torch.rand(len(images), 1, 1)
    return kept * images + (1 - kept) * made.clamp(0, 1)


def lines(images: Tensor) -> Tensor:
    """One or two lines across, straight, wavy, notched or broken."""
    for again in range(2):
        phase, turn, height, middle = torch.rand(4, len(images), 1, 1)
        x, y = _GRID.unbind(-1)
        angle = (turn - 0.5) * math.pi
        along = torch.cos(angle) * x + torch.sin(angle) * y
        across = torch.cos(angle) * y - torch.sin(angle) * x
        wave = torch.sin(along * (5 + 25 * phase) + phase * 40)
        wave = torch.where(torch.rand(len(images), 1, 1) < 0.5, wave, 0.0) * 0.15 * height
        distance = (across - wave - (middle - 0.5) * 1.4).abs() * SIDE / 2
        line = (0.9 + torch.rand(len(images), 1, 1) - distance).clamp(0, 1)
        broken = torch.sin(along * (15 + 30 * height)) > 0.2
        line = torch.where((torch.rand(len(images), 1, 1) < 0.5) & broken, 0.0, line)
        drawn = line * (torch.rand(len(images), 1, 1) < (1.0 if again == 0 else 0.3))
        images = torch.maximum(images, drawn)
    return images


def blots(images: Tensor) -> Tensor:
    """Patches of grey, or of nothing."""
    noise = F.interpolate(torch.randn(len(images), 1, 9, 9), (SIDE, SIDE), mode="bicubic", align_corners=True)[:, 0]
    where = ((noise - 0.5 - torch.rand(len(images), 1, 1)) * 6).clamp(0, 1)
    return images * (1 - where) + where * 0.5 * torch.rand(len(images), 1, 1)


def part_negative(images: Tensor) -> Tensor:
    """Black and white exchanged beyond a straight edge or two, or everywhere but between them."""
    turned = torch.rand(len(images), 1, 1) < 0.25
    x, y = _GRID.unbind(-1)
    places = torch.where(turned, y, x)
    first, second = torch.rand(2, len(images), 1, 1) * 0.8 + 0.2
    beyond = (places < -first) | (places > second)
    return torch.where(beyond, 1 - images, images)


def outline(images: Tensor) -> Tensor:
    """Only the edges of the strokes."""
    soft = F.avg_pool2d(images[:, None], 3, stride=1, padding=1)
    soft = torch.where(torch.rand(len(images), 1, 1, 1) < 0.7, soft, images[:, None])
    wide = F.max_pool2d(soft, 3, stride=1, padding=1)
    edge = wide - soft
    edge = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, edge, wide + F.max_pool2d(-soft, 3, stride=1, padding=1))
    edge = edge / edge.amax(dim=(2, 3), keepdim=True).clamp_min(0.1)
    hard = ((edge - 0.3 - 0.3 * torch.rand(len(images), 1, 1, 1)) * 8).clamp(0, 1)
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.7, hard, edge)[:, 0]


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    harm.__name__: harm
    for harm in (askew, grain, dead_pixels, unsharp, ragged, light, clouds, lines, blots, part_negative, outline)
}
"""By name; each takes and returns images `float32[n, 28, 28]` from 0 to 1, but need not keep to that range."""

_MIDDLES = (torch.arange(SIDE) * 2 + 1) / SIDE - 1
_GRID = torch.stack(torch.meshgrid(_MIDDLES, _MIDDLES, indexing="xy"), dim=-1)[None]
"""Where each pixel lies, x and y from -1 to 1: `float32[1, 28, 28, 2]`."""
