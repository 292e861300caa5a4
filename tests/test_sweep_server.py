"""One sweep on several machines, through a real PostgreSQL on loopback."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from filelock import FileLock

from mnist_wandb.study import GRACE_SECONDS, SweepStudy
from mnist_wandb.sweep_messages import Worker, lock_path
from mnist_wandb.sweepfile import load_sweep

pytestmark = pytest.mark.slow
SWEEP = """
name: shared
method: grid
metric: {name: best/val_accuracy, goal: maximize}
command: [mnist-wandb, run, model.name=linear, training.epochs=2, tracking.mode=disabled,
          "${args_no_hyphens}"]
parameters:
  seed: {min: 0, max: 7}
"""


def find_server() -> Path | None:
    """The folder of PostgreSQL's programs; Debian keeps them off the PATH."""
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    places += [Path(found).parent for found in [shutil.which("initdb")] if found]
    return next((place for place in places if (place / "initdb").exists()), None)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a PostgreSQL server that lives as long as these tests."""
    programs = find_server()
    if programs is None:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    user = "nobody" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    shutil.chown(folder, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "password").write_text("s3cret")
    shutil.chown(folder / "password", user)
    subprocess.run(
        [programs / "initdb", "-D", folder / "data", "-U", "me", "-A", "password",
         "--pwfile", folder / "password", "--no-sync"],
        user=user, check=True, capture_output=True, cwd=folder,
    )  # fmt: skip
    server = subprocess.Popen(
        [programs / "postgres", "-D", folder / "data", "-p", str(port), "-h", "127.0.0.1",
         "-k", folder],
        user=user, stderr=subprocess.DEVNULL, cwd=folder,
    )  # fmt: skip
    url = f"postgresql://me:s3cret@127.0.0.1:{port}/postgres"
    try:
        for _ in range(300):
            try:
                psycopg.connect(url).close()
                break
            except psycopg.OperationalError:
                time.sleep(0.1)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        shutil.rmtree(folder)


def start(address: str, machine: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mnist_wandb", "sweep", "run", "mine.yaml", "--json", "--workers=1",
         "--storage", address, *arguments],
        env={**os.environ, "MNIST_WANDB_RUNS_DIR": machine},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def test_two_machines_share_a_sweep_and_run_every_point_once(address: str) -> None:
    Path("mine.yaml").write_text(SWEEP)
    processes = [start(address, machine) for machine in ("here", "there")]
    outcomes = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        outcomes.append(json.loads(out))
    assert sum(outcome["num_run"] for outcome in outcomes) == 8
    runs = [path.parent for path in Path().glob("*here/shared-*/*/summary.json")]
    seeds = [json.loads((run / "summary.json").read_text())["seed"] for run in runs]
    assert sorted(seeds) == list(range(8))
    written = [path.read_bytes() for path in Path().rglob("*here/**/*") if path.is_file()]
    assert not any(b"s3cret" in content for content in written)


def test_a_trial_of_a_lost_machine_is_taken_over(address: str) -> None:
    Path("mine.yaml").write_text(SWEEP.replace("name: shared", "name: lost").replace("7", "1"))
    Path("here/.workers").mkdir(parents=True)
    Path("there/.workers").mkdir(parents=True)
    alive = FileLock(lock_path(Path("there"), "b"))
    alive.acquire()
    sweep = load_sweep("mine.yaml")
    here = SweepStudy(sweep, Path("here"), address)
    there = SweepStudy(sweep, Path("there"), address)
    lost = here.claim(Worker("here", "a", "p"))
    assert lost is not None
    assert here.report(lost, 0, 0.5)
    mine = there.claim(Worker("there", "b", "p"))
    assert mine is not None
    assert (mine.number, there.claim(Worker("there", "b", "p"))) == (1, None)
    end = time.monotonic() + GRACE_SECONDS + 5
    while time.monotonic() < end:
        there.heartbeat(mine)
        time.sleep(1)
    taken = there.claim(Worker("there", "b", "p"))
    assert taken is not None
    assert (taken.number, taken.run_id) == (lost.number, lost.run_id)
    assert not here.report(lost, 1, 0.6)  # whoever was thought dead has nothing to say any more
    there.end(taken, "finished", 0.7)
    there.end(mine, "finished", 0.8)
    assert [(r.number, r.state, r.value) for r in there.records()] == [
        (0, "finished", 0.7),
        (1, "finished", 0.8),
    ]
    alive.release()
    here.close()
    there.close()
