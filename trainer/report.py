"""What a training or an evaluation has to tell: tables, records and pictures.

Turns results into text, JSON values and PNG bytes. Knows nothing of files or
of how the results came about.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from digits.preprocessing import DIGITS, SIDE
from trainer.calibration import BINS, Reliability, wilson_interval
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
    low, high = wilson_interval(result.correct, result.total)
    return f"{result.accuracy:.2%} ({result.correct} of {result.total} images; 95 % interval {low:.2%} to {high:.2%})"


def class_table(result: Evaluation, labels: Sequence[str] = DIGITS) -> str:
    """A line a class: how many there are, how many were read, and as what the others were read.

    Args:
        labels: what the classes mean. A class that nothing shows or was read as is left out.
    """
    names = _names(labels)
    title = "digit" if names == DIGITS else "class"
    shown = _shown(result)
    width = max([len(title), *(len(names[number]) for number in shown)])
    lines = [f"{title:>{width}}  {'images':>6}  {'correct':>7}  {'recall':>8}  {'precision':>9}  most often taken for"]
    for number in shown:
        row = result.confusion[number].tolist()
        mistakes = sorted(
            ((count, other) for other, count in enumerate(row) if count and other != number), reverse=True
        )
        commonest = ", ".join(f"{names[other]} ({count})" for count, other in mistakes[:3])
        lines.append(
            f"{names[number]:>{width}}  {sum(row):>6}  {row[number]:>7}  {_percent(result.recall[number]):>8}  "
            f"{_percent(result.precision[number]):>9}  {commonest}"
        )
    return "\n".join(line.rstrip() for line in lines)


def evaluation_record(result: Evaluation) -> dict[str, Any]:
    """JSON values; `confusion` has a row for each class shown and a column for each class read."""
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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(which="both", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="upper right")
    right.legend(frameon=False, loc="lower right")
    return _png(figure)


def draw_confusion(result: Evaluation, title: str, labels: Sequence[str] = DIGITS) -> bytes:
    """The confusion matrix as a PNG: hits in blue, mistakes in orange, the count in each cell.

    Args:
        labels: as in `class_table`.
    """
    shown = _shown(result)
    counts = result.confusion[shown][:, shown].numpy()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    on_diagonal = np.eye(len(shown), dtype=bool)
    side = min(max(7.0, 0.42 * len(shown)), 21.0)  # inches
    font = min(10.0, 20 * side / len(shown))  # points, so that four figures fit into a cell
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.ma.masked_array(share, ~on_diagonal), cmap="Blues", vmin=0, vmax=1.25)
    # Mistakes are a few in a thousand: on a linear scale of their own none but the commonest would show.
    mistakes = np.ma.masked_array(share, on_diagonal)
    axes.imshow(mistakes, cmap="Oranges", norm=PowerNorm(0.5, vmin=0, vmax=max(2 * float(mistakes.max()), 0.01)))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            dark = on_diagonal[row, column] and share[row, column] > 0.6
            color = "white" if dark else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=font)
    every = _names(labels)
    names = [_drawn(every[number]) for number in shown]
    axes.set(xlabel="read as", ylabel="shows")
    axes.set_xticks(range(len(shown)), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(len(shown)), names)
    axes.set_title(f"{_drawn(title, 60)}\n{accuracy_line(result)}", fontsize=11, pad=12)
    axes.set_xticks(np.arange(len(shown) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(shown) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.8)
    axes.tick_params(which="both", length=0, labelsize=font)
    return _png(figure)


def draw_calibration(reliability: Reliability, title: str) -> bytes:
    """A reliability diagram as a PNG: how often the model is right where it says so, and how often it says so."""
    figure = Figure(figsize=(6, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    middles = (np.arange(BINS) + 0.5) / BINS
    filled = reliability.counts.numpy() > 0
    above.plot([0, 1], [0, 1], "--", color="0.6", label="as often right as confident")
    above.plot(
        reliability.confidence.numpy()[filled],
        reliability.accuracy.numpy()[filled],
        "o-",
        color=BLUE,
        label="this model",
    )
    above.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    above.set_title(f"{_drawn(title)}: expected calibration error {reliability.expected_error:.4f}", pad=12)
    above.legend(frameon=False, loc="upper left")
    below.bar(middles[filled], reliability.counts.numpy()[filled], width=0.9 / BINS, color=BLUE)
    below.set(xlabel="confidence", ylabel="images", yscale="log")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def draw_coverage(shares: Tensor, accuracies: Tensor, title: str) -> bytes:
    """As a PNG: how many are misread if only the most confident predictions are taken."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(shares.numpy() * 100, (1 - accuracies.numpy()) * 100, color=BLUE)
    axes.set(xlabel="most confident predictions that are taken (%)", ylabel="of these misread (%)", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    axes.set_title(_drawn(title, 40), pad=12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def draw_mistakes(
    pixels: Tensor, truth: Tensor, logits: Tensor, title: str, most: int = 60, labels: Sequence[str] = DIGITS
) -> bytes:
    """The misread images as a PNG, the most confident mistakes first: what they show, were read as, and how surely.

    Args:
        pixels: `uint8[n, 784]`.
        truth: the class that each shows, `int64[n]`.
        logits: `float32[n, classes]`.
        labels: what the classes mean.
    """
    names = [_drawn(name, 12) for name in _names(labels)]
    confidence, read_as = logits.double().softmax(dim=1).max(dim=1)
    wrong = (read_as != truth).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    shown = wrong[:most].tolist()
    columns = 10
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(columns * 1.05, rows * 1.35 + 0.6), layout="constrained")
    told = f"{len(shown)} of {len(wrong)} mistakes" if len(wrong) else "no mistakes"
    figure.suptitle(f"{_drawn(title, 60)}: {told}")
    for axes, index in zip(figure.subplots(rows, columns, squeeze=False).flat, [*shown, *[None] * 999], strict=False):
        axes.axis("off")
        if index is not None:
            axes.imshow(pixels[index].reshape(SIDE, SIDE).numpy(), cmap="gray_r", vmin=0, vmax=255)
            given, found = names[int(truth[index])], names[int(read_as[index])]
            between = " read as " if max(len(given), len(found)) <= 3 else "\nread as "
            text = f"{given}{between}{found}\n{float(confidence[index]):.0%}, no. {index}"
            axes.set_title(text, fontsize=7)
    return _png(figure)


def html_report(title: str, facts: Mapping[str, object], table: str, pictures: Mapping[str, bytes]) -> bytes:
    """One page that holds all: facts, the table by class, and the pictures, which are part of the file."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(fact))}</td></tr>\n" for name, fact in facts.items())
    figures = "".join(
        f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        f"<figcaption>{escape(name)}</figcaption></figure>\n"
        for name, content in pictures.items()
    )
    return (
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 66rem; padding: 0 1rem; color: #222 }}
th {{ text-align: left; font-weight: 500; padding-right: 2rem; vertical-align: top }}
td {{ overflow-wrap: anywhere }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1rem }}
figure {{ margin: 2rem 0 }}
img {{ max-width: 100% }}
figcaption {{ color: #666 }}
</style></head><body>
<h1>{escape(title)}</h1>
<table>
{rows}</table>
<h2>By class</h2>
<pre>{escape(table)}</pre>
<h2>Pictures</h2>
{figures}</body></html>
"""
    ).encode()


def _names(labels: Sequence[str]) -> tuple[str, ...]:
    """What each class is called: its label, or its number if it has none."""
    return tuple(label or str(number) for number, label in enumerate(labels))


def _shown(result: Evaluation) -> list[int]:
    """The classes that an image shows, or was read as."""
    counted: list[int] = (result.confusion.sum(dim=0) + result.confusion.sum(dim=1)).tolist()
    return [number for number, count in enumerate(counted) if count]


def _drawn(text: str, most: int = 20) -> str:
    """A name as a picture can show it: not too long, and no formula in it, which matplotlib sees between dollars."""
    return (text if len(text) <= most else f"{text[: most - 1]}…").replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight", pad_inches=0.15)  # whatever a title's width
    return buffer.getvalue()


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.2%}"
