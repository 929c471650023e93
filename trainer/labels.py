"""What classes mean, and whether a model and a data set mean the same by them. Knows nothing of networks or files."""

from __future__ import annotations

from collections.abc import Sequence

MOST_TOLD = 30
"""Labels that a message names."""


def told(labels: Sequence[str]) -> str:
    """The labels as messages tell them; those of classes that are not there are empty, and left out."""
    there = [label for label in labels if label]
    more = f" and {len(there) - MOST_TOLD} more" if len(there) > MOST_TOLD else ""
    return ", ".join(there[:MOST_TOLD]) + more


def same_meaning(data: Sequence[str], model: Sequence[str]) -> bool:
    """Whether the model has as many classes, and each that the data names is the same; it may name more of them."""
    return len(data) == len(model) and all(label in ("", known) for label, known in zip(data, model, strict=True))
