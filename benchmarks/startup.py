"""Start-up: commands that train nothing, and where the seconds of a quickstart run go.

    uv run python benchmarks/startup.py [--repeats 7]

Byte code is cached (each command runs once before it is measured; PYTHONDONTWRITEBYTECODE is
unset). The parts of a run are told by a driver that does what `mnist-wandb run` does and looks at
the clock in between; "whole" is the command itself from start to end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from machine import PROGRAM, median, print_conditions, print_table, watching_others

COMMANDS = {
    "--help": ["--help"],
    "configs": ["configs"],
    "show cnn_large": ["show", "cnn_large"],
    "a rejected configuration": ["run", "optimizer.lr=-1"],
    "python -c pass": [],
}
DRIVER = """
import time
marks = [("start", time.perf_counter())]
def mark(name): marks.append((name, time.perf_counter()))
import sys
from mnist_wandb.cli import resolve_config, load_settings
resolved, settings = resolve_config(None, []), load_settings()
mark("configuration")
import torch
mark("import torch")
import wandb
mark("import wandb")
import mnist_wandb.display, mnist_wandb.experiment as experiment
mark("other imports")
def timed(owner, name, before, after):
    plain = getattr(owner, name)
    def wrapped(*arguments, **options):
        mark(before)
        try: return plain(*arguments, **options)
        finally: mark(after)
    setattr(owner, name, wrapped)
timed(experiment, "load_dataset", "", "data")
timed(experiment, "start_wandb", "model, run folder", "W&B start")
timed(experiment, "train", "", "training, validation, checkpoints")
outcome = experiment.run_experiment(resolved.config, settings, preset=resolved.preset)
mark("test score, charts, W&B finish")
import json
parts = {}
for (_, since), (name, until) in zip(marks, marks[1:]):
    parts[name or "model, run folder"] = parts.get(name or "model, run folder", 0) + until - since
parts["of that, training steps"] = outcome.summary.training_seconds
print(json.dumps(parts))
"""


def time_command(words: list[str], environment: dict[str, str], folder: str) -> float:
    """Seconds from start to end."""
    command = [*PROGRAM, *words] if words else [sys.executable, "-c", "pass"]
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure in turns; print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["WANDB_MODE"] = "offline"
    seconds: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    with watching_others() as others, tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):  # the first one fills the caches
            for name, words in {**COMMANDS, "a quickstart run": ["run", "--quiet"]}.items():
                value = time_command(words, environment, folder)
                if repeat:
                    seconds.setdefault(name, []).append(value)
            done = subprocess.run(
                [sys.executable, "-c", DRIVER],
                cwd=folder, env=environment, check=True, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                if repeat:
                    parts.setdefault(name, []).append(value)
    rows = [(f"`{name}`", f"{median(values):.2f}") for name, values in seconds.items()]
    print_table(("command", "seconds"), rows)
    print()
    print_table(
        ("part of a quickstart run", "seconds"),
        [(name, f"{median(values):.2f}") for name, values in parts.items()],
    )
    steps = median(parts["of that, training steps"])
    print(f"\noutside training steps: {median(seconds['a quickstart run']) - steps:.2f} s")
    print_conditions(repeats, others[0])


if __name__ == "__main__":
    main()
