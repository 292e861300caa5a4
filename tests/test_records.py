"""Finding and reading many runs, and what makes them incomparable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mnist_wandb.errors import RunError
from mnist_wandb.records import (
    RunRecord,
    find_differences,
    find_runs,
    flatten,
    is_studied,
    read_predictions,
    read_records,
)
from mnist_wandb.runs import list_runs


@pytest.fixture
def records(runs_dir: Path) -> list[RunRecord]:
    found, damaged = read_records(list_runs(runs_dir))
    assert damaged == []
    return found


def test_a_folder_a_sweep_and_single_runs_are_found_each_run_once(runs_dir: Path) -> None:
    runs = list_runs(runs_dir)
    assert find_runs(["runs"], runs_dir) == runs
    assert find_runs(["latest", str(runs[0].path), runs[1].run_id], runs_dir) == [
        runs[-1], runs[0], runs[1]
    ]  # fmt: skip
    assert find_runs(["small_sweep"], runs_dir) == runs[4:]
    assert find_runs(["small_sweep", "latest", "runs"], runs_dir) == runs[4:] + runs[:4]


def test_runs_of_a_wandb_sweep_are_found_by_its_id(runs_dir: Path) -> None:
    run = list_runs(runs_dir)[0]
    run.write_environment({**run.read_environment(), "sweep_id": "ab12cd"})
    for spec in ("ab12cd", "team/project/ab12cd"):
        assert find_runs([spec], runs_dir) == [run]


def test_what_is_no_run_is_refused(runs_dir: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(RunError, match="empty: no run folder lies in it; give a run, a folder of"):
        find_runs(["empty"], runs_dir)
    with pytest.raises(RunError, match=r"nowhere: no run folder .*, and no sweep of that name has"):
        find_runs(["nowhere"], runs_dir)
    with pytest.raises(RunError, match="no run folder"):
        find_runs(["a\0b"], runs_dir)


def test_a_record_holds_what_the_run_folder_says(records: list[RunRecord]) -> None:
    record = records[0]
    assert record.folder is not None
    summary = record.folder.read_summary()
    assert summary is not None
    for name in ("status", "metrics", "num_parameters", "training_seconds", "images_per_second"):
        assert getattr(record, name) == summary[name], name
    assert record.title == "digits-linear (example0)"
    assert (record.seed, records[1].seed) == (0, 1)
    assert records[2].config["model"]["hidden_sizes"] == [128]


def test_a_run_without_summary_has_not_ended(runs_dir: Path) -> None:
    run = list_runs(runs_dir)[0]
    run.summary_path.unlink()
    (record,), damaged = read_records([run])
    assert (record.status, damaged) == (None, [])


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.yaml", "training: {epochs: many}", "training.epochs: got the text 'many'"),
        ("summary.json", "{", "summary.json: cannot be read"),
        ("summary.json", '{"status": "finished"}', "damaged: not a run's summary"),
        ("environment.json", "[]", "damaged: expected one JSON object"),
    ],
)
def test_damaged_runs_are_named(runs_dir: Path, file: str, content: str, reason: str) -> None:
    first, second, *_ = list_runs(runs_dir)
    (first.path / file).write_text(content)
    found, (damaged,) = read_records([first, second])
    assert [record.run_id for record in found] == [second.run_id]
    assert (damaged.run, damaged.status) == (first.path.name, "damaged")
    assert reason in damaged.reason


def test_predictions_are_those_of_the_run(records: list[RunRecord]) -> None:
    result = read_predictions(records[0])
    assert result is not None
    assert result.accuracy == pytest.approx(records[0].metrics["test/accuracy"])
    assert result.class_names == tuple("0123456789")
    assert read_predictions(replace(records[0], folder=None)) is None


def test_damaged_predictions_are_refused(records: list[RunRecord]) -> None:
    folder = records[0].folder
    assert folder is not None
    with np.load(folder.predictions_path) as stored:
        arrays = dict(stored)
    np.savez(folder.predictions_path, **{**arrays, "ids": arrays["ids"][1:]})
    with pytest.raises(RunError, match=r"predictions.npz: damaged: its arrays do not fit together"):
        read_predictions(records[0])
    folder.predictions_path.write_bytes(b"PK nonsense")
    with pytest.raises(RunError, match=r"predictions.npz: cannot be read"):
        read_predictions(records[0])
    folder.predictions_path.unlink()
    assert read_predictions(records[0]) is None


def test_settings_by_dotted_key(records: list[RunRecord]) -> None:
    flat = flatten(records[2].config)
    assert flat["data.augment.zoom"] == 0.1
    assert flat["model.hidden_sizes"] == [128]
    ignored = {key for key in flat if not is_studied(key)}
    assert {"seed", "name", "device", "data.dir", "tracking.notes", "tracking.mode"} <= ignored
    assert not {"data.dataset", "training.precision", "model.name"} & ignored


def change(run: RunRecord, **environment: object) -> RunRecord:
    return replace(run, environment={**run.environment, **environment})


def test_comparable_runs_have_no_differences(records: list[RunRecord]) -> None:
    assert find_differences(records) == []


def test_what_makes_runs_incomparable_is_said(records: list[RunRecord]) -> None:
    run, other, *_ = records
    data = {**run.config["data"], "val_fraction": 0.3}
    split = replace(run, config={**run.config, "data": data})
    cases = {
        "data.val_fraction: 0.2 (2 runs), 0.3 (1 run): scores are on different images": split,
        "data fingerprint: differs for the same settings": change(run, data_fingerprint="x"),
        "version of torch: ": change(run, versions={**run.environment["versions"], "torch": "1"}),
        "version of mnist-wandb: 0.1.0 (2 runs), unknown (1 run)": change(run, versions={}),
        "(2 runs), H100 (1 run): seconds and": change(run, device="cuda:0", device_name="H100"),
    }
    for text, changed in cases.items():
        warnings = find_differences([run, other, changed])
        assert any(text in warning for warning in warnings), (text, warnings)


def test_fewer_training_images_are_no_other_split(records: list[RunRecord]) -> None:
    run = records[0]
    data = {**run.config["data"], "train_size": 100}
    smaller = replace(change(run, data_fingerprint="x"), config={**run.config, "data": data})
    assert find_differences([run, smaller]) == []
