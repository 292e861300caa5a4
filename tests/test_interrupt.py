"""Runs that are really stopped and killed, and continued to the numbers of undisturbed ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest
from conftest import Finished, Terminal, values_of, wait_for_step

# Dropout, augmentation, momentum and EMA are on: all randomness and all state must come back.
OVERRIDES = (
    "model.name=mlp_dropout",
    "data.augment.rotation_degrees=10",
    "training.ema_decay=0.9",
    "training.epochs=10",
    "training.batch_size=8",
    "tracking.log_every_steps=7",
)
STEPS = 10 * 144
ENDLESS = (*OVERRIDES, "training.epochs=5000")


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mnist_wandb", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of the run that nothing has happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(
        [sys.executable, "-m", "mnist_wandb", "run", "-q", *OVERRIDES, "tracking.mode=disabled"],
        cwd=folder,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    (run,) = (folder / "runs").iterdir()
    return values_of(run)


def test_a_signal_that_python_drops_is_sent_again() -> None:
    code = """
import os, signal, time
from mnist_wandb.signals import StoppedBeforeTraining, StopSignals

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

StopSignals().install()
try:
    Dying()
    print("dropped", flush=True)
    time.sleep(60)
except StoppedBeforeTraining as stop:
    raise SystemExit(stop.exit_code())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (143, "dropped\n")
    assert "Exception ignored in" in done.stderr


@pytest.mark.parametrize(
    ("number", "mode"),
    [
        pytest.param(signal.SIGTERM, "offline", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "disabled", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "disabled", marks=pytest.mark.slow),
        (signal.SIGKILL, "offline"),
    ],
)
def test_a_stopped_run_continues_to_the_very_same_numbers(
    undisturbed: list[dict[str, Any]], program: Callable[..., Finished], number: int, mode: str
) -> None:
    process = start(*OVERRIDES, f"tracking.mode={mode}")
    run = wait_for_step(400)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert not (run / "summary.json").exists()
    else:
        assert process.returncode == 128 + number
        summary = json.loads((run / "summary.json").read_text())
        assert summary["status"] == "interrupted"
        assert 400 <= summary["steps"] < STEPS
        assert "stopping after this step, saving a checkpoint" in err
        assert f"mnist-wandb run --resume {run}" in out
    done = program("run", "--json", "--resume", run.name)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["status"] == "finished"
    assert summary["steps"] == STEPS
    assert summary["run_dir"] == str(run)
    assert values_of(run) == undisturbed
    again = program("run", "--resume", run.name)
    assert again.code == 2
    assert "this run is finished; nothing is left to resume" in again.err


def test_a_second_ctrl_c_stops_at_once(terminal: Terminal) -> None:
    slow = ("model.name=cnn_large", "training.batch_size=1150")  # a step takes seconds
    child = terminal("run", *slow, "training.epochs=5000", "tracking.mode=disabled")
    child.expect("epoch 1/5000 ")  # the first step is done
    child.sendintr()
    child.expect("Ctrl-C again stops at once")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    (run,) = Path("runs").iterdir()
    assert not (run / "summary.json").exists()  # it did not wait for the step, nor finish


def test_a_single_ctrl_c_after_sigterm_waits_for_the_checkpoint() -> None:
    # W&B's stop button: SIGTERM from the agent, then SIGINT from the client.
    process = start(*ENDLESS, "tracking.mode=disabled")
    run = wait_for_step(100)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 143), err  # two signals at a time come in any order
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert (run / "checkpoints" / "last.pt").is_file()


def test_ctrl_c_in_a_terminal_saves_and_says_how_to_go_on(terminal: Terminal) -> None:
    child = terminal("run", *ENDLESS, "tracking.mode=offline")
    child.expect("epoch 2/5000 ")  # read on, else the terminal's buffer fills and the run waits
    (run,) = Path("runs").iterdir()
    child.sendintr()  # to the whole process group, the W&B service included
    child.expect("stopping after this step, saving a checkpoint; Ctrl-C again stops at once")
    child.expect(f"go on +mnist-wandb run --resume {run}")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_training_ends_at_once_and_leaves_nothing(number: int) -> None:
    process = start("tracking.mode=offline")
    assert process.stderr is not None
    assert process.stderr.readline().startswith("device: cpu")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "error: stopped before training began" in err
    assert list(Path().glob("runs/*")) == []


@pytest.mark.slow
def test_the_upload_command_names_the_records_of_all_sessions(
    program: Callable[..., Finished],
) -> None:
    process = start(*OVERRIDES, "tracking.mode=offline")
    run = wait_for_step(200)
    process.terminate()
    process.communicate(timeout=60)
    done = program("run", "--resume", str(run))
    (line,) = [line for line in done.out.splitlines() if line.startswith("upload it")]
    records = sorted(map(str, (run / "wandb").glob("offline-run-*")))
    assert len(records) == 2
    assert line.split()[2:] == ["wandb", "sync", *records]


def test_a_run_in_use_is_not_resumed_by_a_second_process(
    program: Callable[..., Finished],
) -> None:
    process = start(*ENDLESS, "tracking.mode=disabled")
    try:
        run = wait_for_step(100)
        done = program("run", "--resume", run.name)
        assert done.code == 2
        assert "another process is working on this run" in done.err
    finally:
        process.kill()
        process.communicate()


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    program: Callable[..., Finished],
) -> None:
    few = ("training.epochs=1", "data.train_size=100", "tracking.log_every_steps=1")
    slow = ("model.name=cnn_large", "training.batch_size=2", "tracking.mode=disabled", *few)
    process = start(*slow)
    run = wait_for_step(3)
    process.kill()
    process.communicate()
    if (run / "checkpoints" / "last.pt").exists():
        pytest.fail("the first epoch ended before the kill")
    done = program("run", "--resume", run.name)
    assert done.code == 0, done.err
    assert f"{run}: stopped before its first checkpoint; begins again" in done.err
    steps = [row["step"] for row in values_of(run)]
    assert steps == [*range(1, 51), 50, 50]  # training, validation, test


def test_a_diverged_run_exits_1_and_keeps_the_last_good_checkpoint(
    program: Callable[..., Finished],
) -> None:
    done = program(
        "run", "model.name=mlp_64x3", "optimizer={'name': 'sgd', 'lr': 100}", "training.epochs=9",
        "schedule.name=constant", "tracking.mode=offline", "tracking.log_every_steps=1",
    )  # fmt: skip
    assert done.code == 1
    line = done.err.splitlines()[-1]
    assert line.startswith("error: training diverged at step ")
    assert "last finite loss" in line
    (run,) = Path("runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "diverged"
    assert "training diverged" in summary["error"]
    record = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", summary["wandb"]["dir"]],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert '"type":"alert"' in record
    assert '"title":"digits-mlp_64x3 diverged"' in record
