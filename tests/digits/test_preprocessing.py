"""`to_pixels` and `normalize`: what training saw is what serving sees, however the image is handed in."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from sklearn.datasets import load_digits

from digits.preprocessing import INK_SIDE, SIDE, ImageLike, is_canonical, normalize, to_pixels

Pixels = npt.NDArray[np.uint8]

EXIF_ORIENTATION = 0x0112


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def draw_seven(side: int, paper: int = 0, ink: int = 255) -> Pixels:
    """A seven with smooth edges, `uint8[side, side]`, of the same shape at any side."""
    large = side * -(-1024 // side)
    image = Image.new("L", (large, large), paper)
    corners = [(0.3 * large, 0.25 * large), (0.7 * large, 0.25 * large), (0.45 * large, 0.78 * large)]
    ImageDraw.Draw(image).line(corners, fill=ink, width=large // 11, joint="curve")
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def mean_difference(a: Pixels, b: Pixels) -> float:
    """In grey levels of 255, after the best shift of up to a pixel."""
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return min(float(np.abs(np.roll(a, shift, (0, 1)).astype(int) - b).mean()) for shift in shifts)


# MNIST ----------------------------------------------------------------------


def test_every_image_of_mnist_passes_byte_for_byte(mnist_raw: Pixels) -> None:
    assert mnist_raw.shape == (70_000, SIDE, SIDE)
    changed = [index for index, image in enumerate(mnist_raw) if to_pixels(image).tobytes() != image.tobytes()]
    assert changed == []


def test_inverted_images_of_mnist_come_back_as_they_were(mnist_raw: Pixels) -> None:
    some = mnist_raw[::10]
    changed = [index for index, image in enumerate(some) if to_pixels(255 - image).tobytes() != image.tobytes()]
    assert changed == []


# Canonical images -----------------------------------------------------------


def test_the_answer_is_canonical_and_so_passes_a_second_time_unchanged() -> None:
    answers = [to_pixels(image / 16) for image in load_digits().images]
    assert [index for index, pixels in enumerate(answers) if not is_canonical(pixels)] == []
    assert all(np.array_equal(to_pixels(pixels), pixels) for pixels in answers)


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("PNG", "L", {}),
        ("PNG", "LA", {}),
        ("PNG", "P", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "I;16", {}),
        ("BMP", "L", {}),
        ("BMP", "P", {}),
        ("BMP", "RGB", {}),
        ("BMP", "RGBA", {}),
        ("GIF", "L", {}),
        ("GIF", "P", {}),
        ("TIFF", "L", {}),
        ("TIFF", "LA", {}),
        ("TIFF", "P", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGBA", {}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "I;16", {"compression": "tiff_lzw"}),
        ("TIFF", "F", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"lossless": True}),
    ],
)
def test_a_canonical_image_comes_back_from_a_lossless_file_unchanged(
    format: str, mode: str, options: dict[str, Any], canonical_digits: Pixels
) -> None:
    for digit in canonical_digits:
        image = Image.fromarray(digit)
        if mode == "I;16":
            image = Image.fromarray(digit.astype(np.uint16) * 257)
        elif mode == "CMYK":
            image = image.convert("RGB").convert("CMYK")
        elif mode != "L":
            image = image.convert(mode)
        assert image.mode == mode
        np.testing.assert_array_equal(to_pixels(encode(image, format, **options)), digit)


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "TIFF"])
def test_a_canonical_image_of_one_bit_a_pixel_comes_back_unchanged(format: str, canonical_digits: Pixels) -> None:
    bilevel = [np.where(digit > 0, 255, 0).astype(np.uint8) for digit in canonical_digits]
    bilevel = [digit for digit in bilevel if is_canonical(digit)]
    assert len(bilevel) >= 5
    for digit in bilevel:
        file = encode(Image.fromarray(digit).convert("1", dither=Image.Dither.NONE), format)
        np.testing.assert_array_equal(to_pixels(file), digit)


# Forms ----------------------------------------------------------------------


FORMS: dict[str, Callable[[Pixels, Path], Any]] = {
    "path as text": lambda grey, path: str(path),
    "path": lambda grey, path: path,
    "bytes": lambda grey, path: path.read_bytes(),
    "bytearray": lambda grey, path: bytearray(path.read_bytes()),
    "memoryview": lambda grey, path: memoryview(path.read_bytes()),
    "file object": lambda grey, path: io.BytesIO(path.read_bytes()),
    "file object at its end": lambda grey, path: _at_its_end(path),
    "PIL image": lambda grey, path: Image.fromarray(grey),
    "PIL image, not loaded yet": lambda grey, path: Image.open(io.BytesIO(path.read_bytes())),
    "uint8[h, w]": lambda grey, path: grey,
    "uint8[h, w], read-only": lambda grey, path: np.frombuffer(grey.tobytes(), np.uint8).reshape(grey.shape),
    "uint8[h, w], not contiguous": lambda grey, path: np.repeat(grey, 2, axis=1)[:, ::2],
    "uint8[h, w, 1]": lambda grey, path: grey[:, :, None],
    "uint8[h, w, 3]": lambda grey, path: np.stack([grey] * 3, axis=2),
    "uint8[h, w, 4]": lambda grey, path: np.stack([grey] * 3 + [np.full_like(grey, 255)], axis=2),
    "float16[h, w]": lambda grey, path: (grey / 255).astype(np.float16),
    "float32[h, w]": lambda grey, path: (grey / 255).astype(np.float32),
    "float64[h, w]": lambda grey, path: grey / 255,
    "float32[h, w, 3]": lambda grey, path: np.stack([grey / np.float32(255)] * 3, axis=2),
    "torch uint8[h, w]": lambda grey, path: torch.from_numpy(grey.copy()),
    "torch float32[h, w]": lambda grey, path: torch.from_numpy(grey.copy()) / 255,
}


def _at_its_end(path: Path) -> io.BytesIO:
    file = io.BytesIO(path.read_bytes())
    file.read()
    return file


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["canonical", "large"])
def test_every_form_gives_the_same_pixels(form: str, name: str, three: Pixels, tmp_path: Path) -> None:
    grey = three if name == "canonical" else draw_seven(100)
    path = tmp_path / "digit.png"
    path.write_bytes(encode(Image.fromarray(grey), "PNG"))
    image: ImageLike = FORMS[form](grey, path)
    np.testing.assert_array_equal(to_pixels(image), to_pixels(grey))


def test_an_array_is_not_written_to(three: Pixels) -> None:
    for grey in (three.copy(), 255 - three, draw_seven(100).copy()):
        before = grey.copy()
        to_pixels(grey)
        np.testing.assert_array_equal(grey, before)


def test_a_boolean_array_is_black_and_white() -> None:
    seven = draw_seven(100) > 127
    np.testing.assert_array_equal(to_pixels(seven), to_pixels(seven.astype(np.uint8) * 255))


# Photography ----------------------------------------------------------------

UNTURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera held so stores an upright image."""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_by_its_exif_orientation(orientation: int, three: Pixels) -> None:
    upright = Image.fromarray(three)
    stored = upright.transpose(UNTURN[orientation]) if orientation in UNTURN else upright
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    file = encode(stored, "PNG", exif=exif)
    np.testing.assert_array_equal(to_pixels(file), three)
    np.testing.assert_array_equal(to_pixels(Image.open(io.BytesIO(file))), three)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_of_a_phone_is_turned_upright(orientation: int) -> None:
    upright = Image.fromarray(draw_seven(1200, paper=230, ink=30)).convert("RGB")
    stored = upright.transpose(UNTURN[orientation]) if orientation in UNTURN else upright
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    assert mean_difference(to_pixels(encode(stored, "JPEG", exif=exif)), to_pixels(upright)) < 2


