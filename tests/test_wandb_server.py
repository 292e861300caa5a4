"""The stand-in W&B server, asked by the real client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from wandb_server import API_KEY, WandbServer

PYTHON = [sys.executable, "-c"]
WANDB = [sys.executable, "-m", "wandb"]
Client = Callable[..., "subprocess.CompletedProcess[str]"]

TRAIN = """
import wandb
run = wandb.init(project="digits", id="first", name="a run", group="g", job_type="train",
    tags=["lab", "a"], notes="hello", config={"lr": 0.1, "model": {"width": 8}}, resume="allow")
print("starts at", run.starting_step)
for i in range(5):
    run.log({"train/loss": 1 / (i + 1), "step": i})
run.summary["best"] = 0.5
"""
"""A run with 5 steps, which goes on when it is there already."""
MODEL = """
from pathlib import Path
Path("model.txt").write_text(f"weights {run.starting_step}")
artifact = wandb.Artifact("model", type="model", metadata={"accuracy": 0.9})
artifact.add_file("model.txt")
run.log_artifact(artifact, aliases=["best"])
"""
MEDIA = """
import numpy as np
run.log({"picture": wandb.Image(np.zeros((4, 4), dtype=np.uint8))})
run.log({"table": wandb.Table(columns=["a", "b"], data=[[1, 2], [3, 4]])})
run.alert(title="a title", text="a text", level="WARN")
"""


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
    assert server.unknown == []


@pytest.fixture
def client(server: WandbServer) -> Client:
    """Run a command with the server's environment in the test's folder; it has to succeed."""

    def call(
        *command: str, code: int | None = 0, timeout: float = 60, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            env={**os.environ, **server.env(), **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert code in (None, done.returncode), done.stdout + done.stderr
        return done

    return call


def test_an_online_run_arrives_whole(server: WandbServer, client: Client) -> None:
    client(*PYTHON, TRAIN + MODEL + MEDIA + "run.finish(exit_code=3)")
    run = server.runs["tester", "digits", "first"]
    assert run.config == {"lr": 0.1, "model": {"width": 8}}
    assert run.values("train/loss") == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert [row["_step"] for row in run.history] == list(range(7))
    assert (run.summary["best"], run.summary["train/loss"]) == (0.5, 0.2)
    assert (run.display_name, run.group, run.job_type, run.tags, run.notes) == (
        *("a run", "g", "train"),
        ["lab", "a"],
        "hello",
    )
    assert (run.state, run.exit_code) == ("failed", 3)
    assert run.output == ["starts at 0"]
    assert run.events
    assert run.alerts == [{"title": "a title", "text": "a text", "severity": "WARN"}]
    assert run.files[run.values("picture")[0]["path"]].startswith(b"\x89PNG")
    assert b'"data":[[1,2],[3,4]]' in run.files[run.values("table")[0]["path"]]
    model = server.artifact("model:best")
    assert (model.type, model.version, model.aliases) == ("model", 0, ["best", "latest"])
    assert (model.metadata, model.logged_by) == ({"accuracy": 0.9}, "first")
    assert model.files == {"model.txt": b"weights 0"}
    assert server.artifact("run-first-table").type == "run_table"


def test_a_resumed_run_goes_on_without_gap_or_double_point(
    server: WandbServer, client: Client
) -> None:
    client(*PYTHON, TRAIN + MODEL)
    client(*PYTHON, TRAIN + MODEL)
    run = server.run("first")
    assert [row["_step"] for row in run.history] == list(range(10))
    assert run.output == ["starts at 0", "starts at 5"]
    assert run.summary["best"] == 0.5
    versions = server.artifacts["tester", "digits", "model"].versions
    assert [(v.version, v.aliases) for v in versions] == [(0, []), (1, ["best", "latest"])]


def test_an_artifact_is_used_by_a_later_run(server: WandbServer, client: Client) -> None:
    client(*PYTHON, TRAIN + MODEL)
    script = """
import wandb
run = wandb.init(project="digits", id="second")
folder = run.use_artifact("tester/digits/model:best").download("out")
print(open("out/model.txt").read())
"""
    assert "weights 0" in client(*PYTHON, script).stdout
    assert server.artifact("model").used_by == ["second"]


def test_the_same_contents_make_no_new_version(server: WandbServer, client: Client) -> None:
    again = MODEL + 'artifact = wandb.Artifact("model", type="model")\n'
    again += 'artifact.add_file("model.txt")\nrun.log_artifact(artifact, aliases=["good"])\n'
    client(*PYTHON, TRAIN + again)
    (version,) = server.artifacts["tester", "digits", "model"].versions
    assert version.aliases == ["best", "good", "latest"]


def test_sync_uploads_an_offline_run_and_a_replay_changes_nothing(
    server: WandbServer, client: Client
) -> None:
    # With resume="allow" the client would append all rows once more, after those that are there.
    once = TRAIN.replace('resume="allow"', "")
    client(*PYTHON, once + MODEL + MEDIA, WANDB_MODE="offline")
    assert server.runs == {}
    (folder,) = Path("wandb").glob("offline-run-*")
    client(*WANDB, "sync", str(folder))
    run = server.run("first")
    before = (run.history, run.summary, run.config, sorted(run.files), run.state)
    assert [row["_step"] for row in run.history] == list(range(7))
    assert server.artifact("model:best").files == {"model.txt": b"weights 0"}
    client(*WANDB, "sync", "--include-synced", str(folder))
    assert (run.history, run.summary, run.config, sorted(run.files), run.state) == before


def test_a_wrong_key_is_reported_by_the_client(server: WandbServer, client: Client) -> None:
    done = client(*PYTHON, TRAIN, code=1, WANDB_API_KEY="wrong" * 8)
    assert "401" in done.stderr
    assert API_KEY not in done.stderr
    assert server.runs == {}


def test_an_unknown_entity_is_reported_by_the_client(server: WandbServer, client: Client) -> None:
    done = client(*PYTHON, TRAIN, code=1, WANDB_ENTITY="somebody")
    assert "entity somebody not found" in done.stderr
