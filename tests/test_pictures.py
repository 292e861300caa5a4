from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from mnist_wandb.config import DataConfig
from mnist_wandb.data import DATASETS, Splits, is_present, load_dataset
from mnist_wandb.errors import DatasetError
from mnist_wandb.pictures import SUFFIXES, find_pictures, read_picture

CHOSEN = range(0, 60, 5)
"""Positions in the test split of the digits that are drawn."""

Pixels = np.ndarray


@pytest.fixture(params=CHOSEN)
def digit(request: pytest.FixtureRequest, digits: Splits) -> Pixels:
    """A digit as in the data set: uint8 (28, 28), light on black."""
    return digits.test.images[request.param, 0].numpy()


@pytest.fixture
def one_digit(digits: Splits) -> Pixels:
    return digits.test.images[0, 0].numpy()


def read(
    picture: Image.Image, *, suffix: str = "png", style: str = "digit", **how: object
) -> Pixels:
    """Write a picture and read it back."""
    path = Path(f"picture.{suffix}")
    picture.save(path, **how)
    return read_picture(path, style=style).astype(int)


def difference(a: Pixels, b: Pixels) -> float:
    """Mean absolute difference in grey levels, at the best shift by at most one pixel.

    The mass is centred to whole pixels: half a pixel may go either way.
    """
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return min(float(np.abs(np.roll(a, shift, (0, 1)) - b).mean()) for shift in shifts)


def centre_of_mass(pixels: Pixels) -> tuple[float, float]:
    y, x = np.indices(pixels.shape)
    return float((y * pixels).sum() / pixels.sum()), float((x * pixels).sum() / pixels.sum())


def on_paper(
    digit: Pixels, height: int, width: int, top: int, left: int, scale: int
) -> Image.Image:
    """The digit dark on light paper, larger, somewhere."""
    large = Image.fromarray(255 - digit).resize((28 * scale,) * 2, Image.Resampling.BICUBIC)
    paper = Image.new("L", (width, height), 255)
    paper.paste(large, (left, top))
    return paper


# ── what a digit looks like ──────────────────────────────────────────────────────────────────


def test_digit_fills_a_box_of_20_pixels_around_its_centre_of_mass(digit: Pixels) -> None:
    got = read(Image.fromarray(digit))
    rows, columns = np.flatnonzero(got.any(1)), np.flatnonzero(got.any(0))
    assert got.shape == (28, 28)
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    assert got.max() >= 250
    assert centre_of_mass(got) == pytest.approx((14, 14), abs=0.51)


def test_reading_twice_changes_nothing_more(digit: Pixels) -> None:
    once = read(Image.fromarray(digit))
    twice = read(Image.fromarray(once.astype(np.uint8)))
    assert difference(twice, once) < 2.5


def test_digit_of_real_mnist_comes_back_in_its_place(real_data: Path) -> None:
    images = load_dataset(DataConfig(dataset="mnist"), data_dir=real_data).test.images[:100, 0]
    differences = [np.abs(read(Image.fromarray(d)) - d).mean() for d in images.numpy()]
    assert np.median(differences) < 0.1
    assert np.mean(differences) < 1


def test_object_of_real_fashion_mnist_comes_back_in_its_place(real_data: Path) -> None:
    data = DataConfig(dataset="fashion_mnist")
    if not is_present(DATASETS[data.dataset], real_data):
        pytest.skip("needs the real Fashion-MNIST beside the real MNIST")
    images = load_dataset(data, data_dir=real_data).test.images[:100, 0].numpy()
    differences = [np.abs(read(Image.fromarray(d), style="object") - d).mean() for d in images]
    assert np.median(differences) < 2
    assert np.mean(differences) < 6


def test_read_picture_gives_bytes(one_digit: Pixels) -> None:
    Image.fromarray(one_digit).save("picture.png")
    got = read_picture(Path("picture.png"))
    assert got.dtype == np.uint8
    assert got.shape == (28, 28)


# ── the same digit in other clothes ──────────────────────────────────────────────────────────


def as_transparent(digit: Pixels) -> Image.Image:
    ink = np.zeros((28, 28, 4), dtype=np.uint8)  # black ink, where there is any
    ink[..., 3] = digit
    return Image.fromarray(ink)


def as_grey_with_transparency(digit: Pixels) -> Image.Image:
    return as_transparent(digit).convert("LA")


