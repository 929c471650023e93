"""What a network learns from: batches of deformed images, and a teacher's answers to them.

A batch has images of the data set and, for digits, some that were drawn, and
some pictures without a digit; all of them deformed, and some damaged. Without a
teacher each batch is made when it is asked for. A teacher is too slow for that:
its answers to some epochs of batches are collected first, and the batches are
then taken from these.

Where several processes train together, each makes its share of every batch: the
order of the images is the first one's, all else each draws for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.augmentation import augment
from trainer.damage import damage
from trainer.data import DataError, LabelledPixels
from trainer.handwriting import draw
from trainer.outliers import draw_outliers
from trainer.ranks import ALONE, Ranks
from trainer.settings import TrainingSettings

NO_DIGIT = -1
"""The label of a picture that shows none."""

DRAWINGS_PER_IMAGE = 0.5
"""So many digits are drawn before the first epoch, and half as many outliers; each batch takes some, deformed anew."""


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    pixels: Tensor
    """`uint8[n, 784]`."""

    labels: Tensor
    """`int64[n]`: classes, or `NO_DIGIT`."""

    answers: Tensor | None = None
    """The teacher's logits, `float32[n, classes]`."""

    weight: float = 1.0
    """Of its mean loss in the mean over all processes, whose shares of a batch may differ by some images."""


class Material:
    """Batches, each of them new. Draws from torch's global CPU generator."""

    def __init__(
        self, settings: TrainingSettings, images: LabelledPixels, are_digits: bool, ranks: Ranks = ALONE
    ) -> None:
        """Make what stands beside the images.

        Args:
            are_digits: whether drawn digits, and outliers, which look like no digit, belong beside the images.
            ranks: which share of each batch to make; the images and settings are those of all.

        Raises:
            DataError: a batch would be too small to be normalised, or to be shared.
        """
        self._settings = settings
        self._images = images
        self._ranks = ranks
        drawn = round(settings.batch_size * settings.drawn) if are_digits else 0
        outliers = round(settings.batch_size * settings.outliers) if are_digits else 0
        self._others: list[tuple[int, LabelledPixels]] = []  # how many of a batch, and what they are taken from
        self._others_in_all = drawn + outliers
        count = ranks.count(math.ceil(DRAWINGS_PER_IMAGE * len(images)))
        if drawn:
            self._others.append((ranks.count(drawn), LabelledPixels(*draw(count))))
        if outliers:
            pixels = draw_outliers(count // 2 + 1, images)
            self._others.append((ranks.count(outliers), LabelledPixels(pixels, torch.full((len(pixels),), NO_DIGIT))))
        self._from_images = max(1, settings.batch_size - drawn - outliers)
        self.steps = math.ceil(len(images) / self._from_images)
        """Batches of an epoch, in which each image is taken once."""
        smallest = sum(part // ranks.size for part in (len(images) // self.steps, drawn, outliers))
        if settings.normalise and smallest < 2:
            whose = "" if ranks.size == 1 else f" for each of {ranks.size} processes"
            raise DataError(
                f"--normalise needs 2 or more images a step{whose}, and {len(images)} give one of {smallest}"
            )
        if smallest < 1:
            raise DataError(f"a step of {len(images) // self.steps} images is too small for {ranks.size} processes")

    def epoch(self) -> Iterable[Batch]:
        """The batches of one epoch."""
        order = self._ranks.agreed(torch.randperm(len(self._images)))
        for rows in torch.tensor_split(order, self.steps):  # as even as can be
            yield self._batch(rows)

    def _batch(self, rows: Tensor) -> Batch:
        in_all = len(rows) + self._others_in_all
        rows = self._ranks.share(rows)
        pixels, labels = [self._images.pixels[rows]], [self._images.labels[rows]]
        for count, others in self._others:
            taken = torch.randint(len(others), (count,))
            pixels.append(others.pixels[taken])
            labels.append(others.labels[taken])
        made = torch.cat(pixels)
        if self._settings.augment:
            made = augment(made)
        if self._settings.damaged:
            harmed = torch.nonzero(torch.rand(len(made)) < self._settings.damaged)[:, 0]
            made[harmed] = damage(made[harmed])
        return Batch(made, torch.cat(labels), weight=len(made) * self._ranks.size / in_all)


class Lessons:
    """Batches whose answers a teacher gave beforehand; every epoch takes as many of these pictures, at random."""

    def __init__(
        self,
        material: Material,
        teacher: Callable[[Tensor], Tensor],
        epochs: int,
        progress: Callable[[Iterable[int], int], Iterable[int]],
        ranks: Ranks = ALONE,
    ) -> None:
        """Collect so many epochs' batches.

        Args:
            teacher: gives logits, `float32[n, classes]`, of pixels, `uint8[n, 784]`.
            progress: wraps the batches.
            ranks: those of the material; together they collect as many as one would.
        """
        self.steps = material.steps
        collected: list[Batch] = []
        batches = (batch for _ in range(epochs) for batch in material.epoch())
        for _, batch in zip(progress(range(epochs * material.steps), 0), batches, strict=True):
            # Half the precision is plenty for answers, and these are many.
            collected.append(Batch(batch.pixels, batch.labels, teacher(batch.pixels).half()))
        self._size = math.ceil(sum(len(batch.labels) for batch in collected) / len(collected))
        self._weight = self._size * ranks.size / sum(ranks.all_of(self._size))
        self._pixels = torch.cat([batch.pixels for batch in collected])
        self._labels = torch.cat([batch.labels for batch in collected])
        self._answers = torch.cat([batch.answers for batch in collected if batch.answers is not None])

    def epoch(self) -> Iterable[Batch]:
        """As many batches as an epoch of the material has."""
        for _ in range(self.steps):
            rows = torch.randint(len(self._labels), (self._size,))
            yield Batch(self._pixels[rows], self._labels[rows], self._answers[rows].float(), self._weight)
