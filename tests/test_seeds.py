"""`run --seeds N`: N ordinary runs in one group, and what they say together."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished
from scipy import stats
from wandb_server import WandbServer

import mnist_wandb.experiment
import mnist_wandb.seeds
from mnist_wandb import run_seeds
from mnist_wandb.loading import load_config
from mnist_wandb.runs import RunFolder, list_runs
from mnist_wandb.settings import load_settings

Cli = Callable[..., Finished]
PLAIN = (
    *("model.name=mlp_64x3", "training.label_smoothing=0", "tracking.log_every_steps=4"),
    *("data.augment.rotation_degrees=0", "data.augment.translate_pixels=0", "data.augment.zoom=0"),
)
"""The quickstart without random draws, so that its seeds can train together."""
FAST = (*PLAIN, "tracking.mode=disabled", "training.epochs=2", "data.train_size=200")
SUMMARY_KEYS = ["status", "group", "seeds", "runs", "metrics"]
TIMED = "train/images_per_second"


def run_json(cli: Cli, *arguments: str, code: int = 0) -> dict[str, Any]:
    done = cli("run", "--json", *arguments)
    assert done.code == code, done.err
    return dict(json.loads(done.out))


def rows_of(run: Path | str) -> list[dict[str, Any]]:
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != TIMED} for line in lines]


# ── N runs and their means ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("together", ["yes", "no"])
def test_means_deviations_and_intervals_are_those_of_numpy_and_scipy(
    together: str, cli: Cli
) -> None:
    found = run_json(cli, "--seeds", "3", "--together", together, "seed=5", *FAST)
    assert list(found) == SUMMARY_KEYS
    assert (found["status"], found["seeds"]) == ("finished", [5, 6, 7])
    assert [run["seed"] for run in found["runs"]] == [5, 6, 7]
    for run in found["runs"]:
        assert json.loads((Path(run["run_dir"]) / "summary.json").read_text()) == run
    assert found["metrics"].keys() == found["runs"][0]["metrics"].keys()
    for name, sample in found["metrics"].items():
        values = [run["metrics"][name] for run in found["runs"]]
        assert list(sample) == ["mean", "std", "low", "high", "n"]
        assert sample["n"] == 3
        assert sample["mean"] == pytest.approx(np.mean(values))
        assert sample["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        if sample["std"]:
            low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
            assert (sample["low"], sample["high"]) == pytest.approx((low, high))
    (file,) = Path("runs").glob("*.seeds.json")
    assert json.loads(file.read_text()) == found


def test_one_after_the_other_the_runs_are_those_of_single_commands(cli: Cli) -> None:
    found = run_json(cli, "--seeds", "2", "--together", "no", "seed=3", *FAST)
    for run in found["runs"]:
        single = run_json(cli, f"seed={run['seed']}", *FAST)
        assert rows_of(run["run_dir"]) == rows_of(single["run_dir"])
        assert {k: v for k, v in run["metrics"].items() if k != TIMED} == {
            k: v for k, v in single["metrics"].items() if k != TIMED
        }


def test_together_the_runs_are_those_of_single_commands_but_for_rounding(cli: Cli) -> None:
    found = run_json(cli, "--seeds", "3", "--together", "yes", *FAST)
    for run in found["runs"]:
        single = run_json(cli, f"seed={run['seed']}", *FAST)
        ours, theirs = rows_of(run["run_dir"]), rows_of(single["run_dir"])
        assert [list(row) for row in ours] == [list(row) for row in theirs]
        for row, other in zip(ours, theirs, strict=True):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
        one, other_folder = Path(run["run_dir"]), Path(single["run_dir"])
        assert {p.name for p in one.iterdir()} == {p.name for p in other_folder.iterdir()}
        assert list(run) == list(single)
        assert (run["status"], run["steps"], run["epochs"]) == ("finished", 14, 2)
        environment = RunFolder(one).read_environment()
        assert environment["trained_together"] == [0, 1, 2]
        done = cli("evaluate", one.name, "--json")
        assert json.loads(done.out)["metrics"]["test/accuracy"] == run["metrics"]["test/accuracy"]


def test_compare_and_report_take_the_group_as_runs_that_differ_by_seed(cli: Cli) -> None:
    found = run_json(cli, "--seeds", "3", *FAST)
    assert found["group"].startswith("digits-mlp_64x3-")
    done = cli("compare", found["group"], "--json")
    (group,) = json.loads(done.out)["groups"]
    assert group["n"] == 3
    sample = found["metrics"]["best/val_accuracy"]
    assert {key: group[key] for key in sample} == sample


def test_more_seeds_join_the_group_and_other_settings_make_another(cli: Cli) -> None:
    first = run_json(cli, "--seeds", "1", *FAST)["group"]
    assert run_json(cli, "--seeds", "1", "seed=7", "name=again", *FAST)["group"] != first
    assert run_json(cli, "--seeds", "1", "seed=7", *FAST)["group"] == first
    assert run_json(cli, "--seeds", "1", *FAST, "optimizer.lr=0.001")["group"] != first
    assert run_json(cli, "--seeds", "1", *FAST, "tracking.group=mine")["group"] == "mine"


def test_one_seed_is_allowed_and_has_no_interval(cli: Cli) -> None:
    found = run_json(cli, "--seeds", "1", *FAST)
    sample = found["metrics"]["test/accuracy"]
    assert (sample["std"], sample["low"], sample["high"], sample["n"]) == (None, None, None, 1)
    done = cli("run", "--seeds", "1", *FAST)
    assert "│ test/accuracy" in done.out
    assert "│ –   │ –             │ 1 │" in done.out


def test_the_table_shows_each_seed_and_the_means(cli: Cli) -> None:
    done = cli("run", "--seeds", "2", "--together", "yes", *FAST)
    assert done.code == 0
    assert "2 seeds in group digits-mlp_64x3-" in done.err
    assert ": together (--together yes)" in done.err
    (file,) = Path("runs").glob("*.seeds.json")
    found = json.loads(file.read_text())
    for run in found["runs"]:
        assert (
            f"│ {run['seed']}    │ finished │ {run['metrics']['best/val_accuracy']:.4f}" in done.out
        )
        assert Path(run["run_dir"]).name.rsplit("-", 1)[-1] in done.out
    sample = found["metrics"]["test/accuracy"]
    assert f"{sample['low']:.4f}–{sample['high']:.4f}" in done.out
    assert f"mnist-wandb compare {found['group']}" in done.out


def test_the_data_set_is_loaded_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    original = mnist_wandb.seeds.load_dataset

    def count(*arguments: Any, **named: Any) -> Any:
        loaded.append(arguments)
        return original(*arguments, **named)

    for module in (mnist_wandb.seeds, mnist_wandb.experiment):
        monkeypatch.setattr(module, "load_dataset", count)
    for together in ("yes", "no"):
        run_json(cli, "--seeds", "2", "--together", together, *FAST)
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.name=mlp_dropout", "dropout draws random numbers"),
        ("data.augment.zoom=0.1", "data.augment draws random numbers"),
        ("model.name=cnn_batchnorm", "batch normalisation"),
        ("training.precision=bf16", "precision bf16; training.precision=fp32 allows it"),
        ("tracking.log_model=every_epoch", "tracking.log_model=every_epoch"),
    ],
)
def test_what_cannot_equal_separate_runs_is_run_one_after_the_other_with_the_reason(
    override: str, reason: str, cli: Cli
) -> None:
    few = ("training.epochs=1", "data.train_size=20")
    done = cli("run", "--seeds", "2", "--together", "yes", *FAST, *few, override)
    assert done.code == 0, done.err
    assert f": one after the other ({reason})\n" in done.err
    assert "seed 1 (2 of 2)" in done.err


@pytest.mark.parametrize(
    ("model", "how"),
    [
        ("linear", "together (up to 300,000 parameters on a CPU)"),
        ("mlp_small", "one after the other (more than 300,000 parameters on a CPU)"),
        ("cnn_small", "one after the other (convolutions are slower together on a CPU)"),
    ],
)
def test_a_dry_run_says_how_many_runs_and_how(model: str, how: str, cli: Cli) -> None:
    arguments = ("run", "--seeds", "4", "--dry-run", "seed=2", *FAST, f"model.name={model}")
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert f"runs             4: seeds 2 to 5, {how}" in done.out
    facts = json.loads(cli(*arguments, "--json").out)
    assert facts["seeds"] == [2, 3, 4, 5]
    assert facts["together"] == (model == "linear")
    assert facts["config"]["tracking"]["group"] == facts["group"]
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0"), "--seeds: got 0, allowed: 1 or more"),
        (("--seeds", "-2"), "--seeds: got -2, allowed: 1 or more"),
        (
            ("--seeds", "2", "seed=4294967295"),
            "--seeds: the last seed would be 4294967296, the largest is 4294967295",
        ),
        (
            ("--seeds", "2", "--resume", "latest"),
            "--seeds: a run is continued with its own seed; leave out --seeds, and continue each"
            " run by itself",
        ),
        (("--together", "yes"), "--together: says how several seeds are trained; add --seeds N"),
        (
            ("--seeds", "2", "--together", "maybe"),
            "--together: got 'maybe', allowed: auto, yes, no",
        ),
    ],
)
def test_wrong_seed_options_are_refused_in_one_line(
    arguments: tuple[str, ...], message: str, cli: Cli
) -> None:
    done = cli("run", *arguments)
    assert (done.code, done.out, done.err) == (2, "", f"error: {message}\n")
    assert list(Path().iterdir()) == []


def test_a_run_of_an_agent_is_not_many_runs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    done = cli("run", "--seeds", "2", *FAST)
    assert done.code == 2
    assert "--seeds: WANDB_RUN_ID is set, which stands for one run; make seed a param" in done.err


def test_the_python_function_does_what_the_command_does() -> None:
    config = load_config("quickstart", FAST)
    result = run_seeds(config, load_settings(), 2)
    assert (result.status, result.seeds) == ("finished", (0, 1))
    assert len(list_runs(Path("runs"))) == 2
    assert result.metrics["test/accuracy"].n == 2


# ── a seed that fails ────────────────────────────────────────────────────────────────────────

# Seed 0 diverges after its first checkpoint, seed 1 before it; the others learn nothing.
UNSTABLE = (
    *("model.name=mlp_64x3", "schedule.name=constant", "training.epochs=3"),
    'optimizer={"name": "sgd", "lr": 5, "momentum": 0.9}',
)


@pytest.mark.parametrize("together", ["yes", "no"])
def test_a_seed_that_diverges_is_recorded_and_the_others_still_run(together: str, cli: Cli) -> None:
    found = run_json(cli, "--seeds", "4", "--together", together, *FAST, *UNSTABLE, code=1)
    assert found["status"] == "failed"
    statuses = [run["status"] for run in found["runs"]]
    assert statuses == ["diverged", "diverged", "finished", "finished"]
    done = [run for run in found["runs"] if run["status"] == "finished"]
    assert found["metrics"]["test/accuracy"]["n"] == len(done)
    for run in found["runs"]:
        assert json.loads((Path(run["run_dir"]) / "summary.json").read_text()) == run
        if run["status"] == "diverged":
            assert run["error"].startswith("training diverged at step ")
            single = cli("run", f"seed={run['seed']}", "--json", *FAST, *UNSTABLE)
            assert single.code == 1
            assert json.loads(single.out)["error"].split(":")[0] == run["error"].split(":")[0]


# ── stopped, and gone on with ────────────────────────────────────────────────────────────────

SLOW = (*PLAIN, "training.epochs=10", "training.batch_size=8", "tracking.log_every_steps=7")
STEPS = 10 * 144


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mnist_wandb", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(step: int, num_runs: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        paths = list(Path("runs").glob("*/metrics.jsonl"))
        rows = [path.read_text().splitlines() for path in paths]
        if len(paths) == num_runs and all(
            len(lines) > 1 and json.loads(lines[-2])["step"] >= step for lines in rows
        ):
            return
        time.sleep(0.02)
    raise AssertionError(f"no {num_runs} runs have reached step {step}")


def run_line(program: Cli, line: str) -> Finished:
    """Run a command as it was printed."""
    words = shlex.split(line.partition("mnist-wandb ")[2])
    done = program(*words)
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_seeds_stopped_together_go_on_as_single_runs(number: int, program: Cli) -> None:
    process = start("--seeds", "3", "--together", "yes", *SLOW, "tracking.mode=offline")
    wait_for_step(300, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "stopping after this step, saving a checkpoint" in err
    lines = [line for line in out.splitlines() if line.startswith("go on")]
    runs = list_runs(Path("runs"))
    assert sorted(line.rpartition(" ")[2] for line in lines) == [str(run.path) for run in runs]
    for run in runs:
        summary = run.read_summary()
        assert summary is not None
        assert (summary["status"], summary["wandb"]["mode"]) == ("interrupted", "offline")
        assert 300 <= summary["steps"] < STEPS
    for line in lines:
        run_line(program, line)
    for run in runs:
        summary = run.read_summary()
        assert summary is not None
        assert (summary["status"], summary["steps"]) == ("finished", STEPS)
        steps = [row["step"] for row in run.read_metrics() if "train/loss" in row]
        assert steps == sorted({*range(7, STEPS + 1, 7), *range(144, STEPS + 1, 144)})
    (line,) = [line for line in out.splitlines() if line.startswith("together")]
    assert "0.9" in run_line(program, line + " --json").out


@pytest.mark.slow
def test_seeds_stopped_one_after_the_other_name_what_is_left(program: Cli) -> None:
    arguments = ("--seeds", "3", "--together", "no", *SLOW, "seed=4", "tracking.mode=disabled")
    process = start(*arguments)
    wait_for_step(200, 1)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    (file,) = Path("runs").glob("*.seeds.json")
    found = json.loads(file.read_text())
    assert (found["status"], found["seeds"], len(found["runs"])) == ("interrupted", [4, 5, 6], 1)
    assert found["metrics"] == {}
    (go_on,) = [line for line in out.splitlines() if line.startswith("go on")]
    (then,) = [line for line in out.splitlines() if line.startswith("then")]
    run_line(program, go_on)
    run_line(program, then)
    runs = list_runs(Path("runs"))
    assert {run.read_config().seed for run in runs} == {4, 5, 6}
    assert {run.read_config().tracking.group for run in runs} == {found["group"]}
    (group,) = json.loads(program("compare", found["group"], "--json").out)["groups"]
    assert group["n"] == 3


@pytest.mark.parametrize("together", ["yes", "no"])
def test_a_signal_before_training_ends_at_once_and_leaves_nothing(together: str) -> None:
    process = start("--seeds", "2", "--together", together, *SLOW, "tracking.mode=offline")
    assert process.stderr is not None
    assert process.stderr.readline().startswith("device: cpu")
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "error: stopped before training began" in err
    assert list(Path().glob("runs/*")) == []


# ── W&B ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        yield server


TRACKED = (*PLAIN, "training.epochs=3", "data.train_size=300", "tracking.entity=team")


@pytest.mark.parametrize("together", ["yes", pytest.param("no", marks=pytest.mark.slow)])
def test_w_and_b_gets_n_ordinary_runs_in_one_group(
    together: str, online: WandbServer, program: Cli
) -> None:
    found = run_json(program, "--seeds", "3", "--together", together, *TRACKED)
    assert len(online.runs) == 3
    for run in found["runs"]:
        remote = online.runs["team", "mnist-wandb", run["wandb"]["id"]]
        assert (remote.group, remote.job_type) == (found["group"], "train")
        assert remote.display_name == f"digits-mlp_64x3-seed{run['seed']}"
        assert remote.config["seed"] == run["seed"]
        assert (remote.state, remote.exit_code) == ("finished", 0)
        rows = (Path(run["run_dir"]) / "metrics.jsonl").read_text().splitlines()
        for row, item in zip(map(json.loads, rows), remote.history, strict=True):
            assert {name: item[name] for name in row} == row
        for name, value in run["metrics"].items():
            assert remote.summary[name] == value
        improved = [item for item in remote.history if item.get("best/epoch") == item["epoch"]]
        chart = "Custom Chart Tables/val/confusion_matrix_table"
        assert improved
        assert all(chart in item for item in improved if "val/loss" in item)
        done = program("sync", run["run_dir"])
        assert done.out.strip().endswith("already there"), done.out


def test_the_group_is_in_the_offline_records(cli: Cli) -> None:
    found = run_json(cli, "--seeds", "2", *FAST, "tracking.mode=offline")
    for run in found["runs"]:
        record = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", run["wandb"]["dir"]],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        runs = [json.loads(line) for line in record.splitlines() if '"type":"run"' in line]
        assert found["group"] in json.dumps(runs)


def test_without_the_server_that_was_asked_for_nothing_is_trained(program: Cli) -> None:
    done = program(
        *("run", "--seeds", "2", "--together", "yes", *FAST, "tracking.mode=online"),
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_API_KEY="0" * 40,
    )
    assert done.code == 2
    assert "W&B could not start (online): http://127.0.0.1:9 does not answer" in done.err
    assert list(Path().glob("runs/*")) == []