def test_dark_ink_on_light_paper_equals_light_ink_on_dark_paper() -> None:
    seven = draw_seven(200)
    np.testing.assert_array_equal(to_pixels(255 - seven), to_pixels(seven))


@pytest.mark.parametrize(("paper", "ink"), [(255, 0), (0, 255), (220, 60)])
def test_a_small_digit_on_a_large_page_is_ink_and_the_page_paper(paper: int, ink: int) -> None:
    page = np.full((1000, 1000), paper, np.uint8)
    page[300:420, 500:620] = draw_seven(120, paper, ink)  # its ink covers 0.1 % of the page
    assert mean_difference(to_pixels(page), to_pixels(draw_seven(120))) < 10


def test_paper_that_is_grey_and_ink_that_is_pale_change_little() -> None:
    assert mean_difference(to_pixels(draw_seven(200, paper=200, ink=90)), to_pixels(draw_seven(200))) < 4


def test_transparent_paper_under_black_ink_is_white(three: Pixels) -> None:
    image = Image.merge("LA", [Image.new("L", (SIDE, SIDE), 0), Image.fromarray(three)])
    np.testing.assert_array_equal(to_pixels(image), three)
    np.testing.assert_array_equal(to_pixels(encode(image.convert("RGBA"), "PNG")), three)


