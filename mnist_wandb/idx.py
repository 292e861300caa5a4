"""IDX files, the form in which MNIST and its kin are published: reading and downloading."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import logging
import math
import shutil
import socket
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from mnist_wandb.config import IMAGE_SIZE
from mnist_wandb.errors import DatasetError

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
FileNames = tuple[str, str, str, str]
"""Training images and labels, test images and labels."""

MNIST_FILES: FileNames = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DOWNLOAD_TIMEOUT_SECONDS = 30.0


def has_idx_files(data_dir: Path, name: str, files: FileNames) -> bool:
    """Whether all four files are there, in torchvision's layout `<name>/raw/`."""
    return all(_find_idx(data_dir / name / "raw", file) for file in files)


def read_idx_files(data_dir: Path, name: str, files: FileNames, num_classes: int) -> list[Array]:
    """Read the four files of a data set, fetched when missing.

    Args:
        data_dir: folder of data sets.
        name: torchvision's name of the data set, and the name of its folder.
        files: their names, without `.gz`.
        num_classes: C; labels are 0 to C - 1.

    Returns:
        Training images uint8 (N, 28, 28) and labels int64 (N,), test images and labels.

    Raises:
        DatasetError: files are missing and cannot be fetched, or do not fit.
    """
    raw = data_dir / name / "raw"
    if not has_idx_files(data_dir, name, files):
        _download(data_dir, name, files)
    arrays: list[Array] = []
    for images_name, labels_name in (files[:2], files[2:]):
        images_path, labels_path = _find_idx(raw, images_name), _find_idx(raw, labels_name)
        if images_path is None or labels_path is None:
            raise DatasetError(f"{raw}: {images_name} or {labels_name} is missing")
        images, labels = read_idx(images_path), read_idx(labels_path)
        arrays += _check_pair(images, labels, images_path, labels_path, num_classes)
    return arrays


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


def _download(data_dir: Path, name: str, files: FileNames) -> None:
    """Fetch through torchvision (which verifies checksums) into a temporary folder, then rename.

    A file lock makes it one download per machine: later processes find the files.
    """
    final = data_dir / name / "raw"
    missing = [folder for folder in (final, *final.parents) if not folder.exists()]
    lock_path = data_dir / f".{name}.lock"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(lock_path),
            tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir) as temporary,
        ):
            if has_idx_files(data_dir, name, files):
                return
            log.info("downloading %s to %s", name, final)
            _fetch_with_torchvision(name, Path(temporary))
            final.mkdir(parents=True, exist_ok=True)
            for file in files:
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
            f" put {', '.join(files)} there by hand, point MNIST_WANDB_DATA_DIR or data.dir to"
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
