"""What `to_pixels` refuses: always with InvalidImage, naming the rule and the value, and never at a high price."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from digits.preprocessing import SIDE, InvalidImage, to_pixels

Pixels = npt.NDArray[np.uint8]

INK = Image.new("L", (40, 40))
INK.paste(255, (15, 8, 25, 32))
PAPER = Image.new("L", (40, 40), 255)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, format, **options)  # Pillow keeps options of the last save in the image
    return buffer.getvalue()


def flip(file: bytes, chunk: bytes, offset: int) -> bytes:
    """The file with one byte of a PNG chunk turned over; its CRC is wrong then."""
    damaged = bytearray(file)
    damaged[file.index(chunk) + offset] ^= 0xFF
    return bytes(damaged)


def png_of_black(side: int) -> bytes:
    """A PNG of one bit a pixel, made without making the image."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (1 + side // 8)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


PNG = encode(INK, "PNG")
JPEG = encode(INK.resize((200, 200)), "JPEG")

BAD_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", r"empty \(0 bytes\)"),
    "text": (lambda: b"a letter to the editor\n" * 9, "the file is no image file of a known format"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "the file is no image file of a known format"),
    "5 MB of noise": (lambda: np.random.default_rng(0).bytes(5_000_000), "the file is no image file of a known format"),
    "PNG cut in its header": (lambda: PNG[:20], "the file (cannot be read|is no image file)"),
    "PNG cut in its data": (lambda: PNG[: len(PNG) * 2 // 3], "the file cannot be read: .*truncated"),
    "JPEG cut in its data": (lambda: JPEG[: len(JPEG) * 2 // 3], "the file cannot be read: .*truncated"),
    "GIF cut in its second frame": (lambda: encode(INK, "GIF")[:-1] + b",", "the file cannot be read: "),
    "PNG with a wrong CRC of its header": (lambda: flip(PNG, b"IHDR", 17), "(cannot be read|is no image file)"),
    "PNG with a wrong CRC of its data": (lambda: flip(PNG, b"IDAT", 8), "the file cannot be read: "),
    "1x1": (lambda: encode(Image.new("L", (1, 1)), "PNG"), "at least 4x4 pixels, this one is 1x1"),
    "3 high": (lambda: encode(Image.new("L", (100, 3)), "PNG"), "at least 4x4 pixels, this one is 100x3"),
    "30 million pixels": (
        lambda: encode(Image.new("1", (30_000, 1_000)), "PNG"),
        "at most 24000000 pixels, this one has 30000x1000",
    ),
    "70 million pixels of JPEG": (
        lambda: encode(Image.new("L", (35_000, 2_000)), "JPEG"),
        "at most 64000000 pixels, this one has 35000x2000",
    ),
    "100 million pixels": (lambda: png_of_black(10_000), "10000"),
    "blank, white": (lambda: encode(PAPER, "PNG"), "contrast of 16 of 255 or more, this one has 0"),
    "nearly blank": (
        lambda: encode(Image.fromarray(np.arange(225, dtype=np.uint8).reshape(15, 15) // 16 + 200), "PNG"),
        "contrast of 16 of 255 or more, this one has 14",
    ),
    "blank, transparent": (lambda: encode(Image.new("RGBA", (28, 28)), "PNG"), "contrast of 16 of 255 or more"),
    "animated GIF": (
        lambda: encode(INK, "GIF", save_all=True, append_images=[PAPER]),
        r"a single frame, the file \(GIF\) has",
    ),
    "animated PNG": (
        lambda: encode(INK, "PNG", save_all=True, append_images=[PAPER]),
        r"a single frame, the file \(PNG\) has",
    ),
    "animated WebP": (
        lambda: encode(INK.convert("RGB"), "WEBP", save_all=True, append_images=[PAPER.convert("RGB")]),
        r"a single frame, the file \(WEBP\) has",
    ),
    "TIFF of two pages": (
        lambda: encode(INK, "TIFF", save_all=True, append_images=[PAPER]),
        r"a single frame, the file \(TIFF\) has",
    ),
    "PPM, a format that is not opened": (lambda: encode(INK, "PPM"), "the file is no image file of a known format"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_the_rule_and_the_value(name: str) -> None:
    make, message = BAD_FILES[name]
    with pytest.raises(InvalidImage, match=message):
        to_pixels(make())


def test_a_bad_file_on_disk_is_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_bytes(b"not an image")
    for path in (text, tmp_path / "missing.png", tmp_path):
        with pytest.raises(InvalidImage, match=path.name):
            to_pixels(path)
        with pytest.raises(InvalidImage, match=path.name):
            to_pixels(str(path))


def _closed_file() -> io.BytesIO:
    file = io.BytesIO(PNG)
    file.close()
    return file


def _closed_image() -> Image.Image:
    image = INK.copy()
    image.close()
    return image


BAD_OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "this is of type NoneType"),
    "int": (lambda: 7, "this is of type int"),
    "list": (lambda: [[0, 255], [255, 0]], "this is of type list"),
    "text file": (lambda: io.StringIO("text"), "the file cannot be read: "),
    "closed file": (_closed_file, "the file cannot be read: .*closed"),
    "closed PIL image": (_closed_image, "the image cannot be read: .*closed"),
    "path of no file": (lambda: "no\0file.png", "cannot be read: "),
    "PIL image cut short": (lambda: Image.open(io.BytesIO(PNG[: len(PNG) * 2 // 3])), "the image cannot be read"),
    "PIL image 3 high": (lambda: Image.new("L", (100, 3)), "at least 4x4 pixels, this one is 100x3"),
    "PIL image of NaN": (lambda: Image.new("F", (28, 28), float("nan")), "finite values"),
    "uint8[784]": (lambda: np.zeros(784, np.uint8), r"\[h, w, 1\|3\|4\], this one is uint8\[784\]"),
    "uint8[]": (lambda: np.uint8(3), r"this one is uint8\[\]"),
    "uint8[28, 28, 2]": (lambda: np.zeros((28, 28, 2), np.uint8), r"this one is uint8\[28, 28, 2\]"),
    "uint8[1, 28, 28, 1]": (lambda: np.zeros((1, 28, 28, 1), np.uint8), r"this one is uint8\[1, 28, 28, 1\]"),
    "uint8[0, 28]": (lambda: np.zeros((0, 28), np.uint8), "this one is 28x0"),
    "float32[28, 0]": (lambda: np.zeros((28, 0), np.float32), "this one is 0x28"),
    "int64": (lambda: np.zeros((28, 28), np.int64), r"uint8, or float from 0 to 1; this one is int64\[28, 28\]"),
    "complex": (lambda: np.zeros((28, 28), np.complex64), "this one is complex64"),
    "texts": (lambda: np.full((28, 28), "7"), "this one is <U1"),
    "objects": (lambda: np.full((28, 28), None), "this one is object"),
    "floats to 255": (lambda: np.asarray(INK).astype(np.float32), r"from 0 to 1, this float32\[40, 40\] holds 255"),
    "floats below 0": (lambda: np.full((28, 28), -0.5), "holds -0.5"),
    "floats a little above 1": (lambda: np.full((28, 28), 1.01), "holds 1.01"),
    "NaN": (lambda: np.full((28, 28), np.nan), "holds nan"),
    "a single NaN": (lambda: np.where(np.eye(28) > 0, np.nan, 0.5), "holds nan"),
    "infinity": (lambda: np.full((28, 28), np.inf), "holds inf"),
    "blank array": (lambda: np.zeros((28, 28), np.uint8), "contrast of 16 of 255 or more, this one has 0"),
    "tensor that wants a gradient": (lambda: torch.rand(28, 28, requires_grad=True), "grad"),
    "tensor of bfloat16": (lambda: torch.rand(28, 28, dtype=torch.bfloat16), "(?i)bfloat16"),
    "tensor that is sparse": (lambda: torch.eye(28).to_sparse(), "(?i)sparse"),
    "memoryview with gaps": (lambda: memoryview(PNG * 2)[::2], "contiguous"),
}


@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_a_bad_object_is_refused_with_the_rule_and_the_value(name: str) -> None:
    make, message = BAD_OBJECTS[name]
    with pytest.raises(InvalidImage, match=message):
        to_pixels(make())


# Price ----------------------------------------------------------------------


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = png_of_black(20_000)
    assert len(bomb) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(InvalidImage, match=r"too large|at most"):
            to_pixels(bomb)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000  # decoded it would be 400 million pixels


def test_the_many_pages_of_a_tiff_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """To walk to the last page takes time that grows with the square of their number."""
    pages = 50
    file = encode(INK, "TIFF", save_all=True, append_images=[INK] * (pages - 1))
    seeks: list[int] = []
    with Image.open(io.BytesIO(file)) as opened:
        kind = type(opened)
        original = kind._seek  # type: ignore[attr-defined]

    def counted(self: Any, frame: int) -> None:
        seeks.append(frame)
        original(self, frame)

    monkeypatch.setattr(kind, "_seek", counted)
    with pytest.raises(InvalidImage, match="a single frame"):
        to_pixels(file)
    assert len(seeks) < 5


def test_a_failed_path_is_closed_again(tmp_path: Path) -> None:
    """An unclosed file would be a ResourceWarning, and warnings are errors."""
    path = tmp_path / "cut.png"
    path.write_bytes(PNG[: len(PNG) * 2 // 3])
    with pytest.raises(InvalidImage):
        to_pixels(path)


# Anything at all ------------------------------------------------------------

FILES = [
    PNG,
    JPEG,
    encode(INK, "BMP"),
    encode(INK, "GIF"),
    encode(INK, "TIFF"),
    encode(INK, "TIFF", compression="tiff_lzw"),
    encode(INK.convert("RGBA"), "WEBP", lossless=True),
    encode(INK.convert("P"), "PNG", transparency=0),
    encode(Image.fromarray(np.asarray(INK).astype(np.uint16) * 257), "PNG"),
]

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
# Pillow warns of what it mends in a damaged file; here only errors count.
pillow_may_warn = pytest.mark.filterwarnings("ignore::Warning")


def is_refused_or_read(image: Any) -> None:
    try:
        pixels = to_pixels(image)
    except InvalidImage:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape == (SIDE, SIDE)


@pillow_may_warn
@settings(quick, max_examples=200)
@given(st.binary(max_size=2_000))
def test_no_bytes_raise_anything_but_invalid_image(content: bytes) -> None:
    is_refused_or_read(content)


@pillow_may_warn
@settings(quick, max_examples=200)
@given(st.sampled_from(FILES), st.binary(max_size=500))
def test_no_bytes_behind_the_first_bytes_of_a_format_raise_anything_else(file: bytes, content: bytes) -> None:
    is_refused_or_read(file[:12] + content)


@pillow_may_warn
@settings(quick, max_examples=1_000)
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0.05, 1),
)
def test_no_damaged_file_raises_anything_else(file: bytes, changes: list[tuple[float, int]], kept: float) -> None:
    damaged = bytearray(file)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    is_refused_or_read(bytes(damaged[: max(1, int(kept * len(damaged)))]))
    is_refused_or_read(bytes(damaged))


SHAPES = st.one_of(
    npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=40),
    st.tuples(st.integers(4, 60), st.integers(4, 60)),
    st.tuples(st.integers(4, 30), st.integers(4, 30), st.sampled_from([1, 3, 4])),
)
ARRAYS = st.one_of(
    npst.arrays(np.uint8, SHAPES),
    npst.arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 1, 15, 16, 17, 128, 239, 254, 255])),
    npst.arrays(np.float32, SHAPES, elements=st.floats(0, 1, width=32)),
    npst.arrays(np.bool_, SHAPES),
    npst.arrays(npst.scalar_dtypes(), SHAPES),
)


@settings(quick, max_examples=500)
@given(ARRAYS)
@example(np.eye(28, dtype=np.uint8) * np.uint8(16))
@example(np.pad(np.full((1, 1), 255, np.uint8), 5))
def test_no_array_raises_anything_else(array: npt.NDArray[Any]) -> None:
    is_refused_or_read(array)


@pytest.mark.parametrize(("height", "width"), [(6_000, 6_000), (4, 1_000_000), (1_000_000, 4), (2_000, 2_000)])
@pytest.mark.parametrize("paper", [0, 255])
def test_a_speck_that_vanishes_when_scaled_down_raises_nothing_else(height: int, width: int, paper: int) -> None:
    image = np.full((height, width), paper, np.uint8)
    image[height // 2, width // 2] = 255 - paper
    is_refused_or_read(image)


def test_a_chessboard_of_pixels_raises_nothing_else() -> None:
    is_refused_or_read((np.indices((560, 560)).sum(axis=0) % 2 * 255).astype(np.uint8))
