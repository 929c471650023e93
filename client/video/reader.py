"""The digits of a video, frame by frame: `read_video(path, client=…)`.

Three threads stand behind it, so that decoding, finding and the service's work
go on side by side: one decodes, one finds what may be digits and gives it to
the client's stream (where what waits is packed into common messages), one
takes the answers. The caller's own thread brings frames and answers together
and follows the digits over time. No more than a few frames are on the way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from client._errors import MnistGrpcError
from client._types import Prediction
from client.video.finding import WORKING_SIDE, Candidate, find_digits
from client.video.handover import Handover
from client.video.reading import Frame, Pixels, Source, open_video
from client.video.tracking import Digit, Sighting, Smoothing, Tracker
from digits.preprocessing import InvalidImage, to_pixels

DECODED = 2  # frames that wait to be searched
ON_THE_WAY = 8  # frames whose answers are not all there
ON_THE_WAY_LIVE = 2
LEAVING = 2.0  # seconds for the decoder to notice; it may hang in a pipe that gives nothing


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrame:
    """A frame, and the digits in it."""

    index: int
    """Counted from 0 over all frames of the video, also those that are left out."""

    seconds: float
    """When it is shown, from the first frame on."""

    pixels: Pixels
    """`uint8[h, w, 3]`, RGB, upright."""

    digits: list[Digit]
    """The digits that are shown now, by their tracks."""


class Classifier(Protocol):
    """What of a `client.Client` is needed here."""

    def stream_classify(self, frames: Any, *, timeout: float | None = None) -> Iterator[Prediction | MnistGrpcError]:
        """See `client.Client`."""


class VideoReader:
    """Reads the digits in a file, from a camera or from a stream; iterate over it once.

        with client.Client() as digits, VideoReader("clip.mp4", client=digits) as video:
            for frame in video:
                print(frame.seconds, [(digit.digit, digit.box) for digit in frame.digits])

    For one thread; a context manager, otherwise call `close`.

    Args:
        source: a path, the number of a camera (0 is the first), or the address
            of a stream such as `rtsp://…`.
        client: asks the service; stays open.
        every: read the first of so many frames.
        fps: read no more frames than this a second of the video.
        latest_only: leave out frames when they come faster than they are read,
            so as to stay live; else as the source needs it: with cameras and
            streams, and not with files.
        smoothing: how reluctant the tracks are.
        working_side: pixels of the longer side to which frames are scaled for
            the search; the shortest digits found are a 40th of it.
        timeout: seconds without an answer while one is owed; else the client's.

    Raises:
        InvalidVideoError: the source is not there or no video; also while
            iterating, if it breaks.
        MissingExtraError: PyAV is not installed.
        MnistGrpcError: while iterating, what ends the client's stream.
    """

    def __init__(
        self,
        source: Source,
        *,
        client: Classifier,
        every: int = 1,
        fps: float | None = None,
        latest_only: bool | None = None,
        smoothing: Smoothing | None = None,
        working_side: int = WORKING_SIDE,
        timeout: float | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"of every 1 frame or more one is read, not of every {every!r}")
        if fps is not None and not fps > 0:
            raise ValueError(f"frames a second are a number above 0, not {fps!r}")
        self._client = client
        self._timeout = timeout
        self._working_side = working_side
        self._tracker = Tracker(smoothing)
        self._video = open_video(source)
        self._frames = self._video.frames(every=every, fps=fps)
        self.name = self._video.name
        """The source, for messages."""
        self.live = self._video.live
        """Whether frames come by themselves, as from a camera."""
        self.rate = self._video.rate / every if fps is None else min(self._video.rate / every, fps)
        """About how many frames a second of the video are read."""
        count = self._video.frame_count
        self.frame_count = None if count is None else max(1, round(count * self.rate / self._video.rate))
        """About how many frames will be read; None if that is not known."""
        latest_only = self.live if latest_only is None else latest_only
        self._decoded = Handover[Frame](1 if latest_only else DECODED, latest_only=latest_only)
        self._searched = Handover[tuple[Frame, list[Candidate]]](ON_THE_WAY_LIVE if latest_only else ON_THE_WAY)
        self._answers = Handover[Prediction | MnistGrpcError](0)
        self._decoder = threading.Thread(target=self._decode, name="video-decode", daemon=True)
        self._asker = threading.Thread(target=self._ask, name="video-ask", daemon=True)
        self._started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading and let go of the source. May be called again."""
        for handover in (self._decoded, self._searched, self._answers):
            handover.leave()
        if self._started:
            self._decoder.join(LEAVING)  # which closes the video; no other thread may while it decodes
        else:
            self._started = True
            self._video.close()

    def __iter__(self) -> Iterator[VideoFrame]:
        if self._started:
            raise RuntimeError(f"{self.name} is read or closed; open it again")
        self._started = True
        self._decoder.start()
        self._asker.start()
        return self._read()

    def _read(self) -> Iterator[VideoFrame]:
        with closing(self):
            for frame, candidates in self._searched:
                sightings = []
                for candidate in candidates:
                    answer = next(self._answers, None)
                    if answer is None:
                        return  # closed meanwhile
                    if isinstance(answer, Prediction):
                        sightings.append(Sighting(candidate.box, candidate.score, answer.probabilities))
                    else:
                        raise answer
                digits = self._tracker.update(frame.seconds, sightings)
                yield VideoFrame(frame.index, frame.seconds, frame.pixels, digits)

    # In their threads.

    def _decode(self) -> None:
        error: BaseException | None = None
        try:
            with closing(self._frames):
                for frame in self._frames:
                    if not self._decoded.put(frame):
                        break
        except BaseException as caught:
            error = caught
        self._decoded.end(error)

    def _crops(self) -> Iterator[Any]:
        """What may be digits, in a thread of the client's; a frame goes ahead of its crops, so that answers find it."""
        error: BaseException | None = None
        try:
            for frame in self._decoded:
                # All of a frame are made ready before the first is given away, so that they go in one message.
                ready = list(_ready(find_digits(frame.pixels, working_side=self._working_side)))
                if not self._searched.put((frame, [candidate for candidate, _ in ready])):
                    break
                for _, pixels in ready:
                    yield pixels
        except BaseException as caught:
            error = caught
        self._searched.end(error)

    def _ask(self) -> None:
        error: BaseException | None = None
        try:
            answers = self._client.stream_classify(self._crops(), timeout=self._timeout)
            for answer in answers:
                if not self._answers.put(answer):
                    break
        except BaseException as caught:
            error = caught
        self._answers.end(error)
        self._searched.end(error)  # where the stream ended before all frames were searched


def _ready(candidates: list[Candidate]) -> Iterator[tuple[Candidate, Pixels]]:
    """Candidates with their canonical pixels, `uint8[28, 28]`, but for those in which there is no ink after all."""
    for candidate in candidates:
        with contextlib.suppress(InvalidImage):
            yield candidate, to_pixels(candidate.crop)


def read_video(source: Source, *, client: Classifier, **options: Any) -> Iterator[VideoFrame]:
    """The frames of a video with the digits in them; takes what `VideoReader` takes.

    with client.Client() as digits:
        for frame in read_video("clip.mp4", client=digits):
            print(frame.seconds, [digit.digit for digit in frame.digits])
    """
    with VideoReader(source, client=client, **options) as video:
        yield from video
