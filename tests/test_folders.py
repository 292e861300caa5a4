from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAST, Finished, Terminal
from PIL import Image

from mnist_wandb import folders
from mnist_wandb.config import DataConfig
from mnist_wandb.data import Splits, load_dataset
from mnist_wandb.errors import DatasetError
from mnist_wandb.folders import list_image_folder, read_images, write_image_folder
from mnist_wandb.sources import read_source

Cli = Callable[..., Finished]
NOISE = np.random.default_rng(0).integers(0, 256, (60, 28, 28)).astype(np.uint8)
LABELS = np.arange(60) % 3
NAMES = ("cat", "dog", "owl")


def export(out: Path, images: np.ndarray = NOISE, **options: object) -> int:
    parts = {"train": (images[:40], LABELS[:40]), "test": (images[40:], LABELS[40:])}
    return write_image_folder(out, parts, NAMES, origin={"dataset": "noise"}, **options)


def load(folder: Path, **fields: object) -> Splits:
    return load_dataset(DataConfig(dataset="image_folder", dir=str(folder), **fields))


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ── writing and reading back ─────────────────────────────────────────────────────────────────


def test_exported_pictures_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    assert export(tmp_path / "out") == 60
    numbered = {f"train/{i:05}.png" for i in range(40)} | {f"test/{i:05}.png" for i in range(20)}
    rest = {"train/labels.json", "test/labels.json", "export.json"}
    assert files_below(tmp_path / "out") == numbered | rest
    splits = load(tmp_path / "out", val_from="test", val_fraction=0.5)
    assert splits.class_names == NAMES
    assert np.array_equal(splits.train.images[:, 0], NOISE[:40])
    assert np.array_equal(splits.train.labels, LABELS[:40])
    assert splits.train.ids.tolist() == list(range(40))


def test_training_from_exported_pictures_is_the_identical_run(cli: Cli) -> None:
    done = cli("export-images", "--dataset", "digits", "out")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("1,797 pictures of digits in out (1,797 written now)\nuse them")
    rows = []
    for overrides in ((), ("data.dataset=image_folder", "data.dir=out")):
        done = cli("run", "--json", "--quiet", *FAST, *overrides)
        assert done.code == 0, done.err
        lines = (Path(json.loads(done.out)["run_dir"]) / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        rows.append([{k: v for k, v in m.items() if "per_second" not in k} for m in metrics])
    assert rows[0] == rows[1]
    digits = load_dataset(DataConfig(dataset="digits"))
    assert load(Path("out")).fingerprint == digits.fingerprint


def test_real_mnist_written_out_has_the_same_first_pictures(
    real_data: Path, tmp_path: Path
) -> None:
    source = read_source(DataConfig(dataset="mnist"), real_data)
    parts = {
        "train": (source.train_images[:200], source.train_labels[:200]),
        "test": (source.test_images[:100], source.test_labels[:100]),
    }
    write_image_folder(tmp_path / "out", parts, source.class_names, origin={})
    splits = load(tmp_path / "out", val_from="test", val_fraction=0.5)
    assert np.array_equal(splits.train.images[:, 0], source.train_images[:200])
    assert np.array_equal(splits.train.labels, source.train_labels[:200])


def test_processes_write_what_one_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "CHUNK", 3)
    export(tmp_path / "one", num_workers=1)
    export(tmp_path / "two", num_workers=2)
    names = files_below(tmp_path / "one")
    assert files_below(tmp_path / "two") == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_export_goes_on_where_it_was(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "CHUNK", 2)

    def stop(done: int, _total: int) -> None:
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "out", num_workers=workers, on_progress=stop)
    assert not (tmp_path / "out" / "test" / "labels.json").exists()
    there = len([name for name in files_below(tmp_path / "out") if name.endswith(".png")])
    assert 20 <= there < 60
    seen: list[tuple[int, int]] = []
    written = export(tmp_path / "out", on_progress=lambda *counts: seen.append(counts))
    assert written == 60 - there
    assert (seen[0], seen[-1]) == ((there, 60), (60, 60))
    export(tmp_path / "whole")
    assert load(tmp_path / "out").fingerprint == load(tmp_path / "whole").fingerprint
    assert export(tmp_path / "out") == 0


def test_export_refuses_a_folder_that_holds_something_else(cli: Cli, tmp_path: Path) -> None:
    export(tmp_path / "noise")
    Path("mine").mkdir()
    Path("mine/diary.txt").write_text("dear diary")
    Path("file").write_text("")
    for out, message in (
        (tmp_path / "noise", r"noise: holds another export \(.*export.json\); choose another"),
        ("mine", "mine: is there already and not an export; choose another folder"),
        ("file", "file: is there already and not an export; choose another folder"),
        ("file/below", "file/below: cannot be written: Not a directory"),
    ):
        done = cli("export-images", "--dataset", "digits", str(out))
        assert done.code == 2
        assert re.match(f"error: .*{message}", done.err)
    assert [p.name for p in Path("mine").iterdir()] == ["diary.txt"]


