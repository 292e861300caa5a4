"""Upload run folders to W&B: the client's own record where that is whole, else from the folder."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mnist_wandb.checkpoint import load_checkpoint
from mnist_wandb.config import RunConfig
from mnist_wandb.data import Splits, load_dataset
from mnist_wandb.errors import MnistWandbError, RunError
from mnist_wandb.evaluate import evaluate
from mnist_wandb.experiment import (
    DATA_FACTS,
    EXIT_CODES,
    SUMMARY_TOTALS,
    collect_arrays,
    model_metadata,
)
from mnist_wandb.metrics import EvalResult
from mnist_wandb.remote import (
    UPLOAD_SECONDS,
    read_remote,
    run_path,
    upload_record,
    wait_for_upload,
)
from mnist_wandb.runs import Row, RunFolder
from mnist_wandb.settings import Settings
from mnist_wandb.tracking import WandbSink

log = logging.getLogger(__name__)


def sync_run(folder: RunFolder, settings: Settings) -> str:
    """Bring the W&B server to the state of a run folder; uploads nothing that is there already.

    Args:
        folder: any run that has ended, however it was tracked.
        settings: the surroundings, with an API key.

    Returns:
        The address of the run, and what was done, in a few words.

    Raises:
        RunError: the run is under way, or its folder is damaged.
        TrackingError: the server cannot be reached, or has not taken everything.
    """
    config = folder.read_config()
    lock = folder.lock()
    try:
        rows, summary = folder.read_metrics(), folder.read_summary()
        log_model = config.tracking.log_model is not None
        path = run_path(config, settings, folder)
        remote = read_remote(path, settings)
        if remote is not None and remote.is_complete(rows, summary, log_model=log_model):
            return f"{remote.url}: already there"
        record = _find_record(folder, config, rows, summary)
        how = "uploaded"
        if record is not None and (remote is None or remote.num_rows == 0):
            log.info("%s", upload_record(record, path))
        else:  # the client would send again what is there
            replay_run(folder, config, settings)
            how = "uploaded from the run folder"
        remote = wait_for_upload(path, settings, rows, summary, log_model=log_model)
        return f"{remote.url}: {how}"
    finally:
        lock.release()


# ── the client's own record ──────────────────────────────────────────────────────────────────


def _find_record(
    folder: RunFolder, config: RunConfig, rows: list[Row], summary: dict[str, Any] | None
) -> Path | None:
    """The newest record of the W&B client that holds the whole run, if one does."""
    scored, logs_model = folder.predictions_path.exists(), config.tracking.log_model is not None
    for record in sorted(folder.path.glob("wandb/*run-*"), key=_time_of, reverse=True):
        found = _read_record(record)
        history = [entry["history"]["item"] for entry in found if entry["type"] == "history"]
        whole = len(history) == len(rows) and all(
            item.get("_step") == n and item.items() >= row.items()
            for n, (item, row) in enumerate(zip(history, rows, strict=True))
        )
        ended = summary is None or any(entry["type"] == "exit" for entry in found)
        has_model = any(
            entry["type"] == "artifact" and "best" in entry["artifact"].get("aliases", [])
            for entry in found
        )
        has_charts = any(key.startswith("test/per_class") for item in history for key in item)
        if whole and ended and (not scored or (has_charts and (has_model or not logs_model))):
            return record
    return None


def _time_of(record: Path) -> str:
    """`20260131_235959-id` of `run-…` and `offline-run-…`."""
    return record.name.partition("run-")[2]


def _read_record(record: Path) -> list[dict[str, Any]]:
    """All entries of a `.wandb` file; what can be read of a damaged one."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record.absolute())],
        capture_output=True,
        text=True,
        check=False,
    )
    found = []
    for line in done.stdout.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found if done.returncode == 0 else []


# ── from the folder ──────────────────────────────────────────────────────────────────────────


