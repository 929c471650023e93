"""The table of the goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_a_goal_is_reached_by_the_median() -> None:
    from bench.figures import Figure

    assert Figure("lone p50", values=[1.0, 1.15, 9.0]).is_reached  # at most 1.15
    assert not Figure("lone p50", values=[1.0, 1.16, 9.0]).is_reached
    assert Figure("many", values=[0.1, 0.90, 0.95]).is_reached  # at least 0.90
    assert not Figure("many", values=[0.1, 0.89, 0.95]).is_reached


def test_a_row_has_median_span_parts_last_run_and_goal() -> None:
    from bench.figures import Figure, table

    figure = Figure("many", "asgi")
    for value in (2.0, 1.5, 1.0):
        figure.add(value, {"a second": 1000 * value, "no-op": 1000})
    line = table([figure], {("many", "asgi"): 1.4}).splitlines()[1]
    assert line.endswith("asgi       1.50 (1.00 to 2.00)  1,500 a second, 1,000 no-op  1.40      ≥ 0.90  yes")
    head, rule, row = table([figure], {("many", "asgi"): 1.4}, markdown=True).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == 8
    assert "1.50 (1.00 to 2.00)" in row
    assert "1.40" not in row


@pytest.mark.parametrize("content", ["", "[]", '{"figures": [{}]}', "{}", '{"figures": 3}'])
def test_a_file_of_another_form_is_no_last_run(tmp_path: Path, content: str) -> None:
    from bench.figures import load_last

    (path := tmp_path / "last.json").write_text(content)
    assert load_last(path) == {}
    assert load_last(tmp_path / "none.json") == {}


def test_what_is_not_measured_this_time_stays_in_the_file(tmp_path: Path) -> None:
    from bench.figures import with_kept

    path = tmp_path / "last.json"
    path.write_text(
        json.dumps({"figures": [{"name": "a", "transport": "", "median": 1}, {"name": "b", "transport": ""}]})
    )
    assert with_kept([{"name": "a", "transport": "", "median": 2}], path) == [
        {"name": "a", "transport": "", "median": 2},
        {"name": "b", "transport": ""},
    ]


def test_every_goal_stands_in_the_page_about_performance() -> None:
    from bench.figures import GOALS

    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    for goal in GOALS.values():
        assert f"| {goal.row} | {goal.measure} |" in page