def test_export_refuses_data_sets_that_it_cannot_write(cli: Cli) -> None:
    done = cli("export-images", "--dataset", "shortcut_mnist", "out")
    assert (done.code, done.out) == (2, "")
    assert "error: --dataset: got shortcut_mnist; allowed are data sets of 28×28" in done.err
    done = cli("export-images", "--dataset", "minst", "out")
    assert done.code == 2
    assert "got the text 'minst'" in done.err
    assert "did you mean 'mnist'?" in done.err
    done = cli("export-images", "--dataset", "digits", "out", "--workers", "0")
    assert (done.code, done.err) == (2, "error: --workers: got 0, allowed: 1 to 64\n")
    assert not Path("out").exists()


# ── folders of one's own ─────────────────────────────────────────────────────────────────────


def test_a_folder_for_each_class_is_read_in_natural_order(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("10", "9"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in (2, 10, 1):
                image = Image.new("RGB", (60, 40), (number, number, number))
                image.save(tmp_path / split / name / f"{number}.png")
            (tmp_path / split / name / "notes.txt").write_text("not a picture")
    train, _ = list_image_folder(tmp_path)
    assert train.class_names == ("9", "10")
    assert train.files == ("9/1.png", "9/2.png", "9/10.png", "10/1.png", "10/2.png", "10/10.png")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    images = read_images(train)
    assert images.shape == (6, 28, 28)
    assert images[:, 14, 14].tolist() == [1, 2, 10, 1, 2, 10]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"0.png": 7, "1.png": 3}, ("3", "7")),
        ({"0.png": "seven", "1.png": "six"}, ("seven", "six")),
        ({"class_names": ["a", "b", "c"], "labels": {"0.png": 2, "1.png": 0}}, ("a", "b", "c")),
        ({"class_names": ["b", "a"], "labels": {"0.png": "a", "1.png": "b"}}, ("b", "a")),
    ],
)
def test_labels_are_read_in_each_form(
    labels: dict[str, object], names: tuple[str, ...], tmp_path: Path
) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(2):
            Image.fromarray(NOISE[i]).save(tmp_path / split / f"{i}.png")
        (tmp_path / split / "labels.json").write_text(json.dumps(labels))
    train, test = list_image_folder(tmp_path)
    assert train.class_names == test.class_names == names
    said = list(labels.get("labels", labels).values())  # type: ignore[attr-defined]
    chosen = [names[i] for i in train.labels]
    assert chosen == [str(v) if str(v) in names else names[v] for v in said]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"labels.json: not valid JSON: "),
        ("[5, 0]", r"labels.json: found another form, expected \{\"class_names\""),
        ('{"0.png": 1.5}', r"labels.json: found another form"),
        ('{"class_names": "ab", "labels": {"0.png": 0}}', "class_names: expected a list of texts"),
        ('{"class_names": ["a", "b"], "labels": {"0.png": 2}}', "found label 2, allowed: 0 to 1"),
        ('{"class_names": ["a", "b"], "labels": {"0.png": "c"}}', "found label 'c', allowed: 0 to"),
        ('{"9.png": 0, "0.png": 1}', r"9\.png: no such file \(named in labels.json\)"),
        ('{"0.png": 0}', r"one class only \(0\); expected two or more"),
        ("{}", "train: no pictures found; expected <class>/<picture>"),
    ],
)
def test_bad_labels_are_refused(content: str, message: str, tmp_path: Path) -> None:
    tmp_path /= "out"
    export(tmp_path)
    Image.fromarray(NOISE[0]).save(tmp_path / "train" / "0.png")
    (tmp_path / "train" / "labels.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        load(tmp_path)


def test_missing_splits_strange_classes_and_broken_pictures_are_refused(tmp_path: Path) -> None:
    tmp_path /= "out"
    with pytest.raises(DatasetError, match=r"expected train/ and test/ in it.*data\.dir=…"):
        load(tmp_path)
    export(tmp_path)
    (tmp_path / "test" / "labels.json").write_text('{"00000.png": "cat", "00001.png": "cow"}')
    with pytest.raises(DatasetError, match=r"class 'cow', which the training images have not"):
        load(tmp_path)
    (tmp_path / "test" / "labels.json").write_text('{"00000.png": "cat", "00001.png": "dog"}')
    with pytest.raises(DatasetError, match="image_folder: 1 classes have no images in the test"):
        load(tmp_path)
    (tmp_path / "train" / "00003.png").write_text("no picture")
    with pytest.raises(DatasetError, match=r"00003\.png: not a picture that can be read"):
        load(tmp_path)


def test_dry_run_knows_classes_and_sizes_of_a_folder(cli: Cli) -> None:
    export(Path("out"))
    done = cli("run", "--dry-run", "--json", "data.dataset=image_folder", "data.dir=out")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["train_images"] == 40 - round(40 * 0.2)
    assert facts["num_parameters"] == 28938 - 7 * (32 * 49 + 1)


# ── the cache ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def decoded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Load the exported noise; gives the splits that had to be decoded."""
    export(tmp_path / "out")
    caplog.set_level(logging.INFO, "mnist_wandb.folders")

    def call() -> list[str]:
        caplog.clear()
        splits = load(tmp_path / "out", val_from="test", val_fraction=0.5)
        assert len(splits.train) == 40
        found = [re.search(r"(\w+): decoding", message) for message in caplog.messages]
        return [match[1] for match in found if match]

    return call


def test_pictures_are_decoded_once_and_again_when_they_change(
    decoded: Callable[[], list[str]], tmp_path: Path
) -> None:
    assert decoded() == ["train", "test"]
    assert decoded() == []
    picture = tmp_path / "out" / "train" / "00005.png"
    Image.fromarray(255 - NOISE[5]).save(picture)
    assert decoded() == ["train"]
    images = load(tmp_path / "out", val_from="test", val_fraction=0.5).train.images
    assert np.array_equal(images[5, 0], 255 - NOISE[5])
    assert decoded() == []
    os.utime(picture, ns=(0, 0))  # the same size and name, another time
    assert decoded() == ["train"]
    picture.rename(picture.with_name("renamed.png"))
    labels = tmp_path / "out" / "train" / "labels.json"
    labels.write_text(labels.read_text().replace("00005.png", "renamed.png"))
    assert decoded() == ["train"]
    assert list((tmp_path / "out").rglob("*.tmp")) == []


def test_damaged_cache_is_not_believed(decoded: Callable[[], list[str]], tmp_path: Path) -> None:
    decoded()
    cache = tmp_path / "out" / ".mnist-wandb" / "train.npz"
    whole = cache.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2]):
        cache.write_bytes(content)
        assert decoded() == ["train"]
        assert decoded() == []


