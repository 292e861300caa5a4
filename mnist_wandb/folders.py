"""Folders of picture files as data sets: listing, decoding once, writing a data set out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mnist_wandb.config import IMAGE_SIZE
from mnist_wandb.errors import DatasetError
from mnist_wandb.pictures import SUFFIXES, read_picture

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

LABELS_FILE = "labels.json"
CACHE_FOLDER = ".mnist-wandb"
ORIGIN_FILE = "export.json"
DECODER = 1
"""Counted up when pictures are decoded in another way, so that older caches are not used."""
CHUNK = 500
"""Pictures that one task of a worker process writes."""
MOST_WORKERS = 8


@dataclass(frozen=True)
class Listing:
    """The picture files of one split, not decoded yet.

    Attributes:
        folder: where they are.
        files: names relative to the folder, in the order of the images' ids.
        labels: int64 (N,), classes from 0.
        class_names: C names.
        stamp: SHA-256 of the files' names, sizes and times of change.
    """

    folder: Path
    files: tuple[str, ...]
    labels: Ints
    class_names: tuple[str, ...]
    stamp: str


# ── listing ──────────────────────────────────────────────────────────────────────────────────


def is_image_folder(folder: Path) -> bool:
    """Whether a folder has both splits that `list_image_folder` looks for."""
    return (folder / "train").is_dir() and (folder / "test").is_dir()


def list_image_folder(folder: Path) -> tuple[Listing, Listing]:
    """Find the training and the test pictures of `train/` and `test/`.

    Each split is either `<class>/<picture>` or numbered pictures with a `labels.json`:
    `{"class_names": […], "labels": {"00000.png": 5, …}}`, or only `{"00000.png": 5, …}`.

    Raises:
        DatasetError: a split is missing, empty, or has classes that the other one has not.
    """
    if not is_image_folder(folder):
        raise DatasetError(
            f"{folder}: no image folder: expected train/ and test/ in it, each with"
            f" <class>/<picture> or pictures and {LABELS_FILE}; name the folder with data.dir=…"
        )
    train = _list_split(folder / "train", None)
    return train, _list_split(folder / "test", train.class_names)


def _list_split(folder: Path, class_names: tuple[str, ...] | None) -> Listing:
    try:
        has_labels = (folder / LABELS_FILE).is_file()
        pairs, own_names = _read_labels(folder) if has_labels else _list_classes(folder)
        if not pairs:
            raise DatasetError(
                f"{folder}: no pictures found; expected <class>/<picture>"
                f" ({', '.join(sorted(SUFFIXES))}) or pictures and {LABELS_FILE}"
            )
        names = class_names or own_names
        strange = sorted(set(own_names) - set(names))
        if strange:
            raise DatasetError(
                f"{folder}: has the class {strange[0]!r}, which the training images have not;"
                f" they have: {', '.join(names)}"
            )
        if len(names) < 2:
            raise DatasetError(f"{folder}: one class only ({names[0]}); expected two or more")
        files = tuple(file for file, _ in pairs)
        stamp = _stamp(folder, files)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read: {error.strerror or error}") from None
    positions = {name: i for i, name in enumerate(names)}
    labels = np.array([positions[name] for _, name in pairs], dtype=np.int64)
    return Listing(folder, files, labels, names, stamp)


def _by_number(text: str) -> list[tuple[int, str]]:
    """Sort key that puts 10 after 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"([0-9]+)", text) if p]


def _list_classes(folder: Path) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """(file, class) of `<class>/<picture>`, and the classes, both sorted."""
    names = sorted(
        (e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")),
        key=_by_number,
    )
    pairs = []
    for name in names:
        inside = [
            e.name for e in os.scandir(folder / name) if Path(e.name).suffix.lower() in SUFFIXES
        ]
        pairs += [(f"{name}/{file}", name) for file in sorted(inside, key=_by_number)]
    return pairs, tuple(names)


def _read_labels(folder: Path) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """(file, class) in the order of `labels.json`, and the classes."""
    path = folder / LABELS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path}: not valid JSON: {error}") from None
    form = 'expected {"class_names": […], "labels": {"00000.png": 5, …}} or {"00000.png": 5, …}'
    labels = content.get("labels", content) if isinstance(content, dict) else None
    if not isinstance(labels, dict) or not all(isinstance(v, int | str) for v in labels.values()):
        raise DatasetError(f"{path}: found another form, {form}")
    names = content.get("class_names") if labels is not content else None
    if names is None:
        names = sorted({str(label) for label in labels.values()}, key=_by_number)
        return [(file, str(label)) for file, label in labels.items()], tuple(names)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{path}: class_names: expected a list of texts, {form}")
    pairs = []
    for file, label in labels.items():
        if isinstance(label, int) and 0 <= label < len(names):
            label = names[label]
        if label not in names:
            raise DatasetError(
                f"{path}: {file}: found label {label!r}, allowed: 0 to {len(names) - 1}"
            )
        pairs.append((file, label))
    return pairs, tuple(names)


