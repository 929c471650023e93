"""Connected components, beside a plain flood fill."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from client.video.components import find_components

Mask = npt.NDArray[np.bool_]


def flood(mask: Mask) -> list[set[tuple[int, int]]]:
    """The components as sets of row and column, one pixel after the other."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    components = []
    while left:
        waiting, component = [left.pop()], set()
        while waiting:
            row, column = waiting.pop()
            component.add((row, column))
            around = {(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= around
            waiting += around
        components.append(component)
    return components


@given(arrays.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_components_are_those_of_a_flood_fill(mask: Mask) -> None:
    found = find_components(mask)
    height, width = mask.shape
    pixels = [
        {(int(row), int(column)) for row, column in np.argwhere(found.mask(index, 0, 0, width, height))}
        for index in range(len(found))
    ]
    expected = flood(mask)
    assert sorted(map(sorted, pixels)) == sorted(map(sorted, expected))
    for index, component in enumerate(pixels):
        rows, columns = zip(*component, strict=True)
        assert (found.top[index], found.bottom[index]) == (min(rows), max(rows) + 1)
        assert (found.left[index], found.right[index]) == (min(columns), max(columns) + 1)
        assert found.area[index] == len(component)


@given(arrays.arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.randoms(use_true_random=False))
def test_means_are_those_of_each_components_pixels(mask: Mask, random: object) -> None:
    values = np.arange(mask.size, dtype=np.uint8).reshape(mask.shape)
    found = find_components(mask)
    which = np.arange(len(found))[::-2]
    expected = [values[found.mask(index, 0, 0, mask.shape[1], mask.shape[0])].mean() for index in which.tolist()]
    assert found.means(values, which) == pytest.approx(expected)


def test_a_spiral_is_one_component() -> None:
    mask = np.zeros((64, 64), np.bool_)
    row, column, dy, dx = 0, 0, 0, 1
    for length in [n for n in range(63, 0, -2) for _ in (0, 1)]:
        for _ in range(length):
            mask[row, column] = True
            row, column = row + dy, column + dx
        dy, dx = dx, -dy
    assert len(find_components(mask)) == 1


def test_an_empty_mask_has_none() -> None:
    assert len(find_components(np.zeros((5, 7), np.bool_))) == 0
