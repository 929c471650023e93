"""The network as whoever serves it elsewhere writes it: torch, and nothing of this project.

Reads `$MNIST_WEIGHTS` and the manifest beside it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

PIXELS, CLASSES = 784, 10


class ImprovedNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(PIXELS, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))
        return logits


class Digits:
    """Reads pixels with one thread."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        weights = Path(os.environ["MNIST_WEIGHTS"])
        manifest = json.loads(weights.with_suffix(".json").read_text())
        self._mean, self._std = manifest["mean"], manifest["std"]
        self._temperature = manifest.get("temperature", 1.0)
        self._network = ImprovedNN().eval()
        self._network.load_state_dict(torch.load(weights, weights_only=True))

    @torch.inference_mode()
    def probabilities(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return `float32[n, 10]` of `uint8[n, 784]`."""
        features = (torch.from_numpy(pixels).float() / 255 - self._mean) / self._std
        logits = self._network(features) / self._temperature
        probabilities: npt.NDArray[np.float32] = torch.softmax(logits, dim=1).numpy()
        return probabilities

    def of_bytes(self, content: bytes) -> bytes:
        """The same, from raw pixels to raw probabilities."""
        pixels = np.frombuffer(bytearray(content), np.uint8).reshape(-1, PIXELS)
        return self.probabilities(pixels).tobytes()