def test_folder_that_cannot_be_written_has_its_cache_at_home(
    decoded: Callable[[], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "out" / ".mnist-wandb").write_text("a file where the folder should be")
    assert decoded() == ["train", "test"]
    assert decoded() == []
    assert len(list((Path.home() / ".cache" / "mnist-wandb").glob("*.npz"))) == 2


def test_without_any_place_for_a_cache_pictures_are_decoded_each_time(
    decoded: Callable[[], list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out" / ".mnist-wandb").write_text("")
    (Path.home() / ".cache").write_text("")
    assert decoded() == decoded() == ["train", "test"]
    assert "no cache could be written; the next run decodes again" in caplog.text


def test_pictures_of_a_folder_are_predicted_as_they_were_trained_on(cli: Cli) -> None:
    assert cli("export-images", "--dataset", "digits", "out").code == 0
    done = cli("run", "--json", "-q", *FAST, "data.dataset=image_folder", "data.dir=out")
    run = json.loads(done.out)["run_dir"]
    done = cli("predict", run, "out/test/00000.png", "out/test/00001.png", "--json")
    assert done.code == 0, done.err
    said = [p["confidence"] for p in json.loads(done.out)["predictions"]]
    with np.load(Path(run) / "predictions.npz") as stored:
        assert np.allclose(said, stored["probabilities"][:2].max(axis=1), atol=2e-3)
    assert torch.equal(load(Path("out")).test.ids, torch.arange(359))


def test_export_shows_a_bar_on_a_terminal(terminal: Terminal) -> None:
    child = terminal("export-images", "--dataset", "digits", "out")
    child.expect(r"pictures .*1797/1797")
    child.expect(r"1,797 pictures of digits in out")
    child.expect(r"use them    mnist-wandb run data\.dataset=image_folder data\.dir=out")
    child.wait()
    assert child.exitstatus == 0


def test_export_stopped_by_a_signal_says_that_it_can_go_on(terminal: Terminal) -> None:
    child = terminal("export-images", "--dataset", "digits", "out", "--workers", "1")
    child.expect("pictures ")
    child.kill(signal.SIGTERM)
    said = child.expect(["stopped; the same command goes on from here", "1,797 pictures"])
    child.wait()
    assert child.exitstatus == (143 if said == 0 else 0)
    done = subprocess.run(
        [sys.executable, "-m", "mnist_wandb", "export-images", "--dataset", "digits", "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(Path("out").rglob("*.png"))) == 1797
    assert list(Path("out").rglob("*.tmp")) == []
