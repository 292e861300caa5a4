"""What is in a data set: counts, ranges, scalings, duplicates, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mnist_wandb.config import DataConfig, RunConfig
from mnist_wandb.data import Preprocessing, Split, Splits, load_dataset
from mnist_wandb.drawing import bar_chart, picture_grid
from mnist_wandb.errors import RunError
from mnist_wandb.jobs import Table, open_job
from mnist_wandb.settings import Settings

SCALINGS: tuple[str, ...] = get_args(DataConfig.model_fields["scaling"].annotation)
GRID_SIDE = 5
ONE_HOT_EXAMPLES = 3
CHUNK = 8192
"""Images that are scaled at a time."""


@dataclass(frozen=True)
class Scaled:
    """The training pixels before or after a scaling; `name` is a `data.scaling`, or "pixels"."""

    name: str
    low: float
    high: float
    mean: float
    std: float


@dataclass(frozen=True)
class Exploration:
    """What `explore_dataset` has found.

    Attributes:
        dataset: its name in the configuration.
        class_names: C names.
        image_shape: (channels, height, width).
        dtype: of the stored pixels.
        fingerprint: SHA-256 over the splits.
        class_counts: images of each class, by split.
        scalings: of the training pixels as they are stored, and after each `data.scaling`.
        one_hot: the first training labels and their one-hot vectors.
        repeated: images that have an equal one before them in the same split, by split.
        shared: images of the second split that are in the first one as well, by "train, val" ….
        contradicting: images that are there more than once, with different labels.
    """

    dataset: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    dtype: str
    fingerprint: str
    class_counts: Mapping[str, tuple[int, ...]]
    scalings: tuple[Scaled, ...]
    one_hot: tuple[tuple[int, tuple[int, ...]], ...]
    repeated: Mapping[str, int]
    shared: Mapping[str, int]
    contradicting: int

    def tables(self) -> list[Table]:
        """Everything as tables of texts, for people and for W&B."""
        counts = self.class_counts
        channels, height, width = self.image_shape
        pixels = self.scalings[0]
        facts = [
            *((f"{split} images", f"{sum(counts[split]):,}") for split in counts),
            ("image", f"{height}×{width} pixels, {channels} channel"),
            ("dtype, values", f"{self.dtype}, {pixels.low:g} to {pixels.high:g}"),
            ("classes", str(len(self.class_names))),
            *((f"repeated in {split}", f"{n:,}") for split, n in self.repeated.items()),
            *((f"shared by {pair}", f"{n:,}") for pair, n in self.shared.items()),
            ("equal, but other label", f"{self.contradicting:,}"),
        ]
        classes = [
            (str(i), name, *(f"{counts[split][i]:,}" for split in counts))
            for i, name in enumerate(self.class_names)
        ]
        scaled = [
            (s.name, f"{s.low:.4g}", f"{s.high:.4g}", f"{s.mean:.4f}", f"{s.std:.4f}")
            for s in self.scalings
        ]
        vectors = [
            (str(i), self.class_names[i], " ".join(map(str, vector))) for i, vector in self.one_hot
        ]
        return [
            Table("facts", self.dataset, ("what", "value"), facts),
            Table("classes", "images per class", ("label", "class", *counts), classes),
            Table(
                "scalings",
                "training pixels, as stored and after each data.scaling",
                ("scaling", "lowest", "highest", "mean", "std"),
                scaled,
            ),
            Table("one_hot", "first training labels", ("label", "class", "one-hot"), vectors),
        ]


@dataclass(frozen=True)
class ExploreOutcome:
    """An exploration and where it is kept: the folder, its pictures, and the W&B record."""

    exploration: Exploration
    folder: Path
    pictures: tuple[Path, ...]
    wandb: Mapping[str, str | None]


def run_exploration(
    config: RunConfig, settings: Settings, *, pictures_dir: Path | None = None
) -> ExploreOutcome:
    """Explore the data set of a configuration; keep it in a folder and in W&B.

    Args:
        config: its `data` and `tracking` sections are used.
        settings: the surroundings; see `load_settings`.
        pictures_dir: where the pictures go; default: the folder of the exploration.

    Raises:
        MnistWandbError: with nothing left behind.
    """
    splits = load_dataset(config.data, data_dir=settings.data_dir)
    exploration = explore_dataset(splits, config.data.dataset)
    drawn = draw_pictures(splits, exploration)
    with open_job("explore", config, settings) as job:
        paths = _save_pictures(drawn, pictures_dir or job.folder.path)
        job.write(asdict(exploration))
        job.recorder.forward("log_tables", "explore", exploration.tables())
        job.recorder.forward("log_tables", "explore", [_sample_table(splits.train)])
        job.recorder.forward("log_pictures", "explore", paths)
        counts = {k: list(v) for k, v in exploration.class_counts.items()}
        job.recorder.forward("log_class_counts", "explore", exploration.class_names, counts)
    return ExploreOutcome(exploration, job.folder.path, tuple(paths), job.wandb_facts)


def explore_dataset(splits: Splits, dataset: str = "") -> Exploration:
    """Count and measure everything that the splits can tell.

    Args:
        splits: see `load_dataset`.
        dataset: how it is called.
    """
    parts = (splits.train, splits.val, splits.test)
    num_classes = len(splits.class_names)
    repeated, shared, contradicting = _find_duplicates(parts)
    labels = splits.train.labels[:ONE_HOT_EXAMPLES]
    vectors = torch.nn.functional.one_hot(labels, num_classes).tolist()
    pixels = Preprocessing(1.0, 0.0)
    scalings = [("pixels", pixels)]
    scalings += [(n, Preprocessing.fit(n, splits.mean, splits.std)) for n in SCALINGS]
    return Exploration(
        dataset=dataset,
        class_names=splits.class_names,
        image_shape=splits.image_shape,
        dtype=str(splits.train.images.dtype).removeprefix("torch."),
        fingerprint=splits.fingerprint,
        class_counts={
            s.name: tuple(torch.bincount(s.labels, minlength=num_classes).tolist()) for s in parts
        },
        scalings=tuple(_measure(name, scale, splits.train) for name, scale in scalings),
        one_hot=tuple(zip(labels.tolist(), map(tuple, vectors), strict=True)),
        repeated=repeated,
        shared=shared,
        contradicting=contradicting,
    )


def _measure(name: str, preprocessing: Preprocessing, split: Split) -> Scaled:
    """Range, mean and standard deviation of the model's input, over all training pixels."""
    low, high, total, squares = np.inf, -np.inf, 0.0, 0.0
    for images in torch.split(split.images, CHUNK):
        values = preprocessing(images).double()
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        total += float(values.sum())
        squares += float(values.square().sum())
    mean = total / split.images.numel()
    variance = max(squares / split.images.numel() - mean**2, 0.0)
    return Scaled(name, low, high, mean, variance**0.5)


