from __future__ import annotations

import functools
import gzip
import hashlib
import re
import shutil
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import write_idx
from sklearn.datasets import load_digits

from mnist_wandb.config import DataConfig
from mnist_wandb.data import (
    DATASETS,
    Preprocessing,
    Splits,
    batch_indices,
    is_present,
    load_dataset,
    read_idx,
    train_count,
)
from mnist_wandb.errors import ConfigError, DatasetError
from mnist_wandb.folders import write_image_folder
from mnist_wandb.loading import load_config

SPLIT_NAMES = ("train", "val", "test")
FILE_NAMES = DATASETS["mnist"].files
DOWNLOADED = sorted(name for name, row in DATASETS.items() if row.torchvision_name)


def load(data_dir: Path = Path("data"), dataset: str = "mnist", **fields: object) -> Splits:
    return load_dataset(DataConfig(dataset=dataset, **fields), data_dir=data_dir)


def write_dataset(
    data_dir: Path, train_labels: np.ndarray, test_labels: np.ndarray, dataset: str = "mnist"
) -> Path:
    """Images of noise with these labels, in a data set's own files; returns their folder."""
    row = DATASETS[dataset]
    raw = data_dir / row.torchvision_name / "raw"
    rng = np.random.default_rng(1)
    for labels, images_name, labels_name in zip(
        (train_labels, test_labels), row.files[::2], row.files[1::2], strict=True
    ):
        images = rng.integers(0, 256, (len(labels), 28, 28)).astype(np.uint8)
        stored = labels.astype(np.uint8)
        if "idx2" in labels_name:  # QMNIST: class, then seven columns about the writer
            rest = rng.integers(-1, 100_000, (len(labels), 7))
            stored = np.column_stack([labels, rest]).astype(np.int32)
        write_idx(raw / images_name, images)
        write_idx(raw / labels_name, stored)
    return raw


def cycle(count: int) -> np.ndarray:
    return np.arange(count) % 10


def counts(splits: Splits, name: str) -> np.ndarray:
    return np.bincount(getattr(splits, name).labels, minlength=10)


def ids(splits: Splits, name: str) -> set[int]:
    return set(getattr(splits, name).ids.tolist())


# ── the embedded digits ──────────────────────────────────────────────────────────────────────


def test_embedded_digits_equal_those_of_scikit_learn() -> None:
    reference = load_digits()
    with np.load(Path(load_dataset.__code__.co_filename).parent / "digits.npz") as stored:
        assert np.array_equal(stored["images"], reference.images)
        assert np.array_equal(stored["labels"], reference.target)
        test_share = np.bincount(reference.target[stored["is_test"]]) / np.bincount(
            reference.target
        )
    assert test_share == pytest.approx(0.2, abs=0.005)  # stratified


def test_digits_are_enlarged_to_20_pixels_in_the_middle_of_28(digits: Splits) -> None:
    with np.load(Path(load_dataset.__code__.co_filename).parent / "digits.npz") as stored:
        small = torch.from_numpy(stored["images"][stored["is_test"]])[:, None]
    enlarged = F.interpolate(small * (255 / 16), (20, 20), mode="bilinear", align_corners=False)
    expected = F.pad(enlarged, (4, 4, 4, 4))
    assert digits.test.images.dtype == torch.uint8
    assert (digits.test.images - expected).abs().max() <= 0.501  # rounded, black outside
    assert len(digits.train) + len(digits.val) == 1438
    assert len(digits.test) == 359


def test_digits_split_is_the_same_on_every_machine(digits: Splits) -> None:
    assert digits.fingerprint == (
        "c72b70352c495ecd4bc73b34d408d406e3ade101c40d0128c201fe680ce0e3c3"
    )


