"""The other anchor: the bare network, one thread, no service around it; and one image as it is served."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch

from bench.messages import best_us
from client.load.images import IMAGES, images
from digits.checkpoint import load_checkpoint
from digits.preprocessing import normalize
from digits.snapshot import take_snapshot
from server.inference import load_classifier
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


class OneImage:
    """A single image through the whole of what a server computes, and through three matrix products."""

    def __init__(self) -> None:
        self._classifier = load_classifier(take_snapshot(EMBEDDED_WEIGHTS), max_batch_size=1)
        self._pixels = images()[:1]
        network = load_checkpoint(EMBEDDED_WEIGHTS).network.state_dict()
        self._weights = [network[f"fc{layer}.weight"].numpy() for layer in (1, 2, 3)]
        self._vectors = [np.ones(weights.shape[1], np.float32) for weights in self._weights]

    def served_us(self) -> float:
        """From pixels to probabilities and digit score, as `Classifier.predict` does it."""
        return best_us(lambda: self._classifier.predict(self._pixels))

    def products_us(self) -> float:
        """The three products of weights and vectors in NumPy, and nothing between them."""
        pairs = [*zip(self._weights, self._vectors, strict=True)]
        return best_us(lambda: [weights.dot(vector) for weights, vector in pairs])
