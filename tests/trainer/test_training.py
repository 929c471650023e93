"""The loop learns, keeps the best, stops when it should, and can be repeated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainer.training
from digits.preprocessing import MEAN, STD
from trainer.data import Data, DataError, split
from trainer.evaluation import Evaluation, evaluate
from trainer.settings import TrainingSettings
from trainer.training import SPLIT_SEED, Epoch, TrainingDiverged, learning_rate_at, train

SHORT = TrainingSettings(
    epochs=2,
    batch_size=32,
    learning_rate=0.05,
    validation_size=200,
    warmup_epochs=0.5,
    averaging=0,
    drawn=0,
    outliers=0,
    damaged=0,
)
ONE_STEP = dataclasses.replace(SHORT, batch_size=1300)  # an epoch


@pytest.mark.parametrize("augment", [True, False])
def test_a_few_epochs_on_scanned_digits_read_most_of_the_others(digits_data: Data, augment: bool) -> None:
    settings = dataclasses.replace(SHORT, epochs=20, augment=augment)
    training = train(settings, digits_data)
    assert evaluate(training.network, digits_data.test).accuracy > 0.85, "images by other writers"
    assert training.best.validation_accuracy > 0.94, "other images by the same writers"
    assert training.epochs[-1].train_loss < training.epochs[0].train_loss / 2
    assert (training.train_size, training.validation_size) == (1300, 200)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(digits_data: Data) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(torch.seed())  # whatever was drawn before does not matter
        return train(dataclasses.replace(SHORT, seed=seed), digits_data).network.state_dict()

    first, second, other = weights(5), weights(5), weights(6)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_the_callers_random_state_is_left_alone(digits_data: Data) -> None:
    before = torch.get_rng_state()
    train(dataclasses.replace(SHORT, epochs=1), digits_data)
    assert torch.equal(torch.get_rng_state(), before)


def scripted(monkeypatch: pytest.MonkeyPatch, script: list[tuple[int, float]]) -> list[dict[str, Tensor]]:
    """Let the n-th validation count so many hits of 100 and that loss; return the weights it saw."""
    seen: list[dict[str, Tensor]] = []

    def read(network: nn.Module, pixels: Tensor, device: str) -> Tensor:
        seen.append({key: tensor.clone() for key, tensor in network.state_dict().items()})
        return torch.zeros(len(pixels), 10)

    def evaluation_of(logits: Tensor, labels: Tensor) -> Evaluation:
        hits, loss = script[len(seen) - 1]
        confusion = torch.zeros(10, 10, dtype=torch.int64)
        confusion[0, 0], confusion[0, 1] = hits, 100 - hits
        return Evaluation(confusion, loss)

    monkeypatch.setattr(trainer.training, "read", read)
    monkeypatch.setattr(trainer.training, "evaluation_of", evaluation_of)
    return seen


def test_the_weights_of_the_epoch_with_the_lowest_validation_loss_are_kept(
    digits_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted(monkeypatch, [(50, 0.9), (80, 0.5), (79, 0.4), (90, 0.6), (70, 0.7)])
    heard: list[Epoch] = []
    training = train(dataclasses.replace(ONE_STEP, epochs=5), digits_data, heard.append)
    assert [epoch.best for epoch in training.epochs] == [True, True, True, False, False]
    assert training.best.number == 3
    assert heard == training.epochs
    kept = training.network.state_dict()
    assert all(torch.equal(kept[key], seen[2][key]) for key in kept)
    assert not any(torch.equal(kept[key], seen[4][key]) for key in kept), "training went on"
    assert not training.network.training


@pytest.mark.parametrize(("patience", "epochs"), [(0, 6), (1, 2), (2, 5), (9, 6)])
def test_patience_stops_after_so_many_epochs_without_a_better_one(
    digits_data: Data, monkeypatch: pytest.MonkeyPatch, patience: int, epochs: int
) -> None:
    scripted(monkeypatch, [(50, 0.5), (60, 0.6), (40, 0.4), (59, 0.41), (58, 0.42), (57, 0.43)])
    training = train(dataclasses.replace(ONE_STEP, epochs=6, patience=patience), digits_data)
    assert len(training.epochs) == epochs


def test_a_loss_that_is_no_number_stops_the_training(digits_data: Data) -> None:
    settings = dataclasses.replace(SHORT, learning_rate=1e20)
    with pytest.raises(TrainingDiverged, match=r"the loss is (nan|inf) in epoch 1, step \d+ of 41.*--learning-rate"):
        train(settings, digits_data)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"weight_decay": 1e10, "teacher": "none"}, r"--learning-rate \(0.05\) or --weight-decay \(1e\+10\)$"),
        (
            {"weight_decay": 1e10, "softness": 1e-300},
            r".*--weight-decay \(1e\+10\), or a greater --softness \(1e-300\)$",
        ),
    ],
)
def test_the_advice_names_all_settings_that_may_be_the_cause(
    digits_data: Data, change: dict[str, Any], advice: str
) -> None:
    with pytest.raises(TrainingDiverged, match=f"training has come apart; try a smaller {advice}"):
        train(dataclasses.replace(SHORT, **change), digits_data)


def test_a_last_step_that_spoils_the_weights_is_noticed_too(digits_data: Data) -> None:
    settings = dataclasses.replace(ONE_STEP, epochs=1, learning_rate=1e30)
    with pytest.raises(TrainingDiverged, match=r"the loss is (nan|inf) in the validation after epoch 1"):
        train(settings, digits_data)


def test_validation_sees_what_the_server_will_see(digits_data: Data) -> None:
    """The network that comes out reads features of MEAN and STD; its accuracy is the one that was logged."""
    training = train(SHORT, digits_data)
    _, validation = split(digits_data.train, SHORT.validation_size, SPLIT_SEED)
    assert evaluate(training.network, validation, MEAN, STD).accuracy == training.best.validation_accuracy


def test_progress_wraps_the_steps_of_each_epoch(digits_data: Data) -> None:
    wrapped: list[tuple[int, int]] = []

    def progress(steps: Iterable[int], epoch: int) -> Iterable[int]:
        wrapped.append((len(list(steps)), epoch))
        return steps

    train(SHORT, digits_data, progress=progress)
    assert wrapped == [(41, 1), (41, 2)], "1300 images in steps of 32, the last of 20"


def test_a_validation_as_large_as_the_data_is_refused(digits_data: Data) -> None:
    with pytest.raises(DataError, match="--validation-size"):
        train(dataclasses.replace(SHORT, validation_size=1500), digits_data)


@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0, 2.5, 100.0])
def test_the_rate_climbs_to_its_highest_and_falls_to_almost_nothing(warmup_epochs: float) -> None:
    settings = TrainingSettings(epochs=10, learning_rate=0.2, warmup_epochs=warmup_epochs)
    rates = [learning_rate_at(step, 20, settings) for step in range(200)]
    highest = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.2)
    assert rates[: highest + 1] == sorted(rates[: highest + 1])
    assert rates[highest:] == sorted(rates[highest:], reverse=True)
    assert all(rate > 0 and math.isfinite(rate) for rate in rates)
    if warmup_epochs < 5:
        assert rates[-1] < 0.001
        assert highest == max(round(warmup_epochs * 20) - 1, 0)
