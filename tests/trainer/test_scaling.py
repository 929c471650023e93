"""Trained on one scaling, served on another: the same answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from digits.network import ImprovedNN
from digits.preprocessing import MEAN, STD
from trainer.data import Data
from trainer.evaluation import to_features
from trainer.scaling import fold, scaling_for


def test_a_folded_network_gives_the_same_logits_on_the_served_features(digits_data: Data) -> None:
    pixels = digits_data.test.pixels
    network = ImprovedNN().eval()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    mean, std = scaling_for(network, pixels)
    folded = fold(network, mean, std)
    with torch.inference_mode():
        wanted = network(to_features(pixels, mean, std))
        torch.testing.assert_close(folded(to_features(pixels)), wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items()), "a copy is folded"


def test_the_scaling_is_the_mean_and_the_deviation_of_the_pixels(digits_data: Data) -> None:
    pixels = digits_data.train.pixels
    features = to_features(pixels, *scaling_for(ImprovedNN(), pixels))
    assert float(features.mean()) == pytest.approx(0, abs=1e-4)
    assert float(features.std()) == pytest.approx(1, abs=1e-4)


def test_a_network_that_cannot_take_it_up_trains_on_the_served_scaling(digits_data: Data) -> None:
    network = nn.Sequential(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 2, 28), nn.Flatten(), nn.Linear(2, 10))
    assert scaling_for(network, digits_data.train.pixels) == (MEAN, STD)
    assert fold(network, MEAN, STD) is not network
    with pytest.raises(ValueError, match="begins with no linear layer"):
        fold(network, 0.1, 0.3)


def test_pixels_of_one_value_have_no_scaling_of_their_own() -> None:
    assert scaling_for(ImprovedNN(), torch.zeros(3, 784, dtype=torch.uint8)) == (MEAN, STD)