def replay_run(folder: RunFolder, config: RunConfig, settings: Settings) -> None:
    """Send to the server what it lacks of a run, from the run folder.

    Console output and system metrics are not in the folder. Pictures are taken from the data
    set, where it is at hand and unchanged.

    Raises:
        TrackingError: the server cannot be reached, or does not take everything.
    """
    environment, summary = folder.read_environment(), folder.read_summary()
    facts = {key: environment.get(key) for key in DATA_FACTS}
    if None in facts.values():
        raise RunError(f"{folder.environment_path}: does not say which data the run is from")
    rows = folder.read_metrics()
    final = {k: v for row in rows for k, v in row.items() if k not in ("step", "epoch")}
    splits = _load_splits(config, settings, environment)
    best = _score_best(folder, config, splits)
    test = _read_predictions(folder, environment["class_names"], final)
    timeout = max(UPLOAD_SECONDS, config.tracking.upload_timeout_seconds)
    sweep_id = environment.get("sweep_id")
    sink = WandbSink.start(config, settings, folder, "online", sweep_id=sweep_id)
    arrays = collect_arrays(splits) if splits and config.tracking.log_dataset else {}
    sink.use_dataset(config.data.dataset, facts, arrays)
    for row in rows:
        sink.log(row)
        if best is not None and "val/loss" in row and row["epoch"] == row["best/epoch"]:
            sink.log_confusion("val", _axes(row), best.confusion, best.class_names)
    metadata = model_metadata(config, final, facts, int((summary or {}).get("num_parameters", 0)))
    if config.tracking.log_model == "every_epoch":
        for path in sorted(folder.checkpoint_path("best").parent.glob("epoch-*.pt")):
            sink.log_model(path, [path.stem], metadata)
    if test is not None:
        sink.open_row()
        images = splits.test.images[:, 0].cpu().numpy() if splits else np.zeros((0, 28, 28), "u1")
        count = config.tracking.sample_predictions if splits else 0
        sink.log_evaluation("test", _axes(rows[-1]), test, images, count)
        if config.tracking.log_model is not None and folder.checkpoint_path("best").exists():
            sink.log_model(folder.checkpoint_path("best"), ["best", "latest"], metadata)
    status = str(summary["status"]) if summary else "failed"
    totals = {key: summary[key] for key in SUMMARY_TOTALS} if summary else {}
    sink.finish(EXIT_CODES[status], {**final, **totals}, timeout=timeout)


def _axes(row: Row) -> Row:
    return {"step": row["step"], "epoch": row["epoch"]}


def _load_splits(
    config: RunConfig, settings: Settings, environment: dict[str, Any]
) -> Splits | None:
    """The run's data, if they are at hand (nothing is downloaded) and still the same."""
    try:
        splits = load_dataset(config.data, data_dir=settings.data_dir, download=False)
    except MnistWandbError as error:
        log.warning("the pictures are left out: %s", error)
        return None
    if splits.fingerprint != environment.get("data_fingerprint"):
        log.warning("%s: has changed, so the pictures are left out", config.data.dataset)
        return None
    return splits


def _score_best(folder: RunFolder, config: RunConfig, splits: Splits | None) -> EvalResult | None:
    """The best weights on the validation split, for its confusion matrix."""
    path = folder.checkpoint_path("best")
    if splits is None or not path.exists():
        return None
    checkpoint = load_checkpoint(path)
    model = checkpoint.build_model()
    return evaluate(model, splits.val, checkpoint.preprocessing, loss=config.training.loss)


def _read_predictions(
    folder: RunFolder, class_names: Sequence[str], final: dict[str, float]
) -> EvalResult | None:
    """The test scores as they were recorded; the test split is not scored again."""
    if "test/loss" not in final:
        return None
    try:
        with np.load(folder.predictions_path) as arrays:
            return EvalResult(
                loss=final["test/loss"],
                probabilities=arrays["probabilities"].astype(np.float32),
                labels=arrays["labels"],
                ids=arrays["ids"],
                class_names=tuple(class_names),
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{folder.predictions_path}: cannot be read: {error}") from None
