"""Files that are read again when they change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from server.errors import CannotServe
from server.secret_files import Contents, WatchedFiles


@pytest.fixture
def parsed() -> list[Contents]:
    """All contents that `watch` had to parse."""
    return []


@pytest.fixture
def watch(tmp_path: Path, parsed: list[Contents]) -> Callable[[], WatchedFiles[str]]:
    """Watch the files `a` and `b`, whose value is their text, unless one is empty."""
    paths = {str(tmp_path / "a"): "first part", str(tmp_path / "b"): "second part"}

    def parse(contents: Contents) -> str:
        parsed.append(contents)
        for path, content in contents.items():
            if not content:
                raise CannotServe(f"{paths[path]} is empty")
        return "+".join(content.decode() for content in contents.values())

    for path in paths:
        Path(path).write_text("old", encoding="utf-8")
    return lambda: WatchedFiles(paths, parse)


def test_a_value_is_made_once_for_each_change_of_any_file(
    watch: Callable[[], WatchedFiles[str]], parsed: list[Contents], tmp_path: Path
) -> None:
    files = watch()
    assert files.value == "old+old"
    assert [files.look(), files.look()] == [False, False]
    (tmp_path / "b").write_text("new", encoding="utf-8")  # as long as it was, and within the same tick of the clock
    assert [files.look(), files.look()] == [True, False]
    assert files.value == "old+new"
    (tmp_path / "a").write_text("", encoding="utf-8")
    assert [files.look(), files.look()] == [False, False]
    assert files.value == "old+new"
    assert len(parsed) == 3


def test_each_new_trouble_is_logged_once_and_an_old_one_that_comes_back_again(
    watch: Callable[[], WatchedFiles[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, first = watch(), tmp_path / "a"

    def looks() -> list[str]:
        caplog.clear()
        for _ in range(3):
            files.look()
        return [entry.message for entry in caplog.records if entry.levelno == logging.ERROR]

    first.write_text("", encoding="utf-8")
    assert looks() == ["first part is empty; what was read before stays in use"]
    first.unlink()
    (gone,) = looks()
    assert (
        gone == f"the first part {first} cannot be read: No such file or directory; what was read before stays in use"
    )
    for _ in range(2):
        first.write_text("old", encoding="utf-8")
        assert looks() == []
        first.unlink()
        assert looks() == [gone]
    assert files.value == "old+old"


def test_what_was_never_usable_is_no_value(watch: Callable[[], WatchedFiles[str]], tmp_path: Path) -> None:
    (tmp_path / "b").write_text("", encoding="utf-8")
    with pytest.raises(CannotServe, match=r"^second part is empty$"):
        watch()
