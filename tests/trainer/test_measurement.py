"""What the model card tells is what a model does."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from digits.checkpoint import Checkpoint, load_checkpoint
from server.settings import EMBEDDED_WEIGHTS
from trainer.card import model_card
from trainer.corruptions import CORRUPTIONS
from trainer.data import Data, DataError, LabelledPixels
from trainer.evaluation import evaluate, read
from trainer.measurement import digit_scores, measure, moved, other_pictures, read_pictures


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(EMBEDDED_WEIGHTS)


def test_figures_are_those_of_the_model(checkpoint: Checkpoint, digits_data: Data) -> None:
    test = digits_data.test[:100]
    threshold = 3.0
    checkpoint = dataclasses.replace(checkpoint, manifest=dataclasses.replace(checkpoint.manifest, digit_threshold=3.0))
    white = torch.full((5, 784), 255, dtype=torch.uint8)
    measured = measure(checkpoint, test, digits_data.test[:40], {"white": white})
    assert measured.test.correct == evaluate(checkpoint.network, test).correct
    assert measured.pictures == (evaluate(checkpoint.network, digits_data.test[:40]).correct, 40)
    scores = digit_scores(read(checkpoint.network, test.pixels), checkpoint.manifest.temperature)
    assert measured.refused_digits == pytest.approx(float((scores < threshold).float().mean()))
    assert set(measured.damaged) == set(measured.damaged_through_client) == set(CORRUPTIONS)
    assert measured.damaged["motion_blur"] > 0.6
    assert measured.refused["white"] in (0.0, 1.0)
    card = model_card([measured], [0.99, 0.98], "the command")
    assert "| test accuracy (99.50 %, 99.75 %) |" in card
    assert "mean over 2 seeds (99.45 %) | 98.50% (99.00%, 98.00%)" in card
    assert checkpoint.version in card
    kinds = {kind: share for kind, share in measured.refused.items() if kind != "overlaid"}
    assert f"mean of the kinds below (95 %) | {sum(kinds.values()) / len(kinds):.1%} |" in card
    assert f"| refused pictures of two digits over each other | {measured.refused['overlaid']:.1%} |" in card


def test_a_model_without_a_threshold_refuses_nothing_and_the_card_says_so(
    checkpoint: Checkpoint, digits_data: Data
) -> None:
    manifest = dataclasses.replace(checkpoint.manifest, digit_threshold=None)
    measured = measure(dataclasses.replace(checkpoint, manifest=manifest), digits_data.test[:20])
    assert measured.refused_digits is None
    assert measured.refused == {}
    assert measured.pictures is None
    assert "| refused test digits (1 %) | - |" in model_card([measured], [], "the command")


def test_moved_images_lie_where_they_should() -> None:
    image = np.zeros((28, 28), np.uint8)
    image[4:10, 6:8] = 255
    pixels = torch.from_numpy(image.reshape(1, 784))
    there = np.zeros((28, 28), np.uint8)
    there[5:11, 8:10] = 255
    assert np.array_equal(moved(pixels, right=2, down=1).reshape(28, 28).numpy(), there)
    assert torch.equal(moved(pixels), pixels)
    turned = moved(pixels, degrees=90).reshape(28, 28).numpy()
    assert np.abs(turned.astype(int) - np.rot90(image, 3).astype(int)).max() <= 1, "clockwise, as y goes down"
    middle = torch.zeros(1, 28, 28, dtype=torch.uint8)
    middle[:, 10:18, 12:16] = 255
    larger = moved(middle.reshape(1, 784), scale=1.5)
    assert float(larger.float().sum()) == pytest.approx(1.5**2 * float(middle.float().sum()), rel=0.1)


def test_pictures_without_a_digit_are_the_same_each_time_and_leave_the_random_state(digits_data: Data) -> None:
    before = torch.get_rng_state()
    first, second = other_pictures(digits_data.test), other_pictures(digits_data.test)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {"letters", "letters in other fonts", "pieces of photographs", "blank"} <= set(first)
    assert all(pixels.dtype == torch.uint8 and pixels.shape[1] == 784 for pixels in first.values())


class TestReadPictures:
    def write(self, folder: Path, lines: list[tuple[str, ...]]) -> None:
        with open(folder / "manifest.csv", "w", newline="") as file:
            csv.writer(file).writerows(lines)

    def test_the_list_names_files_and_labels(self, tmp_path: Path) -> None:
        picture = np.full((60, 60), 255, np.uint8)
        picture[10:50, 28:32] = 0
        Image.fromarray(picture).save(tmp_path / "one.png")
        self.write(tmp_path, [("file", "label", "note"), ("one.png", "1", "straight")])
        pictures = read_pictures(tmp_path)
        assert isinstance(pictures, LabelledPixels)
        assert pictures.pixels.shape == (1, 784)
        assert pictures.labels.tolist() == [1]

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([("name", "digit")], "its first line names file and label"),
            ([("file", "label"), ("none.png", "1")], "none.png"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, lines: list[tuple[str, ...]], message: str) -> None:
        self.write(tmp_path, lines)
        with pytest.raises(DataError, match=message):
            read_pictures(tmp_path)

    def test_a_folder_without_a_list_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"manifest\.csv lists the pictures"):
            read_pictures(tmp_path)
