"""Pictures and videos of known digits; the videos come from the same synthesiser that `python -m bench.video` uses."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="session")
def bench_video() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of `bench.video`, which is not part of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT)])  # at the end: what is installed comes first
        yield lambda name: importlib.import_module(f"bench.video.{name}")


@pytest.fixture(scope="session")
def picture(digits: list[Pixels]) -> Callable[..., Pixels]:
    """Paint golden digits on plain paper: `picture((number, left, top, size), …)`, `uint8[480, 640, 3]`.

    `size` is that of the 20 pixels of the ink's longer side.
    """

    def paint(
        *placed: tuple[int, int, int, int],
        paper: float | Pixels = 230,
        ink: int = 40,
        shape: tuple[int, int] = (480, 640),
    ) -> Pixels:
        canvas = np.zeros(shape, np.float32) + np.asarray(paper, np.float32)
        for number, left, top, size in placed:
            side = round(size * 28 / 20)
            sharp = Image.fromarray(digits[number]).resize((side, side), Image.Resampling.BICUBIC)
            alpha = np.clip((np.asarray(sharp, np.float32) / 255 - 0.25) / 0.4, 0, 1)
            offset = round(size * 4 / 20)
            area = canvas[top - offset : top - offset + side, left - offset : left - offset + side]
            area += alpha * (ink - area)
        grey = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)

    return paint


class Clip(NamedTuple):
    """A video of known digits."""

    path: Path
    truths: list[list[Any]]
    """Of each frame, `bench.video.synthesis.Truth`."""


@pytest.fixture(scope="session")
def clip(
    tmp_path_factory: pytest.TempPathFactory, bench_video: Callable[[str], ModuleType], digits: list[Pixels]
) -> Clip:
    """Six golden digits, 2 seconds at 25 frames a second, 480x360, on a moving piece of lined paper."""
    pytest.importorskip("av")
    synthesis = bench_video("synthesis")
    scene = synthesis.Scene("lined", "dark", 11, width=480, height=360, seconds=2.0)
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    order = [7, 2, 3, 0, 4, 6]
    return Clip(path, make(synthesis, path, scene, np.stack([digits[number] for number in order]), order))


def make(synthesis: Any, path: Path, scene: Any, images: Pixels, labels: Sequence[int]) -> list[list[Any]]:
    """Write a scene to a file; return what is true in each frame."""
    truths: list[list[Any]] = []

    def frames() -> Iterator[Pixels]:
        for frame, present in synthesis.synthesise(scene, images, labels):
            truths.append(present)
            yield frame

    synthesis.encode(path, frames(), scene.fps)
    return truths


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """Encode frames, `uint8[h, w, 3]` each: `write_video(path, frames, times=None, rotation=0, codec="libx264")`."""
    av = pytest.importorskip("av")
    from fractions import Fraction

    def write(
        path: Path,
        frames: Sequence[Pixels],
        times: Sequence[float] | None = None,
        rotation: int = 0,
        codec: str = "libx264",
    ) -> Path:
        base = Fraction(1, 1000)
        with av.open(path, "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = base
            if rotation:
                stream.set_display_rotation(rotation)
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                frame.pts = round((index / 25 if times is None else times[index]) * 1000)
                frame.time_base = base
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write
