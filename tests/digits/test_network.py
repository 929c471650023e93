"""ImprovedNN is the origin's network: names, shapes, initial weights, and where dropout stands."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from digits.checkpoint import Checkpoint, Manifest
from digits.network import ARCHITECTURES, CNN, DROPOUT, ImprovedNN


@pytest.fixture
def network() -> ImprovedNN:
    torch.manual_seed(0)
    return ImprovedNN()


def test_the_state_dict_has_the_origins_keys_and_shapes(network: ImprovedNN) -> None:
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == {
        "fc1.weight": [256, 784],
        "fc1.bias": [256],
        "fc2.weight": [128, 256],
        "fc2.bias": [128],
        "fc3.weight": [10, 128],
        "fc3.bias": [10],
    }
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


def test_it_has_235146_parameters(network: ImprovedNN) -> None:
    assert Checkpoint(network, Manifest(), "").parameter_count == 235_146


def test_the_convolutional_network_has_280266_parameters() -> None:
    assert sum(parameter.numel() for parameter in CNN().parameters()) == 280_266


def test_weights_begin_kaiming_normal_and_biases_at_zero(network: ImprovedNN) -> None:
    for layer in (network.fc1, network.fc2, network.fc3):
        weight = layer.weight.detach()
        count = weight.numel()
        std = math.sqrt(2 / layer.in_features)
        # Six standard errors of the estimates from so many draws.
        assert abs(float(weight.std()) - std) < 6 * std / math.sqrt(2 * count)
        assert abs(float(weight.mean())) < 6 * std / math.sqrt(count)
        # Normal, not uniform: 4.6 % lie beyond two standard deviations.
        assert 0.02 < float((weight.abs() > 2 * std).float().mean()) < 0.08
        assert not layer.bias.any()


def test_in_evaluation_it_is_the_plain_formula_and_answers_raw_logits(network: ImprovedNN) -> None:
    x = torch.randn(64, 784)
    w = network.state_dict()
    hidden_1 = F.relu(x @ w["fc1.weight"].T + w["fc1.bias"])
    hidden_2 = F.relu(hidden_1 @ w["fc2.weight"].T + w["fc2.bias"])
    logits = network.eval()(x).detach()
    torch.testing.assert_close(logits, hidden_2 @ w["fc3.weight"].T + w["fc3.bias"])
    assert logits.shape == (64, 10)
    assert float(logits.min()) < 0  # no softmax, no ReLU
    assert not torch.allclose(logits.sum(dim=1), torch.ones(64))


def test_dropout_of_a_fifth_stands_behind_the_first_relu_only(network: ImprovedNN) -> None:
    inputs: dict[str, torch.Tensor] = {}
    for name in ("dropout", "fc2", "fc3"):
        network.get_submodule(name).register_forward_hook(
            lambda _, given, __, name=name: inputs.__setitem__(name, given[0].detach())
        )
    network.train()(torch.randn(1_000, 784))
    before, after, last = inputs["dropout"], inputs["fc2"], inputs["fc3"]
    assert float(before.min()) == 0  # it is the first ReLU's output
    dropped = (after == 0) & (before > 0)
    assert abs(float(dropped.sum() / (before > 0).sum()) - DROPOUT) < 0.01
    torch.testing.assert_close(after[after > 0], before[after > 0] / (1 - DROPOUT))
    torch.testing.assert_close(last, F.relu(network.fc2(after)))  # and nothing behind the second
    assert [type(module).__name__ for module in network.modules()].count("Dropout") == 1


def test_evaluation_is_deterministic_and_training_is_not(network: ImprovedNN) -> None:
    x = torch.randn(8, 784)
    assert torch.equal(network.eval()(x), network(x))
    assert not torch.equal(network.train()(x), network(x))


@pytest.mark.parametrize("shape", [(3, 784), (3, 28, 28), (3, 1, 28, 28)])
def test_images_of_any_shape_are_flattened(network: ImprovedNN, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 784)
    torch.testing.assert_close(network.eval()(x.reshape(shape)), network(x))


def test_every_architecture_goes_by_its_classes_name() -> None:
    assert {name: kind.__name__ for name, kind in ARCHITECTURES.items()} == {name: name for name in ARCHITECTURES}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_answers_ten_logits_for_784_features(name: str) -> None:
    assert ARCHITECTURES[name]().eval()(torch.zeros(2, 784)).shape == (2, 10)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("classes", [26, 100])
def test_for_other_classes_only_the_last_layer_is_another(name: str, classes: int) -> None:
    plain, other = ARCHITECTURES[name]().state_dict(), ARCHITECTURES[name](classes).state_dict()
    assert list(other) == list(plain)
    *same, weight, bias = plain
    assert all(other[key].shape == plain[key].shape for key in same)
    assert (other[weight].shape, other[bias].shape) == ((classes, plain[weight].shape[1]), (classes,))
    assert ARCHITECTURES[name](classes).eval()(torch.zeros(2, 784)).shape == (2, classes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ten_classes_are_the_default_down_to_the_random_numbers(name: str) -> None:
    torch.manual_seed(0)
    plain = ARCHITECTURES[name]().state_dict()
    torch.manual_seed(0)
    told = ARCHITECTURES[name](10).state_dict()
    assert all(torch.equal(told[key], tensor) for key, tensor in plain.items())
