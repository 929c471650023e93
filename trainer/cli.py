"""The command line: arguments in; lines, files and an exit status out.

`python -m trainer [train]` makes weights, `python -m trainer evaluate` measures
them, `python -m trainer card` tells all there is to tell of them, and `python -m
trainer promote` puts them in the place of others. Exit status 0: done; 1: the
data, the weights or the training failed, or the weights are no better; 2: a flag
is wrong; 130: interrupted. Of processes that train together the first that fails has
this status, the others 1; torchrun gives 1 for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from digits.checkpoint import (
    Checkpoint,
    InvalidCheckpoint,
    Manifest,
    load_checkpoint,
    manifest_path,
    save_checkpoint,
)
from digits.preprocessing import DIGITS
from trainer import report
from trainer.augmentation import Augmentation
from trainer.calibration import TEMPERATURES, coverage, fit_temperature, reliability
from trainer.card import model_card, model_names, picture_name
from trainer.data import Data, DataError, split
from trainer.datasets import DATASETS, load_data
from trainer.evaluation import Evaluation, evaluation_of, read
from trainer.flags import (
    EMBEDDED,
    card_parser,
    chosen_settings,
    evaluation_parser,
    given_settings,
    promotion_parser,
    settings_of,
    training_parser,
)
from trainer.labels import same_meaning, told
from trainer.measurement import digit_scores, measure, read_pictures
from trainer.promotion import NotPromoted, promote
from trainer.ranks import Ranks, joined
from trainer.run import (
    FIGURES,
    WEIGHTS,
    Run,
    RunError,
    environment,
    json_bytes,
    make_folder,
    naming,
    teacher_paths,
    write_file,
)
from trainer.settings import RECIPES, InvalidSetting, TrainingSettings
from trainer.training import (
    SPLIT_SEED,
    Epoch,
    InvalidState,
    State,
    Training,
    TrainingDiverged,
    train,
    validation_size_for,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments[:1] and arguments[0] in COMMANDS else "train"
    command, parser = COMMANDS[name]
    flags = parser()
    options = flags.parse_args(arguments)
    try:
        command(options)
    except InvalidSetting as error:
        flags.error(str(error))
    except (DataError, InvalidCheckpoint, TrainingDiverged, RunError, NotPromoted, OSError) as error:
        print(f"{flags.prog}: error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"\n{flags.prog}: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"\n{flags.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


REFUSED = 0.0085
"""The share of validation digits that look like none: the threshold is to refuse at most 1 % of others."""


MOST_THREADS = 1024

SERVED = 0.9
"""So many of its golden digits a server has a model read; the test accuracy tells nearly whether it will."""


class Interrupted(Exception):
    """A training was stopped from the keyboard; the message says how to go on."""


# Training -------------------------------------------------------------------


def _run_training(options: argparse.Namespace) -> None:
    with joined() as ranks:
        # The first alone reads and writes, so that no other machine needs the files or the same folders.
        begun, settings, threads = ranks.from_first(lambda: _settings(options))
        _prepare(threads, ranks.use(settings.device))
        ranks.wait()  # until all know that they can
        run, data, teachers = ranks.from_first(lambda: _begin(begun, settings, options, ranks))
        try:
            if run.settings.teacher == "cnn":
                teachers = [_teacher(run, data, ranks)]
            training = _train(run, data, teachers, ranks)
            if ranks.is_first:
                _write_results(run, data, training, teachers, ranks)
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted; what was learnt up to the last whole epoch is kept. Go on:\n"
                + _command_to_go_on(run, options, ranks)
            ) from None


def _settings(options: argparse.Namespace) -> tuple[Run | None, TrainingSettings, int]:
    """The run that goes on, if one does, the settings, and the number of threads."""
    if options.resume is not None:
        begun = _begun_run(options)
        return begun, begun.settings, begun.threads
    return None, settings_of(options), 1 if options.threads is None else options.threads


def _begin(
    begun: Run | None, settings: TrainingSettings, options: argparse.Namespace, ranks: Ranks
) -> tuple[Run, Data, list[Checkpoint]]:
    """The run, the data, and the teachers that are there already."""
    data = _load(settings.dataset, options)
    teachers = [load_checkpoint(path) for path in teacher_paths(settings)]
    for path, teacher in zip(teacher_paths(settings), teachers, strict=True):
        if not same_meaning(data.labels, teacher.manifest.labels):
            raise DataError(
                f"--teacher has the classes of the data set, {told(data.labels)} ({data.name}), "
                f"and {path} has {told(teacher.manifest.labels)}"
            )
    if begun is None:
        if "validation_size" not in chosen_settings(options):
            settings = dataclasses.replace(settings, validation_size=validation_size_for(len(data.train)))
        split(data.train, settings.validation_size, SPLIT_SEED)  # raises what the training would
        out = options.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
        return Run.begin(out, settings, data, ranks.size, teachers), data, teachers  # now, not after the training
    begun.check_data(data)
    begun.check_teachers(teachers)
    return begun, data, teachers


def _command_to_go_on(run: Run, options: argparse.Namespace, ranks: Ranks) -> str:
    command = "python" if ranks.size == 1 else "torchrun … as before …"
    command += f" -m trainer --resume {shlex.quote(str(run.folder))} --data-dir {shlex.quote(str(options.data_dir))}"
    return command if options.download else f"{command} --no-download"


def _teacher(run: Run, data: Data, ranks: Ranks) -> Checkpoint:
    """The network that is trained before the run's own, as a run in a folder within the run's."""
    folder = run.folder / "teacher"

    def begin() -> Run | None:
        begun = Run.go_on(folder) if Run.is_at(folder) else None
        if begun and begun.is_complete:
            return None
        print("\nThe teacher, by --recipe cnn:", flush=True)
        if begun:
            begun.check_data(data)
            return begun
        own = RECIPES["cnn"]
        settings = TrainingSettings(
            **own
            | {name: getattr(run.settings, name) for name in ("dataset", "validation_size", "seed", "device")}
            | {"epochs": min(own["epochs"], run.settings.epochs)}
        )
        return Run.begin(folder, settings, data, ranks.size)

    if own_run := ranks.from_first(begin):
        training = _train(own_run, data, [], ranks)
        if ranks.is_first:
            _write_results(own_run, data, training, [], ranks)
    return ranks.from_first(lambda: load_checkpoint(folder / WEIGHTS))


def _train(run: Run, data: Data, teachers: list[Checkpoint], ranks: Ranks) -> Training:
    """Train, or go on, with a line for each epoch."""

    def left() -> State | None:
        state = run.state(ranks.size)
        run.mend(state)
        return state

    state = ranks.from_first(left)
    settings = dataclasses.replace(run.settings, device=ranks.use(run.settings.device))

    def progress(steps: Iterable[int], epoch: int) -> Iterable[int]:
        # None: silent where stderr is no terminal.
        what = f"epoch {epoch}/{settings.epochs}" if epoch else "the teacher's answers"
        return tqdm(steps, desc=what, unit=" steps", leave=False, disable=None if ranks.is_first else True)

    def on_epoch(epoch: Epoch) -> None:
        if ranks.is_first:
            print(report.log_line(epoch, settings.epochs), flush=True)

    def on_state(state: State) -> None:
        if ranks.is_first:
            run.save_state(state)

    if ranks.is_first:
        print(f"\n{report.LOG_HEADER}" if teachers else report.LOG_HEADER, flush=True)
    for epoch in state["epochs"] if state else []:
        on_epoch(Epoch(**epoch))
    try:
        return train(settings, data, on_epoch, progress, teachers=teachers, state=state, on_state=on_state, ranks=ranks)
    except InvalidState as error:
        raise run.bad_state(str(error)) from error


def _write_results(run: Run, data: Data, training: Training, teachers: list[Checkpoint], ranks: Ranks) -> None:
    """Measure on the test images, and write the weights and all there is to tell."""
    settings = run.settings
    validation = training.validation
    temperature = fit_temperature(read(training.network, validation.pixels), validation.labels)
    scores = digit_scores(read(training.network, validation.pixels), temperature)
    logits = read(training.network, data.test.pixels)
    test = evaluation_of(logits, data.test.labels)
    manifest = Manifest(
        architecture=settings.architecture,
        temperature=temperature,
        digit_threshold=round(float(scores.quantile(REFUSED)), 4) if data.labels == DIGITS else None,
        labels=data.labels,
        dataset=data.name,
        test_accuracy=test.accuracy,
        training=_provenance(settings, training, test, teachers, ranks),
    )
    weights = run.folder / WEIGHTS
    with naming(weights):
        sha256 = save_checkpoint(weights, training.network, manifest)
    best = training.best
    facts = {
        "Test accuracy": report.accuracy_line(test),
        "Best epoch": f"{best.number} of {len(training.epochs)}, validation accuracy {best.validation_accuracy:.2%}",
        "Temperature": f"{temperature:g}, fitted to the validation images",
        "Weights": f"{WEIGHTS}, SHA-256 {sha256}",
    } | {name.replace("_", " ").capitalize(): value for name, value in asdict(settings).items()}
    pictures = {"Learning curves": report.draw_curves(training.epochs)}
    pictures |= _pictures(data, logits, temperature, test)
    table = report.class_table(test, data.labels)
    _write_all(run.folder, f"{settings.architecture} on {data.name}", facts, table, pictures)
    run.write_events(training.epochs)
    run.write(FIGURES, json_bytes(report.training_record(training.epochs, test)))  # last: now it is complete
    print(
        f"\nbest epoch     {best.number}, validation accuracy {best.validation_accuracy:.2%}\n"
        f"test accuracy  {report.accuracy_line(test)}\n"
        f"calibration    temperature {temperature:g}, expected calibration error "
        f"{reliability(logits, data.test.labels, temperature).expected_error:.4f}\n"
        f"time           {training.seconds:.0f} s\n"
        f"written to     {run.folder}: {WEIGHTS}, {manifest_path(WEIGHTS)}, report.html and all that it shows\n"
    )
    low, high = TEMPERATURES
    if not 1.01 * low < temperature < 0.99 * high:
        print(f"Confidences say little: the temperature is at its limit, for it has to be from {low:g} to {high:g}.")
    if data.labels == DIGITS and test.accuracy < SERVED:
        print(f"Perhaps no server takes it: a model has to read {SERVED:.0%} of the server's own test digits.")
    print(f"Serve it:      mnist-grpc-server --weights {shlex.quote(str(weights))}")


def _begun_run(options: argparse.Namespace) -> Run:
    """The run that goes on, if no flag asks for another."""
    if options.out is not None or options.config is not None or options.recipe is not None:
        raise InvalidSetting("--resume goes on in its own folder with its own settings: no --out, --config or --recipe")
    run = Run.go_on(options.resume)
    begun = asdict(run.settings) | {"threads": run.threads}
    given = given_settings(options) | ({} if options.threads is None else {"threads": options.threads})
    for name, value in given.items():
        if value != begun[name]:
            raise InvalidSetting(
                f"--resume goes on as begun, with --{name.replace('_', '-')} {begun[name]}, not {value}"
            )
    return run


def _provenance(
    settings: TrainingSettings, training: Training, test: Evaluation, teachers: list[Checkpoint], ranks: Ranks
) -> dict[str, Any]:
    """How the weights were made, for the manifest; without paths, which are the machine's own."""
    chosen = asdict(settings)
    chosen["teacher"] = [f"{teacher.manifest.architecture} {teacher.version}" for teacher in teachers]
    return {
        "seed": chosen.pop("seed"),
        "settings": chosen,
        "augmentation": asdict(Augmentation()) if settings.augment else None,
        "images": {"train": training.train_size, "validation": training.validation_size, "test": test.total},
        "best_epoch": training.best.number,
        "validation_accuracy": training.best.validation_accuracy,
        "test_correct": test.correct,
        "seconds": round(training.seconds, 1),
        **environment(ranks.size),
    }