def test_white_ink_on_transparent_paper_is_seen(three: Pixels) -> None:
    image = Image.merge("LA", [Image.new("L", (SIDE, SIDE), 255), Image.fromarray(three)])
    np.testing.assert_array_equal(to_pixels(image), three)
    np.testing.assert_array_equal(to_pixels(encode(image.convert("RGBA"), "PNG")), three)


def test_a_transparent_colour_of_a_palette_is_paper(three: Pixels) -> None:
    ink = np.where(three > 0, 1, 0).astype(np.uint8)
    image = Image.fromarray(ink)
    image = image.convert("P")
    image.putpalette([255, 0, 255, 0, 0, 0])
    expected = to_pixels(ink * np.uint8(255))
    np.testing.assert_array_equal(to_pixels(encode(image, "GIF", transparency=0)), expected)
    np.testing.assert_array_equal(to_pixels(encode(image, "PNG", transparency=0)), expected)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (np.uint16, 257),
        (np.uint16, 16383 / 255),
        (np.uint16, 4095 / 255),
        (np.uint16, 1023 / 255),
        (np.uint16, 1),
        (np.int32, 257),
        (np.int32, 1),
        (np.float32, 1),
        (np.float32, 1 / 255),
    ],
    ids=["16 bits", "14 bits", "12 bits", "10 bits", "8 of 16", "I to 65535", "I to 255", "F to 255", "F to 1"],
)
def test_a_deep_image_is_scaled_to_255(dtype: type[np.generic], scale: float, three: Pixels) -> None:
    np.testing.assert_array_equal(
        to_pixels(Image.fromarray((np.rint(three * float(scale)) if scale >= 1 else three * scale).astype(dtype))),
        three,
    )


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr", "HSV", "LA", "La", "RGBA", "RGBa", "P", "I", "F"])
def test_a_mode_changes_little(mode: str) -> None:
    grey = Image.fromarray(draw_seven(100))
    through = {"RGBa": "RGBA", "La": "LA"}.get(mode, "RGB")  # the way on which Pillow gets there
    image = grey.convert(through).convert(mode)
    assert image.mode == mode
    assert mean_difference(to_pixels(image), to_pixels(grey)) < 1


def coloured_seven(side: int) -> Image.Image:
    """Blue on yellowish paper."""
    ink = draw_seven(side)[:, :, None] / 255
    return Image.fromarray((np.array([250, 240, 200]) * (1 - ink) + np.array([20, 40, 160]) * ink).astype(np.uint8))


def test_a_coloured_jpeg_gives_the_same_as_the_image_and_the_array_made_of_it() -> None:
    file = encode(coloured_seven(500), "JPEG")
    image = Image.open(io.BytesIO(file))
    np.testing.assert_array_equal(to_pixels(file), to_pixels(image))
    np.testing.assert_array_equal(to_pixels(file), to_pixels(np.asarray(image)))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("side", [900, 1700, 3300])
def test_a_jpeg_that_is_decoded_at_a_part_of_its_size_changes_little(mode: str, side: int) -> None:
    image = coloured_seven(side).convert(mode)
    assert mean_difference(to_pixels(encode(image, "JPEG", quality=90)), to_pixels(image)) < 4


def test_a_cmyk_jpeg_is_read() -> None:
    grey = Image.fromarray(draw_seven(200))
    file = encode(grey.convert("RGB").convert("CMYK"), "JPEG", quality=95)
    assert mean_difference(to_pixels(file), to_pixels(grey)) < 2


