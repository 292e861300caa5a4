"""Charts and picture grids as PNG files, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Bytes = npt.NDArray[np.uint8]

INK, MUTED, LINES, PAPER = "#1f2933", "#5f6c7b", "#dde3ea", "#ffffff"
COLOURS = ("#2f6fb3", "#e08a2e", "#5a9e6f", "#9b5fb3")
"""Of the series; blue, orange, green and violet are told apart by most colour-blind people."""
TEXT, TITLE, MARGIN = 18, 24, 28
"""Font sizes and the empty border, in pixels."""


def bar_chart(
    title: str, names: Sequence[str], series: Mapping[str, Sequence[float]]
) -> Image.Image:
    """Bars side by side, one group for each name, one colour for each series.

    Args:
        title: shown above.
        names: of the G groups.
        series: G values of at least 0 each, by the series' name.
    """
    bar = max(8, 26 - 4 * len(series))
    group = max(bar * len(series) + 20, 64)
    slanted = any(_width(name, TEXT) > group - 6 for name in names)
    label_room = 40 if not slanted else round(max(_width(n, TEXT) for n in names) * 0.71) + 44
    left, top, height = 90, 110, 320
    picture = Image.new(
        "RGB", (left + group * len(names) + MARGIN, top + height + label_room), PAPER
    )
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, 20), title, INK, _font(TITLE))
    _legend(draw, list(series))
    highest = max((max(values) for values in series.values()), default=0) or 1
    step = _round_step(highest / 4)
    scale = height / (math.ceil(highest / step) * step)
    for tick in range(math.ceil(highest / step) + 1):
        y = top + height - tick * step * scale
        draw.line((left, y, picture.width - MARGIN, y), LINES, 1)
        draw.text((left - 10, y), f"{tick * step:,g}", MUTED, _font(TEXT), anchor="rm")
    for i, name in enumerate(names):
        start = left + i * group + (group - bar * len(series)) / 2
        for j, values in enumerate(series.values()):
            x, y = start + j * bar, top + height - values[i] * scale
            draw.rectangle((x, y, x + bar - 3, top + height), COLOURS[j % len(COLOURS)])
        middle = (left + (i + 0.5) * group, top + height + 12)
        if slanted:
            _slanted_text(picture, middle, name)
        else:
            draw.text(middle, name, INK, _font(TEXT), anchor="ma")
    return picture


def picture_grid(
    title: str, images: Bytes, captions: Sequence[str], *, columns: int = 5, zoom: int = 4
) -> Image.Image:
    """Images with a caption below each.

    Args:
        title: shown above.
        images: uint8 (N, H, W), light on black; shown as they are, pixel by pixel.
        captions: N texts.
        columns: images in a row.
        zoom: size of a pixel.
    """
    _, height, width = images.shape
    wide = max(width * zoom, *(math.ceil(_width(c, TEXT)) for c in captions)) + 20
    tall = height * zoom + 44
    rows = math.ceil(len(images) / columns)
    room = max(wide * columns, math.ceil(_width(title, TITLE)))
    picture = Image.new("RGB", (room + 2 * MARGIN, 70 + rows * tall + 10), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, 20), title, INK, _font(TITLE))
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = MARGIN + i % columns * wide + (wide - width * zoom) // 2
        y = 70 + i // columns * tall
        large = Image.fromarray(image).resize(
            (width * zoom, height * zoom), Image.Resampling.NEAREST
        )
        picture.paste(large, (x, y))
        middle = (x + width * zoom / 2, y + height * zoom + 6)
        draw.text(middle, caption, INK, _font(TEXT), anchor="ma")
    return picture


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # the one inside Pillow: the same on every machine


def _width(text: str, size: int) -> float:
    return float(_font(size).getlength(text))


def _legend(draw: ImageDraw.ImageDraw, names: Sequence[str]) -> None:
    x = float(MARGIN)
    for i, name in enumerate(names):
        draw.rectangle((x, 66, x + 16, 82), COLOURS[i % len(COLOURS)])
        draw.text((x + 24, 74), name, INK, _font(TEXT), anchor="lm")
        x += 24 + _width(name, TEXT) + 28


def _slanted_text(picture: Image.Image, end: tuple[float, float], text: str) -> None:
    """Text that rises by 45 degrees and ends below a point."""
    label = Image.new("L", (math.ceil(_width(text, TEXT)) + 4, TEXT + 8), 0)
    ImageDraw.Draw(label).text((2, 2), text, 255, _font(TEXT))
    turned = label.rotate(45, expand=True, resample=Image.Resampling.BICUBIC)
    place = (round(end[0] - turned.width + 10), round(end[1]))
    picture.paste(Image.new("RGB", turned.size, INK), place, turned)


def _round_step(value: float) -> float:
    """The next number of the form 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * 0.999)
