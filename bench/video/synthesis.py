"""Videos with known digits: real handwriting that is drawn, slides, grows and turns on textured, moving backgrounds.

Gives frames with the truth about them, and encodes them; knows nothing of how
digits are found. Uses NumPy and Pillow, PyAV to encode, and scikit-learn's
two sample photographs for the background "photo".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Frame = npt.NDArray[np.uint8]
"""`uint8[h, w, 3]`, RGB."""

Texture = npt.NDArray[np.float32]
"""`float32[h, w, 3]`, 0 to 255; larger than a frame, which pans over it."""

PAN = 80  # pixels that the background moves to either side


@dataclass(frozen=True, slots=True)
class Scene:
    """What a video shows."""

    background: str
    """One of `BACKGROUNDS`."""

    ink: str
    """`dark`, `light`, or `both`."""

    seed: int
    width: int = 640
    height: int = 480
    fps: int = 25
    seconds: float = 4.0
    columns: int = 3
    rows: int = 2
    """Digits stand in a grid, so that none covers another."""

    pan: bool = True
    """Whether the background moves."""

    noise: float = 3.0
    """Standard deviation of a sensor's noise, of 255."""

    @property
    def name(self) -> str:
        return f"{self.background}, {self.ink} ink"


@dataclass(frozen=True, slots=True)
class Truth:
    """A digit in a frame."""

    digit: int
    """Counted through the video's digits."""

    label: int
    box: tuple[int, int, int, int]
    """Left, top, right, bottom of the visible ink."""

    whole: bool
    """Whether it is drawn to the end; before that nobody can know what it becomes."""


def synthesise(scene: Scene, images: Frame, labels: Sequence[int]) -> Iterator[tuple[Frame, list[Truth]]]:
    """The frames of a scene with the digits that it takes from `images`, `uint8[n, 28, 28]`, from the first on."""
    random = np.random.default_rng(scene.seed)
    texture = BACKGROUNDS[scene.background](random, scene.height + 2 * PAN, scene.width + 2 * PAN)
    actors = [
        _Actor(scene, random, number, images[number], int(labels[number]))
        for number in range(scene.columns * scene.rows)
    ]
    turn = random.uniform(0, 2 * math.pi)
    for index in range(round(scene.seconds * scene.fps)):
        time = index / scene.fps
        angle = turn + 0.9 * time if scene.pan else turn
        x, y = round(PAN * (1 + math.cos(angle))), round(PAN * (1 + math.sin(1.3 * angle)))
        canvas = texture[y : y + scene.height, x : x + scene.width].copy()
        truths = [truth for actor in actors if (truth := actor.paint(canvas, time)) is not None]
        canvas += random.standard_normal(canvas.shape, np.float32) * np.float32(scene.noise)
        yield np.clip(np.rint(canvas), 0, 255).astype(np.uint8), truths


def encode(path: Path, frames: Iterator[Frame], fps: int, *, crf: int = 26) -> None:
    """Write an H.264 video at about the quality of a phone's or a webcam's."""
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(crf), "preset": "veryfast"})
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))


# Digits ---------------------------------------------------------------------


