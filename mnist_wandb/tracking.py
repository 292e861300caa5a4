"""Weights & Biases; the only importer of wandb."""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import wandb

from mnist_wandb.config import RunConfig
from mnist_wandb.errors import TrackingError
from mnist_wandb.metrics import (
    EvalResult,
    Ints,
    class_scores,
    most_confident_mistakes,
    sample_positions,
)
from mnist_wandb.runs import Row, RunFolder, slug
from mnist_wandb.settings import Settings, WandbMode, keep_wandb_files_in

DEFAULT_PROJECT = "mnist-wandb"
INIT_TIMEOUT_SECONDS = 20.0
"""How long to wait for the server at the start before going on offline."""
PROBE_TIMEOUT_SECONDS = 5.0
FINISH_TIMEOUT_SECONDS = 60.0
"""Longest wait for the server at the end of a run; the local record is complete before."""
FLUSH_SECONDS = 1.0
"""How much of the W&B record a kill may cost; the run folder loses nothing."""
PANEL_PICTURES = 32
"""Sample predictions that are also shown as a plain picture panel, besides the table."""
AXES = {"train/*": "step", "val/*": "epoch", "best/*": "epoch", "test/*": "epoch"}


def _probe(base_url: str) -> None:
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


def close_service() -> None:
    """End the client's own service process, after the last run."""
    wandb.teardown()


class WandbSink:
    """One W&B run, fed from the recorder."""

    def __init__(self, run: wandb.Run) -> None:
        self.run = run

    @classmethod
    def start(
        cls, config: RunConfig, settings: Settings, folder: RunFolder, mode: WandbMode
    ) -> WandbSink:
        """Start (or continue) the W&B run of a run folder; never asks for anything.

        Raises:
            TrackingError: the server cannot be reached or refuses the key.
        """
        tracking = config.tracking
        keep_wandb_files_in(folder.path / "wandb")
        try:
            if mode == "online":
                _probe(settings.wandb_base_url)
            run = wandb.init(
                project=tracking.project or settings.wandb_project or DEFAULT_PROJECT,
                entity=tracking.entity or settings.wandb_entity,
                dir=str(folder.path.absolute()),  # the client's service has another working folder
                id=folder.run_id,
                resume="allow",
                name=config.run_name,
                group=tracking.group,
                job_type=tracking.job_type,
                tags=list(tracking.tags),
                notes=tracking.notes,
                config=config.model_dump(mode="json"),
                mode=mode,
                reinit="finish_previous",
                settings=wandb.Settings(
                    silent=True,
                    console="wrap",
                    init_timeout=INIT_TIMEOUT_SECONDS,
                    finish_timeout=FINISH_TIMEOUT_SECONDS,
                    x_transaction_log_flush_interval=FLUSH_SECONDS,
                    disable_git=True,  # code and diffs stay here unless asked for
                    save_code=False,
                ),
            )
        except (wandb.Error, OSError) as error:
            wandb.teardown()  # else the client holds the id for a run that never began
            raise TrackingError(
                f"W&B could not start ({mode}): {' '.join(str(error).split())[:300]};"
                " set tracking.mode=offline to record here and upload later"
            ) from None
        for pattern, axis in AXES.items():
            run.define_metric(pattern, step_metric=axis)
        return cls(run)

    def describe(self, mode: WandbMode) -> dict[str, str | None]:
        """Mode, id, and the address (online) or the folder (offline) of the run."""
        place = {"url": self.run.url} if mode == "online" else {"dir": self.record_dir}
        return {"mode": mode, "id": self.run.id, **place}

    @property
    def record_dir(self) -> str:
        """The folder that `wandb sync` and `wandb leet` take."""
        return os.path.relpath(Path(self.run.dir).parent)

    def log(self, row: Row) -> None:
        """Log one row of metrics; the axes are in the row, so `step=` is not used."""
        self.run.log(dict(row))

    def log_confusion(
        self, split: str, row: Row, confusion: Ints, class_names: Sequence[str]
    ) -> None:
        """Log a confusion matrix as W&B's own chart, under one key per split."""
        data = [
            [actual, predicted, int(confusion[i, j])]
            for i, actual in enumerate(class_names)
            for j, predicted in enumerate(class_names)
        ]
        table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=data)
        chart = wandb.plot_table(
            vega_spec_name="wandb/confusion_matrix/v1",
            data_table=table,
            fields={str(name): str(name) for name in table.columns},
            string_fields={"title": f"Confusion matrix, {split}"},
            split_table=True,
        )
        self.run.log({f"{split}/confusion_matrix": chart, **row})

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
        columns: list[str | int] = ["class", "precision", "recall", "f1", "images"]
        values = zip(
            result.class_names,
            scores.precision.tolist(),
            scores.recall.tolist(),
            scores.f1.tolist(),
            scores.support.tolist(),
            strict=True,
        )
        per_class = wandb.Table(columns=columns, data=[list(v) for v in values])
        chart = wandb.plot.bar(per_class, "class", "f1", title=f"F1 per class, {split}")
        tables: dict[str, Any] = {f"{split}/per_class": per_class, f"{split}/per_class_f1": chart}
        if count:
            samples = sample_positions(result, count)
            mistakes = most_confident_mistakes(result, count)
            tables[f"{split}/predictions"] = _picture_table(result, images, samples)
            tables[f"{split}/mistakes"] = _picture_table(result, images, mistakes)
            pictures = [_picture(result, images, i) for i in samples[:PANEL_PICTURES].tolist()]
            tables[f"{split}/pictures"] = pictures
        self.run.log({**tables, **row})

    def log_model(self, path: Path, aliases: Sequence[str], metadata: Mapping[str, Any]) -> None:
        """Log a checkpoint as a version of the run's model artifact."""
        artifact = wandb.Artifact(
            f"model-{slug(str(self.run.name))}-{self.run.id}", type="model", metadata=dict(metadata)
        )
        artifact.add_file(str(path), name="model.pt")
        self.run.log_artifact(artifact, aliases=list(aliases))

    def watch(self, model: Any) -> None:
        """Log histograms of the gradients of a torch module."""
        self.run.watch(model, log="gradients", log_freq=100)

    def alert(self, title: str, text: str, warn: bool = False) -> None:
        """Send an alert (W&B mails it or posts it, as the user's settings there say)."""
        self.run.alert(title=title[:64], text=text, level="WARN" if warn else "INFO")

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """End the W&B run with its exit code and a few values of the run's summary."""
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=exit_code)


def _picture(result: EvalResult, images: npt.NDArray[np.uint8], i: int) -> wandb.Image:
    truth, prediction = result.labels[i], result.predictions[i]
    names = result.class_names
    caption = f"{result.ids[i]}: {names[truth]}, predicted {names[prediction]}"
    # uint8: wandb would show floats in [0, 1] as an all-black picture.
    return wandb.Image(images[i], caption=f"{caption} ({result.confidence[i]:.2f})")


def _picture_table(
    result: EvalResult, images: npt.NDArray[np.uint8], positions: Ints
) -> wandb.Table:
    columns: list[str | int] = ["id", "image", "truth", "prediction", "confidence"]
    columns += [f"p({name})" for name in result.class_names]
    rows = [
        [
            int(result.ids[i]),
            _picture(result, images, i),
            result.class_names[result.labels[i]],
            result.class_names[result.predictions[i]],
            float(result.confidence[i]),
            *(float(p) for p in result.probabilities[i]),
        ]
        for i in positions.tolist()
    ]
    return wandb.Table(columns=columns, data=rows)
