"""What was shown beside what is true: rates of detection, of false digits and of reading."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bench.video.synthesis import Truth
from client.video import Box, Digit

SAME = 0.5  # intersection over union from which on a box is that of a digit
GRACE = 0.4  # seconds that a digit may take to be shown after it is drawn, and to vanish after it left


def matched(truths: Sequence[Truth], boxes: Sequence[Box]) -> dict[int, int]:
    """Which box belongs to which digit: the numbers of both, the best fit first."""
    pairs = sorted(
        (
            (iou, truth.digit, number)
            for truth in truths
            for number, box in enumerate(boxes)
            if (iou := Box(*truth.box).iou(box)) >= SAME
        ),
        reverse=True,
    )
    match: dict[int, int] = {}
    for _, digit, number in pairs:
        if digit not in match and number not in match.values():
            match[digit] = number
    return match


def covers(truths: Iterable[Truth], box: Box) -> bool:
    """Whether a box lies on a digit, well placed or not."""
    return any(Box(*truth.box).common_area(box) > 0.3 * box.area for truth in truths)


@dataclass
class Score:
    """Counts over frames; adds up with those of other videos."""

    frames: int = 0
    seconds: float = 0.0
    present: int = 0
    """Digits in frames, wholly drawn, and for longer than `GRACE`."""
    detected: int = 0
    """Those that had a box."""
    right: int = 0
    """Those whose box had the right digit."""
    false: int = 0
    """Boxes on no digit at all, in frames."""
    digits: int = 0
    """Digits of the videos that were there for longer than `GRACE`."""
    followed: int = 0
    """Those that had a track."""
    read: int = 0
    """Those whose track showed the right digit in the end."""
    tracks: int = 0
    """Tracks on digits: more than `followed` where a track was lost."""
    false_tracks: int = 0
    """Tracks that lay on no digit for most of their time."""
    misread: list[str] = field(default_factory=list)
    """What the tracks that were wrong in the end showed."""

    def __add__(self, other: Score) -> Score:
        return Score(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def recall(self) -> float:
        return self.detected / max(self.present, 1)

    @property
    def reading(self) -> float:
        return self.right / max(self.detected, 1)

    @property
    def track_reading(self) -> float:
        return self.read / max(self.followed, 1)

    @property
    def following(self) -> float:
        return self.followed / max(self.digits, 1)

    @property
    def false_a_frame(self) -> float:
        return self.false / max(self.frames, 1)

    @property
    def false_tracks_a_second(self) -> float:
        return self.false_tracks / max(self.seconds, 1e-9)


def score_shown(frames: Iterable[tuple[float, Sequence[Digit]]], truths: Sequence[Sequence[Truth]]) -> Score:
    """The score of a video: time and shown digits of each frame, and what is true in it."""
    score = Score()
    whole_since: dict[int, float] = {}
    there_last: dict[int, tuple[float, Truth]] = {}
    by_track: dict[int, Counter[int]] = defaultdict(Counter)  # frames by the digit that each track lay on
    off: Counter[int] = Counter()  # and on none
    final: dict[int, tuple[int, int]] = {}  # of each digit: its track and what that showed at last
    for (seconds, shown), present in zip(frames, truths, strict=True):
        score.frames += 1
        score.seconds = seconds
        match = matched(present, [digit.box for digit in shown])
        for truth in present:
            there_last[truth.digit] = (seconds, truth)
            if not truth.whole:
                continue
            since = whole_since.setdefault(truth.digit, seconds)
            if truth.digit in match:
                digit = shown[match[truth.digit]]
                by_track[digit.track][truth.digit] += 1
                final[truth.digit] = (digit.track, digit.digit)
            if seconds - since <= GRACE:
                continue
            score.present += 1
            if truth.digit in match:
                score.detected += 1
                score.right += digit.digit == truth.label
        left = [truth for last, truth in there_last.values() if seconds - last <= GRACE]
        for digit in shown:
            if not covers(left, digit.box):
                score.false += 1
                off[digit.track] += 1
    lasting = {
        number: there_last[number][1].label
        for number, since in whole_since.items()
        if there_last[number][0] - since > GRACE
    }
    score.digits = len(lasting)
    for number, label in lasting.items():
        if number in final:
            score.followed += 1
            score.read += final[number][1] == label
            if final[number][1] != label:
                score.misread.append(f"{label} as {final[number][1]}")
    score.tracks = len(by_track)
    score.false_tracks = sum(frames > by_track[track].total() for track, frames in off.items())
    return score
