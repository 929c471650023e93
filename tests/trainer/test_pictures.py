"""Made pictures are what they say they are, and the embedded weights read them."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageOps

from digits.preprocessing import InvalidImage, normalize, to_pixels
from trainer.data import LabelledPixels
from trainer.pictures import KINDS, Picture, make_pictures

A_KIND = 12
HARD = {"tiny": 0.4, "neighbours": 0.6, "shadow": 0.6, "tight": 0.6, "thin28": 0.6, "export28": 0.6, "vignette": 0.6}
"""The least part of a kind that is read; of the others three quarters."""


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return make_pictures(A_KIND, seed=7)


def test_each_kind_is_made_with_its_name_its_label_and_its_ink(pictures: list[Picture]) -> None:
    assert [picture.kind for picture in pictures] == [kind for kind in KINDS for _ in range(A_KIND)]
    assert len({picture.name for picture in pictures}) == len(pictures)
    for picture in pictures:
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(picture.file)))
        assert picture.ink.shape == (upright.height, upright.width)
        assert picture.ink.any()
    assert {picture.label for picture in pictures} == set(range(10))


def test_a_seed_makes_the_same_pictures_whatever_else_is_made(pictures: list[Picture]) -> None:
    again = make_pictures(2, seed=7, kinds=["rotated", "table"])
    expected = [picture for kind in ("rotated", "table") for picture in pictures if picture.kind == kind]
    assert [picture.file for picture in again] == [*(p.file for p in expected[:2]), *(p.file for p in expected[12:14])]
    assert make_pictures(1, seed=8, kinds=["table"])[0].file != again[2].file


def test_global_random_numbers_stay_as_they_were() -> None:
    before = torch.get_rng_state()
    make_pictures(1, seed=7, kinds=["photo"])
    assert torch.equal(torch.get_rng_state(), before)


def test_scans_are_used_where_they_are_given(golden: tuple[npt.NDArray[np.uint8], list[int]]) -> None:
    scans = LabelledPixels(torch.from_numpy(golden[0].copy()), torch.tensor(golden[1]))
    mixed = make_pictures(8, seed=7, kinds=["canvas"], scans=scans)
    written = make_pictures(8, seed=7, kinds=["canvas"])
    assert sum(a.file != b.file for a, b in zip(mixed, written, strict=True)) >= 3


def test_names_of_the_kind_extension_end_as_another_formats_do(pictures: list[Picture]) -> None:
    for picture in pictures:
        if picture.kind == "extension":
            format = Image.open(io.BytesIO(picture.file)).format
            assert picture.name.endswith(".png") == (format == "JPEG")


def test_the_embedded_weights_read_most_of_every_kind(pictures: list[Picture]) -> None:
    pytest.importorskip("server")
    from digits.checkpoint import load_checkpoint
    from server.settings import EMBEDDED_WEIGHTS

    network = load_checkpoint(EMBEDDED_WEIGHTS).network.eval()
    right = dict.fromkeys(KINDS, 0)
    for picture in pictures:
        try:
            pixels = to_pixels(picture.file)
        except InvalidImage:
            continue
        with torch.inference_mode():
            digit = int(network(torch.from_numpy(normalize(pixels.reshape(1, -1)))).argmax())
        right[picture.kind] += digit == picture.label
    assert {kind: count for kind, count in right.items() if count < A_KIND * HARD.get(kind, 0.75)} == {}
    assert sum(right.values()) >= 0.93 * len(pictures)
