"""Percentiles of any number of times in a fixed amount of memory, as HdrHistogram keeps them.

Buckets are as wide as their values are large, so that each percentile is right
to a tenth of a percent. (The package `hdrhistogram` needs setuptools and pbr at
run time, which is more than this.)
"""

from __future__ import annotations

import math
from typing import Any

BITS = 11
"""Values up to 2**11 have a bucket each; larger ones share one with those that have the same first 11 bits."""
HALF = 1 << (BITS - 1)
LARGEST_BITS = 42
"""An hour in nanoseconds."""


class Histogram:
    """Whole numbers from 0 to an hour in nanoseconds; what is larger counts as that."""

    def __init__(self) -> None:
        self._counts = [0] * (HALF * (LARGEST_BITS - BITS + 2))
        self.count = 0
        self.largest = 0
        self._sum = 0

    def add(self, value: int) -> None:
        """Count one value."""
        value = min(max(value, 0), (1 << LARGEST_BITS) - 1)
        shift = max(value.bit_length() - BITS, 0)
        self._counts[shift * HALF + (value >> shift)] += 1
        self.count += 1
        self._sum += value
        self.largest = max(self.largest, value)

    def percentile(self, percent: float) -> int:
        """The smallest value that `percent` of all do not exceed, a tenth of a percent too large at most; 0 of none."""
        needed = max(math.ceil(self.count * percent / 100), 1)
        for index, count in enumerate(self._counts):
            needed -= count
            if needed <= 0:
                return min(_highest(index), self.largest)
        return 0

    @property
    def mean(self) -> float:
        """0 of none."""
        return self._sum / self.count if self.count else 0.0

    def summary(self) -> dict[str, float]:
        """For JSON: nanoseconds as microseconds."""
        found: dict[str, Any] = {f"p{percent:g}": self.percentile(percent) for percent in (50, 90, 99, 99.9, 99.99)}
        found |= {"max": self.largest, "mean": self.mean}
        return {name: round(value / 1e3, 1) for name, value in found.items()} | {"count": self.count}


def _highest(index: int) -> int:
    """The largest value of a bucket."""
    shift = max(index // HALF - 1, 0)
    return ((index - shift * HALF + 1) << shift) - 1
