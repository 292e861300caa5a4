"""Trials per hour of `sweep run` against one process per trial, which is what `wandb agent` does.

    uv run python benchmarks/local_sweep.py [--trials 30] [--workers 2] [--repeats 3] [--agents]

All sides run the same configurations (short runs on the embedded digits), two at a time with one
thread each, and their times include everything from the command's start to its end. The sides take
turns. Runs are recorded offline, except with --agents: those of two real `wandb agent`s go online,
to a stand-in for W&B's server on this machine, and an agent asks it for work every five seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
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
project: digits
program: mnist-wandb
command: ["${{env}}", mnist-wandb, run, training.epochs=EPOCHS, model.name=mlp_128,
          tracking.mode=MODE, --quiet, "${{args_no_hyphens}}"]
parameters:
  seed: {{min: 0, max: {last}}}
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def time_sweep(folder: Path, workers: int) -> float:
    """Seconds of the whole sweep with worker processes that stay alive."""
    _write_sweep(folder, "offline")
    words = ("sweep", "run", "short.yaml", f"--workers={workers}")
    seconds, found = run_json(*words, folder=folder, **ONE_THREAD)
    counts = found["counts"]
    assert counts["finished"] == sum(counts.values()), counts
    return seconds


def time_processes(folder: Path, workers: int) -> float:
    """Seconds of the same trials with a process for each."""
    sweep = load_sweep(str(_write_sweep(folder, "offline")))
    points = [sweep.nest(sweep.grid_point(i)) for i in range(sweep.grid_size or 0)]
    commands = [example_command(sweep, point)[2:] for point in points]
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        done = [pool.submit(run_program, *words, folder=folder, **ONE_THREAD) for words in commands]
    for future in done:
        future.result()  # a failed run ends the benchmark
    return time.perf_counter() - started


def time_agents(folder: Path, workers: int) -> float:
    """Seconds of so many agents until the sweep's end."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from wandb_server import ServerProcess

    file = _write_sweep(folder, "online")
    with ServerProcess(folder) as server:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {
            **os.environ,
            **ONE_THREAD,
            **server.env(),
            "PATH": path,
            "HOME": str(folder),
        }

        def start(*words: str) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [sys.executable, "-m", "wandb", *words],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

        said, _ = start("sweep", file.name).communicate()
        (sweep,) = re.findall(r"wandb agent (\S+)", said)
        started = time.perf_counter()
        agents = [start("agent", sweep) for _ in range(workers)]
        for agent in agents:
            said, _ = agent.communicate()
            assert agent.returncode == 0, said
        seconds = time.perf_counter() - started
    ended = len(list(folder.glob("runs/*/summary.json")))
    assert ended == load_sweep(str(file)).num_points, ended
    return seconds


def _write_sweep(folder: Path, mode: str) -> Path:
    file = folder / "short.yaml"
    file.write_text(file.read_text().replace("MODE", mode))
    return file


WAYS = {"one process per trial": time_processes, "`sweep run`": time_sweep}


def main() -> None:
    """Measure in turns; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--agents", action="store_true", help="also by `wandb agent`")
    options = parser.parse_args()
    ways = {**WAYS, "`wandb agent`": time_agents} if options.agents else WAYS
    text = SWEEP.format(last=options.trials - 1).replace("EPOCHS", str(options.epochs))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with watching_others() as others:
        for _ in range(options.repeats):
            for way, measure in ways.items():
                with tempfile.TemporaryDirectory() as folder:
                    Path(folder, "short.yaml").write_text(text)
                    seconds[way].append(measure(Path(folder), options.workers))
    slow = seconds["one process per trial"]
    rows = []
    for way, values in seconds.items():
        value = median(values)
        ratio = median([one / other for one, other in zip(slow, values, strict=True)])
        rows.append((way, f"{value:.1f}", f"{options.trials * 3600 / value:,.0f}", f"{ratio:.1f}"))
    print_table(("", "seconds", "trials per hour", "ratio"), rows)
    print(
        f"\n{options.trials} trials of {options.epochs} epoch(s) on digits (mlp_128, offline),"
        f" {options.workers} at a time with one thread each; optuna {optuna.__version__}"
    )
    print_conditions(options.repeats, others[0])


if __name__ == "__main__":
    main()
