"""The stand-in W&B server, asked by the real client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from graphql_reader import GraphQLError, execute, parse
from wandb_server import API_KEY, ServerProcess, WandbServer
from wandb_state import Run, Sweep, check_sweep, draw, grid

PYTHON = [sys.executable, "-c"]
WANDB = [sys.executable, "-m", "wandb"]
PATIENCE_SECONDS = 90

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
SAME_MODEL = """
artifact = wandb.Artifact("model", type="model")
artifact.add_file("model.txt")
run.log_artifact(artifact, aliases=["good"])
"""
MEDIA = """
import numpy as np
run.log({"picture": wandb.Image(np.zeros((4, 4), dtype=np.uint8))})
run.log({"table": wandb.Table(columns=["a", "b"], data=[[1, 2], [3, 4]])})
run.alert(title="a title", text="a text", level="WARN")
"""
USE = """
import wandb
run = wandb.init(project="digits", id="second")
run.use_artifact("tester/digits/model:best").download("out")
print(open("out/model.txt").read())
"""


class Client:
    """Commands of a W&B user, in a folder of their own."""

    def __init__(self, folder: Path, server: WandbServer | ServerProcess) -> None:
        self.folder = folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        places = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME")
        self.environment = {
            **kept,
            **{name: str(folder / name.lower()) for name in places},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **server.env(),
        }

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *command: str, code: int = 0, **environment: str) -> str:
        """Run a command to its end; returns what it says."""
        process = self.start(*command, **environment)
        out, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == code, out
        return out


def wait_for(what: Callable[[], object]) -> None:
    """Wait until something is true."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def ask(server: WandbServer, path: str = "graphql", data: bytes | None = None) -> int:
    """The HTTP status of a request: a question, or an upload where data is given."""
    body = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    request = urllib.request.Request(f"{server.url}/{path}", data or body)
    request.method = "PUT" if data else "POST"
    request.add_header("Authorization", "Bearer " + API_KEY)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
    assert server.unknown == []


@pytest.fixture
def client(server: WandbServer, tmp_path: Path) -> Client:
    return Client(tmp_path, server)


# ── runs and artifacts ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WandbServer, Client, str]]:
    """A run, the same run resumed, and a run that uses its model."""
    with WandbServer() as server:
        client = Client(tmp_path_factory.mktemp("story"), server)
        client(*PYTHON, TRAIN + MODEL + MEDIA + "run.finish(exit_code=3)")
        assert (server.run("first").state, server.run("first").exit_code) == ("failed", 3)
        client(*PYTHON, TRAIN + MODEL + SAME_MODEL)
        yield server, client, client(*PYTHON, USE)
    assert server.unknown == []


Story = tuple[WandbServer, Client, str]


def test_an_online_run_arrives_whole(story: Story) -> None:
    server, *_ = story
    run = server.runs["tester", "digits", "first"]
    assert run.config == {"lr": 0.1, "model": {"width": 8}}
    assert run.values("train/loss")[:5] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert (run.summary["best"], run.summary["train/loss"]) == (0.5, 0.2)
    assert (run.display_name, run.group, run.job_type) == ("a run", "g", "train")
    assert (run.tags, run.notes) == (["lab", "a"], "hello")
    assert run.events
    assert run.alerts == [{"title": "a title", "text": "a text", "severity": "WARN"}]
    assert run.files[run.values("picture")[0]["path"]].startswith(b"\x89PNG")
    assert b'"data":[[1,2],[3,4]]' in run.files[run.values("table")[0]["path"]]


def test_a_resumed_run_goes_on_without_gap_or_double_point(story: Story) -> None:
    server, *_ = story
    run = server.run("first")
    assert [row["_step"] for row in run.history] == list(range(12))
    assert [line for line in run.output if "wandb:" not in line] == ["starts at 0", "starts at 7"]
    assert (run.state, run.exit_code) == ("finished", 0)


