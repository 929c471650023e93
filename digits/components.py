"""Connected parts of a mask, measured; knows nothing about digits.

The mask is taken apart into runs, that is stretches of a row. Runs that touch,
also at a corner, belong together. Everything is measured on the runs, of which
there are a few hundred where there are ten thousands of pixels.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.intp]
Floats: TypeAlias = npt.NDArray[np.float64]


class Components:
    """The connected parts of a mask `bool[h, w]`, each attribute an array `[count]` over them.

    Attributes:
        count: how many there are.
        area: pixels.
        mass: sum of the weights over its pixels.
        top, bottom, left, right: its box; bottom and right are the first beyond it.
        center_y, center_x: mean row and column of its pixels.
        on_edge: how many of its pixels lie on one of the image's four edges, that where it has the most.
    """

    def __init__(self, mask: npt.NDArray[np.bool_], weights: npt.NDArray[np.uint8]) -> None:
        height, width = mask.shape
        self.shape = mask.shape
        # A column of nothing at the end of each row parts the rows of the flat image.
        self._stride = width + 1
        flat = np.zeros(height * self._stride + 1, np.int8)
        flat[1:].reshape(height, self._stride)[:, :width] = mask
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        self._starts, self._ends = edges[::2], edges[1::2]
        labels = _join(self._starts, self._ends, self._stride)
        order = np.argsort(labels, kind="stable")
        self._order = order
        ordered = labels[order]
        first = np.flatnonzero(np.diff(ordered, prepend=-1))
        self._first = first
        self.count = len(first)
        self._runs = np.diff(first, append=len(ordered))
        if not self.count:
            return
        starts, lengths = self._starts[order], (self._ends - self._starts)[order]
        row, column = starts // self._stride, starts % self._stride
        self.area: Ints = np.add.reduceat(lengths, first)
        padded = np.zeros((height, self._stride), np.uint8)
        padded[:, :width] = weights
        sums = np.add.reduceat(padded.ravel(), edges, dtype=np.intp)[::2]  # between the runs are the odd ones
        self.mass: Ints = np.add.reduceat(sums[order], first)
        self.top: Ints = np.minimum.reduceat(row, first)
        self.bottom: Ints = np.maximum.reduceat(row, first) + 1
        self.left: Ints = np.minimum.reduceat(column, first)
        self.right: Ints = np.maximum.reduceat(column + lengths, first)
        self.center_y: Floats = np.add.reduceat(row * lengths, first) / self.area
        self.center_x: Floats = np.add.reduceat((column + (lengths - 1) / 2) * lengths, first) / self.area
        edges_met = [
            np.where(row == 0, lengths, 0),
            np.where(row == height - 1, lengths, 0),
            column == 0,
            column + lengths == width,
        ]
        self.on_edge: Ints = np.max([np.add.reduceat(met, first, dtype=np.intp) for met in edges_met], axis=0)

    def mask(self, chosen: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """The pixels of the components that `chosen`, `bool[count]`, names: `bool[h, w]`."""
        height, width = self.shape
        runs = self._order[np.repeat(chosen, self._runs)]
        steps = np.zeros(height * self._stride + 1, np.int8)
        steps[self._starts[runs]] = 1
        steps[self._ends[runs]] = -1
        painted = np.cumsum(steps[:-1], dtype=np.int8).reshape(height, self._stride)[:, :width]
        return painted.astype(np.bool_)


def _join(starts: Ints, ends: Ints, stride: int) -> Ints:
    """A number for each run, the same for those that are connected."""
    labels = np.arange(len(starts))
    # In the flat image the run's neighbours in the row above begin and end one stride before its own.
    first = np.searchsorted(ends, starts - stride, side="left")
    beyond = np.searchsorted(starts, ends - stride, side="right")
    counts = np.maximum(beyond - first, 0)
    if not counts.any():
        return labels
    below = np.repeat(labels, counts)
    above = np.arange(len(below)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    while True:
        lower = np.minimum(labels[above], labels[below])
        joined = labels.copy()
        for target in (labels[above], labels[below]):
            np.minimum.at(joined, target, lower)
        joined = joined[joined]
        if np.array_equal(joined, labels):
            return labels
        labels = joined
