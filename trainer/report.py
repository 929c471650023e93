"""What a training or an evaluation has to tell: tables, records and pictures.

Turns results into text, JSON values and PNG bytes. Knows nothing of files or
of how the results came about.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from digits.preprocessing import CLASSES
from trainer.evaluation import Evaluation
from trainer.training import Epoch

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # told apart by colour-blind eyes too (Okabe, Ito)
LOG_HEADER = f"{'epoch':>7}  {'rate':>8}  {'train loss':>10}  {'val. loss':>9}  {'val. accuracy':>13}  {'time':>7}"


def log_line(epoch: Epoch, epochs: int) -> str:
    """One epoch under `LOG_HEADER`; a star marks the best up to here."""
    line = (
        f"{epoch.number:>3}/{epochs:<3}  {epoch.learning_rate:>8.6f}  {epoch.train_loss:>10.4f}  "
        f"{epoch.validation_loss:>9.4f}  {epoch.validation_accuracy:>11.2%}    {epoch.seconds:>5.1f} s"
    )
    return f"{line}  *" if epoch.best else line


def accuracy_line(result: Evaluation) -> str:
    return f"{result.accuracy:.2%} ({result.correct} of {result.total} images)"


def class_table(result: Evaluation) -> str:
    """A line a digit: how many there are, how many were read, and as what the others were read."""
    lines = [f"{'digit':>5}  {'images':>6}  {'correct':>7}  {'recall':>8}  {'precision':>9}  most often taken for"]
    for digit, row in enumerate(result.confusion.tolist()):
        mistakes = sorted(((count, other) for other, count in enumerate(row) if count and other != digit), reverse=True)
        commonest = ", ".join(f"{other} ({count})" for count, other in mistakes[:3])
        lines.append(
            f"{digit:>5}  {sum(row):>6}  {row[digit]:>7}  {_percent(result.recall[digit]):>8}  "
            f"{_percent(result.precision[digit]):>9}  {commonest}"
        )
    return "\n".join(line.rstrip() for line in lines)


def evaluation_record(result: Evaluation) -> dict[str, Any]:
    """JSON values; `confusion` has a row for each digit shown and a column for each digit read."""
    return {
        "accuracy": result.accuracy,
        "correct": result.correct,
        "total": result.total,
        "loss": result.loss,
        "recall": result.recall,
        "precision": result.precision,
        "confusion": result.confusion.tolist(),
    }


def training_record(epochs: Sequence[Epoch], test: Evaluation) -> dict[str, Any]:
    """JSON values: the log and the test's result."""
    return {"epochs": [asdict(epoch) for epoch in epochs], "test": evaluation_record(test)}


def draw_curves(epochs: Sequence[Epoch]) -> bytes:
    """Learning curves as a PNG: losses on the left, validation accuracy on the right."""
    numbers = [epoch.number for epoch in epochs]
    best = [epoch for epoch in epochs if epoch.best][-1]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)

    left.plot(numbers, [epoch.train_loss for epoch in epochs], ".-", color=ORANGE, label="training")
    left.plot(numbers, [epoch.validation_loss for epoch in epochs], ".-", color=BLUE, label="validation")
    left.set(title="Loss", xlabel="epoch", ylabel="mean cross-entropy (nats)", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
    left.yaxis.set_minor_formatter(NullFormatter())

    right.plot(numbers, [epoch.validation_accuracy * 100 for epoch in epochs], ".-", color=BLUE, label="validation")
    right.set(title="Accuracy", xlabel="epoch", ylabel="images read correctly (%)")
    right.plot(
        [best.number],
        [best.validation_accuracy * 100],
        "o",
        color=GREEN,
        markersize=9,
        label=f"best: {best.validation_accuracy:.2%} in epoch {best.number}, kept",
    )
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(which="both", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="upper right")
    right.legend(frameon=False, loc="lower right")
    return _png(figure)


def draw_confusion(result: Evaluation, title: str) -> bytes:
    """The confusion matrix as a PNG: hits in blue, mistakes in orange, the count in each cell."""
    counts = result.confusion.numpy()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    on_diagonal = np.eye(CLASSES, dtype=bool)
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.ma.masked_array(share, ~on_diagonal), cmap="Blues", vmin=0, vmax=1.25)
    # Mistakes are a few in a thousand: on a linear scale of their own none but the commonest would show.
    mistakes = np.ma.masked_array(share, on_diagonal)
    axes.imshow(mistakes, cmap="Oranges", norm=PowerNorm(0.5, vmin=0, vmax=max(2 * float(mistakes.max()), 0.01)))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            dark = on_diagonal[row, column] and share[row, column] > 0.6
            axes.text(column, row, f"{count}", ha="center", va="center", color="white" if dark else "black")
    digits = range(CLASSES)
    axes.set(xticks=digits, yticks=digits, xlabel="read as", ylabel="shows")
    axes.set_title(f"{title}: {accuracy_line(result)}", pad=12)
    axes.set_xticks(np.arange(CLASSES - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(CLASSES - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.2%}"
