"""What people see in the terminal: progress, tables, the next useful command."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table

if TYPE_CHECKING:  # some import NumPy, which `configs` does without
    from rich.progress import Progress

    from mnist_wandb.compare import Comparison
    from mnist_wandb.metrics import EvalResult
    from mnist_wandb.runs import RunSummary
    from mnist_wandb.seedgroup import SeedsResult
    from mnist_wandb.study import TrialRecord
    from mnist_wandb.sweep import SweepProgress, WorkerState
    from mnist_wandb.sweep_messages import Ended, Said
    from mnist_wandb.sweepfile import SweepFile
    from mnist_wandb.train import Event

WIDTH_WITHOUT_TERMINAL = 110
WIDTH_OF_COMPARISONS = 200
REFRESHES_PER_SECOND = 5


def make_console(*, stderr: bool = False, width: int | None = WIDTH_WITHOUT_TERMINAL) -> Console:
    """A console for stdout or stderr; as wide as asked for where it is not a terminal."""
    if (sys.stderr if stderr else sys.stdout).isatty():
        width = None
    # Names and paths are the user's: `[bold]` and `:bomb:` in them mean nothing here.
    return Console(
        stderr=stderr, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True
    )


class LogLines(logging.Handler):
    """Shows the package's log messages as plain lines."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        prefix = {logging.WARNING: "warning: ", logging.ERROR: "error: "}.get(record.levelno, "")
        for line in record.getMessage().splitlines():
            self.console.print(f"{prefix}{line}")


def show_log_lines(console: Console, *, quiet: bool = False) -> None:
    """Show the package's log messages from now on; quiet leaves the warnings."""
    logger = logging.getLogger("mnist_wandb")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.handlers = [LogLines(console)]  # one, however often this is called in one process


def hide_log_lines() -> None:
    """Show none of the package's log messages: another process shows its own."""
    logging.getLogger("mnist_wandb").setLevel(logging.CRITICAL + 1)


def _make_bar(console: Console, before: str, after: str = "", *, is_off: bool = False) -> Progress:
    """A progress bar with words before and after it; none where there is no terminal."""
    from rich.progress import (  # 10 ms, which `configs` and `show` do without
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn(before),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *([TextColumn(after)] if after else []),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,  # no thread beside the training threads
        transient=True,
        disable=is_off or not console.is_terminal,
    )


class TrainingDisplay:
    """A live bar per epoch on a terminal, and one plain line per epoch everywhere.

    Use as a context manager; `show` takes the events of `train`.
    """

    def __init__(self, console: Console, *, epochs: float, quiet: bool = False) -> None:
        self.console, self.epochs, self.quiet = console, epochs, quiet
        self.values: dict[str, float] = {}
        self.next_refresh = 0.0
        words = ("epoch {task.fields[epoch]}", "{task.fields[metrics]}")
        self.progress = _make_bar(console, *words, is_off=quiet)
        self.task = self.progress.add_task("", total=1, epoch="", metrics="")

    def __enter__(self) -> TrainingDisplay:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def show(self, event: Event) -> None:
        """Show one event."""
        if self.quiet:
            return
        match type(event).__name__:
            case "StepDone":
                self._show_step(event)
            case "Logged":
                self.values |= event.values  # type: ignore[union-attr]
                if "val/accuracy" in event.values:  # type: ignore[union-attr]
                    self._show_epoch(event)

    def _show_step(self, event: Any) -> None:
        now = time.monotonic()
        if self.progress.disable or (
            now < self.next_refresh and event.step_in_epoch < event.steps_per_epoch
        ):
            return
        if event.step_in_epoch == 1 or self.progress.tasks[0].total != event.steps_per_epoch:
            self.progress.reset(self.task, total=event.steps_per_epoch)
        self.next_refresh = now + 1 / REFRESHES_PER_SECOND
        metrics = ""
        if "train/loss" in self.values:
            metrics = (
                f"loss {self.values['train/loss']:.4f}"
                f"  accuracy {self.values['train/accuracy']:.4f}"
                f"  {self.values['train/images_per_second']:,.0f} images/s"
            )
        self.progress.update(
            self.task,
            completed=event.step_in_epoch,
            epoch=f"{event.epoch + 1}/{self.epochs:g}",
            metrics=metrics,
        )
        self.progress.refresh()

    def _show_epoch(self, event: Any) -> None:
        values = self.values
        best = "  *" if values["best/epoch"] == event.epoch else ""
        self.console.print(
            f"epoch {event.epoch:g}/{self.epochs:g}"
            f"  train loss {values['train/loss']:.4f} accuracy {values['train/accuracy']:.4f}"
            f"  val loss {values['val/loss']:.4f} accuracy {values['val/accuracy']:.4f}"
            f"  {values['train/images_per_second']:,.0f} images/s{best}"
        )


class CountDisplay:
    """A bar for work that is counted; none where there is no terminal. A context manager."""

    def __init__(self, console: Console, what: str) -> None:
        self.next_refresh = 0.0
        self.progress = _make_bar(console, what)
        self.task = self.progress.add_task("", total=1)

    def __enter__(self) -> CountDisplay:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def show(self, done: int, total: int) -> None:
        """Show how much is done."""
        now = time.monotonic()
        if now < self.next_refresh and done < total:
            return
        self.next_refresh = now + 1 / REFRESHES_PER_SECOND
        self.progress.update(self.task, completed=done, total=total)
        self.progress.refresh()


def print_summary(console: Console, summary: RunSummary, test: EvalResult | None) -> None:
    """Print how a run ended: results, tables, where things are, what to do next."""
    table = Table(
        "metric", "value", title=f"{summary.name}: {summary.status}", title_justify="left"
    )
    names = ("test/accuracy", "test/loss", "test/macro_f1", "test/calibration_error")
    for name in (*names, "best/val_accuracy", "best/epoch"):
        if name in summary.metrics:
            value = summary.metrics[name]
            table.add_row(name, f"{value:g}" if name == "best/epoch" else f"{value:.4f}")
    table.add_row("parameters", f"{summary.num_parameters:,}")
    table.add_row("epochs, steps", f"{summary.epochs:g}, {summary.steps:,}")
    table.add_row("training", f"{summary.training_seconds:.1f} s")
    table.add_row("images/s", f"{summary.images_per_second:,.0f}")
    console.print(table)
    if test is not None:
        print_evaluation(console, test)
    for line in next_commands(summary):
        console.print(line)


def next_commands(summary: RunSummary) -> list[str]:
    """Where the record is, and the commands to look at it and to upload it."""
    folder = shlex.quote(summary.run_dir)
    lines = record_lines(Path(summary.run_dir), summary.wandb)
    if summary.status == "interrupted":
        several = summary.num_processes > 1
        program = "torchrun … -m mnist_wandb" if several else "mnist-wandb"
        lines.append(f"go on       {program} run --resume {folder}")
    else:
        lines.append(f"use it      mnist-wandb predict {folder} PICTURE...")
    return lines


def record_lines(folder: Path, wandb: Mapping[str, str | None]) -> list[str]:
    """Where a folder and its W&B record are, and the commands to look at it and to upload it."""
    lines = [f"run folder  {folder}"]
    if wandb.get("url"):
        lines.append(f"W&B         {wandb['url']}")
    elif wandb.get("dir"):
        # A resumed run has a record of each session, all with the same id.
        records = sorted((folder / "wandb").glob("offline-run-*"))
        lines.append(f"look at it  wandb leet {shlex.quote(str(wandb['dir']))}")
        lines.append(f"upload it   wandb sync {shlex.join(map(str, records))}")
    return lines


def print_evaluation(console: Console, result: EvalResult) -> None:
    """Print per-class scores and the confusion matrix."""
    from mnist_wandb.metrics import class_scores

    scores = class_scores(result.confusion)
    table = Table("class", title="per class", title_justify="left")
    for heading in ("precision", "recall", "F1", "images"):
        table.add_column(heading, justify="right")
    for i, name in enumerate(result.class_names):
        table.add_row(
            name,
            f"{scores.precision[i]:.4f}",
            f"{scores.recall[i]:.4f}",
            f"{scores.f1[i]:.4f}",
            f"{scores.support[i]:,}",
        )
    console.print(table)
    matrix = Table("", title="confusion matrix (rows: truth, columns: prediction)")
    matrix.title_justify = "left"
    for name in result.class_names:
        matrix.add_column(name[:8], justify="right")
    for name, counts in zip(result.class_names, result.confusion.tolist(), strict=True):
        matrix.add_row(name, *(str(count) if count else "·" for count in counts))
    console.print(matrix)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print groups and tests."""
    from mnist_wandb.compare import comparison_table, explain_pair

    title = f"{comparison.metric} over seeds; {comparison.test_metric} is shown and never chooses"
    (_, *headings), rows = comparison_table(comparison)
    table = Table(title=title, title_justify="left")
    table.add_column()
    for number, heading in enumerate(headings):
        if number < len(comparison.columns):
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for pair in comparison.pairs:
        for line in explain_pair(pair, comparison):
            console.print(line)


def print_seeds(console: Console, result: SeedsResult) -> None:
    """Print the runs of several seeds, and what their final values are together."""
    from mnist_wandb.runs import RunFolder

    rows = [
        (
            str(run.seed),
            run.status,
            *(
                _show_metric(run.metrics.get(name))
                for name in ("best/val_accuracy", "test/accuracy")
            ),
            f"{run.training_seconds:.1f}",
            RunFolder(Path(run.run_dir)).run_id or "–",
        )
        for run in result.runs
    ]
    columns = ("seed", "status", "best/val_accuracy", "test/accuracy", "seconds", "run")
    print_rows(console, columns, rows, title=f"group {result.group}: {result.status}")
    means = [
        (
            name,
            f"{sample.mean:.4f}",
            _show_metric(sample.std),
            "–" if sample.low is None else f"{sample.low:.4f}–{sample.high:.4f}",
            str(sample.n),
        )
        for name, sample in result.metrics.items()
    ]
    print_rows(console, ("metric", "mean", "std", "95 % interval", "n"), means)


def _show_metric(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def print_metrics(console: Console, title: str, metrics: dict[str, float]) -> None:
    """Print names and values."""
    print_rows(
        console, ("metric", "value"), [(k, f"{v:.4f}") for k, v in metrics.items()], title=title
    )


def print_rows(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = ""
) -> None:
    """Print a table."""
    table = Table(*columns, title=title or None, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


# ── sweeps ───────────────────────────────────────────────────────────────────────────────────


class SweepDisplay:
    """A live table of the workers on a terminal, and one plain line per ended trial everywhere.

    Use as a context manager; `show` takes what `run_sweep` tells.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        from rich.live import Live

        self.console, self.quiet = console, quiet
        self.is_live = console.is_terminal and not quiet
        self.next_refresh = 0.0
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> SweepDisplay:
        if self.is_live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_live:
            self.live.stop()

    def show(self, progress: SweepProgress, news: Ended | Said | None) -> None:
        """Show the state of things, and a trial's end or a warning."""
        if self.quiet:
            return
        match type(news).__name__:
            case "Ended":
                self.console.print(_describe_end(news))
            case "Said":
                self.console.print(f"warning: {news.text}")  # type: ignore[union-attr]
        now = time.monotonic()
        if self.is_live and now >= self.next_refresh:
            self.next_refresh = now + 1 / REFRESHES_PER_SECOND
            self.live.update(_workers_table(progress), refresh=True)


def _describe_end(ended: Any) -> str:
    state = {"waiting": "put back", "stopped": "stopped early"}.get(ended.state, ended.state)
    words = [f"trial {ended.number}", state]
    if ended.value is not None:
        words.append(f"{ended.value:.4f}")
    words += [f"{ended.seconds:.1f} s", describe_parameters(ended.parameters)]
    if ended.error:
        words.append(ended.error.splitlines()[0])
    return "  ".join(words)


def _workers_table(progress: SweepProgress) -> Group:
    sweep, records = progress.sweep, progress.records
    counts = count_states(records)
    size = "∞" if sweep.num_points is None else str(sweep.num_points)
    parts = [f"{sweep.name}: {counts['finished'] + counts['stopped'] + counts['failed']}/{size}"]
    parts += [f"{counts[s]} {s}" for s in ("finished", "stopped", "failed") if counts[s]]
    if progress.seconds_left is not None:
        parts.append(f"about {describe_seconds(progress.seconds_left)} left")
    if not progress.workers:
        return Group("  ".join([*parts, "starting"]))
    table = Table("worker", "device", "trial", "epoch", "metric", "parameters")
    for worker in sorted(progress.workers, key=lambda worker: worker.index):
        table.add_row(*_worker_row(worker))
    return Group("  ".join(parts), table)


def _worker_row(worker: WorkerState) -> tuple[str, ...]:
    trial, progress = worker.claim, worker.progress
    return (
        str(worker.index),
        worker.device or "starting",
        "" if trial is None else str(trial.number),
        "" if progress is None else f"{progress.epoch:g}/{progress.epochs:g}",
        "" if progress is None or progress.value is None else f"{progress.value:.4f}",
        "" if trial is None else describe_parameters(trial.parameters),
    )


def count_states(records: Sequence[TrialRecord]) -> dict[str, int]:
    """How many trials are in each state."""
    states = ("waiting", "running", "finished", "stopped", "failed")
    return {state: sum(record.state == state for record in records) for state in states}


def describe_seconds(seconds: float) -> str:
    """A duration for people: 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe_parameters(parameters: Mapping[str, Any], prefix: str = "") -> str:
    """Nested parameters on one line: `optimizer.lr=0.003 seed=1`."""
    words = []
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            words.append(describe_parameters(value, f"{prefix}{key}."))
        else:
            text = f"{value:.4g}" if isinstance(value, float) else value
            text = text if isinstance(text, str) else json.dumps(text)
            words.append(f"{prefix}{key}={text}")
    return " ".join(words)


def print_sweep(
    console: Console, sweep: SweepFile, best: Sequence[TrialRecord], records: Sequence[TrialRecord]
) -> None:
    """Print how far a sweep is, its best trials and what has failed."""
    counts = count_states(records)
    size = "no end" if sweep.num_points is None else f"{sweep.num_points} points"
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.print(f"{sweep.name}: {sweep.method}, {size}; {states or 'nothing has been run'}")
    rows = [
        (
            str(record.number),
            f"{record.value:.4f}",
            "" if record.seconds is None else f"{record.seconds:.1f}",
            record.run_id,
            describe_parameters(record.parameters),
        )
        for record in best
    ]
    if rows:
        print_rows(
            console,
            ("trial", sweep.objective.name, "seconds", "run", "parameters"),
            rows,
            title="best",
        )
    for record in records:
        if record.error is not None:
            console.print(f"trial {record.number} failed: {record.error.splitlines()[0]}")
