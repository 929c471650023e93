"""What was learnt with normalisation is served without, and answers the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from digits.network import ARCHITECTURES
from trainer.normalisation import Normalised, merged, normalised


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merged_network_has_the_architectures_keys_and_the_twins_answers(name: str) -> None:
    torch.manual_seed(0)
    network = ARCHITECTURES[name]()
    twin = normalised(network)
    for _ in range(3):  # statistics other than those it begins with
        twin(torch.randn(64, 784) * 2 + 1)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    twin.eval()
    served = merged(twin)
    assert {key: value.shape for key, value in served.state_dict().items()} == {
        key: value.shape for key, value in network.state_dict().items()
    }
    features = torch.randn(32, 784)
    torch.testing.assert_close(served(features), twin(features), rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, Normalised) for module in twin.modules()), "a copy is merged"


def test_every_layer_but_the_last_is_normalised() -> None:
    twin = normalised(ARCHITECTURES["ImprovedNN"]())
    assert [name for name, module in twin.named_modules() if isinstance(module, Normalised)] == ["fc1", "fc2"]
    assert isinstance(twin.get_submodule("fc3"), nn.Linear)


def test_a_network_without_normalisation_is_merged_into_itself() -> None:
    network = ARCHITECTURES["CNN"]()
    again = merged(network).state_dict()
    assert all(torch.equal(again[key], value) for key, value in network.state_dict().items())
