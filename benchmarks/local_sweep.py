"""Trials per hour of `sweep run` against one process per trial, which is what `wandb agent` does.

    uv run python benchmarks/local_sweep.py    (default: 30 trials, 2 workers; a few minutes)

Both sides run the same configurations (short runs on the embedded digits, recorded offline), two
at a time, and their times include everything from the command's start to its end. The load that
other processes put on the machine is reported, because it makes the times worthless.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import torch
import wandb

from mnist_wandb.agent import example_command
from mnist_wandb.experiment import processor_name
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
PROGRAM = (sys.executable, "-m", "mnist_wandb")


def run(arguments: list[str], folder: Path) -> str:
    """One command of the program in a folder; returns what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*PROGRAM, *arguments], cwd=folder, env=environment, check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    return done.stdout


def time_sweep(folder: Path, workers: int) -> float:
    """Seconds of the whole sweep with worker processes that stay alive."""
    started = time.perf_counter()
    out = run(["sweep", "run", "short.yaml", f"--workers={workers}", "--json", "--quiet"], folder)
    seconds = time.perf_counter() - started
    counts = json.loads(out)["counts"]
    assert counts["finished"] == sum(counts.values()), counts
    return seconds


def time_processes(folder: Path, workers: int) -> float:
    """Seconds of the same trials with a process for each."""
    sweep = load_sweep(str(folder / "short.yaml"))
    points = [sweep.nest(sweep.grid_point(i)) for i in range(sweep.grid_size or 0)]
    commands = [example_command(sweep, point)[1:] for point in points]
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda words: run([*words, "--quiet"], folder), commands))
    return time.perf_counter() - started


def main() -> None:
    """Measure both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    text = SWEEP.format(last=options.trials - 1).replace("EPOCHS", str(options.epochs))
    rows = []
    for name, measure in (("sweep run", time_sweep), ("one process per trial", time_processes)):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "short.yaml").write_text(text)
            load = os.getloadavg()[0]
            seconds = measure(Path(folder), options.workers)
        rows.append((name, seconds, load))
    print(
        f"{options.trials} trials of {options.epochs} epochs on digits (mlp_128, offline),"
        f" {options.workers} at a time; {processor_name()}, {os.cpu_count()} cores, Python"
        f" {platform.python_version()}, torch {torch.__version__}, wandb {wandb.__version__},"
        f" optuna {optuna.__version__}"
    )
    print("| | seconds | trials per hour | load before |\n|---|---|---|---|")
    for name, seconds, load in rows:
        print(f"| {name} | {seconds:.1f} | {options.trials * 3600 / seconds:,.0f} | {load:.1f} |")
    print(f"ratio: {rows[1][1] / rows[0][1]:.1f}")


if __name__ == "__main__":
    main()
