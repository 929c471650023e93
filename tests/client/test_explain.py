"""The picture of how an image was read."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

import client
from client import cli
from client._explain import _BAR, _CAPTION, _INK, PANEL, draw
from digits.preprocessing import preprocess

ROOT = Path(__file__).parents[2]
SEVEN = ROOT / "docs" / "examples" / "7.png"


def prediction(digit: int, confidence: float) -> client.Prediction:
    probabilities = np.full(10, (1 - confidence) / 9, np.float32)
    probabilities[digit] = confidence
    return client.Prediction(digit, confidence, probabilities, "0123456789ab", 1, 0.0, 0.0)


def count(picture: PIL.Image.Image, colour: tuple[int, int, int], first_panel: int, last_panel: int) -> int:
    """Pixels of a colour in some of the panels, 0 the leftmost."""
    part = np.asarray(picture)[:, 16 + first_panel * (PANEL + 16) : 16 + (last_panel + 1) * (PANEL + 16)]
    return int((part == colour).all(axis=2).sum())


def test_it_has_a_panel_for_each_stage_and_one_for_the_answer(server_address: str) -> None:
    picture = client.explain(SEVEN, target=server_address)
    assert picture.mode == "RGB"
    assert picture.size == (16 + 5 * (PANEL + 16), 40 + PANEL + 32)


def test_the_chosen_ink_is_marked_where_it_is() -> None:
    image = np.full((300, 300), 240, np.uint8)
    image[40:220, 50:80] = 20  # the digit, above on the left
    image[290:300] = 0  # the table's edge
    picture = draw(preprocess(image), prediction(1, 0.9))
    panel = np.asarray(picture)[56 : 56 + PANEL, 16 + 2 * (PANEL + 16) :][:, :PANEL]
    marked = (panel == _INK).all(axis=2)
    rows, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
    scale = PANEL / 300
    assert rows[0] == pytest.approx(40 * scale, abs=4)
    assert rows[-1] == pytest.approx(220 * scale, abs=4)
    assert columns[0] == pytest.approx(50 * scale, abs=4)
    assert columns[-1] == pytest.approx(80 * scale, abs=4)


def test_the_pixels_that_are_sent_are_shown(digits: list[npt.NDArray[np.uint8]]) -> None:
    stages = preprocess(digits[3])
    picture = draw(stages, prediction(3, 0.9))
    panel = np.asarray(picture.convert("L"))[56 : 56 + PANEL, 16 + PANEL + 16 :][:, :PANEL]
    np.testing.assert_array_equal(panel[4::8, 4::8], stages.pixels)
    assert picture.width < draw(preprocess(SEVEN), prediction(7, 0.9)).width, "there is nothing between to be shown"


def test_bars_are_as_long_as_probabilities() -> None:
    stages = preprocess(SEVEN)
    sure, unsure = (draw(stages, prediction(7, confidence)) for confidence in (0.9, 0.45))
    assert count(sure, _INK, 4, 4) == pytest.approx(2 * count(unsure, _INK, 4, 4), rel=0.05)
    assert count(unsure, _BAR, 4, 4) > count(sure, _BAR, 4, 4)


def test_names_of_classes_stand_before_the_bars_and_leave_room_for_them() -> None:
    stages, plain = preprocess(SEVEN), prediction(7, 0.9)
    labels = ("T-shirt/top", "Trouser", *"23456", "Sneaker", "Bag", "a name that is far too long for its bar")
    named = draw(stages, dataclasses.replace(plain, labels=labels))
    digits = draw(stages, plain)
    assert named.size == digits.size
    assert 0 < count(named, _INK, 4, 4) < count(digits, _INK, 4, 4)


def test_of_many_classes_the_ten_most_probable_have_bars() -> None:
    stages, ten = preprocess(SEVEN), prediction(7, 0.9)
    order = np.random.default_rng(0).permutation(26)
    probabilities = np.zeros(26, np.float32)
    probabilities[order] = np.linspace(0.05, 0.0, 26)
    probabilities[order[0]] = 0.5
    labels = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    letters = dataclasses.replace(ten, digit=int(order[0]), confidence=0.5, probabilities=probabilities, labels=labels)
    first = order[:10]
    only = dataclasses.replace(
        letters, digit=0, probabilities=probabilities[first], labels=tuple(labels[number] for number in first)
    )
    assert draw(stages, letters).tobytes() != draw(stages, ten).tobytes()
    answers = [np.asarray(draw(stages, drawn))[_CAPTION + 16 :, 16 + 4 * (PANEL + 16) :] for drawn in (letters, only)]
    np.testing.assert_array_equal(answers[0], answers[1])


def test_a_picture_without_a_digit_is_told_in_words() -> None:
    stages, plain = preprocess(SEVEN), prediction(7, 0.9)
    drawn = {is_digit: draw(stages, dataclasses.replace(plain, is_digit=is_digit)) for is_digit in (None, True, False)}
    assert drawn[None].tobytes() == drawn[True].tobytes() != drawn[False].tobytes()


def test_both_clients_draw_the_same(server_address: str) -> None:
    async def drawn() -> PIL.Image.Image:
        async with client.AsyncClient(server_address) as digits:
            return await digits.explain(SEVEN)

    with client.Client(server_address) as digits:
        picture = digits.explain(SEVEN)
    assert picture.tobytes() == asyncio.run(drawn()).tobytes()


def test_a_bad_image_raises_as_classify_does(server_address: str) -> None:
    with client.Client(server_address) as digits, pytest.raises(client.InvalidImageError, match="contrast"):
        digits.explain(np.zeros((28, 28), np.uint8))


def test_the_command_writes_the_picture_and_prints_the_answer(
    server_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "why.png"
    assert cli.main(["classify", str(SEVEN), "--target", server_address, "--explain", str(out)]) == 0
    assert capsys.readouterr().out.split()[1] == "7"
    with PIL.Image.open(out) as picture:
        assert picture.size == (16 + 5 * (PANEL + 16), 40 + PANEL + 32)


@pytest.mark.parametrize("name", ["why.unknown", "missing/why.png"])
def test_a_picture_that_cannot_be_written_is_told(
    server_address: str, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["classify", str(SEVEN), "--target", server_address, "--explain", str(tmp_path / name)]) == 1
    assert f"{name} cannot be written: " in capsys.readouterr().err


def test_several_images_are_not_drawn_into_one_picture(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["classify", "a.png", "b.png", "--explain", "why.png"])
    assert "--explain draws one image, not 2" in capsys.readouterr().err
