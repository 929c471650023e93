"""`mnist-grpc video clip.mp4`: what people and programs see of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from client.video.annotating import ENCODERS, VideoWriter, draw_digits
from client.video.errors import InvalidVideoError, require
from client.video.reader import Classifier, VideoFrame, VideoReader
from client.video.reading import Source
from client.video.tracking import Digit

DESCRIPTION = """\
Find and read the handwritten digits in a video: one line for each digit that
appears, changes or leaves. Needs pip install 'mnist-grpc[video]'. Ctrl-C ends
it, and leaves an annotated video that plays."""


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `video` to the sub-commands of `mnist-grpc`."""
    parser = commands.add_parser(
        "video", parents=[common], help="find and read the digits in a video or from a camera", description=DESCRIPTION
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "source", nargs="?", metavar="VIDEO", help="a file, the number of a camera, or a stream (rtsp://...)"
    )
    source.add_argument("--camera", type=int, metavar="N", help="a camera; the first is 0")
    parser.add_argument(
        "--annotate", metavar="FILE", help=f"write the video with the digits drawn in ({', '.join(ENCODERS)})"
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--every", type=_count, default=1, metavar="N", help="read the first of every N frames")
    rate.add_argument("--fps", type=_rate, metavar="F", help="read F frames a second of the video at most")
    parser.set_defaults(run=run)


def run(client: Classifier, options: argparse.Namespace) -> int:
    """Read a video; return 0, or 130 if a file was not read to its end because of Ctrl-C."""
    source = _source(options)
    if options.annotate and isinstance(source, str):
        _refuse_same_file(source, options.annotate)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminable())
        video = stack.enter_context(VideoReader(source, client=client, every=options.every, fps=options.fps))
        writer = stack.enter_context(VideoWriter(options.annotate, video.rate)) if options.annotate else None
        show, progress = stack.enter_context(_progress(video, annotating=writer is not None))
        report = _Report(show)
        interrupted = False
        try:
            for frame in video:
                if writer is not None:  # first: what was told is in the file
                    writer.write(draw_digits(frame.pixels, frame.digits), frame.seconds)
                show(_json_line(frame)) if options.json else report.take(frame)
                progress()
        except KeyboardInterrupt:
            interrupted = True
    if not options.json:
        report.summarise()
        if writer is not None and writer.frame_count:
            print(f"{options.annotate}: {writer.frame_count} frames written")
    return 130 if interrupted and not video.live else 0


def _source(options: argparse.Namespace) -> Source:
    if options.camera is not None:
        return int(options.camera)
    source: str = options.source
    return int(source) if source.isdecimal() and not os.path.exists(source) else source


def _refuse_same_file(source: str, target: str) -> None:
    with contextlib.suppress(OSError):
        if os.path.samefile(source, target):
            raise InvalidVideoError(f"the annotated video would replace the one that is read, {source!r}")


# For people -----------------------------------------------------------------


class _Report:
    """What happened to the digits: a line a change, and a summary."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._now: dict[int, Digit] = {}
        self._last: dict[int, int] = {}  # what each digit showed in the end
        self._frames = 0
        self._seconds = 0.0

    def take(self, frame: VideoFrame) -> None:
        self._frames += 1
        self._seconds = frame.seconds
        now = {digit.track: digit for digit in frame.digits}
        for track, digit in now.items():
            before = self._now.get(track)
            if before is None:
                self._line(frame, "appears", digit)
            elif before.digit != digit.digit:
                self._line(frame, "becomes", digit)
            self._last[track] = digit.digit
        for track, digit in self._now.items():
            if track not in now:
                self._line(frame, "leaves", digit)
        self._now = now

    def summarise(self) -> None:
        digits = " ".join(str(digit) for _, digit in sorted(self._last.items()))
        print(f"{self._frames} frames, {self._seconds:.1f} s, {len(self._last)} digits{': ' if digits else ''}{digits}")

    def _line(self, frame: VideoFrame, what: str, digit: Digit) -> None:
        name = f"#{digit.track}"
        self._show(
            f"{_time_code(frame.seconds)}  {name:<4} {what}  {digit.digit}  {digit.confidence:6.1%}  {digit.box}"
        )


def _time_code(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds, 2), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours:d}:{minutes:02d}:{seconds:05.2f}"


# For programs ---------------------------------------------------------------


def _json_line(frame: VideoFrame) -> str:
    digits = [
        {
            "track": digit.track,
            "box": {"left": box.left, "top": box.top, "right": box.right, "bottom": box.bottom},
            "digit": digit.digit,
            "confidence": round(digit.confidence, 6),
            "seen": digit.seen,
        }
        for digit in frame.digits
        for box in [digit.box]
    ]
    return json.dumps({"frame": frame.index, "seconds": round(frame.seconds, 6), "digits": digits})


# The terminal ---------------------------------------------------------------


@contextlib.contextmanager
def _progress(video: VideoReader, *, annotating: bool) -> Iterator[tuple[Callable[[str], None], Callable[[], Any]]]:
    """How to print a line, and how to count a frame: with a bar where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield (lambda line: print(line, flush=True)), (lambda: None)
        return
    tqdm = require("tqdm").tqdm
    doing = "reading and annotating" if annotating else "reading"
    with tqdm(total=video.frame_count, unit=" frames", desc=doing, file=sys.stderr, dynamic_ncols=True) as bar:
        yield (lambda line: bar.write(line, file=sys.stdout)), bar.update


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """End as with Ctrl-C also when told to by SIGTERM, so that the annotated file plays."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, which alone may set this
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of frames, 1 or more, not {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"frames a second are a number above 0, not {text!r}")
    return rate
