"""Drawn digits are canonical, different, and what they are said to be."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.handwriting import CURVE_POINTS, Pen, draw


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def boxes(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Heights and widths of the ink, to the half of its strength."""
    images = pixels.reshape(-1, 28, 28) > 127
    return images.any(dim=2).sum(dim=1), images.any(dim=1).sum(dim=1)


def test_shapes_and_types_are_those_of_the_data_set() -> None:
    pixels, digits = draw(50)
    assert pixels.shape == (50, 784)
    assert pixels.dtype == torch.uint8
    assert digits.shape == (50,)
    assert digits.dtype == torch.int64


def test_each_digit_is_drawn_about_as_often() -> None:
    _, digits = draw(2000)
    counts = torch.bincount(digits, minlength=10)
    assert int(counts.min()) > 140
    assert int(counts.max()) < 260


def test_drawings_fill_the_box_that_mnist_fills() -> None:
    pixels, _ = draw(300)
    height, width = boxes(pixels)
    longer = torch.maximum(height, width)
    assert int(longer.min()) >= 18
    assert int(longer.max()) <= 21
    images = pixels.reshape(-1, 28, 28).float()
    places = torch.arange(28.0)
    mass = images.sum(dim=(1, 2))
    for axis in (1, 2):
        center = (images.sum(dim=axis) @ places) / mass
        assert float((center - 13.5).abs().max()) < 2.5
    assert (pixels.amax(dim=1) == 255).all()


def test_strokes_have_no_gaps() -> None:
    """The finest pen leaves no digit in more pieces than it has strokes: a 0 is one."""
    ndimage = pytest.importorskip("scipy.ndimage")
    pixels, digits = draw(400, Pen(thinnest=0.05, thickest=0.051))
    for image in pixels[digits == 0].reshape(-1, 28, 28).numpy():
        _, pieces = ndimage.label(image > 40, np.ones((3, 3)))
        assert pieces == 1


def test_no_two_drawings_are_alike() -> None:
    pixels, _ = draw(300)
    assert len({row.numpy().tobytes() for row in pixels}) == 300


def test_a_thicker_pen_leaves_more_ink() -> None:
    fine, _ = draw(100, Pen(thinnest=0.05, thickest=0.06))
    broad, _ = draw(100, Pen(thinnest=0.2, thickest=0.22))
    assert float(broad.float().mean()) > 2 * float(fine.float().mean())


def test_a_steady_hand_draws_a_style_the_same_each_time() -> None:
    pen = Pen(jitter=0, narrowest=0.8, widest=0.8, rotation_degrees=0, slant=0, thinnest=0.1, thickest=0.1)
    pixels, digits = draw(300, pen)
    shapes = {(int(digit), (row > 127).numpy().tobytes()) for row, digit in zip(pixels, digits, strict=True)}
    assert len(shapes) < 50, "as many as there are styles"
    assert len({shape for _, shape in shapes}) == len(shapes), "no style is that of two digits"


def test_the_seed_decides() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return draw(5)[0]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_points_lie_closer_than_the_finest_pen_is_wide() -> None:
    from trainer.handwriting import _STYLES

    for style in _STYLES:
        assert style.curve.shape[0] == CURVE_POINTS
        assert torch.allclose(style.curve.sum(dim=1), torch.ones(CURVE_POINTS), atol=1e-5)
        steps = (style.curve @ style.points * 20).diff(dim=0).norm(dim=1)
        assert float(steps.median()) < 0.55
