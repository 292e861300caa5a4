"""Data sets as tensors on the device: splits, scaling, batches. Where they are from: sources.py."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnist_wandb.config import DataConfig
from mnist_wandb.errors import ConfigError, DatasetError
from mnist_wandb.idx import Array, read_idx
from mnist_wandb.sources import (
    DATASETS,
    describe_source,
    is_present,
    read_source,
)

__all__ = [
    "DATASETS",
    "Preprocessing",
    "Split",
    "Splits",
    "batch_indices",
    "is_present",
    "load_dataset",
    "read_idx",
    "train_count",
]


@dataclass(frozen=True)
class Split:
    """Images of one split, resident on one device.

    Attributes:
        name: train, val or test.
        images: uint8 (N, 1, H, W).
        labels: int64 (N,).
        ids: int64 (N,), index of each image in its source file; on the CPU.
        class_names: C names.
        fingerprint: SHA-256 of images, labels and ids.
        shortcut_agrees: bool (N,), whether the image's shortcut tells its class; on the CPU. None
            for data sets without a shortcut.
    """

    name: str
    images: Tensor
    labels: Tensor
    ids: Tensor
    class_names: tuple[str, ...]
    fingerprint: str
    shortcut_agrees: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """A data set, split and on the device; made by `load_dataset`.

    Attributes:
        train, val, test: the splits; no image is in two of them.
        mean, std: of the training pixels in [0, 1].
        fingerprint: SHA-256 over the three splits.
    """

    train: Split
    val: Split
    test: Split
    mean: float
    std: float
    fingerprint: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C class names."""
        return self.train.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width


@dataclass(frozen=True)
class Preprocessing:
    """Turns uint8 images into the model's input, the same in training, scoring and prediction.

    Attributes:
        scale, shift: input = pixel · scale + shift, with pixels in [0, 255].
    """

    scale: float
    shift: float

    @classmethod
    def fit(cls, scaling: str, mean: float, std: float) -> Preprocessing:
        """Choose scale and shift for a `data.scaling`; mean and std are of pixels in [0, 1]."""
        if scaling == "unit":
            return cls(1 / 255, 0.0)
        if scaling == "symmetric":
            return cls(2 / 255, -1.0)
        return cls(1 / (255 * std), -mean / std)

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 or float (N, 1, H, W) in [0, 255] to float32 (N, 1, H, W)."""
        return (images.float() * self.scale).add_(self.shift)


def load_dataset(
    config: DataConfig,
    *,
    data_dir: Path = Path("data"),
    device: torch.device | str = "cpu",
    download: bool = True,
) -> Splits:
    """Read a data set (downloading it when it is missing), split it, put it on the device.

    Args:
        config: the `data` section.
        data_dir: data folder where `config.dir` does not name one.
        device: where images and labels lie afterwards.
        download: fetch what is missing; else that is an error.

    Returns:
        Stratified splits; the same configuration gives the same splits on every machine.

    Raises:
        DatasetError: files are missing and cannot be fetched, or are damaged.
        ConfigError: the sizes asked for do not fit the data.
    """
    source = read_source(config, data_dir, download=download)
    rng = np.random.default_rng(config.split_seed)
    num_classes = len(source.class_names)
    train = np.arange(len(source.train_labels))
    test = np.arange(len(source.test_labels))
    if config.val_from == "train":
        val, train = _stratified_split(source.train_labels, config.val_fraction, num_classes, rng)
    else:
        val, test = _stratified_split(source.test_labels, config.val_fraction, num_classes, rng)
    if config.train_size is not None:
        train = _balanced_subset(train, source.train_labels, config.train_size, num_classes, rng)

    def make(name: str, split: str, chosen: Array) -> Split:
        if split == "train":
            images, labels, agrees = source.train_images, source.train_labels, source.train_agrees
        else:
            images, labels, agrees = source.test_images, source.test_labels, source.test_agrees
        _check_classes(config, name, split, labels, chosen, num_classes)
        if len(chosen) < len(labels):
            images, labels = images[chosen], labels[chosen]
        agreeing = None if agrees is None else torch.from_numpy(agrees[chosen])
        made = _make_split(name, images, labels, chosen, source.class_names, device)
        return replace(made, shortcut_agrees=agreeing)

    splits = (
        make("train", "train", train),
        make("val", config.val_from, val),
        make("test", "test", test),
    )
    mean, std = _pixel_statistics(splits[0].images)
    fingerprint = hashlib.sha256("".join(s.fingerprint for s in splits).encode()).hexdigest()
    return Splits(*splits, mean=mean, std=std, fingerprint=fingerprint)


def _check_classes(
    config: DataConfig, name: str, split: str, labels: Array, chosen: Array, num_classes: int
) -> None:
    """Refuse splits without images of some class."""
    absent = num_classes - len(np.unique(labels))
    if absent:
        raise DatasetError(
            f"{config.dataset}: {absent} classes have no images in the {split} files"
        )
    missing = num_classes - len(np.unique(labels[chosen]))
    if missing:
        raise ConfigError(
            f"data.val_fraction: {config.val_fraction} leaves {missing} of {num_classes}"
            f" classes without {name} images; choose another value"
        )


def train_count(config: DataConfig, data_dir: Path = Path("data")) -> int:
    """Number of training images that `load_dataset` will give, without reading them.

    Raises:
        ConfigError: `data.train_size` does not fit the data set.
        DatasetError: there is no such image folder.
    """
    facts = describe_source(config, data_dir)
    count = facts.num_train
    if config.val_from == "train":
        count -= round(facts.num_train * config.val_fraction)
    if config.train_size is not None:
        _check_train_size(config.train_size, len(facts.class_names), count)
    return config.train_size or count


def batch_indices(
    count: int, batch_size: int, *, seed: int, epoch: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Index batches of one epoch: each image once, the last batch may be smaller.

    The order depends on seed and epoch alone, so a resumed run meets the same batches.

    Returns:
        int64 tensors (≤ batch_size,) on the device.
    """
    # Seeds and epochs are mixed by NumPy's SeedSequence: neighbours share nothing.
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator().manual_seed(mixed)
    return torch.split(torch.randperm(count, generator=generator).to(device), batch_size)


