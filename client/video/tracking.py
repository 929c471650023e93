"""From what is seen frame by frame to digits that stay: `Tracker.update` once a frame.

A track is one digit over time. It is followed by where it is, appears when it
has been seen for long enough with enough evidence, disappears when it has not
been seen for long enough, and shows the digit that its frames speak for
together. All times are seconds of the video, so that it works the same at any
rate of frames. Knows nothing of pictures, files or the service.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client.video.boxes import Box

Probabilities = npt.NDArray[np.float32]
"""`float32[classes]`, of digits `float32[10]`."""


@dataclass(frozen=True, slots=True, eq=False)
class Sighting:
    """What may be a digit, in one frame."""

    box: Box
    score: float
    """How much it looks like a digit's ink, 0 to 1."""
    probabilities: Probabilities


@dataclass(frozen=True, slots=True, eq=False)
class Digit:
    """A digit in a frame of a video."""

    track: int
    """The number of this digit, the same in all frames, from 1 on."""

    box: Box
    """Where it is, in pixels of the frame."""

    digit: int
    """What it shows, 0 to 9 or the number of another class, by all frames up to this one."""

    confidence: float
    """The probability of that, 0 to 1."""

    probabilities: Probabilities
    """`float32[classes]`, the probability of each class, smoothed over time; read-only."""

    seen: bool
    """Whether it was found in this very frame; if not, the box is where it should be by its motion."""


@dataclass(frozen=True, slots=True)
class Smoothing:
    """How reluctant a tracker is. The times are seconds of the video."""

    memory: float = 0.4
    """How long a reading counts: it loses two thirds of its weight in this time."""

    appear: float = 0.25
    """A digit is shown when it has been followed for this long, in two frames at least."""

    disappear: float = 0.4
    """It is no longer shown when it has not been seen for this long."""

    change: float = 0.2
    """It changes when another digit has been ahead for this long."""

    evidence: float = 0.45
    """It is shown when its frames speak for it by this much on average: confidence times how it looks, 0 to 1."""

    keep: float = 0.25
    """It is no longer shown when they do so by less than this."""


_FLOOR = 1e-4  # the least probability that a single frame can give: no frame alone decides
_NEAR = 0.6  # of the larger side that a digit's middle may be off where it is expected
_RESIZED = 2.5  # times, that a digit may grow or shrink from one frame to the next
_BOX = 0.08  # seconds, over which a box is smoothed
_SEEN = 0.5  # of the frames since it appeared, in which a digit has to be seen to be shown


class Tracker:
    """The tracks of one video."""

    def __init__(self, smoothing: Smoothing | None = None) -> None:
        self._smoothing = smoothing or Smoothing()
        self._tracks: list[_Track] = []
        self._shown = 0
        self._time: float | None = None

    def update(self, seconds: float, sightings: Sequence[Sighting]) -> list[Digit]:
        """The digits of the frame at this time, by their numbers; frames come in the order of their time.

        Raises:
            ValueError: the time is before that of the last frame.
        """
        if self._time is not None and seconds < self._time:
            raise ValueError(f"frames come in the order of their time, {seconds:g} s is before {self._time:g} s")
        self._time = seconds
        for track in self._tracks:
            track.expect(seconds)
        unseen = set(range(len(self._tracks)))
        new = set(range(len(sightings)))
        pairs = [
            (fit, index, number)
            for index, track in enumerate(self._tracks)
            for number, sighting in enumerate(sightings)
            if (fit := _fit(track, sighting)) > 0
        ]
        for _, index, number in sorted(pairs, reverse=True):
            if index in unseen and number in new:
                unseen.remove(index)
                new.remove(number)
                self._tracks[index].see(seconds, sightings[number], self._smoothing)
        for index in unseen:
            self._tracks[index].miss()
        self._tracks = [track for track in self._tracks if seconds - track.last <= self._patience(track)]
        self._tracks += [_Track(seconds, sightings[number]) for number in sorted(new)]
        for track in self._tracks:
            if track.number is None and track.is_convincing(self._smoothing):
                self._shown += 1
                track.number = self._shown
            elif track.number is not None and track.evidence < self._smoothing.keep:
                track.number = None  # it turned out to be none; a later change of mind is a new digit
        shown = (track.shown(seconds) for track in self._tracks)
        return sorted((digit for digit in shown if digit is not None), key=lambda digit: digit.track)

    def _patience(self, track: _Track) -> float:
        """Seconds without a sighting after which a track is given up; half of it for what never was shown."""
        frames = 2.5 * track.pace  # where frames are far apart, two may be missed
        return max(self._smoothing.disappear * (1 if track.number is not None else 0.5), frames)


