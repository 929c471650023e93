"""The rate of training steps against that of the same steps on a batch that is always the same.

`python -m bench.training --data-dir DIR`: epochs with the real material and
epochs in which one ready batch is taken again and again, in turn, for each
network; the ratio of the rates is what making the material leaves (goal: 0.85
or more).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from digits.checkpoint import Checkpoint, Manifest
from digits.network import CNN
from trainer.data import Data, DataError, load_mnist
from trainer.material import Batch, Lessons, Material
from trainer.settings import RECIPES, TrainingSettings
from trainer.training import TrainingLoop


class Repeated:
    """One batch, as often as an epoch has batches; stands in the place of the material."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def epoch(self) -> Iterable[Batch]:
        return (self.batch for _ in range(self.steps))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description="The rate of training steps.")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="as of python -m trainer")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="pairs of epochs (default: 5)")
    parser.add_argument("--images", type=int, default=6000, metavar="N", help="of an epoch (default: 6000)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        data = load_mnist(options.data_dir, download=False)
    except DataError as error:
        print(f"bench.training: {error}", file=sys.stderr)
        return 1
    data = dataclasses.replace(data, train=data.train[: options.images + 1])
    teacher = Checkpoint(CNN().eval(), Manifest(architecture="CNN"), "")
    print(f"{'recipe':>8}  {'steps/s':>8}  {'ready batch':>11}  {'ratio':>6}  range of {options.rounds} pairs")
    for recipe, teachers in (("best", [teacher]), ("cnn", []), ("origin", [])):
        rates = _rates(recipe, data, teachers, options.rounds)
        ratios = sorted(made / ready for made, ready in rates)
        made, ready = (statistics.median(column) for column in zip(*rates, strict=True))
        print(
            f"{recipe:>8}  {made:>8.1f}  {ready:>11.1f}  {statistics.median(ratios):>6.3f}  "
            f"{ratios[0]:.3f} to {ratios[-1]:.3f}",
            flush=True,
        )
    return 0


def _rates(recipe: str, data: Data, teachers: list[Checkpoint], rounds: int) -> list[tuple[float, float]]:
    """Steps a second of epochs that make their material and of epochs that do not, in pairs."""
    settings = TrainingSettings(**RECIPES[recipe] | {"validation_size": 1, "epochs": 2 * rounds + 1, "lessons": 1})
    torch.manual_seed(1)
    loop = TrainingLoop(settings, data, teachers, lambda steps, epoch: steps)
    loop.run_epoch()  # the teachers' answers, and all that is slow the first time
    real = loop.material
    assert isinstance(real, Lessons if teachers else Material)
    ready = Repeated(next(iter(real.epoch())), real.steps)
    rates = []
    for _ in range(rounds):
        pair = []
        for material in (real, ready):
            loop.material = material  # type: ignore[assignment]
            pair.append(real.steps / loop.run_epoch().seconds)
        rates.append((pair[0], pair[1]))
    return rates


if __name__ == "__main__":
    sys.exit(main())
