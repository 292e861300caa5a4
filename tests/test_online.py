"""Runs that are tracked online: the real W&B client against a real server process on 127.0.0.1."""

from __future__ import annotations

import copy
import json
import os
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
from PIL import Image
from wandb_server import API_KEY, WandbServer
from wandb_state import Run

from mnist_wandb.data import Splits
from mnist_wandb.loading import load_config

SHORT = ("training.epochs=3", "data.train_size=300", "tracking.log_every_steps=2")
TRACKED = (
    *SHORT,
    "name=my run",
    "tracking.project=lab",
    "tracking.entity=team",
    "tracking.group=tests",
    "tracking.tags=[lab, first]",
    "tracking.notes=hello",
    "tracking.job_type=teaching",
    "tracking.sample_predictions=20",
)
TIMED = "train/images_per_second"
CHARTS = "Custom Chart Tables"


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as running:
        yield running


@pytest.fixture
def online(
    server: WandbServer, program: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Finished]:
    """Run a command that finds the server and a key in its environment."""
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    return program


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def only_run() -> Path:
    (run,) = Path("runs").iterdir()
    return run


def only_remote(server: WandbServer) -> Run:
    (remote,) = server.runs.values()
    return remote


def axes_of(remote: Run) -> dict[str, str]:
    """Pattern of metrics → metric of their x axis, from the client's own entry in the config."""
    metrics = remote.raw_config["_wandb"]["value"]["m"]
    # "2" is the pattern, "5" the number (from 1) of the entry whose name, "1", is the axis.
    return {m["2"]: metrics[m["5"] - 1]["1"] for m in metrics if "2" in m}


def assert_same_history(remote: Run, run: Path) -> None:
    """Row n of the folder is step n of the history: no gap, nothing twice, all values.

    Charts may come in a row of their own where the server had the last row without them.
    """
    rows, history = rows_of(run), remote.history
    assert [item["_step"] for item in history] == list(range(len(history)))
    assert all("test/loss" not in item and "test/mistakes" in item for item in history[len(rows) :])
    for row, item in zip(rows, history[: len(rows)], strict=True):
        for name, value in row.items():
            if name != TIMED:
                assert item[name] == value, (row["step"], name)


# ── what arrives ─────────────────────────────────────────────────────────────────────────────


def test_what_arrives_at_the_server_equals_the_run_folder(
    online: Callable[..., Finished], server: WandbServer, digits: Splits
) -> None:
    done = online("run", "--json", *TRACKED)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    run = only_run()
    remote = server.runs["team", "lab", summary["wandb"]["id"]]
    assert summary["wandb"]["url"].endswith(f"/team/lab/runs/{remote.id}")
    # ── Settings.
    assert remote.config == load_config(str(run / "config.yaml")).model_dump(mode="json")
    assert (remote.display_name, remote.group, remote.job_type) == ("my run", "tests", "teaching")
    assert (sorted(remote.tags), remote.notes) == (["first", "lab"], "hello")
    # ── Metrics: history on its axes, summary.
    assert_same_history(remote, run)
    assert axes_of(remote) == {
        "train/*": "step",
        "val/*": "epoch",
        "best/*": "epoch",
        "test/*": "epoch",
    }
    for name, value in summary["metrics"].items():
        assert remote.summary[name] == value, name
    assert remote.summary["status"] == "finished"
    assert {key.split("/")[0] for key in remote.history[0] if not key.startswith("_")} == {
        *("step", "epoch", "train")
    }
    # ── Pictures, tables, charts.
    panel = remote.history[-1]["test/pictures"]
    by_id = {int(i): image for i, image in zip(digits.test.ids, digits.test.images, strict=True)}
    for name, caption in zip(panel["filenames"], panel["captions"], strict=True):
        (Path("picture.png")).write_bytes(remote.files[name])
        picture = np.asarray(Image.open("picture.png").convert("L"))
        np.testing.assert_array_equal(picture, by_id[int(caption.split(":")[0])][0].numpy())
    table = json.loads(remote.files[remote.history[-1]["test/predictions"]["path"]])
    assert len(table["data"]) == 20
    confusion = json.loads(
        remote.files[remote.history[-1][f"{CHARTS}/test/confusion_matrix_table"]["path"]]
    )
    expected = np.loadtxt(run / "confusion_matrix.csv", delimiter=",", skiprows=1, dtype=str)
    assert [n for _, _, n in confusion["data"]] == expected[:, 1:].astype(int).ravel().tolist()
    assert any(f"{CHARTS}/val/confusion_matrix_table" in item for item in remote.history)
    # ── The end.
    assert (remote.state, remote.exit_code) == ("finished", 0)
    assert [alert["title"] for alert in remote.alerts] == ["my run finished"]
    assert "epoch 3/3" in "\n".join(remote.output)


