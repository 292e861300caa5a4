"""Picture files of any size and polarity as images like those of the data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_wandb.config import IMAGE_SIZE
from mnist_wandb.errors import DatasetError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm"})
DIGIT_BOX = 20
"""MNIST's digits fill a box of 20×20 pixels, centred by their mass in 28×28 (LeCun et al. 1998)."""
DIGIT_INK, OBJECT_INK = 0.2, 0.05
"""What is stronger than this share of the strongest ink counts as part of the digit or object."""

Bytes = npt.NDArray[np.uint8]


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and all pictures in the folders, sorted.

    Raises:
        DatasetError: a path does not exist, or a folder holds no pictures.
    """
    found: list[Path] = []
    for path in paths:
        try:
            is_folder = path.is_dir()
        except (OSError, ValueError) as error:  # too long, or with a null byte
            raise DatasetError(f"{str(path)[:80]!r}: not a path: {error}") from None
        if is_folder:
            inside = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
            )
            if not inside:
                kinds = ", ".join(sorted(SUFFIXES))
                raise DatasetError(f"{path}: no pictures in this folder ({kinds})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DatasetError(f"{path}: no such file or folder")
    return found


def read_picture(path: Path, *, style: str = "digit") -> Bytes:
    """Read a picture as uint8 (28, 28), light on black.

    Args:
        path: any picture that Pillow reads; transparency is shown on white.
        style: `digit` recognises dark on light and inverts it, crops to the digit, fits that
            into 20×20 and centres its mass in 28×28 as in MNIST; `object` inverts, crops and fits
            into 28×28 as in Fashion-MNIST; `as_is` only turns grey and resizes.

    Raises:
        DatasetError: the file is not a picture, is too large, or shows nothing.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            grey = _to_grey(picture)
    except UnidentifiedImageError:
        raise DatasetError(f"{path}: not a picture that can be read; use PNG or JPEG") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:150]
        raise DatasetError(f"{path}: cannot be read as a picture: {reason}") from None
    if style == "as_is":
        if grey.shape == (IMAGE_SIZE, IMAGE_SIZE):
            return grey.round().astype(np.uint8)
        return _resize(grey, IMAGE_SIZE, IMAGE_SIZE).round().astype(np.uint8)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = float(np.median(border))
    ink = background - grey if background > 127 else grey - background
    ink = ink.clip(min=0)
    if ink.max() < 16:
        raise DatasetError(f"{path}: nothing is to be seen on this picture")
    return _centre(ink * (255 / ink.max()), as_digit=style == "digit")


def _to_grey(picture: Image.Image) -> npt.NDArray[np.float32]:
    """float32 (H, W) in [0, 255]."""
    if picture.mode.startswith(("I", "F")):  # 16 bits and more: scale to the full range
        values = np.asarray(picture, dtype=np.float32)
        top = 65535 if picture.mode.startswith("I") else max(float(values.max()), 1e-9)
        return (values * (255 / top)).clip(0, 255)
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(picture.convert("L"), dtype=np.float32)


def _resize(values: Any, height: int, width: int) -> npt.NDArray[np.float32]:
    picture = Image.fromarray(np.asarray(values, dtype=np.float32))
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, dtype=np.float32).clip(0, 255)


def _centre(ink: npt.NDArray[np.float32], *, as_digit: bool) -> Bytes:
    """Crop to the ink and fit it in, as the makers of MNIST or of Fashion-MNIST have done.

    Digits: the longer side to 20 pixels, the centre of mass to the pixel at 14 (LeCun et al.
    1998). Objects: the longer side to 28 pixels, the box in the middle (Xiao et al. 2017).
    """
    strong = ink > (DIGIT_INK if as_digit else OBJECT_INK) * ink.max()
    rows, columns = np.flatnonzero(strong.any(axis=1)), np.flatnonzero(strong.any(axis=0))
    crop = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    factor = (DIGIT_BOX if as_digit else IMAGE_SIZE) / max(crop.shape)
    height, width = (max(1, round(side * factor)) for side in crop.shape)
    small = _resize(crop, height, width)
    if as_digit:
        mass = max(float(small.sum()), 1e-9)
        centre_y = float((small.sum(axis=1) * np.arange(height)).sum() / mass)
        centre_x = float((small.sum(axis=0) * np.arange(width)).sum() / mass)
        top = int(np.clip(round(IMAGE_SIZE / 2 - centre_y), 0, IMAGE_SIZE - height))
        left = int(np.clip(round(IMAGE_SIZE / 2 - centre_x), 0, IMAGE_SIZE - width))
    else:
        top, left = (IMAGE_SIZE - height + 1) // 2, (IMAGE_SIZE - width + 1) // 2
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    image[top : top + height, left : left + width] = small.round().astype(np.uint8)
    return image