def test_artifacts_have_versions_aliases_and_users(story: Story) -> None:
    server, _, said = story
    collection = server.artifacts["tester", "digits", "model"]
    assert collection.type == "model"
    first, second = collection.versions  # and none for the same contents once more
    assert (first.version, first.aliases, first.files) == (0, [], {"model.txt": b"weights 0"})
    assert (second.version, second.aliases) == (1, ["best", "good", "latest"])
    assert (second.metadata, second.logged_by) == ({"accuracy": 0.9}, "first")
    assert second.used_by == ["second"]
    assert "weights 7" in said
    assert server.artifact("run-first-table").type == "run_table"


def test_the_public_api_reads_what_has_arrived(story: Story) -> None:
    server, client, _ = story
    script = """
import json, wandb
api = wandb.Api()
run = api.run("tester/digits/first")
run.file("config.yaml").download()
artifact = api.artifact("digits/model:best")
print("RESULT", json.dumps({
    "name": run.name, "state": run.state, "config": run.config, "best": run.summary["best"],
    "history": run.history(keys=["train/loss"], pandas=False),
    "all": [row["_step"] for row in run.scan_history()],
    "scan": [row["train/loss"] for row in run.scan_history(keys=["train/loss"], page_size=3)],
    "files": sorted(file.name for file in run.files()),
    "python": run.metadata["python"],
    "runs": [r.id for r in api.runs("tester/digits", order="+created_at")],
    "chosen": [r.id for r in api.runs("tester/digits", {"config.lr.value": 0.1})],
    "logged": [a.name for a in run.logged_artifacts()],
    "used": [a.name for a in api.run("tester/digits/second").used_artifacts()],
    "version": artifact.version, "by": artifact.logged_by().id,
    "users": [r.id for r in artifact.used_by()], "artifact_files": [f.name for f in artifact.files()],
    "versions": [a.version for a in api.artifacts("model", "tester/digits/model")],
    "entity": api.default_entity, "projects": [p.name for p in api.projects("tester")],
}))
artifact.aliases.append("chosen")
artifact.save()
run.notes = "changed"
run.update()
"""
    out = client(*PYTHON, script)
    found = json.loads(out.partition("RESULT ")[2].splitlines()[0])
    run = server.run("first")
    assert (found["name"], found["state"], found["config"]) == ("a run", "finished", run.config)
    assert found["best"] == 0.5
    assert [row["train/loss"] for row in found["history"]] == run.values("train/loss")
    assert found["all"] == list(range(12))
    assert found["scan"] == run.values("train/loss")
    assert found["files"] == sorted(run.files)
    assert found["python"].startswith("CPython")
    assert (found["runs"], found["chosen"]) == (["first", "second"], ["first"])
    assert found["logged"] == ["model:v0", "run-first-table:v0", "model:v1"]
    assert found["used"] == ["model:v1"]
    assert (found["version"], found["by"], found["users"]) == ("v1", "first", ["second"])
    assert (found["artifact_files"], found["versions"]) == (["model.txt"], ["v1", "v0"])
    assert (found["entity"], found["projects"]) == ("tester", ["digits"])
    assert b"width: 8" in (client.folder / "config.yaml").read_bytes()
    assert server.artifact("model:chosen").version == 1
    assert run.notes == "changed"


def test_sync_uploads_an_offline_run_and_a_replay_changes_nothing(
    server: WandbServer, client: Client
) -> None:
    # With resume="allow" the client would append all rows once more, after those that are there.
    once = TRAIN.replace('resume="allow"', "")
    client(*PYTHON, once + MODEL + MEDIA, WANDB_MODE="offline")
    assert server.runs == {}
    (folder,) = (client.folder / "wandb").glob("offline-run-*")
    client(*WANDB, "sync", str(folder))
    run = server.run("first")
    before = (run.history, run.summary, run.config, sorted(run.files), run.state)
    assert [row["_step"] for row in run.history] == list(range(7))
    assert server.artifact("model:best").files == {"model.txt": b"weights 0"}
    client(*WANDB, "sync", "--include-synced", str(folder))
    assert (run.history, run.summary, run.config, sorted(run.files), run.state) == before


