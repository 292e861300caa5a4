"""What the real W&B client has recorded, read back with its own tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished
from PIL import Image

from mnist_wandb.data import Splits
from mnist_wandb.loading import load_config

WANDB = [sys.executable, "-m", "wandb"]
TRACKED = (
    "tracking.mode=offline",
    "training.epochs=3",
    "tracking.tags=[lab, first]",
    "tracking.notes=hello",
    "tracking.group=tests",
    "tracking.sample_predictions=20",
    "tracking.log_every_steps=10",
    "name=my run",
)

NO_SERVER = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}


def records(folder: Path) -> list[dict[str, Any]]:
    """All records of the `.wandb` file."""
    done = subprocess.run(
        [*WANDB, "leet", "inspect", "--json", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_type(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in found if record["type"] == kind]


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run tracked offline: its run folder and its W&B folder."""
    folder = tmp_path_factory.mktemp("offline")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-m", "mnist_wandb", "run", "--json", *TRACKED],
        cwd=folder,
        check=True,
        env={**environment, "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    summary = json.loads(done.stdout)
    assert summary["wandb"]["mode"] == "offline"
    return folder / summary["run_dir"], folder / summary["wandb"]["dir"]


def test_the_offline_record_equals_the_run_folder(offline_run: tuple[Path, Path]) -> None:
    run, folder = offline_run
    summary = json.loads((run / "summary.json").read_text())
    found = json.loads(
        subprocess.run(
            [*WANDB, "leet", "inspect", "--summary", "--json", str(folder)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    dumped = load_config(str(run / "config.yaml")).model_dump(mode="json")
    assert found["config"] == dumped
    for name, value in summary["metrics"].items():
        assert found["summary"][name] == pytest.approx(value, rel=1e-12), name
    assert found["summary"]["status"] == "finished"

    everything = records(folder)
    text = json.dumps(of_type(everything, "run")[0])
    for word in ("my run", "tests", "hello", "lab", "first", "train", "mnist-wandb"):
        assert word in text
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    history = [record["item"] for record in of_type(everything, "history")]
    for row in rows:
        assert any(row.items() <= item.items() for item in history), row
    axes = {metric["glob_name"]: metric["step_metric"] for metric in of_type(everything, "metric")}
    assert axes == {"train/*": "step", "val/*": "epoch", "best/*": "epoch", "test/*": "epoch"}
    (ended,) = of_type(everything, "exit")
    assert ended.get("exit_code", 0) == 0
    (alert,) = of_type(everything, "alert")
    assert alert["title"] == "my run finished"


def test_logged_pictures_show_the_pixels_of_the_data_set(
    offline_run: tuple[Path, Path], digits: Splits
) -> None:
    _, folder = offline_run
    history = [record["item"] for record in of_type(records(folder), "history")]
    (panel,) = [item for item in history if "test/pictures.filenames" in item]
    by_id = {int(i): image for i, image in zip(digits.test.ids, digits.test.images, strict=True)}
    seen = set()
    for name, caption in zip(
        panel["test/pictures.filenames"], panel["test/pictures.captions"], strict=True
    ):
        picture = np.asarray(Image.open(folder / "files" / name).convert("L"))
        image = by_id[int(caption.split(":")[0])][0].numpy()
        assert picture.max() > 200, "an all-black picture"
        np.testing.assert_array_equal(picture, image)
        seen.add(caption)
    assert len(seen) == 20


def test_tables_and_charts_hold_predictions_mistakes_and_confusion(
    offline_run: tuple[Path, Path],
) -> None:
    run, folder = offline_run
    tables = folder / "files" / "media" / "table"

    def read(pattern: str) -> dict[str, Any]:
        (path,) = tables.glob(pattern)
        return dict(json.loads(path.read_text()))

    stored = np.load(run / "predictions.npz")
    predictions = read("test/predictions_*.table.json")
    assert predictions["columns"][:5] == ["id", "image", "truth", "prediction", "confidence"]
    assert len(predictions["data"]) == 20
    position = {int(i): n for n, i in enumerate(stored["ids"])}
    for row in predictions["data"]:
        probabilities = stored["probabilities"][position[row[0]]]
        assert row[2] == str(stored["labels"][position[row[0]]])
        assert row[3] == str(probabilities.argmax())
        assert row[5:] == pytest.approx(probabilities.astype(float), abs=1e-3)
    mistakes = read("test/mistakes_*.table.json")["data"]
    assert mistakes
    assert all(row[2] != row[3] for row in mistakes)
    assert [row[4] for row in mistakes] == sorted((row[4] for row in mistakes), reverse=True)
    assert len(read("test/per_class_[!f]*.table.json")["data"]) == 10
    confusion = read("Custom Chart Tables/test/confusion_matrix_table_*.table.json")["data"]
    expected = np.loadtxt(run / "confusion_matrix.csv", delimiter=",", skiprows=1, dtype=str)
    assert [count for _, _, count in confusion] == expected[:, 1:].astype(int).ravel().tolist()
    assert list(tables.glob("Custom Chart Tables/val/confusion_matrix_table_*.table.json"))


def test_the_best_model_is_an_artifact_with_aliases_and_metadata(
    offline_run: tuple[Path, Path],
) -> None:
    run, folder = offline_run
    models = [a for a in of_type(records(folder), "artifact") if a["type"] == "model"]
    (model,) = models
    assert model["name"].startswith("model-my-run-")
    assert sorted(model["aliases"]) == ["best", "latest"]
    metadata = json.loads(model["metadata"])
    summary = json.loads((run / "summary.json").read_text())
    assert metadata["scores"]["test/accuracy"] == summary["metrics"]["test/accuracy"]
    assert len(metadata["data_fingerprint"]) == 64
    assert metadata["config"]["name"] == "my run"
    (entry,) = model["manifest"]["contents"]
    assert entry["path"] == "model.pt"
    assert int(entry["size"]) == (run / "checkpoints" / "best.pt").stat().st_size


def test_every_epoch_can_be_an_artifact(cli: Callable[..., Finished]) -> None:
    done = cli("run", "--json", *TRACKED, "tracking.log_model=every_epoch", "tracking.watch=true")
    summary = json.loads(done.out)
    found = records(Path(summary["wandb"]["dir"]))
    models = [a for a in of_type(found, "artifact") if a["type"] == "model"]
    assert [sorted(model["aliases"]) for model in models] == [
        ["epoch-1", "latest"], ["epoch-2", "latest"], ["epoch-3", "latest"], ["best", "latest"],
    ]  # fmt: skip
    history = [record["item"] for record in of_type(found, "history")]
    assert any(key.startswith("gradients/") for item in history for key in item)


def test_each_run_of_a_process_lists_the_packages(cli: Callable[..., Finished]) -> None:
    """They are looked up once a process."""
    short = ("training.epochs=0.1", "model.name=linear", "tracking.mode=offline")
    assert [cli("run", *short).code for _ in range(2)] == [0, 0]
    first, second = [path.read_text() for path in Path("runs").rglob("requirements.txt")]
    assert first == second
    assert "\nwandb==" in first


def test_nothing_is_written_outside_the_run_folder(
    offline_run: tuple[Path, Path],
) -> None:
    run, _ = offline_run
    home = run.parents[1] / "home"
    assert [path.name for path in run.parents[1].iterdir() if path != home] == ["runs"]
    assert list(home.rglob("*.pt")) == []
    assert list(home.rglob("*.wandb")) == []


def test_online_without_a_server_is_one_line_and_leaves_nothing(
    program: Callable[..., Finished],
) -> None:
    done = program("run", "tracking.mode=online", "training.epochs=1", **NO_SERVER)
    assert done.code == 2
    assert "error: W&B could not start (online)" in done.err.splitlines()[-1]
    assert "set tracking.mode=offline" in done.err
    assert list(Path().rglob("config.yaml")) == []


def test_auto_falls_back_to_offline_when_the_server_is_away(
    program: Callable[..., Finished],
) -> None:
    done = program("run", "--json", "training.epochs=1", **NO_SERVER)
    assert done.code == 0
    assert json.loads(done.out)["wandb"]["mode"] == "offline"
    assert "W&B: online (API key in the environment or .env)" in done.err
    assert "warning: W&B: offline instead" in done.err


def test_gradients_are_watched_though_the_server_is_away(program: Callable[..., Finished]) -> None:
    done = program("run", "--json", "training.epochs=3", "tracking.watch=true", **NO_SERVER)
    assert done.code == 0, done.err
    found = records(Path(json.loads(done.out)["wandb"]["dir"]))
    history = [record["item"] for record in of_type(found, "history")]
    assert any(key.startswith("gradients/") for item in history for key in item)


def test_packages_are_found_as_by_the_client() -> None:
    # In a process of its own: this one's client has been changed by runs.
    code = """
import wandb
plain = wandb.util.working_set
from mnist_wandb.tracking import hasten_client
theirs = {(package.key, package.version) for package in plain()}
hasten_client()
assert wandb.util.working_set is not plain
ours = {(package.key, package.version) for package in wandb.util.working_set()}
assert ours == theirs, ours ^ theirs
assert len(ours) > 50
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("imported", [False, True])
def test_inputs_of_a_job_are_looked_for_only_where_launch_is_imported(imported: bool) -> None:
    code = f"""
import sys
import wandb
if {imported}:
    import wandb.sdk.launch.inputs.internal
from mnist_wandb.loading import load_config
from mnist_wandb.settings import load_settings
from mnist_wandb.experiment import run_experiment
plain = wandb.Run._detect_and_apply_job_inputs
config = load_config("quickstart", ["training.epochs=0.1", "data.train_size=100"])
run_experiment(config, load_settings())
assert ("wandb.sdk.launch" in sys.modules) is {imported}
assert (wandb.Run._detect_and_apply_job_inputs is plain) is {imported}
"""
    environment = {**os.environ, "WANDB_MODE": "offline"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
