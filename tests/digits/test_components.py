"""Connected parts and their measures, beside SciPy's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from digits.components import Components

ndimage = pytest.importorskip("scipy.ndimage")

SHAPES = npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=16)
MASKS = SHAPES.flatmap(lambda shape: npst.arrays(np.bool_, shape))


def labelled(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], int]:
    """SciPy's: the number of each pixel's part, and how many there are; corners connect."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    return labels, count


def numbers_of(parts: Components, labels: npt.NDArray[np.int32]) -> list[int]:
    """SciPy's number of each of ours."""
    numbers = []
    for index in range(parts.count):
        found = np.unique(labels[parts.mask(np.arange(parts.count) == index)])
        assert len(found) == 1
        numbers.append(int(found[0]))
    return numbers


@settings(max_examples=150, deadline=None)
@given(mask=MASKS, seed=st.integers(0, 100))
def test_parts_and_all_their_measures_are_those_of_scipy(mask: npt.NDArray[np.bool_], seed: int) -> None:
    weights = np.random.default_rng(seed).integers(0, 256, mask.shape).astype(np.uint8)
    parts = Components(mask)
    labels, count = labelled(mask)
    assert parts.count == count
    if not count:
        return
    numbers = numbers_of(parts, labels)
    sums, means = parts.sums(weights), parts.means(weights, np.arange(count)[::-2])
    assert means == pytest.approx(sums[::-2] / parts.area[::-2])
    assert sorted(numbers) == list(range(1, count + 1))
    for index, number in enumerate(numbers):
        piece = labels == number
        rows, columns = np.nonzero(piece)
        assert parts.area[index] == piece.sum()
        assert sums[index] == weights[piece].sum(dtype=int)
        assert (parts.top[index], parts.bottom[index]) == (rows.min(), rows.max() + 1)
        assert (parts.left[index], parts.right[index]) == (columns.min(), columns.max() + 1)
        assert parts.center_y[index] == pytest.approx(rows.mean())
        assert parts.center_x[index] == pytest.approx(columns.mean())
        np.testing.assert_array_equal(parts.window(index, 0, 0, mask.shape[1], mask.shape[0]), piece)
        box = (int(part[index]) for part in (parts.left, parts.top, parts.right, parts.bottom))
        np.testing.assert_array_equal(
            parts.window(index, *box), piece[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        )
        edges = (piece[0], piece[-1], piece[:, 0], piece[:, -1])
        assert parts.on_edge[index] == max(int(edge.sum()) for edge in edges)


@settings(max_examples=100, deadline=None)
@given(mask=MASKS, seed=st.integers(0, 100))
def test_chosen_parts_are_painted_and_no_others(mask: npt.NDArray[np.bool_], seed: int) -> None:
    parts = Components(mask)
    labels, _ = labelled(mask)
    chosen = np.random.default_rng(seed).random(parts.count) < 0.5
    numbers = [number for number, take in zip(numbers_of(parts, labels), chosen, strict=True) if take]
    np.testing.assert_array_equal(parts.mask(chosen), np.isin(labels, numbers))


@pytest.mark.parametrize("density", [0.1, 0.4, 0.6, 0.9])
def test_many_parts_of_noise_are_those_of_scipy(density: float) -> None:
    mask = np.random.default_rng(0).random((144, 130)) < density
    parts = Components(mask)
    labels, count = labelled(mask)
    assert parts.count == count
    assert sorted(parts.area.tolist()) == sorted(np.bincount(labels.ravel())[1:].tolist())
    np.testing.assert_array_equal(parts.mask(np.ones(count, np.bool_)), mask)


def test_a_winding_line_is_one_part_however_long_its_way() -> None:
    mask = np.zeros((81, 60), np.bool_)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    parts = Components(mask)
    assert parts.count == labelled(mask)[1] == 1


def test_parts_do_not_go_on_from_one_row_s_end_to_the_next_row_s_beginning() -> None:
    mask = np.array([[False, False, True], [False, False, False], [True, False, False]])
    mask[1, 0] = True  # directly below the end of the first row in memory
    assert Components(mask).count == 2


def test_nothing_has_no_parts() -> None:
    parts = Components(np.zeros((5, 4), np.bool_))
    assert parts.count == 0
    assert not len(parts.sums(np.zeros((5, 4), np.uint8)))
    assert not len(parts.means(np.zeros((5, 4), np.uint8), np.zeros(0, np.intp)))
    assert not parts.mask(np.zeros(0, np.bool_)).any()
