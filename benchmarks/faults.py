"""Does a failing W&B server slow training? The same run, undisturbed and under each fault.

    uv run python benchmarks/faults.py [--repeats 5]

Each run is a process of the installed program that trains `cnn_small` on the embedded digits and is
tracked online by the stand-in server of the tests, which is made to fail once training has begun.
Printed are the median training seconds, their ratio to the undisturbed run, and how long the
process took beyond training. The load of other processes is reported: it makes seconds worthless.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from wandb_server import WandbServer

UPLOAD_TIMEOUT_SECONDS = 3
FAULTS: dict[str, dict[str, Any] | None] = {
    "none": {},
    "server gone": None,
    "HTTP 500": {"status": 500},
    "HTTP 429": {"status": 429},
    "no answer": {"hang": True},
    "1 s a request": {"delay_seconds": 1.0},
}


def run_once(fault: dict[str, Any] | None, folder: Path) -> tuple[float, float]:
    """Training seconds and all seconds of one run; None is a server that has died."""
    with WandbServer() as server:
        started = time.perf_counter()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mnist_wandb", "run", "--quiet", "--json"),
                *("training.epochs=20", "tracking.log_every_steps=10"),
                f"tracking.upload_timeout_seconds={UPLOAD_TIMEOUT_SECONDS}",
            ],
            cwd=folder,
            env={**os.environ, **server.env()},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while not any(path.stat().st_size for path in folder.glob("runs/*/metrics.jsonl")):
            time.sleep(0.02)
        if fault is None:
            server.close()
        else:
            server.faults.set(**fault)
        out, _ = process.communicate()
        return json.loads(out)["training_seconds"], time.perf_counter() - started


def main() -> None:
    """Measure in turns, so that a drift of the machine meets all faults alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    load = os.getloadavg()[0]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in FAULTS}
    for _ in range(repeats):
        for name, fault in FAULTS.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(run_once(fault, Path(folder)))
    print(f"{repeats} runs each, {os.cpu_count()} cores, load before {load:.1f}; medians")
    print("| fault | training seconds | ratio | whole process beyond training |")
    print("|---|---|---|---|")
    base = statistics.median(training for training, _ in found["none"])
    for name, runs in found.items():
        training = statistics.median(t for t, _ in runs)
        rest = statistics.median(whole - t for t, whole in runs)
        print(f"| {name} | {training:.2f} | {training / base:.3f} | {rest:.1f} s |")


if __name__ == "__main__":
    main()
