"""Several runs at once: one after the other with all cores, or side by side with one thread each.

    uv run python benchmarks/side_by_side.py [--runs 2] [--repeats 5] [PRESET...]

Three ways to do the same N runs: one after the other, with as many threads as there are cores;
side by side with one thread each, which is what `mnist-wandb sweep run` does; and side by side with
all threads each, which is what happens where nobody thinks of it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from machine import median, print_conditions, print_table, run_json, watching_others

from mnist_wandb.settings import load_settings

WAYS = ("one after the other", "side by side, one thread each", "side by side, all threads each")
EPOCHS = {"mlp_small": 2.0, "cnn_small": 0.5}


def time_runs(preset: str, epochs: float, runs: int, way: str) -> float:
    """Seconds until all runs have ended."""
    threads = {"OMP_NUM_THREADS": "1" if "one thread" in way else str(os.cpu_count())}
    data = f"data.dir={load_settings().data_dir.absolute()}"
    with tempfile.TemporaryDirectory() as folder:

        def run(seed: int) -> None:
            run_json(
                "run", "--config", preset, f"training.epochs={epochs}", f"seed={seed}", data,
                "tracking.mode=offline", folder=folder, **threads,
            )  # fmt: skip

        started = time.perf_counter()
        with ThreadPoolExecutor(1 if way == WAYS[0] else runs) as pool:
            list(pool.map(run, range(runs)))
        return time.perf_counter() - started


def main() -> None:
    """Measure in turns; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("presets", nargs="*", default=list(EPOCHS))
    parser.add_argument("--runs", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    with watching_others() as others:
        for _ in range(options.repeats):
            for preset in options.presets:
                for way in WAYS:
                    value = time_runs(preset, EPOCHS.get(preset, 1.0), options.runs, way)
                    seconds.setdefault((preset, way), []).append(value)
    rows = []
    for preset in options.presets:
        base = median(seconds[preset, WAYS[0]])
        values = [median(seconds[preset, way]) for way in WAYS]
        rows.append((f"`{preset}`", *(f"{v:.1f} s ({base / v:.2f})" for v in values)))
    print_table(("preset", *WAYS), rows)
    print(f"\n{options.runs} runs; in brackets: how many times as fast as one after the other")
    print_conditions(options.repeats, others[0])


if __name__ == "__main__":
    main()