def as_16_bit(digit: Pixels) -> Image.Image:
    return Image.fromarray(digit.astype(np.uint16) * 257)


def as_palette(digit: Pixels) -> Image.Image:
    picture = Image.fromarray(255 - digit)  # the index runs the other way
    picture.putpalette([255 - i // 3 for i in range(768)])
    assert picture.mode == "P"
    return picture


LOSSLESS: dict[str, Callable[[Pixels], Image.Image]] = {
    "dark on light": lambda d: Image.fromarray(255 - d),
    "rgb": lambda d: Image.fromarray(d).convert("RGB"),
    "rgb, dark on light": lambda d: Image.fromarray(255 - d).convert("RGB"),
    "opaque rgba": lambda d: Image.fromarray(d).convert("RGBA"),
    "transparent": as_transparent,
    "grey with transparency": as_grey_with_transparency,
    "palette": as_palette,
    "16 bit": as_16_bit,
    "16 bit, dark on light": lambda d: as_16_bit(255 - d),
    "on grey": lambda d: Image.fromarray((100 + d * 0.6).astype(np.uint8)),
    "wide margins": lambda d: Image.fromarray(np.pad(d, ((3, 50), (70, 2)))),
}


@pytest.mark.parametrize("make", LOSSLESS.values(), ids=LOSSLESS.keys())
def test_digit_is_the_same_in_every_form(
    make: Callable[[Pixels], Image.Image], digit: Pixels
) -> None:
    expected = read(Image.fromarray(digit))
    assert np.abs(read(make(digit)) - expected).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif", "pgm", "webp", "jpg"])
def test_digit_is_the_same_in_every_file_format(suffix: str, digit: Pixels) -> None:
    if suffix == "webp" and not features.check("webp"):
        pytest.skip("this Pillow was built without WebP")
    how = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    expected = read(Image.fromarray(digit))
    got = read(Image.fromarray(digit), suffix=suffix, **how)
    assert f".{suffix}" in SUFFIXES
    if suffix == "jpg":
        assert difference(got, expected) < 4
    else:
        assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("height", "width", "top", "left", "scale"),
    [(200, 300, 20, 110, 6), (300, 200, 130, 0, 5), (168, 168, 0, 0, 6), (1000, 700, 300, 0, 20)],
)
def test_digit_on_paper_is_found_and_scaled(
    height: int, width: int, top: int, left: int, scale: int, digit: Pixels
) -> None:
    expected = read(Image.fromarray(digit))
    got = read(on_paper(digit, height, width, top, left, scale))
    assert difference(got, expected) < 8
    assert difference(got, expected[::-1, ::-1]) > difference(got, expected)
    other_place = read(on_paper(digit, height + 40, width + 40, top + 13, left + 27, scale))
    assert np.array_equal(got, other_place)


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),  # the reader turns it back, clockwise
        (8, Image.Transpose.ROTATE_270),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
    ],
)
def test_rotation_noted_by_the_camera_is_undone(
    orientation: int, stored: Image.Transpose, digit: Pixels
) -> None:
    upright = on_paper(digit, 200, 300, 20, 110, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read(upright.transpose(stored), exif=exif), read(upright))
    photo = read(upright.transpose(stored), suffix="jpg", quality=95, exif=exif)
    assert difference(photo, read(upright)) < 6


def test_grey_paper_with_noise_is_background(digit: Pixels) -> None:
    noise = np.random.default_rng(0).normal(0, 4, (200, 300))
    clean = on_paper(digit, 200, 300, 20, 110, 6)
    photo = np.clip(np.asarray(clean) * 0.7 + 20 + noise, 0, 255).astype(np.uint8)
    assert difference(read(Image.fromarray(photo)), read(clean)) < 6


# ── other styles ─────────────────────────────────────────────────────────────────────────────


def test_as_is_changes_no_image_of_the_right_size(digit: Pixels) -> None:
    assert np.array_equal(read(Image.fromarray(digit), style="as_is"), digit)
    assert np.array_equal(read(Image.fromarray(255 - digit), style="as_is"), 255 - digit)


def test_as_is_only_turns_grey_and_resizes(one_digit: Pixels) -> None:
    paper = on_paper(one_digit, 200, 300, 20, 110, 6)
    expected = np.asarray(paper.resize((28, 28), Image.Resampling.LANCZOS)).astype(int)
    got = read(paper.convert("RGB"), style="as_is")
    assert np.abs(got - expected).max() <= 1


