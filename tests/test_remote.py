"""Runs that are compared from a W&B server: real online runs, read with the real client."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished
from test_agent import RUN, end_of, small_sweep, start_agent
from test_agent import SHORT as SHORT_TRIAL
from test_wandb_server import Client
from wandb_server import WandbServer
from wandb_state import Run

from mnist_wandb.remote import JOB_TYPES, RUNS_PER_PAGE

PACKAGE = Path(__file__).parents[1] / "mnist_wandb"
PROJECT = ("--wandb", "team/lab")
TRACKED = (
    "training.epochs=2",
    "data.train_size=200",
    "tracking.entity=team",
    "tracking.project=lab",
    "tracking.sample_predictions=0",
    "tracking.job_type=teaching",
)
RUNS = [
    *([f"model.name={m}", f"seed={s}"] for m in ("linear", "mlp_128") for s in (0, 1)),
    ["model.name=linear", "data.val_fraction=0.3"],
    ["model.name=mlp_64x3", "optimizer={'name': 'sgd', 'lr': 1000}", "schedule.name=constant",
     "tracking.log_every_steps=1"],
]  # fmt: skip
SEVERAL = """
import json, sys
import wandb
from mnist_wandb.cli import main
codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
wandb.init(entity="team", project="lab", id="elsewhere", name="other", config={"lr": 0.1}).finish()
sys.exit(codes != [0, 0, 0, 0, 0, 1, 0, 0])
"""
"""Several commands in one process, which is faster, and a run of another program."""


@dataclass(frozen=True)
class Lab:
    """A server with the project team/lab, and a folder with the same runs."""

    server: WandbServer
    folder: Path

    def copy_runs(self, project: str, *changes: Callable[[Run], object]) -> list[Run]:
        """A new project: the first run, once for each change, with seeds from 0."""
        first = min(
            (run for key, run in self.server.runs.items() if key[:2] == ("team", "lab")),
            key=lambda run: run.created,
        )
        copies = []
        self.server.state.projects.append(("team", project))
        for number, change in enumerate(changes):
            run = copy.deepcopy(first)
            run.project, run.id, run.created = project, f"{project}{number:03}", number
            run.raw_config["seed"]["value"] = number
            change(run)
            self.server.runs[run.key] = run
            copies.append(run)
        return copies


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MNIST_WANDB_"))}
    commands = [["run", "--quiet", *TRACKED, *overrides] for overrides in RUNS]
    commands += [["explore", *TRACKED], ["check", *TRACKED, "model.name=linear"]]
    with WandbServer() as server:
        subprocess.run(
            [sys.executable, "-c", SEVERAL, json.dumps(commands)],
            cwd=folder,
            check=True,
            env={**kept, **server.env(), "OMP_NUM_THREADS": "1", "HOME": str(folder)},
            stdout=subprocess.DEVNULL,
        )
        yield Lab(server, folder)
    assert server.unknown == []


@pytest.fixture
def compare(
    lab: Lab, program: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Finished]:
    """`mnist-wandb compare` where the server and the folder are found."""
    for name, value in lab.server.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MNIST_WANDB_RUNS_DIR", str(lab.folder / "runs"))
    return lambda *arguments, **environment: program("compare", *arguments, **environment)


def content_of(done: Finished) -> dict[str, Any]:
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def without_location(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**group, "runs": [{**run, "location": None} for run in group["runs"]]} for group in groups
    ]


# ── the same as from the folders ─────────────────────────────────────────────────────────────


def test_a_project_gives_the_groups_and_tests_that_the_folders_give(
    lab: Lab, compare: Callable[..., Finished]
) -> None:
    remote, local = (content_of(compare("--json", *source)) for source in (PROJECT, ()))
    assert without_location(remote["groups"]) == without_location(local["groups"])
    assert [group["n"] for group in remote["groups"]] in ([2, 2, 1], [2, 1, 2], [1, 2, 2])
    for name in ("metric", "test_metric", "lower_is_better", "warnings"):
        assert remote[name] == local[name], name
    assert any(warning.startswith("data.val_fraction: ") for warning in remote["warnings"])
    for group in remote["groups"]:
        assert group["test"]["mean"] > 0.1
        for run in group["runs"]:
            assert run["location"] == f"{lab.server.url}/team/lab/runs/{run['run_id']}"


def test_seeds_are_tested_and_why_images_are_not_is_said(compare: Callable[..., Finished]) -> None:
    best = ("--group-by", "model.name", "--json")
    remote, local = (content_of(compare(*source, *best)) for source in (PROJECT, ()))
    (pair,), (expected,) = remote["pairs"], local["pairs"]
    assert pair["seeds"] == expected["seeds"]
    assert pair["words"][0] == expected["words"][0]
    assert (pair["images"], len(expected["images"])) == ([], 2)
    assert re.fullmatch(
        r"digits-\w+ \(\w{8}\) has no predictions of test images at hand: they stay in the run"
        r" folder; compare the folders for this test",
        pair["note"],
    )
    assert "no test on images: digits-" in compare(*PROJECT).out


def test_the_table_and_the_csv_are_the_same(compare: Callable[..., Finished]) -> None:
    remote, local = (compare("--csv", *source) for source in (PROJECT, ()))
    assert remote.out == local.out
    assert len(list(csv.DictReader(io.StringIO(remote.out)))) == 3
    remote, local = (compare("--metric", "val/loss", *source) for source in (PROJECT, ()))
    tables = [done.out.partition("A and B over seeds")[0] for done in (remote, local)]
    assert tables[0] == tables[1]


def test_what_cannot_be_compared_is_named_and_jobs_are_passed_over(
    lab: Lab, compare: Callable[..., Finished]
) -> None:
    done = compare(*PROJECT)
    assert done.code == 0, done.err
    left_out = [line for line in done.err.splitlines() if line.startswith("left out: ")]
    diverged = next(run for run in lab.server.runs.values() if run.state == "failed")
    assert left_out == [
        "left out: other (elsewhere): finished: has no configuration of mnist-wandb (data, model,"
        " optimizer, schedule, training)",
        f"left out: digits-mlp_64x3 ({diverged.id}): diverged: its log says why:"
        f" {lab.server.url}/team/lab/runs/{diverged.id}/logs",
    ]
    jobs = {run.job_type for run in lab.server.runs.values()} & set(JOB_TYPES)
    assert jobs == {"explore", "check"}


def test_every_job_that_trains_nothing_is_known() -> None:
    source = "".join(path.read_text() for path in PACKAGE.glob("*.py"))
    made = re.findall(r'(?:open_job|_open_model)\(.*?"(\w+)"', source)
    assert sorted(made) == sorted(JOB_TYPES)


def test_the_facts_that_decide_on_comparability_are_in_the_summary(lab: Lab) -> None:
    for path in (lab.folder / "runs").glob("*/environment.json"):
        environment = json.loads(path.read_text())
        facts = lab.server.run(path.parent.name[-8:]).summary["environment"]
        assert len(facts["data_fingerprint"]) == 64
        assert facts["versions"]["torch"]
        assert facts.items() <= environment.items()


# ── pages, states, facts ─────────────────────────────────────────────────────────────────────


def test_more_runs_than_a_page_are_all_read(lab: Lab, compare: Callable[..., Finished]) -> None:
    count = 2 * RUNS_PER_PAGE + 3
    lab.copy_runs("many", *[lambda run: None] * count)
    before = lab.server.requests["Runs"]
    (group,) = content_of(compare("--wandb", "team/many", "--json"))["groups"]
    assert group["n"] == count
    assert sorted(run["seed"] for run in group["runs"]) == list(range(count))
    assert lab.server.requests["Runs"] - before == 3


def test_runs_that_have_not_ended_or_are_damaged_are_named(
    lab: Lab, compare: Callable[..., Finished]
) -> None:
    def run_on(run: Run) -> None:  # with the summary of an earlier session
        run.state, run.summary["status"] = "running", "interrupted"

    def crash(run: Run) -> None:
        run.state = "crashed"
        del run.summary["status"]

    def wait(run: Run) -> None:
        run.state, run.raw_config, run.summary = "pending", {"model.name": {"value": "linear"}}, {}

    lab.copy_runs(
        "odd",
        lambda run: None,
        run_on,
        crash,
        wait,
        lambda run: run.summary.update(status="interrupted"),
        lambda run: run.summary.pop("num_parameters"),
        lambda run: run.raw_config["training"]["value"].update(epochs="many"),
        lambda run: run.raw_config.update({"model.name": {"value": "cnn_small"}}),  # a sweep does
    )
    found = content_of(compare("--wandb", "team/odd", "--json"))
    assert [run["run_id"] for group in found["groups"] for run in group["runs"]] == [
        "odd000",
        "odd007",
    ]
    reasons = {item["run"][-7:-1]: (item["status"], item["reason"]) for item in found["left_out"]}
    assert reasons == {
        "odd001": ("unfinished", "running in W&B, without a summary of its end"),
        "odd002": ("unfinished", "crashed in W&B, without a summary of its end"),
        "odd003": ("pending", "has no configuration of mnist-wandb (data, model, optimizer,"
                   " schedule, training)"),
        "odd004": ("interrupted", "stopped before its end"),
        "odd005": ("damaged", "its summary is not that of a run of mnist-wandb"),
        "odd006": ("damaged", "its configuration is not understood: training.epochs: got the text"
                   " 'many', expected a number"),
    }  # fmt: skip


def test_other_data_and_versions_give_a_warning_and_unknown_ones_do_not_pretend(
    lab: Lab, compare: Callable[..., Finished]
) -> None:
    lab.copy_runs(
        "facts",
        lambda run: run.summary["environment"].update(data_fingerprint="x"),
        lambda run: run.summary["environment"]["versions"].update(torch="1.0"),
    )
    warnings = content_of(compare("--wandb", "team/facts", "--json"))["warnings"]
    assert [warning.partition(":")[0] for warning in warnings] == [
        "data fingerprint",
        "version of torch",
    ]
    lab.copy_runs("bare", *[lambda run: run.summary.pop("environment")] * 2)
    assert content_of(compare("--wandb", "team/bare", "--json"))["warnings"] == []
    lab.copy_runs("half", lambda run: None, lambda run: run.summary.pop("environment"))
    warnings = content_of(compare("--wandb", "team/half", "--json"))["warnings"]
    assert not any(warning.startswith("data fingerprint") for warning in warnings)
    assert any("unknown (1 run)" in warning for warning in warnings)


# ── sweeps ───────────────────────────────────────────────────────────────────────────────────


def test_the_runs_of_an_agent_are_compared_by_their_sweep(tmp_path: Path) -> None:
    with WandbServer() as server:
        client = Client(tmp_path / "work", server)
        sweep = small_sweep(
            client,
            server,
            (*RUN, *SHORT_TRIAL, "${args}"),
            **{
                "model.name": {"values": ["linear", "mlp_64x3"]},
                "optimizer": {"parameters": {"name": {"value": "sgd"}, "lr": {"value": 0.05}}},
            },
        )
        end_of(start_agent(client, sweep))
        assert "model.name" in sweep.runs[0].config  # besides the configuration itself
        other = copy.deepcopy(sweep.runs[0])
        other.id, other.sweep = "noSweep1", None
        server.runs[other.key] = other
        program = (sys.executable, "-m", "mnist_wandb", "compare", "--json")
        path = f"tester/mnist-wandb/sweeps/{sweep.id}"
        remote, local = (
            json.loads(client(*program, *source)) for source in (["--wandb", path], [sweep.id])
        )
        assert without_location(remote["groups"]) == without_location(local["groups"])
        assert [list(group["parameters"]) for group in remote["groups"]] == [["model.name"]] * 2
    assert server.unknown == []


# ── what is refused ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("team",), "--wandb: got 'team', expected ENTITY/PROJECT or ENTITY/PROJECT/sweeps/ID"),
        (("team/lab/abc",), "--wandb: got 'team/lab/abc', expected ENTITY/PROJECT or "),
        (("https://wandb.ai/team/lab",), "--wandb: got 'https://wandb.ai/team/lab', expected "),
        (("team/lab", "latest"), "--wandb team/lab and latest: choose one, runs in W&B or folders"),
        (("team/nothing",), "W&B (SERVER): there is no project team/nothing that this API key may"),
        (("nobody/lab",), "W&B (SERVER): there is no project nobody/lab that this API key may see"),
        (("team/lab/sweeps/x1",), "W&B (SERVER): there is no sweep x1 in team/lab that this API"),
        (("team/empty",), "--wandb team/empty: no training runs are there"),
    ],
)
def test_a_wrong_source_is_one_line(
    lab: Lab, compare: Callable[..., Finished], arguments: tuple[str, ...], message: str
) -> None:
    lab.copy_runs("empty")
    done = compare("--wandb", *arguments)
    (line,) = done.err.splitlines()
    assert (done.code, done.out) == (2, "")
    assert line.startswith(f"error: {message}".replace("SERVER", lab.server.url))


def test_a_project_without_finished_runs_says_so(
    lab: Lab, compare: Callable[..., Finished]
) -> None:
    (run,) = lab.copy_runs("early", lambda run: setattr(run, "state", "running"))
    done = compare("--wandb", "team/early")
    assert (done.code, done.err.splitlines()) == (
        2,
        [
            "error: no finished run among the 1 given",
            f"error: digits-linear ({run.id}): unfinished: running in W&B, without a summary of"
            " its end",
        ],
    )


def test_without_a_key_or_a_server_it_is_one_line(
    lab: Lab, compare: Callable[..., Finished]
) -> None:
    url = lab.server.url
    cases: list[tuple[dict[str, str], str]] = [
        ({"WANDB_API_KEY": ""}, "error: W&B: no API key found; log in with `wandb login` or set"),
        ({"WANDB_API_KEY": "0" * 40}, f"error: W&B ({url}): "),
        ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, "error: W&B (http://127.0.0.1:9): http://127.0"),
    ]
    for environment, message in cases:
        done = compare(*PROJECT, **environment)
        assert (done.code, done.out) == (2, "")
        (line,) = done.err.splitlines()
        assert line.startswith(message)


@pytest.mark.slow
def test_a_silent_server_ends_it_in_limited_time(
    lab: Lab, compare: Callable[..., Finished]
) -> None:
    lab.server.faults.set(hang=True)
    started = time.monotonic()
    done = compare(*PROJECT)
    lab.server.faults.clear()
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert done.err.startswith(f"error: W&B ({lab.server.url}): ")
    assert time.monotonic() - started < 60
