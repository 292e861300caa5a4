from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Finished, write_idx
from PIL import Image

from mnist_wandb.config import DataConfig
from mnist_wandb.data import Splits, load_dataset, read_idx
from mnist_wandb.errors import ConfigError
from mnist_wandb.loading import load_config
from mnist_wandb.sources import DATASETS, read_source, shortcut_codes

Cli = Callable[..., Finished]


def shortcut(data_dir: Path, train: float = 0.9, test: float = 0.1, **fields: object) -> Splits:
    section = {"train_match": train, "test_match": test}
    config = DataConfig(dataset="shortcut_mnist", shortcut=section, **fields)
    return load_dataset(config, data_dir=data_dir)


def told(splits: Splits, name: str) -> np.ndarray:
    """The class that the row below each image stands for."""
    codes = shortcut_codes(0, 10)
    rows = getattr(splits, name).images[:, 0, -1].numpy()
    return np.array([np.flatnonzero((codes == row).all(axis=1)).item() for row in rows])


def test_shortcut_is_one_more_row_below_the_same_images(mnist_like: Path) -> None:
    plain = load_dataset(DataConfig(dataset="mnist"), data_dir=mnist_like)
    splits = shortcut(mnist_like)
    assert splits.image_shape == (1, 29, 28)
    for name in ("train", "val", "test"):
        with_row, without = getattr(splits, name), getattr(plain, name)
        assert torch.equal(with_row.images[:, :, :28], without.images)
        assert torch.equal(with_row.labels, without.labels)
        assert torch.equal(with_row.ids, without.ids)


def test_shortcut_tells_the_class_as_often_as_configured(mnist_like: Path) -> None:
    splits = shortcut(mnist_like, 0.7, 0.2)
    for name, share in (("train", 0.7), ("val", 0.7), ("test", 0.2)):
        split = getattr(splits, name)
        agrees = told(splits, name) == split.labels.numpy()
        assert np.array_equal(agrees, split.shortcut_agrees)
        assert agrees.mean() == pytest.approx(share, abs=0.2 if name == "val" else 0.08)
    never, always = shortcut(mnist_like, 0.0, 1.0), shortcut(mnist_like, 1.0, 0.0)
    assert not never.train.shortcut_agrees.any()  # type: ignore[union-attr]
    assert always.train.shortcut_agrees.all()  # type: ignore[union-attr]
    assert never.test.shortcut_agrees.all()  # type: ignore[union-attr]
    assert set(told(never, "train").tolist()) == set(range(10))  # others, evenly


def test_shortcut_is_fixed_by_the_split_seed(mnist_like: Path) -> None:
    assert shortcut(mnist_like).fingerprint == shortcut(mnist_like).fingerprint
    assert shortcut(mnist_like).fingerprint != shortcut(mnist_like, 0.8).fingerprint
    source = [
        read_source(DataConfig(dataset="shortcut_mnist", split_seed=seed), mnist_like)
        for seed in (0, 1)
    ]
    assert not np.array_equal(source[0].train_images, source[1].train_images)
    some, more = shortcut(mnist_like, 0.5).train, shortcut(mnist_like, 0.9).train
    assert not (some.shortcut_agrees & ~more.shortcut_agrees).any()  # type: ignore[operator]
    assert len(np.unique(shortcut_codes(0, 10), axis=0)) == 10


# ── its settings ─────────────────────────────────────────────────────────────────────────────


def test_shortcut_belongs_to_its_data_set_alone() -> None:
    assert load_config(None, ["data.dataset=shortcut_mnist"]).data.shortcut is not None
    assert load_config(None, ["data.dataset=digits"]).data.shortcut is None
    overrides = ["data.dataset=shortcut_mnist", "data.shortcut.train_match=0.5"]
    section = load_config(None, overrides).data.shortcut
    assert section is not None
    assert (section.train_match, section.test_match) == (0.5, 0.1)
    with pytest.raises(ConfigError, match="shortcut belongs to dataset shortcut_mnist, not to dig"):
        load_config(None, ["data.shortcut.train_match=0.5"])
    with pytest.raises(ConfigError, match=r"data.shortcut.test_match: got 1.5"):
        load_config(None, ["data.dataset=shortcut_mnist", "data.shortcut.test_match=1.5"])
    with pytest.raises(ConfigError, match=r"data.shortcut: got 0, expected a section"):
        load_config(None, ["data.dataset=shortcut_mnist", "data.shortcut=0"])


