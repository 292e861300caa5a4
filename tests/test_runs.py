from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnist_wandb import __version__
from mnist_wandb.checkpoint import load_checkpoint
from mnist_wandb.config import RunConfig
from mnist_wandb.data import load_dataset
from mnist_wandb.errors import ConfigError, DivergedError, RunError
from mnist_wandb.evaluate import evaluate
from mnist_wandb.experiment import RunOutcome, run_experiment
from mnist_wandb.loading import load_config, override_config, validate
from mnist_wandb.metrics import EvalResult
from mnist_wandb.runs import (
    SPARE_BYTES,
    Recorder,
    Row,
    RunFolder,
    RunSummary,
    list_runs,
    slug,
)
from mnist_wandb.settings import Settings, load_settings
from mnist_wandb.train import Event, Logged, StepDone

QUICK = validate(
    {
        "device": "cpu",
        "data": {"dataset": "digits", "train_size": 100},
        "model": {"name": "linear"},
        "training": {"epochs": 2, "batch_size": 16},
        "tracking": {"mode": "disabled", "log_every_steps": 3},
    }
)


def make_run(root: Path, name: str = "digits", run_id: str | None = None) -> RunFolder:
    folder = RunFolder.create(root, name, run_id=run_id)
    folder.write_config(QUICK, "quickstart")
    return folder


def rename(folder: RunFolder, name: str) -> RunFolder:
    return RunFolder(folder.path.rename(folder.path.with_name(name)))


SUMMARY = RunSummary(
    status="finished",
    run_dir="runs/20250101-120000-x-1234abcd",
    name="x",
    preset="quickstart",
    seed=0,
    device="cpu",
    num_parameters=7850,
    epochs=2,
    steps=14,
    training_seconds=1.5,
    total_seconds=2.5,
    images_per_second=1000.0,
    metrics={"test/accuracy": 0.875},
    wandb={"mode": "disabled", "id": None},
)


@pytest.fixture
def evaluation() -> EvalResult:
    probabilities = np.array(
        [[0.75, 0.125, 0.125], [0.5, 0.25, 0.25], [0.0, 0.25, 0.75]], dtype=np.float32
    )
    return EvalResult(
        0.5, probabilities, np.array([0, 1, 2]), np.array([7, 3, 9]), ("a", "b, c", "d")
    )


# ── make ─────────────────────────────────────────────────────────────────────────────────────


def test_create_names_the_folder_by_time_name_and_id(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs", "my run", run_id="abc123")
    assert re.fullmatch(r"\d{8}-\d{6}-my-run-abc123", folder.path.name)
    assert folder.run_id == "abc123"
    assert (folder.path / "checkpoints").is_dir()
    ids = {RunFolder.create(tmp_path / "runs", "x").run_id for _ in range(5)}
    assert len(ids) == 5
    assert all(re.fullmatch(r"[0-9a-f]{8}", run_id) for run_id in ids)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist-cnn_large", "mnist-cnn_large"),
        ("lr 1e-3, wide!", "lr-1e-3-wide"),
        ("../../etc/passwd", "etc-passwd"),
        ("a/b\\c:d", "a-b-c-d"),
        ("日本", "run"),
        ("..", "run"),
        ("v1.2", "v1.2"),
        ("x" * 100, "x" * 60),
    ],
)
def test_slug_keeps_what_is_safe_in_a_file_name(name: str, expected: str) -> None:
    assert slug(name) == expected