def test_a_wrong_key_and_an_unknown_entity_are_reported_by_the_client(
    server: WandbServer, client: Client
) -> None:
    said = client(*PYTHON, TRAIN, code=1, WANDB_API_KEY="wrong" * 8)
    assert "401" in said
    said = client(*PYTHON, TRAIN, code=1, WANDB_ENTITY="somebody")
    assert "entity somebody not found" in said
    assert API_KEY not in said
    assert server.runs == {}


def test_the_stop_button_reaches_the_run(server: WandbServer, client: Client) -> None:
    hurry = """
from wandb.sdk.lib.run_stopping import RunStopChecker
RunStopChecker.__init__.__kwdefaults__["poll_interval"] = 0.5  # 15 seconds else
"""
    logs_on = "import time\nwhile True: time.sleep(0.1); run.log({'x': 1})"
    process = client.start(*PYTHON, hurry + TRAIN + logs_on)
    wait_for(lambda: any(run.history for run in server.runs.values()))
    server.stop_run("first", agent=False)
    out, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert "KeyboardInterrupt" in out
    assert (server.run("first").state, server.run("first").exit_code) == ("failed", 255)


def test_a_silent_run_has_crashed(server: WandbServer) -> None:
    run = Run("tester", "digits", "silent", heartbeat=0.0)
    server.runs[run.key] = run
    assert ask(server) == 200
    assert run.state == "crashed"


# ── sweeps ───────────────────────────────────────────────────────────────────────────────────

TRIAL = """
import os, time, wandb
run = wandb.init(resume="allow")
run.log({"loss": run.config.lr})
if run.config.lr == 0.2 and not run.resumed:
    run.mark_preempting()
    run.finish(exit_code=143)
    os._exit(143)
while run.config.lr == 0.3:
    time.sleep(0.1)
"""
"""A trial that ends at once; with lr 0.2 only when it comes back, with lr 0.3 never."""
SWEEP = """
program: trial.py
method: grid
project: digits
name: a sweep
metric: {name: loss, goal: minimize}
parameters:
  lr: {values: [0.1, 0.4]}
  model: {parameters: {width: {value: 8}}}
"""


def start_sweep(server: WandbServer, client: Client, text: str) -> Sweep:
    """What `wandb sweep` has made of a file."""
    (client.folder / "trial.py").write_text(TRIAL)
    (client.folder / "sweep.yaml").write_text(text)
    assert "wandb agent tester/digits/" in client(*WANDB, "sweep", "sweep.yaml")
    (sweep,) = server.sweeps.values()
    assert sweep.state == "PENDING"
    return sweep


@pytest.mark.slow
def test_an_agent_runs_a_grid_to_its_end(server: WandbServer, client: Client) -> None:
    sweep = start_sweep(server, client, SWEEP)
    client(*WANDB, "agent", f"tester/digits/{sweep.id}")
    assert sweep.state == "FINISHED"
    assert [run.config for run in sweep.runs] == [
        {"lr": lr, "model": {"width": 8}} for lr in (0.1, 0.4)
    ]
    assert [(run.state, run.sweep) for run in sweep.runs] == [("finished", sweep.id)] * 2
    assert [run.values("loss") for run in sweep.runs] == [[0.1], [0.4]]
    script = f"""
import wandb
sweep = wandb.Api().sweep("tester/digits/{sweep.id}")
print(sweep.name, sweep.state, sweep.config["method"], sweep.expected_run_count)
print([run.id for run in sweep.runs], sweep.best_run().id, len(sweep.agents()))
print([s.id for s in wandb.Api().project("digits", "tester").sweeps()])
"""
    out = client(*PYTHON, script)
    ids = [run.id for run in sweep.runs]
    assert "a sweep FINISHED grid 2" in out
    assert f"{ids} {ids[0]} 1\n['{sweep.id}']" in out


