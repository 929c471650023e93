"""Deformed digits stay digits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainer.augmentation import Augmentation, augment
from trainer.data import Data

NOTHING = Augmentation(rotation_degrees=0, scale=0, shear=0, shift_pixels=0, elastic_pixels=0, pen=0)


def test_shape_type_and_range_stay(digits_data: Data) -> None:
    pixels = digits_data.train.pixels[:50]
    deformed = augment(pixels, Augmentation(pen=0))
    assert deformed.shape == (50, 784)
    assert deformed.dtype == torch.uint8
    assert not torch.equal(deformed, pixels)
    ink, ink_before = deformed.float().sum(dim=1), pixels.float().sum(dim=1)
    assert ((ink / ink_before - 1).abs() < 0.5).all(), "nothing is wiped out or flooded"


def test_amounts_of_0_give_the_same_images(digits_data: Data) -> None:
    pixels = digits_data.train.pixels[:50]
    assert torch.equal(augment(pixels, NOTHING), pixels)


def test_the_input_is_left_as_it_was(digits_data: Data) -> None:
    pixels = digits_data.train.pixels[:5].clone()
    augment(pixels)
    assert torch.equal(pixels, digits_data.train.pixels[:5])


def test_each_image_is_deformed_in_its_own_way(digits_data: Data) -> None:
    deformed = augment(digits_data.train.pixels[:1].repeat(20, 1))
    assert len({bytes(row.numpy()) for row in deformed}) == 20


def test_the_seed_decides(digits_data: Data) -> None:
    def deformed(seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return augment(digits_data.train.pixels[:5])

    assert torch.equal(deformed(1), deformed(1))
    assert not torch.equal(deformed(1), deformed(2))


@pytest.mark.parametrize(
    ("amounts", "farthest"),
    [
        (replace(NOTHING, shift_pixels=2), 2),
        (replace(NOTHING, elastic_pixels=2), 2.5),  # bicubic curves overshoot their knots a little
        (replace(NOTHING, scale=0.5), 0),
        (replace(NOTHING, rotation_degrees=90), 0),
        (replace(NOTHING, shear=0.5), 0),
    ],
)
def test_a_dot_in_the_middle_moves_no_farther_than_allowed(amounts: Augmentation, farthest: float) -> None:
    image = torch.zeros(28, 28)
    image[13:15, 13:15] = 255  # centred on the image's middle, 13.5
    deformed = augment(image.to(torch.uint8).reshape(1, 784).repeat(200, 1), amounts).float().reshape(200, 28, 28)
    places = torch.arange(28.0) - 13.5
    mass = deformed.sum(dim=(1, 2))
    y = (deformed.sum(dim=2) @ places) / mass
    x = (deformed.sum(dim=1) @ places) / mass
    assert max(float(x.abs().max()), float(y.abs().max())) <= farthest + 0.05
    if farthest:
        assert min(float(x.abs().max()), float(y.abs().max())) > 1, "and it does move, on both axes"


def test_a_turn_keeps_the_shape_of_a_bar() -> None:
    """A map that mixes up its axes would squeeze or slant what it should only turn."""
    image = torch.zeros(28, 28)
    image[12:16, 6:22] = 255  # 16 wide, 4 high
    turned = augment(
        image.to(torch.uint8).reshape(1, 784).repeat(100, 1), replace(NOTHING, rotation_degrees=45)
    ).float()
    y, x = torch.meshgrid(torch.arange(28.0) - 13.5, torch.arange(28.0) - 13.5, indexing="ij")
    weights = turned / turned.sum(dim=1, keepdim=True)
    spread = weights @ (x**2 + y**2).reshape(784)
    before = float((image / image.sum() * (x**2 + y**2)).sum())
    assert torch.allclose(spread, torch.tensor(before), rtol=0.05)


def test_another_pen_makes_strokes_thinner_or_thicker_and_none_vanish(digits_data: Data) -> None:
    pixels = digits_data.train.pixels[:100]
    written = augment(pixels, replace(NOTHING, pen=1)).float()
    ink = (written > 127).sum(dim=1) / (pixels > 127).sum(dim=1)
    assert ink.min() < 0.8
    assert ink.max() > 1.3
    assert (ink > 0.2).all()
    assert (written.amax(dim=1) >= 250).all(), "a finer pen writes no fainter"


def test_the_share_of_other_pens_is_kept(digits_data: Data) -> None:
    pixels = digits_data.train.pixels[:400]
    changed = (augment(pixels, replace(NOTHING, pen=0.25)) != pixels).any(dim=1).float().mean()
    assert 0.15 < float(changed) < 0.35
