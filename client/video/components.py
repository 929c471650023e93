"""Connected components of a mask, in NumPy alone; knows nothing of digits.

A mask is cut into runs, the stretches of set pixels of its rows. Runs that
touch are joined by hooking and pointer jumping over whole arrays (Y. Shiloach,
U. Vishkin, "An O(log n) parallel connectivity algorithm", 1982), which takes a
few rounds whatever the shapes are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.intp]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Components:
    """The components of a mask; every array has one entry a component, but for the runs'."""

    left: Integers
    top: Integers
    right: Integers
    """The first column outside."""
    bottom: Integers
    """The first row outside."""
    area: Integers
    """Pixels."""

    _shape: tuple[int, int]
    _starts: Integers  # of the runs, ordered by component; in the flat mask
    _ends: Integers
    _first: Integers  # of each component, in the runs; one more at the end

    def __len__(self) -> int:
        return len(self.area)

    def means(self, values: npt.NDArray[np.uint8], which: Integers) -> npt.NDArray[np.float64]:
        """The mean of `values`, `uint8[h, w]`, over each of these components."""
        if not len(which):
            return np.zeros(0)
        runs = _ranges(self._first[which], self._first[which + 1])
        pixels = _ranges(self._starts[runs], self._ends[runs])
        flat = pixels - pixels // (self._shape[1] + 1)  # `values` has no clear column between its rows
        area = self.area[which]
        sums = np.add.reduceat(values.ravel()[flat], np.cumsum(area) - area, dtype=np.intp)
        means: npt.NDArray[np.float64] = sums / area
        return means

    def mask(self, index: int, left: int, top: int, right: int, bottom: int) -> Mask:
        """The pixels of a component in a window that holds all of it, `bool[bottom - top, right - left]`."""
        window = np.zeros((bottom - top, right - left), np.bool_)
        runs = slice(self._first[index], self._first[index + 1])
        stride = self._shape[1] + 1
        for start, end in zip(self._starts[runs].tolist(), self._ends[runs].tolist(), strict=True):
            row, column = divmod(start, stride)
            window[row - top, column - left : column - left + end - start] = True
        return window


def find_components(mask: Mask) -> Components:
    """The components of `bool[h, w]`; pixels that touch by a corner belong together."""
    height, width = mask.shape
    stride = width + 1  # a clear column between the rows, so that no run goes over the edge
    padded = np.zeros(height * stride + 2, np.int8)
    padded[1:-1].reshape(height, stride)[:, :width] = mask
    change = np.diff(padded)
    starts, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    labels = _join(starts, ends, stride)

    order = np.argsort(labels, kind="stable")
    starts, ends, labels = starts[order], ends[order], labels[order]
    first = np.flatnonzero(np.diff(labels, prepend=-1))
    if not len(first):
        none = np.zeros(0, np.intp)
        return Components(none, none, none, none, none, (height, width), starts, ends, np.zeros(1, np.intp))
    rows, columns = np.divmod(starts, stride)
    lengths = ends - starts
    return Components(
        left=np.minimum.reduceat(columns, first),
        top=np.minimum.reduceat(rows, first),
        right=np.maximum.reduceat(columns + lengths, first),
        bottom=np.maximum.reduceat(rows, first) + 1,
        area=np.add.reduceat(lengths, first),
        _shape=(height, width),
        _starts=starts,
        _ends=ends,
        _first=np.append(first, len(starts)),
    )


def _join(starts: Integers, ends: Integers, stride: int) -> Integers:
    """The number of a run that stands for all runs that hang together with each run."""
    # The runs of the next row that begin no later than one past the end, and end no earlier than one before the start.
    low = np.searchsorted(ends, starts + stride, "left")
    high = np.searchsorted(starts, ends + stride, "right")
    touching = np.maximum(high - low, 0)
    upper = np.repeat(np.arange(len(starts)), touching)
    lower = _ranges(low, low + touching)
    labels = np.arange(len(starts))
    while len(upper):
        one, other = labels[upper], labels[lower]
        apart = one != other
        upper, lower, one, other = upper[apart], lower[apart], one[apart], other[apart]
        labels[np.maximum(one, other)] = np.minimum(one, other)
        while not np.array_equal(parents := labels[labels], labels):
            labels = parents
    return labels


def _ranges(starts: Integers, ends: Integers) -> Integers:
    """All numbers from each start up to its end, one range after the other."""
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    ranges: Integers = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return ranges
