"""Damage changes pictures, leaves digits recognisable, and touches nothing but what it was given."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from trainer.damage import KINDS, damage
from trainer.data import Data


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_most_pictures_each_in_its_own_way(kind: str, digits_data: Data) -> None:
    torch.manual_seed(1)
    images = digits_data.train.pixels[:1].expand(64, -1).reshape(64, 28, 28).float() / 255
    before = images.clone()
    harmed = KINDS[kind](images)
    assert harmed.shape == (64, 28, 28)
    assert torch.equal(images, before)
    assert bool(torch.isfinite(harmed).all())
    assert float(((harmed - images).abs() > 0.02).float().mean(dim=(1, 2)).gt(0.01).float().mean()) > 0.6
    assert len(torch.unique(harmed.flatten(1), dim=0)) > 40


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_few_pictures_are_enough(count: int) -> None:
    assert damage(torch.zeros(count, 784, dtype=torch.uint8)).shape == (count, 784)


def test_damaged_pixels_are_pixels_and_all_kinds_occur(digits_data: Data) -> None:
    torch.manual_seed(1)
    pixels = digits_data.train.pixels[:500]
    harmed = damage(pixels)
    assert harmed.dtype == torch.uint8
    assert harmed.shape == pixels.shape
    assert float((harmed != pixels).any(dim=1).float().mean()) > 0.9


def test_the_same_seed_damages_the_same_way(digits_data: Data) -> None:
    pixels = digits_data.train.pixels[:50]
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(damage(pixels))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_what_is_damaged_is_still_nearest_to_its_own_kind(digits_data: Data) -> None:
    """A classifier that only saw whole digits reads many damaged ones, far more than the tenth of guessing."""
    torch.manual_seed(1)
    train = digits_data.train
    nearest = KNeighborsClassifier(1).fit(train.pixels.numpy() / 255, train.labels.numpy())
    some = train[:300]
    right = (nearest.predict(damage(some.pixels).numpy() / 255) == some.labels.numpy()).mean()
    assert right > 0.5