def test_split_holds_images_labels_ids_and_names_of_one_source(digits: Splits) -> None:
    everything = load(dataset="digits", val_from="test").train
    assert everything.ids.tolist() == list(range(1438))
    for split in (digits.train, digits.val):
        assert split.images.shape == (len(split), 1, 28, 28)
        assert split.labels.dtype == split.ids.dtype == torch.int64
        assert torch.equal(split.images, everything.images[split.ids])
        assert torch.equal(split.labels, everything.labels[split.ids])
    assert digits.class_names == tuple("0123456789")
    assert digits.image_shape == (1, 28, 28)


# ── the table ────────────────────────────────────────────────────────────────────────────────


def test_every_dataset_of_the_configuration_has_a_row() -> None:
    assert get_args(DataConfig.model_fields["dataset"].annotation) == tuple(DATASETS)


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_dataset_is_read_from_its_files(dataset: str, tmp_path: Path) -> None:
    row = DATASETS[dataset]
    assert dataset == "digits" or not is_present(row, tmp_path)
    if row.torchvision_name:
        write_dataset(tmp_path, cycle(100), cycle(50), dataset)
    elif dataset == "image_folder":
        noise = np.random.default_rng(0).integers(0, 256, (150, 28, 28)).astype(np.uint8)
        parts = {"train": (noise[:100], cycle(100)), "test": (noise[100:], cycle(50))}
        write_image_folder(tmp_path / "export", parts, tuple("0123456789"), origin={})
        tmp_path /= "export"
    assert is_present(row, tmp_path)
    splits = load(tmp_path, dataset)
    assert splits.class_names == (row.class_names or tuple("0123456789"))
    assert len(set(splits.class_names)) == 10
    assert splits.image_shape == row.image_shape
    assert train_count(DataConfig(dataset=dataset), tmp_path) == (
        row.num_train - round(row.num_train * 0.1) or len(splits.train)
    )
    if dataset != "digits":
        assert [len(getattr(splits, name)) for name in SPLIT_NAMES] == [90, 10, 50]
        assert torch.equal(splits.test.labels, torch.arange(50) % 10)
    else:
        assert len(splits.train) + len(splits.val) == row.num_train
        assert len(splits.test) == row.num_test


@pytest.mark.parametrize("dataset", DOWNLOADED)
def test_row_agrees_with_torchvision(dataset: str) -> None:
    row = DATASETS[dataset]
    reference = getattr(torchvision.datasets, row.torchvision_name)
    names = [re.sub(r"^(\d) - \w+$", r"\1", name) for name in reference.classes]
    assert row.class_names == tuple(names)
    resources = reference.resources
    if isinstance(resources, dict):
        resources = resources["train"] + resources["test"]
    assert row.files == tuple(Path(url).stem for url, _ in resources)


def test_dir_of_the_configuration_wins_over_the_data_folder(mnist_like: Path) -> None:
    assert len(load(Path("elsewhere"), dir=str(mnist_like)).test) == 100


def test_dir_may_start_with_a_tilde(mnist_like: Path) -> None:
    shutil.move(mnist_like, Path.home() / "mine")
    assert len(load(dir="~/mine").test) == 100


