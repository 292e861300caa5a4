"""Weights & Biases; the only importer of wandb."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import re
import socket
import sys
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import wandb

from mnist_wandb.background import Background, has_hung_run, note_client_is_busy
from mnist_wandb.config import RunConfig, TrackingConfig
from mnist_wandb.errors import TrackingError
from mnist_wandb.metrics import (
    EvalResult,
    Ints,
    class_scores,
    most_confident_mistakes,
    sample_positions,
)
from mnist_wandb.records import COMPARED_FACTS
from mnist_wandb.runs import Row, RunFolder, slug
from mnist_wandb.settings import (
    Settings,
    WandbMode,
    choose_wandb_mode,
    keep_wandb_files_in,
)

log = logging.getLogger(__name__)

DEFAULT_PROJECT = "mnist-wandb"
INIT_TIMEOUT_SECONDS = 20.0
"""How long to wait for the server at the start before going on offline."""
PROBE_TIMEOUT_SECONDS = 5.0
MODEL_FILE = "model.pt"
TEARDOWN_SECONDS = 5.0
"""Longest wait for the client's service process to end."""
FLUSH_SECONDS = 1.0
"""How much of the W&B record a kill may cost; the run folder loses nothing."""
PANEL_PICTURES = 32
"""Sample predictions that are also shown as a plain picture panel, besides the table."""
ENVIRONMENT_KEY = "environment"
"""Where the summary says what a run ran on."""
AXES = {"train/*": "step", "val/*": "epoch", "best/*": "epoch", "test/*": "epoch"}


def probe_server(base_url: str) -> None:
    """Fail at once where nothing answers; the client itself would retry until its time is up.

    Raises:
        OSError: no connection.
    """
    address = urlsplit(base_url)
    if address.hostname is None or address.scheme in urllib.request.getproxies():
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), PROBE_TIMEOUT_SECONDS).close()
    except OSError as error:
        raise OSError(f"{base_url} does not answer: {error.strerror or error}") from None


def project_name(config: RunConfig, settings: Settings) -> str:
    """The W&B project of a run."""
    return config.tracking.project or settings.wandb_project or DEFAULT_PROJECT


def close_service() -> None:
    """End the client's service process, with what it holds of runs that never began.

    It may still be busy with a server that does not answer, so the wait is limited.
    """
    thread = threading.Thread(target=wandb.teardown, daemon=True)
    thread.start()
    thread.join(TEARDOWN_SECONDS)


def silence_client() -> None:
    """Leave it to this program to say what has to be said."""
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    wandb.setup(settings=wandb.Settings(silent=True))


def hasten_client() -> None:
    """Spare the client 0.65 s of each run.

    It imports W&B Launch to look for a job's inputs, which only code that has imported Launch can
    have set; and it parses the metadata of all installed packages twice. A version of the client
    that lacks these names goes on doing so.
    """
    inputs = "_detect_and_apply_job_inputs"
    if hasattr(wandb.Run, inputs) and "wandb.sdk.launch.inputs.internal" not in sys.modules:
        setattr(wandb.Run, inputs, lambda run: None)
    if hasattr(wandb.util, "working_set") and hasattr(wandb.util, "InstalledDistribution"):
        wandb.util.working_set = _installed_packages


@functools.cache
def _installed_packages() -> tuple[Any, ...]:
    """Name and version of each installed package, as the client's own `working_set` gives them."""
    found = []
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        head = text.partition("\n\n")[0]
        fields = dict(line.partition(": ")[::2] for line in head.splitlines())
        if "Name" in fields and "Version" in fields:
            package = wandb.util.InstalledDistribution(fields["Name"], fields["Version"])
            found.append(package)
    return tuple(found)


def client_settings(
    upload_timeout: float, *, save_code: bool = False, sweep_id: str | None = None
) -> wandb.Settings:
    """The client's settings for every run; `upload_timeout` is in seconds."""
    return wandb.Settings(
        silent=True,
        console="wrap",
        init_timeout=INIT_TIMEOUT_SECONDS,
        finish_timeout=upload_timeout,
        finish_timeout_raises=True,
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        disable_git=not save_code,
        save_code=save_code,
        sweep_id=sweep_id,
    )


