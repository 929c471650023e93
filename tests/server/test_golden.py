"""The sheet of golden digits is what its docstring says."""

from __future__ import annotations

import numpy as np

from digits.preprocessing import is_canonical, to_pixels
from server.golden import golden_digits


def test_the_sheet_holds_two_rows_of_the_ten_digits() -> None:
    pixels, labels = golden_digits()
    assert (pixels.shape, str(pixels.dtype)) == ((20, 784), "uint8")
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 2


def test_every_golden_digit_is_canonical_and_unlike_the_others() -> None:
    pixels, _ = golden_digits()
    assert len({row.tobytes() for row in pixels}) == 20
    for row in pixels:
        image = row.reshape(28, 28)
        assert is_canonical(image)
        assert np.array_equal(to_pixels(image), image)


def test_the_caller_may_write_to_its_copy() -> None:
    golden_digits()[0][:] = 0
    assert golden_digits()[0].any()
