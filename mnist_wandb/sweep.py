"""Runs a W&B sweep file on this machine, or on several through one database, without an account."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from filelock import FileLock

from mnist_wandb.agent import read_command
from mnist_wandb.errors import ConfigError, SweepError
from mnist_wandb.forking import start_importing
from mnist_wandb.settings import Settings
from mnist_wandb.study import HEARTBEAT_SECONDS, SweepStudy, TrialRecord, sweep_folder
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
    Worker,
    WorkerJob,
    lock_path,
)
from mnist_wandb.sweep_worker import work
from mnist_wandb.sweepfile import SweepFile

MOST_WORKERS = 8
"""Workers on a CPU where nobody says how many: each takes about 0.6 GB of memory."""
POLL_SECONDS = 0.2
READING_SECONDS = 1.0
"""Time between two readings of all trials, which other machines may take further, too."""
ENDED_STATES = ("finished", "stopped", "failed")
STOP_SECONDS = 60.0
"""How long workers may take to save their trials before they are killed."""
MOST_BROKEN_STARTS = 3
"""Workers that died before they were ready, in a row, before the sweep gives up."""
MOST_DEATHS_IN_A_ROW = 10
"""Workers that died without ending a trial, in a row, before the sweep gives up."""


@dataclass(frozen=True)
class SweepOptions:
    """How to run a sweep.

    Attributes:
        num_workers: processes; default: one per GPU, else one per CPU core (at most 8).
        devices: what the workers compute on, in turns; default: all GPUs, else the CPU.
        count: largest number of trials to begin now, or None.
        storage: address of a shared database; default: a file in the sweep's folder.
        max_failures: so many failed trials in a row end the sweep.
        label: how records call the sweep file.
    """

    num_workers: int | None = None
    devices: tuple[str, ...] = ()
    count: int | None = None
    storage: str | None = None
    max_failures: int = 5
    label: str = ""


@dataclass
class WorkerState:
    """What the parent knows of one worker, also for showing it."""

    index: int
    who: Worker
    process: BaseProcess
    connection: Connection
    device: str = ""
    is_ready: bool = False
    is_dismissed: bool = False
    claim: Claim | None = None
    progress: Progress | None = None


@dataclass
class SweepProgress:
    """What to show while a sweep runs.

    Attributes:
        sweep: the file.
        records: all points so far.
        workers: the processes; none before the first has started.
        seconds_left: an estimate, or None.
    """

    sweep: SweepFile
    records: list[TrialRecord]
    workers: Sequence[WorkerState]
    seconds_left: float | None = None


@dataclass(frozen=True)
class SweepOutcome:
    """How a call of `run_sweep` ended.

    Attributes:
        status: finished | interrupted | failed.
        reason: why it ended, in a few words.
        folder: the sweep's folder.
        records: all points so far.
        num_run: trials that ended in this call.
    """

    status: str
    reason: str
    folder: Path
    records: list[TrialRecord] = field(default_factory=list)
    num_run: int = 0


def run_sweep(
    sweep: SweepFile,
    settings: Settings,
    options: SweepOptions,
    *,
    show: Callable[[SweepProgress, Ended | Said | None], None] = lambda progress, news: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SweepOutcome:
    """Run a sweep from where it stands to its end.

    Args:
        sweep: a sweep file without problems.
        settings: the surroundings.
        options: workers, devices, database, limits.
        show: called with the state of things, and with each trial's end or warning.
        should_stop: asked a few times a second; true saves and puts back the trials under way.

    Raises:
        SweepError: the database or the folder cannot be used, or no worker process starts.
    """
    folder = prepare_folder(sweep, settings)
    parent = f"parent-{secrets.token_hex(4)}"
    with (
        contextlib.closing(SweepStudy(sweep, folder, options.storage)) as study,
        FileLock(lock_path(folder, parent)),
    ):
        job = WorkerJob(
            sweep,
            read_command(sweep),
            settings,
            folder,
            Worker(_place(folder), "", parent),
            options.label,
        )
        try:
            with _Crew(job, study, options, show, should_stop) as crew:
                return crew.run()
        finally:
            lock_path(folder, parent).unlink(missing_ok=True)


def prepare_folder(sweep: SweepFile, settings: Settings) -> Path:
    """Make a sweep's folder, with a copy of its file.

    Raises:
        SweepError: it cannot be made.
    """
    folder = sweep_folder(sweep, settings.runs_dir)
    try:
        (folder / ".workers").mkdir(parents=True, exist_ok=True)
        if not (folder / "sweep.yaml").exists():
            (folder / "sweep.yaml").write_text(sweep.text, encoding="utf-8")
        if not (folder / ".workers" / "place").exists():
            (folder / ".workers" / "place").write_text(secrets.token_hex(8), encoding="utf-8")
    except OSError as error:
        raise SweepError(
            f"{folder}: a sweep's folder cannot be made there: {error.strerror or error};"
            " point MNIST_WANDB_RUNS_DIR to a folder that can be written"
        ) from None
    return folder


def _place(folder: Path) -> str:
    return (folder / ".workers" / "place").read_text(encoding="utf-8").strip()


class _Crew:
    """The workers of one call of `run_sweep`, and what they are told."""

    def __init__(
        self,
        job: WorkerJob,
        study: SweepStudy,
        options: SweepOptions,
        show: Callable[[SweepProgress, Ended | Said | None], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.job, self.study, self.options = job, study, options
        self.show, self.should_stop = show, should_stop
        self.context = start_importing()
        self.workers: list[WorkerState] = []
        self.plan: list[tuple[str, int | None]] = []  # device and threads of each worker
        self.read_records()
        self.num_begun = self.num_ended = 0
        self.failures_in_a_row = self.broken_starts = self.deaths_in_a_row = 0
        self.reason = ""
        self.failed = False
        self.has_ended = threading.Event()

    def __enter__(self) -> _Crew:
        if not self.study.is_file:
            threading.Thread(target=self.keep_beating, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the workers that are left after an error; they save what they have."""
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self.workers:
            worker.connection.close()  # which they take for the end of this process
        for worker in self.workers:
            if worker.is_ready:
                worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
        self.has_ended.set()

    def run(self) -> SweepOutcome:
        """Keep workers working until nothing is left to do."""
        # Where nobody says how many, the first one finds out what there is to compute on.
        first = self.options.num_workers or 1
        if self.is_complete():
            return SweepOutcome("finished", "", self.job.folder, self.records)
        self.show(self.progress(), None)  # the first worker waits for the imports
        for _ in range(max(1, min(first, self.most_useful() or first))):
            self.start_worker()
        interrupted = self.serve()
        self.read_records()
        status = "interrupted" if interrupted else "failed" if self.failed else "finished"
        return SweepOutcome(status, self.reason, self.job.folder, self.records, self.num_ended)

    def serve(self) -> bool:
        """Do what workers ask for while there are any; returns whether a stop was asked for."""
        deadline = math.inf
        while self.workers:
            if deadline == math.inf and self.should_stop():
                deadline = time.monotonic() + STOP_SECONDS
                self.stop_workers()
            if time.monotonic() >= deadline:
                for worker in self.workers:
                    worker.process.kill()
            busy = {w.connection: w for w in self.workers}
            sentinels = {w.process.sentinel: w for w in self.workers}
            ready = wait([*busy, *sentinels], timeout=POLL_SECONDS)
            for source in ready:
                if source in busy:
                    self.listen(busy[source])
            for source in ready:
                if source in sentinels:
                    self.bury(sentinels[source])
            if time.monotonic() >= self.next_reading:
                self.read_records()
            if self.workers:
                self.show(self.progress(), None)
        return deadline < math.inf

    def read_records(self) -> None:
        """Ask the database how the trials stand."""
        self.records = self.study.records()
        self.next_reading = time.monotonic() + READING_SECONDS

    def beat(self) -> None:
        """Tell a shared database that the trials are in hands."""
        for worker in list(self.workers):
            if (claim := worker.claim) is not None:
                self.study.heartbeat(claim)

    def keep_beating(self) -> None:
        """Do so every few seconds; in a thread of its own."""
        while not self.has_ended.wait(HEARTBEAT_SECONDS):
            # Where the database is away, the next question to it tells.
            with contextlib.suppress(Exception):
                self.beat()

    # ── Processes.

    def start_worker(self) -> None:
        """Start one more worker process."""
        for _ in range(MOST_BROKEN_STARTS):
            ours, theirs = self.context.Pipe()
            worker = Worker(
                self.job.worker.place, f"worker-{secrets.token_hex(4)}", self.job.worker.parent
            )
            job = replace(self.job, worker=worker)
            process = self.context.Process(target=work, args=(theirs, job), daemon=True)
            try:
                process.start()
            except (EOFError, ConnectionError):  # what it is forked from has just been killed
                ours.close()
                time.sleep(POLL_SECONDS)  # until that is noticed, and another one is started
                continue
            except OSError as error:
                raise SweepError(f"no worker can be started: {error}") from None
            finally:
                theirs.close()  # else its end would never be seen here
            taken = {worker.index for worker in self.workers}
            index = next(i for i in range(len(taken) + 1) if i not in taken)
            self.workers.append(WorkerState(index, worker, process, ours))
            return
        raise SweepError("no worker can be started: what it is forked from ends (out of memory?)")

    def bury(self, worker: WorkerState) -> None:
        """A worker process has ended: start another where there is work left."""
        self.listen(worker)
        self.workers.remove(worker)
        lives = self.study.is_alive(worker.who.name)  # what it was forked from has been killed
        worker.connection.close()  # which it takes for the end of this process
        worker.process.join()
        deadline = time.monotonic() + STOP_SECONDS
        while (is_saving := self.study.is_alive(worker.who.name)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if (self.reason or lives) and not is_saving and worker.claim is not None:
            self.study.put_back(worker.claim, worker.who)
        if self.reason or worker.is_dismissed:
            return
        code = worker.process.exitcode
        self.broken_starts = 0 if worker.is_ready else self.broken_starts + 1
        self.deaths_in_a_row += not lives
        if self.broken_starts >= MOST_BROKEN_STARTS:
            raise SweepError(f"worker processes end before they have begun (exit code {code})")
        if self.deaths_in_a_row >= MOST_DEATHS_IN_A_ROW:
            raise SweepError(f"worker processes end again and again (exit code {code})")
        if worker.claim is not None:
            self.num_begun -= 1
            text = f"trial {worker.claim.number}: its worker ended (exit code {code}); it goes on"
            self.show(self.progress(), Said(text))
        self.start_worker()

    def stop_workers(self) -> None:
        """Tell all to save and to end."""
        self.reason = "stopped"
        for worker in self.workers:
            self.tell(worker, Stop())
            if not worker.is_ready:  # it has nothing to save
                worker.process.kill()

    def tell(self, worker: WorkerState, message: Any) -> None:
        """Send a message; a worker that has just died is buried later."""
        with contextlib.suppress(OSError):
            worker.connection.send(message)

    def dismiss(self, worker: WorkerState) -> None:
        """Let a worker end: there is nothing more for it to do."""
        worker.is_dismissed = True
        self.tell(worker, Stop())

    def listen(self, worker: WorkerState) -> None:
        """Take all messages of a worker."""
        while True:
            try:
                message = worker.connection.recv() if worker.connection.poll() else None
            except (EOFError, OSError):
                return
            if message is None:
                return
            self.take(worker, message)

    # ── Messages.

    def take(self, worker: WorkerState, message: Any) -> None:
        """Act on one message of a worker."""
        match message:
            case Ready(devices):
                self.welcome(worker, devices)
            case Progress():
                worker.progress = message
            case Reported(history):
                self.tell(worker, self.judge(worker, history))
            case Ended():
                self.account(worker, message)
            case Said():
                self.show(self.progress(), message)

    def welcome(self, worker: WorkerState, devices: Sequence[str]) -> None:
        """Give a worker its device; the first one tells how many others there can be."""
        worker.is_ready, self.broken_starts = True, 0
        if not self.plan:
            self.plan = plan_workers(self.options, devices, self.most_useful())
            for _ in self.plan[len(self.workers) :] if not self.reason else ():
                self.start_worker()
        worker.device, num_threads = self.plan[worker.index % len(self.plan)]
        self.tell(worker, Begin(worker.device, num_threads))
        self.send_on(worker)

    def is_complete(self) -> bool:
        """Whether every point has ended already."""
        ended = sum(record.state in ENDED_STATES for record in self.records)
        return ended == self.job.sweep.num_points

    def most_useful(self) -> int | None:
        """More workers than this would have nothing to do."""
        ended = sum(record.state in ENDED_STATES for record in self.records)
        size = self.job.sweep.num_points
        limits = [n for n in (None if size is None else size - ended, self.options.count) if n]
        return min(limits) if limits else None

    def send_on(self, worker: WorkerState) -> None:
        """Give a worker the next trial, or end it where there is none, or enough have been run."""
        worker.claim = worker.progress = None
        if not worker.process.is_alive():
            return  # the trial would be taken for one that has killed it
        enough = self.options.count is not None and self.num_begun >= self.options.count
        if not self.reason and not enough:
            self.beat()  # after a suspend, say, that the others' trials do not count as lost
            worker.claim = self.study.claim(worker.who)
        if worker.claim is None:
            self.dismiss(worker)
        else:
            self.num_begun += 1
            self.tell(worker, worker.claim)

    def judge(self, worker: WorkerState, history: list[float]) -> Verdict:
        """Record a trial's latest value; hyperband: stop it where the others were better there."""
        claim, hyperband = worker.claim, self.job.sweep.hyperband
        assert claim is not None
        assert hyperband is not None
        if not self.study.report(claim, len(history) - 1, history[-1]):
            return Verdict("waiting")
        if hyperband.last_band(len(history)) is None:
            return Verdict()  # before all trials are read
        others = self.study.other_histories(claim)
        if hyperband.stopping_band(history, others, maximize=self.study.metric.maximize) is None:
            return Verdict()
        return Verdict("stopped" if self.study.mark_stopped(claim) else "waiting")

    def account(self, worker: WorkerState, ended: Ended) -> None:
        """Record a trial that has ended, and give its worker the next one."""
        assert worker.claim is not None
        self.deaths_in_a_row = 0
        if ended.state == "waiting":
            self.study.put_back(worker.claim, worker.who)
            self.num_begun -= 1
        else:
            self.study.end(worker.claim, ended.state, ended.value, ended.error)
            self.num_ended += 1
            failed = ended.state == "failed"
            self.failures_in_a_row = self.failures_in_a_row + 1 if failed else 0
        if self.failures_in_a_row >= self.options.max_failures and not self.reason:
            self.failed = True
            self.reason = f"{self.failures_in_a_row} trials in a row failed"
        if ended.is_last:
            worker.claim = None
            self.tell(worker, Stop())
        else:
            self.send_on(worker)  # before the screen is drawn
        self.show(self.progress(), ended)

    def progress(self) -> SweepProgress:
        """The state of things."""
        left = estimate_seconds_left(self.job.sweep, self.records)
        return SweepProgress(self.job.sweep, self.records, self.workers, left)


def plan_workers(
    options: SweepOptions, available: Sequence[str], most_useful: int | None
) -> list[tuple[str, int | None]]:
    """The device and the number of threads of each worker.

    Args:
        options: what was asked for.
        available: names of devices that torch has found.
        most_useful: trials that are left, or None.

    Raises:
        ConfigError: a device was asked for that is not there.
    """
    for device in options.devices:
        if device not in available:
            raise ConfigError(
                f"--devices: {device} is not on this machine; available: {', '.join(available)}"
            )
    devices = list(options.devices)
    if not devices:
        devices = [name for name in available if name.startswith("cuda:")]
        devices = devices or (["mps"] if "mps" in available else ["cpu"])
    count = options.num_workers
    if count is None:
        count = len(devices) if devices != ["cpu"] else min(MOST_WORKERS, os.cpu_count() or 1)
    count = max(1, min(count, most_useful or count))
    # Several processes with as many threads as cores each would only get in each other's way.
    return [
        (device, 1 if device == "cpu" and count > 1 else None)
        for device in (devices[i % len(devices)] for i in range(count))
    ]


# ── status ───────────────────────────────────────────────────────────────────────────────────


def read_status(
    sweep: SweepFile, settings: Settings, storage: str | None
) -> tuple[Path, list[TrialRecord]]:
    """A sweep's folder and its points so far.

    Raises:
        SweepError: the sweep has not been begun.
    """
    folder = sweep_folder(sweep, settings.runs_dir)
    if storage is None and not (folder / "sweep.db").exists():
        raise SweepError(
            f"{sweep.label}: this sweep has not been run here (no {folder});"
            f" start it with `mnist-wandb sweep run {sweep.label}`"
        )
    with contextlib.closing(SweepStudy(sweep, folder, storage)) as study:
        return folder, study.records()


def best_first(sweep: SweepFile, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The finished trials, best value first."""
    sign = -1 if sweep.objective.maximize else 1
    done = [record for record in records if record.state == "finished" and record.value is not None]
    return sorted(done, key=lambda record: (sign * (record.value or 0), record.number))


def estimate_seconds_left(sweep: SweepFile, records: Sequence[TrialRecord]) -> float | None:
    """A guess from the trials so far and the number under way; None where there is no end."""
    seconds = [record.seconds for record in records if record.seconds is not None]
    if sweep.num_points is None or not seconds:
        return None
    running = sum(record.state == "running" for record in records)
    ended = sum(record.state in ENDED_STATES for record in records)
    mean = sum(seconds) / len(seconds)
    return round(max(0, sweep.num_points - ended) * mean / max(1, running), 1)