def _stamp(folder: Path, files: tuple[str, ...]) -> str:
    """SHA-256 over names, sizes and times; one system call a file, so thousands take no second."""
    digest = hashlib.sha256(f"decoder {DECODER}".encode())
    for file in files:
        try:
            facts = os.stat(f"{folder}/{file}")  # noqa: PTH116 - Path is five times slower here
        except FileNotFoundError:
            raise DatasetError(f"{folder / file}: no such file (named in {LABELS_FILE})") from None
        digest.update(f"{file}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()


# ── decoding, once ───────────────────────────────────────────────────────────────────────────


def read_images(listing: Listing) -> Bytes:
    """All pictures of a split as uint8 (N, 28, 28), grey values as they are.

    They are decoded once and kept in a cache beside the splits, or in the home folder where that
    cannot be written; a file that is new, gone or changed has them decoded again.

    Raises:
        DatasetError: a file is not a picture that can be read.
    """
    places = _cache_places(listing.folder)
    for place in places:
        images = _read_cache(place, listing)
        if images is not None:
            return images
    log.info("%s: decoding %s pictures, once", listing.folder, f"{len(listing.files):,}")
    images = np.empty((len(listing.files), IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    for i, file in enumerate(listing.files):
        images[i] = read_picture(listing.folder / file, style="as_is")
    if not any(_write_cache(place, listing, images) for place in places):
        log.info("%s: no cache could be written; the next run decodes again", listing.folder)
    return images


def _cache_places(folder: Path) -> list[Path]:
    """Where the decoded pictures of a split may be kept, the best place first."""
    places = [folder.parent / CACHE_FOLDER / f"{folder.name}.npz"]
    with contextlib.suppress(RuntimeError):  # no home folder
        of_folder = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:32]
        places.append(Path.home() / ".cache" / "mnist-wandb" / f"{of_folder}.npz")
    return places


def _read_cache(path: Path, listing: Listing) -> Bytes | None:
    """The decoded pictures, or None where they are missing, damaged or of other files."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["stamp"]) != listing.stamp:
                return None
            images: Bytes = stored["images"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    expected = (len(listing.files), IMAGE_SIZE, IMAGE_SIZE)
    return images if images.shape == expected and images.dtype == np.uint8 else None


def _write_cache(path: Path, listing: Listing, images: Bytes) -> bool:
    """Write to a temporary name, then rename; False where the place cannot be written."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, stamp=np.array(listing.stamp), images=images)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return False
    return True


# ── writing ──────────────────────────────────────────────────────────────────────────────────


def write_image_folder(
    out: Path,
    splits: Mapping[str, tuple[Bytes, Ints]],
    class_names: tuple[str, ...],
    *,
    origin: Mapping[str, Any],
    num_workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write each split as numbered PNGs with a `labels.json`; goes on where it was stopped.

    Args:
        out: folder to make or to complete.
        splits: images uint8 (N, H, W) and labels int64 (N,) by split name.
        class_names: C names.
        origin: what is written, kept in `export.json`; another export there is refused.
        num_workers: processes; default: one for each core.
        on_progress: called with the pictures that are there and those there will be.

    Returns:
        Number of pictures written now; the others were there.

    Raises:
        DatasetError: the folder holds something else, or cannot be written.
    """
    try:
        _claim(out, dict(origin))
        tasks: list[tuple[Path, list[int], Bytes]] = []
        total = sum(len(images) for images, _ in splits.values())
        for split, (images, _) in splits.items():
            folder = out / split
            folder.mkdir(parents=True, exist_ok=True)
            there = {entry.name for entry in os.scandir(folder)}
            missing = [i for i in range(len(images)) if _picture_name(i) not in there]
            for start in range(0, len(missing), CHUNK):
                numbers = missing[start : start + CHUNK]
                tasks.append((folder, numbers, images[numbers]))
        left = sum(len(numbers) for _, numbers, _ in tasks)
        done = total - left
        on_progress(done, total)
        for count in _work(tasks, num_workers or min(os.cpu_count() or 1, MOST_WORKERS)):
            done += count
            on_progress(done, total)
        for split, (_, labels) in splits.items():
            named = {_picture_name(i): int(label) for i, label in enumerate(labels)}
            text = json.dumps({"class_names": class_names, "labels": named}, indent=0)
            _write_whole(out / split / LABELS_FILE, text.encode())
    except OSError as error:
        raise DatasetError(f"{out}: cannot be written: {error.strerror or error}") from None
    return left


def _picture_name(number: int) -> str:
    return f"{number:05}.png"


def _claim(out: Path, origin: dict[str, Any]) -> None:
    """Take a new or empty folder, or one of the same export."""
    path = out / ORIGIN_FILE
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before != origin:
            raise DatasetError(f"{out}: holds another export ({path}); choose another folder")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out}: is there already and not an export; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_whole(path, json.dumps(origin).encode())


def _work(tasks: list[tuple[Path, list[int], Bytes]], num_workers: int) -> Iterator[int]:
    """Do the tasks, in processes where there are enough of them; yields pictures per task."""
    if num_workers == 1 or len(tasks) < 8 * num_workers:
        yield from (_write_pictures(*task) for task in tasks)
        return
    # Not forked: the program's other threads would be missing in the children.
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_ignore_ctrl_c
    )
    try:
        pending: set[Future[int]] = set()
        for task in tasks:
            pending.add(pool.submit(_write_pictures, *task))
            if len(pending) > 2 * num_workers:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        yield from (future.result() for future in pending)
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_ctrl_c() -> None:
    """Only the parent answers Ctrl-C; the pictures under way are finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_pictures(folder: Path, numbers: list[int], images: Bytes) -> int:
    for number, image in zip(numbers, images, strict=True):
        temporary = folder / f".{number}.tmp"
        Image.fromarray(image).save(temporary, format="PNG")
        temporary.replace(folder / _picture_name(number))
    return len(numbers)


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