# Evaluation and promotion ---------------------------------------------------


def _run_evaluation(options: argparse.Namespace) -> None:
    device = options.device or "cpu"
    _prepare(options.threads, device)
    checkpoint = load_checkpoint(options.weights)
    manifest = checkpoint.manifest
    data = _load(options.dataset or _dataset_of(manifest), options)
    if not same_meaning(data.labels, manifest.labels):
        raise DataError(
            f"the classes of {options.weights} are {told(manifest.labels)}, and those of {data.name} are "
            f"{told(data.labels)}; --dataset names the data set that belongs to the weights"
        )
    logits = read(checkpoint.network.to(device), data.test.pixels, manifest.mean, manifest.std, device)
    result = evaluation_of(logits, data.test.labels)
    error = reliability(logits, data.test.labels, manifest.temperature).expected_error
    record = {"weights": str(options.weights), "version": checkpoint.version, "dataset": data.name}
    record |= report.evaluation_record(result) | {"expected_calibration_error": error}
    if options.json:
        print(json.dumps(record))
    else:
        print(f"{data.name} test accuracy of {options.weights} ({manifest.architecture}, {checkpoint.version}):")
        print(f"{report.accuracy_line(result)}, loss {result.loss:.4f}")
        print(f"expected calibration error {error:.4f}\n\n{report.class_table(result, data.labels)}")
    if options.out:
        make_folder(options.out)
        facts = {
            "Test accuracy": report.accuracy_line(result),
            "Expected calibration error": f"{error:.4f}",
            "Weights": f"{options.weights}, version {checkpoint.version}",
        }
        pictures = _pictures(data, logits, manifest.temperature, result)
        table = report.class_table(result, data.labels)
        _write_all(options.out, f"{manifest.architecture} on {data.name}", facts, table, pictures)
        write_file(options.out / "evaluation.json", json_bytes(record))


