"""Whether confidence is what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.calibration import coverage, fit_temperature, reliability, wilson_interval


def logits_of(confidence: float, digit: int, count: int) -> Tensor:
    """`float32[count, 10]`: predictions of a digit with a confidence."""
    logits = torch.zeros(count, 10)
    logits[:, digit] = math.log(9 * confidence / (1 - confidence))
    return logits


def test_a_model_that_is_as_often_right_as_it_says_has_no_error() -> None:
    logits = torch.cat([logits_of(0.8, 3, 10), logits_of(0.5, 7, 10)])
    labels = torch.tensor([3] * 8 + [1, 2] + [7] * 5 + [0] * 5)
    found = reliability(logits, labels)
    assert found.expected_error == pytest.approx(0, abs=1e-6)
    assert found.counts.sum() == 20
    assert found.counts[12] == found.counts[7] == 10, "0.8 and 0.5 of 15 bins"


def test_the_error_is_the_mean_gap_of_the_bins() -> None:
    logits = torch.cat([logits_of(0.9, 3, 30), logits_of(0.5, 7, 10)])
    labels = torch.tensor([3] * 15 + [0] * 15 + [7] * 10)
    assert reliability(logits, labels).expected_error == pytest.approx((30 * 0.4 + 10 * 0.5) / 40)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(20_000, 10, generator=random) * 2
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=random).flatten()
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


def test_the_temperature_stays_within_its_limits() -> None:
    logits = logits_of(0.9, 3, 10)
    assert fit_temperature(logits, torch.full((10,), 3)) == pytest.approx(0.1, abs=0.001)
    assert fit_temperature(logits, torch.full((10,), 4)) == pytest.approx(10, rel=0.01)


def test_coverage_takes_the_most_confident_first() -> None:
    logits = torch.cat([logits_of(0.6, 1, 1), logits_of(0.9, 2, 1), logits_of(0.7, 3, 2)])
    shares, accuracies = coverage(logits, torch.tensor([0, 2, 3, 0]))
    assert shares.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert accuracies.tolist() == pytest.approx([1, 1, 2 / 3, 0.5])


def test_the_interval_is_wilsons() -> None:
    # E. B. Wilson's interval of 9,950 of 10,000, by its formula with z = 1.96.
    low, high = wilson_interval(9950, 10_000)
    assert (round(low, 5), round(high, 5)) == (0.99341, 0.99621)
    assert wilson_interval(10, 10)[1] == pytest.approx(1)
    assert wilson_interval(0, 10)[0] == pytest.approx(0)


def test_the_interval_is_a_share_and_never_minus_nothing() -> None:
    for total in range(1, 300):
        low, high = wilson_interval(0, total)[0], wilson_interval(total, total)[1]
        assert f"{low:.2%} {high:.2%}" == "0.00% 100.00%"
        assert low >= 0
        assert high <= 1
