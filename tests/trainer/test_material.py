"""Batches: what is in them, how many there are, and a teacher's answers beside the right pictures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from digits.checkpoint import Checkpoint, Manifest
from digits.network import CNN
from trainer.data import Data, DataError
from trainer.evaluation import evaluate
from trainer.material import NO_DIGIT, Lessons, Material
from trainer.settings import TrainingSettings
from trainer.training import OUTLIER_WEIGHT, loss_of, train

SETTINGS = TrainingSettings(batch_size=100, drawn=0.2, outliers=0.1, damaged=0.3, lessons=2)


def test_a_batch_holds_as_many_of_each_as_the_settings_say(digits_data: Data) -> None:
    torch.manual_seed(1)
    batches = list(Material(SETTINGS, digits_data.train, are_digits=True).epoch())
    assert len(batches) == math.ceil(1500 / 70)
    for batch in batches:
        assert batch.pixels.dtype == torch.uint8
        assert batch.pixels.shape == (len(batch.labels), 784)
        assert int((batch.labels == NO_DIGIT).sum()) == 10
        assert len(batch.labels) - 30 in (68, 69)
        assert batch.answers is None
    assert int(torch.cat([batch.labels for batch in batches]).clamp(-1, 9).max()) == 9


def test_an_epoch_takes_each_image_once(digits_data: Data) -> None:
    plain = dataclasses.replace(SETTINGS, augment=False, damaged=0.0)
    material = Material(plain, digits_data.train, are_digits=False)
    taken = torch.cat([batch.pixels for batch in material.epoch()])
    assert sorted(map(bytes, taken.numpy())) == sorted(map(bytes, digits_data.train.pixels.numpy()))


def test_other_things_than_digits_have_no_drawn_digits_beside_them(digits_data: Data) -> None:
    batch = next(iter(Material(SETTINGS, digits_data.train, are_digits=False).epoch()))
    assert len(batch.labels) == 100
    assert int(batch.labels.min()) >= 0


def test_a_batch_of_one_cannot_be_normalised(digits_data: Data) -> None:
    with pytest.raises(DataError, match="--normalise needs 2 or more images a step, and 1500 give one of 1"):
        Material(dataclasses.replace(SETTINGS, batch_size=1), digits_data.train, are_digits=False)


def test_lessons_keep_each_answer_beside_its_picture(digits_data: Data) -> None:
    torch.manual_seed(1)

    def teacher(pixels: Tensor) -> Tensor:
        return pixels[:, 300:310].float()

    wrapped: list[tuple[int, int]] = []

    def progress(steps: range, epoch: int) -> range:
        wrapped.append((len(steps), epoch))
        return steps

    material = Material(SETTINGS, digits_data.train, are_digits=True)
    lessons = Lessons(material, teacher, 2, progress)  # type: ignore[arg-type]
    batches = list(lessons.epoch())
    assert wrapped == [(2 * material.steps, 0)]
    assert len(batches) == material.steps
    for batch in batches:
        assert batch.answers is not None
        assert torch.equal(batch.answers, teacher(batch.pixels))


def test_the_loss_is_cross_entropy_with_labels_an_even_spread_and_the_teacher() -> None:
    torch.manual_seed(1)
    logits, answers = torch.randn(2, 6, 10)
    labels = torch.tensor([3, 1, 4, 1, NO_DIGIT, NO_DIGIT])
    even = torch.full((2, 10), 0.1)
    hard = (F.cross_entropy(logits[:4], labels[:4]) * 4 + OUTLIER_WEIGHT * F.cross_entropy(logits[4:], even) * 2) / 6
    torch.testing.assert_close(loss_of(logits, labels, None, SETTINGS), hard)
    settings = dataclasses.replace(SETTINGS, softness=3.0, taught=0.6)
    soft = F.cross_entropy(logits / 3, (answers / 3).softmax(dim=1)) * 9
    torch.testing.assert_close(loss_of(logits, labels, answers, settings), 0.6 * soft + 0.4 * hard)


def test_a_pupil_learns_its_teachers_digits_where_the_labels_say_nothing(digits_data: Data) -> None:
    """All labels are 0; the teachers know better, on features of their own scaling."""
    settings = TrainingSettings(
        epochs=12, batch_size=64, validation_size=200, learning_rate=0.05, averaging=0, lessons=2, teacher="none",
        outliers=0, drawn=0, damaged=0,
    )  # fmt: skip
    taught = train(dataclasses.replace(settings, architecture="CNN"), digits_data)
    assert isinstance(taught.network, CNN)
    teacher = Checkpoint(taught.network, Manifest(architecture="CNN"), "")
    assert evaluate(teacher.network, digits_data.test).accuracy > 0.9
    wrong = dataclasses.replace(
        digits_data, train=dataclasses.replace(digits_data.train, labels=torch.zeros_like(digits_data.train.labels))
    )
    pupil = train(dataclasses.replace(settings, taught=1.0), wrong, teachers=[teacher, teacher])
    # The best epoch is chosen by the labels, which are wrong here; the last one is what counts.
    assert evaluate(pupil.network, digits_data.test).accuracy > 0.8
