"""The table of the goals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


SETTING: dict[str, dict[str, Any]] = {"machine": {"cores": 2}, "plan": {"rounds": 3, "seconds": 1.0}}
A = {"name": "many", "transport": "asgi", "median": 1.5}


def test_without_a_last_run_its_column_is_left_out() -> None:
    from bench.figures import Figure, table

    assert "last run" not in table([Figure("many", "asgi", [1.0])], {})


def test_a_last_run_of_the_same_setting_stands_beside(tmp_path: Path) -> None:
    from bench.figures import load_last

    (path := tmp_path / "last.json").write_text(json.dumps({**SETTING, "figures": [A]}))
    last = load_last(path, SETTING)
    assert last.medians == {("many", "asgi"): 1.5}
    assert not last.unlike


@pytest.mark.parametrize(
    ("part", "changed", "reason"),
    [
        ("plan", {"rounds": 3, "seconds": 0.2}, "it was measured with seconds 0.2, this one with 1.0"),
        ("plan", {"rounds": 3, "seconds": 1.0, "loop": "uvloop"}, "with loop uvloop, this one with None"),
        ("machine", {"cores": 64}, "it was measured with cores 64, this one with 2"),
    ],
)
def test_a_run_of_another_setting_is_no_last_run(
    tmp_path: Path, part: str, changed: dict[str, object], reason: str
) -> None:
    from bench.figures import load_last

    (path := tmp_path / "last.json").write_text(json.dumps({**SETTING, part: changed, "figures": [A]}))
    last = load_last(path, SETTING)
    assert not last.figures
    assert reason in last.unlike


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "3", "null", '{"figures": [{}]}', '{"machine": 3, "plan": [], "figures": []}', "\xff"),
        json.dumps({**SETTING, "figures": 3}),
        json.dumps({**SETTING, "figures": [3]}),
        json.dumps({**SETTING, "figures": [{}]}),
        json.dumps({**SETTING, "figures": [{**A, "name": []}]}),
        json.dumps({**SETTING, "figures": [{**A, "median": None}]}),
        json.dumps({**SETTING, "figures": [{**A, "median": float("nan")}]}),
    ],
)
def test_a_file_of_another_form_is_no_last_run(tmp_path: Path, content: str) -> None:
    from bench.figures import Last, load_last

    (path := tmp_path / "last.json").write_text(content, encoding="latin-1")
    last = load_last(path, SETTING)
    assert not last.figures
    assert "of another form" in last.unlike
    assert load_last(tmp_path / "none.json", SETTING) == Last()


def test_what_is_not_measured_this_time_stays_in_the_file() -> None:
    from bench.figures import Last, with_kept

    other = {**A, "transport": "grpcio"}
    assert with_kept([{**A, "median": 2}], Last([A, other])) == [{**A, "median": 2}, other]


def test_every_goal_stands_in_the_page_about_performance() -> None:
    from bench.figures import GOALS, PEER_GOALS

    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    for goal in (*GOALS.values(), *PEER_GOALS.values()):
        assert f"| {goal.row} | {goal.measure} |" in page
