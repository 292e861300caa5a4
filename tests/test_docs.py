"""The documentation is executed, and its tables are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mnist_wandb.loading import preset_names, settings_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Commands that install, download or take minutes; what they do is covered as the comment says.
ELSEWHERE = {
    "pip install uv && uv run mnist-wandb run",  # test_run_without_arguments_learns…; .ci/run
    "pip install uv && uv run pytest",  # .ci/run
    "mnist-wandb sync latest",  # needs a server: tests/test_online.py
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_every_command_of_the_readme_runs_as_written(mnist_like: Path) -> None:
    (config,) = [block for block in blocks("yaml") if "# mine.yaml" in block]
    Path("mine.yaml").write_text(config)
    Path("my-digits").mkdir()
    Image.radial_gradient("L").save("my-digits/blob.png")
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    ran = [line for line in commands if line not in ELSEWHERE]
    assert len(ran) > 10
    folder = Path("bin")
    folder.mkdir()
    programs = {"mnist-wandb": "mnist_wandb", "torchrun": "torch.distributed.run"}
    for name, module in programs.items():
        (folder / name).write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n'
        )
        (folder / name).chmod(0o755)
    path = f"{folder.absolute()}{os.pathsep}{os.environ['PATH']}"
    for command in ran:
        # The newest run is finished, so a second one, stopped, is what `--resume latest` finds.
        if "--resume latest" in command:
            stop_a_run({**os.environ, "PATH": path})
        done = subprocess.run(
            command, shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def stop_a_run(environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        ["mnist-wandb", "run", "training.epochs=3", "training.batch_size=8"],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 1/3"):
            process.terminate()
            break
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_the_python_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    best, accuracy = capsys.readouterr().out.splitlines()[-10].split()[:2]
    assert 0.5 < float(best) <= 1
    assert 0.5 < float(accuracy) <= 1


def test_the_settings_page_is_the_table_of_the_code() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    rows = [f"| `{name}` | `{default}` | {text} |" for name, default, text in settings_table()]
    table = "\n".join(row.replace("`` ", "").replace("| `` |", "| |") for row in rows)
    assert table in page, f"put this into docs/settings.md:\n{table}"


def test_env_example_names_every_variable_that_is_read() -> None:
    source = (ROOT / "mnist_wandb" / "settings.py").read_text()
    read = set(re.findall(r'"((?:MNIST_)?WANDB_[A-Z_]+)"', source))
    assert len(read) >= 10
    example = (ROOT / ".env.example").read_text()
    for name in read:
        assert re.search(rf"^#{name}=", example, flags=re.M), name


# Their headers say so; what docs/results.md has measured is said there.
NOT_MEASURED = {name for name in preset_names() if name.startswith("lab_")}


def test_every_preset_states_what_it_is_where_from_and_what_was_measured() -> None:
    for name in preset_names():
        header = (ROOT / "mnist_wandb" / "configs" / f"{name}.yaml").read_text()
        for line in (r"^# What: \S", r"^# From: \S"):
            assert re.search(line, header, flags=re.M), (name, line)
        if name in NOT_MEASURED:
            reason = r"(a run takes over 10 minutes|see docs/results\.md)"
            assert re.search(rf"^# Measured: not yet; {reason}", header, flags=re.M), name
            continue
        assert re.search(r"^# Measured: test accuracy 0\.\d{4}", header, flags=re.M), name
        for fact in ("seed", "epochs", " s ", "cores"):
            assert fact in header, (name, fact)