# ── IDX files ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.array([0, 255], dtype=np.uint8),
        np.array([[-1, 2**31 - 1], [-(2**31), 7]], dtype=np.int32),
        np.zeros((0, 28, 28), dtype=np.uint8),
    ],
    ids=["images", "labels", "int32", "empty"],
)
def test_read_idx_gives_back_what_was_written(
    array: np.ndarray, packed: bool, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    write_idx(path, array)
    if packed:
        path = tmp_path / "file.gz"
        path.write_bytes(gzip.compress((tmp_path / "file").read_bytes()))
    read = read_idx(path)
    assert np.array_equal(read, array)
    assert read.shape == array.shape
    assert read.dtype.newbyteorder("=") == array.dtype


HEADER = bytes([0, 0, 8, 1, 0, 0, 0, 5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + b"1234", r"truncated: 12 bytes, expected 13 for shape \(5,\); fetch it again"),
        (HEADER + b"123456", r"too long: 14 bytes, expected 13 for shape \(5,\)"),
        (HEADER[:6], "truncated: 6 bytes"),
        (b"", r"not an IDX file \(starts with nothing, expected 00 00 08"),
        (b"\0\0", r"not an IDX file \(starts with 00 00,"),
        (b"<!DOCTYPE html>", r"not an IDX file \(starts with 3c 21 44 4f, expected 00 00 08"),
        (b"\0\0\x0d\1" + HEADER[4:] + bytes(20), "not an IDX file"),
        (b"\0\0\x08\0", "not an IDX file"),
        (b"\0\0\x08\3" + b"\xff" * 12, r"truncated: 16 bytes, expected \d{29} for shape"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_read_idx_rejects_damaged_file(
    content: bytes, message: str, packed: bool, tmp_path: Path
) -> None:
    path = tmp_path / ("file.gz" if packed else "file")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DatasetError, match=f"^{re.escape(str(path))}: {message}"):
        read_idx(path)


CUT_OFF = gzip.compress(HEADER + b"12345", mtime=0)[:-4]  # the same bytes in every test process


@pytest.mark.parametrize("content", [b"not packed", CUT_OFF], ids=["no gz", "cut off"])
def test_read_idx_rejects_damaged_gz(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"file\.gz: cannot be read: "):
        read_idx(path)


def test_read_idx_rejects_gz_with_a_damaged_middle(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 30, 5000).astype(np.uint8).tobytes()
    packed = gzip.compress(b"\0\0\x08\1\0\0\x13\x88" + noise)
    path = tmp_path / "file.gz"
    for position in range(20, len(packed), 50):
        damaged = bytearray(packed)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"file\.gz: cannot be read: "):
            read_idx(path)


def test_load_dataset_reads_packed_files_like_plain_ones(mnist_like: Path) -> None:
    plain = load(mnist_like)
    for path in (mnist_like / "MNIST" / "raw").iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert load(mnist_like).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (1, cycle(299), "299 labels for the 300 images in train-images-idx3-ubyte; fetch both"),
        (3, np.full(100, 10), "found label 10, allowed: 0 to 9"),
        (3, np.full(100, -1, dtype=np.int32), "found label -1, allowed: 0 to 9"),
        (1, np.zeros((300, 2, 2)), r"found shape \(300, 2, 2\), expected one label a row"),
        (0, np.zeros((300, 27, 28)), r"found uint8 of shape \(300, 27, 28\), expected uint8 \(N,"),
        (0, np.zeros((300, 784)), r"found uint8 of shape \(300, 784\), expected uint8 \(N, 28, 28"),
        (2, np.zeros((100, 28, 28), dtype=np.int32), r"found .*i.*4.* of shape \(100, 28, 28\)"),
    ],
)
def test_load_dataset_rejects_files_that_do_not_fit(
    file: int, array: np.ndarray, message: str, mnist_like: Path
) -> None:
    path = mnist_like / "MNIST" / "raw" / FILE_NAMES[file]
    write_idx(path, array if array.dtype == np.int32 else array.astype(np.uint8))
    with pytest.raises(DatasetError, match=f"^{re.escape(str(path))}: {message}"):
        load(mnist_like)


def test_load_dataset_rejects_empty_data_set(mnist_like: Path) -> None:
    write_dataset(mnist_like, cycle(0), cycle(100))
    with pytest.raises(DatasetError, match="train-images-idx3-ubyte: holds no images"):
        load(mnist_like)


def test_load_dataset_rejects_truncated_file(mnist_like: Path) -> None:
    path = mnist_like / "MNIST" / "raw" / FILE_NAMES[2]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match="t10k-images-idx3-ubyte: truncated: 78415 bytes"):
        load(mnist_like)


def test_load_dataset_rejects_images_without_contrast(mnist_like: Path) -> None:
    path = mnist_like / "MNIST" / "raw" / FILE_NAMES[0]
    write_idx(path, np.full((300, 28, 28), 7, dtype=np.uint8))
    with pytest.raises(DatasetError, match="training images are all of one grey"):
        load(mnist_like)


