from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from mnist_wandb import augment as augment_module
from mnist_wandb.augment import augment, is_off
from mnist_wandb.config import AugmentConfig
from mnist_wandb.data import Splits

KINDS = {
    "rotation_degrees": 15.0,
    "translate_pixels": 3,
    "zoom": 0.2,
    "shear_degrees": 15.0,
    "erase_fraction": 0.1,
    "elastic": 1.0,
}
"""A moderate value of every field."""


def config(**fields: float) -> AugmentConfig:
    return AugmentConfig.model_validate(fields)


def noise(count: int, height: int = 28, width: int = 28) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (count, 1, height, width)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


@pytest.fixture
def at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything uniform is drawn at the upper end of its range."""

    def draw(count: int, limit: float, like: torch.Tensor) -> torch.Tensor:
        return torch.full((count,), float(limit), device=like.device)

    monkeypatch.setattr(augment_module, "_uniform", draw)


def test_every_kind_of_augmentation_is_tested() -> None:
    assert KINDS.keys() == AugmentConfig.model_fields.keys()


def test_off_changes_nothing_and_draws_nothing() -> None:
    images, state = noise(8), torch.get_rng_state()
    assert torch.equal(augment(images, AugmentConfig()), noise(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert is_off(AugmentConfig())


@pytest.mark.parametrize("height", [28, 29])
@pytest.mark.parametrize("fields", [*({k: v} for k, v in KINDS.items()), KINDS], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_kind_changes_images_and_keeps_shape_and_range(
    fields: dict[str, float], height: int, dtype: torch.dtype
) -> None:
    images = noise(16, height).to(dtype)
    torch.manual_seed(0)
    changed = augment(images, config(**fields))
    assert not is_off(config(**fields))
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 255 + 1e-3  # float32 rounding of the interpolation weights
    assert all(not torch.equal(a, b) for a, b in zip(changed, images, strict=True))
    assert torch.equal(images, noise(16, height).to(dtype)), "the input was changed"
    whole_pixels = fields.keys() <= {"translate_pixels", "erase_fraction"}
    assert changed.dtype == (dtype if whole_pixels else torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_drawn_per_image_and_repeatable(kind: str) -> None:
    images = noise(1).expand(16, -1, -1, -1)
    torch.manual_seed(0)
    first, second = (augment(images, config(**{kind: KINDS[kind]})) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(augment(images, config(**{kind: KINDS[kind]})), first)
    assert not torch.equal(first, second)
    assert len({image.numpy().tobytes() for image in first}) > 8


# ── translation ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("height", "limit"), [(28, 1), (28, 3), (29, 2)])
def test_translation_moves_by_whole_pixels_and_never_wraps(height: int, limit: int) -> None:
    images = noise(1, height).expand(400, -1, -1, -1)
    torch.manual_seed(0)
    moved = augment(images, config(translate_pixels=limit))
    padded = F.pad(images[0, 0], (limit,) * 4)
    shifts = range(-limit, limit + 1)
    expected = {
        torch.roll(padded, (dy, dx), (0, 1))[limit:-limit, limit:-limit].numpy().tobytes()
        for dy in shifts
        for dx in shifts
    }
    assert {image.numpy().tobytes() for image in moved} == expected


def test_largest_translation_leaves_part_of_the_image_in_view() -> None:
    torch.manual_seed(0)
    moved = augment(
        torch.full((200, 1, 28, 28), 255, dtype=torch.uint8), config(translate_pixels=14)
    )
    shares = moved.bool().float().mean((1, 2, 3))
    assert shares.min() >= 0.25
    assert shares.max() <= 1


# ── rotation, zoom, shear, shift ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("height", [28, 29])
@pytest.mark.parametrize("kind", ["rotation_degrees", "zoom", "shear_degrees", "elastic"])
def test_a_tiny_warp_changes_nothing(kind: str, height: int) -> None:
    images = noise(4, height)
    assert (augment(images, config(**{kind: 1e-9})) - images).abs().max() < 0.01


@pytest.mark.usefixtures("at_the_limit")
def test_rotation_by_right_angles_is_exact() -> None:
    images = noise(3)
    half = augment(images, config(rotation_degrees=180))
    assert (half - images.flip(2, 3)).abs().max() < 0.01
    quarter = augment(images, config(rotation_degrees=90))
    assert (quarter - torch.rot90(images, 1, (2, 3))).abs().max() < 0.01


@pytest.mark.usefixtures("at_the_limit")
@pytest.mark.parametrize("height", [28, 29])
@pytest.mark.parametrize(
    ("fields", "angle", "scale", "shear", "shift"),
    [
        ({"rotation_degrees": 30}, -30, 1, 0, 0),
        ({"rotation_degrees": 7, "zoom": 0.5}, -7, 1.5, 0, 0),
        ({"zoom": 0.25}, 0, 1.25, 0, 0),
        ({"shear_degrees": 20}, 0, 1, 20, 0),
        ({"zoom": 1e-9, "translate_pixels": 3}, 0, 1, 0, -3),
        ({"rotation_degrees": 1e-9, "translate_pixels": 14}, 0, 1, 0, -14),
    ],
    ids=str,
)
def test_warp_equals_that_of_torchvision(
    fields: dict[str, float], angle: float, scale: float, shear: float, shift: int, height: int
) -> None:
    images = noise(3, height)
    expected = reference.affine(
        images.float(),
        angle=angle,
        translate=[shift, shift],
        scale=scale,
        shear=[shear, 0],
        interpolation=InterpolationMode.BILINEAR,
    )
    assert (augment(images, config(**fields)) - expected).abs().max() < 0.05


@pytest.mark.usefixtures("at_the_limit")
@pytest.mark.parametrize("height", [28, 29])
def test_warp_composes_its_parts_around_the_centre(height: int) -> None:
    images = noise(1, height)
    fields = {"rotation_degrees": 25, "zoom": 0.2, "shear_degrees": 10, "translate_pixels": 2}
    cos, sin, slant = np.cos(np.pi * 25 / 180), np.sin(np.pi * 25 / 180), np.tan(np.pi * 10 / 180)
    rotate, shear = np.array([[cos, sin], [-sin, cos]]), np.array([[1, 0], [slant, 1]])
    matrix = rotate @ shear / 1.2  # of (y, x), from the output to the input
    centre = np.array([(height - 1) / 2, 13.5])
    offset = centre + 2 - matrix @ centre
    expected = ndimage.affine_transform(
        images[0, 0].numpy().astype(float), matrix, offset, order=1, mode="grid-constant"
    )
    assert np.abs(augment(images, config(**fields))[0, 0].numpy() - expected).max() < 0.05


def test_rotation_keeps_a_round_image() -> None:
    y, x = np.indices((28, 28)) - 13.5
    disc = torch.from_numpy(255 * np.exp(-(x**2 + y**2) / 30)).float().expand(50, 1, -1, -1)
    torch.manual_seed(0)
    turned = augment(disc, config(rotation_degrees=180))
    assert (turned - disc).abs().max() < 4
    assert (turned - disc).abs().mean() < 0.5


@pytest.mark.parametrize(
    ("field", "limit"), [("rotation_degrees", 40.0), ("shear_degrees", 40.0), ("zoom", 0.4)]
)
def test_warp_is_drawn_from_the_whole_range_and_no_further(field: str, limit: float) -> None:
    x = torch.arange(28.0) - 13.5
    ramp = (100 + 5 * x).expand(300, 1, 28, 28)  # grey tells the column it was read from
    torch.manual_seed(0)
    inner = augment(ramp, config(**{field: limit}))[:, 0, 10:18, 10:18]
    across = (inner[:, :, 1:] - inner[:, :, :-1]).mean((1, 2)) / 5  # d input x / d output x
    down = (inner[:, 1:] - inner[:, :-1]).mean((1, 2)) / 5  # d input x / d output y
    drawn = {
        "rotation_degrees": torch.atan2(-down, across).rad2deg(),
        "shear_degrees": torch.atan(down).rad2deg(),
        "zoom": 1 / across - 1,
    }[field]
    assert drawn.abs().max() <= limit * 1.001
    assert drawn.max() > 0.95 * limit
    assert drawn.min() < -0.95 * limit
    assert drawn.mean().abs() < 0.15 * limit


# ── elastic distortion, erasing ──────────────────────────────────────────────────────────────


def test_elastic_distortion_displaces_by_about_as_many_pixels_as_asked() -> None:
    ramp = (5 * torch.arange(28.0)).expand(200, 1, 28, 28)
    torch.manual_seed(0)
    displaced = (augment(ramp, config(elastic=1.5)) - ramp)[:, 0, 7:21, 7:21] / 5
    assert 0.5 * 1.5 < displaced.std() < 1.1 * 1.5
    assert displaced.mean().abs() < 0.1
    neighbours = displaced[:, 1:] - displaced[:, :-1]
    assert neighbours.std() < 0.5  # smooth


def test_half_a_pixel_of_elastic_distortion_changes_digits_little(digits: Splits) -> None:
    images = digits.test.images
    torch.manual_seed(0)
    change = (augment(images, config(elastic=0.5)) - images).abs().mean()
    other_image = (images.roll(1, 0).float() - images).abs().mean()
    assert 0 < change < 0.3 * other_image


@pytest.mark.parametrize("height", [28, 29])
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.25, 0.3, 0.4, 0.5])
def test_erasing_blackens_one_rectangle_of_the_given_area(fraction: float, height: int) -> None:
    white = torch.full((1000, 1, height, 28), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    hole = augment(white, config(erase_fraction=fraction))[:, 0] == 0
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None, :])
    for along in (rows, columns):  # without gaps
        assert ((along[:, 1:] & ~along[:, :-1]).sum(1) + along[:, 0]).max() == 1
    area = hole.float().mean((1, 2))
    assert area.mean() == pytest.approx(fraction, rel=0.03)
    assert (area - fraction).abs().max() < 0.06
    for along in (rows, columns):  # anywhere, up to the edges
        assert along.any(0).all()
        share = along.float().mean(0)
        assert (share - share.flip(0)).abs().max() < 0.08