@pytest.mark.slow
def test_a_preempted_run_comes_back_and_a_stopped_one_ends(
    server: WandbServer, client: Client
) -> None:
    sweep = start_sweep(server, client, SWEEP.replace("[0.1, 0.4]", "[0.2, 0.3]"))
    agent = client.start(*WANDB, "agent", f"tester/digits/{sweep.id}")
    wait_for(lambda: len(sweep.runs) == 2 and sweep.runs[1].history)
    server.stop_run(sweep.runs[1].id, client=False)
    out, _ = agent.communicate(timeout=PATIENCE_SECONDS)
    assert agent.returncode == 0, out
    first, second = sweep.runs
    assert (first.state, first.values("loss")) == ("finished", [0.2, 0.2])
    assert "--_wandb=" in out
    assert second.state == "running"  # SIGTERM has ended it without a word
    assert sweep.agents[0].runs == [first, first, second]


def test_sweeps_are_refused_and_cancelled(server: WandbServer, client: Client) -> None:
    (client.folder / "sweep.yaml").write_text(SWEEP.replace("grid", "guess"))
    said = client(*WANDB, "sweep", "sweep.yaml", code=1)
    assert "Invalid sweep config: method 'guess'" in said
    sweep = start_sweep(server, client, SWEEP)
    path = f"tester/digits/{sweep.id}"
    client(*WANDB, "sweep", "--cancel", path)
    assert sweep.state == "CANCELED"
    assert "Received exit command" in client(*WANDB, "agent", path)
    assert sweep.runs == []


def test_a_grid_has_every_combination_of_nested_parameters_once() -> None:
    parameters = yaml.safe_load("""
a: {values: [1, 2]}
b: {value: x}
c: {parameters: {d: {values: [null, true]}, e: {min: 1, max: 3, distribution: int_uniform}}}
f: {min: 0.0, max: 1.0, q: 0.5, distribution: q_uniform}
""")
    points = list(grid({"parameters": parameters}))
    assert points[0] == {"a": 1, "b": "x", "c": {"d": None, "e": 1}, "f": 0.0}
    assert points[-1] == {"a": 2, "b": "x", "c": {"d": True, "e": 3}, "f": 0.5}
    assert len({json.dumps(point) for point in points}) == len(points) == 2 * 2 * 3 * 2


def test_random_values_are_within_their_distributions() -> None:
    parameters = yaml.safe_load("""
a: {min: 1, max: 3, distribution: int_uniform}
b: {min: 0.001, max: 0.1, distribution: log_uniform_values}
c: {min: 0.0, max: 1.0, distribution: uniform}
d: {min: 32, max: 256, q: 32, distribution: q_log_uniform_values}
e: {values: [x, y], probabilities: [0, 1]}
f: {mu: 0, sigma: 1, distribution: normal}
""")
    config = {"method": "random", "parameters": parameters, "run_cap": 50}
    check_sweep(config)
    sweep = Sweep("tester", "digits", "s", config, "")
    points = [sweep.next_parameters() for _ in range(51)]
    assert points.pop() is None
    for point in points:
        assert point["a"] in (1, 2, 3)
        assert 0.001 <= point["b"] <= 0.1
        assert 0 <= point["c"] <= 1
        assert point["d"] % 32 == 0
        assert point["e"] == "y"
    with pytest.raises(GraphQLError, match="distribution zipf"):
        draw({"distribution": "zipf"}, sweep.random)


# ── faults ───────────────────────────────────────────────────────────────────────────────────


def test_faults_answer_with_a_status_for_some_kinds_of_requests(server: WandbServer) -> None:
    server.faults.status = 500
    assert [ask(server), ask(server, "storage/manifest/a", b"x")] == [500, 500]
    server.faults.set(status=429, only=("upload",))
    assert [ask(server), ask(server, "storage/manifest/a", b"x")] == [200, 429]
    server.faults.set(status=403, only=("Viewer",), requests=2)
    assert [ask(server) for _ in range(3)] == [403, 403, 200]
    server.faults.set(status=500, seconds=0.2)
    assert ask(server) == 500
    time.sleep(0.2)
    assert ask(server) == 200
    assert server.requests["Viewer"] == 7


