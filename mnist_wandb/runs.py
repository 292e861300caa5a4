"""The run folder: the complete local record of a run, and the source of truth for W&B."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from mnist_wandb.config import RunConfig
from mnist_wandb.errors import CheckpointError, ConfigError, RunError
from mnist_wandb.loading import load_config, to_yaml
from mnist_wandb.metrics import EvalResult, Ints

if TYPE_CHECKING:
    from mnist_wandb.sweepfile import SweepFile

log = logging.getLogger(__name__)

Row = dict[str, float]
Confusion = tuple[Ints, tuple[str, ...]]
"""A confusion matrix, int64 (C, C) with true classes as rows, and the C class names."""

SPARE_BYTES = 32 * 2**20
"""Free space asked for beside the checkpoints: metrics, tables and the W&B record."""
ID_LENGTH = 8


@dataclass(frozen=True)
class RunSummary:
    """What `summary.json` holds and `run --json` prints.

    Attributes:
        status: finished | early_stopped | interrupted | diverged | failed.
        run_dir: the run folder.
        name: run name.
        preset: preset name or config file that the run started from.
        seed: of the run.
        device: for example "cpu" or "cuda:0".
        num_parameters: trainable parameters.
        epochs, steps: done.
        training_seconds: in training steps, without validation.
        total_seconds: from reading the data to the end, all sessions of the run together.
        images_per_second: images trained on divided by training_seconds.
        metrics: the final values by metric name.
        wandb: mode, id, and url or dir.
        error: what went wrong, for diverged and failed runs.
        num_processes: that trained together.
    """

    status: str
    run_dir: str
    name: str
    preset: str
    seed: int
    device: str
    num_parameters: int
    epochs: float
    steps: int
    training_seconds: float
    total_seconds: float
    images_per_second: float
    metrics: dict[str, float] = field(default_factory=dict)
    wandb: dict[str, str | None] = field(default_factory=dict)
    error: str | None = None
    num_processes: int = 1

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(asdict(self), allow_nan=False)


@dataclass(frozen=True)
class RunFolder:
    """One run folder; see the README for what each file holds."""

    path: Path

    @property
    def run_id(self) -> str:
        """The id at the end of the folder's name; also the W&B run id."""
        return self.path.name.rsplit("-", 1)[-1]

    @property
    def names(self) -> tuple[str, str]:
        """What a run may be called: the folder's name, and the id."""
        return self.path.name, self.run_id

    @property
    def config_path(self) -> Path:
        """The resolved configuration, reloadable with `--config`."""
        return self.path / "config.yaml"

    @property
    def environment_path(self) -> Path:
        """Versions, device, git commit and command."""
        return self.path / "environment.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per log event."""
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """Written last; there is none while a run is under way."""
        return self.path / "summary.json"

    @property
    def predictions_path(self) -> Path:
        """Test ids, labels and probabilities (float16)."""
        return self.path / "predictions.npz"

    @property
    def confusion_path(self) -> Path:
        """Test confusion matrix; rows are true classes."""
        return self.path / "confusion_matrix.csv"

    def checkpoint_path(self, name: str) -> Path:
        """`last`, `best` or `epoch-N`."""
        return self.path / "checkpoints" / f"{name}.pt"

    # ── Make, find, lock.

    @classmethod
    def create(
        cls, root: Path, name: str, *, run_id: str | None = None, needed_bytes: int = 0
    ) -> RunFolder:
        """Make an empty run folder `<yyyymmdd-hhmmss>-<name>-<id>` below `root`.

        Raises:
            RunError: the folder cannot be made, or less than `needed_bytes` are free.
        """
        run_id = run_id or secrets.token_hex(ID_LENGTH // 2)
        path = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug(name)}-{run_id}"
        try:
            (path / "checkpoints").mkdir(parents=True)
            free = shutil.disk_usage(path).free
        except OSError as error:
            raise RunError(
                f"{root}: a run folder cannot be made there: {error.strerror or error};"
                " point MNIST_WANDB_RUNS_DIR to a folder that can be written"
            ) from None
        needed = needed_bytes + SPARE_BYTES
        if free < needed:
            shutil.rmtree(path)
            raise RunError(
                f"{root}: {free / 2**20:.0f} MiB are free, this run needs"
                f" {needed / 2**20:.0f} MiB; make room or point MNIST_WANDB_RUNS_DIR elsewhere"
            )
        return cls(path)

    @classmethod
    def find(cls, spec: str, root: Path) -> RunFolder:
        """Find a run by its folder's path, name or id, or the newest one by `latest`.

        Raises:
            RunError: there is none, or several.
        """
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # not a path at all
            path = Path(spec).expanduser()
            if (path / "config.yaml").is_file():
                return cls(path if path.name not in ("", "..") else path.resolve())
        runs = list_runs(root)
        if spec == "latest" and runs:
            return runs[-1]
        matches = [run for run in (*runs, *list_sweep_runs(root)) if spec in run.names]
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = ", ".join(run.path.name for run in matches)
            raise RunError(f"{spec}: several runs have this id: {names}; give the folder's name")
        newest = f"; the newest is {runs[-1].path.name}" if runs else ""
        raise RunError(f"{spec}: no run folder of that path, name or id in {root}{newest}")

    @classmethod
    def with_id(cls, run_id: str, root: Path) -> RunFolder | None:
        """The run folder of an id, if there is one; the newest where there are several."""
        return next((run for run in reversed(list_runs(root)) if run.run_id == run_id), None)

    def lock(self) -> FileLock:
        """Take the run for this process; released when it ends, however it ends.

        Raises:
            RunError: another process is working on the run.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.path}: another process is working on this run") from None
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}") from None
        return lock

    def remove(self) -> None:
        """Delete the folder and everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    # ── Write.

    def write_config(self, config: RunConfig, preset: str) -> None:
        """Write the resolved configuration."""
        self._write(self.config_path, f"# mnist-wandb, from {preset}\n{to_yaml(config)}")

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write what the run ran on."""
        self._write(self.environment_path, json.dumps(environment, indent=2) + "\n")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write any other record as one JSON object."""
        self._write(self.path / name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def write_summary(self, summary: RunSummary) -> None:
        """Write the summary, last of all files of the folder."""
        self._write(
            self.summary_path, json.dumps(asdict(summary), indent=2, allow_nan=False) + "\n"
        )

    def write_evaluation(self, result: EvalResult) -> None:
        """Write predictions and confusion matrix of the test split."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["true \\ predicted", *result.class_names])
        for name, counts in zip(result.class_names, result.confusion.tolist(), strict=True):
            writer.writerow([name, *counts])
        self._write(self.confusion_path, table.getvalue())
        arrays = io.BytesIO()
        np.savez_compressed(
            arrays,
            ids=result.ids,
            labels=result.labels,
            probabilities=result.probabilities.astype(np.float16),
        )
        self._write(self.predictions_path, arrays.getvalue())

    def append_metrics(self, row: Mapping[str, float]) -> None:
        """Add one line to the metrics and hand it to the operating system."""
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise RunError(f"{self.metrics_path}: cannot be written: {error.strerror}") from None

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows after a step, and test scores (a resumed run writes them again)."""
        kept = [
            json.dumps(row) + "\n"
            for row in self.read_metrics()
            if row["step"] <= step and "test/accuracy" not in row
        ]
        self._write(self.metrics_path, "".join(kept))

    def _write(self, path: Path, content: str | bytes) -> None:
        """Write to a temporary name, then rename."""
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None

    # ── Read.

    def read_config(self) -> RunConfig:
        """The run's configuration."""
        return load_config(str(self.config_path))

    def read_metrics(self) -> list[Row]:
        """All rows; a torn last line (the process was killed while writing) is left out.

        Raises:
            RunError: a line before the last one is damaged.
        """
        try:
            lines = self.metrics_path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        rows: list[Row] = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                rows.append({**row, "step": row["step"]})
            except (ValueError, TypeError, KeyError):
                if number == len(lines):
                    break
                raise RunError(f"{self.metrics_path}:{number}: damaged line") from None
        return rows

    def read_summary(self) -> dict[str, Any] | None:
        """The summary, or None where the run has not ended."""
        return self._read_json(self.summary_path)

    def read_environment(self) -> dict[str, Any]:
        """What the run ran on."""
        return self._read_json(self.environment_path) or {}

    def _read_json(self, path: Path) -> dict[str, Any] | None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise RunError(f"{path}: damaged: expected one JSON object")
        return content


def list_runs(root: Path) -> list[RunFolder]:
    """All run folders below `root`, oldest first."""
    return [RunFolder(path.parent) for path in sorted(root.glob("*/config.yaml"))]


def find_runs(spec: str, root: Path) -> list[RunFolder]:
    """The run of a path, name, id or `latest`; of any other folder the runs that are in it.

    Raises:
        RunError: there is none of that name.
    """
    path = Path(spec)
    if path.is_dir() and not (path / "config.yaml").is_file():
        return list_runs(path)  # a sweep's folder, or nothing that is recorded as a run
    return [RunFolder.find(spec, root)]


def find_checkpoint(spec: str, root: Path) -> Path:
    """Find a checkpoint by its path, or the best one of a run; see `RunFolder.find`.

    Raises:
        RunError: there is no such run.
        CheckpointError: there is no such file.
        ConfigError: the text is not a path at all.
    """
    try:
        path = Path(spec).expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{spec[:80]!r}: not a path: {error}") from None
    if path.suffix == ".pt":
        raise CheckpointError(f"{path}: no such file")
    return RunFolder.find(spec, root).checkpoint_path("best")


def list_sweep_runs(root: Path) -> list[RunFolder]:
    """The run folders of all sweeps below `root`, oldest first of each sweep."""
    return [RunFolder(path.parent) for path in sorted(root.glob("*/*/config.yaml"))]


def study_name(sweep: SweepFile) -> str:
    """A sweep's name in its database, its folder's name, and its id in the record of a run."""
    return f"{slug(sweep.name)}-{sweep.digest}"


def slug(name: str) -> str:
    """A name as part of a file name: letters, digits, dot, underscore and hyphen."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:60] or "run"


class Sink(Protocol):
    """Where a recorder forwards to; W&B is one (tracking.WandbSink, with more methods)."""

    def log(self, row: Row) -> None:
        """Take the next row of metrics; a resumed run hands over its earlier rows first."""


class Recorder:
    """Writes each value into the run folder first, then forwards it to the sinks."""

    def __init__(
        self,
        folder: RunFolder,
        sinks: Iterable[Sink] = (),
        *,
        confusions: Mapping[int, Confusion] | None = None,
    ) -> None:
        """Open the record; the sinks get what it has already.

        Args:
            folder: of the run.
            sinks: where to forward to.
            confusions: validation confusion matrices by step, for the sinks only.
        """
        self.folder = folder
        self.sinks = list(sinks)
        self.has_failed = False
        self.final: dict[str, float] = {}
        for row in folder.read_metrics():  # a resumed run has rows already
            self._remember(row)
            self.forward("log", row)
            if "val/loss" in row and (found := (confusions or {}).get(int(row["step"]))):
                self.log_confusion("val", row["step"], row["epoch"], found)

    def log(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Record one event."""
        row: Row = {"step": step, "epoch": epoch, **values}
        self.folder.append_metrics(row)
        self._remember(row)
        self.forward("log", row)

    def log_confusion(self, split: str, step: float, epoch: float, found: Confusion) -> None:
        """Show the sinks a confusion matrix; it belongs to the latest row."""
        self.forward("log_confusion", split, {"step": step, "epoch": epoch}, *found)

    def forward(self, method: str, *arguments: Any) -> None:
        """Call a method of every sink; what fails there is left out, with one warning.

        The folder is the record, a sink only shows it: no failure there may end a run.
        """
        for sink in self.sinks:
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:
                if not self.has_failed:
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    is_run = self.folder.config_path.exists()  # nothing else can be uploaded later
                    later = f"; upload it later with `mnist-wandb sync {self.folder.path}`"
                    log.warning(
                        "W&B does not get everything of this run (%s)%s",
                        reason, later if is_run else "",
                    )  # fmt: skip
                self.has_failed = True

    def _remember(self, row: Mapping[str, float]) -> None:
        self.final.update({k: v for k, v in row.items() if k not in ("step", "epoch")})
