"""`python -m bench.pictures`: how well pictures of digits are read, what each step of the way is worth, what it costs.

Pictures are made (`trainer.pictures`), and scikit-learn's scans of 8x8 pixels
are taken where it is installed; `--folder` adds a folder of one's own with a
`manifest.csv` of file, label, category, polarity. That folder goes the way of a
user: files, client, a server process. Fails if `to_pixels` reads fewer pictures
of any kind than plain resizing does.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageOps

from bench.picture_cost import Cost, measure_cost
from bench.picture_steps import PLAINER, STEPS, Way, changed
from bench.processes import server
from client import Client, MnistGrpcError
from digits.checkpoint import load_checkpoint
from digits.preprocessing import SIDE, InvalidImage, normalize, to_pixels
from digits.reading import read_grey
from server.settings import EMBEDDED_WEIGHTS
from trainer.data import DataError, load_mnist
from trainer.pictures import make_pictures

Grey: TypeAlias = npt.NDArray[np.uint8]
Tally: TypeAlias = dict[str, tuple[int, int]]
"""By group of pictures: how many were read rightly, and how many there are."""

PARTS = ("read", "steps", "cost")
CELL = 96  # pixels of a picture on the sheet of misses


@dataclass(frozen=True)
class Case:
    """A picture that has been decoded."""

    group: str
    grey: Grey
    label: int


@dataclass(frozen=True)
class Entry:
    """A line of a folder's manifest."""

    path: Path
    label: int
    category: str
    polarity: str


