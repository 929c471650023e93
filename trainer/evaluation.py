"""How well a network reads labelled pixels; changes nothing, writes nothing.

The features are those of `digits.preprocessing.normalize`, as in the server, so
an accuracy found here is the one that callers get.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from digits.preprocessing import MEAN, STD, normalize
from trainer.data import LabelledPixels

BATCH_SIZE = 1000


@dataclass(frozen=True)
class Evaluation:
    """What came out."""

    confusion: Tensor
    """`int64[classes, classes]`: images by what they show (row) and what was read (column)."""

    loss: float
    """Mean cross-entropy, in nats."""

    @property
    def total(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(self.confusion.trace())

    @property
    def accuracy(self) -> float:
        """`correct / total`."""
        return self.correct / self.total

    @property
    def recall(self) -> list[float | None]:
        """By class: the part of its images that was read as it; None without images."""
        return _parts(self.confusion, self.confusion.sum(dim=1))

    @property
    def precision(self) -> list[float | None]:
        """By class: the part of what was read as it that is it; None if nothing was."""
        return _parts(self.confusion, self.confusion.sum(dim=0))


def evaluate(
    network: nn.Module, images: LabelledPixels, mean: float = MEAN, std: float = STD, device: str = "cpu"
) -> Evaluation:
    """Read all images with the network, which is in the mode it was in afterwards."""
    return evaluation_of(read(network, images.pixels, mean, std, device), images.labels)


def evaluation_of(logits: Tensor, labels: Tensor) -> Evaluation:
    """What logits `float32[n, classes]` say of images with these labels, `int64[n]`."""
    classes = logits.shape[1]
    confusion = torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes * classes)
    return Evaluation(confusion.reshape(classes, classes), F.cross_entropy(logits, labels).item())


def read(network: nn.Module, pixels: Tensor, mean: float = MEAN, std: float = STD, device: str = "cpu") -> Tensor:
    """Return logits, `float32[n, classes]`, of pixels `uint8[n, 784]`."""
    was_training = network.training
    network.eval()
    with torch.inference_mode():
        logits = [
            network(to_features(part, mean, std).to(device)).cpu()  # (m, classes)
            for part in torch.split(pixels, BATCH_SIZE)
        ]
    network.train(was_training)
    return torch.cat(logits)


def to_features(pixels: Tensor, mean: float = MEAN, std: float = STD) -> Tensor:
    """Return features, `float32[n, 784]`, of pixels `uint8[n, 784]`, exactly as the server does."""
    return torch.from_numpy(normalize(pixels.numpy(), mean, std))


def _parts(confusion: Tensor, totals: Tensor) -> list[float | None]:
    hits: list[int] = confusion.diagonal().tolist()
    return [hit / total if total else None for hit, total in zip(hits, totals.tolist(), strict=True)]
