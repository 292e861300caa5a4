"""One record per run, wherever it was recorded, and the reader for run folders.

The reader for W&B is `remote.read_remote_records`.
"""

from __future__ import annotations

import csv
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mnist_wandb.errors import MnistWandbError, RunError
from mnist_wandb.layers import look_up
from mnist_wandb.metrics import EvalResult
from mnist_wandb.runs import RunFolder, RunSummary, list_runs, list_sweep_runs, slug, study_name
from mnist_wandb.sweepfile import load_sweep

SPLIT_KEYS = ("data.dataset", "data.val_from", "data.val_fraction", "data.split_seed")
"""Settings that decide which images validate and test."""
VERSIONS = ("mnist-wandb", "torch", "numpy")
COMPARED_FACTS = (
    "data_fingerprint", "versions", "device", "device_name", "processor", "num_threads",
)  # fmt: skip
"""What of environment.json decides whether runs can be compared; it goes to W&B, too."""
NOT_STUDIED = ("seed", "name", "device", "data.dir", "tracking.")
"""Settings that two runs of one group may differ in; a dot at the end stands for a section."""


@dataclass(frozen=True)
class RunRecord:
    """What is compared of one run, wherever it was recorded.

    Attributes:
        run_id: short id, unique among the runs.
        name: run name.
        location: folder or address, to show.
        status: see `RunSummary`; None for a run that has not ended.
        config: the complete configuration as nested mappings.
        metrics: the final values by metric name.
        num_parameters: trainable parameters.
        training_seconds, images_per_second: see `RunSummary`.
        environment: what the run ran on, as in `environment.json`; may lack anything.
        error: what went wrong, if anything; without a status, why there is none, if known.
        folder: the run folder with predictions and curves; None where there is none at hand.
    """

    run_id: str
    name: str
    location: str
    status: str | None
    config: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_parameters: int = 0
    training_seconds: float = 0.0
    images_per_second: float = 0.0
    environment: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    folder: RunFolder | None = None

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def title(self) -> str:
        """Name and id, to tell runs apart in messages."""
        return f"{self.name} ({self.run_id})"


@dataclass(frozen=True)
class LeftOut:
    """A run that is not compared, and why."""

    run: str
    status: str
    reason: str


def find_runs(specs: Sequence[str], root: Path) -> list[RunFolder]:
    """Find the runs of RUN|FOLDER|SWEEP texts, each once, in the order given.

    Args:
        specs: a run (folder, name, id or latest), a folder of run folders, or a sweep's name, id or
            file.
        root: where runs and the runs of sweeps are looked up.

    Raises:
        RunError: a text stands for no run.
    """
    found: dict[Path, RunFolder] = {}
    for spec in specs:
        for run in _runs_of(spec, root):
            found.setdefault(run.path.resolve(), run)
    return list(found.values())


def _runs_of(spec: str, root: Path) -> list[RunFolder]:
    try:
        path = Path(spec).expanduser()
        is_folder = path.is_dir() and not (path / "config.yaml").is_file()
    except (OSError, RuntimeError, ValueError):  # not a path at all
        is_folder = False
    if is_folder and (runs := list_runs(path)):
        return runs
    if spec.endswith((".yaml", ".yml")) or look_up(spec)[0] is not None:
        return _runs_of_sweep_file(spec, root)
    try:
        return [RunFolder.find(spec, root)]
    except RunError as error:
        if runs := _runs_of_sweep(spec, root):
            return runs
        if is_folder:
            sweeps = {run.path.parent.name for run in list_sweep_runs(path)}
            there = f" ({', '.join(sorted(sweeps))})" if sweeps else ""
            raise RunError(
                f"{spec}: no run folder lies in it; give a run, a folder of runs or a sweep{there}"
            ) from None
        raise RunError(f"{error}, and no sweep of that name has runs there") from None


def _runs_of_sweep_file(spec: str, root: Path) -> list[RunFolder]:
    try:
        sweep = load_sweep(spec)
    except MnistWandbError as error:
        first = str(error).splitlines()[0]
        raise RunError(f"{first}; give a run, a folder of runs or a sweep") from None
    runs = list_runs(root / study_name(sweep))
    if not runs:
        raise RunError(
            f"{spec}: this sweep has no runs in {root}; `mnist-wandb sweep run {spec}` makes them"
            " (a changed file is another sweep; an agent's runs are found by W&B's sweep id)"
        )
    return runs


def _runs_of_sweep(spec: str, root: Path) -> list[RunFolder]:
    """Runs of a sweep's name or id: in the sweep's own folder, or an agent's among the others."""
    folder = re.compile(re.escape(slug(spec)) + "-[0-9a-f]{8}")
    local = [
        run
        for run in list_sweep_runs(root)
        if run.path.parent.name == spec or folder.fullmatch(run.path.parent.name)
    ]
    return local + [run for run in list_runs(root) if _records_sweep(run, spec)]


def _records_sweep(run: RunFolder, spec: str) -> bool:
    try:
        names = {run.read_environment().get("sweep_id"), run.read_config().tracking.group}
    except MnistWandbError:
        return False
    # W&B writes a sweep as ENTITY/PROJECT/ID.
    return spec in names or (spec.count("/") == 2 and spec.rpartition("/")[2] in names)


