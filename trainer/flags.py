"""The flags and their manual, `--help`; what they do is in `cli`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from digits.network import ARCHITECTURES
from trainer.datasets import DATASETS, FOLDER
from trainer.run import WEIGHTS
from trainer.settings import DEVICES, RECIPES, InvalidSetting, TrainingSettings, settings_in

LAYOUT = "--data-dir has torchvision's layout: DIR/MNIST/raw/*-ubyte, each of the four files plain or with .gz."
DEFAULTS = TrainingSettings()
DEFAULT_NOTES = {"validation_size": ", or a tenth of them if that is less"}
EMBEDDED = [Path(__file__).parents[1] / "server" / "weights" / name for name in (WEIGHTS, "mnist_cnn.pth")]
"""The server's package lies beside this one, in a checkout as where both are installed."""


def training_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        usage="python -m trainer [train] [flags]\n"
        "       python -m trainer evaluate --weights PATH [flags]\n"
        "       python -m trainer card [flags]\n"
        "       python -m trainer promote RUN [--to PATH]",
        description="Train weights for the server on MNIST. The epoch with the lowest validation loss is kept, "
        f"measured once on the test images, and written to --out: {WEIGHTS}, its manifest, metrics, pictures and "
        "report.html, which holds all. With the defaults that takes an hour or more on one core.",
        epilog=f"{LAYOUT} On the CPU, the same seed gives the same weights, bit for bit, on the same machine with as "
        "many threads, also where the training was stopped and went on by --resume. Flags beat --config, which beats "
        "--recipe. Several processes, on one machine or more, train together by torchrun --nproc-per-node=N -m trainer "
        "[flags]; --batch-size is that of all. Other commands: python -m trainer evaluate --help, python -m trainer "
        "card --help, python -m trainer promote --help.",
    )
    _add_common(parser, "where to write the weights and all about them (default: runs/DATE-TIME)")
    parser.set_defaults(threads=None)  # none given: a run that goes on takes its own
    parser.add_argument(
        "--resume", type=_path, metavar="RUN", help="go on with a training that was stopped, in its folder"
    )

    group = parser.add_argument_group("what is learnt, and how")
    group.add_argument(
        "--recipe",
        choices=list(RECIPES),
        help="settings that belong together: best makes the weights that the server ships with, cnn those of "
        "--model cnn, origin is an ordinary training (default: best)",
    )
    group.add_argument(
        "--config", type=_path, metavar="FILE", help="settings in TOML, as a run's settings.toml has them"
    )
    _add_dataset(group, DEFAULTS.dataset, default=argparse.SUPPRESS)
    group.add_argument(
        "--architecture",
        "--arch",
        type=_architecture,
        choices=list(ARCHITECTURES),
        default=argparse.SUPPRESS,
        help=f"the network (default: {DEFAULTS.architecture})",
    )
    for name, metavar, text in [
        ("epochs", "N", "passes over the training images, 1 or more"),
        ("batch_size", "IMAGES", "images a step, 1 or more"),
        ("learning_rate", "RATE", "the highest learning rate, reached after the warm-up; above 0"),
        (
            "warmup_epochs",
            "EPOCHS",
            "epochs of linear climb to that rate, then it falls to 0 along a cosine; 0 or more",
        ),
        ("momentum", "M", "of SGD (Nesterov's), from 0 to below 1"),
        ("weight_decay", "L2", "penalty on the squares of the weights, 0 or more"),
        (
            "averaging",
            "A",
            "keep a running mean of the weights that forgets all but A at each step; 0: the last weights",
        ),
        ("dropout", "SHARE", "part of the values that the network's dropout leaves out, from 0 to below 1"),
        ("lessons", "EPOCHS", "epochs of pictures that the teacher answers, 1 or more"),
        ("softness", "T", "temperature at which the teacher's answers are learnt, above 0"),
        ("taught", "SHARE", "part of the loss that is the difference from the teacher's answers, from 0 to 1"),
        ("outliers", "SHARE", "part of each batch that shows no digit, if the data are digits; 0: none"),
        ("damaged", "SHARE", "part of the pictures that are damaged, from 0 to 1"),
        ("drawn", "SHARE", "part of each batch that is drawn by a model of a pen, if the data are digits; 0: none"),
        ("validation_size", "IMAGES", "training images held back to choose the best epoch, 1 or more"),
        ("patience", "EPOCHS", "stop after so many epochs without a lower validation loss; 0: never"),
        ("seed", "SEED", "of the initial weights, order, dropout and augmentation; 0 or more"),
    ]:
        default = getattr(DEFAULTS, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=_whole if isinstance(default, int) else _number,
            metavar=metavar,
            default=argparse.SUPPRESS,
            help=f"{text} (default: {default:g}{DEFAULT_NOTES.get(name, '')})",
        )
    group.add_argument(
        "--teacher",
        metavar="WHAT",
        default=argparse.SUPPRESS,
        help="whose answers are learnt beside the labels: none; cnn, which is trained first, by the recipe of that "
        f"name and for no more epochs; or weights files, parted by commas (default: {DEFAULTS.teacher})",
    )
    for name, text in [
        ("normalise", "learn with batch normalisation, which the layers take up afterwards"),
        ("bfloat16", "compute products in bfloat16, twice as fast where the machine has it"),
    ]:
        group.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help=f"{text} (default: {'yes' if getattr(DEFAULTS, name) else 'no'})",
        )
    group.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="turn, scale, shear, shift and bend each image, and change its pen, anew in every epoch (default: yes)",
    )
    group.add_argument(
        "--standardise",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="train on features of mean 0 and deviation 1, which the first layer takes up afterwards (default: yes)",
    )
    return parser


