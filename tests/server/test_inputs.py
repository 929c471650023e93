"""Every rule of the wire is checked before anything is queued."""

from __future__ import annotations

import io
import struct

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.errors import InvalidArgument
from server.inputs import collect, count_images, decode, read_buffer

Golden = tuple[npt.NDArray[np.uint8], list[int]]


def features_with(*bad: tuple[int, int, float], rows: int = 4) -> pb.ClassifyRequest:
    features = np.zeros((rows, 784), "<f4")
    for row, column, value in bad:
        features[row, column] = value
    return pb.ClassifyRequest(features=features.tobytes())


def test_pixels_are_viewed_as_rows(golden: Golden) -> None:
    inputs = read_buffer(pb.ClassifyRequest(pixels=golden[0].tobytes()))
    assert (inputs.count, inputs.errors) == (20, {})
    assert (inputs.rows.shape, str(inputs.rows.dtype)) == ((20, 784), "uint8")
    assert np.array_equal(inputs.rows, golden[0])
    assert not inputs.rows.flags.owndata


def test_features_are_viewed_as_little_endian_floats() -> None:
    inputs = read_buffer(pb.ClassifyRequest(features=struct.pack("<784f", *range(784)) * 2))
    assert (inputs.count, inputs.errors) == (2, {})
    assert inputs.rows.dtype == np.float32
    assert inputs.rows.tolist() == [list(range(784))] * 2
    assert not inputs.rows.flags.owndata


@pytest.mark.parametrize("length", [1, 783, 785, 1569])
def test_pixels_are_a_whole_number_of_images(length: int) -> None:
    with pytest.raises(InvalidArgument, match=f"^pixels: 784 bytes an image, but {length} bytes are no whole") as error:
        read_buffer(pb.ClassifyRequest(pixels=bytes(length)))
    assert error.value.field == "pixels"


@pytest.mark.parametrize("length", [784, 3135, 3137])
def test_features_are_a_whole_number_of_images(length: int) -> None:
    with pytest.raises(InvalidArgument, match=f"^features: 3136 bytes an image, but {length} bytes") as error:
        read_buffer(pb.ClassifyRequest(features=bytes(length)))
    assert error.value.field == "features"


@pytest.mark.parametrize("request_", [pb.ClassifyRequest(pixels=b""), pb.ClassifyRequest(features=b"")], ids=str)
def test_a_request_carries_an_image(request_: pb.ClassifyRequest) -> None:
    with pytest.raises(InvalidArgument, match="carries 1 or more images, this one carries 0"):
        read_buffer(request_)


def test_one_of_the_forms_is_set() -> None:
    with pytest.raises(InvalidArgument, match="exactly one of pixels, features and encoded is set") as error:
        read_buffer(pb.ClassifyRequest(include_logits=True))
    assert error.value.field == "images"


def test_features_that_are_not_finite_are_named_and_the_others_kept() -> None:
    request = features_with((1, 3, np.nan), (3, 783, -np.inf), (3, 5, np.inf), (2, 0, 7))
    inputs = read_buffer(request)
    assert inputs.count == 4
    assert inputs.rows[:, 0].tolist() == [0, 7]
    assert {index: str(error) for index, error in inputs.errors.items()} == {
        1: "features: every value is finite and from -1000000 to 1000000, but image 1 holds nan at position 3",
        3: "features: every value is finite and from -1000000 to 1000000, but image 3 holds inf at position 5",
    }


def test_features_of_which_none_is_finite_leave_no_rows() -> None:
    inputs = read_buffer(features_with((0, 0, np.nan), (1, 0, np.nan), rows=2))
    assert (inputs.count, inputs.rows.shape, sorted(inputs.errors)) == (2, (0, 784), [0, 1])


@given(st.binary(max_size=4 * 784))
def test_any_bytes_as_pixels_are_rows_or_an_error_that_tells_the_length(content: bytes) -> None:
    request = pb.ClassifyRequest(pixels=content)
    if content and len(content) % 784 == 0:
        assert read_buffer(request).rows.tobytes() == content
    else:
        with pytest.raises(InvalidArgument, match=f" {len(content)}( |$)"):
            read_buffer(request)


@pytest.mark.parametrize(
    ("request_", "count"),
    [
        (pb.ClassifyRequest(), 1),
        (pb.ClassifyRequest(pixels=b""), 1),
        (pb.ClassifyRequest(pixels=bytes(784)), 1),
        (pb.ClassifyRequest(pixels=bytes(785)), 2),
        (pb.ClassifyRequest(pixels=bytes(7840)), 10),
        (pb.ClassifyRequest(features=bytes(3136)), 1),
        (pb.ClassifyRequest(features=bytes(3137)), 2),
        (pb.ClassifyRequest(encoded=pb.EncodedImages()), 1),
        (pb.ClassifyRequest(encoded=pb.EncodedImages(files=[b"", b"", b""])), 3),
    ],
)
def test_the_number_of_images_is_known_before_any_is_checked(request_: pb.ClassifyRequest, count: int) -> None:
    assert count_images(request_) == count


def test_files_become_pixels_in_their_order(golden: Golden, golden_files: list[bytes]) -> None:
    inputs = collect([decode(file) for file in golden_files])
    assert (inputs.count, inputs.errors) == (20, {})
    assert np.array_equal(inputs.rows, golden[0])


def test_a_bad_file_is_named_by_its_index_and_the_others_are_kept(golden: Golden, golden_files: list[bytes]) -> None:
    inputs = collect([decode(file) for file in (golden_files[0], b"not an image", golden_files[2], b"")])
    assert inputs.count == 4
    assert np.array_equal(inputs.rows, golden[0][[0, 2]])
    assert sorted(inputs.errors) == [1, 3]
    assert [error.field for error in inputs.errors.values()] == ["encoded.files[1]", "encoded.files[3]"]
    assert str(inputs.errors[3]) == "encoded.files[3]: the file is empty (0 bytes)"


def test_files_of_which_none_is_an_image_leave_no_rows() -> None:
    assert collect([decode(b"a"), decode(b"b")]).rows.shape == (0, 784)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged tags and of great sizes
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_an_image_or_an_error_and_nothing_else(file_format: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    digit = Image.new("L", (40, 40))
    digit.paste(255, (15, 5, 22, 35))
    digit.save(buffer, file_format)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    inputs = collect([decode(bytes(content[: data.draw(st.integers(0, len(content)))]))])
    assert len(inputs.rows) + len(inputs.errors) == 1
