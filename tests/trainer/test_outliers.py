"""Pictures without a digit: of every kind, each another one, and not like digits."""

from __future__ import annotations

import pytest
import torch

from digits.checkpoint import load_checkpoint
from server.settings import EMBEDDED_WEIGHTS
from trainer.data import Data
from trainer.evaluation import read
from trainer.outliers import GLYPHS, KINDS, draw_outliers


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


def test_no_glyph_could_be_a_digit() -> None:
    assert not set(GLYPHS) & set("0123456789OoQDIliJSsZzqgbB")


def test_a_trained_model_is_less_sure_of_them_than_of_digits(digits_data: Data) -> None:
    torch.manual_seed(1)
    network = load_checkpoint(EMBEDDED_WEIGHTS).network
    outliers = read(network, draw_outliers(400, digits_data.train)).logsumexp(dim=1)
    digits = read(network, digits_data.test.pixels).logsumexp(dim=1)
    assert float(outliers.median()) < float(digits.quantile(0.1))