class _Actor:
    """One digit: appears at some time, stays in its cell of the grid, and moves there."""

    def __init__(self, scene: Scene, random: np.random.Generator, number: int, image: Frame, label: int) -> None:
        cell_width, cell_height = scene.width / scene.columns, scene.height / scene.rows
        self._number, self._label = number, label
        self._ink, self._order = _upsample(image), _stroke_order(image)
        self._size = random.uniform(0.3, 0.62) * min(cell_width, cell_height)  # of the 20 pixels of the ink
        self._center = (
            (number % scene.columns + 0.5) * cell_width,
            (number // scene.columns + 0.5) * cell_height,
        )
        room = 0.94 * min(cell_width, cell_height) - 1.4 * self._size
        self._reach = max(0.0, room / 2) * random.uniform(0.3, 1)
        self._phase, self._speed = random.uniform(0, 2 * math.pi, 3), random.uniform(0.5, 1.8, 3)
        self._turn = math.radians(random.uniform(0, 12))
        self._growth = random.uniform(0, 0.12)
        self._drawn = number % 2 == 0  # stroke by stroke; the others are there at once
        self._begin = random.uniform(0, 0.25) * scene.seconds
        self._end = scene.seconds * (random.uniform(0.75, 0.9) if number % 3 == 2 else 2)
        dark = scene.ink == "dark" or (scene.ink == "both" and number % 2 == 0)
        tone = random.uniform(15, 60, 3) if dark else random.uniform(205, 250, 3)
        self._tone = tone.astype(np.float32)
        self._opacity = random.uniform(0.85, 1)

    def paint(self, canvas: Texture, time: float) -> Truth | None:
        """Lay the ink that is to be seen at this time over the canvas."""
        if not self._begin <= time < self._end:
            return None
        progress = (time - self._begin) / 0.8 if self._drawn else 1.0
        whole = progress >= 1
        ink = self._ink if whole else self._ink * np.clip((progress - self._order) * 12, 0, 1)
        wave = np.sin(self._phase + self._speed * time)
        x, y = self._center[0] + self._reach * wave[0], self._center[1] + self._reach * wave[1]
        alpha, left, top = _place(ink, x, y, self._size * (1 + self._growth * wave[2]), self._turn * wave[2])
        alpha = alpha[max(-top, 0) : canvas.shape[0] - top, max(-left, 0) : canvas.shape[1] - left]
        left, top = max(left, 0), max(top, 0)
        seen = np.argwhere(alpha > 0.4)
        if not len(seen):
            return None
        alpha = alpha * np.float32(self._opacity)
        area = canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        area += alpha[:, :, None] * (self._tone - area)
        (y0, x0), (y1, x1) = seen.min(axis=0).tolist(), seen.max(axis=0).tolist()
        return Truth(self._number, self._label, (left + x0, top + y0, left + x1 + 1, top + y1 + 1), whole)


_FINE = 4  # times finer than MNIST's pixels


def _upsample(image: Frame) -> npt.NDArray[np.float32]:
    """Ink as a fine-grained alpha, `float32[112, 112]`, with edges as sharp as a pen's."""
    fine = Image.fromarray(image).resize((28 * _FINE, 28 * _FINE), Image.Resampling.BICUBIC)
    alpha = np.asarray(fine, np.float32) / 255
    return np.clip((alpha - 0.25) / 0.4, 0, 1)


def _stroke_order(image: Frame) -> npt.NDArray[np.float32]:
    """When each point is drawn, 0 to 1, `float32[112, 112]`: by its distance along the ink from the topmost point."""
    ink = image > 60
    distance = np.full(ink.shape, np.inf)
    start = np.argwhere(ink)[0]
    distance[tuple(start)] = 0
    while True:  # relaxation; 28x28 is small
        padded = np.pad(distance, 1, constant_values=np.inf)
        best = distance.copy()
        for dy in (0, 1, 2):
            for dx in (0, 1, 2):
                best = np.minimum(best, padded[dy : dy + 28, dx : dx + 28] + math.hypot(dy - 1, dx - 1))
        best[~ink] = np.inf
        if np.array_equal(best, distance):
            break
        distance = best
    last = distance[np.isfinite(distance)].max()
    distance[ink & ~np.isfinite(distance)] = last  # what does not hang together with the start comes last
    spread = distance
    for _ in range(3):  # carry it out over the soft edges
        padded = np.pad(spread, 1, constant_values=np.inf)
        near = np.min([padded[dy : dy + 28, dx : dx + 28] for dy in (0, 1, 2) for dx in (0, 1, 2)], axis=0)
        spread = np.where(np.isfinite(spread), spread, near)
    order = np.where(np.isfinite(spread), spread / max(last, 1), 1).astype(np.float32)
    fine = Image.fromarray(order).resize((28 * _FINE, 28 * _FINE), Image.Resampling.BILINEAR)
    return np.asarray(fine, np.float32) * np.float32(0.92)


def _place(
    ink: npt.NDArray[np.float32], x: float, y: float, size: float, angle: float
) -> tuple[npt.NDArray[np.float32], int, int]:
    """The alpha of a digit of this size and angle with its middle at (x, y), and the window's left and top."""
    half = math.ceil(size)  # 40 of MNIST's pixels: room for the turned image
    left, top = round(x) - half, round(y) - half
    image = Image.fromarray(np.rint(ink * 255).astype(np.uint8))
    coarse = max(1, round(20 * _FINE / size))
    image = image.reduce(coarse)  # the filter below looks at four pixels only
    fine = _FINE / coarse
    scale = 20 * fine / size  # of the image's pixels to one of the canvas
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    middle = 14 * fine
    dx, dy = x - left, y - top
    matrix = (cos, sin, middle - cos * dx - sin * dy, -sin, cos, middle + sin * dx - cos * dy)
    placed = image.transform((2 * half, 2 * half), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(placed, np.float32) / np.float32(255), left, top


# Backgrounds ----------------------------------------------------------------


def _clouds(random: np.random.Generator, height: int, width: int, cell: int, octaves: int) -> npt.NDArray[np.float32]:
    """Noise in several sizes from `cell` pixels down, each half as strong as the one before; deviation 1."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        step = max(1, cell >> octave)
        coarse = random.standard_normal((height // step + 3, width // step + 3), np.float32)
        fine = Image.fromarray(coarse).resize(
            (coarse.shape[1] * step, coarse.shape[0] * step), Image.Resampling.BICUBIC
        )
        total += np.asarray(fine)[step : step + height, step : step + width] / 2**octave
    normal: npt.NDArray[np.float32] = total / total.std()
    return normal


def _tinted(grey: npt.NDArray[np.float32], tint: Sequence[float]) -> Texture:
    return grey[:, :, None] * np.array(tint, np.float32)


def _paper(random: np.random.Generator, height: int, width: int) -> Texture:
    """Paper with grain, under a lamp that leaves one side in half-shadow."""
    angle = random.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    ramp = (columns / width - 0.5) * math.cos(angle) + (rows / height - 0.5) * math.sin(angle)
    light = 195 + 70 * ramp + 8 * _clouds(random, height, width, 128, 3)
    return _tinted(light + 4 * _clouds(random, height, width, 4, 3), (1, 0.98, 0.93))


def _lined(random: np.random.Generator, height: int, width: int) -> Texture:
    """Ruled paper."""
    paper = _paper(random, height, width)
    rows = np.arange(height)
    lines = (rows % random.integers(30, 46)) < 2
    paper[lines] *= np.array((0.72, 0.8, 0.92), np.float32)
    paper[:, 130:133] *= np.array((0.95, 0.7, 0.7), np.float32)
    return paper


def _squared(random: np.random.Generator, height: int, width: int) -> Texture:
    """Squared paper."""
    paper = _paper(random, height, width)
    step = int(random.integers(16, 26))
    grid = np.zeros((height, width), np.bool_)
    grid[::step] = grid[:, ::step] = True
    paper[grid] *= np.array((0.72, 0.8, 0.9), np.float32)
    return paper


def _board(random: np.random.Generator, height: int, width: int) -> Texture:
    """A blackboard with smears of chalk."""
    smears = _clouds(random, height // 4, width, 48, 4)
    stretched = np.asarray(Image.fromarray(smears).resize((width, height), Image.Resampling.BICUBIC))
    return _tinted(62 + 9 * stretched + 4 * _clouds(random, height, width, 4, 3), (0.8, 1.05, 0.9))


def _cloth(random: np.random.Generator, height: int, width: int) -> Texture:
    """Woven cloth: threads both ways, and folds."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    weave = np.sin(rows * (2 * math.pi / 7)) + np.sin(columns * (2 * math.pi / 6))
    return _tinted(128 + 9 * weave + 14 * _clouds(random, height, width, 160, 4), (1.05, 0.95, 0.9))


def _wood(random: np.random.Generator, height: int, width: int) -> Texture:
    """Wood with its grain."""
    rows = np.arange(height, dtype=np.float32)[:, None]
    warp = rows + 16 * _clouds(random, height, width, 160, 3)
    grain = np.sin(warp * (2 * math.pi / 19)) + 0.6 * np.sin(warp * (2 * math.pi / 7.3))
    return _tinted(140 + 14 * grain + 5 * _clouds(random, height, width, 8, 3), (1.1, 0.9, 0.68))


def _stone(random: np.random.Generator, height: int, width: int) -> Texture:
    """Grainy stone: noise of all sizes."""
    return _tinted(128 + 22 * _clouds(random, height, width, 64, 6), (1, 1, 1.02))


def _photo(random: np.random.Generator, height: int, width: int) -> Texture:
    """A photograph of things; blurred a little, as behind what a camera is focused on."""
    from sklearn.datasets import load_sample_image

    name = str(random.choice(["china.jpg", "flower.jpg"]))
    image = Image.fromarray(load_sample_image(name)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32) * np.float32(0.75) + np.float32(20)


BACKGROUNDS: dict[str, Callable[[np.random.Generator, int, int], Texture]] = {
    "paper": _paper,
    "lined": _lined,
    "squared": _squared,
    "board": _board,
    "cloth": _cloth,
    "wood": _wood,
    "stone": _stone,
    "photo": _photo,
}
