"""Data sets as tensors on the device: reading, downloading, splitting, scaling, batches.

A data set is one function that reads it (`_read_…`) and one row in `DATASETS`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import logging
import math
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from mnist_wandb.config import IMAGE_SIZE, DataConfig
from mnist_wandb.errors import ConfigError, DatasetError

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

DIGIT_NAMES = tuple("0123456789")
FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
KUZUSHIJI_NAMES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
DOWNLOAD_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Source:
    """A data set as its publisher splits it.

    Attributes:
        train_images, test_images: uint8 (N, H, W).
        train_labels, test_labels: int64 (N,), classes from 0.
    """

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


@dataclass(frozen=True)
class DatasetRow:
    """One row of `DATASETS`: how to read it, and what is known without reading it."""

    read: Callable[[DatasetRow, Path], Source]
    class_names: tuple[str, ...]
    num_train: int
    num_test: int
    torchvision_name: str = ""
    files: tuple[str, str, str, str] = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )


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
    """

    name: str
    images: Tensor
    labels: Tensor
    ids: Tensor
    class_names: tuple[str, ...]
    fingerprint: str

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
    config: DataConfig, *, data_dir: Path = Path("data"), device: torch.device | str = "cpu"
) -> Splits:
    """Read a data set (downloading it when it is missing), split it, put it on the device.

    Args:
        config: the `data` section.
        data_dir: data folder where `config.dir` does not name one.
        device: where images and labels lie afterwards.

    Returns:
        Stratified splits; the same configuration gives the same splits on every machine.

    Raises:
        DatasetError: files are missing and cannot be fetched, or are damaged.
        ConfigError: the sizes asked for do not fit the data.
    """
    row = DATASETS[config.dataset]
    try:
        folder = Path(config.dir).expanduser() if config.dir else data_dir
    except RuntimeError as error:
        raise ConfigError(f"data.dir: got {config.dir!r}: {error}") from None
    source = row.read(row, folder)
    rng = np.random.default_rng(config.split_seed)
    num_classes = len(row.class_names)
    train = np.arange(len(source.train_labels))
    test = np.arange(len(source.test_labels))
    if config.val_from == "train":
        val, train = _stratified_split(source.train_labels, config.val_fraction, num_classes, rng)
    else:
        val, test = _stratified_split(source.test_labels, config.val_fraction, num_classes, rng)
    if config.train_size is not None:
        train = _balanced_subset(train, source.train_labels, config.train_size, num_classes, rng)

    def make(name: str, split: str, chosen: Array) -> Split:
        images = source.train_images if split == "train" else source.test_images
        labels = source.train_labels if split == "train" else source.test_labels
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
        if len(chosen) < len(labels):
            images, labels = images[chosen], labels[chosen]
        return _make_split(name, images, labels, chosen, row.class_names, device)

    splits = (
        make("train", "train", train),
        make("val", config.val_from, val),
        make("test", "test", test),
    )
    mean, std = _pixel_statistics(splits[0].images)
    fingerprint = hashlib.sha256("".join(s.fingerprint for s in splits).encode()).hexdigest()
    return Splits(*splits, mean=mean, std=std, fingerprint=fingerprint)


def train_count(config: DataConfig) -> int:
    """Number of training images that `load_dataset` will give, without reading the data.

    Raises:
        ConfigError: `data.train_size` does not fit the data set.
    """
    row = DATASETS[config.dataset]
    count = row.num_train
    if config.val_from == "train":
        count -= round(row.num_train * config.val_fraction)
    if config.train_size is not None:
        _check_train_size(config.train_size, len(row.class_names), count)
    return config.train_size or count


def is_present(row: DatasetRow, data_dir: Path) -> bool:
    """Whether a data set can be read without a download."""
    raw = data_dir / row.torchvision_name / "raw"
    return not row.torchvision_name or all(_find_idx(raw, name) for name in row.files)


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
    """Mean and standard deviation of the pixels in [0, 1]; exact, summed as integers."""
    total = squares = 0
    for chunk in torch.split(images, 8192):
        pixels = chunk.to(torch.int32)
        total += int(pixels.sum(dtype=torch.int64))
        squares += int(pixels.square_().sum(dtype=torch.int64))
    mean = total / images.numel()
    std = max(squares / images.numel() - mean**2, 0.0) ** 0.5
    if std == 0:
        raise DatasetError("the training images are all of one grey; nothing can be learned")
    return mean / 255, std / 255


# ── reading ──────────────────────────────────────────────────────────────────────────────────