def test_the_previews_of_a_phones_mpo_file_are_left_out() -> None:
    photo = Image.fromarray(draw_seven(200)).convert("RGB")
    file = encode(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (40, 40))], quality=95)
    assert Image.open(io.BytesIO(file)).format == "MPO"
    assert mean_difference(to_pixels(file), to_pixels(photo)) < 2


# Geometry -------------------------------------------------------------------


@pytest.mark.parametrize("side", [28, 32, 50, 100, 280, 500, 1000, 2000])
def test_the_size_of_a_drawing_changes_little(side: int) -> None:
    assert mean_difference(to_pixels(draw_seven(side)), to_pixels(draw_seven(280))) < (10 if side < 50 else 4)


@pytest.mark.parametrize("top", [0, 37, 150])
@pytest.mark.parametrize("left", [0, 75, 150])
def test_the_place_of_a_drawing_changes_nothing(top: int, left: int) -> None:
    seven = draw_seven(100)
    canvas = np.zeros((250, 250), np.uint8)
    canvas[top : top + 100, left : left + 100] = seven
    np.testing.assert_array_equal(to_pixels(canvas), to_pixels(seven))


@pytest.mark.parametrize("shape", [(100, 20), (20, 100), (60, 60)])
def test_the_ink_lies_inside_with_a_longer_side_of_20_and_its_aspect_kept(shape: tuple[int, int]) -> None:
    height, width = shape
    image = np.full((200, 300), 250, np.uint8)
    image[30 : 30 + height, 40 : 40 + width] = 10
    pixels = to_pixels(image)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (SIDE, SIDE)
    assert pixels.max() == 255
    rows, columns = (np.flatnonzero(pixels.any(axis=axis)) for axis in (1, 0))
    scale = INK_SIDE / max(shape)
    assert (len(rows), len(columns)) == (max(1, round(height * scale)), max(1, round(width * scale)))
    assert is_canonical(pixels)


@pytest.mark.parametrize("shape", [(2, 100), (100, 2), (1, 150)])
def test_a_hair_line_becomes_as_wide_as_mnists_strokes(shape: tuple[int, int]) -> None:
    height, width = shape
    image = np.full((200, 300), 250, np.uint8)
    image[30 : 30 + height, 40 : 40 + width] = 10
    pixels = to_pixels(image)
    rows, columns = (np.flatnonzero((pixels > 60).any(axis=axis)) for axis in (1, 0))
    assert max(len(rows), len(columns)) == INK_SIDE
    assert 2 <= min(len(rows), len(columns)) <= 3
    assert is_canonical(pixels)


def test_the_grain_of_paper_leaves_no_ink() -> None:
    noise = np.random.default_rng(0).integers(-12, 13, (200, 200))
    photo = np.clip(draw_seven(200, paper=210, ink=40) + noise, 0, 255).astype(np.uint8)
    assert mean_difference(to_pixels(photo), to_pixels(draw_seven(200))) < 8


# Features -------------------------------------------------------------------


def test_features_are_those_of_the_origins_formula_bit_for_bit() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(784).reshape(256, 784)
    formula = (torch.from_numpy(pixels).to(torch.float32) / 255 - 0.5) / 0.5
    features = normalize(pixels)
    assert features.dtype == np.float32
    assert features.tobytes() == formula.numpy().tobytes()
    assert (features.min(), features.max()) == (-1, 1)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.1307, 0.3081)])
def test_features_are_those_of_torchvision_bit_for_bit(mean: float, std: float) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    chain = transforms.Compose([transforms.ToTensor(), transforms.Normalize((mean,), (std,))])
    image = np.arange(784, dtype=np.int64).astype(np.uint8).reshape(SIDE, SIDE)  # every grey level
    assert normalize(image.reshape(1, 784), mean, std).tobytes() == chain(Image.fromarray(image)).numpy().tobytes()


def test_features_are_new_and_the_pixels_stay(three: Pixels) -> None:
    before = three.copy()
    normalize(three.reshape(1, 784))
    np.testing.assert_array_equal(three, before)


def test_exif_orientations_are_undone_as_pillow_does_it(three: Pixels) -> None:
    """The table above is right: Pillow turns what it says back to the upright image."""
    for orientation, turn in UNTURN.items():
        stored = Image.fromarray(three).transpose(turn)
        stored.getexif()[EXIF_ORIENTATION] = orientation
        np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(stored)), three)
