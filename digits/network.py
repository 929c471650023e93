"""The network, and nothing else: no data, no scaling, no softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from digits.preprocessing import CLASSES, PIXELS

HIDDEN_1 = 256
HIDDEN_2 = 128
DROPOUT = 0.2


class ImprovedNN(nn.Module):
    """A perceptron, 784-256-128-10, of 235,146 parameters.

    ReLU after both hidden layers, dropout after the first only; Kaiming-normal
    weights (K. He et al., ICCV 2015) and zero biases. State-dict keys:
    `fc1.weight` ... `fc3.bias`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(PIXELS, HIDDEN_1)
        self.fc2 = nn.Linear(HIDDEN_1, HIDDEN_2)
        self.fc3 = nn.Linear(HIDDEN_2, CLASSES)
        self.dropout = nn.Dropout(DROPOUT)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, `float32[n, 10]`, of features `float32[n, 784]`.

        Features of any shape `[n, ...]` with 784 values a row are flattened.
        """
        x = torch.flatten(x, start_dim=1)  # (n, 784)
        x = self.dropout(F.relu(self.fc1(x)))  # (n, 256)
        x = F.relu(self.fc2(x))  # (n, 128)
        logits: Tensor = self.fc3(x)  # (n, 10)
        return logits


ARCHITECTURES: dict[str, type[nn.Module]] = {"ImprovedNN": ImprovedNN}
"""By the name that a manifest gives."""
