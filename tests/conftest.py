"""Every test works in an empty folder of its own, without keys, network or the user's settings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pexpect
import pytest
import torch

from mnist_wandb.cli import main
from mnist_wandb.config import RunConfig
from mnist_wandb.data import Splits, load_dataset
from mnist_wandb.experiment import run_experiment
from mnist_wandb.loading import load_config
from mnist_wandb.settings import Settings

REAL_DATA_DIR = Path(os.environ.get("MNIST_WANDB_DATA_DIR") or "data").absolute()
"""Real data sets, used where they are there; read before the tests' own environment is set."""

hypothesis.settings.register_profile("patient", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("patient")

FAST = ("tracking.mode=disabled", "training.epochs=2", "data.train_size=200")
"""Overrides that make a run on the embedded digits take about a second."""


@pytest.fixture(scope="session", autouse=True)
def same_everywhere() -> None:
    torch.set_num_threads(1)
    # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def forget_wandb() -> None:
    """Delete W&B's variables: whoever runs the tests has some, and the client sets WANDB_SERVICE."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MNIST_WANDB_")):
            del os.environ[name]


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget_wandb()
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "no-netrc"))
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield
    forget_wandb()  # before a fixture of the next module starts a process with what is left here


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run a command in this process."""

    def call(*arguments: str) -> Finished:
        capfd.readouterr()
        code = main(list(arguments))
        out, err = capfd.readouterr()
        return Finished(code, out, err)

    return call


@pytest.fixture
def program() -> Callable[..., Finished]:
    """Run a command in a process of its own, in the test's folder."""

    def call(*arguments: str, timeout: float = 120, **environment: str) -> Finished:
        done = subprocess.run(
            [sys.executable, "-m", "mnist_wandb", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **environment},
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return call


Terminal = Callable[..., "pexpect.spawn[str]"]


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """Run a command in a terminal; what is left of it at the test's end is killed."""
    children: list[pexpect.spawn[str]] = []

    def spawn(*arguments: str) -> pexpect.spawn[str]:
        child = pexpect.spawn(
            sys.executable,
            ["-m", "mnist_wandb", *arguments],
            timeout=120,
            encoding="utf-8",
            dimensions=(40, 200),
            env={**os.environ, "TERM": "xterm-256color"},
        )
        children.append(child)
        return child

    yield spawn
    for child in children:
        child.close(force=True)


@pytest.fixture
def digits_config() -> RunConfig:
    """A small, fast configuration on the embedded digits."""
    return load_config("quickstart", FAST)


@pytest.fixture(scope="session")
def digits() -> Splits:
    """The embedded digits, split by default."""
    return load_dataset(load_config("quickstart").data)


@pytest.fixture(scope="session")
def example_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with seven finished runs: linear and mlp_128 with two seeds each, a small sweep."""
    folder = tmp_path_factory.mktemp("examples") / "runs"
    small = ("tracking.mode=disabled", "training.epochs=2", "data.train_size=200")
    models = [(f"model.name={m}", f"seed={s}") for m in ("linear", "mlp_128") for s in (0, 1)]
    sweep = [
        ("model.name=linear", f"optimizer.lr={lr}", "tracking.group=small_sweep", "name=trial")
        for lr in (0.0005, 0.01, 0.02)
    ]
    # Names and ids are in alphabetical order, so that runs of one second are in order, too.
    for number, overrides in enumerate((*models, *sweep)):
        config = load_config("quickstart", (*small, *overrides))
        settings = Settings(folder.parent, folder, wandb_run_id=f"example{number}")
        run_experiment(config, settings)
    return folder


@pytest.fixture
def runs_dir(example_runs: Path) -> Path:
    """A copy of the example runs in the test's folder, under the default name."""
    return Path(shutil.copytree(example_runs, "runs"))


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an IDX file of unsigned bytes or 32-bit integers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code = {"u1": 8, "i4": 12}[array.dtype.str[1:]]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(array.dtype.newbyteorder(">")).tobytes())


@pytest.fixture
def mnist_like(tmp_path: Path) -> Path:
    """A data folder with a small data set in MNIST's files: 300 + 100 images of noise."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 300), ("t10k", 100)):
        raw = tmp_path / "data" / "MNIST" / "raw"
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)
    return tmp_path / "data"


@pytest.fixture
def real_data() -> Path:
    """The folder with the real MNIST; the test is skipped where there is none."""
    if not (REAL_DATA_DIR / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip("needs the real MNIST: set MNIST_WANDB_DATA_DIR to a folder that has it")
    return REAL_DATA_DIR


def wait_for_step(step: int) -> Path:
    """The folder of a run below `runs`, once its metrics have reached a step."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for path in Path("runs").glob("*/metrics.jsonl"):
            lines = path.read_text().splitlines()
            if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
                return path.parent
        time.sleep(0.01)
    raise AssertionError(f"no run reached step {step}")


def values_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics without those that differ each time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "train/images_per_second"} for row in rows]
