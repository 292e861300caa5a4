from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Finished, write_idx
from PIL import Image

from mnist_wandb.config import DataConfig
from mnist_wandb.data import DATASETS, Splits, load_dataset
from mnist_wandb.explore import draw_pictures, explore_dataset
from mnist_wandb.folders import write_image_folder

Cli = Callable[..., Finished]
PICTURES = ("class_histogram", "grid", "class_means")


def test_exploration_counts_and_measures_what_numpy_does(digits: Splits) -> None:
    found = explore_dataset(digits, "digits")
    for name in ("train", "val", "test"):
        labels = getattr(digits, name).labels.numpy()
        assert found.class_counts[name] == tuple(np.bincount(labels, minlength=10))
    assert (found.dtype, found.image_shape) == ("uint8", (1, 28, 28))
    pixels = digits.train.images.numpy().astype(np.float64)
    mean, std = pixels.mean(), pixels.std()
    expected = {
        "pixels": (0, 255, mean, std),
        "unit": (0, 1, mean / 255, std / 255),
        "symmetric": (-1, 1, mean / 127.5 - 1, std / 127.5),
        "standardize": (-mean / std, (255 - mean) / std, 0, 1),
    }
    assert [s.name for s in found.scalings] == list(expected)
    for scaled in found.scalings:
        measured = (scaled.low, scaled.high, scaled.mean, scaled.std)
        assert measured == pytest.approx(expected[scaled.name], abs=1e-5)
    assert [i for i, _ in found.one_hot] == digits.train.labels[:3].tolist()
    assert all(vector == tuple(np.eye(10, dtype=int)[i]) for i, vector in found.one_hot)
    assert found.repeated == {"train": 0, "val": 0, "test": 0}


def test_duplicates_within_and_across_splits_are_found(mnist_like: Path) -> None:
    raw = mnist_like / "MNIST" / "raw"
    rng = np.random.default_rng(1)
    train = rng.integers(0, 256, (300, 28, 28)).astype(np.uint8)
    test = rng.integers(0, 256, (100, 28, 28)).astype(np.uint8)
    train[10] = train[20] = train[0]  # the same label, as labels count 0 to 9 in turn
    train[31] = train[40]  # another label
    test[5], test[6] = train[100], train[0]
    write_idx(raw / "train-images-idx3-ubyte", train)
    write_idx(raw / "t10k-images-idx3-ubyte", test)
    config = DataConfig(val_from="test", val_fraction=0.2)
    found = explore_dataset(load_dataset(config, data_dir=mnist_like))
    assert found.repeated["train"] == 3
    assert found.shared["train, val"] + found.shared["train, test"] == 2
    assert found.shared["val, test"] == 0
    assert found.contradicting == 2 + 4 + 2  # 31, 40; 0, 10, 20 and test 6; 100 and test 5


def test_pictures_show_a_histogram_a_grid_and_the_class_means(digits: Splits) -> None:
    pictures = draw_pictures(digits, explore_dataset(digits, "digits"))
    assert tuple(pictures) == PICTURES
    shown = np.asarray(pictures["class_means"].convert("L"))
    images = digits.train.images[digits.train.labels == 0].double()
    mean = images.mean(dim=0)[0].round().to(torch.uint8).numpy().repeat(4, 0).repeat(4, 1)
    top, left = 70, np.flatnonzero(shown[70] != 255)[0]
    assert np.array_equal(shown[top : top + 112, left : left + 112], mean)


def test_explore_prints_tables_and_keeps_pictures_and_a_record(cli: Cli) -> None:
    done = cli("explore", "tracking.mode=offline")
    assert done.code == 0, done.err
    for text in (
        "train images           │ 1,150",
        "standardize",
        "one-hot",
        "shared by train, test",
    ):
        assert text in done.out
    (folder,) = Path("runs").iterdir()
    assert {p.name for p in folder.iterdir()} == {
        *(f"{name}.png" for name in PICTURES),
        "explore.json",
        "wandb",
    }
    assert all(f"picture     {folder / name}.png" in done.out for name in PICTURES)
    facts = json.loads((folder / "explore.json").read_text())
    assert facts["class_counts"]["test"] == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    # It is no run: nothing takes it for the latest one.
    assert "no run folder of that path" in cli("evaluate", "latest").err
    (record,) = (folder / "wandb").glob("offline-run-*")
    inspected = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [json.loads(line) for line in inspected.splitlines()]
    (run,) = [line["run"] for line in lines if line["type"] == "run"]
    assert (run["job_type"], run["display_name"]) == ("explore", "explore-digits")
    for key in ("facts", "classes", "scalings", "one_hot", "samples", "grid", "train_classes"):
        assert f"explore/{key}" in inspected
    (samples,) = record.glob("files/media/table/explore/samples*")
    rows = json.loads(samples.read_text())["data"]
    assert len(rows) == 25
    assert [row[2] for row in rows[:3]] == ["0", "1", "2"]


def test_explore_writes_json_and_pictures_where_they_are_asked_for(cli: Cli) -> None:
    done = cli("explore", "--json", "--pictures", "docs/pictures", "tracking.mode=disabled")
    assert (done.code, done.err) == (0, "W&B: disabled (tracking.mode)\n")
    facts = json.loads(done.out)
    assert facts["pictures"] == [f"docs/pictures/{name}.png" for name in PICTURES]
    assert facts["wandb"] == {"mode": "disabled", "id": None}
    for path in facts["pictures"]:
        with Image.open(path) as picture:
            assert picture.width > 300
    assert {p.name for p in Path(facts["folder"]).iterdir()} == {"explore.json"}


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "digits"])
def test_every_data_set_can_be_explored(dataset: str, cli: Cli, mnist_like: Path) -> None:
    row = DATASETS[dataset]
    if dataset == "image_folder":
        noise = np.random.default_rng(0).integers(0, 256, (60, 28, 28)).astype(np.uint8)
        labels = np.arange(60) % 3
        parts = {"train": (noise[:30], labels[:30]), "test": (noise[30:], labels[30:])}
        write_image_folder(mnist_like / "pictures", parts, ("a", "b", "c"), origin={})
        mnist_like /= "pictures"
    elif row.torchvision_name != "MNIST":
        raw = mnist_like / row.torchvision_name / "raw"
        for ours, theirs in zip(row.files, DATASETS["mnist"].files, strict=True):
            raw.mkdir(parents=True, exist_ok=True)
            (raw / ours).symlink_to(mnist_like / "MNIST" / "raw" / theirs)
    where = (f"data.dataset={dataset}", f"data.dir={mnist_like}", "tracking.mode=disabled")
    done = cli("explore", "-q", *where)
    assert done.code == 0, done.err
    names = row.class_names or ("a", "b", "c")
    assert all(f"│ {name} " in done.out for name in names)
    assert ("29×28" if dataset == "shortcut_mnist" else "28×28") in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data.dataset=minst",), "did you mean 'mnist'?"),
        (("data.dataset=image_folder", "data.dir=nowhere"), "nowhere: no image folder"),
        (("data.train_size=9999",), "data.train_size: 9999 is more than the 1150"),
        (("--pictures", "file/below"), "file/below: cannot be written: Not a directory"),
        (("tracking.mode=online",), "W&B could not start (online)"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    arguments: tuple[str, ...], message: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    Path("file").write_text("")
    done = cli("explore", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert list(Path.cwd().glob("runs/*")) == []
