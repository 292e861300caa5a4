"""What the processes of a sweep know of each other, and what they say through their pipes.

Free of torch, W&B and Optuna: the parent does not need the first two, its workers not the third.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_wandb.agent import RunCommand
from mnist_wandb.settings import Settings
from mnist_wandb.sweepfile import SweepFile


@dataclass(frozen=True)
class Worker:
    """Who works on a trial.

    Attributes:
        place: id of the sweep folder that its run folders and locks are in.
        name: of its lock file.
        parent: name of the lock file of the process that started it.
    """

    place: str
    name: str
    parent: str


def lock_path(folder: Path, name: str) -> Path:
    """The file that a process of a sweep keeps locked while it lives."""
    return folder / ".workers" / f"{name}.lock"


@dataclass(frozen=True)
class WorkerJob:
    """What a worker works on; handed over when it starts.

    Attributes:
        sweep: the sweep file.
        command: what its command says about each run.
        settings: the surroundings.
        folder: the sweep's folder.
        worker: who it is.
        label: how the record of a run calls the sweep file.
    """

    sweep: SweepFile
    command: RunCommand
    settings: Settings
    folder: Path
    worker: Worker
    label: str


# ── to a worker ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Begin:
    """Its device, and its number of threads (None leaves torch's own)."""

    device: str
    num_threads: int | None


@dataclass(frozen=True)
class Claim:
    """A trial to run, which no other worker has.

    Attributes:
        trial_id: in the database.
        number: of the point, from 0.
        parameters: nested, as an agent would hand them over.
        run_id: of its run folder and W&B run.
        stopped: hyperband had stopped it, and its worker died before it could say so.
    """

    trial_id: int
    number: int
    parameters: dict[str, Any]
    run_id: str
    stopped: bool


@dataclass(frozen=True)
class Verdict:
    """The answer to `Reported`.

    Attributes:
        end: None where the trial goes on, else how it ends now: stopped (by hyperband) | waiting
            (another machine has it).
    """

    end: str | None = None


@dataclass(frozen=True)
class Stop:
    """Save the trial under way and hand it back; between two trials: end."""


# ── from a worker ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Ready:
    """It has imported torch, and found these devices."""

    devices: list[str]


@dataclass(frozen=True)
class Progress:
    """A trial has got further."""

    epoch: float
    epochs: float
    value: float | None


@dataclass(frozen=True)
class Reported:
    """The metric's values that a trial has logged, oldest first; asks for a verdict."""

    history: list[float]


@dataclass(frozen=True)
class Ended:
    """A trial has ended: finished | stopped | failed | waiting (to be put back).

    Attributes:
        number, parameters: of the trial.
        state: see above.
        value: of the sweep's metric, where it is finished.
        error: why it failed.
        seconds: how long it took here.
        is_last: the worker has to be told to end now.
    """

    number: int
    parameters: dict[str, Any]
    state: str
    value: float | None
    error: str | None
    seconds: float
    is_last: bool


@dataclass(frozen=True)
class Said:
    """A warning of a run."""

    text: str