def read_records(folders: Iterable[RunFolder]) -> tuple[list[RunRecord], list[LeftOut]]:
    """Read run folders; those that cannot be read are named, with the reason."""
    records, damaged = [], []
    for folder in folders:
        try:
            records.append(_read_record(folder))
        except MnistWandbError as error:
            reason = str(error).splitlines()[0]
            damaged.append(LeftOut(folder.path.name, "damaged", reason))
    return records, damaged


def _read_record(folder: RunFolder) -> RunRecord:
    config = folder.read_config()
    found = folder.read_summary()
    record = RunRecord(
        run_id=folder.run_id,
        name=config.run_name,
        location=str(folder.path),
        status=None,
        config=config.model_dump(mode="json"),
        environment=folder.read_environment(),
        folder=folder,
    )
    if found is None:
        return record
    try:
        summary = RunSummary(**found)
        return RunRecord(
            **{
                **vars(record),
                "status": summary.status,
                "metrics": {name: float(value) for name, value in summary.metrics.items()},
                "num_parameters": int(summary.num_parameters),
                "training_seconds": float(summary.training_seconds),
                "images_per_second": float(summary.images_per_second),
                "error": summary.error,
            }
        )
    except (TypeError, ValueError, AttributeError):
        raise RunError(f"{folder.summary_path}: damaged: not a run's summary") from None


def read_predictions(record: RunRecord) -> EvalResult | None:
    """A run's answers to the test images, or None where it has none at hand.

    Probabilities are stored as float16: in a rare tie the answer is the first of the two classes.

    Raises:
        RunError: the file is damaged.
    """
    if record.folder is None or not record.folder.predictions_path.is_file():
        return None
    path = record.folder.predictions_path
    try:
        with np.load(path) as stored:
            labels, ids = stored["labels"].astype(np.int64), stored["ids"].astype(np.int64)
            probabilities = stored["probabilities"].astype(np.float32)
        header = record.folder.confusion_path.read_text(encoding="utf-8").splitlines()[:1]
        class_names = tuple(next(csv.reader(header))[1:])
    except (OSError, ValueError, KeyError, EOFError, StopIteration, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if not labels.shape == ids.shape == (len(probabilities),) or probabilities.shape[1:] != (
        len(class_names),
    ):
        raise RunError(f"{path}: damaged: its arrays do not fit together")
    loss = record.metrics.get("test/loss", float("nan"))
    return EvalResult(loss, probabilities, labels, ids, class_names)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_studied(key: str) -> bool:
    """Whether a setting may change what a run learns, seed aside."""
    return not any(
        key.startswith(name) if name.endswith(".") else key == name for name in NOT_STUDIED
    )


def show_value(value: Any) -> str:
    """A setting's value as people write it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value)


# ── what makes runs incomparable ─────────────────────────────────────────────────────────────


def describe_machine(record: RunRecord) -> str:
    """What a run's speed depends on: the GPU, or the processor and the number of threads."""
    found = record.environment
    device = str(found.get("device_name") or found.get("device") or "unknown")
    if found.get("device") == "cpu":
        threads = found.get("num_threads", "unknown")
        device = f"{found.get('processor') or device}, threads: {threads}"
    count = found.get("num_processes", 1)
    return device if count == 1 else f"{count} × {device}"


def find_differences(records: Sequence[RunRecord]) -> list[str]:
    """Warnings about other data, splits, versions and machines."""
    warnings = []
    for key in SPLIT_KEYS:
        text = _count_values(_get(run.config, key) for run in records)
        if text:
            what = "data sets" if key == "data.dataset" else "images"
            warnings.append(f"{key}: {text}: scores are on different {what}")
    by_data: dict[str, set[Any]] = {}
    for run in records:
        data = {key: _get(run.config, key) for key in (*SPLIT_KEYS, "data.train_size")}
        fingerprint = run.environment.get("data_fingerprint")
        if fingerprint is not None:  # what is not known is no difference
            by_data.setdefault(json.dumps(data), set()).add(fingerprint)
    if any(len(fingerprints) > 1 for fingerprints in by_data.values()):
        warnings.append("data fingerprint: differs for the same settings: the files have changed")
    for package in VERSIONS:
        text = _count_values(
            _get(run.environment, f"versions/{package}", "/") or "unknown" for run in records
        )
        if text:
            warnings.append(f"version of {package}: {text}: numbers may differ for that reason")
    text = _count_values(describe_machine(run) for run in records)
    if text:
        warnings.append(f"machine: {text}: seconds and images/s are not comparable")
    return warnings


def _count_values(values: Iterable[Any]) -> str:
    """Each value and its number of runs; an empty text where there is one value only."""
    counts: dict[str, int] = {}
    for value in values:
        counts[show_value(value)] = counts.get(show_value(value), 0) + 1
    parts = [f"{value} ({n} run{'s' if n > 1 else ''})" for value, n in counts.items()]
    return ", ".join(parts) if len(parts) > 1 else ""


def _get(values: Mapping[str, Any], path: str, separator: str = ".") -> Any:
    found: Any = values
    for part in path.split(separator):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
