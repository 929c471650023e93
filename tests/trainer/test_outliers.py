"""Pictures without a digit: of every kind, each another one, and not like digits."""

from __future__ import annotations

import pytest
import torch

from digits.checkpoint import load_checkpoint
from server.settings import EMBEDDED_WEIGHTS
from trainer.data import Data, LabelledPixels
from trainer.evaluation import read
from trainer.outliers import GLYPHS, KINDS, _pairs, draw_outliers, kinds_of


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_different_pictures_in_any_number(kind: str, digits_data: Data) -> None:
    torch.manual_seed(1)
    made = KINDS[kind](60, digits_data.train)
    assert made.dtype == torch.uint8
    assert made.shape == (60, 784)
    assert len(torch.unique(made, dim=0)) > 30
    for count in (0, 1):
        assert KINDS[kind](count, digits_data.train).shape == (count, 784)


def test_all_kinds_occur_as_often_and_the_same_seed_gives_the_same(digits_data: Data) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(draw_outliers(len(KINDS) * 5, digits_data.train))
    assert made[0].shape == (len(KINDS) * 5, 784)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("there", "lacking"),
    [
        ({*range(10)}, set()),
        ({2, 3}, set()),
        ({0, 1}, {"overlaid", "turned"}),
        ({0, 8}, {"turned"}),
        ({2, 5}, {"turned"}),
        ({1, 7}, {"overlaid"}),
        ({4}, {"overlaid", "side_by_side"}),
        ({1}, {"overlaid", "side_by_side", "turned"}),
    ],
)
def test_kinds_that_cannot_be_made_of_the_digits_that_are_there_are_left_out(
    digits_data: Data, there: set[int], lacking: set[str]
) -> None:
    some = digits_data.train[torch.isin(digits_data.train.labels, torch.tensor(sorted(there)))][:40]
    assert set(kinds_of(some)) == set(KINDS) - lacking
    torch.manual_seed(1)
    assert draw_outliers(50, some).shape == (50, 784)


def test_one_image_of_each_of_two_digits_is_enough(digits_data: Data) -> None:
    rows = [int(torch.nonzero(digits_data.train.labels == digit)[0]) for digit in (3, 4)]
    assert draw_outliers(50, digits_data.train[torch.tensor(rows)]).shape == (50, 784)


def test_pairs_are_of_different_digits_however_many_there_are_of_each() -> None:
    labels = torch.tensor([2] * 90 + [3] + [5] * 9)[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    digits = LabelledPixels(labels[:, None].expand(-1, 784).to(torch.uint8), labels)
    torch.manual_seed(1)
    first, second = _pairs(1000, digits)
    assert (first != second).all()
    assert set(first.flatten().tolist()) == set(second.flatten().tolist()) == {2, 3, 5}


def test_no_glyph_could_be_a_digit() -> None:
    assert not set(GLYPHS) & set("0123456789OoQDIliJSsZzqgbB")


def test_a_trained_model_is_less_sure_of_them_than_of_digits(digits_data: Data) -> None:
    torch.manual_seed(1)
    network = load_checkpoint(EMBEDDED_WEIGHTS).network
    outliers = read(network, draw_outliers(400, digits_data.train)).logsumexp(dim=1)
    digits = read(network, digits_data.test.pixels).logsumexp(dim=1)
    assert float(outliers.median()) < float(digits.quantile(0.1))
