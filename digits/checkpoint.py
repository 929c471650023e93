"""Weights on disk: a bare state dict, and a manifest that tells what it is.

`mnist_model.pth` holds the state dict and nothing else, so it loads anywhere
with `model.load_state_dict(torch.load("mnist_model.pth"))`, and a file of that
kind made elsewhere loads here. Everything else that is known of a model stands
beside it in `mnist_model.json`; a file without one gets the defaults of
`Manifest`. Reading never runs code from the file (`weights_only=True`).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digits.network import ARCHITECTURES
from digits.preprocessing import CLASSES, DIGITS, MAX_CLASSES, MEAN, STD
from digits.snapshot import (
    MAX_WEIGHTS_BYTES,
    VERSION_DIGITS,
    InvalidCheckpoint,
    Snapshot,
    manifest_path,
    take_snapshot,
)

__all__ = [
    "MAX_WEIGHTS_BYTES",
    "Checkpoint",
    "InvalidCheckpoint",
    "Manifest",
    "is_label",
    "load_checkpoint",
    "manifest_bytes",
    "manifest_path",
    "parse_checkpoint",
    "save_checkpoint",
    "write_atomically",
]


MAX_LABEL = 100
"""Characters in the name of a class, or of a data set."""

SHOWN = 200
"""Characters of a wrong value that a message repeats."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a model beside its weights."""

    architecture: str = "ImprovedNN"
    """A name in `digits.network.ARCHITECTURES`."""

    mean: float = MEAN
    """`features = (pixel / 255 - mean) / std`."""

    std: float = STD
    """From 1e-6 to 1e6."""

    temperature: float = 1.0
    """`probabilities = softmax(logits / temperature)`; from 1e-6 to 1e6."""

    digit_threshold: float | None = None
    """A picture whose digit score is lower looks like no digit, within float32; None: the model does not say.

    The digit score is `logsumexp(logits / temperature)`, the energy score of W.
    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020.
    """

    labels: tuple[str, ...] = DIGITS
    """The meaning of each of the 10 to 100 classes, by the rule of `is_label`; empty where there is no such class.

    The network has as many outputs.
    """

    sha256: str = ""
    """Of the weights file, 64 hexadecimal digits; checked when set."""

    dataset: str = ""
    """The data set of the training, for example `MNIST`; by the rule of `is_label`, or empty."""

    test_accuracy: float | None = None
    """On the data set's test part, 0 to 1."""

    training: Mapping[str, Any] = field(default_factory=dict)
    """How the weights were made: settings, seed, versions, time."""


@dataclass(frozen=True)
class Checkpoint:
    """A network with its weights in place (in evaluation mode) and its manifest."""

    network: nn.Module
    manifest: Manifest
    sha256: str

    @property
    def version(self) -> str:
        """The first 12 hexadecimal digits of the weights file's SHA-256."""
        return self.sha256[:VERSION_DIGITS]

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())


def load_checkpoint(weights: str | os.PathLike[str]) -> Checkpoint:
    """Load a weights file and, where there is one, the manifest beside it.

    Raises:
        InvalidCheckpoint: a file is missing, truncated or no state dict, does
            not match its manifest's SHA-256, or holds keys, shapes or values
            that its architecture, with an output for each label, cannot have.
    """
    return parse_checkpoint(take_snapshot(weights))


def parse_checkpoint(snapshot: Snapshot) -> Checkpoint:
    """Make a network of what was read from the disk.

    Raises:
        InvalidCheckpoint: as `load_checkpoint`.
    """
    path = Path(snapshot.path)
    manifest = Manifest() if snapshot.manifest is None else _read_manifest(manifest_path(path), snapshot.manifest)
    if manifest.sha256 and manifest.sha256.lower() != snapshot.sha256:
        raise InvalidCheckpoint(
            f"{path}: SHA-256 is {snapshot.sha256}, but {manifest_path(path).name} says {manifest.sha256}: "
            "the two files do not belong together"
        )
    network = ARCHITECTURES[manifest.architecture](len(manifest.labels))
    network.load_state_dict(_checked(path, _read_state_dict(path, snapshot.weights), network.state_dict(), manifest))
    network.eval()
    return Checkpoint(network, manifest, snapshot.sha256)


def save_checkpoint(weights: str | os.PathLike[str], network: nn.Module, manifest: Manifest) -> str:
    """Write a network's state dict and its manifest; return the weights' SHA-256.

    Each file appears whole or not at all, also if the machine stops meanwhile.
    """
    path = Path(weights)
    buffer = io.BytesIO()
    torch.save({key: tensor.detach().cpu().clone() for key, tensor in network.state_dict().items()}, buffer)
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    write_atomically(path, buffer.getvalue())
    write_atomically(manifest_path(path), manifest_bytes(manifest, sha256))
    return sha256


