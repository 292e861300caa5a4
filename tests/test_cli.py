"""The program as people use it: commands, messages, exit codes, files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
import yaml
from conftest import FAST, Finished, Terminal
from jsonschema import Draft202012Validator
from PIL import Image

from mnist_wandb.data import Splits
from mnist_wandb.loading import preset_names

Cli = Callable[..., Finished]
WARM_START = ("tracking.mode=disabled", "training.epochs=6", "optimizer.lr=0.01")


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few seconds, good enough to recognise digits."""
    folder = tmp_path_factory.mktemp("trained")
    subprocess.run(
        [sys.executable, "-m", "mnist_wandb", "run", "--quiet", *WARM_START],
        cwd=folder,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture
def trained(trained_once: Path) -> Path:
    """A copy of that run in the test's own runs folder."""
    return Path(shutil.copytree(trained_once, Path("runs") / trained_once.name))


# ── run ──────────────────────────────────────────────────────────────────────────────────────


def test_run_prints_results_and_the_next_commands(cli: Cli) -> None:
    done = cli("run", *FAST[1:], "tracking.mode=offline")
    assert done.code == 0
    for text in (
        "test/accuracy",
        "per class",
        "confusion matrix",
        "run folder",
        "wandb leet runs/",
    ):
        assert text in done.out
    assert "wandb sync runs/" in done.out
    assert done.err.splitlines()[:2] == [
        "device: cpu (auto: no GPU found)",
        "W&B: offline (tracking.mode)",
    ]
    epochs = [line for line in done.err.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/2", "2/2"]
    assert re.search(r"val loss \d\.\d{4} accuracy 0\.\d{4}  [\d,]+ images/s", epochs[0])


def test_run_json_prints_one_object_with_the_documented_keys(cli: Cli) -> None:
    done = cli("run", "--json", *FAST)
    summary = json.loads(done.out)
    assert list(summary) == [
        "status", "run_dir", "name", "preset", "seed", "device", "num_parameters", "epochs",
        "steps", "training_seconds", "total_seconds", "images_per_second", "metrics", "wandb",
        "error", "num_processes",
    ]  # fmt: skip
    assert summary["status"] == "finished"
    assert summary["preset"] == "quickstart"
    assert summary["num_parameters"] == 28_938
    assert summary["wandb"] == {"mode": "disabled", "id": None}
    assert {"test/accuracy", "best/val_accuracy", "train/loss"} <= set(summary["metrics"])
    assert json.loads((Path(summary["run_dir"]) / "summary.json").read_text()) == summary


def test_quiet_run_says_nothing_on_stderr(cli: Cli) -> None:
    assert cli("run", "--quiet", *FAST).err == ""


def test_run_without_arguments_learns_the_embedded_digits(program: Cli) -> None:
    done = program("run", "--json")
    summary = json.loads(done.out)
    assert summary["metrics"]["test/accuracy"] >= 0.97
    assert "W&B: offline (no API key found)" in done.err


def test_run_finds_a_preset_by_name_from_any_folder_and_a_file_by_path(cli: Cli) -> None:
    Path("mine.yaml").write_text("data: {dataset: digits}\nmodel: {name: mlp_128}\n")
    for config, parameters in (
        ("cnn_large.yaml", 493_322),
        ("cnn_large", 493_322),
        ("mine.yaml", 101_770),
    ):
        done = cli("run", "--config", config, "--dry-run", "--json")
        assert json.loads(done.out)["num_parameters"] == parameters


def test_dry_run_describes_and_leaves_nothing_behind(cli: Cli) -> None:
    done = cli("run", "--dry-run", "model.name=cnn_small", "training.epochs=3")
    assert done.code == 0
    assert re.search(r"head\.1\s*│ Linear\s*│ 10\s*│ 15,690", done.out)
    assert "36 per epoch, 108 in all" in done.out
    assert "epochs: 3" in done.out
    assert "# command line" in done.out
    assert "runs folder      runs" in done.out
    assert list(Path().iterdir()) == []


def test_run_reads_sweep_parameters_of_an_agent(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("wandb_version: 1\nmodel:\n  value: {name: linear}\nseed:\n  value: 7\n")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(file))
    facts = json.loads(cli("run", "--dry-run", "--json", "--seed=8", "--_wandb={'a': 1}").out)
    assert facts["config"]["model"]["name"] == "linear"
    assert facts["config"]["seed"] == 8


def test_live_bar_on_a_terminal(terminal: Terminal) -> None:
    child = terminal("run", "training.batch_size=4", "training.epochs=2", FAST[0])
    child.expect(r"epoch 1/2 .*━.*/288.* loss [\d.]+  accuracy [\d.]+  [\d,]+ images/s .*0:00:")
    child.expect("epoch 2/2 .*val loss")
    child.expect("use it .*mnist-wandb predict runs/")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


# ── bad input ────────────────────────────────────────────────────────────────────────────────

BAD_INPUT: list[tuple[tuple[str, ...], str]] = [
    (("run", "--config", "cnn_larg"), "--config cnn_larg: no such preset or file; did you mean 'cnn_large'"),
    (("run", "-c", "no/such.yaml"), "--config no/such.yaml: no such file"),
    (("run", "training.epoch=5"), "command line: training.epoch: unknown key; did you mean 'epochs'?"),
    (("run", "epochs=5"), "command line: epochs: unknown key; did you mean 'training.epochs'?"),
    (("run", "training.epochs=many"), "command line: training.epochs: got the text 'many', expected a number"),
    (("run", "training.epochs=0"), "command line: training.epochs: got 0, expected greater than 0"),
    (("run", "optimizer.lr=nan"), "command line: optimizer.lr: got nan, expected a finite number"),
    (("run", "optimizer.name=adam", "optimizer.momentum=0.9"), "optimizer 'adam' has no such field (it belongs to sgd, rmsprop)"),
    (("run", "model.hidden_sizes=[9]", "model.name=linear"), "model 'linear' has no such field (it belongs to mlp, cnn)"),
    (("run", "data.train_size=9"), "data.train_size: 9 leaves a class empty; allowed: 10"),
    (("run", "data.train_size=99999"), "data.train_size: 99999 is more than the 1150 training images"),
    (("run", "device=cuda:7"), "device: cuda:7 is not on this machine; available: auto, cpu"),
    (("run", "nonsense"), "command line: cannot read 'nonsense'; write section.field=value"),
    (("run", "--resume", "nowhere"), "nowhere: no run folder of that path, name or id in runs"),
    (("run", "--resume", "x", "seed=1"), "--resume: a run is continued with its own configuration"),
    (("evaluate", "nowhere"), "nowhere: no run folder"),
    (("evaluate", "missing.pt"), "missing.pt: no such file"),
    (("predict", "nowhere", "missing.png"), "missing.png: no such file or folder"),
    (("schema", "sweeps"), "schema: got 'sweeps', allowed: run"),
    (("rnu",), "No such command 'rnu'"),
    (("doctor", "--fast"), "No such option: --fast"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_gives_one_line_exit_code_2_and_writes_nothing(
    cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    done = cli(*arguments)
    assert done.code == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert done.out == ""
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {epochs: 3", "bad.yaml:1:21: not valid YAML"),
        ("seed: 1\nseed: 2\n", "bad.yaml:2:1: not valid YAML: duplicate key 'seed' (first in line 1)"),
        ("training:\n  epoch: 3\n", "bad.yaml:2:3: training.epoch: unknown key; did you mean 'epochs'?"),
        ("optimizer:\n  name: adam\n  momentum: 0.9\n", "bad.yaml:3:3: optimizer.momentum: optimizer 'adam'"),
        ("seed: true\n", "bad.yaml:1:1: seed: got true, expected a whole number"),
        ("- 1\n", "bad.yaml: found the list [1], expected sections"),
    ],
)  # fmt: skip
def test_bad_config_file_names_line_and_column(cli: Cli, text: str, message: str) -> None:
    Path("bad.yaml").write_text(text)
    done = cli("run", "--config", "bad.yaml")
    assert done.code == 2
    assert message in done.err
    assert [path.name for path in Path().iterdir()] == ["bad.yaml"]


def test_several_mistakes_give_one_line_each(cli: Cli) -> None:
    done = cli("run", "seed=-1", "training.epochs=0", "data.dataset=mnits")
    assert len(done.err.splitlines()) == 3
    assert done.code == 2


def test_missing_data_and_no_network_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    done = cli("run", "--config", "linear", "tracking.mode=disabled")
    assert done.code == 2
    line = done.err.splitlines()[-1]
    assert line.startswith("error: MNIST: the files are not in data/MNIST/raw and could not be")
    assert "use data.dataset=digits, which needs no download" in line
    assert list(Path().iterdir()) == []


def test_config_errors_and_help_import_nothing_heavy() -> None:
    code = (
        "import sys; from mnist_wandb.cli import main; codes = [main(['--help']),"
        " main(['show', 'cnn_large']), main(['run', 'training.epoch=1'])];"
        " assert codes == [0, 0, 2], codes;"
        " assert not {'torch', 'wandb', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_builds_no_validator_and_reads_no_sweep() -> None:
    code = (
        "import sys; from mnist_wandb.cli import main; main(['--help']);"
        " from mnist_wandb.config import Section;"
        " modules = {'mnist_wandb.sweepfile', 'mnist_wandb.agent', 'dotenv'};"
        " print(sorted(modules & set(sys.modules)));"
        " print([c.__name__ for c in Section.__subclasses__() if c.__pydantic_complete__])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "[]"]


def test_a_run_imports_neither_the_compiler_nor_torchvision(tmp_path: Path) -> None:
    code = (
        "import sys; from mnist_wandb.cli import main;"
        " code = main(['run', '--quiet', 'training.epochs=0.1']);"
        " print(code, sorted({'torch._dynamo', 'torchvision', 'optuna'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_size=3", "data.train_size: 3 leaves a class empty"),
        ("training.batch_size=1149", "training.batch_size: 1149 leaves a batch of one"),
        ("device=mps", "device: mps is not on this machine"),
    ],
)
def test_dry_run_refuses_what_run_refuses(cli: Cli, override: str, message: str) -> None:
    model = "model={name: mlp, batch_norm: true}"
    for dry in (["--dry-run"], []):
        done = cli("run", *dry, model, override, "tracking.mode=disabled")
        assert done.code == 2
        assert message in done.err.splitlines()[-1]
    assert list(Path().iterdir()) == []


def test_a_run_that_fails_midway_exits_1_and_keeps_its_record(
    program: Callable[..., Finished],
) -> None:
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"ulimit -f 300; {sys.executable} -m mnist_wandb run --json {' '.join(FAST)}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1]
    summary = json.loads(done.stdout)
    assert summary["status"] == "failed"
    assert (Path(summary["run_dir"]) / "metrics.jsonl").stat().st_size > 0


def test_json_of_a_diverged_run_is_its_summary(cli: Cli) -> None:
    done = cli(
        "run", "--json", "model.name=mlp_64x3", "optimizer={'name': 'sgd', 'lr': 100}",
        "schedule.name=constant", "training.epochs=9", "tracking.mode=disabled",
    )  # fmt: skip
    assert done.code == 1
    summary = json.loads(done.out)
    assert summary["status"] == "diverged"
    assert summary["error"].startswith("training diverged at step ")


def test_brackets_in_names_are_shown_as_they_are(cli: Cli) -> None:
    done = cli("run", *FAST, "name='x[/oops] [bold]y :bomb:'")
    assert done.code == 0
    assert "x[/oops] [bold]y :bomb:: finished" in done.out


@pytest.mark.parametrize("command", ["show", "configs", "run --dry-run", "schema", "--help"])
def test_a_closed_pipe_is_no_error(command: str) -> None:
    code = f"set -o pipefail; {sys.executable} -m mnist_wandb {command} | true"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ── evaluate, predict ────────────────────────────────────────────────────────────────────────


def test_evaluate_gives_the_score_of_the_run(cli: Cli, trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    done = cli("evaluate", trained.name, "--json")
    found = json.loads(done.out)
    for name in ("test/accuracy", "test/loss", "test/macro_f1", "test/calibration_error"):
        assert found["metrics"][name] == pytest.approx(summary["metrics"][name], abs=1e-6)
    assert sum(map(sum, found["confusion_matrix"])) == found["num_images"] == 359
    val = json.loads(
        cli("evaluate", str(trained / "checkpoints/best.pt"), "--split=val", "--json").out
    )
    best = summary["metrics"]["best/val_accuracy"]
    assert val["metrics"]["val/accuracy"] == pytest.approx(best, abs=1e-6)
    assert "confusion matrix" in cli("evaluate", "latest").out
    shifted = json.loads(cli("evaluate", "latest", "--tta=1", "--json").out)
    assert (found["tta"], shifted["tta"]) == (0, 1)
    assert shifted["metrics"]["test/loss"] != found["metrics"]["test/loss"]
    assert "averaged over shifts by 1 px" in cli("evaluate", "latest", "--tta=1").out


def test_predict_reads_pictures_of_any_size_and_polarity(
    cli: Cli, trained: Path, digits: Splits
) -> None:
    folder = Path("pictures")
    folder.mkdir()
    chosen = [int((digits.test.labels == digit).nonzero()[0]) for digit in range(10)]
    for digit, index in enumerate(chosen):
        light_on_dark = digits.test.images[index, 0].numpy()
        picture = Image.fromarray(255 - light_on_dark).resize((140, 140))
        page = Image.new("L", (220, 180), 255)
        page.paste(picture, (60, 10))
        page.convert("RGB").save(folder / f"{digit}.png")
    found = json.loads(cli("predict", str(trained), "pictures", "--json").out)["predictions"]
    right = sum(row["label"] == Path(row["file"]).stem for row in found)
    assert right >= 9
    assert set(found[0]) == {"file", "label", "confidence", "runner_up", "runner_up_confidence"}
    assert 1 >= found[0]["confidence"] >= found[0]["runner_up_confidence"] >= 0
    table = cli("predict", str(trained), "pictures/3.png", "pictures/4.png")
    assert "pictures/3.png" in table.out
    assert table.code == 0
    plain = json.loads(cli("predict", str(trained), "pictures", "--no-preprocess", "--json").out)
    assert plain["predictions"] != found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=linear", "evaluate: the model is trained already"),
        ("data.scaling=unit", "allowed overrides: data.dataset, data.dir, data.shortcut, device"),
    ],
)
def test_evaluate_refuses_overrides_without_effect(
    cli: Cli, trained: Path, override: str, message: str
) -> None:
    done = cli("evaluate", str(trained), override)
    assert done.code == 2
    assert message in done.err


def test_predict_says_which_file_is_not_a_picture(cli: Cli, trained: Path) -> None:
    Path("note.png").write_text("not a picture")
    done = cli("predict", str(trained), "note.png")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: note.png: not a picture that can be read; use PNG or JPEG\n"


def test_damaged_checkpoints_are_named(cli: Cli, trained: Path) -> None:
    best = trained / "checkpoints" / "best.pt"
    best.write_bytes(best.read_bytes()[:5000])
    done = cli("evaluate", str(trained))
    assert done.code == 2
    assert "best.pt: not a checkpoint, or truncated" in done.err
    Path("other.pt").write_text("hello")
    assert "other.pt: not a checkpoint" in cli("evaluate", "other.pt").err


# ── configs, show, schema, models, doctor ────────────────────────────────────────────────────


def test_configs_lists_every_preset(cli: Cli) -> None:
    out = cli("configs").out
    for name in preset_names():
        assert re.search(rf"│ {name}\s+│ \S", out), name


def test_show_prints_yaml_that_says_where_values_come_from(cli: Cli) -> None:
    done = cli("show", "cnn_large", "optimizer.lr=1e-4")
    assert yaml.safe_load(done.out)["optimizer"]["lr"] == 1e-4
    assert re.search(r"lr: 0\.0001 +# command line", done.out)
    assert re.search(r"name: cnn_large +# cnn_large\.yaml", done.out)
    assert "# zoo cnn_large" in done.out
    assert "# default" in done.out
    assert "dataset: digits" in cli("show", "seed=3").out


def test_schema_accepts_every_preset(cli: Cli) -> None:
    validator = Draft202012Validator(json.loads(cli("schema").out))
    for name in preset_names():
        done = cli("show", name)
        validator.validate(yaml.safe_load(done.out.replace("e-0", "e-")))


def test_models_lists_the_zoo_with_parameters(cli: Cli) -> None:
    assert re.search(r"resnet\s+│ resnet\s+│ 2,776,522\s+│ ResNet after He", cli("models").out)


def test_doctor_reports_versions_devices_folders_and_login(cli: Cli, mnist_like: Path) -> None:
    done = cli("doctor")
    assert re.search(r"torch +2\.", done.out)
    assert "W&B mode         offline (no API key found)" in done.out
    assert "runs folder      runs (will be made)" in done.out
    Path(".env").write_text(f"MNIST_WANDB_DATA_DIR={mnist_like}\nWANDB_API_KEY={'0' * 40}\n")
    try:
        facts = json.loads(cli("doctor", "--json").out)
    finally:  # `.env` is put into the environment
        for name in ("MNIST_WANDB_DATA_DIR", "WANDB_API_KEY"):
            os.environ.pop(name, None)
    assert facts["data sets there"] == "digits, mnist, shortcut_mnist"
    assert facts["W&B mode"] == "online (API key in the environment or .env)"
    assert "0" * 40 not in str(facts)


def test_help_documents_every_section_and_exit_codes(cli: Cli) -> None:
    out = cli("run", "--help").out
    for text in (
        "training.epochs [10]: Passes over",
        "optimizer.name [adamw]: One of sgd",
        "--resume RUN",
    ):
        assert text in out
    assert "130 Ctrl-C" in cli("--help").out
    assert cli("--version").out.startswith("mnist-wandb ")


def test_shell_completion_offers_presets() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mnist_wandb", "run", "--config"],
        env={
            **os.environ,
            "_MNIST_WANDB_COMPLETE": "complete_bash",
            "COMP_WORDS": "mnist-wandb run --config cnn_l",
            "COMP_CWORD": "3",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["cnn_large"]