def _dataset_of(manifest: Manifest) -> str:
    """The value of --dataset for the data set that the manifest names; mnist where there is none."""
    names = {name.removesuffix("-digits").replace("-", ""): name for name in DATASETS}
    return names.get(manifest.dataset.lower().replace(" ", ""), "mnist")


def _run_card(options: argparse.Namespace) -> None:
    _prepare(options.threads, "cpu")
    if options.weights is EMBEDDED and not all(path.is_file() for path in EMBEDDED):
        raise InvalidSetting(
            f"--weights names the files to measure; those of the server are not in {EMBEDDED[0].parent}"
        )
    checkpoints = [load_checkpoint(path) for path in options.weights]
    names = model_names(checkpoints)
    test = _load("mnist", options).test
    pictures = read_pictures(options.pictures) if options.pictures else None
    others = {name: _load(name, options).test.pixels for name in options.others}
    measured = []
    for what, checkpoint in zip(names, checkpoints, strict=True):

        def progress(kinds: Iterable[str], count: int, what: str = what) -> Iterable[str]:
            return tqdm(kinds, total=count, desc=what, unit=" kinds", leave=False, disable=None)

        measured.append(measure(checkpoint, test, pictures, others, progress))
    seeds = [json.loads((run / "metrics.json").read_text())["test"]["accuracy"] for run in options.seeds]
    write_file(options.out / "model-card.md", model_card(measured, seeds, _card_command(options)).encode())
    for name, model in zip(names, measured, strict=True):
        logits = model.logits / model.checkpoint.manifest.temperature
        picture = report.draw_mistakes(test.pixels, test.labels, logits, f"{name}, MNIST test", most=len(test))
        write_file(options.out / "pictures" / picture_name(name), picture)
    print(f"written: {options.out / 'model-card.md'}")


