"""Train presets with several seeds and print test accuracy, epochs, seconds and hardware.

    uv run python benchmarks/presets.py --seeds 3 linear cnn_small    (default: all but lab_…)

Each run is one process of the installed program, tracked offline, one after the other. Results are
also appended to a file of JSON lines (--out), and runs that are in it already are not repeated.
The load that other processes put on the machine before each run is reported, because it makes
seconds worthless (never accuracies).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from mnist_wandb.loading import preset_names


def run_preset(preset: str, seed: int) -> dict[str, Any]:
    """One run in a process of its own; returns its summary and the load before it."""
    load = os.getloadavg()[0]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mnist_wandb", "run", "--config", preset, f"seed={seed}"),
            *("--json", "--quiet", "tracking.mode=offline"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    summary = dict(json.loads(done.stdout))
    environment = json.loads((Path(summary["run_dir"]) / "environment.json").read_text())
    return {**summary, "load_before": load, "threads": environment["num_threads"]}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The runs measured so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def print_table(results: list[dict[str, Any]], presets: list[str]) -> None:
    """One row a preset: mean and standard deviation over seeds; seconds of the fastest run."""
    print(
        "| preset | test accuracy | val accuracy | seeds | parameters | epochs | seconds | load |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for preset in presets:
        runs = [run for run in results if run["preset"] == preset]
        if not runs:
            continue
        test = [run["metrics"]["test/accuracy"] for run in runs]
        val = [run["metrics"]["best/val_accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(test):.4f}" if len(test) > 1 else ""
        fastest = min(runs, key=lambda run: run["training_seconds"])
        print(
            f"| {preset} | {statistics.mean(test):.4f}{spread} | {statistics.mean(val):.4f} |"
            f" {len(runs)} | {fastest['num_parameters']:,} | {fastest['epochs']:g} |"
            f" {fastest['training_seconds']:.1f} | {fastest['load_before']:.1f} |"
        )


def main() -> None:
    """Measure what is asked for, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/presets.jsonl"))
    arguments = parser.parse_args()
    presets = arguments.presets or [n for n in preset_names() if not n.startswith("lab_")]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for preset in presets:
        for seed in range(arguments.first_seed, arguments.seeds):
            known = {(run["preset"], run["seed"]) for run in read_results(arguments.out)}
            if (preset, seed) not in known:
                result = run_preset(preset, seed)
                with arguments.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print_table(read_results(arguments.out), presets)


if __name__ == "__main__":
    main()
