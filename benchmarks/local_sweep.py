"""Trials per hour of `sweep run` against one process per trial, which is what `wandb agent` does.

    uv run python benchmarks/local_sweep.py [--trials 30] [--workers 2] [--repeats 3]

Both sides run the same configurations (short runs on the embedded digits, recorded offline), two
at a time with one thread each, and their times include everything from the command's start to its
end. The sides take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
from machine import median, print_conditions, print_table, run_json, run_program, watching_others

from mnist_wandb.agent import example_command
from mnist_wandb.sweepfile import load_sweep

SWEEP = """
name: short
method: grid
metric: {{name: best/val_accuracy, goal: maximize}}
command: [mnist-wandb, run, training.epochs=EPOCHS, model.name=mlp_128, tracking.mode=offline,
          "${{args_no_hyphens}}"]
parameters:
  seed: {{min: 0, max: {last}}}
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def time_sweep(folder: Path, workers: int) -> float:
    """Seconds of the whole sweep with worker processes that stay alive."""
    words = ("sweep", "run", "short.yaml", f"--workers={workers}")
    seconds, found = run_json(*words, folder=folder, **ONE_THREAD)
    counts = found["counts"]
    assert counts["finished"] == sum(counts.values()), counts
    return seconds


def time_processes(folder: Path, workers: int) -> float:
    """Seconds of the same trials with a process for each."""
    sweep = load_sweep(str(folder / "short.yaml"))
    points = [sweep.nest(sweep.grid_point(i)) for i in range(sweep.grid_size or 0)]
    commands = [example_command(sweep, point)[1:] for point in points]
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        done = [
            pool.submit(run_program, *words, "--quiet", folder=folder, **ONE_THREAD)
            for words in commands
        ]
    for future in done:
        future.result()  # a failed run ends the benchmark
    return time.perf_counter() - started


WAYS = {"one process per trial": time_processes, "`sweep run`": time_sweep}


def main() -> None:
    """Measure in turns; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    text = SWEEP.format(last=options.trials - 1).replace("EPOCHS", str(options.epochs))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with watching_others() as others:
        for _ in range(options.repeats):
            for way, measure in WAYS.items():
                with tempfile.TemporaryDirectory() as folder:
                    Path(folder, "short.yaml").write_text(text)
                    seconds[way].append(measure(Path(folder), options.workers))
    slow = median(seconds["one process per trial"])
    rows = []
    for way, values in seconds.items():
        value = median(values)
        rate = options.trials * 3600 / value
        rows.append((way, f"{value:.1f}", f"{rate:,.0f}", f"{slow / value:.1f}"))
    print_table(("", "seconds", "trials per hour", "ratio"), rows)
    print(
        f"\n{options.trials} trials of {options.epochs} epoch(s) on digits (mlp_128, offline),"
        f" {options.workers} at a time with one thread each; optuna {optuna.__version__}"
    )
    print_conditions(options.repeats, others[0])


if __name__ == "__main__":
    main()
