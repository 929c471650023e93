"""What people are told of a run."""

from __future__ import annotations

from typing import Any

import pytest

from client.load.report import line, number, remarks


def times(count: int = 1000, p50: float = 0.0, p99: float = 0.0) -> dict[str, Any]:
    return {"p50": p50, "p99": p99, "p99.9": p99, "max": p99, "count": count}


def run(**others: Any) -> dict[str, Any]:
    """A good one."""
    return {
        "name": "a run",
        "rate": None,
        "messages_per_second": 1000,
        "images_per_second": 1000,
        "latency_us": times(p50=1000, p99=5000),
        "late_us": times(),
        "sent_again": 0,
        "generator_core_share": 0.5,
        "faults": {},
        "examples": {},
        "ceiling": {"messages_per_second": 10_000},
    } | others


def test_there_is_nothing_to_say_of_a_good_run() -> None:
    assert remarks(run()) == []
    assert remarks(run(ceiling=None, late_us=None)) == []


@pytest.mark.parametrize(
    ("others", "remark"),
    [
        ({"messages_per_second": 8001}, "more than 80% of what the generator can do"),
        ({"rate": 10_001}, "10,001 messages a second are more than the 10,000 that the generator can send"),
        ({"generator_core_share": 0.95}, "the generator used 95% of a core: it is the limit"),
        ({"sent_again": 1234}, "1,234 messages were sent again"),
        ({"late_us": times(p50=101, p99=101)}, "half of all messages were sent more than 0.10 ms late"),
        ({"late_us": times(p99=501)}, "one message of a hundred was sent more than 0.50 ms late"),
        ({"faults": {"reset": 1234}, "examples": {"reset": "error 2"}}, "FAILED: 1,234 x reset: error 2"),
        ({"latency_us": times(0), "late_us": None}, "FAILED: nothing was answered"),
    ],
)
def test_what_makes_a_figure_doubtful_is_told(others: dict[str, Any], remark: str) -> None:
    (found,) = remarks(run(**others))
    assert remark in found


@pytest.mark.parametrize(
    "others",
    [
        {"messages_per_second": 7999},
        {"generator_core_share": 0.89},
        {"late_us": times(p50=99, p99=99)},  # a tenth of the latency
        {"late_us": times(p99=499)},
        {"late_us": times(count=99, p99=4000)},  # the p99 of 99 is the latest one
    ],
)
def test_what_does_not_matter_is_not(others: dict[str, Any]) -> None:
    assert remarks(run(**others)) == []


def test_percentiles_of_few_answers_are_left_out() -> None:
    shown = [line(run(latency_us=times(count, 1000, 5000))).split()[4:8] for count in (99, 100, 999, 1000)]
    assert shown == [
        ["1.00", "-", "-", "5.00"],
        ["1.00", "5.00", "-", "5.00"],
        ["1.00", "5.00", "-", "5.00"],
        ["1.00", "5.00", "5.00", "5.00"],
    ]


def test_numbers_are_for_people() -> None:
    assert [number(value) for value in (0.5, 1 / 3, 2, 99.96, 100.4, 12_345.6)] == [
        "0.5",
        "0.333",
        "2",
        "100",
        "100",
        "12,346",
    ]
