"""The folder of a training: what it was told, how far it is, and what came out.

Every file appears whole or not at all, and what is there after a kill at any
moment is enough to go on. Knows nothing of flags.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import subprocess
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from digits.checkpoint import Checkpoint, manifest_path, write_atomically
from trainer.data import Data
from trainer.settings import InvalidSetting, TrainingSettings, settings_from
from trainer.training import STATE_PARTS, Epoch, State, processes_of

SETTINGS = "settings.toml"
RUN = "run.json"
STATE = "state.pt"
METRICS = "metrics.jsonl"
WEIGHTS = "mnist_model.pth"
FIGURES = "metrics.json"
RESULTS = (WEIGHTS, manifest_path(WEIGHTS).name, FIGURES)
"""A run with these is complete: the weights, then their manifest, then all there is to see, and last the figures."""

PART = re.compile(r"\.[\w-]+\.(pt|pth|toml|jsonl?|html|png)\.[a-z0-9_]{8}")
"""The name of a file that is not whole yet (`write_atomically`)."""


class RunError(Exception):
    """The folder is no run, or not one that can go on; the message says why."""


class Run:
    """The folder of one training.

    Files: `settings.toml` (as `--config` takes it), `run.json` (versions,
    machine, data), `metrics.jsonl` (a line an epoch), `state.pt` (to go on
    from), and what `write` is given.
    """

    def __init__(self, folder: Path, settings: TrainingSettings) -> None:
        self.folder = folder
        self.settings = settings

    @classmethod
    def begin(
        cls,
        folder: Path,
        settings: TrainingSettings,
        data: Data,
        processes: int = 1,
        teachers: Sequence[Checkpoint] = (),
    ) -> Run:
        """Make the folder.

        Args:
            processes: how many train together.
            teachers: those that the settings name by their files.

        Raises:
            InvalidSetting: it cannot be made or written to.
            RunError: it holds a run already.
        """
        if cls.is_at(folder):
            raise RunError(f"{folder} holds a run already; go on with it by --resume {folder}, or choose another --out")
        make_folder(folder)
        run = cls(folder, settings)
        record = {
            **environment(processes),
            "data": {"name": data.name, "sha256": fingerprint(data)},
            "teachers": [teacher.sha256 for teacher in teachers],
        }
        run.write(RUN, json_bytes(record))
        run.write(SETTINGS, toml_of(asdict(settings)).encode())  # last: with it, the folder is a run
        return run

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether the folder is a run; one that was stopped while it was made is none yet, and is begun anew."""
        return (folder / SETTINGS).is_file()

    @classmethod
    def go_on(cls, folder: Path) -> Run:
        """Open the folder of a training that was stopped, or is over.

        Raises:
            RunError: it is none.
        """
        if not cls.is_at(folder):
            raise RunError(f"--resume takes the folder of a run, with {SETTINGS} in it, not {folder}")
        try:
            return cls(folder, settings_from(folder / SETTINGS))
        except InvalidSetting as error:
            raise RunError(str(error)) from error

    @property
    def is_complete(self) -> bool:
        """Whether all results are there; if not, the state is enough to write them (again)."""
        return all((self.folder / name).is_file() for name in RESULTS)

    @property
    def threads(self) -> int:
        """The number of CPU threads that it was begun with; another one gives other weights.

        Raises:
            RunError: run.json is damaged.
        """
        return int(self._record()["threads"])

    def check_data(self, data: Data) -> None:
        """Raise RunError unless the run was begun with the same images and labels."""
        begun = self._record()["data"]
        if begun["sha256"] != (found := fingerprint(data)):
            raise RunError(
                f"{self.folder} was begun with other data: {begun['name']}, SHA-256 {begun['sha256'][:12]}…, "
                f"not {data.name}, {found[:12]}…"
            )

    def check_teachers(self, teachers: Sequence[Checkpoint]) -> None:
        """Raise RunError unless the teachers' files hold the weights that the run was begun with."""
        found = [teacher.sha256 for teacher in teachers]
        begun = self._record().get("teachers", found)  # runs of before did not write them down
        for path, before, now in zip(teacher_paths(self.settings), begun, found, strict=True):
            if before != now:
                raise RunError(
                    f"{self.folder} was begun with another teacher in {path}: SHA-256 {before[:12]}…, not {now[:12]}…; "
                    "put the former weights there, or begin another run"
                )

    def _record(self) -> dict[str, Any]:
        """What run.json says of how the run was begun."""
        path = self.folder / RUN
        try:
            record: dict[str, Any] = json.loads(path.read_text())
            if not isinstance(record["threads"], int) or not isinstance(record["data"]["sha256"], str):
                raise TypeError
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RunError(
                f"{path} is damaged or missing ({type(error).__name__}): nothing tells what the run was begun with; "
                f"begin another one, by --config {self.folder / SETTINGS}"
            ) from error
        return record

    def state(self, processes: int = 1) -> State | None:
        """What was saved after the last epoch; None before the first.

        Args:
            processes: how many are to go on together.

        Raises:
            RunError: the file is damaged, or was written by another number of processes.
        """
        try:
            content = (self.folder / STATE).read_bytes()
        except FileNotFoundError:
            return None
        try:
            state: State = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if missing := STATE_PARTS - state.keys():
                raise KeyError(*sorted(missing))
            before = processes_of(state)
            for epoch in state["epochs"]:
                Epoch(**epoch)
        except Exception as error:  # of a damaged file, torch.load raises nearly anything
            raise self.bad_state(type(error).__name__) from error
        if before != processes:
            raise RunError(
                f"{self.folder} is a run of {before} processes that train together; it goes on with as many, "
                f"not with {processes} (torchrun --nproc-per-node)"
            )
        return state

    def bad_state(self, reason: str) -> RunError:
        """What to tell where the state is none of this run's training."""
        return RunError(
            f"{self.folder / STATE} is damaged, or no state of this training ({reason}); "
            "delete it, and --resume trains from the beginning"
        )

    def mend(self, state: State | None) -> None:
        """Put right what a kill left: parts of files, and metrics that lack the state's last epoch."""
        for path in self.folder.iterdir():
            if PART.fullmatch(path.name):
                path.unlink()
        if state is not None:
            self._write_metrics(state)

    def save_state(self, state: State) -> None:
        """Write the state, and the metrics of all its epochs."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write(STATE, buffer.getvalue())
        self._write_metrics(state)

    def _write_metrics(self, state: State) -> None:
        self.write(METRICS, "".join(json.dumps(epoch) + "\n" for epoch in state["epochs"]).encode())

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the run."""
        write_file(self.folder / name, content)

    def write_events(self, epochs: Iterable[Epoch]) -> None:
        """Write the epochs as TensorBoard shows them."""
        from torch.utils.tensorboard import SummaryWriter

        with tempfile.TemporaryDirectory() as made:
            with SummaryWriter(made) as writer:
                for epoch in epochs:
                    for name in ("train_loss", "validation_loss", "validation_accuracy", "learning_rate"):
                        writer.add_scalar(name, getattr(epoch, name), epoch.number)
            new = {file.name: file.read_bytes() for file in Path(made).iterdir()}
        for name, content in new.items():
            self.write(name, content)
        for old in self.folder.glob("events.out.tfevents.*"):
            if old.name not in new:
                old.unlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it, an error of the system names this file, also where a write fails, as on a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    with naming(path):
        write_atomically(path, content)


