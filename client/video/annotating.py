"""Digits drawn into frames, and frames written to a video file that plays everywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from client.video.errors import InvalidVideoError, require
from client.video.reading import Pixels
from client.video.tracking import Digit

ENCODERS = {".mp4": "libx264", ".m4v": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9"}
"""By the ending of a file's name."""

TIME_BASE = Fraction(1, 90_000)  # fine enough for any rate of frames, also one that varies
COLORS = ((230, 25, 75), (0, 130, 200), (60, 160, 60), (245, 130, 48), (145, 30, 180), (0, 140, 140), (200, 40, 200))


def draw_digits(pixels: Pixels, digits: Sequence[Digit]) -> Pixels:
    """A copy of a frame, `uint8[h, w, 3]`, with a box, the digit and its confidence at each of these.

    A digit that was not seen in this very frame has a thin box.
    """
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    size = max(12, round(max(image.size) / 40))
    font = ImageFont.load_default(size)
    line = max(1, round(size / 8))
    for digit in digits:
        color = COLORS[digit.track % len(COLORS)]
        box = digit.box
        edge = (box.left - 2 * line, box.top - 2 * line, box.right + 2 * line - 1, box.bottom + 2 * line - 1)
        draw.rectangle(edge, outline=color, width=line if digit.seen else 1)
        text = f"{digit.digit}  {digit.confidence:.0%}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + size // 2, bottom - top + size // 2
        x = min(max(edge[0], 0), max(image.width - round(width), 0))
        y = edge[1] - height if edge[1] >= height else edge[3] + 1  # above the box, else below it
        y = min(max(y, 0), max(image.height - round(height), 0))
        draw.rectangle((x, y, x + width, y + height), fill=color)
        draw.text((x + size // 4 - left, y + size // 4 - top), text, fill=(255, 255, 255), font=font)
    return np.asarray(image)


class VideoWriter:
    """Writes frames to a file: H.264 in `.mp4`, `.mov` and `.mkv`, VP9 in `.webm`, as browsers play them.

    A context manager: leaving it, however that happens, ends the file so that
    what was written plays. The file is begun with the first frame.

    Args:
        path: the file; replaced if it is there.
        rate: about how many frames a second there will be.

    Raises:
        InvalidVideoError: the ending is none of these, or the file cannot be written.
        MissingExtraError: PyAV is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], rate: float) -> None:
        self._av = require("av")
        self.path = Path(path)
        encoder = ENCODERS.get(self.path.suffix.lower())
        if encoder is None:
            raise InvalidVideoError(f"an annotated video ends in {', '.join(ENCODERS)}; {str(path)!r} does not")
        options = {"movflags": "+faststart"} if self.path.suffix.lower() in (".mp4", ".m4v", ".mov") else {}
        try:
            with self.path.open("ab"):  # FFmpeg would notice at the first frame only
                pass
            self._container = self._av.open(self.path, "w", options=options)
        except (self._av.error.FFmpegError, OSError) as error:
            raise InvalidVideoError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
        quality = {"crf": "23", "preset": "veryfast"}
        if encoder == "libvpx-vp9":
            quality = {"crf": "33", "b": "0", "deadline": "realtime", "cpu-used": "8"}
        self._stream = self._container.add_stream(encoder, rate=max(1, round(rate)), options=quality)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = TIME_BASE
        self._last = -1
        self._size: tuple[int, int] | None = None
        self.frame_count = 0
        """Frames written."""

    def write(self, pixels: Pixels, seconds: float) -> None:
        """Add a frame, `uint8[h, w, 3]`, shown at this time; all are of the first one's size."""
        height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2  # the pixel format halves the colours
        if self._size is None:
            self._size = (width, height)
            self._stream.width, self._stream.height = width, height
        if (width, height) != self._size:  # a stream that changes its size on the way
            pixels = np.asarray(Image.fromarray(pixels).resize(self._size))
            width, height = self._size
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), "rgb24")
        self._last = max(round(seconds / TIME_BASE), self._last + 1)
        frame.pts, frame.time_base = self._last, TIME_BASE
        self._mux(frame)
        self.frame_count += 1

    def close(self) -> None:
        """End the file. May be called again; without a frame no file is left."""
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            if self.frame_count:
                container.mux(self._stream.encode(None))
            container.close()
        except self._av.error.FFmpegError as error:
            raise self._failed(error) from error
        if not self.frame_count:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mux(self, frame: object) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except self._av.error.FFmpegError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> InvalidVideoError:
        return InvalidVideoError(f"{str(self.path)!r} cannot be written: {error.strerror or error}")
