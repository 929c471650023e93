"""Annotated videos: what is drawn, and that the file plays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from client.video import Box, Digit, InvalidVideoError
from client.video.annotating import VideoWriter, draw_digits

av = pytest.importorskip("av")

Pixels = npt.NDArray[np.uint8]


def digit(box: Box, *, seen: bool = True) -> Digit:
    return Digit(1, box, 7, 0.97, np.full(10, 0.1, np.float32), seen)


@pytest.mark.parametrize(
    "box", [Box(100, 80, 150, 140), Box(0, 0, 40, 50), Box(280, 200, 320, 240), Box(-5, -5, 330, 250)]
)
def test_a_box_and_a_label_are_drawn_around_the_digit_and_not_over_it(box: Box) -> None:
    plain = np.full((240, 320, 3), 255, np.uint8)
    drawn = draw_digits(plain, [digit(box)])
    assert plain.min() == 255
    assert drawn.shape == plain.shape
    changed = (drawn != 255).any(axis=2)
    assert changed.any()
    inside = changed[max(box.top, 0) : box.bottom, max(box.left, 0) : box.right]
    assert inside.mean() < 0.1


def test_a_digit_that_was_not_seen_has_a_thinner_box() -> None:
    plain = np.full((240, 320, 3), 255, np.uint8)
    seen, guessed = (draw_digits(plain, [digit(Box(100, 80, 150, 140), seen=seen)]) for seen in (True, False))
    assert (seen != 255).sum() > (guessed != 255).sum()


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "h264"), ("a.mov", "h264"), ("a.mkv", "h264"), ("a.webm", "vp9")]
)
def test_what_is_written_plays_with_its_times_also_where_a_side_is_odd(tmp_path: Path, name: str, codec: str) -> None:
    times = [0, 0.04, 0.5, 0.52, 2.0]
    with VideoWriter(tmp_path / name, 25) as writer:
        for index, seconds in enumerate(times):
            writer.write(np.full((121, 161, 3), 50 * index, np.uint8), seconds)
    assert writer.frame_count == 5
    with av.open(tmp_path / name) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (stream.codec_context.name.removeprefix("lib"), stream.pix_fmt) in {
            (codec, "yuv420p"),
            ("vpx-vp9", "yuv420p"),
        }
    assert [frame.time for frame in frames] == pytest.approx(times, abs=0.002)
    assert (frames[0].width, frames[0].height) == (160, 120)
    assert [frame.to_ndarray(format="rgb24").mean() for frame in frames] == pytest.approx([0, 50, 100, 150, 200], abs=4)


def test_a_browser_can_begin_to_play_an_mp4_before_all_of_it_is_there(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 25) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8), 0)
    content = (tmp_path / "a.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_an_exception_on_the_way_leaves_a_file_that_plays(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with VideoWriter(tmp_path / "a.mp4", 25) as writer:
            for index in range(8):
                writer.write(np.zeros((48, 64, 3), np.uint8), index / 25)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    with av.open(tmp_path / "a.mp4") as container:
        assert len(list(container.decode(video=0))) == 8


def test_frames_of_another_size_are_fitted(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 25) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8), 0)
        writer.write(np.zeros((96, 128, 3), np.uint8), 0.04)
    with av.open(tmp_path / "a.mp4") as container:
        assert {(frame.width, frame.height) for frame in container.decode(video=0)} == {(64, 48)}


def test_without_a_frame_no_file_is_left(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 25) as writer:
        pass
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_an_ending_that_is_none_of_these_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidVideoError, match=r"ends in \.mp4.*'.*a\.gif' does not"):
        VideoWriter(tmp_path / "a.gif", 25)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidVideoError, match=r"missing.a\.mp4' cannot be written: No such file or directory"):
        VideoWriter(tmp_path / "missing" / "a.mp4", 25)
