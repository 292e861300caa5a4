"""Runs of several processes under the real torchrun: on the CPU, with Gloo."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, values_of, wait_for_step

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")

Start = Callable[..., "subprocess.Popen[str]"]

# All randomness and all state must come back; the last batch has 1 image for 2 processes.
EVERYTHING_ON = (
    "model.name=mlp_dropout", "data.augment.rotation_degrees=10", "training.ema_decay=0.9",
    "training.epochs=5", "data.train_size=401", "training.batch_size=8",
    "tracking.log_every_steps=7",
)  # fmt: skip
STEPS = 5 * 51
PLAIN = (
    "model.name=mlp_128", "data.augment={'rotation_degrees': 0, 'translate_pixels': 0, 'zoom': 0}",
    "training.ema_decay=0.9", "training.grad_clip_norm=1",
    "training.epochs=3", "data.train_size=97", "training.batch_size=16",
    "tracking.log_every_steps=3", "tracking.mode=disabled",
)  # fmt: skip


@pytest.fixture
def start() -> Iterator[Start]:
    """Start torchrun; what is left of it at the test's end is killed."""
    agents: list[subprocess.Popen[str]] = []

    def call(
        *arguments: str, processes: int = 2, launch: tuple[str, ...] = ("--standalone",)
    ) -> Any:
        command = [sys.executable, "-m", "torch.distributed.run", *launch]
        command += [f"--nproc-per-node={processes}", "-m", "mnist_wandb", *arguments]
        agent = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        agents.append(agent)
        return agent

    yield call
    for agent in agents:
        if agent.poll() is None:
            for pid in ranks_of(agent).values():
                os.kill(pid, signal.SIGKILL)
            agent.kill()
            agent.communicate()


@pytest.fixture
def torchrun(start: Start) -> Callable[..., Finished]:
    """Run a command in several processes to its end."""

    def call(*arguments: str, **options: Any) -> Finished:
        agent = start(*arguments, **options)
        out, err = agent.communicate(timeout=180)
        return Finished(agent.returncode, out, err)

    return call


def ranks_of(agent: subprocess.Popen[str]) -> dict[int, int]:
    """The process ids of the ranks that torchrun has started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            facts = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((fact[5:] for fact in facts if fact.startswith(b"RANK=")), None)
        if int(parent) == agent.pid and rank is not None:
            found[int(rank)] = int(path.name)
    return found


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of the run of two processes that nothing has happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "mnist_wandb", "run", "-q", *EVERYTHING_ON, "tracking.mode=disabled"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (run,) = (folder / "runs").iterdir()
    return values_of(run)


# ── one run ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_give_the_numbers_of_one(
    processes: int, torchrun: Callable[..., Finished], program: Callable[..., Finished]
) -> None:
    alone = json.loads(program("run", "--json", *PLAIN).out)
    done = torchrun("run", "--json", *PLAIN, processes=processes)
    assert done.code == 0, done.err
    summary = json.loads(done.out)  # one object: the other processes print nothing
    assert (alone["num_processes"], summary["num_processes"]) == (1, processes)
    assert (summary["status"], summary["steps"]) == ("finished", 21)
    assert len(list(Path("runs").iterdir())) == 2
    environment = json.loads((Path(summary["run_dir"]) / "environment.json").read_text())
    assert environment["num_processes"] == processes
    assert done.err.count("device: cpu") == 1
    assert done.err.count("epoch 3/3") == 1
    expected, found = values_of(Path(alone["run_dir"])), values_of(Path(summary["run_dir"]))
    assert len(found) == len(expected) > 10
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    for name in ("confusion_matrix.csv", "config.yaml"):
        texts = [(Path(s["run_dir"]) / name).read_text() for s in (alone, summary)]
        assert texts[0] == texts[1]


def test_batch_normalisation_on_the_cpu_says_that_its_statistics_are_those_of_a_process(
    torchrun: Callable[..., Finished],
) -> None:
    few = ("training.epochs=1", "data.train_size=100", "tracking.mode=disabled")
    model = "model={'name': 'mlp', 'hidden_sizes': [16], 'batch_norm': true}"
    done = torchrun("run", "--json", model, *few)
    assert done.code == 0, done.err
    assert done.err.count("statistics of each process's part of the batch") == 1
    assert json.loads(done.out)["status"] == "finished"


@pytest.mark.slow
def test_a_compiled_model_trains_in_several_processes(torchrun: Callable[..., Finished]) -> None:
    few = ("training.epochs=1", "data.train_size=100", "tracking.mode=disabled")
    done = torchrun("run", "--json", "model.name=linear", "training.compile=true", *few)
    assert done.code == 0, done.err
    assert json.loads(done.out)["status"] == "finished"


@pytest.mark.slow
def test_two_machines_train_one_run(start: Start, program: Callable[..., Finished]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = (
        "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1",
        "--local-addr=127.0.0.1",
    )  # fmt: skip
    agents = [start("run", "--json", *PLAIN, processes=1, launch=launch) for _ in range(2)]
    ended = [agent.communicate(timeout=180) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ended
    (out,) = [out for out, _ in ended if out]
    summary = json.loads(out)
    assert summary["num_processes"] == 2
    assert sum("2 processes on 2 machine(s)" in err for _, err in ended) == 1
    alone = json.loads(program("run", "--json", *PLAIN).out)
    assert summary["metrics"]["test/loss"] == pytest.approx(alone["metrics"]["test/loss"], rel=1e-4)


# ── stopped, killed, continued ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_all_and_the_run_goes_on_to_the_same_numbers(
    rank: int,
    undisturbed: list[dict[str, Any]],
    start: Start,
    torchrun: Callable[..., Finished],
) -> None:
    agent = start("run", *EVERYTHING_ON, "tracking.mode=offline")
    run = wait_for_step(100)
    ranks = ranks_of(agent)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[rank], signal.SIGKILL)
    _, err = agent.communicate(timeout=60)
    assert agent.returncode == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    (line,) = errors_in(err)
    assert line == (
        "error: another of the 2 processes has ended; go on with `torchrun … -m mnist_wandb run"
        f" --resume {run}`"
    )
    assert "stopping" not in err
    if rank == 0:
        assert not (run / "summary.json").exists()
        return
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "another of the 2 processes has ended" in summary["error"]
    done = torchrun("run", "--json", "--resume", run.name)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert (summary["status"], summary["steps"]) == ("finished", STEPS)
    assert values_of(run) == undisturbed


@pytest.mark.parametrize(
    ("number", "receiver"),
    [(signal.SIGTERM, "torchrun"), pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow)],
)
def test_a_signal_to_any_process_stops_all_after_the_same_step(
    number: int,
    receiver: str | int,
    start: Start,
) -> None:
    agent = start("run", *EVERYTHING_ON, "training.epochs=5000", "tracking.mode=offline")
    run = wait_for_step(100)
    pid = agent.pid if receiver == "torchrun" else ranks_of(agent)[int(receiver)]
    os.kill(pid, number)
    out, err = agent.communicate(timeout=60)
    assert agent.returncode != 0
    assert errors_in(err) == []
    assert err.count("stopping, saving a checkpoint") == 1
    assert f"run --resume {run}" in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["steps"] >= 100
    assert (run / "checkpoints" / "last.pt").is_file()


@pytest.mark.slow
def test_three_processes_go_on_to_the_same_numbers(
    start: Start, torchrun: Callable[..., Finished]
) -> None:
    # Of three addends the order decides the last digit.
    whole = json.loads(torchrun("run", "--json", *EVERYTHING_ON, processes=3).out)
    Path("runs").rename("undisturbed")
    agent = start("run", *EVERYTHING_ON, processes=3)
    run = wait_for_step(100)
    agent.terminate()
    agent.communicate(timeout=60)
    done = torchrun("run", "--json", "--resume", str(run), processes=3)
    assert done.code == 0, done.err
    assert values_of(run) == values_of(Path("undisturbed") / Path(whole["run_dir"]).name)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(
    start: Start, program: Callable[..., Finished]
) -> None:
    agent = start("run", *EVERYTHING_ON, "tracking.mode=disabled")
    run = wait_for_step(60)
    os.kill(ranks_of(agent)[0], signal.SIGTERM)
    agent.communicate(timeout=60)
    done = program("run", "--json", "--resume", run.name)
    assert done.code == 0, done.err
    assert "resumed with num_processes 1 instead of 2: the last digits may differ" in done.err
    summary = json.loads(done.out)
    assert (summary["status"], summary["steps"], summary["num_processes"]) == ("finished", STEPS, 1)


@pytest.mark.slow
def test_a_full_disk_at_process_0_ends_all_with_one_message(start: Start) -> None:
    agent = start("run", *EVERYTHING_ON, "training.epochs=5000", "tracking.mode=disabled")
    run = wait_for_step(60)
    resource.prlimit(ranks_of(agent)[0], resource.RLIMIT_FSIZE, (100, 100))
    _, err = agent.communicate(timeout=60)
    (line,) = errors_in(err)
    assert f"{run}/" in line
    assert "cannot be written: File too large" in line
    assert (run / "checkpoints" / "last.pt").is_file()


SCRIPT = """
import torch
from mnist_wandb.errors import ConfigError, LostProcessError, RunError
from mnist_wandb.ranks import join_ranks
from mnist_wandb.settings import load_launch