def test_as_is_accepts_a_blank_picture() -> None:
    assert (read(Image.new("L", (50, 40), 200), style="as_is") == 200).all()


@pytest.mark.parametrize(("height", "width"), [(60, 30), (30, 60), (45, 45)])
def test_object_fills_the_whole_image(height: int, width: int) -> None:
    paper = np.full((200, 300), 255, dtype=np.uint8)
    paper[20 : 20 + height, 50 : 50 + width] = 40
    got = read(Image.fromarray(paper), style="object")
    longer = max(height, width)
    assert got.any(1).sum() == 28 * height // longer
    assert got.any(0).sum() == 28 * width // longer
    assert np.abs(np.array(centre_of_mass(got)) - 13.5).max() <= 0.5
    assert got.max() == 255
    assert (got[got > 0] == 255).all()


# ── what cannot be read ──────────────────────────────────────────────────────────────────────


def test_read_picture_rejects_text_file() -> None:
    Path("note.png").write_text("this is not a picture")
    with pytest.raises(DatasetError, match=r"^note\.png: not a picture that can be read; use PNG"):
        read_picture(Path("note.png"))


def test_read_picture_rejects_empty_file() -> None:
    Path("nothing.png").touch()
    with pytest.raises(DatasetError, match=r"^nothing\.png: not a picture that can be read"):
        read_picture(Path("nothing.png"))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_read_picture_rejects_truncated_file(suffix: str, one_digit: Pixels) -> None:
    path = Path(f"half.{suffix}")
    on_paper(one_digit, 200, 300, 20, 110, 6).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match=rf"^half\.{suffix}: cannot be read as a picture: \S+"):
        read_picture(path)


@pytest.mark.parametrize("style", ["digit", "object"])
@pytest.mark.parametrize("grey", [0, 128, 255])
def test_read_picture_rejects_blank_picture(style: str, grey: int) -> None:
    with pytest.raises(DatasetError, match=r"^picture\.png: nothing is to be seen on this picture"):
        read(Image.new("L", (40, 30), grey), style=style)


def test_read_picture_rejects_fully_transparent_picture() -> None:
    with pytest.raises(DatasetError, match="nothing is to be seen"):
        read(Image.new("RGBA", (40, 30), (255, 255, 255, 0)))


@pytest.mark.parametrize("style", ["digit", "as_is"])
def test_read_picture_rejects_decompression_bomb(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (100, 100)).save("huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DatasetError, match=r"^huge\.png: cannot be read .*exceeds limit of 2000"):
        read_picture(Path("huge.png"), style=style)


def test_read_picture_rejects_missing_file() -> None:
    with pytest.raises(DatasetError, match=r"^gone\.png: cannot be read as a picture: .*No such"):
        read_picture(Path("gone.png"))


# ── finding ──────────────────────────────────────────────────────────────────────────────────


def touch(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_find_pictures_keeps_the_order_given_and_sorts_folders() -> None:
    touch("z.png", "a.png", "folder/b.PNG", "folder/a/c.jpeg", "folder/notes.txt", "odd.name")
    found = find_pictures([Path("z.png"), Path("folder"), Path("odd.name"), Path("a.png")])
    expected = ["z.png", "folder/a/c.jpeg", "folder/b.PNG", "odd.name", "a.png"]
    assert [path.as_posix() for path in found] == expected
    assert find_pictures([]) == []


def test_find_pictures_passes_over_folders_named_like_pictures() -> None:
    touch("folder/odd.png/x.png")
    assert find_pictures([Path("folder")]) == [Path("folder/odd.png/x.png")]


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_find_pictures_knows_every_suffix_in_either_case(suffix: str) -> None:
    touch(f"folder/x{suffix}", f"folder/y{suffix.upper()}")
    assert len(find_pictures([Path("folder")])) == 2


def test_find_pictures_rejects_missing_path() -> None:
    touch("there.png")
    with pytest.raises(DatasetError, match=r"^gone\.png: no such file or folder$"):
        find_pictures([Path("there.png"), Path("gone.png")])


def test_find_pictures_rejects_folder_without_pictures() -> None:
    touch("folder/notes.txt")
    with pytest.raises(DatasetError, match=r"^folder: no pictures in this folder \(.*\.png"):
        find_pictures([Path("folder")])
