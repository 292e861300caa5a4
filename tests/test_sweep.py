"""Whole sweeps: run, killed, interrupted, continued to the numbers of an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest
from conftest import Finished, Terminal

from mnist_wandb.display import describe_parameters, describe_seconds
from mnist_wandb.errors import ConfigError, SweepError
from mnist_wandb.loading import load_config
from mnist_wandb.runs import RunFolder
from mnist_wandb.settings import load_settings
from mnist_wandb.sweep import SweepOptions, SweepOutcome, plan_workers, run_sweep
from mnist_wandb.sweepfile import load_sweep

COMMAND = "program: mnist-wandb\ncommand:\n  - ${env}\n  - ${program}\n  - run\n"
# Dropout and momentum are on: all randomness and all state must come back. Two trials diverge.
SWEEP = f"""
name: killed
method: grid
metric: {{name: best/val_accuracy, goal: maximize}}
{COMMAND}  - model.name=mlp_dropout
  - optimizer.name=sgd
  - training.epochs=8
  - training.batch_size=8
  - tracking.mode=disabled
  - ${{args_no_hyphens}}
parameters:
  optimizer.lr: {{values: [0.02, 1000]}}
  seed: {{values: [0, 1]}}
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mnist_wandb", "sweep", "run", "mine.yaml", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """The outcome of a sweep that ends well, and what it says on stderr."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out), err


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that were forked from the one that has imported torch."""
    return [pid for template in template_of(process) for pid in children_of(template)]


def template_of(process: subprocess.Popen[str]) -> list[int]:
    children = children_of(process.pid)
    return [pid for pid in children if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], Any], timeout: float = 120) -> Any:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("timed out")


def run_under_way(step: int = 200) -> Path | None:
    """A run folder that has got beyond a step and has not ended."""
    for path in Path("runs").glob("killed-*/*/metrics.jsonl"):
        lines = path.read_text().splitlines()
        ended = (path.parent / "summary.json").exists()
        if not ended and len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
            return path.parent
    return None


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def numbers(folder: Path) -> dict[str, Any]:
    """Everything that has to be the same: each point's end, and its metrics row by row."""
    found = {}
    for path in folder.glob("*/config.yaml"):
        rows = RunFolder(path.parent).read_metrics()
        for row in rows:
            row.pop("train/images_per_second", None)
        status = json.loads((path.parent / "summary.json").read_text())["status"]
        config = load_config(str(path))
        found[f"lr {config.optimizer.lr}, seed {config.seed}"] = (status, rows)
    assert len(found) == 4
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The sweep that nothing has happened to: outcome as JSON, and its numbers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "mine.yaml").write_text(SWEEP)
    done = subprocess.run(
        [sys.executable, "-m", "mnist_wandb", "sweep", "run", "mine.yaml", "--workers=2", "--json"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    return {
        "folder": folder,
        "outcome": outcome,
        "stderr": done.stderr,
        "numbers": numbers(folder / outcome["folder"]),
    }


def test_a_sweep_runs_every_point_and_records_what_diverged(undisturbed: dict[str, Any]) -> None:
    outcome = undisturbed["outcome"]
    assert (outcome["status"], outcome["num_run"], outcome["num_points"]) == ("finished", 4, 4)
    assert outcome["counts"] == {
        "waiting": 0, "running": 0, "finished": 2, "stopped": 0, "failed": 2,
    }  # fmt: skip
    trials = outcome["trials"]
    assert [t["parameters"] for t in trials] == [
        {"optimizer.lr": lr, "seed": seed} for lr in (0.02, 1000) for seed in (0, 1)
    ]
    assert [t["state"] for t in trials] == ["finished", "finished", "failed", "failed"]
    for trial in trials[2:]:
        assert "training diverged at step" in trial["error"]
    assert outcome["best"]["value"] == max(t["value"] for t in trials[:2])
    lines = undisturbed["stderr"].splitlines()
    assert sum("finished" in line for line in lines) == 2
    assert sum("training diverged" in line for line in lines) == 2


def test_each_trial_is_an_ordinary_run(undisturbed: dict[str, Any]) -> None:
    for trial in undisturbed["outcome"]["trials"]:
        run = undisturbed["folder"] / trial["run_dir"]
        assert run.name.endswith(f"-{trial['run_id']}")
        summary = json.loads((run / "summary.json").read_text())
        environment = json.loads((run / "environment.json").read_text())
        assert summary["seed"] == trial["parameters"]["seed"]
        assert environment["sweep_id"] == run.parent.name
        assert environment["num_threads"] == 1  # there were two workers
        assert "group: killed" in (run / "config.yaml").read_text()
        if trial["state"] == "finished":
            assert summary["status"] == "finished"
            assert summary["metrics"]["best/val_accuracy"] == trial["value"]
            assert "test/accuracy" in summary["metrics"]
        else:
            assert summary["status"] == "diverged"


def test_a_trial_is_found_by_its_id_as_any_run(
    undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Finished]
) -> None:
    monkeypatch.chdir(undisturbed["folder"])
    best = undisturbed["outcome"]["best"]
    done = cli("evaluate", best["run_id"], "--split", "val", "--json")
    assert json.loads(done.out)["metrics"]["val/accuracy"] == best["value"]
    assert cli("evaluate", "latest").code == 2  # a sweep's trials are none of one's own runs


def test_its_runs_are_compared_by_its_file_name_or_id(
    undisturbed: dict[str, Any], cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(undisturbed["folder"])
    folder = Path(undisturbed["outcome"]["folder"])
    by_folder = cli("compare", str(folder), "--json")
    assert by_folder.code == 0, by_folder.err
    assert json.loads(by_folder.out)["groups"]
    for sweep in ("mine.yaml", folder.name, load_sweep("mine.yaml").name):
        assert cli("compare", sweep, "--json") == by_folder


def test_a_finished_sweep_has_nothing_left_to_do_and_says_its_status(
    undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Finished]
) -> None:
    monkeypatch.chdir(undisturbed["folder"])
    again = cli("sweep", "run", "mine.yaml", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["num_run"] == 0
    status = cli("sweep", "status", "mine.yaml", "--json")
    found = json.loads(status.out)
    assert found["trials"] == undisturbed["outcome"]["trials"]
    assert found["seconds_left"] == 0
    shown = cli("sweep", "status", "mine.yaml").out
    assert "killed: grid, 4 points; 2 finished, 2 failed" in shown
    assert "trial 2 failed: training diverged at step" in shown
    assert "optimizer.lr=0.02 seed=0" in shown


def test_kills_of_a_worker_and_of_the_parent_change_no_number(
    undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = Path(tempfile.mkdtemp(prefix="sweep-"))  # short: a socket's name goes there
    monkeypatch.setenv("TMPDIR", str(temporary))
    Path("mine.yaml").write_text(SWEEP)
    process = start("--workers=1")
    run = wait_until(run_under_way)
    (worker,) = workers_of(process)
    os.kill(worker, signal.SIGKILL)  # the parent starts another one, which goes on
    (successor,) = wait_until(lambda: [p for p in workers_of(process) if p != worker])
    assert not (run / "summary.json").exists()
    wait_until(lambda: run_under_way(600))
    process.kill()
    _, err = process.communicate()
    assert "its worker ended (exit code -9); it goes on" in err
    wait_until(lambda: not is_running(successor), timeout=30)  # it dies with its parent
    ended = {
        path: path.stat().st_mtime_ns
        for path in Path("runs").glob("killed-*/*/summary.json")
        if json.loads(path.read_text())["status"] == "finished"
    }
    process = start("--workers=1", "--json")
    outcome, err = finish(process)
    assert outcome["counts"] == undisturbed["outcome"]["counts"]
    assert numbers(Path(outcome["folder"])) == undisturbed["numbers"]
    for path, changed in ended.items():  # what had ended is left alone
        assert path.stat().st_mtime_ns == changed
    wait_until(lambda: not list(temporary.glob("mnist-wandb-*")), timeout=30)
    shutil.rmtree(temporary)


def test_workers_start_by_themselves_where_none_can_be_forked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    temporary = Path("long" * 20, "name" * 20).absolute()
    temporary.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(temporary))
    Path("mine.yaml").write_text(SWEEP)
    outcome, _ = finish(start("--workers=1", "--count=1", "--json"))
    assert outcome["counts"]["finished"] == 1
    assert not list(temporary.glob("mnist-wandb-*"))


def test_a_killed_process_that_workers_are_forked_from_is_replaced(
    undisturbed: dict[str, Any],
) -> None:
    Path("mine.yaml").write_text(SWEEP)
    process = start("--workers=2", "--json")
    wait_until(run_under_way)
    os.kill(template_of(process)[0], signal.SIGKILL)
    outcome, err = finish(process)
    assert "its worker ended" in err
    assert "another process" not in err
    assert outcome["counts"] == undisturbed["outcome"]["counts"]
    assert numbers(Path(outcome["folder"])) == undisturbed["numbers"]


def test_workers_start_though_the_process_that_they_wait_for_is_killed(
    undisturbed: dict[str, Any],
) -> None:
    Path("mine.yaml").write_text(SWEEP)
    process = start("--workers=1", "--json")
    (template,) = wait_until(lambda: template_of(process))
    os.kill(template, signal.SIGSTOP)  # else it may be ready already
    time.sleep(3)  # until the first worker waits for it
    os.kill(template, signal.SIGKILL)
    outcome, _ = finish(process)
    assert numbers(Path(outcome["folder"])) == undisturbed["numbers"]


def statuses() -> list[str]:
    """How the runs have ended so far."""
    paths = Path("runs").glob("killed-*/*/summary.json")
    return [json.loads(path.read_text())["status"] for path in paths]


def test_a_trial_is_put_back_before_another_worker_can_take_it(undisturbed: dict[str, Any]) -> None:
    Path("mine.yaml").write_text(SWEEP)
    process = start("--workers=2", "--json")
    wait_until(run_under_way)
    os.kill(process.pid, signal.SIGSTOP)  # a parent that is slow to hear what has happened
    os.kill(workers_of(process)[1], signal.SIGTERM)
    wait_until(lambda: sorted(statuses()) == ["finished", "interrupted"])
    time.sleep(1)  # until both have said so
    os.kill(process.pid, signal.SIGCONT)
    outcome, err = finish(process)
    assert "put back" in err
    assert "another process" not in err
    assert outcome["counts"] == undisturbed["outcome"]["counts"]
    assert numbers(Path(outcome["folder"])) == undisturbed["numbers"]


def test_a_worker_that_died_after_its_trial_is_given_no_other(undisturbed: dict[str, Any]) -> None:
    Path("mine.yaml").write_text(SWEEP)
    process = start("--workers=1", "--json")
    wait_until(run_under_way)
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: statuses() == ["finished"])
    time.sleep(1)  # until it has said so
    (worker,) = workers_of(process)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not workers_of(process))
    time.sleep(0.5)  # until its end has been passed on
    os.kill(process.pid, signal.SIGCONT)
    outcome, err = finish(process)
    assert "its worker ended" not in err
    assert numbers(Path(outcome["folder"])) == undisturbed["numbers"]