def test_the_models_and_the_data_they_come_from_are_artifacts(
    online: Callable[..., Finished], server: WandbServer
) -> None:
    summary = json.loads(online("run", "--json", *TRACKED).out)
    run = only_run()
    environment = json.loads((run / "environment.json").read_text())
    name = f"model-my-run-{summary['wandb']['id']}"
    best = server.artifact(f"{name}:best")
    assert server.artifacts["team", "lab", name].versions == [best]
    assert (best.type, best.aliases, best.version) == ("model", ["best", "latest"], 0)
    assert best.files["model.pt"] == (run / "checkpoints" / "best.pt").read_bytes()
    assert best.metadata["config"]["name"] == "my run"
    assert best.metadata["scores"]["test/accuracy"] == summary["metrics"]["test/accuracy"]
    assert best.metadata["data_fingerprint"] == environment["data_fingerprint"]
    data = server.artifact("data-digits")
    assert data.type == "dataset"
    assert data.metadata["data_fingerprint"] == environment["data_fingerprint"]
    assert data.metadata["class_names"] == list("0123456789")
    assert list(data.files) == ["dataset.json"]
    assert data.used_by == [best.logged_by] == [summary["wandb"]["id"]]


def test_images_and_code_are_uploaded_on_request_only(
    online: Callable[..., Finished], server: WandbServer, digits: Splits
) -> None:
    done = online("run", "--json", *SHORT, "tracking.log_dataset=true", "tracking.save_code=true")
    assert done.code == 0, done.err
    Path("images.npz").write_bytes(server.artifact("data-digits").files["images.npz"])
    with np.load("images.npz") as arrays:
        np.testing.assert_array_equal(arrays["test_images"], digits.test.images[:, 0].numpy())
    assert any(artifact.type == "code" for artifact in server.artifacts.values())


def test_evaluate_and_predict_take_an_artifact_and_record_its_use(
    online: Callable[..., Finished], server: WandbServer
) -> None:
    summary = json.loads(online("run", "--json", *TRACKED).out)
    name = f"team/lab/model-my-run-{summary['wandb']['id']}:best"
    found = json.loads(online("evaluate", name, "--json").out)
    assert found["checkpoint"] == name
    assert found["metrics"]["test/accuracy"] == summary["metrics"]["test/accuracy"]
    Image.radial_gradient("L").save("blob.png")
    done = online("predict", name, "blob.png", "--json")
    assert done.code == 0, done.err
    users = {run.job_type: run for run in server.runs.values() if run.id != summary["wandb"]["id"]}
    assert set(users) == {"evaluate", "predict"}
    assert users["evaluate"].summary["test/accuracy"] == summary["metrics"]["test/accuracy"]
    best = server.artifact(f"model-my-run-{summary['wandb']['id']}:best")
    assert sorted(best.used_by) == sorted(run.id for run in users.values())
    missing = online("evaluate", f"{name}r")
    assert missing.code == 2
    assert missing.err.splitlines()[-1].startswith("error: W&B (http://127.0.0.1:")
    assert len(list(Path("runs").iterdir())) == 1


# ── stop and resume ──────────────────────────────────────────────────────────────────────────

LONG = (
    "model.name=mlp_64x3",
    "training.epochs=8",
    "training.batch_size=8",
    "tracking.log_every_steps=9",
    "tracking.project=lab",
    "tracking.entity=team",
)


