"""What people get to read."""

from __future__ import annotations

import io

import torch
from PIL import Image

from trainer.evaluation import Evaluation
from trainer.report import LOG_HEADER, class_table, draw_confusion, draw_curves, log_line
from trainer.training import Epoch


def result() -> Evaluation:
    confusion = torch.eye(10, dtype=torch.int64) * 90
    confusion[4, 9], confusion[4, 6], confusion[4, 1], confusion[4, 0] = 5, 3, 1, 1
    confusion[8, 8] = 0
    return Evaluation(confusion, loss=0.1)


def epoch(number: int, accuracy: float, best: bool) -> Epoch:
    return Epoch(number, 0.01, 0.5 / number, 0.4 / number, accuracy, 3.2, best)


def test_the_table_tells_what_a_digit_is_taken_for() -> None:
    lines = class_table(result()).splitlines()
    assert len(lines) == 11
    assert lines[5].split(maxsplit=5) == ["4", "100", "90", "90.00%", "100.00%", "9 (5), 6 (3), 1 (1)"]
    assert lines[9].split() == ["8", "0", "0", "-", "-"], "a digit without images has no recall"


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