def teacher_paths(settings: TrainingSettings) -> list[str]:
    """The files of the teachers that are there already."""
    return [] if settings.teacher in ("none", "cnn") else [part.strip() for part in settings.teacher.split(",")]


def make_folder(folder: Path) -> None:
    """Make the folder that --out names.

    Raises:
        InvalidSetting: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise InvalidSetting(f"--out is a folder that can be written to, not {folder}: {error.strerror}") from error


def environment(processes: int = 1) -> dict[str, Any]:
    """What the weights depend on beside settings and data; without paths, which are the machine's own.

    Args:
        processes: how many train together.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "cpu_count": os.cpu_count(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": {
            "mnist-grpc": _installed("mnist-grpc"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": _installed("torchvision"),
        },
    }


def fingerprint(data: Data) -> str:
    """SHA-256 of all images and labels, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in (data.train, data.test):
        for tensor in (part.pixels, part.labels):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def toml_of(values: Mapping[str, Any]) -> str:
    """A flat TOML table; numbers, booleans and texts are written as in JSON."""
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    assert tomllib.loads(text) == dict(values)
    return text


def json_bytes(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def _git_commit() -> str | None:
    """Of the checkout that this code is run from, with `-dirty` where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):  # not a checkout, or no git
        return None


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # run from a checkout
        return None
