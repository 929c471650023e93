"""What classes mean, and whether a model and a data set mean the same by them. Knows nothing of networks or files."""

from __future__ import annotations

from collections.abc import Sequence


def told(labels: Sequence[str]) -> str:
    """The labels as messages tell them; those of classes that are not there are empty, and left out."""
    return ", ".join(label for label in labels if label)


def same_meaning(data: Sequence[str], model: Sequence[str]) -> bool:
    """Whether every class of the data is the model's; the model may know more."""
    return all(label in ("", known) for label, known in zip(data, model, strict=True))
