"""A process that runs trials of a sweep, one after the other; torch is imported once.

It gets its trials, and tells what becomes of them, through a pipe to the process that started it,
which alone writes to the database. When that one is gone, the pipe breaks: the trial under way is
saved, and goes on with whoever runs the sweep next.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from filelock import FileLock

from mnist_wandb.agent import resolve_point
from mnist_wandb.errors import MnistWandbError, RunError
from mnist_wandb.runs import RunFolder
from mnist_wandb.signals import exit_after_parent, exit_at_once
from mnist_wandb.sweep_messages import (
    Begin,
    Claim,
    Ended,
    Progress,
    Ready,
    Reported,
    Said,
    Stop,
    Verdict,
    WorkerJob,
    lock_path,
)

PROGRESS_SECONDS = 0.2
"""Shortest time between two messages about one trial's progress."""


def work(connection: Connection, job: WorkerJob) -> None:
    """Run trials as told, to a `Stop` or the pipe's end; the target of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and tells us
    exit_after_parent()
    # Whoever can take this lock knows that we are gone, however we went.
    with FileLock(lock_path(job.folder, job.worker.name)):
        session = _WorkerSession(connection, job)
        signal.signal(signal.SIGTERM, session.on_sigterm)
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
            session.serve()  # as long as the parent is there
    lock_path(job.folder, job.worker.name).unlink(missing_ok=True)
    from mnist_wandb.sweep_template import remove_temporary_files
    from mnist_wandb.tracking import close_service

    close_service()
    remove_temporary_files()
    exit_at_once(0)


class _ToParent(logging.Handler):
    """Sends warnings of the runs to the parent."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            return  # comes with the trial's end
        with contextlib.suppress(OSError):
            self.connection.send(Said(record.getMessage()))


class _WorkerSession:
    """One worker process: a pipe and a device."""

    def __init__(self, connection: Connection, job: WorkerJob) -> None:
        self.connection, self.job = connection, job
        self.stopping = False
        self.device = "auto"
        logger = logging.getLogger("mnist_wandb")
        logger.setLevel(logging.WARNING)
        logger.handlers = [_ToParent(connection)]
        logger.propagate = False

    def on_sigterm(self, _number: int, _frame: object) -> None:
        """Stop after this step, as for a single run."""
        self.stopping = True

    def serve(self) -> None:
        """Get ready, then do what the parent says."""
        # All that a run imports, unless this process was forked from one that has done so.
        import mnist_wandb.sweep_template  # noqa: F401, I001 - first: it says where files go
        import torch

        from mnist_wandb.device import available_devices

        self.connection.send(Ready(available_devices()))
        self.obey(torch.set_num_threads)

    def obey(self, set_num_threads: Callable[[int], None]) -> None:
        """Take what the parent says until it wants an end.

        Not before: a worker that is gone, and its lock with it, is taken for one that has died.
        """
        while True:
            match self.connection.recv():
                case Begin(device, num_threads):
                    self.device = device
                    if num_threads is not None:
                        set_num_threads(num_threads)
                case Claim() as claim:
                    self.connection.send(self.run(claim))
                case Stop():
                    return

    def should_stop(self) -> bool:
        """Whether the parent, or a SIGTERM, wants the trial under way to be put back."""
        try:
            while not self.stopping and self.connection.poll():
                self.stopping = isinstance(self.connection.recv(), Stop)
        except (EOFError, OSError):  # the parent is gone
            self.stopping = True
        return self.stopping

    def ask(self, history: list[float]) -> Verdict:
        """Have the parent record a value and compare it with those of the other trials."""
        try:
            self.connection.send(Reported(history))
            while not isinstance(answer := self.connection.recv(), Verdict):
                self.stopping |= isinstance(answer, Stop)
        except (EOFError, OSError):  # the parent is gone
            self.stopping = True
            return Verdict()
        return answer

    def run(self, claim: Claim) -> Ended:
        """Run one trial to its end."""
        started = time.perf_counter()
        trial = _TrialRun(self, claim)
        try:
            state, value, error = ("waiting", None, None) if self.stopping else trial.run()
        except MnistWandbError as failure:
            state, value, error = "failed", None, str(failure)
        except Exception as failure:  # one trial's bug must not end the sweep
            state, value, error = "failed", None, f"{type(failure).__name__}: {failure}"
        seconds = time.perf_counter() - started
        return Ended(claim.number, claim.parameters, state, value, error, seconds, self.stopping)


