"""Whole videos through the real service: rates, order, and ends of all kinds."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

import client
from client.video import InvalidVideoError, VideoReader, read_video

pytest.importorskip("av")

if TYPE_CHECKING:
    from tests.client.conftest import Fakes
    from tests.client.video.conftest import Clip

Pixels = npt.NDArray[np.uint8]


@pytest.mark.parametrize(("background", "ink"), [("squared", "dark"), ("stone", "both"), ("board", "light")])
def test_digits_on_moving_textures_are_found_followed_and_read(
    tmp_path: Path,
    bench_video: Callable[[str], ModuleType],
    digits: list[Pixels],
    server_address: str,
    background: str,
    ink: str,
) -> None:
    synthesis, scoring = bench_video("synthesis"), bench_video("scoring")
    scene = synthesis.Scene(background, ink, 21, width=480, height=360, seconds=2.0)
    path, truths, order = tmp_path / "clip.mp4", [], [1, 2, 3, 5, 7, 0]

    def frames() -> Iterator[Pixels]:
        for frame, present in synthesis.synthesise(scene, np.stack([digits[number] for number in order]), order):
            truths.append(present)
            yield frame

    synthesis.encode(path, frames(), scene.fps)
    with client.Client(server_address) as digit_client:
        shown = [(frame.seconds, frame.digits) for frame in read_video(path, client=digit_client)]
    score = scoring.score_shown(shown, truths)
    assert score.frames == 50
    assert score.digits >= 4
    assert score.recall >= 0.9
    assert score.track_reading >= 0.8
    assert score.false_tracks == 0


def test_frames_come_in_order_with_their_pixels_and_typed_digits(clip: Clip, server_address: str) -> None:
    with client.Client(server_address) as digits, VideoReader(clip.path, client=digits, every=2) as video:
        assert (video.rate, video.frame_count, video.live) == (12.5, 25, False)
        frames = list(video)
    assert [frame.index for frame in frames] == list(range(0, 50, 2))
    assert all(frame.pixels.shape == (360, 480, 3) for frame in frames)
    last = frames[-1].digits
    assert [digit.track for digit in last] == sorted({digit.track for digit in last})
    assert len(last) >= 4
    assert all(0 <= digit.digit <= 9 and 0 < digit.confidence <= 1 for digit in last)


def test_a_whole_video_is_one_stream_of_packed_messages(clip: Clip, fakes: Fakes) -> None:
    calls, messages, crops = itertools.count(), itertools.count(), itertools.count()

    def stream(requests: Iterable[Any], _: Any) -> Iterator[Any]:
        from protos.mnist.v1 import digit_classifier_pb2 as pb

        next(calls)
        for request in requests:
            next(messages)
            count = len(request.frames.pixels) // 784
            for _ in range(count):
                next(crops)
            result = pb.ClassifyResponse(digits=[7] * count, probabilities=[*[0.01] * 7, 0.91, 0.01, 0.01] * count)
            block = pb.FrameBlock(first_sequence=request.first_sequence, frame_count=count, result=result)
            yield pb.StreamClassifyResponse(blocks=[block])

    with client.Client(fakes.serve(stream=stream)) as digits:
        frames = list(read_video(clip.path, client=digits))
    assert {digit.digit for frame in frames for digit in frame.digits} == {7}
    assert next(calls) == 1
    assert next(messages) < next(crops)


def test_a_video_without_digits_ends_as_it_should(
    tmp_path: Path, write_video: Callable[..., Path], server_address: str
) -> None:
    path = write_video(tmp_path / "a.mp4", [np.full((120, 160, 3), 200, np.uint8)] * 30)
    with client.Client(server_address) as digits:
        frames = list(read_video(path, client=digits))
    assert len(frames) == 30
    assert not any(frame.digits for frame in frames)


def test_no_server_is_an_error_of_the_loop(clip: Clip, fakes: Fakes) -> None:
    with client.Client(fakes.nobody(), timeout=2) as digits, pytest.raises(client.MnistGrpcError):
        list(read_video(clip.path, client=digits))


def test_a_server_that_says_nothing_ends_the_loop_in_time(clip: Clip, fakes: Fakes, start: Callable[..., Any]) -> None:
    with client.Client(fakes.black_hole(), timeout=0.5) as digits:
        running = start(lambda: list(read_video(clip.path, client=digits)))
        with pytest.raises(client.MnistGrpcError):
            running.result()


def test_leaving_the_loop_ends_the_threads(clip: Clip, server_address: str) -> None:
    def ours() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("video-")}

    before = ours()
    with client.Client(server_address) as digits:
        with VideoReader(clip.path, client=digits) as video:
            for _ in video:
                break
        for thread in ours() - before:
            thread.join(20)
    assert ours() <= before


def test_a_video_is_read_once(clip: Clip, server_address: str) -> None:
    with client.Client(server_address) as digits:
        video = VideoReader(clip.path, client=digits)
        assert sum(1 for _ in video) == 50
        with pytest.raises(RuntimeError, match=r"clip\.mp4' is read or closed; open it again"):
            iter(video)
        video.close()


def test_when_only_the_latest_counts_a_slow_reader_skips_frames(clip: Clip, server_address: str) -> None:
    with client.Client(server_address) as digits, VideoReader(clip.path, client=digits, latest_only=True) as video:
        frames = iter(video)
        next(frames)
        video._decoder.join(20)  # by now all frames were decoded, and most overtaken
        rest = [frame.index for frame in frames]
    assert rest[-1] == 49
    assert len(rest) <= 5  # the last, and those that were under way


@pytest.mark.parametrize("options", [{"every": 0}, {"fps": 0.0}, {"fps": float("nan")}])
def test_a_wrong_rate_is_refused(clip: Clip, fakes: Fakes, options: dict[str, Any]) -> None:
    with client.Client(fakes.nobody()) as digits, pytest.raises(ValueError, match="not"):
        VideoReader(clip.path, client=digits, **options)


def test_a_missing_file_is_an_error_before_the_loop(fakes: Fakes) -> None:
    with (
        client.Client(fakes.nobody()) as digits,
        pytest.raises(InvalidVideoError, match=r"'missing\.mp4' cannot be opened"),
    ):
        VideoReader("missing.mp4", client=digits)
