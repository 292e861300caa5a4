"""The data sets as their publishers split them. One is a function that reads it and a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnist_wandb.config import IMAGE_SIZE, DataConfig, ShortcutConfig
from mnist_wandb.errors import ConfigError, DatasetError
from mnist_wandb.folders import is_image_folder, list_image_folder, read_images
from mnist_wandb.idx import MNIST_FILES, Array, FileNames, has_idx_files, read_idx_files

DIGIT_NAMES = tuple("0123456789")
FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
KUZUSHIJI_NAMES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


@dataclass(frozen=True)
class Source:
    """A data set as its publisher splits it.

    Attributes:
        train_images, test_images: uint8 (N, H, W).
        train_labels, test_labels: int64 (N,), classes from 0.
        class_names: C names.
        train_agrees, test_agrees: bool (N,), whether an image's shortcut tells its class; None
            for data sets without a shortcut.
    """

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array
    class_names: tuple[str, ...]
    train_agrees: Array | None = None
    test_agrees: Array | None = None


@dataclass(frozen=True)
class DatasetRow:
    """One row of `DATASETS`: how to read it, and what is known without reading it.

    `class_names` is empty and the numbers are 0 where only the files tell them.
    """

    read: Callable[[DatasetRow, DataConfig, Path], Source]
    class_names: tuple[str, ...] = ()
    num_train: int = 0
    num_test: int = 0
    torchvision_name: str = ""
    files: FileNames = MNIST_FILES
    image_shape: tuple[int, int, int] = (1, IMAGE_SIZE, IMAGE_SIZE)


@dataclass(frozen=True)
class SourceFacts:
    """What is known of a data set before it is read: see `describe_source`."""

    class_names: tuple[str, ...]
    num_train: int
    num_test: int
    image_shape: tuple[int, int, int]


def read_source(config: DataConfig, data_dir: Path, *, download: bool = True) -> Source:
    """Read a whole data set, downloading it when it is missing.

    Args:
        config: the `data` section; its `dir` wins over `data_dir`.
        data_dir: data folder.
        download: fetch what is missing; else that is an error.

    Raises:
        DatasetError: files are missing and cannot be fetched, or are damaged.
    """
    row, folder = DATASETS[config.dataset], data_folder(config, data_dir)
    if not download and not is_present(row, folder):
        raise DatasetError(f"{config.dataset} is not in {folder}; nothing is downloaded for this")
    return row.read(row, config, folder)


def describe_source(config: DataConfig, data_dir: Path) -> SourceFacts:
    """Class names and sizes without reading images; only an image folder has to be there.

    Raises:
        DatasetError: there is no such image folder.
    """
    row = DATASETS[config.dataset]
    if row.class_names:
        return SourceFacts(row.class_names, row.num_train, row.num_test, row.image_shape)
    train, test = list_image_folder(data_folder(config, data_dir))
    return SourceFacts(train.class_names, len(train.labels), len(test.labels), row.image_shape)


def is_present(row: DatasetRow, data_dir: Path) -> bool:
    """Whether a data set can be read without a download."""
    if row.torchvision_name:
        return has_idx_files(data_dir, row.torchvision_name, row.files)
    return bool(row.class_names) or is_image_folder(data_dir)


def data_folder(config: DataConfig, data_dir: Path) -> Path:
    """The folder that a configuration names, else the given one."""
    try:
        return Path(config.dir).expanduser() if config.dir else data_dir
    except RuntimeError as error:
        raise ConfigError(f"data.dir: got {config.dir!r}: {error}") from None


# ── reading ──────────────────────────────────────────────────────────────────────────────────


def _read_digits(row: DatasetRow, _config: DataConfig, _folder: Path) -> Source:
    """The embedded digits, 8×8 enlarged to 20×20 in the middle of 28×28, as MNIST has them."""
    with np.load(Path(__file__).parent / "digits.npz") as stored:
        small, labels, is_test = stored["images"], stored["labels"], stored["is_test"]
    # Linear interpolation along one axis as a 20×8 matrix (pixel centres aligned).
    centres = np.clip((np.arange(20) + 0.5) * 8 / 20 - 0.5, 0, 7)
    enlarge = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(8)))
    images = np.zeros((len(small), IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    images[:, 4:24, 4:24] = np.rint(enlarge @ (small * (255 / 16)) @ enlarge.T)
    labels = labels.astype(np.int64)
    return Source(
        images[~is_test], labels[~is_test], images[is_test], labels[is_test], row.class_names
    )


def _read_idx(row: DatasetRow, _config: DataConfig, folder: Path) -> Source:
    names = row.class_names
    train, train_labels, test, test_labels = read_idx_files(
        folder, row.torchvision_name, row.files, len(names)
    )
    return Source(train, train_labels, test, test_labels, names)


def _read_image_folder(_row: DatasetRow, _config: DataConfig, folder: Path) -> Source:
    train, test = list_image_folder(folder)
    return Source(
        read_images(train), train.labels, read_images(test), test.labels, train.class_names
    )


def _read_shortcut(row: DatasetRow, config: DataConfig, folder: Path) -> Source:
    """MNIST with one more row of pixels below, which tells a class: often, but not always, its own.

    Everything is drawn from the split's seed. With another `train_match` the same images keep
    their place in the order of who agrees first.
    """
    plain = _read_idx(row, config, folder)
    shortcut = config.shortcut or ShortcutConfig()
    codes = shortcut_codes(config.split_seed, len(plain.class_names))
    parts = []
    for number, (images, labels, match) in enumerate(
        (
            (plain.train_images, plain.train_labels, shortcut.train_match),
            (plain.test_images, plain.test_labels, shortcut.test_match),
        )
    ):
        rng = np.random.default_rng((config.split_seed, 1 + number))
        agrees = rng.random(len(labels)) < match
        others = (labels + rng.integers(1, len(codes), len(labels))) % len(codes)
        told = codes[np.where(agrees, labels, others)]
        parts.append((np.concatenate([images, told[:, None, :]], axis=1), labels, agrees))
    (train, train_labels, train_agrees), (test, test_labels, test_agrees) = parts
    return Source(
        train, train_labels, test, test_labels, plain.class_names, train_agrees, test_agrees
    )


def shortcut_codes(split_seed: int, num_classes: int) -> Array:
    """The row of pixels that stands for each class, the same in training and test images.

    Returns:
        uint8 (C, 28), each pixel 0 or 255.
    """
    rng = np.random.default_rng((split_seed, 0))
    return (rng.integers(0, 2, (num_classes, IMAGE_SIZE)) * 255).astype(np.uint8)


DATASETS: dict[str, DatasetRow] = {
    "digits": DatasetRow(_read_digits, DIGIT_NAMES, 1438, 359),
    "mnist": DatasetRow(_read_idx, DIGIT_NAMES, 60_000, 10_000, "MNIST"),
    "fashion_mnist": DatasetRow(_read_idx, FASHION_NAMES, 60_000, 10_000, "FashionMNIST"),
    "kmnist": DatasetRow(_read_idx, KUZUSHIJI_NAMES, 60_000, 10_000, "KMNIST"),
    "qmnist": DatasetRow(
        _read_idx,
        DIGIT_NAMES,
        60_000,
        60_000,
        "QMNIST",
        (
            "qmnist-train-images-idx3-ubyte",
            "qmnist-train-labels-idx2-int",
            "qmnist-test-images-idx3-ubyte",
            "qmnist-test-labels-idx2-int",
        ),
    ),
    "image_folder": DatasetRow(_read_image_folder),
    "shortcut_mnist": DatasetRow(
        _read_shortcut,
        DIGIT_NAMES,
        60_000,
        10_000,
        "MNIST",
        image_shape=(1, IMAGE_SIZE + 1, IMAGE_SIZE),
    ),
}
"""All data sets by their name in `data.dataset`."""
