"""The model card: a page in Markdown that tells what models can do, from their measurements."""

from __future__ import annotations

from collections.abc import Sequence

from digits.checkpoint import Checkpoint
from digits.preprocessing import CLASSES
from trainer.calibration import wilson_interval
from trainer.measurement import THROUGH_CLIENT, Measurement

TWO_DIGITS = "overlaid"
"""The kind of pictures without a digit that has two of them, either of which is an answer; told beside the mean."""


def model_card(models: Sequence[Measurement], seeds: Sequence[float], command: str) -> str:
    """Return the card.

    Args:
        seeds: test accuracies of the first model's recipe with other seeds, or none.
        command: by which it was made, for those who want to make it again.
    """
    names = model_names([model.checkpoint for model in models])
    parts = [
        "# Model card\n",
        f"Written by `{command}`; do not edit.\n",
        _table("", names, [("version", [model.checkpoint.version for model in models]), *_facts(models)]),
        "## What they are for\n",
        "Pictures of one handwritten digit, brought to 28x28 pixels by `to_pixels` (the SDK does it). A picture of\n"
        "several digits, of a letter or of nothing gets an answer as well; `Prediction.is_digit` says when it does\n"
        "not look like a digit.\n",
        "## How well they read\n",
        _table("measure (goal)", names, _quality(models, seeds)),
        "Intervals are Wilson's, 95 %.\n",
        "## What is no digit\n",
        "The share of pictures that are refused, at the threshold in the manifest, which was chosen on validation\n"
        "images. Training saw other pictures of the kinds down to noise, and two digits over each other, and none of\n"
        "the rest.\n",
        _table("refused", names, _by_kind([_without_digit(model) for model in models])),
        "## Damaged digits\n",
        "Accuracy on the test images with each of the fifteen kinds of damage of MNIST-C (own implementation,\n"
        f"`trainer.corruptions`): as pixels, and, of the first {THROUGH_CLIENT}, as arrays that go through\n"
        "`to_pixels` as in the SDK. Training damages a part of its pictures in related ways (`trainer.damage`), so\n"
        "this does not tell of damage that nobody thought of.\n",
        _table(
            "accuracy",
            [f"{name}, {way}" for name in names for way in ("pixels", "SDK")],
            _by_kind([kinds for model in models for kinds in (model.damaged, model.damaged_through_client)]),
        ),
        "## By digit\n",
        "Recall on the test images.\n",
        _table("digit", names, [(str(digit), [_recall(model, digit) for model in models]) for digit in range(CLASSES)]),
        "## Mistakes\n",
        "All test images that are misread, the most confident first: what the label says, what was read, how surely,\n"
        "and the image's number.\n",
        *(f"### {name}\n\n![The misread test images of {name}](pictures/{picture_name(name)})\n" for name in names),
        "## How they were made\n",
        "[training.md](training.md) tells the recipe, its time, and what was tried and did not help.\n",
    ]
    return "\n".join(parts)


def model_names(models: Sequence[Checkpoint]) -> list[str]:
    """What each is called: by its architecture, and by its version as well where another one has the same."""
    architectures = [model.manifest.architecture for model in models]
    return [
        name if architectures.count(name) == 1 else f"{name} {model.version}"
        for name, model in zip(architectures, models, strict=True)
    ]


def picture_name(model: str) -> str:
    """Of the file with the mistakes of a model of this name."""
    return f"mistakes-{model.lower().replace(' ', '-')}.png"


def _facts(models: Sequence[Measurement]) -> list[tuple[str, list[str]]]:
    manifests = [model.checkpoint.manifest for model in models]
    return [
        ("parameters", [f"{model.checkpoint.parameter_count:,}" for model in models]),
        ("data set", [manifest.dataset for manifest in manifests]),
        ("temperature", [f"{manifest.temperature:g}" for manifest in manifests]),
        ("digit threshold", ["-" if m.digit_threshold is None else f"{m.digit_threshold:g}" for m in manifests]),
    ]


def _quality(models: Sequence[Measurement], seeds: Sequence[float]) -> list[tuple[str, list[str]]]:
    def counted(right: int, total: int) -> str:
        low, high = wilson_interval(right, total)
        return f"{right / total:.2%} ({right} of {total}; {low:.2%} to {high:.2%})"

    rows = [("test accuracy (99.50 %, 99.75 %)", [counted(model.test.correct, model.test.total) for model in models])]
    if seeds:
        listed = ", ".join(f"{seed:.2%}" for seed in seeds)
        rows.append((f"mean over {len(seeds)} seeds (99.45 %)", [f"{sum(seeds) / len(seeds):.2%} ({listed})"]))
    rows.append(("expected calibration error (0.005)", [f"{model.calibration_error:.4f}" for model in models]))
    if all(model.pictures is not None for model in models):
        rows += [
            (
                "photographs, scans, drawings (98 %, 99 %)",
                [counted(*model.pictures) for model in models if model.pictures],
            ),
            ("their calibration error (0.03)", [f"{model.pictures_calibration_error:.4f}" for model in models]),
        ]
    rows += [
        ("refused test digits (1 %)", [_share(model.refused_digits) for model in models]),
        (
            "refused non-digits, mean of the kinds below (95 %)",
            [_share(_mean(_without_digit(model))) for model in models],
        ),
        ("refused pictures of two digits over each other", [_share(model.refused.get(TWO_DIGITS)) for model in models]),
        ("damaged digits, mean of fifteen kinds (96 %)", [_share(_mean(model.damaged)) for model in models]),
        ("the same through the SDK", [_share(_mean(model.damaged_through_client)) for model in models]),
    ]
    for name in models[0].lost:
        rows.append((f"lost where {name} (0.5 points)", [f"{model.lost[name] * 100:.2f} points" for model in models]))
    return rows


def _without_digit(model: Measurement) -> dict[str, float]:
    return {kind: share for kind, share in model.refused.items() if kind != TWO_DIGITS}


def _recall(model: Measurement, digit: int) -> str:
    return "-" if (part := model.test.recall[digit]) is None else f"{part:.2%}"


def _by_kind(columns: Sequence[dict[str, float]]) -> list[tuple[str, list[str]]]:
    kinds = [*dict.fromkeys(kind for column in columns for kind in column)]
    rows = [(kind.replace("_", " "), [_share(column.get(kind)) for column in columns]) for kind in kinds]
    return [*rows, ("**mean**", [f"**{_share(_mean(column))}**" for column in columns])]


def _mean(shares: dict[str, float]) -> float | None:
    return sum(shares.values()) / len(shares) if shares else None


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _table(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join([*cells, *[''] * (len(columns) - len(cells))])} |" for name, cells in rows]
    return "\n".join(lines) + "\n"
