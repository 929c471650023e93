"""What people get to read."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageChops

from trainer import report
from trainer.evaluation import Evaluation
from trainer.report import LOG_HEADER, class_table, draw_confusion, draw_curves, draw_mistakes, log_line
from trainer.training import Epoch


def result() -> Evaluation:
    confusion = torch.eye(10, dtype=torch.int64) * 90
    confusion[4, 9], confusion[4, 6], confusion[4, 1], confusion[4, 0] = 5, 3, 1, 1
    confusion[8, 8], confusion[9, 8] = 0, 2
    return Evaluation(confusion, loss=0.1)


def epoch(number: int, accuracy: float, best: bool) -> Epoch:
    return Epoch(number, 0.01, 0.5 / number, 0.4 / number, accuracy, 3.2, best)


def test_the_table_tells_what_a_digit_is_taken_for() -> None:
    lines = class_table(result()).splitlines()
    assert len(lines) == 11
    assert lines[5].split(maxsplit=5) == ["4", "100", "90", "90.00%", "100.00%", "9 (5), 6 (3), 1 (1)"]
    assert lines[9].split() == ["8", "0", "0", "-", "0.00%"], "a digit without images has no recall"


def two_classes() -> Evaluation:
    """Of two classes, with an image that was read as class 7."""
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion[0, 0], confusion[1, 1], confusion[1, 0], confusion[0, 7] = 8, 6, 2, 1
    return Evaluation(confusion, loss=0.1)


def test_the_table_names_the_classes_and_leaves_out_those_of_which_there_is_nothing_to_tell() -> None:
    lines = class_table(two_classes(), ("cat", "long-haired dog", *[""] * 8)).splitlines()
    assert [line.split("  ")[0].strip() or line.split()[0] for line in lines] == [
        "class",
        "cat",
        "long-haired dog",
        "7",
    ]
    assert len({line.index("  ", 15) for line in lines}) == 1, "the columns are as wide as the longest name"
    assert lines[1].endswith("7 (1)")
    assert lines[2].endswith("cat (2)")
    assert class_table(two_classes()).splitlines()[0].split()[0] == "digit"


def texts_of(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], bytes]) -> list[str]:
    """All texts in a picture."""
    drawn: list[str] = []

    def texts(figure: Figure) -> bytes:
        figure.canvas.draw()
        drawn.extend(text.get_text() for text in figure.findobj(Text) if text.get_visible())
        return b""

    monkeypatch.setattr(report, "_png", texts)
    draw()
    return [text for text in drawn if text]


def test_pictures_name_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ("cat", "dog", *[""] * 8)
    texts = texts_of(monkeypatch, lambda: draw_confusion(two_classes(), "pets", labels))
    assert sorted(text for text in texts if text in labels) == ["cat", "cat", "dog", "dog"]
    assert texts.count("7") == 2, "what an image was read as has a number if it has no name"
    assert not {"3", "4", "9"} & set(texts)
    pixels, truth = torch.zeros(2, 784, dtype=torch.uint8), torch.tensor([0, 1])
    mistaken = torch.eye(10)[[1, 1]] * 10
    texts = texts_of(monkeypatch, lambda: draw_mistakes(pixels, truth, mistaken, "pets", labels=labels))
    assert "cat read as dog\n100%, no. 0" in texts
    texts = texts_of(monkeypatch, lambda: draw_mistakes(pixels, truth, mistaken, "digits"))
    assert "0 read as 1\n100%, no. 0" in texts


@pytest.mark.parametrize("classes", [12, 26, 60])
def test_of_many_classes_each_has_a_line_a_row_and_room_for_its_counts(
    monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    labels = tuple(f"class {number}" for number in range(classes))
    result = Evaluation(torch.ones(classes, classes, dtype=torch.int64) * 1234, loss=0.1)
    lines = class_table(result, labels).splitlines()
    assert [line[: len(labels[-1])].strip() for line in lines[1:]] == list(labels)
    figures: list[Figure] = []
    monkeypatch.setattr(report, "_png", figures.append)
    draw_confusion(result, "made", labels)
    (figure,) = figures
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    (axes,) = figure.axes
    cell = axes.get_window_extent().width / classes
    counts = [text for text in axes.texts if text.get_text() == "1234"]
    assert len(counts) == classes**2
    assert counts[0].get_window_extent().width < cell, "all are alike"
    assert [label.get_text() for label in axes.get_yticklabels()] == list(labels)
    assert figure.get_figwidth() <= 21


def test_names_are_drawn_as_they_are_and_none_is_too_long_or_a_formula() -> None:
    labels = ("$\\frac{", "a$b$", "x" * 100, *[""] * 7)
    result = Evaluation(torch.ones(10, 10, dtype=torch.int64), loss=0.1)
    pixels, truth = torch.zeros(2, 784, dtype=torch.uint8), torch.tensor([0, 1])
    for png in (
        draw_confusion(result, "$\\frac{" + "x" * 100, labels),
        draw_mistakes(pixels, truth, torch.eye(10)[[1, 2]], "$\\frac{" + "x" * 100, labels=labels),
    ):
        assert margin_of(png) >= 10


def margin_of(png: bytes) -> int:
    """Pixels at the edges of a picture that are white, at the narrowest of its sides."""
    with Image.open(io.BytesIO(png)) as picture:
        left, top, right, bottom = ImageChops.invert(picture.convert("L")).getbbox() or (0, 0, 0, 0)
        return min(left, top, picture.width - right, picture.height - bottom)


def test_the_title_of_the_confusion_stays_off_the_edges() -> None:
    many = Evaluation(torch.eye(10, dtype=torch.int64) * 23_456, loss=0.0)
    assert margin_of(draw_confusion(many, "A data set of handwritten digits test")) >= 10


def test_epochs_have_whole_numbers_also_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(report, "_png", figures.append)
    for count in (1, 2, 3, 12):
        draw_curves([epoch(number + 1, 0.5, best=True) for number in range(count)])
    for figure in figures:
        for axes in figure.axes:
            low, high = axes.get_xlim()
            ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
            assert ticks
            assert all(float(tick).is_integer() for tick in ticks)


def test_a_log_line_stands_under_its_header_and_stars_the_best() -> None:
    line = log_line(epoch(3, 0.9876, best=True), 30)
    assert line.split() == ["3/30", "0.010000", "0.1667", "0.1333", "98.76%", "3.2", "s", "*"]
    assert not log_line(epoch(4, 0.9, best=False), 30).endswith("*")
    assert line.index("s  *") + 1 == len(LOG_HEADER)


def test_pictures_are_pngs_also_of_one_epoch_and_of_no_mistake() -> None:
    perfect = Evaluation(torch.eye(10, dtype=torch.int64), loss=0.0)
    for png in (
        draw_curves([epoch(1, 0.5, best=True)]),
        draw_curves([epoch(1, 0.5, best=True), epoch(2, 0.9, best=True), epoch(3, 0.8, best=False)]),
        draw_confusion(result(), "made"),
        draw_confusion(perfect, "made"),
    ):
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.format == "PNG"