def test_another_data_set_in_a_later_layer_takes_the_shortcut_away() -> None:
    Path("mine.yaml").write_text("data: {dataset: shortcut_mnist, shortcut: {train_match: 0.5}}\n")
    assert load_config("mine.yaml").data.shortcut is not None
    assert load_config("mine.yaml", ["data.dataset=digits"]).data.shortcut is None
    kept = load_config("mine.yaml", ["data.shortcut.test_match=0"]).data.shortcut
    assert kept is not None
    assert (kept.train_match, kept.test_match) == (0.5, 0.0)
    with pytest.raises(ConfigError, match="shortcut belongs to dataset shortcut_mnist"):
        load_config("mine.yaml", ["data.dataset=digits", "data.shortcut.test_match=0"])


# ── scores ───────────────────────────────────────────────────────────────────────────────────


def test_evaluate_scores_images_whose_shortcut_agrees_and_disagrees(
    cli: Cli, mnist_like: Path
) -> None:
    for path in (mnist_like / "MNIST" / "raw").glob("*images*"):
        write_idx(path, read_idx(path) // 64)  # dark noise: nothing to learn by heart
    where = ("data.dataset=shortcut_mnist", f"data.dir={mnist_like}")
    data = ("data.shortcut.train_match=1", "data.shortcut.test_match=0.5")
    fast = ("tracking.mode=disabled", "training.epochs=30", "model.name=linear")
    done = cli("run", "--json", "-q", *where, *data, *fast)
    assert done.code == 0, done.err
    metrics = json.loads(done.out)["metrics"]
    assert metrics["test/accuracy_shortcut_agrees"] > 0.8
    assert metrics["test/accuracy_shortcut_disagrees"] < 0.2
    done = cli("evaluate", "latest", "--json")
    assert {k: v for k, v in metrics.items() if k.startswith("test/")} == pytest.approx(
        json.loads(done.out)["metrics"]
    )
    assert "test/accuracy_shortcut_disagrees" in cli("evaluate", "latest").out
    done = cli("evaluate", "latest", "--json", "data.shortcut.test_match=1")
    assert json.loads(done.out)["metrics"]["test/accuracy"] > 0.8
    # All training images agree: there is no accuracy of those that disagree.
    assert "val/accuracy_shortcut_agrees" in metrics
    assert "val/accuracy_shortcut_disagrees" not in metrics
    Image.radial_gradient("L").save("blob.png")
    assert cli("predict", "latest", "blob.png").code == 0
    done = cli("evaluate", "latest", "data.dataset=digits")
    assert done.code == 2
    assert "was trained on images (1, 29, 28), the data set digits has (1, 28, 28)" in done.err


def test_class_names_are_shown_everywhere(cli: Cli, mnist_like: Path) -> None:
    for name in ("FashionMNIST", "KMNIST"):
        (mnist_like / name).symlink_to(mnist_like / "MNIST")
    fast = ("training.epochs=1", "model.name=linear", f"data.dir={mnist_like}")
    for dataset in ("fashion_mnist", "kmnist"):
        names = DATASETS[dataset].class_names
        done = cli("run", "-q", f"data.dataset={dataset}", "tracking.mode=offline", *fast)
        assert done.code == 0, done.err
        assert all(f" {name} " in done.out for name in names)
        (csv,) = Path("runs").glob(f"*-{dataset}-*/confusion_matrix.csv")
        assert csv.read_text().splitlines()[0] == ",".join(["true \\ predicted", *names])
        per_class = json.loads(cli("evaluate", "latest", "--json").out)["per_class"]
        assert tuple(row["class"] for row in per_class) == names
        Image.radial_gradient("L").save("blob.png")
        (said,) = json.loads(cli("predict", "latest", "blob.png", "--json").out)["predictions"]
        assert said["label"] in names