def test_a_run_needs_free_space(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(
        RunError, match=r"runs: \d+ MiB are free, this run needs \d+ MiB; make room"
    ):
        RunFolder.create(root, "x", needed_bytes=2 * free)
    assert list(root.iterdir()) == []
    RunFolder.create(root, "x", needed_bytes=max(0, free // 2 - SPARE_BYTES))


def test_a_runs_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.write_text("mine")
    with pytest.raises(RunError) as caught:
        RunFolder.create(root, "x")
    assert str(caught.value) == (
        f"{root}: a run folder cannot be made there: Not a directory; point MNIST_WANDB_RUNS_DIR"
        " to a folder that can be written"
    )
    assert root.read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_runs_folder_in_a_place_without_files_is_an_error() -> None:
    with pytest.raises(RunError, match=r"^/proc/runs: a run folder cannot be made there: No such"):
        RunFolder.create(Path("/proc/runs"), "x")


# ── find, list, lock ─────────────────────────────────────────────────────────────────────────


def test_a_run_is_found_by_path_name_id_and_as_the_latest(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    newer = rename(make_run(root), "20250201-000000-b-11111111")
    older = rename(make_run(root), "20250101-000000-a-22222222")
    (root / "20250301-000000-no-config").mkdir()
    assert list_runs(root) == [older, newer]
    assert RunFolder.find(str(older.path), Path("elsewhere")) == older
    assert RunFolder.find(f"{older.path}/", root).run_id == "22222222"
    assert RunFolder.find("20250101-000000-a-22222222", root) == older
    assert RunFolder.find("22222222", root) == older
    assert RunFolder.find("latest", root) == newer


def test_a_run_that_is_not_there_is_named_beside_the_newest(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for spec in ("latest", "22222222"):
        with pytest.raises(RunError) as caught:
            RunFolder.find(spec, root)
        assert str(caught.value) == f"{spec}: no run folder of that path, name or id in {root}"
    rename(make_run(root), "20250101-000000-a-11111111")
    with pytest.raises(RunError, match=r"; the newest is 20250101-000000-a-11111111$"):
        RunFolder.find("22222222", root)


@pytest.mark.parametrize("spec", ["~nobody", "~nobody/x", "x" * 300, "a\0b", ""])
def test_a_text_that_is_no_path_is_no_run(spec: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(RunError) as caught:
        RunFolder.find(spec, tmp_path)
    assert str(caught.value).startswith(f"{spec}: no run folder of that path, name or id in ")


@pytest.mark.parametrize(("inside", "spec"), [("", "."), ("", "./"), ("checkpoints", "..")])
def test_a_run_is_found_from_inside_its_folder(
    inside: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path, run_id="abc123")
    monkeypatch.chdir(folder.path / inside)
    found = RunFolder.find(spec, tmp_path)
    assert found.path.samefile(folder.path)
    assert found.run_id == "abc123"


def test_an_id_of_several_runs_is_refused(tmp_path: Path) -> None:
    rename(make_run(tmp_path), "20250101-000000-a-12345678")
    rename(make_run(tmp_path), "20250102-000000-b-12345678")
    with pytest.raises(RunError) as caught:
        RunFolder.find("12345678", tmp_path)
    assert str(caught.value) == (
        "12345678: several runs have this id: 20250101-000000-a-12345678,"
        " 20250102-000000-b-12345678; give the folder's name"
    )


def test_a_run_belongs_to_one_process_until_that_ends(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    script = (
        "import sys; from pathlib import Path; from mnist_wandb.runs import RunFolder;"
        "lock = RunFolder(Path(sys.argv[1])).lock(); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=f"{folder.path}: another process is working on this"):
            folder.lock()
        other.kill()
        other.wait()
    folder.lock().release()
    lock = folder.lock()
    with pytest.raises(RunError, match="another process is working on this run"):
        folder.lock()
    lock.release()


# ── metrics ──────────────────────────────────────────────────────────────────────────────────


def test_metrics_come_back_as_they_were_appended(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert folder.read_metrics() == []
    rows: list[Row] = [
        {"step": 3, "epoch": 0.428571, "train/loss": 0.1 + 0.2},
        {"step": 7, "epoch": 1, "val/loss": 1e-300},
    ]
    for row in rows:
        folder.append_metrics(row)
        assert folder.read_metrics()[-1] == row  # at once, without closing anything
    assert folder.read_metrics() == rows
    assert len(folder.metrics_path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "torn", [b'{"step": 14, "epo', b"{", b"\0\0\0", b'{"step": 9, "\xff\xfe', b"5", b"{}"]
)
def test_a_torn_last_line_is_left_out(torn: bytes, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    folder.append_metrics({"step": 7})
    with folder.metrics_path.open("ab") as file:
        file.write(torn)
    assert folder.read_metrics() == [{"step": 7}]


@pytest.mark.parametrize("damaged", [b'{"step": ', b"5", b"[1]", b"{}", b"\xff\xfe", b""])
def test_a_damaged_line_in_the_middle_is_named_by_its_number(
    damaged: bytes, tmp_path: Path
) -> None:
    folder = make_run(tmp_path)
    folder.metrics_path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    with pytest.raises(RunError) as caught:
        folder.read_metrics()
    assert str(caught.value) == f"{folder.metrics_path}:2: damaged line"


def test_truncate_metrics_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for step in (3, 6, 7, 9):
        folder.append_metrics({"step": step, "train/loss": 1 / step})
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 12, "tr')
    folder.truncate_metrics(7)
    assert folder.metrics_path.read_text().endswith("}\n")
    assert folder.read_metrics() == [{"step": s, "train/loss": 1 / s} for s in (3, 6, 7)]
    folder.append_metrics({"step": 9})
    assert [row["step"] for row in folder.read_metrics()] == [3, 6, 7, 9]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_metrics_on_a_full_disk_are_an_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    folder.metrics_path.symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: No space left on dev"):
        folder.append_metrics({"step": 1})


def test_the_recorder_writes_the_folder_first_then_every_sink(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    folder.append_metrics({"step": 3, "epoch": 0.5, "train/loss": 2.0, "train/lr": 0.1})
    seen: list[tuple[Row, int]] = []

    class Sink:
        def log(self, row: Row) -> None:
            seen.append((row, len(folder.read_metrics())))

        def log_confusion(
            self, split: str, row: Row, confusion: Any, class_names: Sequence[str]
        ) -> None: ...

        def log_model(
            self, path: Path, aliases: Sequence[str], metadata: Mapping[str, Any]
        ) -> None: ...

    recorder = Recorder(folder, [Sink(), Sink()])
    assert recorder.final == {"train/loss": 2.0, "train/lr": 0.1}
    recorder.log(6, 1, {"train/loss": 1.0})
    earlier = {"step": 3, "epoch": 0.5, "train/loss": 2.0, "train/lr": 0.1}
    assert seen == [(earlier, 1)] * 2 + [({"step": 6, "epoch": 1, "train/loss": 1.0}, 2)] * 2
    assert recorder.final == {"train/loss": 1.0, "train/lr": 0.1}


# ── the other files ──────────────────────────────────────────────────────────────────────────


def test_the_configuration_of_a_run_comes_back_equal(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert folder.read_config() == QUICK
    assert load_config(str(folder.config_path)) == QUICK
    assert folder.config_path.read_text().startswith("# mnist-wandb, from quickstart\n")


def test_the_summary_is_one_object_with_the_documented_keys(tmp_path: Path) -> None:
    documented = (
        "status run_dir name preset seed device num_parameters epochs steps training_seconds"
        " total_seconds images_per_second metrics wandb error num_processes"
    )
    line = SUMMARY.to_json()
    assert "\n" not in line
    assert list(json.loads(line)) == documented.split()
    folder = make_run(tmp_path)
    assert folder.read_summary() is None
    folder.write_summary(SUMMARY)
    assert folder.read_summary() == json.loads(line) == asdict(SUMMARY)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_summary_that_cannot_be_written_leaves_the_previous_one(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    folder.write_summary(SUMMARY)
    (folder.path / ".summary.json.tmp").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"summary\.json: cannot be written: No space left on dev"):
        folder.write_summary(RunSummary(**{**asdict(SUMMARY), "status": "failed"}))
    assert folder.read_summary() == asdict(SUMMARY)


def test_a_summary_that_cannot_be_cleaned_up_after_is_an_error_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder.path / ".summary.json.tmp").mkdir()
    with pytest.raises(RunError, match=r"summary\.json: cannot be written: Is a directory"):
        folder.write_summary(SUMMARY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"status": ', "cannot be read: "),
        ("[1]", "damaged: expected one JSON object"),
        ("null", "damaged: expected one JSON object"),
    ],
)
def test_a_damaged_summary_is_an_error(content: str, message: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    folder.summary_path.write_text(content)
    with pytest.raises(RunError, match=rf"summary\.json: {message}"):
        folder.read_summary()


def test_an_evaluation_is_written_as_a_table_and_as_arrays(
    evaluation: EvalResult, tmp_path: Path
) -> None:
    folder = make_run(tmp_path)
    folder.write_evaluation(evaluation)
    with folder.confusion_path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["true \\ predicted", "a", "b, c", "d"],
            ["a", "1", "0", "0"],
            ["b, c", "1", "0", "0"],
            ["d", "0", "0", "1"],
        ]
    with np.load(folder.predictions_path) as arrays:
        assert set(arrays) == {"ids", "labels", "probabilities"}
        assert arrays["ids"].tolist() == [7, 3, 9]
        assert arrays["labels"].tolist() == [0, 1, 2]
        assert (arrays["ids"].dtype, arrays["labels"].dtype) == (np.int64, np.int64)
        assert arrays["probabilities"].dtype == np.float16
        np.testing.assert_array_equal(arrays["probabilities"], evaluation.probabilities)
    assert not list(folder.path.glob(".*"))


# ── a whole run ──────────────────────────────────────────────────────────────────────────────


def run_quick(
    config: RunConfig = QUICK, settings: Settings | None = None, **arguments: Any
) -> RunOutcome:
    return run_experiment(config, settings or load_settings(), preset="quickstart", **arguments)


def only_run() -> RunFolder:
    (folder,) = list_runs(Path("runs"))
    return folder


def test_a_finished_run_leaves_all_its_files() -> None:
    outcome = run_quick(command=["mnist-wandb", "run"])
    folder = only_run()
    found = {str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file()}
    assert found - {".lock"} == {
        *("config.yaml", "environment.json", "metrics.jsonl", "summary.json"),
        *("checkpoints/last.pt", "checkpoints/best.pt", "predictions.npz", "confusion_matrix.csv"),
    }
    assert folder.read_config() == QUICK
    assert folder.read_summary() == asdict(outcome.summary)


def test_the_summary_agrees_with_the_metrics_and_with_a_second_scoring() -> None:
    outcome = run_quick()
    folder, summary = only_run(), outcome.summary
    latest: Row = {}
    for row in folder.read_metrics():
        latest |= row
    assert (latest.pop("step"), latest.pop("epoch")) == (summary.steps, summary.epochs) == (14, 2)
    assert summary.metrics == latest
    names = (
        "train/loss train/accuracy train/lr train/grad_norm train/images_per_second val/loss"
        " val/accuracy val/macro_f1 best/val_accuracy best/epoch test/loss test/accuracy"
        " test/macro_f1 test/calibration_error"
    )
    assert sorted(latest) == sorted(names.split())
    tests = [row for row in folder.read_metrics() if "test/loss" in row]
    assert len(tests) == 1
    assert (summary.status, summary.error, summary.name) == ("finished", None, "digits-linear")
    assert (summary.num_parameters, summary.seed, summary.device) == (7850, 0, "cpu")
    assert summary.wandb == {"mode": "disabled", "id": None}
    assert summary.run_dir == str(folder.path)
    assert 0 < summary.training_seconds < summary.total_seconds
    assert_images_used(summary, 200)
    best = load_checkpoint(folder.checkpoint_path("best"))
    splits = load_dataset(QUICK.data)
    again = evaluate(best.build_model(), splits.test, best.preprocessing).metrics("test")
    assert again == pytest.approx({name: latest[name] for name in again}, rel=1e-5)
    with np.load(folder.predictions_path) as arrays:
        accuracy = (arrays["probabilities"].argmax(1) == arrays["labels"]).mean()
    assert accuracy == pytest.approx(latest["test/accuracy"], abs=0.01)
    counts = [line.split(",")[1:] for line in folder.confusion_path.read_text().splitlines()[1:]]
    assert np.trace(np.array(counts, int)) / 359 == pytest.approx(latest["test/accuracy"])


def assert_images_used(summary: RunSummary, count: int) -> None:
    """The summary's rate times its seconds, which are rounded to thousandths."""
    seconds, rate = summary.training_seconds, summary.images_per_second
    assert rate * (seconds - 0.0006) < count < rate * (seconds + 0.0006)


def test_the_environment_says_what_the_run_ran_on() -> None:
    run_quick(command=["mnist-wandb", "run", "seed=0"])
    environment = only_run().read_environment()
    assert set(environment) >= {
        *("preset", "command", "started", "versions", "python", "platform", "processor"),
        *("git_commit", "data_fingerprint", "data_mean", "data_std", "num_images", "sweep_id"),
        *("device", "device_reason", "device_name", "precision", "compile", "num_threads"),
    }
    assert environment["command"] == ["mnist-wandb", "run", "seed=0"]
    assert environment["preset"] == "quickstart"
    assert environment["versions"]["mnist-wandb"] == __version__
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["num_images"] == {"train": 100, "val": 144, "test": 359}
    assert environment["data_fingerprint"] == load_dataset(QUICK.data).fingerprint
    assert environment["git_commit"] is None  # the tests' folder is in no repository


def test_the_best_checkpoint_has_scores_and_the_last_one_can_be_continued() -> None:
    outcome = run_quick()
    best = load_checkpoint(only_run().checkpoint_path("best"))
    last = load_checkpoint(only_run().checkpoint_path("last"))
    assert best.training is None
    assert best.metrics["val/accuracy"] == outcome.summary.metrics["best/val_accuracy"]
    assert best.epoch == outcome.summary.metrics["best/epoch"]
    assert last.training is not None
    assert last.training["optimizer"]["state"]
    assert last.step == 14


def test_the_same_run_twice_has_the_same_metrics() -> None:
    for _ in range(2):
        run_quick()
    first, second = (run.read_metrics() for run in list_runs(Path("runs")))
    timed = "train/images_per_second"
    strip = [
        [{k: v for k, v in row.items() if k != timed} for row in rows] for rows in (first, second)
    ]
    assert strip[0] == strip[1]


def test_every_epoch_can_be_kept() -> None:
    run_quick(override_config(QUICK, ("tracking.log_model=every_epoch",)))
    names = {path.name for path in (only_run().path / "checkpoints").iterdir()}
    assert names == {"best.pt", "last.pt", "epoch-1.pt", "epoch-2.pt"}
    assert load_checkpoint(only_run().checkpoint_path("epoch-1")).epoch == 1


def stop_at(step: int) -> Callable[[], bool]:
    asked = iter(range(10**6))
    return lambda: next(asked) >= step


def test_an_interrupted_run_is_continued_in_its_folder() -> None:
    whole = run_quick()
    expected = only_run().read_metrics()
    shutil.rmtree("runs")
    first = run_quick(should_stop=stop_at(5))
    folder = only_run()
    assert (first.summary.status, first.summary.steps, first.test) == ("interrupted", 5, None)
    assert folder.read_summary() == asdict(first.summary)
    assert not folder.predictions_path.exists()
    second = run_quick(resume=folder)
    assert only_run() == folder
    assert second.summary.status == "finished"
    assert folder.read_summary() == asdict(second.summary)
    timed = "train/images_per_second"
    rows = [{k: v for k, v in row.items() if k != timed} for row in folder.read_metrics()]
    assert rows == [{k: v for k, v in row.items() if k != timed} for row in expected]
    assert whole.test is not None
    assert second.test is not None
    np.testing.assert_array_equal(second.test.probabilities, whole.test.probabilities)
    assert second.summary.total_seconds > first.summary.total_seconds
    with pytest.raises(RunError, match="this run is finished; nothing is left to resume"):
        run_quick(resume=folder)
    assert folder.read_summary() == asdict(second.summary)


def test_an_interrupted_run_counts_every_image_that_it_used() -> None:
    assert_images_used(run_quick(should_stop=stop_at(5)).summary, 5 * 16)  # logged at step 3


def test_a_run_killed_before_its_summary_has_one_test_row_after_resuming() -> None:
    run_quick()
    expected = only_run().read_metrics()
    only_run().summary_path.unlink()
    run_quick(resume=only_run())
    found = only_run().read_metrics()
    assert found == expected
    assert [row["step"] for row in found if "test/loss" in row] == [14]


def test_a_run_without_a_checkpoint_begins_again(caplog: pytest.LogCaptureFixture) -> None:
    expected = run_quick().summary.metrics
    (old,) = list_runs(Path("runs"))
    old.remove()
    folder = make_run(Path("runs"))
    folder.write_config(QUICK, "quickstart")
    folder.append_metrics({"step": 1, "epoch": 0.1, "train/loss": 9.0})
    with caplog.at_level("INFO", logger="mnist_wandb"):
        found = run_quick(resume=folder).summary.metrics
    assert "stopped before its first checkpoint; begins again" in caplog.text
    del found["train/images_per_second"], expected["train/images_per_second"]
    assert found == expected
    assert folder.read_metrics()[0]["train/loss"] != 9.0


def test_a_run_whose_data_have_changed_cannot_be_resumed() -> None:
    run_quick(should_stop=stop_at(5))
    other = override_config(QUICK, ("data.split_seed=1",))
    with pytest.raises(RunError, match="the data have changed since this run was started"):
        run_quick(other, resume=only_run())
    assert only_run().checkpoint_path("last").exists()


def test_a_run_that_another_process_works_on_cannot_be_resumed() -> None:
    run_quick(should_stop=stop_at(5))
    folder = only_run()
    before = {p.name: p.read_bytes() for p in folder.path.iterdir() if p.is_file()}
    lock = folder.lock()
    with pytest.raises(RunError, match="another process is working on this run"):
        run_quick(resume=folder)
    lock.release()
    after = {p.name: p.read_bytes() for p in folder.path.iterdir() if p.is_file()}
    assert after == before


def test_a_diverged_run_says_so_in_its_summary() -> None:
    config = override_config(
        QUICK,
        (
            *("model.name=mlp_64x3", "optimizer.name=sgd", "optimizer.lr=100"),
            *("schedule.name=constant", "tracking.log_every_steps=1000"),
        ),
    )
    with pytest.raises(DivergedError, match=r"training diverged at step \d: training loss is") as e:
        run_quick(config)
    summary = only_run().read_summary()
    assert summary is not None
    assert (summary["status"], summary["error"]) == ("diverged", str(e.value))
    assert not [key for key in summary["metrics"] if key.startswith("test/")]
    assert not only_run().checkpoint_path("best").exists()
    assert only_run().read_config() == config


def test_a_gradient_that_overflows_before_the_loss_does_is_a_divergence_too() -> None:
    config = override_config(
        QUICK,
        (
            *("model.name=mlp_64x3", "optimizer.name=sgd", "optimizer.lr=10"),
            *("data.train_size=200", "training.batch_size=32"),
            *("schedule.name=constant", "tracking.log_every_steps=1"),
        ),
    )
    with pytest.raises(DivergedError):
        run_quick(config)
    summary = only_run().read_summary()
    assert summary is not None
    assert summary["status"] == "diverged"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk_ends_the_run_and_keeps_its_folder() -> None:
    def fill(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 9:
            for path in ("checkpoints/.last.pt.tmp", "checkpoints/.best.pt.tmp"):
                (only_run().path / path).symlink_to("/dev/full")
            (only_run().path / ".summary.json.tmp").symlink_to("/dev/full")

    with pytest.raises(RunError, match=r"checkpoints/\w+\.pt: cannot be written: "):
        run_quick(emit=fill)
    assert load_checkpoint(only_run().checkpoint_path("last")).step == 7
    assert only_run().read_metrics()[-1]["step"] == 14
    assert only_run().read_summary() is None


def test_a_failed_run_says_so_in_its_summary_and_keeps_its_checkpoint() -> None:
    def fail(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 9:
            raise OverflowError("out of paper")

    with pytest.raises(OverflowError, match="out of paper"):
        run_quick(emit=fail)
    summary = only_run().read_summary()
    assert summary is not None
    assert (summary["status"], summary["error"]) == ("failed", "OverflowError: out of paper")
    assert (summary["steps"], summary["epochs"]) == (9, pytest.approx(9 / 7, abs=1e-6))
    assert load_checkpoint(only_run().checkpoint_path("last")).step == 7
    resumed = run_quick(resume=only_run())
    assert resumed.summary.status == "finished"
    assert resumed.summary.error is None


def test_an_event_is_recorded_before_it_is_passed_on() -> None:
    seen = []

    def look(event: Event) -> None:
        if isinstance(event, Logged):
            seen.append(
                only_run().read_metrics()[-1]
                == {"step": event.step, "epoch": event.epoch, **event.values}
            )

    run_quick(emit=look)
    assert seen
    assert all(seen)


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        (("data.train_size=5000",), ConfigError, "data.train_size: 5000 is more than the 1294"),
        (("device=cuda:99",), ConfigError, "device: cuda:99 is not on this machine"),
        (
            ("model.name=mlp_128", "model.batch_norm=true", "training.batch_size=33"),
            ConfigError,
            "training.batch_size: 33 leaves a batch of one of the 100 training images",
        ),
        (
            ("model.name=mlp_128", "model.batch_norm=true", "training.batch_size=1"),
            ConfigError,
            "training.batch_size: 1 leaves a batch of one of the 100 training images",
        ),
    ],
)
def test_an_error_before_training_leaves_no_folder(
    overrides: tuple[str, ...], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        run_quick(override_config(QUICK, overrides))
    assert not list(Path().rglob("runs/*"))


def test_a_runs_folder_that_cannot_be_made_ends_the_run_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: list[Event] = []
    settings = Settings(data_dir=Path("data"), runs_dir=tmp_path / "file" / "runs")
    with pytest.raises(RunError, match="a run folder cannot be made there: Not a directory"):
        run_quick(settings=settings, emit=steps.append)
    assert steps == []


# ── a small and a read-only file system ──────────────────────────────────────────────────────


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs `unshare -rm` to mount a tmpfs")


def run_in_mount(options: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """`mnist-wandb run` with its runs folder on a file system that only this process sees."""
    place = tmp_path / "mounted"
    place.mkdir()
    script = (
        f'mount -t tmpfs -o {options} none "$1"; shift; "$@"; code=$?; echo "left: $(ls {place})";'
        " exit $code"
    )
    program = [sys.executable, "-m", "mnist_wandb", "run", "tracking.mode=disabled"]
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(place), *program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "MNIST_WANDB_RUNS_DIR": str(place)},
    )


@needs_mount
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("size=8m", r"mounted: 8 MiB are free, this run needs \d\d MiB; make room or point"),
        ("ro", r"mounted: a run folder cannot be made there: Read-only file system; point"),
    ],
)
def test_a_file_system_without_room_ends_the_run_with_one_line(
    options: str, text: str, tmp_path: Path
) -> None:
    done = run_in_mount(options, tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "mounted" in line]
    assert len(lines) == 1
    assert re.search(text, lines[0])
    assert "Traceback" not in done.stderr
    assert done.stdout == "left: \n"
