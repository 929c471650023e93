"""Damage by which models are measured: each kind does what its name says, and does it again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.golden import golden_digits
from trainer.corruptions import CORRUPTIONS, corrupt


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.from_numpy(golden_digits()[0].copy())


def square(low: int = 0, high: int = 255) -> Tensor:
    """A bright square of 10x10 in the middle of black, `uint8[1, 784]`."""
    image = torch.full((28, 28), low, dtype=torch.uint8)
    image[9:19, 9:19] = high
    return image.reshape(1, 784)


def box(image: Tensor) -> tuple[int, int, int, int]:
    rows, columns = torch.nonzero(image.reshape(28, 28) > 127, as_tuple=True)
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def test_there_are_the_fifteen_of_the_paper() -> None:
    assert len(CORRUPTIONS) == 15


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_kind_changes_every_image_and_is_the_same_again(kind: str, digits: Tensor) -> None:
    before = digits.clone()
    damaged = corrupt(digits, kind)
    assert (damaged.dtype, damaged.shape) == (torch.uint8, digits.shape)
    assert torch.equal(digits, before), "the images that were given are left alone"
    assert (damaged != digits).any(dim=1).all()
    assert torch.equal(corrupt(digits, kind), damaged)


@pytest.mark.parametrize("kind", sorted(set(CORRUPTIONS) - {"scale", "brightness", "stripe", "canny_edges"}))
def test_what_is_drawn_at_random_differs_by_seed_and_from_image_to_image(kind: str) -> None:
    several = square().expand(50, -1)
    damaged = corrupt(several, kind)
    assert not torch.equal(corrupt(several, kind, seed=2), damaged)
    assert len(torch.unique(damaged, dim=0)) > 1


def test_shot_noise_counts_photons() -> None:
    assert set(corrupt(square().expand(50, -1), "shot_noise").flatten().tolist()) == {0, 85, 170, 255}


def test_impulse_noise_hits_seventeen_in_a_hundred() -> None:
    grey = torch.full((100, 784), 128, dtype=torch.uint8)
    damaged = corrupt(grey, "impulse_noise")
    for value, share in ((0, 0.085), (255, 0.085), (128, 0.83)):
        assert float((damaged == value).float().mean()) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("kind", ["glass_blur", "motion_blur"])
def test_blurs_spread_the_ink_and_keep_its_amount(kind: str) -> None:
    damaged = corrupt(square().expand(20, -1), kind).float()
    assert torch.allclose(damaged.sum(dim=1), square().float().sum().expand(20), rtol=0.02)
    assert ((damaged > 5).sum(dim=1) > 110).all()


def test_translate_moves_by_three_both_ways() -> None:
    moved = {box(image) for image in corrupt(square().expand(50, -1), "translate")}
    assert moved == {(9 + y, 18 + y, 9 + x, 18 + x) for x in (-3, 3) for y in (-3, 3)}


def test_scale_shrinks_to_seven_tenths_about_the_middle() -> None:
    assert box(corrupt(square(), "scale")[0]) == (10, 17, 10, 17)


@pytest.mark.parametrize("kind", ["shear", "rotate"])
def test_slants_and_turns_keep_the_middle_and_go_both_ways(kind: str) -> None:
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[4:24, 13:15] = 255  # an upright stroke
    damaged = corrupt(image.reshape(1, 784).expand(50, -1), kind).reshape(50, 28, 28)
    top, bottom = damaged[:, 6].float().argmax(dim=1), damaged[:, 21].float().argmax(dim=1)
    assert ((top - bottom).abs() >= 4).all()
    assert {bool(left) for left in top < bottom} == {True, False}
    assert (damaged[:, 13:15, 13:15] > 127).all()


def test_brightness_adds_half_of_the_range() -> None:
    assert set(corrupt(square(0, 100), "brightness").flatten().tolist()) == {128, 228}


def test_stripe_is_a_negative_at_both_sides() -> None:
    damaged = corrupt(square(), "stripe").reshape(28, 28)
    assert (damaged[:, :7] == 255).all()
    assert (damaged[:, 21:] == 255).all()
    assert torch.equal(damaged[:, 7:21], square().reshape(28, 28)[:, 7:21])


def test_fog_takes_the_contrast_and_no_image_is_lost_in_it() -> None:
    damaged = corrupt(square().expand(50, -1), "fog").reshape(50, 28, 28).float()
    inside, outside = damaged[:, 9:19, 9:19].mean(dim=(1, 2)), damaged[:, :, :9].mean(dim=(1, 2))
    assert (inside > outside).float().mean() > 0.9
    assert (damaged.amax(dim=(1, 2)) - damaged.amin(dim=(1, 2)) < 230).all()


def test_spatter_is_dark_grey_and_covers_a_part() -> None:
    black = torch.zeros(50, 784, dtype=torch.uint8)
    damaged = corrupt(black, "spatter")
    assert int(damaged.max()) == 64
    assert 0.02 < float((damaged > 0).float().mean()) < 0.5


@pytest.mark.parametrize("kind", ["dotted_line", "zigzag"])
def test_lines_cross_the_image_and_add_only(kind: str) -> None:
    damaged = corrupt(square().expand(50, -1), kind).reshape(50, 28, 28)
    assert (damaged >= square().reshape(28, 28)).all()
    crossed = (damaged[:, :, 3:25] > 200).any(dim=1)  # by column
    assert (crossed.float().mean(dim=1) > 0.4).all()


def test_a_dotted_line_has_gaps_of_two_pixels() -> None:
    black = torch.zeros(50, 784, dtype=torch.uint8)
    inked = (corrupt(black, "dotted_line").reshape(50, 28, 28) > 0).any(dim=1)
    assert not inked[:, torch.arange(28) % 4 < 2].any()


def test_canny_finds_the_outline_and_leaves_the_inside_black() -> None:
    damaged = corrupt(square(), "canny_edges").reshape(28, 28)
    assert set(damaged.flatten().tolist()) == {0, 255}
    assert (damaged[12:16, 12:16] == 0).all()
    assert (damaged[12:16] == 255).sum(dim=1).tolist() == [2, 2, 2, 2]
    assert (corrupt(square(100, 110), "canny_edges") == 0).all(), "too faint an edge"


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(KeyError):
        corrupt(square(), "frost")
