"""Frames of real files: their number, times and direction, and what is said where there are none."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from client.video import InvalidVideoError, MissingExtraError
from client.video.reading import open_video

pytest.importorskip("av")

Pixels = npt.NDArray[np.uint8]
WriteVideo = Callable[..., Path]


def grey_frames(count: int, height: int = 48, width: int = 64) -> list[Pixels]:
    """Each of another tone."""
    return [np.full((height, width, 3), 20 + 5 * index, np.uint8) for index in range(count)]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_all_frames_come_in_order_with_their_times(
    tmp_path: Path, write_video: WriteVideo, name: str, codec: str
) -> None:
    with open_video(write_video(tmp_path / name, grey_frames(20), codec=codec)) as video:
        assert (video.rate, video.frame_count, video.live) == (25, 20, False)
        frames = list(video.frames())
    assert [frame.index for frame in frames] == list(range(20))
    assert [frame.seconds for frame in frames] == pytest.approx([index / 25 for index in range(20)], abs=0.001)
    assert [frame.pixels.mean() for frame in frames] == pytest.approx([20 + 5 * index for index in range(20)], abs=3)
    assert all(frame.pixels.shape == (48, 64, 3) and frame.pixels.dtype == np.uint8 for frame in frames)


def test_a_variable_rate_of_frames_keeps_its_times(tmp_path: Path, write_video: WriteVideo) -> None:
    times = [0, 0.04, 0.5, 0.55, 2.0, 2.01, 3.3]
    with open_video(write_video(tmp_path / "a.mp4", grey_frames(7), times)) as video:
        assert [frame.seconds for frame in video.frames()] == pytest.approx(times, abs=0.002)


def test_every_third_frame_or_ten_a_second_may_be_asked_for(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "a.mp4", grey_frames(25))
    with open_video(path) as video:
        assert [frame.index for frame in video.frames(every=3)] == list(range(0, 25, 3))
    with open_video(path) as video:
        assert [frame.index for frame in video.frames(fps=10)] == [0, 3, 5, 8, 10, 13, 15, 18, 20, 23]
    with open_video(path) as video:
        assert len(list(video.frames(fps=100))) == 25


def test_frames_a_second_hold_at_a_variable_rate(tmp_path: Path, write_video: WriteVideo) -> None:
    times = [index / 100 for index in range(40)] + [3.0, 3.02, 3.5]
    with open_video(write_video(tmp_path / "a.mp4", grey_frames(43), times)) as video:
        given = [frame.seconds for frame in video.frames(fps=10)]
    assert given == pytest.approx([0, 0.1, 0.2, 0.3, 3.0, 3.5], abs=0.002)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_phones_rotated_video_is_turned_upright(tmp_path: Path, write_video: WriteVideo, rotation: int) -> None:
    upright = np.full((64, 48, 3), 200, np.uint8)
    upright[:20, :20] = 30  # dark in the upper left
    stored = np.ascontiguousarray(np.rot90(upright, -rotation // 90))
    with open_video(write_video(tmp_path / "a.mp4", [stored] * 3, rotation=rotation)) as video:
        frame = next(video.frames())
    assert frame.pixels.shape == (64, 48, 3)
    assert frame.pixels[5:15, 5:15].mean() < 60
    assert frame.pixels[40:, 30:].mean() > 170


def test_a_file_that_breaks_off_gives_the_frames_that_are_there(tmp_path: Path, write_video: WriteVideo) -> None:
    noise = list(np.random.default_rng(0).integers(0, 256, (25, 48, 64, 3), np.uint8))
    path = write_video(tmp_path / "a.mkv", noise)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with open_video(path) as video:
        assert 1 <= len(list(video.frames())) < 25


def sound(path: Path) -> None:
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "cannot be opened: No such file or directory"),
        (lambda path: path.mkdir(), "is a folder, not a video"),
        (lambda path: path.write_bytes(b""), "is no video of a known format, or is damaged"),
        (lambda path: path.write_bytes(b"no video" * 999), "is no video of a known format, or is damaged"),
        (sound, "holds no video, only sound"),
    ],
    ids=["missing", "folder", "empty", "text", "sound"],
)
def test_what_is_no_video_is_named_with_its_path(tmp_path: Path, make: Callable[[Path], object], says: str) -> None:
    path = tmp_path / "clip.mkv"
    make(path)
    with pytest.raises(InvalidVideoError) as caught:
        open_video(path)
    assert str(caught.value) == f"{str(path)!r} {says}"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "a.mp4", grey_frames(2))
    path.chmod(0)
    with pytest.raises(InvalidVideoError, match=r"a\.mp4' cannot be opened: Permission denied"):
        open_video(path)


@pytest.mark.skipif(sys.platform != "linux", reason="cameras are files only there")
@pytest.mark.parametrize(
    ("number", "says"), [(63, "camera 63 cannot be opened: No such file"), (-1, "there is no camera -1")]
)
def test_a_camera_that_is_not_there_is_named(number: int, says: str) -> None:
    with pytest.raises(InvalidVideoError, match=says):
        open_video(number)


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mnist-grpc\[video\]'"):
        open_video("clip.mp4")
