"""What all benches of servers share."""

from __future__ import annotations


def test_whoever_was_first_is_last_in_the_next_round() -> None:
    from bench.rounds import in_turn

    assert [list(in_turn(["a", "b", "c"], number)) for number in range(3)] == [[*"abc"], [*"cba"], [*"abc"]]


def test_percentiles_are_those_of_the_histogram() -> None:
    """The 99th is the time of an answer, and not of none that lies between two."""
    from bench.rounds import percentiles_us

    p50, p99 = percentiles_us([0.001] * 99 + [1.0])
    assert 1000 <= p50 <= 1001
    assert 1000 <= p99 <= 1001


def test_a_spread_is_median_least_and_greatest_of_each_rounds_ratio() -> None:
    from bench.rounds import ratios, spread

    assert spread(ratios([1.0, 6.0, 2.0], [2.0, 2.0, 2.0])) == "1.00 (0.50 to 3.00)"
