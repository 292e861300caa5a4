"""What is recorded like a run but leaves no model: a folder and a W&B run of its own job type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mnist_wandb.config import RunConfig
from mnist_wandb.runs import Recorder, RunFolder
from mnist_wandb.settings import Settings
from mnist_wandb.tracking import start_wandb


@dataclass(frozen=True)
class Table:
    """A table for the terminal and for W&B: its key, title, columns, and rows of cells.

    Cells are texts and numbers; a uint8 array (H, W) is a picture.
    """

    key: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass
class Job:
    """A job under way; made by `open_job`.

    Attributes:
        kind: the W&B job type, and the name of the folder's JSON file.
        folder: there is no config.yaml in it, so that nothing takes it for a run.
        recorder: forwards to W&B; see `Recorder.forward`.
        wandb_facts: mode, id, and url or dir.
        exit_code: of the W&B run.
    """

    kind: str
    folder: RunFolder
    recorder: Recorder
    wandb_facts: Mapping[str, str | None]
    exit_code: int = 0
    totals: dict[str, float] = field(default_factory=dict)

    def write(self, result: Mapping[str, Any]) -> None:
        """Keep a result as `<kind>.json`."""
        self.folder.write_json(f"{self.kind}.json", result)


@contextmanager
def open_job(kind: str, config: RunConfig, settings: Settings) -> Iterator[Job]:
    """Make a folder below the runs folder and start a W&B run; both go again after an error.

    Raises:
        RunError: the folder cannot be made.
        TrackingError: W&B cannot start and `tracking.mode` insists on it.
    """
    name = config.name or f"{kind}-{config.data.dataset}"
    tracking = config.tracking.model_copy(update={"job_type": kind})
    config = config.model_copy(update={"name": name, "tracking": tracking})
    folder = RunFolder.create(settings.runs_dir, name)
    recorder = Recorder(folder)
    try:
        (folder.path / "checkpoints").rmdir()
        sink, facts = start_wandb(config, settings, folder)
        recorder.sinks += [sink] if sink else []
        job = Job(kind, folder, recorder, facts)
        yield job
    except BaseException:
        recorder.forward("finish", 1, {})
        folder.remove()
        raise
    recorder.forward("finish", job.exit_code, job.totals)