def _card_command(options: argparse.Namespace) -> str:
    """By which the card is made again; without paths, which are the machine's own."""
    flags = {
        "--weights": [] if options.weights is EMBEDDED else [path.name for path in options.weights],
        "--pictures": ["DIR"] if options.pictures else [],
        "--others": options.others,
        "--seeds": ["RUN…"] if options.seeds else [],
    }
    return " ".join(["python -m trainer card", *(" ".join([flag, *given]) for flag, given in flags.items() if given)])


def _run_promotion(options: argparse.Namespace) -> None:
    new = options.run / WEIGHTS if options.run.is_dir() else options.run
    promoted, before = promote(new, options.to, options.tolerance, options.force)
    accuracy = promoted.manifest.test_accuracy
    shown = "unknown" if accuracy is None else f"{accuracy:.2%}"
    print(f"{options.to}: version {promoted.version}, test accuracy {shown}", end="")
    print(f", in place of {before.version}" if before else "")


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], Callable[[], argparse.ArgumentParser]]] = {
    "train": (_run_training, training_parser),
    "evaluate": (_run_evaluation, evaluation_parser),
    "card": (_run_card, card_parser),
    "promote": (_run_promotion, promotion_parser),
}


# Both -----------------------------------------------------------------------


def _load(dataset: str, options: argparse.Namespace) -> Data:
    return load_data(
        dataset,
        options.data_dir,
        options.download,
        lambda files, count: tqdm(files, total=count, desc="pictures", unit="", leave=False, disable=None),
    )


def _pictures(data: Data, logits: Tensor, temperature: float, result: Evaluation) -> dict[str, bytes]:
    """What there is to see of test images that were read, by its title."""
    test = data.test
    logits = logits / temperature
    title = f"{data.name} test"
    return {
        "Confusion": report.draw_confusion(result, title, data.labels),
        "Mistakes": report.draw_mistakes(test.pixels, test.labels, logits, title, labels=data.labels),
        "Calibration": report.draw_calibration(reliability(logits, test.labels), title),
        "Coverage": report.draw_coverage(*coverage(logits, test.labels), title),
    }


def _write_all(folder: Path, title: str, facts: dict[str, Any], table: str, pictures: dict[str, bytes]) -> None:
    """Each picture as a file of its own, and the report that holds them all."""
    for name, content in pictures.items():
        write_file(folder / f"{name.split()[-1].lower()}.png", content)
    write_file(folder / "report.html", report.html_report(title, facts, table, pictures))


def _prepare(threads: int, device: str) -> None:
    """Check and set what concerns the machine."""
    if not 1 <= threads <= MOST_THREADS:
        raise InvalidSetting(f"--threads is from 1 to {MOST_THREADS}, not {threads}")
    torch.set_num_threads(threads)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidSetting(f"--device is one that torch can use here, not {device}: {reason}") from error