def evaluation_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer evaluate",
        description="Measure weights on the test images of a data set: the accuracy, and a table by class.",
        epilog=f"{LAYOUT} Nothing is written but with --out.",
    )
    parser.add_argument("--weights", type=_path, required=True, metavar="PATH", help="a .pth file (required)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, for programs")
    _add_dataset(parser, "the one that the weights' manifest names, if it is one of these, else mnist", default=None)
    _add_common(parser, "also write evaluation.json, report.html and its pictures to this folder")
    return parser


def card_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer card",
        description="Measure the weights that the server ships with, or others, on all there is: MNIST's test images, "
        "whole, damaged and moved, pictures that show no digit, and pictures of your own; and write the model card.",
        epilog=LAYOUT,
    )
    parser.add_argument(
        "--weights", type=_path, nargs="+", metavar="PATH", default=EMBEDDED, help="(default: those of the server)"
    )
    parser.add_argument("--pictures", type=_path, metavar="DIR", help="pictures of digits; DIR/manifest.csv lists them")
    parser.add_argument(
        "--others",
        nargs="+",
        metavar="NAME",
        choices=[name for name in DATASETS if name.endswith("mnist") and name not in ("mnist", "qmnist")],
        default=[],
        help="data sets that show no digits, to be refused: fashion-mnist, kmnist",
    )
    parser.add_argument(
        "--seeds", type=_path, nargs="+", metavar="RUN", default=[], help="runs of the first recipe with other seeds"
    )
    _add_common(parser, "where to write model-card.md and its pictures (default: docs)")
    parser.set_defaults(out=Path("docs"))
    return parser


def promotion_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer promote",
        description="Put a run's weights and manifest in the place of those that are served, if they read the test "
        "images no worse. A running server takes them up without losing a call.",
        epilog="Labels and test accuracies are compared as the manifests give them; weights without one read digits.",
    )
    parser.add_argument("run", type=_path, metavar="RUN", help="the folder of a run, or a .pth file")
    parser.add_argument("--to", type=_path, required=True, metavar="PATH", help="the .pth file that the server loads")
    parser.add_argument(
        "--tolerance",
        type=_number,
        metavar="SHARE",
        default=0.0,
        help="how much lower the test accuracy may be, 0 to 1: 0.001 is a tenth of a percent (default: 0)",
    )
    parser.add_argument("--force", action="store_true", help="whatever the accuracies and labels are")
    return parser


def settings_of(options: argparse.Namespace) -> TrainingSettings:
    """The settings that the flags of `training_parser` give.

    Raises:
        InvalidSetting: a value breaks its rule, or the file of --config does.
    """
    return TrainingSettings(**chosen_settings(options))


def chosen_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the recipe, the file or a flag gives; the others have their defaults. Errors: `settings_of`."""
    values = dict(RECIPES[options.recipe or "best"])
    if options.config is not None:
        try:
            values |= settings_in(options.config)
        except FileNotFoundError as error:
            raise InvalidSetting(f"--config is a TOML file, and there is none at {options.config}") from error
    return values | given_settings(options)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings for which there was a flag."""
    names = {field.name for field in fields(TrainingSettings)}
    return {name: value for name, value in vars(options).items() if name in names and value is not None}


def _add_dataset(parser: argparse._ActionsContainer, default_text: str, default: str | None) -> None:
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default=default,
        help=f"{', '.join(DATASETS)}, or {FOLDER}PATH with a folder of pictures for each class "
        f"(default: {default_text})",
    )


def _add_common(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument(
        "--data-dir", type=_path, metavar="DIR", default=Path("data"), help="the data set's folder (default: data)"
    )
    parser.add_argument(
        "--download",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="download the files that are missing (default: yes)",
    )
    parser.add_argument("--out", type=_path, metavar="DIR", help=out)
    parser.add_argument("--device", type=_device, help=f"cpu, cuda, cuda:N or mps (default: {DEFAULTS.device})")
    parser.add_argument(
        "--threads",
        type=_whole,
        metavar="N",
        default=1,
        help="CPU threads, 1 or more; networks this small gain little from more, and lose much on a busy machine "
        "(default: 1)",
    )


def _architecture(text: str) -> str:
    """In whatever case it was written."""
    return {name.lower(): name for name in ARCHITECTURES}.get(text.lower(), text)


def _device(text: str) -> str:
    if not DEVICES.fullmatch(text):
        raise argparse.ArgumentTypeError(f"takes cpu, cuda, cuda:N or mps, not {text!r}")
    return text


def _path(text: str) -> Path:
    if not text.strip():  # to pathlib, it would be the working directory
        raise argparse.ArgumentTypeError(f"takes a path, not {text!r}")
    return Path(text)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a whole number, not {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number, not {text!r}") from None