@dataclass(frozen=True)
class Answer:
    entry: Entry
    digit: int | None
    """None where the image was refused."""
    confidence: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default=EMBEDDED_WEIGHTS, help="of the network that reads (default: the embedded)")
    parser.add_argument("--count", type=int, default=60, help="of made pictures of each kind (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the made pictures (default: 1)")
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST, for half of the digits (default: none are)")
    parser.add_argument("--folder", type=Path, help="a folder with pictures and a manifest.csv")
    parser.add_argument(
        "--out", type=Path, help="draw what was not read rightly in --folder into sheets in this folder"
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone; may be repeated")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count is 1 or more, not {options.count}")
    torch.set_num_threads(1)
    parts = options.only or PARTS
    try:
        figures = _measure(options, parts)
    except (DataError, MnistGrpcError, OSError, RuntimeError, ValueError) as error:
        print(f"bench.pictures: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if figures.get("worse") else 0


def _measure(options: argparse.Namespace, parts: Sequence[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {"weights": str(options.weights), "seed": options.seed, "count": options.count}
    entries = _manifest(options.folder) if options.folder else []
    if "read" in parts or "steps" in parts:
        network = load_checkpoint(options.weights).network.eval()
        cases = _cases(options, entries)
    if "read" in parts:
        plainer = {name: _tally(cases, way, network) for name, way in PLAINER.items()}
        _print_table("read rightly, of 100", plainer, with_counts=True)
        figures["read"] = plainer
        figures["worse"] = _worse(plainer)
        print("\nworse than plain resizing: " + (", ".join(figures["worse"]) or "in no group"))
        if entries:
            answers = _ask(entries, options.weights)
            figures["folder"] = _print_folder(answers)
            if options.out:
                _draw_misses(answers, options.out)
    if "steps" in parts:
        rows = {}
        for step in STEPS:
            with changed(step):
                rows[step] = _tally(cases, to_pixels, network)
        _print_steps(rows)
        figures["steps"] = rows
    if "cost" in parts:
        figures["cost"] = measure_cost()
        _print_cost(figures["cost"])
    return figures


# Pictures -------------------------------------------------------------------


def _cases(options: argparse.Namespace, entries: list[Entry]) -> list[Case]:
    scans = load_mnist(options.data_dir, download=False).test if options.data_dir else None
    made = make_pictures(options.count, options.seed, scans=scans)
    return [
        *(Case(picture.kind, read_grey(picture.file), picture.label) for picture in made),
        *_scans_of_8x8(),
        *(Case(f"folder: {entry.category}", read_grey(entry.path), entry.label) for entry in entries),
    ]


def _scans_of_8x8() -> list[Case]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return []
    data = load_digits()
    return [
        Case("scikit-learn 8x8", read_grey(image / 16), int(label))
        for image, label in zip(data.images[::4], data.target[::4], strict=True)
    ]


def _manifest(folder: Path) -> list[Entry]:
    with open(folder / "manifest.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not {"file", "label", "category", "polarity"} <= rows[0].keys():
        raise ValueError(f"{folder / 'manifest.csv'}: its first line names file, label, category and polarity")
    return [Entry(folder / row["file"], int(row["label"]), row["category"], row["polarity"]) for row in rows]


# Reading --------------------------------------------------------------------


def _tally(cases: list[Case], way: Way, network: torch.nn.Module) -> Tally:
    pixels = np.zeros((len(cases), SIDE, SIDE), np.uint8)
    refused = np.zeros(len(cases), np.bool_)
    for index, case in enumerate(cases):
        try:
            pixels[index] = way(case.grey)
        except InvalidImage:
            refused[index] = True
    with torch.inference_mode():
        logits = network(torch.from_numpy(normalize(pixels.reshape(len(cases), -1))))
    labels = np.array([case.label for case in cases])
    right = (logits.argmax(dim=1).numpy() == labels) & ~refused
    counts = Counter(case.group for case in cases)
    hits = Counter(case.group for case, hit in zip(cases, right, strict=True) if hit)
    return {group: (hits[group], count) for group, count in counts.items()}


def _ask(entries: list[Entry], weights: str) -> list[Answer]:
    """As a user does: a file, a client, a server."""
    arguments = ("--port", "0", "--workers", "1", "--log-level", "warning", "--weights", weights)
    answers = []
    with server("server", arguments) as ours, Client(ours.target) as digits:
        for entry in entries:
            try:
                prediction = digits.classify(entry.path)
                answers.append(Answer(entry, prediction.digit, prediction.confidence))
            except MnistGrpcError as error:
                print(f"{entry.path}: {error}")
                answers.append(Answer(entry, None, 0.0))
    return answers


def _sum(tally: Tally, folder: bool) -> tuple[int, int]:
    chosen = [counts for group, counts in tally.items() if group.startswith("folder: ") == folder]
    return sum(right for right, _ in chosen), sum(count for _, count in chosen)


def _worse(tallies: dict[str, Tally]) -> list[str]:
    """Groups of which plain resizing, negative or not, reads more."""
    ours = tallies["to_pixels"]
    plain = ("plain resize", "resize, negative by border")
    return [group for group, (right, _) in ours.items() if any(tallies[name][group][0] > right for name in plain)]


# Tables ---------------------------------------------------------------------


def _percent(counts: tuple[int, int]) -> str:
    return f"{100 * counts[0] / counts[1]:.1f}" if counts[1] else "-"


def _print_table(title: str, columns: dict[str, Tally], with_counts: bool) -> None:
    print(f"\n{title:24}{'pictures':>10}" + "".join(f"{name:>28}" for name in columns))
    groups = list(next(iter(columns.values())))
    rows: list[tuple[str, list[tuple[int, int]]]] = [
        (group, [tally[group] for tally in columns.values()]) for group in groups
    ]
    rows.insert(0, ("all but the folder", [_sum(tally, folder=False) for tally in columns.values()]))
    if any(group.startswith("folder: ") for group in groups):
        rows.insert(1, ("the folder", [_sum(tally, folder=True) for tally in columns.values()]))
    for name, counts in rows:
        print(f"{name:24}{counts[0][1]:>10}" + "".join(f"{_percent(one):>28}" for one in counts))


def _print_steps(rows: dict[str, Tally]) -> None:
    """Each step's loss, and where it is largest."""
    whole = rows["all steps"]
    has_folder = _sum(whole, folder=True)[1] > 0
    print(f"\n{'':36}{'all':>8}{'folder':>8}   where it matters most, in points of 100")
    for step, tally in rows.items():
        change = {group: 100 * (tally[group][0] - right) / count for group, (right, count) in whole.items()}
        most = sorted((group for group in change if change[group]), key=lambda group: -abs(change[group]))[:5]
        print(
            f"{step:36}{_percent(_sum(tally, folder=False)):>8}"
            f"{_percent(_sum(tally, folder=True)) if has_folder else '':>8}   "
            + ", ".join(f"{group} {change[group]:+.0f}" for group in most)
        )


def _print_folder(answers: list[Answer]) -> dict[str, Any]:
    """By category and by polarity, as the server answered."""
    figures: dict[str, Any] = {}
    print(f"\n{'the folder, by client and server':36}{'pictures':>10}{'right':>8}{'of 100':>8}{'confidence':>12}")
    names = ["all", *sorted({a.entry.category for a in answers}), *sorted({a.entry.polarity for a in answers})]
    for name in names:
        some = [answer for answer in answers if name in ("all", answer.entry.category, answer.entry.polarity)]
        right = sum(answer.digit == answer.entry.label for answer in some)
        confidence = float(np.mean([answer.confidence for answer in some]))
        figures[name] = {"right": right, "pictures": len(some), "mean_confidence": confidence}
        print(f"{name:36}{len(some):>10}{right:>8}{_percent((right, len(some))):>8}{confidence:>12.3f}")
    for answer in answers:
        if answer.digit != answer.entry.label:
            said = f"{answer.digit} ({answer.confidence:.2f})" if answer.digit is not None else "refused"
            print(f"  {answer.entry.path.name}: {answer.entry.label} was read as {said}")
    return figures


def _print_cost(costs: dict[str, Cost]) -> None:
    print(f"\n{'processor time, us':34}{'to_pixels':>12}{'Pillow':>10}{'ratio':>8}")
    for name, cost in costs.items():
        print(f"{name:34}{cost['to_pixels_us']:>12,.0f}{cost['pillow_us']:>10,.0f}{cost['ratio']:>8.2f}")
    print("Pillow: the same input decoded, made grey and resized to 28x28")


# Misses ---------------------------------------------------------------------


def _draw_misses(answers: list[Answer], out: Path) -> None:
    """One sheet, a row a miss: the picture, its pixels, the answer."""
    misses = [answer for answer in answers if answer.digit != answer.entry.label]
    if not misses:
        return
    sheet = Image.new("L", (4 * CELL, CELL * len(misses)), 128)
    pen = ImageDraw.Draw(sheet)
    for row, answer in enumerate(misses):
        try:
            grey = read_grey(answer.entry.path)
            sheet.paste(ImageOps.contain(Image.fromarray(grey), (CELL - 4, CELL - 4)), (2, row * CELL + 2))
            pixels = Image.fromarray(to_pixels(grey))
            sheet.paste(pixels.resize((CELL - 4, CELL - 4), Image.Resampling.NEAREST), (CELL + 2, row * CELL + 2))
        except InvalidImage as error:
            pen.text((2, row * CELL + 2), str(error), fill=255)
        text = f"{answer.entry.path.name}\nis {answer.entry.label}\nread {answer.digit}\n{answer.confidence:.3f}"
        pen.text((2 * CELL + 6, row * CELL + 6), text, fill=255)
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "misses.png")
    print(f"{len(misses)} misses are drawn in {out / 'misses.png'}")


if __name__ == "__main__":
    raise SystemExit(main())