def rows_so_far() -> list[dict[str, Any]]:
    rows = []
    for path in Path("runs").glob("*/metrics.jsonl"):
        rows += [json.loads(line) for line in path.read_text().splitlines()[:-1]]
    return rows


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def stop_midway(number: int, *arguments: str, step: int = 300) -> Path:
    """Start a run, stop it by a signal once it has reached a step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_wandb", "run", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: any(row["step"] >= step for row in rows_so_far()))
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    return only_run()


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_resumed_run_goes_on_in_the_same_wandb_run_without_gap_or_double(
    online: Callable[..., Finished], server: WandbServer, number: int
) -> None:
    run = stop_midway(number, *LONG)
    done = online("run", "--json", "--resume", "latest")
    assert done.code == 0, done.err
    (remote,) = server.runs.values()
    assert_same_history(remote, run)
    assert (remote.state, remote.exit_code) == ("finished", 0)
    assert remote.summary["status"] == "finished"


@pytest.mark.slow
def test_a_resumed_run_stays_in_the_project_that_it_began_in(
    online: Callable[..., Finished], server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    stop_midway(signal.SIGTERM, *LONG[:4])
    monkeypatch.delenv("WANDB_PROJECT")
    assert online("run", "--resume", "latest").code == 0
    assert only_remote(server).project == "elsewhere"
    assert_sync_changes_nothing(online, server)


def test_a_signal_before_training_ends_at_once_though_the_server_is_silent(
    online: Callable[..., Finished], server: WandbServer
) -> None:
    server.faults.set(hang=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_wandb", "run"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any(line.startswith("W&B: online") for line in process.stderr)
    process.terminate()
    _, err = process.communicate(timeout=15)  # the client itself would wait for a minute
    assert process.returncode == 143
    assert "stopped before training began" in err
    assert list(Path("runs").iterdir()) == []


@pytest.mark.slow  # test_agent.py has the same with a real agent
def test_a_requeued_sweep_run_goes_on_in_its_folder(
    online: Callable[..., Finished], server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "q7x2k9ab")
    monkeypatch.setenv("WANDB_SWEEP_ID", "swp1")
    run = stop_midway(signal.SIGTERM, *LONG)
    assert (only_remote(server).state, only_remote(server).exit_code) == ("preempted", 143)
    other = online("run", *LONG, "seed=1")
    assert other.code == 2
    assert "WANDB_RUN_ID: q7x2k9ab is the run runs/" in other.err
    done = online("run", "--json", *LONG, "--_wandb={}")
    assert done.code == 0, done.err
    assert only_run() == run
    remote = only_remote(server)
    assert (remote.id, remote.sweep, remote.state) == ("q7x2k9ab", "swp1", "finished")
    assert_same_history(remote, run)


def test_the_stop_button_ends_a_run_with_a_checkpoint(
    online: Callable[..., Finished], server: WandbServer
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_wandb", "run", *LONG, "training.epochs=5000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: any(row["step"] >= 100 for row in rows_so_far()))
    server.stop_run(only_run().name[-8:])
    assert process.wait(timeout=60) == 130
    summary = json.loads((only_run() / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert (only_run() / "checkpoints" / "last.pt").exists()
    assert only_remote(server).exit_code != 0


def test_a_failed_run_tells_why_in_its_own_console_log(
    online: Callable[..., Finished], server: WandbServer
) -> None:
    done = online(
        "run", "model.name=mlp_64x3", "optimizer={'name': 'sgd', 'lr': 100}", "training.epochs=9",
        "schedule.name=constant", "tracking.log_every_steps=1",
    )  # fmt: skip
    assert done.code == 1
    remote = only_remote(server)
    assert (remote.state, remote.exit_code) == ("failed", 1)
    assert "error: training diverged at step" in "\n".join(remote.output)
    assert done.err.count("training diverged at step") == 1
    assert [alert["title"] for alert in remote.alerts] == ["digits-mlp_64x3 diverged"]


# ── faults ───────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_key_is_refused_before_training_where_online_was_asked_for(
    online: Callable[..., Finished], server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for how in ({}, {"WANDB_MODE": "online"}):
        arguments = () if how else ("tracking.mode=online",)
        done = online("run", *SHORT, *arguments, **how)
        assert done.code == 2
        assert done.err.splitlines()[-1].startswith("error: W&B could not start (online)")
        assert "key" in done.err.splitlines()[-1]
        assert "epoch" not in done.err
        assert list(Path("runs").glob("*")) == []
    done = online("run", "--json", *SHORT)
    assert done.code == 0
    assert json.loads(done.out)["wandb"]["mode"] == "offline"
    assert done.err.count("warning: W&B: offline instead") == 1
    assert server.runs == {}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run with nothing in its way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with WandbServer() as server:
        subprocess.run(
            [sys.executable, "-m", "mnist_wandb", "run", "--quiet", *TRACKED],
            cwd=folder,
            check=True,
            env={**os.environ, **server.env(), "OMP_NUM_THREADS": "1", "HOME": str(folder)},
            stdout=subprocess.DEVNULL,
        )
        return only_remote(server)


def comparable(remote: Run) -> dict[str, Any]:
    """What has to be the same, whatever happened: all but times, ids and system facts."""

    def plain(item: dict[str, Any]) -> dict[str, Any]:
        return {
            key: {k: v for k, v in value.items() if k in ("nrows", "sha256", "count", "captions")}
            if isinstance(value, dict)
            else value
            for key, value in item.items()
            if not key.startswith("_")
            and key not in (TIMED, "images_per_second", "training_seconds")
        }

    return {
        "config": remote.config,
        "history": [plain(item) for item in remote.history],
        "summary": plain(remote.summary),
        "environment": remote.summary["environment"],
        "axes": axes_of(remote),
        "end": (remote.state, remote.exit_code, remote.display_name, remote.group, remote.notes),
        "tags": sorted(remote.tags),
        "pictures": sorted(n.rpartition("_")[0] for n in remote.files if n.endswith(".png")),
    }


def test_a_server_that_dies_in_training_costs_nothing_and_sync_completes_it(
    online: Callable[..., Finished], server: WandbServer, undisturbed: Run
) -> None:
    expected = copy.deepcopy(comparable(undisturbed))
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_wandb", "run", *TRACKED, "tracking.upload_timeout_seconds=2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(rows_so_far()) >= 3)
    server.close()
    _, err = process.communicate(timeout=60)
    server.open()
    assert process.returncode == 0
    (line,) = [line for line in err.splitlines() if "not everything has arrived" in line]
    assert f"mnist-wandb sync {only_run()}" in line
    assert json.loads((only_run() / "summary.json").read_text())["status"] == "finished"
    done = online("sync", "latest")
    assert done.code == 0, done.err
    expected["config"]["tracking"]["upload_timeout_seconds"] = 2
    assert_same(comparable(only_remote(server)), expected, from_folder=True)
    assert_sync_changes_nothing(online, server)


def assert_same(found: dict[str, Any], expected: dict[str, Any], *, from_folder: bool) -> None:
    """All is the same; from the folder come the confusion matrix of the best epoch only, and
    probabilities as float16, which changes the tables' digests."""
    if from_folder:
        for side in (found, expected):
            for item in [*side["history"], side["summary"]]:
                for key in [k for k in item if k.startswith(("val/conf", f"{CHARTS}/val/conf"))]:
                    del item[key]
                for key in ("test/predictions", "test/mistakes"):
                    item.get(key, {}).pop("sha256", None)
    assert found == expected