def manifest_bytes(manifest: Manifest, sha256: str) -> bytes:
    """A manifest as it stands in its file, beside weights with this SHA-256."""
    return (json.dumps(asdict(manifest) | {"sha256": sha256}, indent=2) + "\n").encode()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def is_label(text: str) -> bool:
    """Whether a text can name a class: 1 to 100 printable characters, so no control characters or lone surrogates.

    Others cannot be sent in a message, or break the lines in which they are shown.
    """
    return 1 <= len(text) <= MAX_LABEL and text.isprintable()


def _read_manifest(path: Path, content: bytes) -> Manifest:
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path}: a manifest is a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise InvalidCheckpoint(f"{path}: a manifest is a JSON object, this is a {type(values).__name__}")
    known = {f.name for f in fields(Manifest)}
    values = {key: value for key, value in values.items() if key in known}

    def require(key: str, rule: str, holds: bool) -> None:
        if key in values and not holds:
            shown = repr(values[key])
            shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
            raise InvalidCheckpoint(f"{path}: {key} is {rule}, not {shown}")

    def number(key: str) -> float:
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return math.nan
        try:
            return float(value) if math.isfinite(value) else math.nan
        except OverflowError:
            return math.nan

    architecture, labels = values.get("architecture"), values.get("labels")
    require(
        "architecture",
        f"one of {', '.join(ARCHITECTURES)}",
        isinstance(architecture, str) and architecture in ARCHITECTURES,
    )
    require("mean", "a finite number", not math.isnan(number("mean")))
    require("std", "a number from 1e-6 to 1e6", 1e-6 <= number("std") <= 1e6)
    require("temperature", "a number from 1e-6 to 1e6", 1e-6 <= number("temperature") <= 1e6)
    threshold = values.get("digit_threshold")
    require(
        "digit_threshold",
        "a finite number that float32 can hold, or null",
        threshold is None or abs(number("digit_threshold")) <= torch.finfo(torch.float32).max,
    )
    require(
        "labels",
        f"a list of {CLASSES} to {MAX_CLASSES} texts",
        isinstance(labels, list)
        and CLASSES <= len(labels) <= MAX_CLASSES
        and all(isinstance(label, str) for label in labels),
    )
    for label in labels if isinstance(labels, list) else []:
        if label and not is_label(label):
            raise InvalidCheckpoint(
                f"{path}: each of the labels is empty or a text of 1 to {MAX_LABEL} printable characters, "
                f"not one of {len(label)} that begins with {label[:20]!r}"
            )
    require("sha256", "a text", isinstance(values.get("sha256"), str))
    dataset = values.get("dataset")
    require(
        "dataset",
        f"a text of at most {MAX_LABEL} printable characters",
        isinstance(dataset, str) and (not dataset or is_label(dataset)),
    )
    accuracy = values.get("test_accuracy")
    require("test_accuracy", "from 0 to 1, or null", accuracy is None or 0 <= number("test_accuracy") <= 1)
    require("training", "an object", isinstance(values.get("training"), dict))
    if isinstance(labels, list):
        values["labels"] = tuple(labels)
    return Manifest(**values)


def _read_state_dict(path: Path, content: bytes) -> Mapping[str, Tensor]:
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file, torch.load raises nearly anything
        raise InvalidCheckpoint(
            f"{path}: a weights file is a state dict written by torch.save; these {len(content)} bytes are "
            f"truncated, damaged, or a pickle of something else ({type(error).__name__})"
        ) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise InvalidCheckpoint(
            f"{path}: a weights file is a state dict (names to tensors), this is a {type(loaded).__name__}"
        )
    return loaded


def _checked(
    path: Path, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], manifest: Manifest
) -> dict[str, Tensor]:
    """Return the weights as float32, or say in what they differ from the architecture."""
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        raise InvalidCheckpoint(
            f"{path}: not the weights of {manifest.architecture}: "
            f"missing {', '.join(missing) or 'nothing'}; unknown {', '.join(unknown) or 'nothing'}"
        )
    *_, last = expected  # the bias of the layer that gives the logits
    if given[last].dim() == 1 and given[last].shape != expected[last].shape:
        raise InvalidCheckpoint(
            f"{path}: the weights have an output for each of the {len(manifest.labels)} labels that "
            f"{manifest_path(path).name} gives, or of the ten digits where it gives none; "
            f"{last} has {len(given[last])}"
        )
    for key, tensor in given.items():
        if tensor.shape != expected[key].shape:
            raise InvalidCheckpoint(
                f"{path}: {key} has the shape {list(expected[key].shape)} in {manifest.architecture}, "
                f"not {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise InvalidCheckpoint(f"{path}: {key} holds floating-point numbers, not {tensor.dtype}")
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise InvalidCheckpoint(
                f"{path}: {key} is a dense tensor with values, not {tensor.layout} on {tensor.device}"
            )
        if not bool(torch.isfinite(tensor.to(torch.float32)).all()):
            raise InvalidCheckpoint(f"{path}: {key} holds finite numbers, but NaN or infinity stands in it")
    return {key: tensor.to(torch.float32) for key, tensor in given.items()}