class _Track:
    """One digit, or what may become one."""

    def __init__(self, seconds: float, sighting: Sighting) -> None:
        self.number: int | None = None
        self.begin = self.last = self._now = seconds
        self.pace = 0.0  # seconds from one frame to the next
        self.evidence = _evidence(sighting)
        self._sightings = 1
        self._frames = 1
        self._place = _place(sighting.box)  # left, top, right, bottom
        self._speed = np.zeros(4)
        self._logs = _logs(sighting.probabilities)
        self.digit = int(self._logs.argmax())
        self._ahead_since: float | None = None

    @property
    def place(self) -> npt.NDArray[np.float64]:
        """Left, top, right and bottom of where it is now, or should be."""
        return self._place

    @property
    def sides(self) -> npt.NDArray[np.float64]:
        """Width and height."""
        return np.maximum(self._place[2:] - self._place[:2], 1)

    def expect(self, seconds: float) -> None:
        """Move on to this time with the speed of late."""
        step = seconds - self._now
        self.pace = step if self._frames == 1 else 0.8 * self.pace + 0.2 * step
        middle = (self._speed[:2] + self._speed[2:]) / 2  # its growth is not trusted that far
        self._place = self._place + np.tile(middle, 2) * min(step, 0.2)
        self._now = seconds
        self._frames += 1

    def see(self, seconds: float, sighting: Sighting, smoothing: Smoothing) -> None:
        """Take what was seen of it at this time."""
        step = seconds - self.last
        self._sightings += 1
        seen = _place(sighting.box)
        weight = max(1 - math.exp(-step / _BOX), 0.3)
        before = self._place
        self._place = before + weight * (seen - before)
        if step > 0:
            self._speed = self._speed + 0.3 * ((seen - before) / step)
        fresh = max(1 - math.exp(-step / smoothing.memory), 1 / self._sightings)
        logs = _logs(sighting.probabilities)
        if logs.shape == self._logs.shape:
            self._logs = self._logs + fresh * (logs - self._logs)
        else:  # of a new model with other classes: what was read before says nothing of these
            self._logs, self.digit, self._ahead_since = logs, int(logs.argmax()), None
        self.evidence += fresh * (_evidence(sighting) - self.evidence)
        self.last = seconds
        self._decide(seconds, smoothing)

    def miss(self) -> None:
        """It was not seen at this time."""
        self._speed = self._speed * 0.7

    def is_convincing(self, smoothing: Smoothing) -> bool:
        """Whether to show it from now on."""
        return (
            self._sightings >= 2
            and self.last - self.begin >= smoothing.appear - 1e-6
            and self._sightings >= _SEEN * self._frames
            and self.evidence >= smoothing.evidence
        )

    def shown(self, seconds: float) -> Digit | None:
        if self.number is None:
            return None
        probabilities = np.exp(self._logs - self._logs.max())
        probabilities = (probabilities / probabilities.sum()).astype(np.float32)
        probabilities.flags.writeable = False
        left, top, right, bottom = np.rint(self._place).astype(int).tolist()
        return Digit(
            track=self.number,
            box=Box(left, top, max(right, left + 1), max(bottom, top + 1)),
            digit=self.digit,
            confidence=float(probabilities[self.digit]),
            probabilities=probabilities,
            seen=self.last == seconds,
        )

    def _decide(self, seconds: float, smoothing: Smoothing) -> None:
        leader = int(self._logs.argmax())
        if leader == self.digit:
            self._ahead_since = None
            return
        if self._ahead_since is None:
            self._ahead_since = seconds
        if self.number is None or seconds - self._ahead_since >= smoothing.change:
            self.digit = leader
            self._ahead_since = None


def _place(box: Box) -> npt.NDArray[np.float64]:
    return np.array([box.left, box.top, box.right, box.bottom], np.float64)


def _logs(probabilities: Probabilities) -> npt.NDArray[np.float64]:
    logs: npt.NDArray[np.float64] = np.log(np.maximum(probabilities.astype(np.float64), _FLOOR))
    return logs


def _evidence(sighting: Sighting) -> float:
    return sighting.score * float(sighting.probabilities.max())


def _fit(track: _Track, sighting: Sighting) -> float:
    """How well a sighting fits a track, above 0 if at all: overlap, or nearness where a small digit moved fast."""
    seen = _place(sighting.box)
    sides = np.maximum(seen[2:] - seen[:2], 1)
    growth = float(np.max(sides) / np.max(track.sides))
    if not 1 / _RESIZED <= growth <= _RESIZED:
        return 0.0
    common = np.minimum(track.place[2:], seen[2:]) - np.maximum(track.place[:2], seen[:2])
    overlap = float(np.prod(np.maximum(common, 0)))
    iou = overlap / float(np.prod(sides) + np.prod(track.sides) - overlap)
    off = (seen[:2] + seen[2:] - track.place[:2] - track.place[2:]) / 2
    near = 1 - float(np.hypot(*off)) / (_NEAR * float(max(np.max(sides), np.max(track.sides))))
    return 1 + iou if iou > 0.1 else max(near, 0.0)