def assert_sync_changes_nothing(online: Callable[..., Finished], server: WandbServer) -> None:
    before = copy.deepcopy({key: vars(run) for key, run in server.runs.items()})
    versions = set(server.state.versions)
    done = online("sync", "latest")
    assert done.code == 0, done.err
    assert done.out.rstrip().endswith("already there")
    assert {key: vars(run) for key, run in server.runs.items()} == before
    assert set(server.state.versions) == versions


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500, "requests": 6},
        pytest.param({"status": 429, "requests": 6}, marks=pytest.mark.slow),
        pytest.param({"status": 403, "only": ["file_stream"]}, marks=pytest.mark.slow),
        pytest.param({"status": 500}, marks=pytest.mark.slow),
        pytest.param({"hang": True}, marks=pytest.mark.slow),
        pytest.param({"cut_uploads": True, "only": ["upload"]}, marks=pytest.mark.slow),
    ],
    ids=["500-for-a-while", "429-for-a-while", "403-on-the-stream", "500", "hanging", "cut"],
)
def test_faults_of_the_server_lose_nothing(
    online: Callable[..., Finished], server: WandbServer, fault: dict[str, Any]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_wandb", "run", *TRACKED, "tracking.upload_timeout_seconds=3"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(rows_so_far()) >= 1)
    server.faults.set(**fault)
    _, err = process.communicate(timeout=90)
    server.faults.clear()
    assert process.returncode == 0, err
    assert len(rows_of(only_run())) == len([r for r in rows_of(only_run()) if "step" in r]) > 8
    done = online("sync", "latest")
    assert done.code == 0, done.err
    assert_same_history(only_remote(server), only_run())
    assert only_remote(server).state == "finished"
    assert_sync_changes_nothing(online, server)


# ── sync ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "record",
    [
        "offline",
        pytest.param("disabled", marks=pytest.mark.slow),
        pytest.param("missing", marks=pytest.mark.slow),
        pytest.param("damaged", marks=pytest.mark.slow),
        "killed",
    ],
)
def test_sync_uploads_a_run_however_it_was_recorded(
    online: Callable[..., Finished], server: WandbServer, undisturbed: Run, record: str
) -> None:
    expected = copy.deepcopy(comparable(undisturbed))
    mode = "disabled" if record == "disabled" else "offline"
    if record == "killed":
        run = stop_midway(signal.SIGKILL, *TRACKED, "tracking.mode=offline", step=4)
        online("run", "--resume", "latest")
    else:
        online("run", *TRACKED, f"tracking.mode={mode}")
        run = only_run()
    (wandb_file,) = [*run.glob("wandb/offline-run-*/*.wandb"), None][-2:-1] or [None]
    if record == "missing":
        assert wandb_file is not None
        wandb_file.unlink()
    if record == "damaged":
        assert wandb_file is not None
        content = wandb_file.read_bytes()
        wandb_file.write_bytes(content[: len(content) // 2] + b"\0" * 99)
    done = online("sync", "latest")
    assert done.code == 0, done.err
    rebuilt = record not in ("offline", "killed")
    assert done.out.rstrip().endswith("uploaded from the run folder") == rebuilt
    expected["config"]["tracking"]["mode"] = mode
    assert_same(comparable(only_remote(server)), expected, from_folder=rebuilt)
    assert_same_history(only_remote(server), run)
    assert_sync_changes_nothing(online, server)


@pytest.mark.slow
def test_refused_artifacts_are_told_and_sent_by_sync(
    online: Callable[..., Finished], server: WandbServer
) -> None:
    server.faults.set(status=403, only=["CreateArtifact"])
    done = online("run", *TRACKED, "tracking.upload_timeout_seconds=5")
    assert done.code == 0
    assert done.err.count("not everything has arrived") == 1
    server.faults.clear()
    assert online("sync", "latest").code == 0
    assert server.artifact(f"model-my-run-{only_remote(server).id}:best").files["model.pt"]
    assert server.artifact("data-digits").used_by == [only_remote(server).id]
    assert_sync_changes_nothing(online, server)


def test_sync_passes_over_what_is_no_run_and_names_what_is_damaged(
    online: Callable[..., Finished], server: WandbServer
) -> None:
    for _ in range(2):
        online("run", *TRACKED, "tracking.mode=disabled")
    Path("runs/20200101-000000-explore-digits-00000000").mkdir()
    damaged, whole = sorted(Path("runs").iterdir())[1:]
    (damaged / "predictions.npz").write_bytes(b"nonsense")
    (whole / "checkpoints" / "best.pt").unlink()
    done = online("sync", *map(str, sorted(Path("runs").iterdir())))
    assert done.code == 1
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith(f"error: {damaged}/predictions.npz: cannot be read: ")
    assert "lacks tables or artifacts" in errors[1]  # the model is gone
    assert_same_history(server.run(whole.name[-8:]), whole)
    assert damaged.name[-8:] not in {run.id for run in server.runs.values()}
    nothing = online("sync", "runs/20200101-000000-explore-digits-00000000")
    assert (nothing.code, nothing.err.startswith("error: sync: no runs in ")) == (2, True)


def test_sync_without_a_key_or_without_a_server_is_one_line(
    program: Callable[..., Finished],
) -> None:
    program("run", *SHORT, "tracking.mode=disabled")
    done = program("sync", "latest")
    assert (done.code, done.err.splitlines()[-1]) == (
        1,
        "error: W&B: no API key found; log in with `wandb login` or set WANDB_API_KEY",
    )
    done = program("sync", "latest", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(
        "error: W&B (http://127.0.0.1:9): http://127.0.0.1:9 does not answer"
    )


# ── secrets ──────────────────────────────────────────────────────────────────────────────────


def test_the_key_is_nowhere_in_what_is_written_or_shown(
    online: Callable[..., Finished], server: WandbServer, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_wandb", "run", *TRACKED, "tracking.save_code=true"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_until(lambda: len(rows_so_far()) >= 1)
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, check=True).stdout
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    key = API_KEY.encode()
    assert key not in commands + shown
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [path for path in written if key in path.read_bytes()] == []
    sent = [data for run in server.runs.values() for data in run.files.values()]
    sent += [data for version in server.state.versions.values() for data in version.files.values()]
    sent += [line.encode() for run in server.runs.values() for line in run.output]
    assert len(sent) > 20
    assert not any(key in data for data in sent)