# ── downloads ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchvision downloads from, nobody listens."""
    nobody = "http://127.0.0.1:9/"
    monkeypatch.setenv("no_proxy", "*")
    for dataset in DOWNLOADED:
        reference = getattr(torchvision.datasets, DATASETS[dataset].torchvision_name)
        monkeypatch.setattr(reference, "mirrors", [nobody])
        if isinstance(reference.resources, dict):
            resources = {
                key: [(nobody + Path(url).name, md5) for url, md5 in pairs]
                for key, pairs in reference.resources.items()
            }
            monkeypatch.setattr(reference, "resources", resources)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("dataset", DOWNLOADED)
def test_missing_files_without_network_are_one_clear_error(dataset: str, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DatasetError) as caught:
        load(tmp_path / "new", dataset)
    row = DATASETS[dataset]
    folder = tmp_path / "new" / row.torchvision_name / "raw"
    message = str(caught.value)
    assert f"{row.torchvision_name}: the files are not in {folder}" in message
    assert "could not be downloaded (" in message
    assert "refused" in message
    assert f"put {', '.join(row.files)} there by hand" in message
    assert "MNIST_WANDB_DATA_DIR or data.dir" in message
    assert "data.dataset=digits, which needs no download" in message
    assert "\n" not in message
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("folder", ["a/b/c", "there", "there/new"])
def test_failed_download_leaves_the_folders_as_they_were(folder: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DatasetError, match="could not be downloaded"):
        load(tmp_path / folder)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("no_network")
def test_failed_download_leaves_other_files_alone(mnist_like: Path) -> None:
    (mnist_like / "MNIST" / "raw" / FILE_NAMES[1]).unlink()
    before = {p: p.read_bytes() for p in mnist_like.rglob("*") if p.is_file()}
    with pytest.raises(DatasetError, match=r"MNIST: the files are not in .* could not be down"):
        load(mnist_like)
    with pytest.raises(DatasetError, match="FashionMNIST: the files are not in"):
        load(mnist_like, "fashion_mnist")
    assert {p: p.read_bytes() for p in mnist_like.rglob("*") if p.is_file()} == before
    assert not (mnist_like / "FashionMNIST").exists()


