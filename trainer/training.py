"""The training loop: settings and data in, the best network out.

Chooses the best epoch by the validation images only; the test images are not
looked at here. Prints nothing itself and writes nothing.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from digits.checkpoint import Checkpoint
from digits.network import ARCHITECTURES
from digits.preprocessing import DIGITS, MEAN, STD
from trainer.data import Data, LabelledPixels, split
from trainer.evaluation import Evaluation, evaluation_of, read, to_features
from trainer.material import Batch, Lessons, Material
from trainer.normalisation import merged, normalised
from trainer.ranks import ALONE, Ranks
from trainer.scaling import fold, scaling_for
from trainer.settings import TrainingSettings

SPLIT_SEED = 1
"""The validation images are the same whatever the seed, so that a teacher has not seen its pupil's."""

OUTLIER_WEIGHT = 0.5
"""Of a picture without a digit, against one with a digit (Hendrycks et al., as in `trainer.outliers`)."""

RANK_SEEDS = 1_000_003
"""Between the seeds of processes that train together."""

AVERAGING_BEGINS = 100
"""Steps after which the running mean keeps half of itself; so it does not hold on to the first weights."""


class InvalidState(ValueError):
    """What to go on from is not of a training with these settings; the message says why."""


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

    validation: LabelledPixels
    """The images chosen by, which were not trained on."""

    seconds: float
    """Wall time of the epochs."""

    @property
    def validation_size(self) -> int:
        return len(self.validation)

    @property
    def best(self) -> Epoch:
        return [epoch for epoch in self.epochs if epoch.best][-1]


Progress: TypeAlias = Callable[[Iterable[int], int], Iterable[int]]
"""Wraps the steps of an epoch."""

State: TypeAlias = dict[str, Any]
"""Where a training stands after an epoch: tensors, numbers and texts, so that `torch.load(..., weights_only=True)`
reads it. With the settings, the data and the same machine it decides all that follows. The random state is that of
the first of the processes that train together; those of the `others` stand in a list."""

STATE_PARTS = frozenset({"network", "averaged", "best", "optimizer", "epochs", "random", "device_random"})
"""What every state has."""


def train(
    settings: TrainingSettings,
    data: Data,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    progress: Progress = lambda steps, epoch: steps,
    *,
    teachers: Sequence[Checkpoint] = (),
    state: State | None = None,
    on_state: Callable[[State], None] = lambda state: None,
    ranks: Ranks = ALONE,
) -> Training:
    """Train a new network on `data.train` and return the best of its epochs.

    The same settings, data, machine and number of threads give the same weights,
    bit for bit, on the CPU, whether the training was stopped in between or not.
    The caller's random state is left as it was.

    Args:
        on_epoch: is told of each epoch.
        progress: wraps the steps of an epoch, for example in a progress bar; epoch 0 is the teachers' answers.
        teachers: models whose answers are learnt as well.
        state: what `on_state` was given last, to go on from there.
        on_state: is given the state after each epoch, before `on_epoch` is told;
            what it keeps has to be copied or written at once.
        ranks: with whom to train: each of these processes makes the same call, and
            gets the same weights.

    Raises:
        DataError: fewer images than `validation_size` demands, or too few to share.
        InvalidState: the state is of another training.
        TrainingDiverged: the loss became NaN or infinite.
    """
    devices = [] if settings.device in ("cpu", "mps") else [torch.device(settings.device)]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed)
        loop = TrainingLoop(settings, data, teachers, progress, ranks)
        if state is not None:
            loop.go_on_from(state)
        while not loop.is_over:
            epoch = loop.run_epoch()
            on_state(loop.state())
            on_epoch(epoch)
        return loop.training()


