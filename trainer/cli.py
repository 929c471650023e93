"""The command line: arguments in; lines, files and an exit status out.

`python -m trainer [train]` makes weights, `python -m trainer evaluate` measures
them. Exit status 0: done; 1: the data, the weights or the training failed;
2: a flag is wrong; 130: interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from digits.checkpoint import (
    InvalidCheckpoint,
    Manifest,
    load_checkpoint,
    manifest_path,
    save_checkpoint,
    write_atomically,
)
from trainer import report
from trainer.augmentation import Augmentation
from trainer.data import DataError, load_mnist
from trainer.evaluation import Evaluation, evaluate
from trainer.flags import WEIGHTS, evaluation_parser, settings_of, training_parser
from trainer.settings import InvalidSetting, TrainingSettings
from trainer.training import Epoch, Training, TrainingDiverged, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, parser = _run_training, training_parser
    if arguments[:1] == ["evaluate"]:
        command, parser = _run_evaluation, evaluation_parser
    if arguments[:1] in (["train"], ["evaluate"]):
        arguments = arguments[1:]
    flags = parser()
    options = flags.parse_args(arguments)
    try:
        command(options)
    except InvalidSetting as error:
        flags.error(str(error))
    except (DataError, InvalidCheckpoint, TrainingDiverged, OSError) as error:
        print(f"{flags.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{flags.prog}: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def _run_training(options: argparse.Namespace) -> None:
    settings = settings_of(options)
    _prepare(options)
    data = load_mnist(options.data_dir, options.download)
    out = options.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    _make_folder(out)  # now, and not after minutes of training

    def progress(steps: Iterable[int], epoch: int) -> Iterable[int]:
        # None: silent where stderr is no terminal.
        return tqdm(steps, desc=f"epoch {epoch}/{settings.epochs}", unit=" steps", leave=False, disable=None)

    def on_epoch(epoch: Epoch) -> None:
        print(report.log_line(epoch, settings.epochs), flush=True)

    print(report.LOG_HEADER, flush=True)
    training = train(settings, data, on_epoch, progress)
    test = evaluate(training.network, data.test)

    manifest = Manifest(
        architecture=settings.architecture,
        dataset=data.name,
        test_accuracy=test.accuracy,
        training=_provenance(settings, training, test),
    )
    weights = out / WEIGHTS
    save_checkpoint(weights, training.network, manifest)
    write_atomically(out / "metrics.json", _json(report.training_record(training.epochs, test)))
    write_atomically(out / "curves.png", report.draw_curves(training.epochs))
    write_atomically(out / "confusion.png", report.draw_confusion(test, f"{data.name} test"))
    best = training.best
    print(
        f"\nbest epoch     {best.number}, validation accuracy {best.validation_accuracy:.2%}\n"
        f"test accuracy  {report.accuracy_line(test)}\n"
        f"time           {training.seconds:.0f} s\n"
        f"written to     {out}: {WEIGHTS}, {manifest_path(WEIGHTS)}, metrics.json, curves.png, confusion.png\n\n"
        f"Serve it:      mnist-grpc-server --weights {shlex.quote(str(weights))}"
    )


def _run_evaluation(options: argparse.Namespace) -> None:
    _prepare(options)
    checkpoint = load_checkpoint(options.weights)
    data = load_mnist(options.data_dir, options.download)
    manifest = checkpoint.manifest
    result = evaluate(checkpoint.network.to(options.device), data.test, manifest.mean, manifest.std, options.device)
    record = {"weights": str(options.weights), "version": checkpoint.version, "dataset": data.name}
    record |= report.evaluation_record(result)
    if options.json:
        print(json.dumps(record))
    else:
        print(f"{data.name} test accuracy of {options.weights} ({manifest.architecture}, {checkpoint.version}):")
        print(f"{report.accuracy_line(result)}, loss {result.loss:.4f}\n\n{report.class_table(result)}")
    if options.out:
        _make_folder(options.out)
        write_atomically(options.out / "evaluation.json", _json(record))
        write_atomically(options.out / "confusion.png", report.draw_confusion(result, f"{data.name} test"))


def _provenance(settings: TrainingSettings, training: Training, test: Evaluation) -> dict[str, Any]:
    """How the weights were made, for the manifest; without paths, which are the machine's own."""
    chosen = asdict(settings)
    return {
        "seed": chosen.pop("seed"),
        "settings": chosen,
        "augmentation": asdict(Augmentation()) if settings.augment else None,
        "images": {"train": training.train_size, "validation": training.validation_size, "test": test.total},
        "best_epoch": training.best.number,
        "validation_accuracy": training.best.validation_accuracy,
        "test_correct": test.correct,
        "seconds": round(training.seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "mnist-grpc": _installed("mnist-grpc"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": _installed("torchvision"),
        },
    }


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # run from a checkout
        return None


def _prepare(options: argparse.Namespace) -> None:
    """Check and set what concerns the machine."""
    if options.threads < 1:
        raise InvalidSetting(f"--threads is 1 or more, not {options.threads}")
    torch.set_num_threads(options.threads)
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidSetting(f"--device is one that torch can use here, not {options.device}: {reason}") from error


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise InvalidSetting(f"--out is a folder that can be written to, not {out}: {error.strerror}") from error


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()