def test_faults_delay_and_hang_and_refuse(server: WandbServer) -> None:
    server.faults.set(delay_seconds=0.3)
    start = time.monotonic()
    assert ask(server) == 200
    assert time.monotonic() - start >= 0.3
    server.faults.set(hang=True, seconds=0.3)
    start = time.monotonic()
    with pytest.raises(ConnectionError):
        ask(server)
    assert time.monotonic() - start >= 0.3
    server.faults.set(refuse=True, requests=1)
    with pytest.raises((ConnectionError, urllib.error.URLError)):
        ask(server)
    assert ask(server) == 200
    server.close()
    with pytest.raises(urllib.error.URLError, match="Connection refused"):
        ask(server)
    server.open()
    assert ask(server) == 200


def test_faults_cut_an_upload_in_the_middle(server: WandbServer) -> None:
    server.faults.set(cut_uploads=True, requests=1)
    with pytest.raises((ConnectionError, urllib.error.URLError)):
        ask(server, "storage/manifest/a", b"x" * 5_000_000)
    assert server.state.blobs == {}
    assert ask(server, "storage/manifest/a", b"x") == 200
    assert server.state.blobs == {"a": b"x"}


def test_the_client_survives_faults_without_loss(server: WandbServer, client: Client) -> None:
    server.faults.set(status=500, only=("file_stream", "upload"), requests=3)
    client(*PYTHON, TRAIN + MODEL)
    assert [row["_step"] for row in server.run("first").history] == list(range(5))
    assert server.artifact("model").files == {"model.txt": b"weights 0"}
    assert server.faults.requests == 0


def test_the_process_keeps_its_state_over_a_kill(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        client = Client(tmp_path, server)
        pause = "import time, pathlib\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)\n"
        process = client.start(*PYTHON, TRAIN + pause + "run.log({'train/loss': 0.0})")
        wait_for(lambda: any(run.history for run in server.state.runs.values()))
        server.kill()
        (tmp_path / "go").touch()
        time.sleep(1)
        server.start()
        counters = server.control(faults={"status": 500, "only": ["upload"], "requests": 1})
        out, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, out
        run = server.state.run("first")
        assert [row["_step"] for row in run.history] == list(range(6))
        assert run.state == "finished"
        assert server.control()["requests"]["upload"] > 1
        assert (counters["unknown"], counters["errors"]) == ([], [])


# ── the reader of GraphQL ────────────────────────────────────────────────────────────────────


def test_the_reader_answers_fields_aliases_arguments_fragments_and_directives() -> None:
    text = """
    query Q($n: Int!, $all: Boolean = false, $missing: String) {  # a comment
      again: thing(sizeInBytes: $n, name: $missing) { ...Part label @include(if: $all) }
      list { id ... on B { extra } }
      scalar
    }
    fragment Part on Thing { id, double: size }
    """
    root = {
        "thing": lambda size_in_bytes, name="unnamed": {
            "id": name,
            "size": size_in_bytes * 2,
            "label": "x",
        },
        "list": [{"__typename": "A", "id": 1}, {"__typename": "B", "id": 2, "extra": True}],
        "scalar": {"any": ["json"]},
    }
    assert execute(parse(text), {"n": 3}, root) == {
        "again": {"id": "unnamed", "double": 6},
        "list": [{"id": 1}, {"id": 2, "extra": True}],
        "scalar": {"any": ["json"]},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query { nonsense }", 'Cannot query field "nonsense" on type "Query"'),
        ("query { a ", "Syntax Error: expected None, found ''"),
        ("query { a ; }", "Syntax Error: unexpected ';'"),
    ],
)
def test_the_reader_refuses_what_it_does_not_know(text: str, message: str) -> None:
    with pytest.raises(GraphQLError, match=message):
        execute(parse(text), {}, {"__typename": "Query", "a": 1})
