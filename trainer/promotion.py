"""New weights in the place of those that are served, if they are no worse."""

from __future__ import annotations

from pathlib import Path

from digits.checkpoint import (
    Checkpoint,
    load_checkpoint,
    manifest_bytes,
    manifest_path,
    parse_checkpoint,
)
from digits.snapshot import take_snapshot
from trainer.labels import told
from trainer.run import write_file
from trainer.settings import InvalidSetting

NO_ACCURACY = "its manifest gives no test accuracy"


class NotPromoted(Exception):
    """The weights stay as they are; the message says why."""


def promote(new: Path, to: Path, tolerance: float = 0.0, force: bool = False) -> tuple[Checkpoint, Checkpoint | None]:
    """Write the weights and the manifest at `new` to `to`; return both models, None where there was none.

    Each file is exchanged as a whole. A server that watches them finds, for a
    moment, new weights beside the old manifest, whose checksum tells it to wait.

    Args:
        tolerance: by how much the test accuracy may be lower, 0 to 1.
        force: promote whatever the accuracies are, also over a broken file.

    Raises:
        InvalidCheckpoint: the new weights, or those in place, do not load.
        InvalidSetting: the tolerance is none, or `to` is a manifest's path.
        OSError: a file cannot be written; the error names it.
        NotPromoted: the new ones read fewer of the test images, or mean other
            things by their classes, or were measured on other data.
    """
    if not 0 <= tolerance <= 1:
        raise InvalidSetting(f"--tolerance is from 0 to 1, not {tolerance:g}")
    if manifest_path(to) == to:
        raise InvalidSetting(f"--to is the path of a weights file, as x.pth, beside which x.json is written, not {to}")
    snapshot = take_snapshot(new)
    candidate = parse_checkpoint(snapshot)
    in_place = None
    if to.exists() and not force:
        in_place = load_checkpoint(to)
        _check(candidate, in_place, tolerance)
    elif candidate.manifest.test_accuracy is None and not force:
        raise NotPromoted(f"{new}: {NO_ACCURACY}; --force promotes it nevertheless")
    write_file(to, snapshot.weights)
    write_file(manifest_path(to), manifest_bytes(candidate.manifest, candidate.sha256))
    return candidate, in_place


def _check(candidate: Checkpoint, in_place: Checkpoint, tolerance: float) -> None:
    new, old = candidate.manifest, in_place.manifest
    if new.labels != old.labels:
        raise NotPromoted(
            f"the classes of this model are {told(new.labels)}, and those of the one in place are {told(old.labels)}; "
            "--force promotes it nevertheless"
        )
    if new.test_accuracy is None:
        raise NotPromoted(f"{NO_ACCURACY}; --force promotes it nevertheless")
    if old.test_accuracy is None:
        return
    if new.dataset != old.dataset:
        raise NotPromoted(
            f"test accuracies on {new.dataset or 'unnamed data'} and on {old.dataset or 'unnamed data'} cannot be "
            "compared; --force promotes it nevertheless"
        )
    if new.test_accuracy < old.test_accuracy - tolerance:
        raise NotPromoted(
            f"a test accuracy of {old.test_accuracy - tolerance:.2%} or more is asked for, this model has "
            f"{new.test_accuracy:.2%} (the one in place: {old.test_accuracy:.2%}); --force promotes it nevertheless"
        )
