"""Whether a model is right as often as it says: temperature, calibration error, coverage.

Takes logits and labels; knows nothing of networks or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 15
TEMPERATURES = (0.1, 10.0)


@dataclass(frozen=True)
class Reliability:
    """Predictions by how confident they are, in bins of equal width."""

    counts: Tensor
    """`int64[15]`: predictions in each bin."""

    confidence: Tensor
    """`float64[15]`: their mean confidence; 0 where there are none."""

    accuracy: Tensor
    """`float64[15]`: the share that is right; 0 where there are none."""

    @property
    def expected_error(self) -> float:
        """The expected calibration error, 0 to 1.

        M. Naeini, G. Cooper, M. Hauskrecht, "Obtaining Well Calibrated
        Probabilities Using Bayesian Binning", AAAI 2015.
        """
        weights = self.counts / self.counts.sum()
        return float((weights * (self.confidence - self.accuracy).abs()).sum())


def reliability(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Reliability:
    """Compare confidence with accuracy, of logits `float32[n, classes]` and labels `int64[n]`."""
    confidence, digits = F.softmax(logits.double() / temperature, dim=1).max(dim=1)
    right = (digits == labels).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    counts = torch.bincount(bins, minlength=BINS)
    filled = counts.clamp(min=1)
    return Reliability(
        counts,
        torch.bincount(bins, weights=confidence, minlength=BINS) / filled,
        torch.bincount(bins, weights=right, minlength=BINS) / filled,
    )


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature from 0.1 to 10 with the lowest cross-entropy, by golden-section search.

    C. Guo, G. Pleiss, Y. Sun, K. Weinberger, "On Calibration of Modern Neural
    Networks", ICML 2017. The cross-entropy has a single minimum over the
    temperature's inverse. To be used with images that were not trained on.
    """
    logits = logits.double()
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    ratio = (5**0.5 - 1) / 2

    def loss(inverse: float) -> float:
        return F.cross_entropy(logits * inverse, labels).item()

    a, b = high - ratio * (high - low), low + ratio * (high - low)
    loss_a, loss_b = loss(a), loss(b)
    while high - low > 1e-4:
        if loss_a < loss_b:
            high, b, loss_b = b, a, loss_a
            a = high - ratio * (high - low)
            loss_a = loss(a)
        else:
            low, a, loss_a = a, b, loss_b
            b = low + ratio * (high - low)
            loss_b = loss(b)
    return round(2 / (low + high), 4)


def coverage(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How accurate the most confident predictions are, if only these are given.

    Returns, for each share of the predictions from 1/n to 1, the share and the
    accuracy of that many most confident ones, both `float64[n]`.
    """
    confidence, digits = F.softmax(logits.double(), dim=1).max(dim=1)
    right = (digits == labels).double()[confidence.argsort(descending=True, stable=True)]
    numbers = torch.arange(1, len(right) + 1, dtype=torch.float64)
    return numbers / len(right), right.cumsum(0) / numbers


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share that was counted (E. B. Wilson, 1927)."""
    share = right / total
    middle = share + z * z / (2 * total)
    half = z * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    low, high = (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)
    return max(0.0, low), min(high, 1.0)  # which rounding passes by a hair