launch, cpu = load_launch(), torch.device("cpu")
try:
    with join_ranks(launch) as ranks:
        ranks.connect(cpu, str(launch.rank))
except ConfigError as error:
    print(launch.rank, error)
try:
    with join_ranks(launch) as ranks:
        ranks.connect(cpu, "the same")
        with ranks.guard("runs/this"):
            if launch.rank == 1:
                raise RunError("no room")
            ranks.gather(torch.zeros(1, 1), 2)
except LostProcessError as error:
    print(launch.rank, error)
"""


def test_the_error_of_one_process_is_heard_by_the_others() -> None:
    Path("script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node=2", "script.py"], capture_output=True, text=True
    )
    other = (
        "process 1 has another configuration, other data or another version of torch than process"
        " 0; start all with the same command and the same files"
    )
    go_on = "go on with `torchrun … -m mnist_wandb run --resume runs/this`"
    assert sorted(done.stdout.splitlines()) == [
        f"0 {other}",
        f"0 process 1 has failed (no room); {go_on}",
        f"1 {other}",
    ]


# ── refused ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "training.epochs=never"), "training.epochs"),
        (("run", "data.dataset=image_folder", "data.dir=nowhere"), "nowhere"),
        (("evaluate", "latest"), "only `run` works in several; start this without torchrun"),
    ],
)
def test_bad_input_is_said_once_and_ends_all_processes_with_2(
    arguments: tuple[str, ...], message: str, torchrun: Callable[..., Finished]
) -> None:
    done = torchrun(*arguments)
    assert done.code == 1  # torchrun's own, whatever the processes end with
    (line,) = errors_in(done.err)
    assert message in line
    assert "exitcode  : 2" in done.err
    assert re.search(r"exitcode  : 1\b", done.err) is None  # 143: torchrun has ended the other one
    assert list(Path().glob("runs/*")) == []


def test_a_dry_run_tells_once_what_several_processes_would_do(
    torchrun: Callable[..., Finished],
) -> None:
    done = torchrun("run", "--dry-run", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["num_processes"] == 2
    assert facts["plan"]["device"] == "cpu"
