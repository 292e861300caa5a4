"""One complete run: data, model, run folder, W&B, training, the test score, the summary."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from mnist_wandb.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mnist_wandb.config import RunConfig
from mnist_wandb.data import Preprocessing, Splits, load_dataset
from mnist_wandb.device import Plan, choose_plan, numeric_mode
from mnist_wandb.errors import DivergedError, MnistWandbError, RunError, TrackingError
from mnist_wandb.evaluate import evaluate
from mnist_wandb.metrics import EvalResult
from mnist_wandb.models import build_model, count_parameters
from mnist_wandb.ranks import ONE, Ranks, join_ranks
from mnist_wandb.remote import is_stopped, wait_for_upload
from mnist_wandb.runs import Confusion, Recorder, RunFolder, RunSummary
from mnist_wandb.settings import Settings
from mnist_wandb.tracking import project_name, start_wandb
from mnist_wandb.train import CheckpointReady, Event, Logged, Validated, check_batches, train

log = logging.getLogger(__name__)

BYTES_PER_PARAMETER = 4 * 8
"""Room for last.pt (weights, best weights, two optimizer moments), best.pt, the copy that is
written before each rename, and the W&B artifact."""

SUMMARY_TOTALS = ("status", "num_parameters", "training_seconds", "images_per_second")
"""What of the summary goes to W&B beside the metrics."""
DATA_FACTS = (
    "data_fingerprint", "class_names", "num_images", "image_shape", "data_mean", "data_std",
)  # fmt: skip
"""What identifies the data in environment.json and in the data-set artifact."""

ABANDON_SECONDS = 1.0
"""Longest wait for the W&B server where a run was stopped before its first step."""
EXIT_CODES = {"finished": 0, "early_stopped": 0, "interrupted": 143, "diverged": 1, "failed": 1}


@dataclass(frozen=True)
class RunOutcome:
    """What a run leaves for the caller.

    Attributes:
        summary: as in `summary.json`.
        test: the test result where there is one.
        stopped_by_sweep: whether it was interrupted because its W&B sweep has stopped it.
    """

    summary: RunSummary
    test: EvalResult | None = None
    stopped_by_sweep: bool = False


def run_experiment(
    config: RunConfig,
    settings: Settings,
    *,
    preset: str = "",
    resume: RunFolder | None = None,
    splits: Splits | None = None,
    confusions: Mapping[int, Confusion] | None = None,
    command: Sequence[str] = (),
    emit: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    is_preempted: Callable[[], bool] = lambda: False,
) -> RunOutcome:
    """Train a configuration, record everything, score the test split once with the best weights.

    Args:
        config: a validated configuration.
        settings: the surroundings; see `load_settings`.
        preset: where the configuration is from.
        resume: an unfinished run to continue instead of starting a new one; `config` is its own.
        splits: the configuration's data on its device, where they are loaded already.
        confusions: validation confusion matrices by step, which go to W&B with the rows that
            `resume` has already.
        command: command line, for the record.
        emit: gets each event of training, after it has been recorded.
        should_stop: asked after each step; true ends the run as `interrupted`.
        is_preempted: asked about an interrupted sweep run which the sweep itself has not stopped:
            true gives it back to the sweep.

    Returns:
        The summary, as in `summary.json`, and the test scores where the run got that far.

    Raises:
        MnistWandbError: before training, with nothing left behind; or in it, after the folder
            has got a summary with status `failed`.
        DivergedError: the run diverged; its folder has a summary with status `diverged`.
    """
    started = time.perf_counter()
    with join_ranks(settings.launch) as ranks:
        plan = choose_plan(config, settings.launch)
        if splits is None:
            log.info("device: %s (%s)", plan.device, plan.reason)
            with ranks.first_on_machine():
                splits = load_dataset(config.data, data_dir=settings.data_dir, device=plan.device)
        check_batches(config, len(splits.train), ranks.size)
        shape, classes = splits.image_shape, len(splits.class_names)
        model = build_model(config.model, shape, classes, seed=config.seed)
        ranks.connect(plan.device, _digest(config, splits))
        if ranks.rank > 0:
            return _follow(config, plan, splits, model, ranks, should_stop)
        with open_folder(config, settings, preset, resume, count_parameters(model)) as folder:
            if resume is None:
                facts = describe_environment(config, plan, splits, settings, preset, command)
                folder.write_environment({**facts, "num_processes": ranks.size})
            checkpoint = _load_last(folder, splits, plan, ranks) if resume else None
            session = _Session(config, settings, folder, plan, splits, preset, started)
            session.num_parameters = count_parameters(model)
            session.is_preempted = is_preempted
            session.confusions, session.ranks = confusions, ranks
            return session.run(model, checkpoint, emit, should_stop)


def _follow(
    config: RunConfig,
    plan: Plan,
    splits: Splits,
    model: Any,
    ranks: Ranks,
    should_stop: Callable[[], bool],
) -> RunOutcome:
    """Train and score together with process 0, which alone records."""
    run_dir, checkpoint = ranks.share()
    with ranks.guard(run_dir):
        result = train(
            model,
            splits,
            config,
            plan=plan,
            resume=checkpoint,
            should_stop=should_stop,
            ranks=ranks,
        )
        if result.status != "interrupted":
            _evaluate_test(model, splits, config, plan, ranks)
    summary = RunSummary(
        status=result.status,
        run_dir=run_dir,
        name=config.run_name,
        preset="",
        seed=config.seed,
        device=str(plan.device),
        num_parameters=count_parameters(model),
        epochs=result.epochs,
        steps=result.steps,
        training_seconds=round(result.training_seconds, 3),
        total_seconds=round(result.training_seconds, 3),
        images_per_second=round(result.images_per_second, 1),
        num_processes=ranks.size,
    )
    return RunOutcome(summary)


def _evaluate_test(
    model: Any, splits: Splits, config: RunConfig, plan: Plan, ranks: Ranks
) -> EvalResult:
    with numeric_mode(plan, deterministic=config.training.deterministic):
        return evaluate(
            model,
            splits.test,
            Preprocessing.fit(config.data.scaling, splits.mean, splits.std),
            loss=config.training.loss,
            precision=plan.precision,
            channels_last=plan.channels_last,
            ranks=ranks,
        )


def _digest(config: RunConfig, splits: Splits) -> str:
    """What the processes of one run must have in common; the data may lie in different folders."""
    data = config.data.model_copy(update={"dir": None})
    text = config.model_copy(update={"data": data}).model_dump_json()
    facts = f"{text} {splits.fingerprint} {torch.__version__}"
    return hashlib.sha256(facts.encode()).hexdigest()


class _Session:
    """What one call of `run_experiment` works with."""

    def __init__(
        self,
        config: RunConfig,
        settings: Settings,
        folder: RunFolder,
        plan: Plan,
        splits: Splits,
        preset: str,
        started: float,
    ) -> None:
        self.config, self.folder, self.plan, self.splits = config, folder, plan, splits
        self.settings, self.preset, self.started = settings, preset, started
        self.is_preempted: Callable[[], bool] = lambda: False
        self.confusions: Mapping[int, Confusion] | None = None
        self.ranks = ONE
        self.num_parameters = 0
        self.step, self.epoch = 0, 0.0
        self.training_seconds, self.images_used = 0.0, 0
        self.earlier_seconds = 0.0
        self.stopped_by_sweep = False
        self.recorder = Recorder(folder)
        self.wandb, self.wandb_facts = start_wandb(config, settings, folder)

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Start recording, or go on from a checkpoint with what the sessions before have left."""
        if checkpoint is not None:
            stored = checkpoint.training or {}
            self.step, self.epoch = checkpoint.step, checkpoint.epoch
            self.training_seconds = stored.get("training_seconds", 0.0)
            self.images_used = stored.get("images_used", 0)
            self.earlier_seconds = stored.get("total_seconds", 0.0)
        if self.folder.metrics_path.exists():
            self.folder.truncate_metrics(self.step)
        self.folder.summary_path.unlink(missing_ok=True)
        sinks = [self.wandb] if self.wandb else []
        self.recorder = Recorder(self.folder, sinks, confusions=self.confusions)
        arrays = {}
        if self.wandb is not None:
            entity, project, _ = self.wandb.path.split("/")  # a sweep or the server decides
            if self.wandb_facts["mode"] == "online":
                facts = {"wandb_entity": entity, "wandb_project": project}
                self.folder.write_environment({**self.folder.read_environment(), **facts})
            if self.config.tracking.log_dataset:
                arrays = collect_arrays(self.splits)
        self.recorder.forward(
            "use_dataset", self.config.data.dataset, describe_splits(self.splits), arrays
        )

    def run(
        self,
        model: Any,
        resume: Checkpoint | None,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> RunOutcome:
        """Train, score, summarize; every way out writes a summary and ends the W&B run."""

        def on_event(event: Event) -> None:
            self.record(event)
            emit(event)

        try:
            self.begin(resume)
            if self.config.tracking.watch:
                self.recorder.forward("watch", model)
            with self.ranks.guard(str(self.folder.path)):
                self.ranks.share((str(self.folder.path), resume))
                result = train(
                    model,
                    self.splits,
                    self.config,
                    plan=self.plan,
                    resume=resume,
                    emit=on_event,
                    should_stop=should_stop,
                    ranks=self.ranks,
                )
                self.step, self.epoch = result.steps, result.epochs
                self.training_seconds = result.training_seconds
                self.images_used = result.images_used
                test = None if result.status == "interrupted" else self.score_test(model)
        except DivergedError as error:
            self.fail("diverged", error, str(error))
            raise
        except torch.OutOfMemoryError as error:
            advice = RunError(
                f"{self.plan.device} has too little memory for this run; choose a smaller"
                " training.batch_size or model"
            )
            self.fail("failed", advice, str(advice))
            raise advice from error
        except Exception as error:
            self.fail("failed", error, f"{type(error).__name__}: {error}")
            raise
        except BaseException:  # stopped, by a signal before the first step or Ctrl-C in Python
            self.abandon()
            raise
        summary = self.end(result.status)
        return RunOutcome(summary, test, self.stopped_by_sweep)

    def abandon(self) -> None:
        """End at once: with a summary where something is recorded, else without a trace here."""
        if self.recorder.final:
            self.end("interrupted")
        elif self.wandb is not None:
            with contextlib.suppress(TrackingError):
                self.wandb.finish(EXIT_CODES["interrupted"], {}, timeout=ABANDON_SECONDS)

    def fail(self, status: str, error: Exception, text: str) -> None:
        """End the run because of an error, which takes the summary along."""
        if isinstance(error, MnistWandbError):
            log.error("%s", error)  # before the W&B run ends, whose console log it belongs to
            error.is_told = True
        try:
            summary = self.end(status, error=text)
        except RunError as second:  # a full disk, say: the first error is the cause
            log.warning("no summary: %s", second)
            return
        if isinstance(error, MnistWandbError):
            error.summary = summary

    def record(self, event: Event) -> None:
        """Put one training event into the folder and the sinks."""
        match event:
            case Logged(step, epoch, values, training_seconds, images_used):
                self.recorder.log(step, epoch, values)
                self.step, self.epoch = step, epoch
                self.training_seconds, self.images_used = training_seconds, images_used
            case Validated(step, epoch, result, improved) if improved:
                found = result.confusion, result.class_names
                self.recorder.log_confusion("val", step, epoch, found)
            case CheckpointReady(checkpoint, best, end_of_epoch):
                self.save(checkpoint, best=best, end_of_epoch=end_of_epoch)

    def save(self, checkpoint: Checkpoint, *, best: bool, end_of_epoch: bool) -> None:
        """Write last.pt, and best.pt where the weights are the best so far."""
        if checkpoint.training is not None:
            checkpoint.training["total_seconds"] = self.total_seconds
        write_checkpoint(self.folder, checkpoint, self.recorder.final, best=best)
        if end_of_epoch and self.config.tracking.log_model == "every_epoch":
            name = f"epoch-{checkpoint.epoch:g}"
            path = self.folder.checkpoint_path(name)
            save_checkpoint(replace(checkpoint, training=None, metrics=self.recorder.final), path)
            self.recorder.forward("log_model", path, [name], self.model_metadata())

    def score_test(self, model: Any) -> EvalResult:
        """Score the test split, once, with the best validation weights, and record it."""
        test = _evaluate_test(model, self.splits, self.config, self.plan, self.ranks)
        self.recorder.log(self.step, self.epoch, test.metrics("test"))
        self.folder.write_evaluation(test)
        images = self.splits.test.images[:, 0].cpu().numpy()
        row = {"step": self.step, "epoch": self.epoch}
        count = self.config.tracking.sample_predictions
        self.recorder.forward("log_evaluation", "test", row, test, images, count)
        if self.config.tracking.log_model is not None:
            path = self.folder.checkpoint_path("best")
            self.recorder.forward("log_model", path, ["best", "latest"], self.model_metadata())
        return test

    def model_metadata(self) -> dict[str, Any]:
        """What goes with the model artifact, with the scores so far."""
        facts = describe_splits(self.splits)
        return model_metadata(self.config, self.recorder.final, facts, self.num_parameters)

    def end(self, status: str, error: str | None = None) -> RunSummary:
        """Write the summary and end the W&B run."""
        seconds = self.training_seconds
        summary = RunSummary(
            status=status,
            run_dir=str(self.folder.path),
            name=self.config.run_name,
            preset=self.preset,
            seed=self.config.seed,
            device=str(self.plan.device),
            num_parameters=self.num_parameters,
            epochs=self.epoch,
            steps=self.step,
            training_seconds=round(seconds, 3),
            total_seconds=round(self.total_seconds, 3),
            images_per_second=round(self.images_used / seconds, 1) if seconds else 0.0,
            metrics=self.recorder.final,
            wandb=self.wandb_facts,
            error=error,
            num_processes=self.ranks.size,
        )
        try:
            self.folder.write_summary(summary)  # first: the end of the W&B run may have to wait
        finally:
            self.finish_wandb(status, summary)
        return summary

    def finish_wandb(self, status: str, summary: RunSummary) -> None:
        """End the W&B run with an alert, an exit code and the summary's totals."""
        if self.config.tracking.alerts and status not in ("interrupted", "failed"):
            accuracy = summary.metrics.get("test/accuracy", 0.0)
            text = summary.error or f"test accuracy {accuracy:.4f}"
            self.recorder.forward("alert", f"{summary.name} {status}", text, status == "diverged")
        if self.wandb is None:
            return
        totals = {key: getattr(summary, key) for key in SUMMARY_TOTALS}
        try:
            preempting = False
            if status == "interrupted" and self.settings.sweep_id:
                self.stopped_by_sweep = self.ask_sweep(self.settings.sweep_id)
                preempting = not self.stopped_by_sweep and self.is_preempted()
            self.wandb.finish(EXIT_CODES[status], totals, preempting=preempting)
            if self.wandb_facts["mode"] == "online":
                wait_for_upload(
                    self.wandb.path,
                    self.settings,
                    self.folder.read_metrics(),
                    asdict(summary),
                    log_model=self.config.tracking.log_model is not None,
                )
        except Exception as reason:  # whatever the client does: the run is done and recorded
            log.warning(
                "W&B: not everything has arrived (%s); upload it with `mnist-wandb sync %s`",
                " ".join(str(reason).split())[:200], self.folder.path,
            )  # fmt: skip

    def ask_sweep(self, sweep_id: str) -> bool:
        """Whether the run's sweep has stopped it; without an answer it has not."""
        if self.wandb is None or self.wandb_facts["mode"] != "online":
            return False
        try:
            return is_stopped(self.wandb.path, sweep_id, self.settings)
        except MnistWandbError as error:
            log.warning("whether the sweep has stopped this run is not known (%s)", error)
            return False

    @property
    def total_seconds(self) -> float:
        """Wall time of this session and the ones before it."""
        return self.earlier_seconds + time.perf_counter() - self.started


@contextmanager
def open_folder(
    config: RunConfig,
    settings: Settings,
    preset: str,
    resume: RunFolder | None,
    num_parameters: int,
) -> Iterator[RunFolder]:
    """Make or reopen the run folder, locked; a new one goes again if no training came about."""
    folder = resume or RunFolder.create(
        settings.runs_dir,
        config.run_name,
        run_id=settings.wandb_run_id,
        needed_bytes=num_parameters * BYTES_PER_PARAMETER,
    )
    lock = None
    try:
        lock = folder.lock()
        if resume is None:
            folder.write_config(config, preset)
        yield folder
    except BaseException:
        recorded = folder.metrics_path.exists() or folder.summary_path.exists()
        if resume is None and not recorded:
            folder.remove()
        raise
    finally:
        if lock is not None:
            lock.release()


def write_checkpoint(
    folder: RunFolder, checkpoint: Checkpoint, scores: Mapping[str, float], *, best: bool
) -> None:
    """Write last.pt, and with the scores so far best.pt where the weights are the best so far."""
    if best:
        best_checkpoint = replace(checkpoint, training=None, metrics=dict(scores))
        save_checkpoint(best_checkpoint, folder.checkpoint_path("best"))
    save_checkpoint(checkpoint, folder.checkpoint_path("last"))


def _load_last(folder: RunFolder, splits: Splits, plan: Plan, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint to continue from; None where the run was stopped before its first one."""
    summary = folder.read_summary()
    if summary is not None and summary.get("status") in ("finished", "early_stopped"):
        raise RunError(f"{folder.path}: this run is {summary['status']}; nothing is left to resume")
    path = folder.checkpoint_path("last")
    if not path.exists():
        log.info("%s: stopped before its first checkpoint; begins again", folder.path)
        return None
    checkpoint = load_checkpoint(path)
    if checkpoint.data_fingerprint != splits.fingerprint:
        raise RunError(
            f"{folder.path}: the data have changed since this run was started (fingerprint"
            f" {splits.fingerprint[:12]}, then {checkpoint.data_fingerprint[:12]}); start a new run"
        )
    _compare_environment(folder, plan, ranks)
    return checkpoint


def _compare_environment(folder: RunFolder, plan: Plan, ranks: Ranks) -> None:
    """Warn where a resumed run cannot end with the very numbers of an undisturbed one."""
    before = {"num_processes": 1, **folder.read_environment()}
    now = {**plan.describe(), "torch": str(torch.__version__), "num_processes": ranks.size}
    before["torch"] = before.get("versions", {}).get("torch")
    for key in ("device_name", "precision", "num_processes", "num_threads", "torch"):
        if key in before and before[key] != now[key]:
            log.warning(
                "resumed with %s %s instead of %s: the last digits may differ",
                key, now[key], before[key],
            )  # fmt: skip


def describe_environment(
    config: RunConfig,
    plan: Plan,
    splits: Splits,
    settings: Settings,
    preset: str,
    command: Sequence[str],
) -> dict[str, Any]:
    """What `environment.json` holds at the start of a run."""
    return {
        "preset": preset,
        "command": list(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "git_commit": _git_commit(),
        **describe_splits(splits),
        "sweep_id": settings.sweep_id,
        "wandb_entity": config.tracking.entity or settings.wandb_entity,
        "wandb_project": project_name(config, settings),
        **plan.describe(),
    }


def model_metadata(
    config: RunConfig, scores: Mapping[str, float], facts: Mapping[str, Any], num_parameters: int
) -> dict[str, Any]:
    """What goes with a model artifact: configuration, scores, and what identifies the data."""
    return {
        "config": config.model_dump(mode="json"),
        "scores": dict(scores),
        "data_fingerprint": facts["data_fingerprint"],
        "class_names": facts["class_names"],
        "num_parameters": num_parameters,
    }


def collect_arrays(splits: Splits) -> dict[str, npt.NDArray[Any]]:
    """Images uint8 (N, H, W) and labels int64 (N,): `train_images`, `train_labels` and so on."""
    arrays = {}
    for split in (splits.train, splits.val, splits.test):
        arrays[f"{split.name}_images"] = split.images[:, 0].cpu().numpy()
        arrays[f"{split.name}_labels"] = split.labels.cpu().numpy()
    return arrays


def describe_splits(splits: Splits) -> dict[str, Any]:
    """The facts of `DATA_FACTS`, as plain values."""
    values = (
        splits.fingerprint,
        list(splits.class_names),
        {s.name: len(s) for s in (splits.train, splits.val, splits.test)},
        list(splits.image_shape),
        splits.mean,
        splits.std,
    )
    return dict(zip(DATA_FACTS, values, strict=True))


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of this package and of those that decide its numbers."""
    names = ("mnist-wandb", "torch", "torchvision", "wandb", "numpy", "pydantic")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    found["torch"] = str(torch.__version__)  # with the build, which decides the last bits
    return found


def processor_name() -> str:
    """The CPU's product name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the working folder, if it is in a git repository; `-dirty` with local changes."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def python_command() -> list[str]:
    """This process's command line."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
