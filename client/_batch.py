"""From any number of images to messages of many, for `classify_batch`; makes no calls and knows no transport.

Images that are arrays like MNIST's are judged and packed together, a message at
a time; others are prepared one by one, and what is not an array in a few
threads, as Pillow decodes without Python's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from client import _core
from client._types import Image
from digits.canonical import PIXELS, SIDE, are_canonical

FIRST_IMAGES = 64
"""In the first message, so that the server soon has something to do, and wherever preparing an image takes long."""

MOST_IMAGES = 512
"""In a message, 0.4 MB: each one doubles the one before it up to this."""

MESSAGES_IN_FLIGHT = 4
"""For each connection."""

MAX_THREADS = 4

_SHAPE = (SIDE, SIDE)
_BYTE = np.dtype(np.uint8)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The images of one message."""

    first: int
    """Which of all images is the first of these, counted from 0."""

    pixels: bytes
    """784 for each image."""

    @property
    def count(self) -> int:
        return len(self.pixels) // PIXELS

    def halves(self) -> tuple[Chunk, Chunk]:
        """The same in two, for a server that does not take so many in one message."""
        middle = self.count // 2
        return (
            Chunk(self.first, self.pixels[: middle * PIXELS]),
            Chunk(self.first + middle, self.pixels[middle * PIXELS :]),
        )


class Chunks:
    """An iterator over the chunks of any images; `close` ends its threads.

    What goes wrong with an image, or in the iterable itself, is raised in its
    place, when the images before it have been given out.

    Raises:
        TypeError: this is one image, and not several.
    """

    def __init__(self, images: Iterable[Image]) -> None:
        self._array = _as_array(images)
        if isinstance(images, np.ndarray) and self._array is None:
            images = images.tolist()  # of NumPy's strings, plain ones
        self._source = iter(images) if self._array is None else iter(())
        self._done = 0
        self._size = FIRST_IMAGES
        self._most = MOST_IMAGES
        self._error: Exception | None = None
        self._threads: ThreadPoolExecutor | None = None

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._error is None and (images := self._take()) is not None:
            return self.prepare(images)
        if self._error is not None:
            raise self._error
        raise StopIteration

    @property
    def size(self) -> int:
        """How many images the next chunk should have."""
        return min(self._size, self._most)

    def limit(self, images: int) -> None:
        """Make chunks of so many images at most, from now on."""
        self._most = max(1, images)

    def fail(self, error: Exception) -> None:
        """Raise this after the next chunk: where the images come from, something went wrong."""
        self._error = self._error or error

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> Sequence[Image] | None:
        if self._array is not None:
            rows = self._array[self._done : self._done + self.size]
            return rows if len(rows) else None  # type: ignore[return-value]  # an array is a sequence of its rows
        taken: list[Image] = []
        try:
            for image in self._source:
                taken.append(image)
                if len(taken) == self.size:
                    break
        except Exception as error:  # the caller's own
            self._error = error
        return taken or None

    def prepare(self, images: Sequence[Image] | npt.NDArray[Any]) -> Chunk:
        """Make a chunk of the images, 1 or more, or of those before a bad one, which is raised next."""
        first = self._done
        self._done += len(images)
        stacked = _stack(images)
        if stacked is None:
            self._size = FIRST_IMAGES
            pixels = self._prepare_each(images, first)
        else:
            self._size = min(2 * self._size, MOST_IMAGES)
            good = are_canonical(stacked)
            pixels = stacked.tobytes() if good.all() else self._prepare_some(stacked, ~good, first)
        if not pixels and self._error is not None:
            raise self._error
        return Chunk(first, pixels)

    def _prepare_some(self, images: npt.NDArray[np.uint8], which: npt.NDArray[np.bool_], first: int) -> bytes:
        prepared = images.reshape(-1, PIXELS).copy()
        for index in np.flatnonzero(which).tolist():
            try:
                prepared[index] = _core.prepare(images[index], first + index)
            except Exception as error:
                self._error = error
                return prepared[:index].tobytes()
        return prepared.tobytes()

    def _prepare_each(self, images: Sequence[Image] | npt.NDArray[Any], first: int) -> bytes:
        numbers = range(first, first + len(images))
        prepared: Iterator[npt.NDArray[np.uint8]]
        if all(map(_core.is_quick, images)):
            prepared = map(_core.prepare, images, numbers)
        else:
            if self._threads is None:
                workers = min(MAX_THREADS, os.cpu_count() or 1)
                self._threads = ThreadPoolExecutor(workers, thread_name_prefix="batch-prepare")
            prepared = self._threads.map(_core.prepare, images, numbers)
        rows: list[bytes] = []
        try:
            rows.extend(row.tobytes() for row in prepared)
        except Exception as error:
            self._error = error
        return b"".join(rows)


def _as_array(images: Any) -> npt.NDArray[Any] | None:
    """Several images in one array, `[n, h, w]` or `[n, h, w, c]`; None if they are in something else."""
    single = (str, bytes, bytearray, memoryview, os.PathLike, PILImage.Image)
    if isinstance(images, single) or _is_file(images):
        raise TypeError(
            f"several images are expected, and this is one ({type(images).__name__}); put it in a list, or use classify"
        )
    if not hasattr(images, "__array__"):
        return None
    array = np.asarray(images)
    if array.dtype.kind in "OUS":  # of paths, for example
        return None
    if array.ndim < 3:
        raise TypeError(
            f"several images are expected, [n, h, w], and this is one array {array.dtype}{list(array.shape)}; "
            "put it in a list, or use classify"
        )
    return array


def _is_file(images: Any) -> bool:
    """Whether these would be the lines of a file; what a camera or a film is read with may have a `read`, too."""
    lines = hasattr(images, "readline")
    return lines or (hasattr(images, "read") and not hasattr(images, "__iter__") and not hasattr(images, "__aiter__"))


def _stack(images: Sequence[Image] | npt.NDArray[Any]) -> npt.NDArray[np.uint8] | None:
    """Arrays of MNIST's shape as one, `uint8[n, 28, 28]`; None if any image is something else."""
    if isinstance(images, np.ndarray):
        return images if images.dtype == _BYTE and images.shape[1:] == _SHAPE else None
    rows = []
    for image in images:
        if type(image) is not np.ndarray or image.dtype != _BYTE or image.shape != _SHAPE:
            return None
        rows.append(image if image.flags.c_contiguous else image.copy())
    joined = b"".join(rows)  # type: ignore[arg-type]  # in a tenth of the time that np.stack takes
    return np.frombuffer(joined, np.uint8).reshape(-1, SIDE, SIDE)


# Progress -------------------------------------------------------------------


class Progress(Protocol):
    """What is used of a tqdm bar."""

    def update(self, n: float = 1) -> bool | None: ...

    def close(self) -> None: ...


class _NoProgress:
    def update(self, n: float = 1) -> bool | None:
        return None

    def close(self) -> None:
        pass


def progress_bar(shown: bool, images: object) -> Callable[[], Progress]:
    """What makes a bar on stderr that counts images, or one that does nothing unless it is to be `shown`.

    Raises:
        ImportError: tqdm is not installed.
    """
    if not shown:
        return _NoProgress
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True shows a bar of tqdm's: pip install 'mnist-grpc[progress]'") from error
    return lambda: tqdm(total=len(images) if isinstance(images, Sized) else None, unit=" images")