# ── splitting ────────────────────────────────────────────────────────────────────────────────


def _stratified_split(
    labels: Array, fraction: float, num_classes: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Positions of (round(N · fraction) images, the rest), each class in proportion, sorted."""
    counts = np.bincount(labels, minlength=num_classes)
    shares = _largest_remainder(counts * fraction, round(len(labels) * fraction))
    chosen = np.zeros(len(labels), dtype=bool)
    for label in range(num_classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: shares[label]]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def _largest_remainder(shares: Array, total: int) -> Array:
    """Round shares to whole numbers that sum to the total (Hamilton's method)."""
    floors = np.floor(shares).astype(np.int64)
    order = np.argsort(-(shares - floors), kind="stable")
    floors[order[: total - floors.sum()]] += 1
    return floors


def _check_train_size(size: int, num_classes: int, available: int) -> None:
    if size < num_classes:
        raise ConfigError(
            f"data.train_size: {size} leaves a class empty; allowed: {num_classes} (one image of"
            f" each class) to {available}"
        )
    if size > available:
        raise ConfigError(
            f"data.train_size: {size} is more than the {available} training images;"
            " use null for all of them"
        )


def _balanced_subset(
    positions: Array, labels: Array, size: int, num_classes: int, rng: np.random.Generator
) -> Array:
    """As equal a number of each class as the data allow, sorted."""
    _check_train_size(size, num_classes, len(positions))
    available = np.bincount(labels[positions], minlength=num_classes)
    quota = np.zeros(num_classes, dtype=np.int64)
    while (left := size - quota.sum()) > 0:
        open_classes = np.flatnonzero(quota < available)
        each = max(1, left // len(open_classes))
        for label in open_classes[:left]:
            quota[label] = min(available[label], quota[label] + each)
    return np.sort(
        np.concatenate(
            [
                rng.permutation(positions[labels[positions] == label])[: quota[label]]
                for label in range(num_classes)
            ]
        )
    )


def _make_split(
    name: str,
    images: Array,
    labels: Array,
    ids: Array,
    class_names: tuple[str, ...],
    device: torch.device | str,
) -> Split:
    images = np.ascontiguousarray(images)[:, None]
    digest = hashlib.sha256(str(images.shape).encode())
    for part in (images, labels.astype("<i8"), ids.astype("<i8")):
        digest.update(np.ascontiguousarray(part).data)
    return Split(
        name,
        torch.from_numpy(images).to(device),
        torch.from_numpy(np.ascontiguousarray(labels)).to(device),
        torch.from_numpy(ids),
        class_names,
        digest.hexdigest(),
    )


def _pixel_statistics(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the pixels in [0, 1]; exact, from counts of the values."""
    counts = torch.bincount(images.flatten(), minlength=256).tolist()
    total = sum(value * count for value, count in enumerate(counts))
    squares = sum(value**2 * count for value, count in enumerate(counts))
    mean = total / images.numel()
    std = max(squares / images.numel() - mean**2, 0.0) ** 0.5
    if std == 0:
        raise DatasetError("the training images are all of one grey; nothing can be learned")
    return mean / 255, std / 255
