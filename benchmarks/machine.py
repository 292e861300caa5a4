"""What the benchmarks share: the machine in words, the load of others, medians, tables."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import wandb

from mnist_wandb.experiment import processor_name
from mnist_wandb.train import Event, StepDone

PROGRAM = (sys.executable, "-m", "mnist_wandb")
TICKS = os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36
BUSY_LOAD = 0.2
"""Cores' worth of other work from which on times are not to be trusted."""


def describe_machine(device: str = "cpu") -> str:
    """Processor, cores and versions, after the GPU where one has computed."""
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.startswith("cuda") else ""
    return (
        f"{gpu}{processor_name()}, {os.cpu_count()} cores, Python {platform.python_version()},"
        f" torch {torch.__version__} ({torch.get_num_threads()} threads), wandb {wandb.__version__}"
    )


def _used_seconds() -> tuple[float, float]:
    """CPU seconds of the whole machine, and of this process with the children it waited for."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
    ours = sum(sum(resource.getrusage(who)[:2]) for who in (0, resource.RUSAGE_CHILDREN))
    return (user + nice + system + irq + softirq + steal) / TICKS, ours


@contextmanager
def watching_others() -> Iterator[list[float]]:
    """Measure what others use meanwhile, in cores; the list gets that number at the end."""
    found: list[float] = []
    # W&B's service outlives the run that has started it: it, too, shall count as ours.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    started, (whole, ours) = time.perf_counter(), _used_seconds()
    yield found
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    seconds, (whole_after, ours_after) = time.perf_counter() - started, _used_seconds()
    found.append(max(0.0, (whole_after - whole - (ours_after - ours)) / seconds))


def run_program(*arguments: str, folder: Path | str, **environment: str) -> tuple[float, str]:
    """Seconds of one command of the program from start to end, and what it prints."""
    started = time.perf_counter()
    done = subprocess.run(
        [*PROGRAM, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return time.perf_counter() - started, done.stdout


def run_json(*arguments: str, folder: Path | str, **environment: str) -> tuple[float, Any]:
    """Like `run_program` with `--quiet --json`."""
    seconds, out = run_program(*arguments, "--quiet", "--json", folder=folder, **environment)
    return seconds, json.loads(out)


def wait_for_device() -> None:
    """Until a GPU has done its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class StepWatch:
    """Takes the time of so many training steps after a warm-up, then stops training.

    `take` is the `emit` of `train`, `is_over` its `should_stop`.
    """

    def __init__(self, steps: int, *, warm_up: int) -> None:
        self.steps, self.warm_up = steps, warm_up
        self.done, self.started, self.seconds = 0, 0.0, 0.0

    def take(self, event: Event) -> None:
        """Count a step."""
        if isinstance(event, StepDone):
            self.done += 1
            if self.done == self.warm_up:
                wait_for_device()
                self.started = time.perf_counter()

    def is_over(self) -> bool:
        """Whether all steps are done."""
        if self.done < self.warm_up + self.steps:
            return False
        wait_for_device()
        self.seconds = time.perf_counter() - self.started
        return True


def median(values: Sequence[float]) -> float:
    """The middle value, which one disturbed repeat does not move."""
    return statistics.median(values)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table."""
    for row in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def print_conditions(repeats: int, others: float, device: str = "cpu") -> None:
    """What has to be known beside the figures."""
    print(f"\n{describe_machine(device)}; medians of {repeats}; others used {others:.2f} cores")
    if others > BUSY_LOAD:
        print("The machine was busy: do not trust these times; repeat them on a quiet one.")