class WandbSink:
    """One W&B run, fed from the recorder.

    Row n of the run folder's metrics is step n of the W&B history. So what the server has already
    (a resumed run, a sweep run that was put back into the queue) is never sent twice, and what it
    lacks is.
    """

    def __init__(self, run: wandb.Run, upload_timeout: float) -> None:
        self.run, self.upload_timeout = run, upload_timeout
        self.background = Background()
        self.position = -1

    @classmethod
    def start(
        cls,
        config: RunConfig,
        settings: Settings,
        folder: RunFolder,
        mode: WandbMode,
        *,
        tracking: TrackingConfig | None = None,
        sweep_id: str | None = None,
    ) -> WandbSink:
        """Start (or continue) the W&B run of a run folder; never asks for anything.

        Args:
            config: the run's own configuration, which is recorded.
            settings: the surroundings.
            folder: of the run.
            mode: online or offline.
            tracking: what is in force instead of `config.tracking`.
            sweep_id: instead of the surroundings' one.

        Raises:
            TrackingError: the server cannot be reached or refuses the key.
        """
        tracking = tracking or config.tracking
        try:
            if mode == "online":
                probe_server(settings.wandb_base_url)
            run = _init(config, tracking, settings, folder, mode, sweep_id)
        except (wandb.Error, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            if re.search(r"error 40[13]|HTTP 40[13]|not logged in|API key", reason):
                reason = f"{settings.wandb_base_url} refuses the API key; log in again ({reason})"
            close_service()  # else the client holds the id for a run that never began
            note_client_is_busy()
            raise TrackingError(
                f"W&B could not start ({mode}): {reason};"
                " set tracking.mode=offline to record here and upload later"
            ) from None
        for pattern, axis in AXES.items():
            run.define_metric(pattern, step_metric=axis)
        recorded = folder.read_environment()  # of a job there is none
        if facts := {key: recorded[key] for key in COMPARED_FACTS if key in recorded}:
            # No setting, so not in the config: there it would be a parameter of the app's charts.
            run.summary.update({ENVIRONMENT_KEY: facts})
        if tracking.save_code:
            run.log_code(str(Path(__file__).parent))
        return cls(run, tracking.upload_timeout_seconds)

    def describe(self, mode: WandbMode) -> dict[str, str | None]:
        """Mode, id, and the address (online) or the folder (offline) of the run."""
        place = {"url": self.run.url} if mode == "online" else {"dir": self.record_dir}
        return {"mode": mode, "id": self.run.id, **place}

    @property
    def path(self) -> str:
        """`entity/project/id`."""
        return f"{self.run.entity}/{self.run.project}/{self.run.id}"

    @property
    def record_dir(self) -> str:
        """The folder that `wandb sync` and `wandb leet` take."""
        return os.path.relpath(Path(self.run.dir).parent)

    def log(self, row: Row) -> None:
        """Log the next row of metrics, unless the server has it already."""
        self.position += 1
        self._log(row)

    def _log(self, values: Mapping[str, Any]) -> None:
        """Add values to the latest row; the axes of charts are values too (`step`, `epoch`)."""
        if self.position >= self.run.starting_step:
            row, step = dict(values), self.position
            self.background.put(lambda: self.run.log(row, step=step))

    def open_row(self) -> None:
        """Let charts go into a row of their own where the server has the latest row already."""
        self.position = max(self.position, self.run.starting_step)

    def log_confusion(
        self, split: str, row: Row, confusion: Ints, class_names: Sequence[str]
    ) -> None:
        """Log a confusion matrix as W&B's own chart, under one key per split."""
        data = [
            [actual, predicted, int(confusion[i, j])]
            for i, actual in enumerate(class_names)
            for j, predicted in enumerate(class_names)
        ]
        table = _table(["Actual", "Predicted", "nPredictions"], data)
        chart = wandb.plot_table(
            vega_spec_name="wandb/confusion_matrix/v1",
            data_table=table,
            fields={str(name): str(name) for name in table.columns},
            string_fields={"title": f"Confusion matrix, {split}"},
            split_table=True,
        )
        self._log({f"{split}/confusion_matrix": chart, **row})

    def log_evaluation(
        self, split: str, row: Row, result: EvalResult, images: npt.NDArray[np.uint8], count: int
    ) -> None:
        """Log confusion matrix, per-class scores, sample predictions and confident mistakes.

        Args:
            split: prefix of the keys.
            row: step and epoch.
            result: of that split.
            images: uint8 (N, H, W), the split's images in the result's order.
            count: pictures in each of the two tables; 0 leaves them out.
        """
        self.log_confusion(split, row, result.confusion, result.class_names)
        scores = class_scores(result.confusion)
        values = zip(
            result.class_names,
            scores.precision.tolist(),
            scores.recall.tolist(),
            scores.f1.tolist(),
            scores.support.tolist(),
            strict=True,
        )
        columns = ["class", "precision", "recall", "f1", "images"]
        per_class = _table(columns, [list(v) for v in values])
        chart = wandb.plot.bar(per_class, "class", "f1", title=f"F1 per class, {split}")
        tables: dict[str, Any] = {f"{split}/per_class": per_class, f"{split}/per_class_f1": chart}
        if count:
            samples = sample_positions(result, count).tolist()
            mistakes = most_confident_mistakes(result, count).tolist()
            # Each picture is a file: those of tables and panel are written once.
            pictures = {i: _picture(result, images, i) for i in {*samples, *mistakes}}
            tables[f"{split}/predictions"] = _picture_table(result, samples, pictures)
            tables[f"{split}/mistakes"] = _picture_table(result, mistakes, pictures)
            tables[f"{split}/pictures"] = [pictures[i] for i in samples[:PANEL_PICTURES]]
        self._log({**tables, **row})

    def log_model(self, path: Path, aliases: Sequence[str], metadata: Mapping[str, Any]) -> None:
        """Log a checkpoint as a version of the run's model artifact."""
        artifact = wandb.Artifact(
            f"model-{slug(str(self.run.name))}-{self.run.id}", type="model", metadata=dict(metadata)
        )
        artifact.add_file(str(path), name=MODEL_FILE)
        self.background.put(lambda: self.run.log_artifact(artifact, aliases=list(aliases)))

    def use_dataset(
        self, name: str, facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        """Say which data the run was trained on: an input artifact of the run.

        Args:
            name: of the data set.
            facts: fingerprint, class names, …; also the artifact's content, so that other data
                are another version.
            arrays: images and labels to upload along; none by default.
        """
        artifact = wandb.Artifact(f"data-{slug(name)}", type="dataset", metadata=dict(facts))
        with artifact.new_file("dataset.json") as file:
            json.dump(facts, file, indent=2)
        if arrays:
            with artifact.new_file("images.npz", mode="wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        # `run.use_artifact` would wait for the server, and refuses to work offline.
        self.background.put(
            lambda: self.run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        )

    def log_tables(self, prefix: str, tables: Sequence[Any]) -> None:
        """Log tables (jobs.Table); cells that are uint8 arrays (H, W) become pictures."""
        logged = {}
        for table in tables:
            rows = [[_cell(value) for value in row] for row in table.rows]
            logged[f"{prefix}/{table.key}"] = wandb.Table(columns=list(table.columns), data=rows)
        self.background.put(lambda: self.run.log(logged))

    def log_pictures(self, prefix: str, paths: Sequence[Path]) -> None:
        """Log picture files under their names."""
        pictures = {f"{prefix}/{path.stem}": wandb.Image(str(path)) for path in paths}
        self.background.put(lambda: self.run.log(pictures))

    def log_class_counts(
        self, prefix: str, class_names: Sequence[str], counts: Mapping[str, Sequence[int]]
    ) -> None:
        """Log a bar chart of the images per class for each split."""
        charts = {}
        for split, values in counts.items():
            rows = [list(row) for row in zip(class_names, values, strict=True)]
            table = wandb.Table(columns=["class", "images"], data=rows)
            title = f"Images per class, {split}"
            charts[f"{prefix}/{split}_classes"] = wandb.plot.bar(
                table, "class", "images", title=title
            )
        self.background.put(lambda: self.run.log(charts))

    def watch(self, model: Any) -> None:
        """Log histograms of the gradients of a torch module.

        Raises:
            TrackingError: an earlier run of this process is still being sent.
        """
        if wandb.run is not self.run:  # where the client's hooks look for it, in each step
            raise TrackingError("no histograms of gradients beside a run that is still being sent")
        self.run.watch(model, log="gradients", log_freq=100)

    def alert(self, title: str, text: str, warn: bool = False) -> None:
        """Send an alert (W&B mails it or posts it, as the user's settings there say)."""
        level = "WARN" if warn else "INFO"
        self.background.put(lambda: self.run.alert(title=title[:64], text=text, level=level))

    def finish(
        self,
        exit_code: int,
        summary: Mapping[str, Any],
        *,
        preempting: bool = False,
        timeout: float | None = None,
    ) -> None:
        """End the W&B run with its exit code and a few values of the run's summary.

        Args:
            exit_code: 0 is a finished run, anything else a failed one.
            summary: values for the run's summary.
            preempting: whether a sweep shall give the run to another agent.
            timeout: seconds to wait for the server; default: `tracking.upload_timeout_seconds`.

        Raises:
            TrackingError: the server has not taken everything within the time that is allowed.
        """

        def end() -> None:
            self.run.summary.update(dict(summary))
            if preempting:
                self.run.mark_preempting()
            self.run.finish(exit_code=exit_code)

        self.background.put(end)
        self.background.end(self.upload_timeout if timeout is None else timeout)


def _init(
    config: RunConfig,
    tracking: TrackingConfig,
    settings: Settings,
    folder: RunFolder,
    mode: WandbMode,
    sweep_id: str | None,
) -> wandb.Run:
    keep_wandb_files_in(folder.path / "wandb")
    silence_client()
    hasten_client()
    recorded = folder.read_environment()  # a run goes on where it has begun
    # Offline, each session's record holds the whole run, so that one upload is enough.
    may_be_there = settings.wandb_run_id is not None or folder.metrics_path.exists()
    return wandb.init(
        project=recorded.get("wandb_project") or project_name(config, settings),
        entity=recorded.get("wandb_entity") or tracking.entity or settings.wandb_entity,
        dir=str(folder.path.absolute()),  # the client's service has another working folder
        id=folder.run_id,
        resume="allow" if mode == "online" and may_be_there else None,
        name=config.name or f"{config.run_name}-seed{config.seed}",
        group=tracking.group,
        job_type=tracking.job_type,
        tags=list(tracking.tags),
        notes=tracking.notes,
        config=config.model_dump(mode="json"),
        mode=mode,
        reinit="create_new" if has_hung_run() else "finish_previous",
        settings=client_settings(
            tracking.upload_timeout_seconds,
            save_code=tracking.save_code,
            sweep_id=sweep_id or settings.sweep_id,
        ),
    )


def start_wandb(
    config: RunConfig, settings: Settings, folder: RunFolder
) -> tuple[WandbSink | None, dict[str, str | None]]:
    """Start the W&B run of a folder as configured; where `auto` finds no server, offline.

    Returns:
        The sink, or None where tracking is disabled, and mode, id, and url or dir.

    Raises:
        TrackingError: W&B cannot start offline either, or online was asked for.
    """
    mode, reason = choose_wandb_mode(config, settings)
    log.info("W&B: %s (%s)", mode, reason)
    if mode == "disabled":
        return None, {"mode": mode, "id": None}
    try:
        sink = WandbSink.start(config, settings, folder, mode)
    except TrackingError as error:
        if mode == "offline" or "online" in (config.tracking.mode, settings.wandb_mode):
            raise
        log.warning("W&B: offline instead (%s)", error)
        mode = "offline"
        sink = WandbSink.start(config, settings, folder, mode)
    return sink, sink.describe(mode)


def _table(columns: Sequence[str], rows: list[list[Any]]) -> wandb.Table:
    """A W&B table of rows that have the same types.

    The client would infer the types again with each row, which takes most of the time of a table.
    """
    table = wandb.Table(columns=list(columns), data=rows[:1])
    table.data.extend(rows[1:])
    return table


def _cell(value: Any) -> Any:
    return wandb.Image(value) if isinstance(value, np.ndarray) else value


def _picture(result: EvalResult, images: npt.NDArray[np.uint8], i: int) -> wandb.Image:
    truth, prediction = result.labels[i], result.predictions[i]
    names = result.class_names
    caption = f"{result.ids[i]}: {names[truth]}, predicted {names[prediction]}"
    # uint8: wandb would show floats in [0, 1] as an all-black picture.
    return wandb.Image(images[i], caption=f"{caption} ({result.confidence[i]:.2f})")


def _picture_table(
    result: EvalResult, positions: Sequence[int], pictures: Mapping[int, wandb.Image]
) -> wandb.Table:
    columns = ["id", "image", "truth", "prediction", "confidence"]
    columns += [f"p({name})" for name in result.class_names]
    rows = [
        [
            int(result.ids[i]),
            pictures[i],
            result.class_names[result.labels[i]],
            result.class_names[result.predictions[i]],
            float(result.confidence[i]),
            *(float(p) for p in result.probabilities[i]),
        ]
        for i in positions
    ]
    return _table(columns, rows)
