"""Connected parts of a mask, measured; knows nothing about digits.

The mask is taken apart into runs, that is stretches of a row. Runs that touch,
also at a corner, belong together; they are joined by hooking and pointer jumping
over whole arrays (Y. Shiloach, U. Vishkin, "An O(log n) parallel connectivity
algorithm", 1982), which takes a few rounds whatever the shapes are. Everything
is measured on the runs, of which there are a few hundred where there are ten
thousands of pixels.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Bools: TypeAlias = npt.NDArray[np.bool_]
Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.intp]


class Components:
    """The connected parts of a mask `bool[h, w]`, each attribute an array `[count]` over them.

    Attributes:
        count: how many there are.
        shape: of the mask.
        area: pixels.
        top, bottom, left, right: the box; bottom and right are the first beyond it.
    """

    def __init__(self, mask: Bools) -> None:
        height, width = self.shape = mask.shape
        # A column of nothing at the end of each row parts the rows of the flat image.
        self._stride = width + 1
        flat = np.zeros(height * self._stride + 1, np.int8)
        flat[1:].reshape(height, self._stride)[:, :width] = mask
        self._edges = np.flatnonzero(flat[1:] != flat[:-1])
        starts, ends = self._edges[::2], self._edges[1::2]
        labels = _join(starts, ends, self._stride)
        self._order = np.argsort(labels, kind="stable")
        # The runs, those of a component one after the other.
        self._starts, self._ends = starts[self._order], ends[self._order]
        self._lengths = self._ends - self._starts
        self._row, self._column = np.divmod(self._starts, self._stride)
        self._first = np.flatnonzero(np.diff(labels[self._order], prepend=-1))  # run of each component
        self._runs = np.diff(self._first, append=len(self._starts))  # how many each has
        self.count = len(self._first)
        self.area: Ints = self._sum(self._lengths)
        self.top: Ints = self._row[self._first]  # the runs of a component are in the order of the rows
        self.bottom: Ints = self._row[self._first + self._runs - 1] + 1
        self.left: Ints = _reduce(np.minimum, self._column, self._first)
        self.right: Ints = _reduce(np.maximum, self._column + self._lengths, self._first)

    @cached_property
    def center_y(self) -> Floats:
        """Mean row of the pixels."""
        return self._sum(self._row * self._lengths) / self.area

    @cached_property
    def center_x(self) -> Floats:
        """Mean column of the pixels."""
        return self._sum((self._column + (self._lengths - 1) / 2) * self._lengths) / self.area

    @cached_property
    def on_edge(self) -> Ints:
        """How many pixels lie on one of the image's four edges, that where the component has the most."""
        height, width = self.shape
        met = [
            np.where(self._row == 0, self._lengths, 0),
            np.where(self._row == height - 1, self._lengths, 0),
            (self._column == 0).astype(np.intp),
            (self._column + self._lengths == width).astype(np.intp),
        ]
        most: Ints = np.max([self._sum(each) for each in met], axis=0)
        return most

    def sums(self, values: npt.NDArray[np.uint8]) -> Ints:
        """The sum of `values`, `uint8[h, w]`, over each component."""
        if not self.count:
            return np.zeros(0, np.intp)
        height, width = self.shape
        padded = np.zeros((height, self._stride), np.uint8)
        padded[:, :width] = values
        of_runs = np.add.reduceat(padded.ravel(), self._edges, dtype=np.intp)[::2]  # what is between runs is left out
        return self._sum(of_runs[self._order])

    def means(self, values: npt.NDArray[np.uint8], which: Ints) -> Floats:
        """The mean of `values`, `uint8[h, w]`, over each of these components."""
        if not len(which):
            return np.zeros(0)
        runs = _ranges(self._first[which], self._first[which] + self._runs[which])
        pixels = _ranges(self._starts[runs], self._ends[runs])
        flat = pixels - pixels // self._stride  # `values` has no column of nothing between its rows
        area = self.area[which]
        sums = np.add.reduceat(values.ravel()[flat], np.cumsum(area) - area, dtype=np.intp)
        means: Floats = sums / area
        return means

    def mask(self, chosen: npt.NDArray[Any]) -> Bools:
        """The pixels of the components that `chosen`, `bool[count]`, names: `bool[h, w]`."""
        height, width = self.shape
        runs = np.repeat(chosen, self._runs)
        steps = np.zeros(height * self._stride + 1, np.int8)
        steps[self._starts[runs]] = 1
        steps[self._ends[runs]] = -1
        painted = np.cumsum(steps[:-1], dtype=np.int8).reshape(height, self._stride)[:, :width]
        return painted.astype(np.bool_)

    def window(self, index: int, left: int, top: int, right: int, bottom: int) -> Bools:
        """The pixels of one component in a window that holds all of it: `bool[bottom - top, right - left]`."""
        window = np.zeros((bottom - top, right - left), np.bool_)
        runs = slice(self._first[index], self._first[index] + self._runs[index])
        rows, columns, lengths = (each[runs].tolist() for each in (self._row, self._column, self._lengths))
        for row, column, length in zip(rows, columns, lengths, strict=True):
            window[row - top, column - left : column - left + length] = True
        return window

    def _sum(self, of_runs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The sum over each component's runs."""
        return _reduce(np.add, of_runs, self._first)


def _reduce(how: np.ufunc, of_runs: npt.NDArray[Any], first: Ints) -> npt.NDArray[Any]:
    reduced: npt.NDArray[Any] = how.reduceat(of_runs, first) if len(first) else of_runs[:0]
    return reduced


def _join(starts: Ints, ends: Ints, stride: int) -> Ints:
    """A number for each run, the same for those that are connected: that of the first of them."""
    # In the flat image the neighbours in the next row begin and end one stride later.
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


def _ranges(starts: Ints, ends: Ints) -> Ints:
    """All numbers from each start up to its end, one range after the other."""
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    ranges: Ints = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return ranges
