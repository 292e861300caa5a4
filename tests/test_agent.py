"""Sweeps through the real `wandb sweep` and `wandb agent`, against a server on 127.0.0.1."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_online import assert_same_history
from test_wandb_server import WANDB, Client, wait_for
from wandb_server import WandbServer
from wandb_state import Run, Sweep

from mnist_wandb.loading import load_config
from mnist_wandb.runs import RunFolder

ROOT = Path(__file__).parents[1]
QUICK = ROOT / "sweeps" / "quick.yaml"
AGENT = """
from wandb.cli.cli import cli
from wandb.wandb_agent import Agent
Agent.POLL_INTERVAL = 0.5  # 5 seconds else
cli(prog_name="wandb")
"""
PATIENCE_SECONDS = 240  # for a whole sweep, on a busy machine
RUN = ("${env}", "${program}", "run")
SHORT = ("data.train_size=100", "training.epochs=1", "tracking.sample_predictions=0")
LONG = (
    "model.name=mlp_64x3",
    "training.epochs=8",
    "training.batch_size=8",
    "tracking.log_every_steps=9",
)
ENDLESS = (*LONG, "training.epochs=5000")


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
    assert server.unknown == []


@pytest.fixture
def client(server: WandbServer, tmp_path: Path) -> Client:
    return Client(tmp_path / "work", server)


def start_sweep(client: Client, server: WandbServer, file: Path) -> Sweep:
    """What `wandb sweep` makes of a file."""
    said = client(*WANDB, "sweep", str(file))
    (sweep,) = server.sweeps.values()
    assert f"wandb agent tester/mnist-wandb/{sweep.id}" in said
    return sweep


def small_sweep(
    client: Client, server: WandbServer, command: tuple[str, ...], **parameters: Any
) -> Sweep:
    """A grid over parameters as in a sweep file."""
    text = {"method": "grid", "project": "mnist-wandb", "program": "mnist-wandb"}
    file = client.folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({**text, "command": [*command], "parameters": parameters}))
    return start_sweep(client, server, file)


def start_agent(client: Client, sweep: Sweep, *options: str) -> subprocess.Popen[str]:
    path = f"{sweep.entity}/{sweep.project}/{sweep.id}"
    return client.start(sys.executable, "-c", AGENT, "agent", *options, path)


def end_of(agent: subprocess.Popen[str], code: int = 0) -> str:
    """What an agent has said, once it has ended by itself."""
    said, _ = agent.communicate(timeout=PATIENCE_SECONDS)
    assert agent.returncode == code, said
    return said


def folder_of(client: Client, run: Run) -> RunFolder:
    """The only run folder of a run."""
    (path,) = (client.folder / "runs").glob(f"*-{run.id}")
    return RunFolder(path)


def status_of(folder: RunFolder) -> str:
    status: str = json.loads(folder.summary_path.read_text())["status"]
    return status


def assert_arrived(client: Client, sweep: Sweep, run: Run) -> None:
    """A finished run is linked to its sweep, with the configuration and values of its folder."""
    folder = folder_of(client, run)
    assert (run.sweep, run.state, run.exit_code) == (sweep.id, "finished", 0)
    config = folder.read_config().model_dump(mode="json")
    parameters = {name: entry["value"] for name, entry in run.sweep_arguments.items()}
    assert run.config == {**parameters, **config}  # the client adds the parameters' own columns
    assert_same_history(run, folder.path)
    summary = json.loads(folder.summary_path.read_text())
    assert (summary["status"], summary["wandb"]["id"]) == ("finished", run.id)
    for name, value in summary["metrics"].items():
        assert run.summary[name] == value, name


def wait_for_step(client: Client, step: int) -> None:
    """Wait until the only run has trained so far."""

    def is_there() -> bool:
        for path in (client.folder / "runs").glob("*/metrics.jsonl"):
            lines = path.read_text().splitlines()[:-1]
            return bool(lines) and json.loads(lines[-1])["step"] >= step
        return False

    wait_for(is_there)


# ── to the end ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_two_agents_side_by_side_run_the_quick_sweep_to_its_end(
    server: WandbServer, client: Client
) -> None:
    sweep = start_sweep(client, server, QUICK)
    agents = [start_agent(client, sweep) for _ in range(2)]
    for agent in agents:
        end_of(agent)
    assert sweep.state == "FINISHED"
    parameters = yaml.safe_load(QUICK.read_text())["parameters"]
    points = {
        (name, seed)
        for name in parameters["model.name"]["values"]
        for seed in parameters["seed"]["values"]
    }
    done = [(run.config["model"]["name"], run.config["seed"]) for run in sweep.runs]
    assert set(done) == points
    assert len(done) == len(points) == len(server.runs)
    assert all(agent.runs for agent in sweep.agents)
    assert sum(len(agent.runs) for agent in sweep.agents) == len(points)
    for run in sweep.runs:
        assert_arrived(client, sweep, run)
    assert sweep.best_loss == max(run.summary["best/val_accuracy"] for run in sweep.runs)


@pytest.mark.parametrize(
    "macro",
    [
        pytest.param("${args}", marks=pytest.mark.slow),
        "${args_no_hyphens}",
        pytest.param("${args_json}", marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_every_form_of_command_gives_a_run_its_parameters(
    server: WandbServer, client: Client, macro: str | None
) -> None:
    sweep = small_sweep(
        client,
        server,
        (*RUN, *SHORT, *([macro] if macro else [])),
        config={"value": "lab_pyramid"},
        data={"parameters": {"dataset": {"value": "digits"}}},
        model={
            "parameters": {
                "name": {"value": "mlp"},
                "hidden_sizes": {"values": [[32, 16]]},
                "batch_norm": {"value": True},
            }
        },
        optimizer={"parameters": {"name": {"value": "sgd"}, "nesterov": {"value": False}}},
        training={"parameters": {"early_stopping": {"value": None}}},
        **{"tracking.tags": {"value": ["a b", "c"]}},
    )
    said = end_of(start_agent(client, sweep))
    (run,) = sweep.runs
    assert run.state == "finished", said
    assert_arrived(client, sweep, run)
    found = folder_of(client, run).read_config()
    assert found == load_config(
        "lab_pyramid",
        (
            *SHORT,
            "data.dataset=digits",
            "model={'name': 'mlp', 'hidden_sizes': [32, 16], 'batch_norm': True}",
            "optimizer={'name': 'sgd', 'nesterov': False}",
            "training.early_stopping=null",
            'tracking.tags=["a b", "c"]',
        ),
    )


# ── failed and stopped ───────────────────────────────────────────────────────────────────────


def test_runs_that_fail_are_counted_by_the_agent_and_say_why(
    server: WandbServer, client: Client
) -> None:
    sweep = small_sweep(
        client,
        server,
        (*RUN, "model.name=mlp_64x3", "schedule.name=constant", "${args}"),
        # Refused before it begins, and stopped by its own loss; the third is never begun.
        **{"optimizer.lr": {"values": [-1.0, 100.0, 0.1]}, "optimizer.name": {"value": "sgd"}},
    )
    said = end_of(start_agent(client, sweep, "--max-consecutive-failed-runs", "2"))
    assert "Detected 2 consecutive failed runs, shutting down" in said
    assert "optimizer.lr: got -1.0" in said
    assert "error: training diverged at step" in said
    refused, diverged = sweep.runs
    assert (refused.state, refused.output) == ("pending", [])
    assert (diverged.state, diverged.exit_code) == ("failed", 1)
    assert "error: training diverged at step" in "\n".join(diverged.output)
    assert status_of(folder_of(client, diverged)) == "diverged"


def press_stop(server: WandbServer, run: Run) -> None:
    server.stop_run(run.id)


def stop_early(server: WandbServer, run: Run) -> None:
    """What hyperband does: the agent hears of it first, the client up to 15 s later."""
    server.stop_run(run.id, client=False)


def cancel(server: WandbServer, run: Run) -> None:
    server.set_sweep_state(str(run.sweep), "CANCELED")


@pytest.mark.parametrize(
    "stop", [press_stop, stop_early, pytest.param(cancel, marks=pytest.mark.slow)]
)
def test_a_run_that_its_sweep_stops_ends_with_a_checkpoint_and_never_comes_back(
    server: WandbServer, client: Client, stop: Callable[[WandbServer, Run], None]
) -> None:
    sweep = small_sweep(client, server, (*RUN, *ENDLESS, "${args}"), seed={"value": 1})
    agent = start_agent(client, sweep, "--max-consecutive-failed-runs", "1")
    wait_for_step(client, 300)
    (run,) = sweep.runs
    stop(server, run)
    said = end_of(agent)
    assert "stopping after this step, saving a checkpoint" in said
    assert "consecutive failed" not in said  # or early termination would soon end the agent
    folder = folder_of(client, run)
    assert status_of(folder) == "interrupted"
    assert folder.checkpoint_path("last").is_file()
    assert_same_history(run, folder.path)
    assert (run.state, run.exit_code) == ("failed", 143)
    assert run.summary["status"] == "interrupted"
    assert not run.preempting
    assert [agent.runs for agent in sweep.agents] == [[run]]
    assert sweep.requeued == []


def test_a_preempted_run_is_handed_out_again_and_goes_on_in_its_folder(
    server: WandbServer, client: Client
) -> None:
    sweep = small_sweep(client, server, (*RUN, *LONG, "${args}"), seed={"value": 1})
    first = start_agent(client, sweep, "--forward-signals")
    wait_for_step(client, 300)
    first.send_signal(signal.SIGTERM)  # as SLURM and Kubernetes do
    said = end_of(first)
    assert "stopping after this step, saving a checkpoint" in said
    (run,) = sweep.runs
    folder = folder_of(client, run)
    assert (run.state, run.exit_code, run.preempting) == ("preempted", 143, True)
    assert status_of(folder) == "interrupted"
    end_of(start_agent(client, sweep))
    assert_arrived(client, sweep, run)
    assert sweep.runs == [run]
    assert [agent.runs for agent in sweep.agents] == [[run], [run]]
    assert sweep.state == "FINISHED"
