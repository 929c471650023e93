"""Frames from files, cameras and network streams, upright and with their times; knows nothing of digits.

PyAV (FFmpeg's libraries) does the work, and is imported by `open_video`, not
before.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from client.video.errors import InvalidVideoError, require

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame as DecodedFrame

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""`uint8[h, w, 3]`, RGB."""

Source: TypeAlias = str | os.PathLike[str] | int
"""A file, the number of a camera (0 is the first), or the address of a stream such as `rtsp://…`."""

LIVE_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "tcp")
SILENCE = 10.0  # seconds after which a camera or a network stream is taken for dead


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A picture of a video."""

    index: int
    """Counted from 0 over all frames of the video, also those that are left out."""

    seconds: float
    """When it is shown, from the first frame on."""

    pixels: Pixels


class Video:
    """An open video. A context manager; otherwise call `close`, or read it to the end."""

    def __init__(self, container: InputContainer, name: str, live: bool) -> None:
        self.name = name
        """What it was opened as, for messages."""
        self.live = live
        """Whether its frames come by themselves: a camera or a stream."""
        self._container = container
        self._stream = container.streams.video[0]
        self._stream.thread_type = "AUTO"

    @property
    def rate(self) -> float:
        """Frames a second, on average; 25 where the file does not know."""
        return float(self._stream.average_rate or self._stream.guessed_rate or 25)

    @property
    def frame_count(self) -> int | None:
        """About how many frames there are; None where that is not known before they are read."""
        if self.live:
            return None
        if self._stream.frames:
            return self._stream.frames
        seconds = self._seconds()
        return max(1, round(seconds * self.rate)) if seconds else None

    def frames(self, *, every: int = 1, fps: float | None = None) -> Generator[Frame, None, None]:
        """The frames in the order of their time; closes the video in the end.

        What cannot be decoded is left out, as players do.

        Args:
            every: give the first of so many frames.
            fps: give no more frames than this a second of the video.

        Raises:
            InvalidVideoError: there is no frame in it, or its source fails.
        """
        index, given, first, last = -1, 0, 0.0, 0.0
        try:
            for index, decoded in enumerate(self._decoded()):
                seconds = decoded.time if decoded.time is not None else first + index / self.rate
                if index == 0:
                    first = seconds
                last = max(seconds - first, last)  # never back, also where a stream's clock jumps
                if index % every == 0 and (fps is None or last >= given / fps - 1e-6):
                    given = given + 1 if fps is None else int(last * fps + 1e-6) + 1
                    yield Frame(index, last, _upright(decoded))
        finally:
            self.close()
        if index < 0:
            raise InvalidVideoError(f"{self.name} has no frame that can be decoded")

    def close(self) -> None:
        """Let go of the file or camera. May be called again; never while another thread reads frames."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decoded(self) -> Iterator[DecodedFrame]:
        import av.error

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as error:
                if self.live:
                    raise InvalidVideoError(f"{self.name} gives no more frames: {_reason(error)}") from error
                return  # a file that breaks off ends there
            if packet is None:
                return
            with contextlib.suppress(av.error.InvalidDataError):  # a broken packet
                yield from self._stream.decode(packet)

    def _seconds(self) -> float | None:
        if self._stream.duration and self._stream.time_base:
            return float(self._stream.duration * self._stream.time_base)
        return self._container.duration / 1e6 if self._container.duration else None


def open_video(source: Source) -> Video:
    """Open a file, a camera or a stream.

    Raises:
        InvalidVideoError: it is not there, cannot be read, or is no video.
        MissingExtraError: PyAV is not installed.
    """
    av = require("av")
    if isinstance(source, int):
        name, live = f"camera {source}", True
        file, arguments = _camera(av, source)
    else:
        file, arguments = os.fspath(source), {}
        name = repr(file)
        scheme = re.match(r"([a-z]+)://", file)
        live = scheme is not None and scheme[1] in LIVE_SCHEMES
        if scheme:
            arguments = {"timeout": (SILENCE, SILENCE)}
        elif os.path.isdir(file):
            raise InvalidVideoError(f"{name} is a folder, not a video")
    try:
        container = av.open(file, **arguments)
    except av.error.InvalidDataError as error:
        raise InvalidVideoError(f"{name} is no video of a known format, or is damaged") from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise InvalidVideoError(f"{name} cannot be opened: {_reason(error)}") from error
    if not container.streams.video:
        instead = ", only sound" if container.streams.audio else ""
        container.close()
        raise InvalidVideoError(f"{name} holds no video{instead}")
    return Video(container, name, live)


def _camera(av: Any, number: int) -> tuple[str, dict[str, Any]]:
    """What to open for a camera, and how, on this system."""
    if number < 0:
        raise InvalidVideoError(f"cameras are counted from 0, there is no camera {number}")
    if sys.platform == "darwin":
        return str(number), {"format": "avfoundation", "options": {"framerate": "30"}}
    if sys.platform == "win32":
        cameras = [device.name for device in av.enumerate_input_devices("dshow") if "video" in device.media_types]
        if number >= len(cameras):
            raise InvalidVideoError(f"there is no camera {number}, only {len(cameras)} cameras")
        return f"video={cameras[number]}", {"format": "dshow"}
    return f"/dev/video{number}", {"format": "video4linux2"}


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _upright(decoded: DecodedFrame) -> Pixels:
    """RGB, turned as the file says that a player should turn it."""
    pixels = np.asarray(decoded.to_ndarray(format="rgb24"), np.uint8)
    quarters = round(decoded.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels
