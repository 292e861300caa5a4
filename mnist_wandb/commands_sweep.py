"""The commands `sweep run`, `sweep check` and `sweep status`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnist_wandb.errors import SweepError
from mnist_wandb.options import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, JsonOption
from mnist_wandb.settings import load_settings
from mnist_wandb.signals import EXIT_INTERRUPTED, StopSignals

if TYPE_CHECKING:
    from mnist_wandb.agent import SampleCheck
    from mnist_wandb.study import TrialRecord
    from mnist_wandb.sweepfile import SweepFile
    from mnist_wandb.sweepyaml import Problem

NUM_BEST = 10

sweep_app = typer.Typer(
    help="Run W&B sweep files here, without an account.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _complete_sweep(incomplete: str) -> list[str]:
    from mnist_wandb.sweepfile import sweep_names

    return [name for name in sweep_names() if name.startswith(incomplete)]


FileArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="Sweep file, or the name of a shipped one.",
        autocompletion=_complete_sweep,
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Database that several machines share, postgresql://… or mysql://…;"
        " default: a file in the sweep's folder.",
    ),
]


@sweep_app.command("run")
def run(
    file: FileArgument,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Processes; default: one per GPU, else per CPU core."),
    ] = None,
    devices: Annotated[
        str, typer.Option(metavar="A,B…", help="What they compute on, as cpu or cuda:0,cuda:1.")
    ] = "",
    count: Annotated[
        int | None, typer.Option(min=1, help="Run at most so many trials now.")
    ] = None,
    storage: StorageOption = None,
    max_failures: Annotated[
        int, typer.Option(min=1, help="So many failed trials in a row end the sweep.")
    ] = 5,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Run a sweep to its end, going on where it stood."""
    sweep = _load_checked(file)
    settings = load_settings()
    stop = StopSignals()
    stop.install()
    from mnist_wandb.forking import start_importing

    start_importing()  # while this process does its own imports
    from mnist_wandb.display import SweepDisplay, make_console, print_sweep
    from mnist_wandb.sweep import SweepOptions, best_first, run_sweep

    options = SweepOptions(
        num_workers=workers,
        devices=tuple(name.strip() for name in devices.split(",") if name.strip()),
        count=count,
        storage=storage,
        max_failures=max_failures,
        label=file,
    )
    with SweepDisplay(make_console(stderr=True), quiet=quiet) as display:
        outcome = run_sweep(
            sweep, settings, options, show=display.show, should_stop=stop.is_asked_for
        )
    best = best_first(sweep, outcome.records)
    if as_json:
        facts = {"status": outcome.status, "reason": outcome.reason, "num_run": outcome.num_run}
        typer.echo(json.dumps({**facts, **_describe(sweep, outcome.folder, outcome.records)}))
    else:
        console = make_console()
        print_sweep(console, sweep, best[:NUM_BEST], outcome.records)
        if outcome.reason:
            console.print(f"ended       {outcome.reason}")
        console.print(f"folder      {outcome.folder}")
        if outcome.status == "interrupted":
            console.print(f"go on       mnist-wandb sweep run {shlex.quote(file)}")
    if outcome.status == "interrupted":
        return EXIT_INTERRUPTED + (stop.received or 0)
    nothing_worked = not best and any(record.state == "failed" for record in outcome.records)
    return EXIT_FAILED if outcome.status == "failed" or nothing_worked else EXIT_DONE


def _load_checked(file: str) -> SweepFile:
    from mnist_wandb.agent import check_sweep
    from mnist_wandb.sweepfile import find_sweep

    sweep, problems, _ = check_sweep(find_sweep(file))
    if sweep is None or any(problem.is_error for problem in problems):
        raise SweepError("\n".join(str(problem) for problem in problems if problem.is_error))
    _warn(problems)
    return sweep


def _warn(problems: Sequence[Problem]) -> None:
    for problem in problems:
        if not problem.is_error:
            typer.echo(str(problem), err=True)


def _describe(sweep: SweepFile, folder: Path, records: Sequence[TrialRecord]) -> dict[str, Any]:
    """A sweep's state as plain values."""
    from mnist_wandb.display import count_states
    from mnist_wandb.sweep import best_first, estimate_seconds_left

    metric = sweep.objective
    dirs = {path.name.rpartition("-")[2]: str(path) for path in folder.glob("*-*")}
    trials = [{**vars(r), "run_dir": dirs.get(r.run_id)} for r in records]
    best = best_first(sweep, records)
    return {
        "sweep": sweep.name,
        "method": sweep.method,
        "metric": metric.name,
        "goal": metric.goal,
        "folder": str(folder),
        "num_points": sweep.num_points,
        "counts": count_states(records),
        "seconds_left": estimate_seconds_left(sweep, records),
        "best": next((t for t in trials if best and t["number"] == best[0].number), None),
        "trials": trials,
    }


@sweep_app.command("status")
def status(file: FileArgument, storage: StorageOption = None, as_json: JsonOption = False) -> int:
    """Say how far a sweep is, which trials are the best, and how long it will take."""
    from mnist_wandb.sweepfile import load_sweep

    sweep = load_sweep(file)
    settings = load_settings()
    from mnist_wandb.display import describe_seconds, make_console, print_sweep
    from mnist_wandb.sweep import best_first, estimate_seconds_left, read_status

    folder, records = read_status(sweep, settings, storage)
    if as_json:
        typer.echo(json.dumps(_describe(sweep, folder, records)))
        return EXIT_DONE
    console = make_console()
    print_sweep(console, sweep, best_first(sweep, records)[:NUM_BEST], records)
    left = estimate_seconds_left(sweep, records)
    if left:
        console.print(f"time left   about {describe_seconds(left)}")
    console.print(f"folder      {folder}")
    return EXIT_DONE


@sweep_app.command("check")
def check(file: FileArgument, as_json: JsonOption = False) -> int:
    """Say everything that is wrong with a sweep file, before anything runs."""
    from mnist_wandb.agent import check_sweep
    from mnist_wandb.sweepfile import find_sweep

    sweep, problems, samples = check_sweep(find_sweep(file))
    errors = [problem for problem in problems if problem.is_error]
    commands = [] if sweep is None or samples is None else _commands(sweep, samples)
    if as_json:
        rows = [
            {"where": p.where, "problem": p.text, "error": p.is_error, "line": p.position[0],
             "column": p.position[1]}
            for p in problems
        ]  # fmt: skip
        facts = {
            "valid": not errors,
            "problems": rows,
            "num_points": None if sweep is None else sweep.num_points,
            "num_validated": 0 if samples is None else samples.num_samples,
            "commands": commands,
        }
        typer.echo(json.dumps(facts))
        return EXIT_BAD_INPUT if errors else EXIT_DONE
    _warn(problems)
    if errors:
        raise SweepError("\n".join(map(str, errors)))
    if sweep is not None and samples is not None:
        size = "no end (set run_cap)" if sweep.num_points is None else f"{sweep.num_points} points"
        which = "all of them" if samples.is_complete else f"{samples.num_samples} samples"
        typer.echo(f"{sweep.label}: {sweep.method}, {size}; {which} valid")
        for command in commands:
            typer.echo(f"  {command}")
    return EXIT_DONE


def _commands(sweep: SweepFile, samples: SampleCheck) -> list[str]:
    """A few command lines as an agent would build them."""
    from mnist_wandb.agent import example_command

    return [shlex.join(example_command(sweep, point)) for point in samples.points]
