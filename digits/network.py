"""The networks, and nothing else: no data, no scaling, no softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from digits.preprocessing import CLASSES, PIXELS, SIDE

HIDDEN_1 = 256
HIDDEN_2 = 128
DROPOUT = 0.2


class ImprovedNN(nn.Module):
    """A perceptron, 784-256-128-10, of 235,146 parameters for the ten digits.

    ReLU after both hidden layers, dropout after the first only; Kaiming-normal
    weights (K. He et al., ICCV 2015) and zero biases. State-dict keys:
    `fc1.weight` ... `fc3.bias`. With other `classes` than ten the last layer has
    as many outputs, and nothing else differs.
    """

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.fc1 = nn.Linear(PIXELS, HIDDEN_1)
        self.fc2 = nn.Linear(HIDDEN_1, HIDDEN_2)
        self.fc3 = nn.Linear(HIDDEN_2, classes)
        self.dropout = nn.Dropout(DROPOUT)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, `float32[n, classes]`, of features `float32[n, 784]`.

        Features of any shape `[n, ...]` with 784 values a row are flattened.
        """
        x = torch.flatten(x, start_dim=1)  # (n, 784)
        x = self.dropout(F.relu(self.fc1(x)))  # (n, 256)
        x = F.relu(self.fc2(x))  # (n, 128)
        logits: Tensor = self.fc3(x)  # (n, classes)
        return logits


class CNN(nn.Module):
    """A convolutional network for those to whom half a percent of mistakes is too many.

    It has 280,266 parameters for the ten digits, and 257 more for each other class.

    Five convolutions (5x5, then 3x3 as in K. Simonyan, A. Zisserman, ICLR 2015)
    with ReLU on 28x28, 14x14, 14x14, 7x7 and 7x7 pixels; the mean and the
    largest value of each of the last 128 channels; dropout and one linear layer.
    An image takes about 22 million multiplications, a hundred times as many as in
    `ImprovedNN`. State-dict keys: `conv1.weight` ... `conv5.bias`, `fc.weight`,
    `fc.bias`.
    """

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 128, 3, padding=1)
        self.conv5 = nn.Conv2d(128, 128, 3, padding=1)
        self.fc = nn.Linear(2 * 128, classes)
        self.dropout = nn.Dropout(DROPOUT)
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, `float32[n, classes]`, of features of any shape with 784 values a row."""
        x = x.reshape(-1, 1, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (n, 32, 14, 14)
        x = F.relu(self.conv2(x))  # (n, 64, 14, 14)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)  # (n, 64, 7, 7)
        x = F.relu(self.conv4(x))  # (n, 128, 7, 7)
        x = F.relu(self.conv5(x))  # (n, 128, 7, 7)
        x = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)  # (n, 256)
        logits: Tensor = self.fc(self.dropout(x))  # (n, classes)
        return logits


ARCHITECTURES: dict[str, type[nn.Module]] = {"ImprovedNN": ImprovedNN, "CNN": CNN}
"""By the name that a manifest gives; each takes the number of classes, 10 unless it is said."""
