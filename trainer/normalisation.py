"""Batch normalisation while training, none in what is served.

The network that learns is a twin with a normalisation behind every layer but
the last (S. Ioffe, C. Szegedy, "Batch Normalization", ICML 2015). What it has
learnt is a scale and a shift of each output, which the layer takes into its
weights and its bias afterwards; so the served network has nothing but the
layers of its architecture.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv2d)


class Normalised(nn.Module):
    """A layer without a bias, and the normalisation of its outputs."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        outputs = layer.weight.shape[0]
        self.layer = copy.deepcopy(layer)
        self.layer.bias = None
        self.norm = nn.BatchNorm1d(outputs) if isinstance(layer, nn.Linear) else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.norm(self.layer(x))
        return normalised

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """One layer, with a bias, that does in evaluation mode what this does."""
        layer, norm = copy.deepcopy(self.layer), self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
        return layer


def normalised(network: nn.Module) -> nn.Module:
    """A twin that learns with normalisation; the weights it begins with are the network's."""
    twin = copy.deepcopy(network)
    layers = [name for name, module in twin.named_modules() if isinstance(module, LAYERS)]
    for name in layers[:-1]:
        _replace(twin, name, Normalised(twin.get_submodule(name)))  # type: ignore[arg-type]
    return twin


def merged(twin: nn.Module) -> nn.Module:
    """The network that answers as the twin does in evaluation mode, without normalisation; a copy."""
    network = copy.deepcopy(twin)
    for name, module in list(network.named_modules()):
        if isinstance(module, Normalised):
            _replace(network, name, module.merged())
    return network


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
