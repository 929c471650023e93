"""Counting hits and mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from digits.network import ImprovedNN
from digits.preprocessing import normalize
from trainer.data import Data, LabelledPixels
from trainer.evaluation import Evaluation, evaluate, evaluation_of, to_features


class FirstPixel(nn.Module):
    """Reads the digit that the first pixel's value names, whatever the image shows."""

    def forward(self, features: Tensor) -> Tensor:
        digit = ((features[:, 0] * 0.5 + 0.5) * 255).round().long()
        return 10.0 * torch.nn.functional.one_hot(digit, 10).float()


def labelled(read: list[int], labels: list[int]) -> LabelledPixels:
    pixels = torch.zeros(len(read), 784, dtype=torch.uint8)
    pixels[:, 0] = torch.tensor(read, dtype=torch.uint8)
    return LabelledPixels(pixels, torch.tensor(labels))


@pytest.mark.parametrize("classes", [2, 10, 26])
def test_there_are_as_many_classes_as_logits(classes: int) -> None:
    labels = torch.arange(classes).repeat(3)
    logits = 10.0 * torch.nn.functional.one_hot(labels.roll(1), classes).float()
    result = evaluation_of(logits, labels)
    assert result.confusion.shape == (classes, classes)
    assert len(result.recall) == len(result.precision) == classes
    assert (result.total, result.correct) == (3 * classes, 0)
    assert result.confusion[0, classes - 1] == 3


def test_the_confusion_has_a_row_for_what_is_shown_and_a_column_for_what_is_read() -> None:
    result = evaluate(FirstPixel(), labelled(read=[7, 7, 1, 3], labels=[7, 7, 7, 3]))
    assert result.confusion[7, 7] == 2
    assert result.confusion[7, 1] == 1
    assert result.confusion[3, 3] == 1
    assert result.confusion.sum() == result.total == 4
    assert (result.correct, result.accuracy) == (3, 0.75)
    assert result.recall[7] == pytest.approx(2 / 3)
    assert result.precision[7] == 1.0
    assert result.precision[1] == 0.0
    assert result.recall[0] is None, "no image shows a 0"
    assert result.precision[0] is None, "nothing was read as a 0"


def test_all_batches_count_the_last_short_one_too() -> None:
    labels = [index % 10 for index in range(2345)]
    result = evaluate(FirstPixel(), labelled(labels, labels))
    assert result.total == result.correct == 2345
    assert result.confusion.sum(dim=1).tolist() == [labels.count(digit) for digit in range(10)]
    assert result.loss == pytest.approx(np.log(1 + 9 * np.exp(-10)), rel=1e-3), "the mean, not the sum"


def test_features_are_those_of_the_server() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(4)[:784].reshape(1, 784)
    assert np.array_equal(to_features(pixels, 0.1307, 0.3081).numpy(), normalize(pixels.numpy(), 0.1307, 0.3081))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_drops_nothing_out_and_leaves_the_mode(digits_data: Data, training: bool) -> None:
    network = ImprovedNN().train(training)
    first, second = (evaluate(network, digits_data.test) for _ in range(2))
    assert torch.equal(first.confusion, second.confusion)
    assert first.loss == second.loss
    assert network.training is training


def test_an_evaluation_is_only_counts_and_a_loss() -> None:
    confusion = torch.eye(10, dtype=torch.int64) * 5
    assert Evaluation(confusion, loss=0.1).accuracy == 1.0