class _TrialRun:
    """One trial as an ordinary run, begun or continued."""

    def __init__(self, session: _WorkerSession, claim: Claim) -> None:
        self.session, self.claim = session, claim
        self.job = session.job
        self.metric = session.job.sweep.objective
        self.history: dict[int, float] = {}
        self.has_begun = False
        self.verdict = Verdict()
        self.next_message = 0.0

    @property
    def folder(self) -> RunFolder | None:
        """The trial's run folder, once there is one."""
        found = sorted(self.job.folder.glob(f"*-{self.claim.run_id}/config.yaml"))
        return RunFolder(found[0].parent) if found else None

    def run(self) -> tuple[str, float | None, str | None]:
        """Run it; returns state, value and error."""
        from mnist_wandb.experiment import run_experiment

        folder = self._usable_folder()
        summary = folder.read_summary() if folder is not None else None
        if summary is not None and summary["status"] in ("diverged", "failed"):
            return "failed", None, str(summary.get("error"))
        if summary is not None and summary["status"] in ("finished", "early_stopped"):
            return "finished", self._value(summary["metrics"]), None
        if self.claim.stopped:
            return "stopped", None, None
        sweep = self.job.sweep
        if self.job.settings.wandb_project is not None:
            sweep = replace(sweep, project=None)  # as for an agent, the variable wins
        resolved = resolve_point(sweep, self.job.command, self.claim.parameters)
        config = resolved.config if folder is None else folder.read_config()
        if config.device == "auto":
            config = config.model_copy(update={"device": self.session.device})
        self.epochs = float(config.training.epochs)
        outcome = run_experiment(
            config,
            replace(
                self.job.settings,
                runs_dir=self.job.folder,
                wandb_run_id=self.claim.run_id,
                sweep_id=self.job.folder.name,
            ),
            preset=resolved.preset,
            resume=folder,
            command=["mnist-wandb", "sweep", "run", self.job.label],
            emit=self.on_event,
            should_stop=self.should_stop,
        )
        if outcome.summary.status == "interrupted":
            return self.verdict.end or "waiting", None, None
        return "finished", self._value(outcome.summary.metrics), None

    def _usable_folder(self) -> RunFolder | None:
        """What an earlier worker has left; removed where there is nothing to go on from."""
        folder = self.folder
        if folder is None or folder.summary_path.exists():
            return folder
        if folder.checkpoint_path("last").exists():
            return folder
        with folder.lock():
            folder.remove()
        return None

    def _value(self, metrics: dict[str, float]) -> float:
        if self.metric.name not in metrics:
            raise RunError(f"the run never logged {self.metric.name}")
        value = float(metrics[self.metric.name])
        if math.isnan(value):
            raise RunError(f"{self.metric.name} is not a number in the end")
        return value

    def should_stop(self) -> bool:
        return self.verdict.end is not None or self.session.should_stop()

    def on_event(self, event: Any) -> None:
        """Take one event of training: progress for people, values for hyperband."""
        values = getattr(event, "values", None)
        if values is None:
            return
        if not self.has_begun and (folder := self.folder) is not None:
            # A resumed run has cut its record back to the checkpoint by now.
            for row in folder.read_metrics():
                self._remember(int(row["step"]), row)
            self.has_begun = True
        if self._remember(event.step, values):
            self._compare()
        now = time.monotonic()
        if now >= self.next_message or self.metric.name in values:
            self.next_message = now + PROGRESS_SECONDS
            latest = self.history[max(self.history)] if self.history else None
            self._send(Progress(event.epoch, self.epochs, latest))

    def _remember(self, step: int, values: Any) -> bool:
        """Keep a finite value of the metric; a resumed run logs some of them again."""
        value = values.get(self.metric.name)
        if value is None or not math.isfinite(value):
            return False
        self.history[step] = float(value)
        return True

    def _compare(self) -> None:
        """Hyperband: stop where the others were better at the same point."""
        if self.job.sweep.hyperband is not None and self.verdict.end is None:
            self.verdict = self.session.ask([value for _, value in sorted(self.history.items())])

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # the parent is gone: should_stop sees it
            self.session.connection.send(message)