@pytest.mark.usefixtures("no_network")
def test_data_folder_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(DatasetError, match=r"MNIST: the files are not in .*taken"):
        load(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


class Publisher:
    """A server on this machine that gives out packed files, slowly, and counts the requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                publisher.requests[name] += 1
                time.sleep(0.02)  # leaves time for a second download to begin
                self.send_response(200)
                self.send_header("Content-Length", str(len(publisher.files[name])))
                self.end_headers()
                self.wfile.write(publisher.files[name])

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Publisher]]:
    """Serve a small data set of noise where torchvision looks for the real one."""
    publisher = Publisher()
    thread = threading.Thread(target=publisher.server.serve_forever, args=(0.01,))
    thread.start()

    def start(dataset: str = "mnist", *, damaged: str = "") -> Publisher:
        row = DATASETS[dataset]
        raw = write_dataset(tmp_path / "published", cycle(100), cycle(50), dataset)
        resources = []
        for name in row.files:
            content = gzip.compress((raw / name).read_bytes())
            resources.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
            publisher.files[f"{name}.gz"] = content + (b"!" if name == damaged else b"")
        reference = getattr(torchvision.datasets, row.torchvision_name)
        if isinstance(reference.resources, dict):
            pairs = [(publisher.url + name, md5) for name, md5 in resources]
            split = {**reference.resources, "train": pairs[:2], "test": pairs[2:]}
            monkeypatch.setattr(reference, "resources", split)
        else:
            monkeypatch.setattr(reference, "mirrors", [publisher.url])
            monkeypatch.setattr(reference, "resources", resources)
        monkeypatch.setenv("no_proxy", "*")
        return publisher

    yield start
    publisher.server.shutdown()
    publisher.server.server_close()
    thread.join()


@pytest.mark.parametrize("dataset", DOWNLOADED)
def test_missing_files_are_downloaded_once(
    dataset: str,
    publish: Callable[..., Publisher],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    publisher = publish(dataset)
    splits = load(tmp_path / "got", dataset)
    assert splits.fingerprint == load(tmp_path / "published", dataset).fingerprint
    row = DATASETS[dataset]
    files = {p.relative_to(tmp_path / "got") for p in (tmp_path / "got").rglob("*") if p.is_file()}
    folder = Path(row.torchvision_name) / "raw"
    assert {f for f in files if f.suffix != ".lock"} == {folder / name for name in row.files}
    requests = publisher.requests.copy()
    assert requests.keys() == publisher.files.keys()
    assert load(tmp_path / "got", dataset).fingerprint == splits.fingerprint
    assert publisher.requests == requests
    assert capfd.readouterr().out == ""


def test_two_at_once_make_one_download(publish: Callable[..., Publisher], tmp_path: Path) -> None:
    publisher = publish()
    load(tmp_path / "alone")
    alone = publisher.requests.copy()
    publisher.requests.clear()
    together = threading.Barrier(2)
    fingerprints: list[str] = []

    def work() -> None:
        together.wait()
        fingerprints.append(load(tmp_path / "shared").fingerprint)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fingerprints) == 2
    assert len(set(fingerprints)) == 1
    assert publisher.requests == alone


@pytest.mark.parametrize("damaged", FILE_NAMES[::3])
def test_download_with_wrong_checksum_is_refused(
    damaged: str, publish: Callable[..., Publisher], tmp_path: Path
) -> None:
    publish(damaged=damaged)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DatasetError, match=rf"could not be downloaded \(.*{damaged}.*corrupted"):
        load(tmp_path / "got")
    assert set(tmp_path.rglob("*")) == before


class Rubbish(socketserver.BaseRequestHandler):
    """Answers, but not in HTTP."""

    def handle(self) -> None:
        self.request.recv(65536)
        self.request.sendall(b"rubbish\r\n\r\n")


def test_answer_that_is_not_http_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Rubbish) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        try:
            with pytest.raises(DatasetError, match="could not be downloaded"):
                load(tmp_path / "new")
        finally:
            server.shutdown()
            thread.join()
    assert not (tmp_path / "new").exists()


def test_qmnist_labels_are_the_first_of_eight_columns(tmp_path: Path) -> None:
    labels = np.random.default_rng(2).permutation(cycle(200))
    write_dataset(tmp_path, labels, labels[::-1], "qmnist")
    splits = load(tmp_path, "qmnist")
    assert splits.test.labels.tolist() == labels[::-1].tolist()
    assert splits.train.labels.tolist() == labels[splits.train.ids].tolist()
    reference = torchvision.datasets.QMNIST(str(tmp_path), what="test", compat=True)
    assert splits.test.labels.tolist() == reference.targets[:, 0].tolist()
    assert torch.equal(splits.test.images[:, 0], reference.data)


# ── the real MNIST ───────────────────────────────────────────────────────────────────────────


def test_real_mnist_has_the_known_counts_and_statistics(real_data: Path) -> None:
    splits = load(real_data)
    assert [len(getattr(splits, name)) for name in SPLIT_NAMES] == [54_000, 6_000, 10_000]
    assert splits.mean == pytest.approx(0.1307, abs=1e-3)
    assert splits.std == pytest.approx(0.3081, abs=1e-3)
    whole = load(real_data, val_from="test")
    assert (round(whole.mean, 4), round(whole.std, 4)) == (0.1307, 0.3081)
    assert counts(whole, "train")[:3].tolist() == [5923, 6742, 5958]


@pytest.mark.parametrize("train", [True, False])
def test_real_mnist_is_read_as_by_torchvision(real_data: Path, train: bool) -> None:
    reference = torchvision.datasets.MNIST(str(real_data), train=train, download=False)
    raw = real_data / "MNIST" / "raw"
    images, labels = FILE_NAMES[:2] if train else FILE_NAMES[2:]
    assert np.array_equal(read_idx(raw / images), reference.data)
    assert np.array_equal(read_idx(raw / labels), reference.targets)


# ── splitting ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("val_fraction", [0.05, 0.1, 0.2, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("val_from", ["train", "test"])
def test_validation_split_is_stratified_exact_and_disjoint(
    val_from: str, val_fraction: float
) -> None:
    splits = load(dataset="digits", val_from=val_from, val_fraction=val_fraction)
    source = {"train": 1438, "test": 359}[val_from]
    assert len(splits.val) == round(source * val_fraction)
    assert ids(splits, "val") | ids(splits, val_from) == set(range(source))
    assert not ids(splits, "val") & ids(splits, val_from)
    other = "test" if val_from == "train" else "train"
    assert ids(splits, other) == set(range({"train": 1438, "test": 359}[other]))
    whole = counts(splits, "val") + counts(splits, val_from)
    assert np.abs(counts(splits, "val") - whole * val_fraction).max() < 1


def test_split_seed_gives_another_split_and_seed_does_not(digits: Splits) -> None:
    same = load_dataset(load_config("quickstart", ["seed=5"]).data)
    other = load_dataset(load_config("quickstart", ["data.split_seed=1"]).data)
    assert same.fingerprint == digits.fingerprint
    assert other.fingerprint != digits.fingerprint
    assert ids(other, "val") != ids(digits, "val")
    assert other.test.fingerprint == digits.test.fingerprint


@pytest.mark.parametrize("train_size", [10, 11, 25, 100, 999, 1250, 1293, 1294])
def test_train_size_is_balanced_as_far_as_the_images_reach(train_size: int) -> None:
    whole = load(dataset="digits")
    part = load(dataset="digits", train_size=train_size)
    assert len(part.train) == train_size
    assert ids(part, "train") <= ids(whole, "train")
    assert part.val.fingerprint == whole.val.fingerprint
    available, got = counts(whole, "train"), counts(part, "train")
    level = got.max()  # a class has as many as the others, or all that there are
    assert np.all((got >= level - 1) | (got == available))


def test_train_size_fills_up_from_the_larger_classes(tmp_path: Path) -> None:
    in_source = np.array([4, 10, 40, 40, 40, 40, 40, 40, 40, 40])
    write_dataset(tmp_path, np.repeat(np.arange(10), in_source), cycle(100))
    splits = load(tmp_path, val_from="test", train_size=100)
    assert counts(splits, "train").tolist()[:2] == [4, 10]
    assert sorted(counts(splits, "train").tolist()[2:]) == [10, 10, 11, 11, 11, 11, 11, 11]


def test_smaller_subset_depends_on_split_seed_only() -> None:
    subset = functools.partial(load, dataset="digits", train_size=50)
    assert ids(subset(), "train") == ids(subset(), "train")
    assert ids(subset(), "train") != ids(subset(split_seed=3), "train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_size": 9}, r"data\.train_size: 9 leaves a class empty; allowed: 10 .* to 1294"),
        ({"train_size": 1295}, r"data\.train_size: 1295 is more than the 1294 training images"),
        ({"val_fraction": 0.005}, r"data\.val_fraction: 0\.005 leaves 3 of 10 classes without val"),
        (
            {"val_fraction": 0.02, "val_from": "test"},
            r"data\.val_fraction: 0\.02 leaves 3 of 10 classes without val images; choose another",
        ),
    ],
)
def test_load_dataset_rejects_sizes_that_do_not_fit(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(dataset="digits", **fields)


@pytest.mark.parametrize("val_from", ["train", "test"])
@pytest.mark.parametrize("val_fraction", [0.05, 0.1, 0.35, 0.9])
@pytest.mark.parametrize("train_size", [None, 100, 143])
def test_train_count_is_known_without_reading(
    val_from: str, val_fraction: float, train_size: int | None
) -> None:
    config = DataConfig(
        dataset="digits", val_from=val_from, val_fraction=val_fraction, train_size=train_size
    )
    assert train_count(config) == len(load_dataset(config).train)


@pytest.mark.parametrize("dataset", DOWNLOADED)
def test_train_count_of_mnist_like_data_sets_is_known(dataset: str) -> None:
    assert train_count(DataConfig(dataset=dataset)) == 54_000
    assert train_count(DataConfig(dataset=dataset, val_from="test")) == 60_000


# ── fingerprints ─────────────────────────────────────────────────────────────────────────────


def change_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] = (content[-1] + 1) % 10
    path.write_bytes(content)


@pytest.mark.parametrize(("file", "changed"), [(0, {"train", "val"}), (2, {"test"}), (3, {"test"})])
def test_fingerprint_changes_with_one_pixel_or_label(
    file: int, changed: set[str], mnist_like: Path
) -> None:
    before, again = load(mnist_like), load(mnist_like)
    assert again.fingerprint == before.fingerprint
    change_last_byte(mnist_like / "MNIST" / "raw" / FILE_NAMES[file])
    after = load(mnist_like)
    assert after.fingerprint != before.fingerprint
    differ = {
        name
        for name in SPLIT_NAMES
        if getattr(after, name).fingerprint != getattr(before, name).fingerprint
    }
    assert differ
    assert differ <= changed


def test_fingerprint_changes_with_the_split(mnist_like: Path) -> None:
    splits = [load(mnist_like, **f) for f in ({}, {"split_seed": 1}, {"val_from": "test"})]
    assert len({s.fingerprint for s in splits}) == 3
    assert re.fullmatch("[0-9a-f]{64}", splits[0].fingerprint)


# ── batches ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(10, 3, [3, 3, 3, 1]), (9, 3, [3, 3, 3]), (2, 5, [2]), (5, 1, [1] * 5)],
)
def test_batches_hold_every_image_once_and_keep_the_last_smaller_one(
    count: int, batch_size: int, sizes: list[int]
) -> None:
    batches = batch_indices(count, batch_size, seed=0, epoch=1)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert batches[0].dtype == torch.int64


def test_batch_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(torch.cat(batch_indices(100, 7, seed=seed, epoch=epoch)).tolist())

    orders = {(seed, epoch): order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    state = torch.get_rng_state()
    torch.manual_seed(123)
    assert all(order(*key) == value for key, value in orders.items())
    torch.set_rng_state(state)
    order(0, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(order(2**32 - 1, 100_000))) == 100


# ── scaling ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("scaling", "low", "high"),
    [("unit", 0.0, 1.0), ("symmetric", -1.0, 1.0), ("standardize", -0.5, 2.0)],
)
def test_scaling_maps_black_and_white_to_its_ends(scaling: str, low: float, high: float) -> None:
    preprocess = Preprocessing.fit(scaling, mean=0.2, std=0.4)
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    inputs = preprocess(images)
    assert inputs.dtype == torch.float32
    assert inputs.flatten().tolist() == pytest.approx([low, high], abs=1e-6)
    assert images.flatten().tolist() == [0, 255]


def test_scaling_leaves_float_images_as_they_were() -> None:
    images = torch.full((1, 1, 2, 2), 255.0)
    assert Preprocessing.fit("unit", 0.2, 0.4)(images).flatten().tolist() == [1.0] * 4
    assert (images == 255).all()


def test_standardize_gives_mean_0_and_std_1_on_the_training_split(digits: Splits) -> None:
    pixels = digits.train.images.numpy() / 255
    assert digits.mean == pytest.approx(pixels.mean(), abs=1e-12)
    assert digits.std == pytest.approx(pixels.std(), abs=1e-12)
    inputs = Preprocessing.fit("standardize", digits.mean, digits.std)(digits.train.images)
    assert inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert inputs.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_statistics_are_of_the_training_split_alone(mnist_like: Path) -> None:
    before = load(mnist_like)
    path = mnist_like / "MNIST" / "raw" / FILE_NAMES[2]
    write_idx(path, np.full((100, 28, 28), 255, dtype=np.uint8))
    after = load(mnist_like)
    assert (after.mean, after.std) == (before.mean, before.std)
