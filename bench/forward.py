"""The other anchor: the bare network, one thread, no service around it."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch

from bench.scenarios import IMAGES, images
from digits.checkpoint import load_checkpoint
from digits.preprocessing import normalize
from server.settings import EMBEDDED_WEIGHTS


class Forward:
    """The weights that the server embeds, on features that are ready."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._network = load_checkpoint(EMBEDDED_WEIGHTS).network
        self._features = torch.from_numpy(normalize(images()))  # (256, 784)

    @torch.inference_mode()
    def digits(self) -> list[int]:
        """What the network reads on each of the images."""
        digits: list[int] = self._network(self._features).argmax(dim=1).tolist()
        return digits

    @torch.inference_mode()
    def digits_of(self, pixels: npt.NDArray[np.uint8]) -> list[int]:
        """What the network reads on pixels `uint8[n, 784]`."""
        digits: list[int] = self._network(torch.from_numpy(normalize(pixels))).argmax(dim=1).tolist()
        return digits

    @torch.inference_mode()
    def rate(self, batch: int, seconds: float) -> float:
        """Images a second in batches of so many."""
        batches = [self._features[start : start + batch] for start in range(0, IMAGES, batch)]
        self._network(batches[0])  # warm
        done = 0
        start = time.perf_counter()
        while (now := time.perf_counter()) < start + seconds:
            for features in batches:
                self._network(features)
            done += IMAGES
        return done / (now - start)