def test_trials_are_saved_where_the_database_is_lost(undisturbed: dict[str, Any]) -> None:
    Path("mine.yaml").write_text(SWEEP)
    process = start("--workers=1", "--json")
    run = wait_until(run_under_way)
    (database,) = Path("runs").glob("killed-*/sweep.db")
    kept = database.read_bytes()
    database.write_bytes(b"?" * len(kept))
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("error: --storage sqlite:")
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    database.write_bytes(kept)
    outcome, _ = finish(start("--workers=1", "--json"))
    assert numbers(Path(outcome["folder"])) == undisturbed["numbers"]


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_by_others_is_replaced(undisturbed: dict[str, Any]) -> None:
    Path("mine.yaml").write_text(SWEEP)
    process = start("--workers=1", "--json")
    wait_until(run_under_way)
    os.kill(workers_of(process)[0], signal.SIGTERM)
    outcome, err = finish(process)
    assert "put back" in err
    assert outcome["num_run"] == 4
    assert numbers(Path(outcome["folder"])) == undisturbed["numbers"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_puts_its_trials_back_and_goes_on(
    undisturbed: dict[str, Any], number: int
) -> None:
    Path("mine.yaml").write_text(SWEEP)
    process = start("--workers=2", "--json")
    run = wait_until(run_under_way)
    os.killpg(process.pid, number)  # as a terminal does it: to the workers as well
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    outcome = json.loads(out)
    assert outcome["status"] == "interrupted"
    assert outcome["counts"]["waiting"] >= 1
    assert outcome["counts"]["running"] == 0
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    process = start("--workers=1", "--json")
    outcome, err = finish(process)
    assert outcome["counts"] == undisturbed["outcome"]["counts"]
    assert numbers(Path(outcome["folder"])) == undisturbed["numbers"]


# ── limits ───────────────────────────────────────────────────────────────────────────────────


def run_here(text: str, **options: Any) -> tuple[SweepOutcome, list[Any]]:
    """Run a sweep with this process as the parent."""
    Path("mine.yaml").write_text(text)
    news: list[Any] = []
    outcome = run_sweep(
        load_sweep("mine.yaml"),
        load_settings(),
        SweepOptions(**{"num_workers": 1, **options}),
        show=lambda progress, new: news.append(new),
    )
    return outcome, [new for new in news if new is not None]


FAST = f"metric: {{name: val/accuracy, goal: maximize}}\n{COMMAND}  - data.train_size=200\n"
FAST += "  - model.name=linear\n  - ${args_no_hyphens}\n"


def test_failures_in_a_row_end_a_sweep() -> None:
    text = f"method: grid\n{FAST}parameters:\n  data.train_size: {{min: 100000, max: 100009}}\n"
    outcome, news = run_here(text, max_failures=3)
    assert (outcome.status, outcome.reason) == ("failed", "3 trials in a row failed")
    assert [record.state for record in outcome.records] == ["failed"] * 3
    assert "data.train_size" in str(outcome.records[0].error)
    assert len(news) == 3


def test_hyperband_stops_the_worse_trial_and_count_limits_a_call() -> None:
    text = (
        f"method: grid\n{FAST}early_terminate: {{type: hyperband, min_iter: 1, eta: 3}}\n"
        "parameters:\n  training.epochs: {value: 9}\n  optimizer.lr: {values: [0.01, 1.0e-9, 1.0e-8]}\n"
        "  tracking.mode: {value: offline}\n"
    )
    outcome, _ = run_here(text, count=2)
    assert outcome.num_run == 2
    states = [record.state for record in outcome.records]
    assert states == ["finished", "stopped"]
    assert outcome.records[1].value is not None
    assert outcome.records[1].value < (outcome.records[0].value or 0)
    (run,) = outcome.folder.glob(f"*-{outcome.records[1].run_id}")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["epochs"] == 2  # the second value is that of band 1, counted from 0
    assert "test/accuracy" not in summary["metrics"]
    assert (run / "checkpoints" / "best.pt").exists()
    record = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", summary["wandb"]["dir"]],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert '"mine"' in record  # the group


@pytest.mark.slow
def test_a_random_sweep_without_end_ends_at_its_target() -> None:
    text = f"method: random\n{FAST}parameters:\n  seed: {{min: 0, max: 999}}\n"
    outcome, _ = run_here(text.replace("goal: maximize", "goal: maximize, target: 0.3"))
    assert (outcome.status, outcome.num_run) == ("finished", 1)


@pytest.mark.parametrize(
    ("options", "available", "left", "expected"),
    [
        ({"num_workers": 2}, ["cpu"], None, [("cpu", 1), ("cpu", 1)]),
        ({"num_workers": 2}, ["cpu"], 1, [("cpu", None)]),
        ({}, ["cpu", "cuda", "cuda:0", "cuda:1"], None, [("cuda:0", None), ("cuda:1", None)]),
        ({"num_workers": 3}, ["cpu", "cuda", "cuda:0", "cuda:1"], None,
         [("cuda:0", None), ("cuda:1", None), ("cuda:0", None)]),
        ({"devices": ("cpu",), "num_workers": 2}, ["cpu", "cuda", "cuda:0"], None,
         [("cpu", 1), ("cpu", 1)]),
        ({}, ["cpu", "mps"], None, [("mps", None)]),
    ],
)  # fmt: skip
def test_workers_are_planned_by_what_there_is(
    options: dict[str, Any], available: list[str], left: int | None, expected: list[Any]
) -> None:
    assert plan_workers(SweepOptions(**options), available, left) == expected


def test_a_missing_device_is_told() -> None:
    with pytest.raises(
        ConfigError, match="--devices: cuda:7 is not on this machine; available: cpu"
    ):
        plan_workers(SweepOptions(devices=("cuda:7",)), ["cpu"], None)


# ── the commands ─────────────────────────────────────────────────────────────────────────────


def test_check_prints_commands_as_an_agent_builds_them(cli: Callable[..., Finished]) -> None:
    done = cli("sweep", "check", "quick")
    assert done.code == 0
    assert done.out.splitlines()[:2] == [
        "sweeps/quick.yaml: grid, 6 points; all of them valid",
        "  /usr/bin/env mnist-wandb run --config=quickstart training.epochs=5 model.name=linear seed=0",
    ]
    facts = json.loads(cli("sweep", "check", "quick", "--json").out)
    assert (facts["valid"], facts["num_points"], facts["num_validated"]) == (True, 6, 6)


def test_check_and_run_refuse_a_wrong_file_with_exit_code_2(cli: Callable[..., Finished]) -> None:
    Path("mine.yaml").write_text("method: grid\nparameters:\n  lr: {values: ['0.1']}\n")
    for command in ("check", "run"):
        done = cli("sweep", command, "mine.yaml")
        assert done.code == 2
        assert "error: mine.yaml:3:17: the text '0.1' looks like a number" in done.err
        assert done.out == ""
    facts = json.loads(cli("sweep", "check", "mine.yaml", "--json").out)
    assert not facts["valid"]
    assert (facts["problems"][0]["line"], facts["problems"][0]["column"]) == (3, 17)
    assert list(Path().glob("runs*")) == []


def test_status_of_a_sweep_that_has_not_run_says_how_to_start_it(
    cli: Callable[..., Finished],
) -> None:
    done = cli("sweep", "status", "quick")
    assert done.code == 2
    assert "this sweep has not been run here (no runs/quick-" in done.err
    assert list(Path().glob("runs*")) == []


def test_the_schema_of_sweep_files_is_printed(cli: Callable[..., Finished]) -> None:
    assert json.loads(cli("schema", "sweep").out)["title"] == "W&B sweep file for mnist-wandb"
    assert "error: schema: got 'nonsense', allowed: run, sweep" in cli("schema", "nonsense").err


def test_a_runs_folder_that_cannot_be_written_is_told(
    cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("MNIST_WANDB_RUNS_DIR", "file")
    done = cli("sweep", "run", "quick")
    assert done.code == 2
    assert "a sweep's folder cannot be made there" in done.err


def test_a_worker_that_cannot_start_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_wandb.sweep.work", os.abort)
    monkeypatch.setattr("mnist_wandb.sweep.MOST_BROKEN_STARTS", 1)
    with pytest.raises(SweepError, match="worker processes end before they have begun"):
        run_here(f"method: grid\n{FAST}parameters: {{seed: {{value: 1}}}}\n")


# ── the display ──────────────────────────────────────────────────────────────────────────────


def test_the_live_table_shows_workers_and_what_they_do(terminal: Terminal) -> None:
    Path("mine.yaml").write_text(f"method: grid\n{FAST}parameters: {{seed: {{min: 0, max: 9}}}}\n")
    child = terminal("sweep", "run", "mine.yaml", "--workers", "1")
    child.expect("mine: 0/10")
    child.expect("starting")
    child.expect(r"trial 0 +finished +0\.\d{4}")
    child.expect("about .* left")
    child.expect("mine: grid, 10 points; 10 finished")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_parameters_and_durations_are_shown_briefly() -> None:
    parameters = {"optimizer": {"lr": 0.00123456, "name": "adam"}, "model.hidden_sizes": [64, 32]}
    assert (
        describe_parameters(parameters)
        == "optimizer.lr=0.001235 optimizer.name=adam model.hidden_sizes=[64, 32]"
    )
    assert [describe_seconds(s) for s in (5.4, 300, 7200)] == ["5 s", "5 min", "2.0 h"]