def _find_duplicates(parts: Sequence[Split]) -> tuple[dict[str, int], dict[str, int], int]:
    """Equal images within each split, across each pair of splits, and with different labels."""
    rows = np.concatenate([split.images.cpu().numpy().reshape(len(split), -1) for split in parts])
    labels = np.concatenate([split.labels.cpu().numpy() for split in parts])
    whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1])))[:, 0]
    _, kinds = np.unique(whole, return_inverse=True)
    of_split = dict(
        zip(
            (split.name for split in parts),
            np.split(kinds, np.cumsum([len(split) for split in parts])[:-1]),
            strict=True,
        )
    )
    repeated = {name: len(k) - len(np.unique(k)) for name, k in of_split.items()}
    names = list(of_split)
    shared = {
        f"{first}, {second}": int(np.isin(of_split[second], of_split[first]).sum())
        for i, first in enumerate(names)
        for second in names[i + 1 :]
    }
    lowest = np.full(kinds.max() + 1, labels.max() + 1)
    highest = np.full(kinds.max() + 1, -1)
    np.minimum.at(lowest, kinds, labels)
    np.maximum.at(highest, kinds, labels)
    return repeated, shared, int((lowest != highest)[kinds].sum())


# ── pictures ─────────────────────────────────────────────────────────────────────────────────


def draw_pictures(splits: Splits, exploration: Exploration) -> dict[str, Image.Image]:
    """Class histogram, a 5×5 grid of training images, and the mean image of each class, by name."""
    train, names = splits.train, splits.class_names
    title = exploration.dataset or "data set"
    images = train.images[:, 0].cpu().numpy()
    labels = train.labels.cpu().numpy()
    first = slice(0, GRID_SIDE**2)
    means = np.stack([images[labels == i].mean(axis=0) for i in range(len(names))])
    return {
        "class_histogram": bar_chart(
            f"{title}: images per class", names, dict(exploration.class_counts)
        ),
        "grid": picture_grid(
            f"{title}: training images", images[first], [names[i] for i in labels[first]]
        ),
        "class_means": picture_grid(
            f"{title}: mean image of each class", means.round().astype(np.uint8), names
        ),
    }


def _save_pictures(pictures: Mapping[str, Image.Image], folder: Path) -> list[Path]:
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            path = folder / f"{name}.png"
            picture.save(path)
            paths.append(path)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return paths


def _sample_table(split: Split) -> Table:
    """The images of the grid as a table, each with its label."""
    count = min(GRID_SIDE**2, len(split))
    images: npt.NDArray[Any] = split.images[:count, 0].cpu().numpy()
    rows = [
        (int(split.ids[i]), images[i], split.class_names[int(split.labels[i])])
        for i in range(count)
    ]
    return Table("samples", "training images", ("id", "image", "class"), rows)