def _read_digits(_row: DatasetRow, _data_dir: Path) -> Source:
    """The embedded digits, 8×8 enlarged to 20×20 in the middle of 28×28, as MNIST has them."""
    with np.load(Path(__file__).parent / "digits.npz") as stored:
        small, labels, is_test = stored["images"], stored["labels"], stored["is_test"]
    # Linear interpolation along one axis as a 20×8 matrix (pixel centres aligned).
    centres = np.clip((np.arange(20) + 0.5) * 8 / 20 - 0.5, 0, 7)
    enlarge = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(8)))
    images = np.zeros((len(small), IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    images[:, 4:24, 4:24] = np.rint(enlarge @ (small * (255 / 16)) @ enlarge.T)
    labels = labels.astype(np.int64)
    return Source(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def _read_idx_files(row: DatasetRow, data_dir: Path) -> Source:
    """IDX files in torchvision's layout `<Name>/raw/`, fetched when missing."""
    raw = data_dir / row.torchvision_name / "raw"
    if not is_present(row, data_dir):
        _download(row, data_dir)
    arrays: list[Array] = []
    for images_name, labels_name in (row.files[:2], row.files[2:]):
        images_path, labels_path = _find_idx(raw, images_name), _find_idx(raw, labels_name)
        if images_path is None or labels_path is None:
            raise DatasetError(f"{raw}: {images_name} or {labels_name} is missing")
        images, labels = read_idx(images_path), read_idx(labels_path)
        arrays += _check_pair(images, labels, images_path, labels_path, len(row.class_names))
    return Source(*arrays)


def _find_idx(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _check_pair(
    images: Array, labels: Array, images_path: Path, labels_path: Path, num_classes: int
) -> tuple[Array, Array]:
    if images.ndim != 3 or images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise DatasetError(
            f"{images_path}: found {images.dtype} of shape {images.shape},"
            f" expected uint8 (N, {IMAGE_SIZE}, {IMAGE_SIZE})"
        )
    if labels.ndim == 2:
        labels = labels[:, 0]  # QMNIST: the class is the first of eight columns
    if labels.ndim != 1:
        raise DatasetError(f"{labels_path}: found shape {labels.shape}, expected one label a row")
    if len(images) != len(labels):
        raise DatasetError(
            f"{labels_path}: {len(labels)} labels for the {len(images)} images in"
            f" {images_path.name}; fetch both files again"
        )
    if len(labels) == 0:
        raise DatasetError(f"{images_path}: holds no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DatasetError(
            f"{labels_path}: found label {low if low < 0 else high}, allowed: 0 to"
            f" {num_classes - 1}"
        )
    return images, labels.astype(np.int64)


def read_idx(path: Path) -> Array:
    """Read one IDX file (plain or `.gz`) of unsigned bytes or 32-bit integers.

    Raises:
        DatasetError: wrong magic number, truncated, or too long.

    Source: the format's description on Yann LeCun's MNIST page.
    """
    try:
        if path.suffix == ".gz":
            content = np.frombuffer(bytearray(gzip.decompress(path.read_bytes())), np.uint8)
        else:
            content = np.fromfile(path, np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from None
    magic = content[:4].tobytes()
    dtypes: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint8), 12: np.dtype(">i4")}
    dtype = dtypes.get(magic[2] if len(magic) == 4 else 0)
    if dtype is None or magic[:2] != b"\0\0" or not 1 <= magic[3] <= 4:
        raise DatasetError(
            f"{path}: not an IDX file (starts with {magic.hex(' ') or 'nothing'}, expected"
            " 00 00 08 and the number of dimensions); fetch it again"
        )
    header = 4 + 4 * magic[3]
    shape = tuple(int.from_bytes(content[i : i + 4].tobytes(), "big") for i in range(4, header, 4))
    expected = header + dtype.itemsize * math.prod(shape)
    if len(content) != expected:
        state = "truncated" if len(content) < expected else "too long"
        raise DatasetError(
            f"{path}: {state}: {len(content)} bytes, expected {expected} for shape {shape};"
            " fetch it again"
        )
    array: Array = content[header:].view(dtype).reshape(shape)
    return array


def _download(row: DatasetRow, data_dir: Path) -> None:
    """Fetch through torchvision (which verifies checksums) into a temporary folder, then rename.

    A file lock makes it one download per machine: later processes find the files.
    """
    name = row.torchvision_name
    final = data_dir / name / "raw"
    missing = [folder for folder in (final, *final.parents) if not folder.exists()]
    lock_path = data_dir / f".{name}.lock"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(lock_path),
            tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir) as temporary,
        ):
            if is_present(row, data_dir):
                return
            log.info("downloading %s to %s", name, final)
            _fetch_with_torchvision(name, Path(temporary))
            final.mkdir(parents=True, exist_ok=True)
            for file in row.files:
                shutil.move(Path(temporary) / name / "raw" / file, final / file)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        with contextlib.suppress(OSError):
            lock_path.unlink(missing_ok=True)
        for folder in missing:  # leave no new folders behind
            with contextlib.suppress(OSError):
                folder.rmdir()
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(
            f"{name}: the files are not in {final} and could not be downloaded ({reason});"
            f" put {', '.join(row.files)} there by hand, point MNIST_WANDB_DATA_DIR or data.dir to"
            " a folder that has them, or use data.dataset=digits, which needs no download"
        ) from None


def _fetch_with_torchvision(name: str, root: Path) -> None:
    from torchvision import datasets  # slow to import, and only needed here

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if name == "QMNIST":
                for what in ("train", "test"):
                    datasets.QMNIST(str(root), what=what, download=True)
            else:
                getattr(datasets, name)(str(root), download=True)
    finally:
        socket.setdefaulttimeout(timeout)


DATASETS: dict[str, DatasetRow] = {
    "digits": DatasetRow(_read_digits, DIGIT_NAMES, 1438, 359),
    "mnist": DatasetRow(_read_idx_files, DIGIT_NAMES, 60_000, 10_000, "MNIST"),
    "fashion_mnist": DatasetRow(_read_idx_files, FASHION_NAMES, 60_000, 10_000, "FashionMNIST"),
    "kmnist": DatasetRow(_read_idx_files, KUZUSHIJI_NAMES, 60_000, 10_000, "KMNIST"),
    "qmnist": DatasetRow(
        _read_idx_files,
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
}
"""All data sets by their name in `data.dataset`."""
