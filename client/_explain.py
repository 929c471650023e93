"""A picture of how an image was read: what was given, what was found in it, what the network saw, what it said.

Draws with Pillow; knows nothing of servers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from client._types import Prediction
from digits.preprocessing import Preprocessing

PANEL = 224
"""Pixels of a panel's side: eight for each of the 28."""

_MARGIN = 16
_CAPTION = 40  # pixels of height above each panel
_SMALL, _LARGE = 13, 16  # font sizes
_LONGEST_LABEL = 11  # characters of a class's name that have room before its bar
_MOST_BARS = 10  # that can be read one below the other in a panel
_PAPER, _TEXT, _FAINT = (255, 255, 255), (34, 34, 34), (136, 136, 136)
_FRAME, _INK, _BAR = (208, 208, 208), (216, 67, 21), (144, 164, 174)


def draw(stages: Preprocessing, prediction: Prediction) -> Image.Image:
    """Return an RGB picture of the stages and of the prediction's probabilities as bars.

    Of more than ten classes the ten most probable have bars, the first of them on top.
    """
    panels = [("as given", f"{stages.grey.shape[1]} x {stages.grey.shape[0]}, in grey", _fit(stages.grey))]
    if stages.ink is None:
        panels.append(("already as MNIST's", "passes unchanged", _fit(stages.pixels, Image.Resampling.NEAREST)))
    else:
        ink = stages.ink
        paper = "dark ink on light paper" if ink.is_dark else "light ink on dark paper"
        panels.append(("without the paper", paper, _fit(_stretched(ink.strength))))
        panels.append(("the digit in it", "what was chosen", _marked(ink.picture, ink.mask, ink.is_dark)))
        panels.append(("the 28 x 28 pixels", "what was sent", _fit(stages.pixels, Image.Resampling.NEAREST)))
    width = (len(panels) + 1) * (PANEL + _MARGIN) + _MARGIN
    picture = Image.new("RGB", (width, _CAPTION + PANEL + 2 * _MARGIN), _PAPER)
    canvas = ImageDraw.Draw(picture)
    for column, (title, note, panel) in enumerate(panels):
        left = _MARGIN + column * (PANEL + _MARGIN)
        _caption(canvas, left, title, note)
        picture.paste(panel, (left, _MARGIN + _CAPTION))
        canvas.rectangle((left - 1, _MARGIN + _CAPTION - 1, left + PANEL, _MARGIN + _CAPTION + PANEL), outline=_FRAME)
    left = _MARGIN + len(panels) * (PANEL + _MARGIN)
    doubt = ", but looks like no digit" if prediction.is_digit is False else ""
    _caption(canvas, left, f"read as {prediction.label}", f"with {prediction.confidence:.1%}{doubt}")
    _bars(canvas, left, _MARGIN + _CAPTION, prediction)
    return picture


def _caption(canvas: ImageDraw.ImageDraw, left: int, title: str, note: str) -> None:
    canvas.text((left, _MARGIN - 4), title, _TEXT, ImageFont.load_default(_LARGE))
    canvas.text((left, _MARGIN + 16), note, _FAINT, ImageFont.load_default(_SMALL))


def _bars(canvas: ImageDraw.ImageDraw, left: int, top: int, prediction: Prediction) -> None:
    font = ImageFont.load_default(_SMALL)
    shown = list(range(len(prediction.probabilities)))
    if len(shown) > _MOST_BARS:
        shown = np.argsort(-prediction.probabilities, kind="stable")[:_MOST_BARS].tolist()
    height = PANEL / len(shown)
    names = [prediction.labels[digit][:_LONGEST_LABEL] for digit in shown]
    first = max(22, *(round(font.getlength(name)) + 8 for name in names))  # pixels for the name before the bar
    room = PANEL - first - 52  # and for the bar
    for line, (digit, name) in enumerate(zip(shown, names, strict=True)):
        probability = float(prediction.probabilities[digit])
        y = top + line * height
        chosen = digit == prediction.digit
        canvas.text((left, y + 3), name, _TEXT if chosen else _FAINT, font)
        end = left + first + max(1, round(room * probability))
        canvas.rectangle((left + first, y + 4, end, y + height - 5), _INK if chosen else _BAR)
        canvas.text((end + 6, y + 3), f"{probability:.1%}", _TEXT if chosen else _FAINT, font)


def _fit(grey: npt.NDArray[np.uint8], method: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The whole of a grey picture, in the middle of a panel."""
    return _in_panel(Image.fromarray(grey).convert("RGB"), method)


def _marked(grey: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], is_dark: bool) -> Image.Image:
    """The picture, pale, with the pixels that were taken for the digit in colour."""
    # The segmentation may have looked at the negative; people see the picture as it was.
    if (float(grey[mask].mean()) > float(grey.mean())) == is_dark:
        grey = 255 - grey
    pale = (grey.astype(np.float32) * 0.45 + (0 if not is_dark else 140)).clip(0, 255)
    colours = np.repeat(pale[..., None], 3, axis=2)
    colours[mask] = _INK
    return _in_panel(Image.fromarray(colours.astype(np.uint8)), Image.Resampling.NEAREST)


def _in_panel(image: Image.Image, method: Image.Resampling) -> Image.Image:
    scale = PANEL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    panel = Image.new("RGB", (PANEL, PANEL), (245, 245, 245))
    fitted = image.resize(size, method if scale > 1 else Image.Resampling.BOX)
    panel.paste(fitted, ((PANEL - size[0]) // 2, (PANEL - size[1]) // 2))
    return panel


def _stretched(strength: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """As bright as it can be made, so that faint ink is seen, too."""
    stretched: npt.NDArray[np.uint8] = (strength * np.float32(255 / max(int(strength.max()), 1))).astype(np.uint8)
    return stretched
