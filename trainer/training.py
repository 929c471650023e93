"""The training loop: settings and data in, the best network out.

Chooses the best epoch by the validation images only; the test images are not
looked at here. Prints nothing itself and writes nothing.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from digits.network import ARCHITECTURES
from trainer.augmentation import augment
from trainer.data import Data, split
from trainer.evaluation import evaluate, to_features
from trainer.handwriting import draw
from trainer.scaling import fold, scaling_for
from trainer.settings import TrainingSettings

DRAWINGS_PER_IMAGE = 0.5
"""So many digits are drawn before the first epoch; each batch takes some of them, deformed anew."""

AVERAGING_BEGINS = 100
"""Steps after which the running mean keeps half of itself; so it does not hold on to the first weights."""


class TrainingDiverged(ArithmeticError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Epoch:
    """One line of the training's log."""

    number: int
    """From 1."""

    learning_rate: float
    """Of the last step."""

    train_loss: float
    """Mean over the epoch's steps, with dropout and augmentation."""

    validation_loss: float
    """Mean cross-entropy of the validation images."""

    validation_accuracy: float
    """0 to 1."""

    seconds: float
    """Wall time."""

    best: bool
    """Whether it is the best up to here."""


@dataclass(frozen=True)
class Training:
    """What a training made."""

    network: nn.Module
    """With the best epoch's weights, in evaluation mode, on the CPU."""

    epochs: list[Epoch]
    """All that were run."""

    train_size: int
    """Images trained on."""

    validation_size: int
    """Images chosen by."""

    seconds: float
    """Wall time."""

    @property
    def best(self) -> Epoch:
        return [epoch for epoch in self.epochs if epoch.best][-1]


def train(
    settings: TrainingSettings,
    data: Data,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    progress: Callable[[Iterable[int], int], Iterable[int]] = lambda steps, epoch: steps,
) -> Training:
    """Train a new network on `data.train` and return the best of its epochs.

    The same settings, data, machine and number of threads give the same weights,
    bit for bit, on the CPU. The caller's random state is left as it was.
    `progress` wraps the steps of an epoch, for example in a progress bar.

    Raises:
        DataError: fewer images than `validation_size` demands.
        TrainingDiverged: the loss became NaN or infinite.
    """
    devices = [] if settings.device in ("cpu", "mps") else [torch.device(settings.device)]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed)
        return _train(settings, data, on_epoch, progress)


def _train(
    settings: TrainingSettings,
    data: Data,
    on_epoch: Callable[[Epoch], None],
    progress: Callable[[Iterable[int], int], Iterable[int]],
) -> Training:
    started = time.perf_counter()

    # 1. Data, network, optimiser.
    images, validation = split(data.train, settings.validation_size, settings.seed)
    network = ARCHITECTURES[settings.architecture]().to(settings.device)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    averaged = copy.deepcopy(network)
    mean, std = scaling_for(network, images.pixels)
    drawings = math.ceil(DRAWINGS_PER_IMAGE * len(images))
    drawn = draw(drawings) if settings.drawn else None
    from_data = max(1, round(settings.batch_size * (1 - settings.drawn)))  # images of a batch
    steps = math.ceil(len(images) / from_data)
    epochs: list[Epoch] = []
    best: Epoch | None = None
    best_network = network

    for number in range(1, settings.epochs + 1):
        epoch_started = time.perf_counter()
        network.train()
        order = torch.randperm(len(images))
        total_loss = 0.0
        rate = 0.0

        # 2. One pass over the training images.
        for step in progress(range(steps), number):
            rate = learning_rate_at((number - 1) * steps + step, steps, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = order[step * from_data : (step + 1) * from_data]
            pixels, labels = images.pixels[rows], images.labels[rows]  # (n, 784), (n,)
            if drawn is not None:
                others = torch.randint(drawings, (settings.batch_size - from_data,))
                pixels = torch.cat([pixels, drawn[0][others]])
                labels = torch.cat([labels, drawn[1][others]])
            if settings.augment:
                pixels = augment(pixels)
            logits = network(to_features(pixels, mean, std).to(settings.device))  # (n, 10)
            loss = F.cross_entropy(logits, labels.to(settings.device))
            total_loss += _finite(loss.item(), f"epoch {number}, step {step + 1} of {steps}", settings)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            taken = (number - 1) * steps + step
            _average(averaged, network, min(settings.averaging, taken / (taken + AVERAGING_BEGINS)))

        # 3. Validation, of the weights as they would be served. The loss decides: among a few
        #    thousand images the accuracy of good weights turns on ten of them.
        served = fold(averaged, mean, std)
        result = evaluate(served, validation, device=settings.device)
        _finite(result.loss, f"the validation after epoch {number}", settings)
        is_best = best is None or result.loss < best.validation_loss
        epoch = Epoch(
            number=number,
            learning_rate=rate,
            train_loss=total_loss / steps,
            validation_loss=result.loss,
            validation_accuracy=result.accuracy,
            seconds=time.perf_counter() - epoch_started,
            best=is_best,
        )
        epochs.append(epoch)
        if is_best:
            best, best_network = epoch, served
        on_epoch(epoch)
        if settings.patience and best is not None and number - best.number >= settings.patience:
            break

    return Training(best_network.cpu().eval(), epochs, len(images), len(validation), time.perf_counter() - started)


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, keep: float) -> None:
    """Move the running mean towards the network's weights."""
    for mean, weight in zip(averaged.parameters(), network.parameters(), strict=True):
        mean.lerp_(weight, 1 - keep)


def _finite(loss: float, where: str, settings: TrainingSettings) -> float:
    if not math.isfinite(loss):
        raise TrainingDiverged(
            f"the loss is {loss} in {where}: training has come apart; "
            f"try a smaller --learning-rate than {settings.learning_rate:g}"
        )
    return loss


def learning_rate_at(step: int, steps_per_epoch: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then a cosine down to 0."""
    total = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total - 1)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
