"""The generator's histogram against NumPy's percentiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.load.histogram import LARGEST_BITS, Histogram

values = st.lists(st.integers(0, (1 << LARGEST_BITS) - 1) | st.integers(0, 5000), min_size=1, max_size=200)
percents = st.floats(0, 100) | st.sampled_from([0, 50, 90, 99, 99.9, 100])


def histogram_of(numbers: list[int]) -> Histogram:
    histogram = Histogram()
    for number in numbers:
        histogram.add(number)
    return histogram


@given(values, percents)
def test_a_percentile_is_that_of_numpy_and_at_most_a_thousandth_more(numbers: list[int], percent: float) -> None:
    # Ranks as here, by the same rounding: NumPy's own differ where percent / 100 * n is near a whole number.
    rank = max(int(np.ceil(len(numbers) * percent / 100)), 1)
    exact = int(np.percentile(np.array(numbers), (rank - 0.5) / len(numbers) * 100, method="inverted_cdf"))
    found = histogram_of(numbers).percentile(percent)
    assert exact <= found <= exact + exact / 1000


@given(values)
def test_count_mean_and_largest_are_exact(numbers: list[int]) -> None:
    histogram = histogram_of(numbers)
    assert (histogram.count, histogram.largest) == (len(numbers), max(numbers))
    assert histogram.mean == pytest.approx(np.mean(numbers))


def test_small_values_are_kept_as_they_are() -> None:
    histogram = histogram_of(list(range(2048)))
    assert [histogram.percentile((value + 1) / 2048 * 100) for value in range(2048)] == list(range(2048))


def test_what_is_out_of_range_counts_as_the_nearest_in_it() -> None:
    histogram = histogram_of([-1, 1 << 60])
    assert (histogram.percentile(50), histogram.percentile(100)) == (0, (1 << LARGEST_BITS) - 1)


def test_an_empty_one_has_zeros() -> None:
    assert set(Histogram().summary().values()) == {0}