def validation_size_for(images: int) -> int:
    """How many of so many training images are held back where nobody chose a number."""
    return min(TrainingSettings.validation_size, max(1, images // 10))


class TrainingLoop:
    """A training between its epochs."""

    def __init__(
        self,
        settings: TrainingSettings,
        data: Data,
        teachers: Sequence[Checkpoint],
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self._settings = settings
        self._ranks = ranks
        self._images, self._validation = split(data.train, settings.validation_size, SPLIT_SEED)
        network = ARCHITECTURES[settings.architecture](len(data.labels))
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = settings.dropout
        self._scaling = scaling_for(network, self._images.pixels) if settings.standardise else (MEAN, STD)
        # Convolutions are twice as fast with the channels of a pixel beside each other. The order is part of the
        # bytes of a weights file, so the network that takes up the best epoch of a run that goes on has it as well.
        network.to(memory_format=torch.channels_last)
        self._network = normalised(network) if settings.normalise else network
        self._network.to(settings.device)
        self._optimizer = torch.optim.SGD(
            self._network.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )
        self._averaged = copy.deepcopy(self._network)
        self._shared = ranks.together(self._network)
        if not ranks.is_first:  # all began with the same weights; from here on, each draws for itself
            torch.manual_seed(self._seed)
        material = Material(settings, self._images, data.labels == DIGITS, ranks)
        self.material: Material | Lessons = material
        """Where the batches come from; the teachers' lessons from the first epoch on."""
        self._steps = material.steps
        self._teachers = teachers
        self._progress = progress
        self._epochs: list[Epoch] = []
        self._best_network: nn.Module = network

    @property
    def _seed(self) -> int:
        """Of what this process draws for itself."""
        return self._settings.seed + RANK_SEEDS * self._ranks.number

    @property
    def is_over(self) -> bool:
        """Whether all epochs were run, or too many without a better one."""
        done, patience = len(self._epochs), self._settings.patience
        if not done:
            return False
        return done >= self._settings.epochs or (bool(patience) and done - self._best.number >= patience)

    @property
    def _best(self) -> Epoch:
        return [epoch for epoch in self._epochs if epoch.best][-1]

    def state(self) -> State:
        """What `go_on_from` takes; all processes have to ask for it, and all get the same."""
        first, *others = self._ranks.all_of(
            {"random": torch.get_rng_state(), "device_random": self._device_random_state()}
        )
        return {
            "network": self._network.state_dict(),
            "averaged": self._averaged.state_dict(),
            "best": self._best_network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "epochs": [asdict(epoch) for epoch in self._epochs],
            **first,
            "others": others,
        }

    def go_on_from(self, state: State) -> None:
        """Take up a state.

        Raises:
            InvalidState: it is of another network, or none at all.
        """
        try:
            self._take_up(state)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # torch checks for us
            raise InvalidState(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error

    def _take_up(self, state: State) -> None:
        self._network.load_state_dict(state["network"])
        self._averaged.load_state_dict(state["averaged"])
        self._best_network.load_state_dict(state["best"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        own = [state, *state.get("others", [])][self._ranks.number]  # written before there were several: no others
        torch.set_rng_state(own["random"])
        if own["device_random"] is not None:
            torch.cuda.set_rng_state(own["device_random"], self._settings.device)

    def _device_random_state(self) -> Tensor | None:
        device = self._settings.device
        return torch.cuda.get_rng_state(device) if device.startswith("cuda") else None

    def run_epoch(self) -> Epoch:
        """Pass over the training images once, then validate."""
        if self._teachers and isinstance(self.material, Material):
            self.material = self._lessons(self.material)
        started = time.perf_counter()
        number = len(self._epochs) + 1
        self._network.train()
        total_loss = rate = 0.0
        for step, batch in zip(self._progress(range(self._steps), number), self.material.epoch(), strict=True):
            taken = (number - 1) * self._steps + step
            rate = learning_rate_at(taken, self._steps, self._settings)
            loss = self._ranks.mean(self._step(batch, rate))
            total_loss += _finite(loss, f"epoch {number}, step {step + 1} of {self._steps}", self._settings)
            _average(self._averaged, self._network, min(self._settings.averaging, taken / (taken + AVERAGING_BEGINS)))

        self._agree_on_statistics()
        # Of the weights as they would be served. The loss decides: among a few thousand images the
        # accuracy of good weights turns on ten of them.
        served = fold(merged(self._averaged), *self._scaling)
        result = self._validate(served)
        _finite(result.loss, f"the validation after epoch {number}", self._settings)
        is_best = not self._epochs or result.loss < self._best.validation_loss
        if is_best:
            self._best_network = served
        self._epochs.append(
            Epoch(
                number=number,
                learning_rate=rate,
                train_loss=total_loss / self._steps,
                validation_loss=result.loss,
                validation_accuracy=result.accuracy,
                seconds=time.perf_counter() - started,
                best=is_best,
            )
        )
        return self._epochs[-1]

    def _validate(self, network: nn.Module) -> Evaluation:
        """The same in all processes, each of which reads its share."""
        own = read(network, self._ranks.share(self._validation.pixels), device=self._settings.device)
        return evaluation_of(torch.cat(self._ranks.all_of(own)), self._validation.labels)

    def _agree_on_statistics(self) -> None:
        """Each process normalises its own share of a batch; the statistics that are kept are those of the first."""
        for network in (self._network, self._averaged):
            for statistic in network.buffers():
                self._ranks.agreed(statistic)

    def _step(self, batch: Batch, rate: float) -> float:
        """Move the weights once; return the loss before, of this process's share by its weight."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        device = self._settings.device
        features = to_features(batch.pixels, *self._scaling).to(device)
        answers = None if batch.answers is None else batch.answers.to(device)
        with self._arithmetic():
            logits = self._shared(features)
        loss = loss_of(logits.float(), batch.labels.to(device), answers, self._settings) * batch.weight
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        return loss.item()

    def _lessons(self, material: Material) -> Lessons:
        """The teachers' answers; the same ones where a training goes on."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            answers = self._answers_of(self._teachers)
            return Lessons(material, answers, self._settings.lessons, self._progress, self._ranks)

    def _answers_of(self, teachers: Sequence[Checkpoint]) -> Callable[[Tensor], Tensor]:
        """The logits of the teachers' mean probabilities."""
        device = self._settings.device
        for teacher in teachers:
            teacher.network.to(device).to(memory_format=torch.channels_last).eval()

        def answer(teacher: Checkpoint, pixels: Tensor) -> Tensor:
            features = to_features(pixels, teacher.manifest.mean, teacher.manifest.std).to(device)
            logits: Tensor = teacher.network(features)
            return logits.float().log_softmax(dim=1)

        @torch.no_grad()
        def answers(pixels: Tensor) -> Tensor:
            with self._arithmetic():
                answered = [answer(teacher, pixels) for teacher in teachers]
            return (torch.stack(answered).logsumexp(dim=0) - math.log(len(teachers))).cpu()

        return answers

    def _arithmetic(self) -> torch.autocast:
        device = self._settings.device.partition(":")[0]
        return torch.autocast(device, torch.bfloat16, enabled=self._settings.bfloat16)

    def training(self) -> Training:
        seconds = sum(epoch.seconds for epoch in self._epochs)
        network = self._best_network.cpu().eval()
        return Training(network, self._epochs, len(self._images), self._validation, seconds)


def processes_of(state: State) -> int:
    """How many processes the training has."""
    return 1 + len(state.get("others", []))


def loss_of(logits: Tensor, labels: Tensor, answers: Tensor | None, settings: TrainingSettings) -> Tensor:
    """The mean loss of logits `float32[n, classes]`.

    Of images with a label, the cross-entropy; of outliers (label `NO_DIGIT`), half
    of that with equal probabilities. With a teacher's answers, a part of the
    loss is the cross-entropy with these, both made softer (G. Hinton, O. Vinyals,
    J. Dean, "Distilling the Knowledge in a Neural Network", 2015).
    """
    log_probabilities = logits.log_softmax(dim=1)
    told = -log_probabilities.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    hard = torch.where(labels >= 0, told, -log_probabilities.mean(dim=1) * OUTLIER_WEIGHT).mean()
    if answers is None:
        return hard
    softness, share = settings.softness, settings.taught
    soft = -((answers / softness).softmax(dim=1) * (logits / softness).log_softmax(dim=1)).sum(dim=1).mean()
    return share * softness**2 * soft + (1 - share) * hard


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, keep: float) -> None:
    """Move the running mean towards the network's weights, and the statistics of its normalisations."""
    state = network.state_dict()
    for name, mean in averaged.state_dict().items():
        if mean.is_floating_point():
            mean.lerp_(state[name], 1 - keep)


def _finite(loss: float, where: str, settings: TrainingSettings) -> float:
    if not math.isfinite(loss):
        advice = f"smaller --learning-rate ({settings.learning_rate:g}) or --weight-decay ({settings.weight_decay:g})"
        if settings.teacher != "none":
            advice += f", or a greater --softness ({settings.softness:g})"
        raise TrainingDiverged(f"the loss is {loss} in {where}: training has come apart; try a {advice}")
    return loss


def learning_rate_at(step: int, steps_per_epoch: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then a cosine down to 0."""
    total = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total - 1)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
