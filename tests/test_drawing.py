from __future__ import annotations

import numpy as np
import pytest

from mnist_wandb.drawing import COLOURS, bar_chart, picture_grid


def colour_counts(picture: object) -> dict[tuple[int, ...], int]:
    pixels = np.asarray(picture).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(c): int(n) for c, n in zip(found.tolist(), counts, strict=True)}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


@pytest.mark.parametrize("names", [("a", "b"), ("a long name of a class", "another one")])
def test_bars_are_as_high_as_their_values(names: tuple[str, ...]) -> None:
    picture = bar_chart("counts", names, {"train": [100, 300], "test": [50, 50]})
    counts = colour_counts(picture)
    legend = 17 * 17
    train, test = (counts[rgb(c)] - legend for c in COLOURS[:2])
    assert train / test == pytest.approx(4, rel=0.05)
    assert rgb(COLOURS[2]) not in counts


@pytest.mark.parametrize("highest", [0, 1, 3, 9.5, 4800, 123456])
def test_chart_of_any_size_can_be_drawn(highest: float) -> None:
    picture = bar_chart("counts", ["only"], {"train": [highest]})
    assert picture.height > 300


def test_grid_shows_each_image_pixel_by_pixel() -> None:
    images = np.random.default_rng(0).integers(0, 255, (7, 29, 28)).astype(np.uint8)
    picture = picture_grid("noise", images, [f"image {i}" for i in range(7)], columns=5, zoom=3)
    shown = np.asarray(picture.convert("L"))
    enlarged = images.repeat(3, axis=1).repeat(3, axis=2)
    windows = np.lib.stride_tricks.sliding_window_view(shown, (29 * 3, 28 * 3))
    corners = windows[:, :, ::86, ::83]
    for image in enlarged:
        places = np.argwhere((corners == image[::86, ::83]).all(axis=(2, 3)))
        assert any(np.array_equal(windows[y, x], image) for y, x in places)
