"""The documentation is executed, and its tables are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mnist_wandb.config import ZOO
from mnist_wandb.loading import preset_names, settings_table
from mnist_wandb.sweepfile import load_sweep

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Commands that install, download or take minutes; what they do is covered as the comment says.
ELSEWHERE = {
    "pip install uv && uv run mnist-wandb run",  # test_run_without_arguments_learns…; .ci/run
    "pip install uv && uv run pytest",  # .ci/run
    "mnist-wandb sync latest",  # needs a server: tests/test_online.py
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def shell_lines(text: str) -> list[str]:
    return [line for block in blocks("sh", text) for line in block.splitlines()]


def commands_by_section() -> dict[str, list[str]]:
    """The commands under each heading that has any."""
    parts = re.split(r"^##+ (.+)\n", README, flags=re.M)[1:]
    found = {title: shell_lines(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}
    return {title: commands for title, commands in found.items() if commands}


def write_configuration(environment: dict[str, str]) -> None:
    (config,) = [block for block in blocks("yaml") if "# mine.yaml" in block]
    Path("mine.yaml").write_text(config)


def write_picture(environment: dict[str, str]) -> None:
    Path("my-digits").mkdir()
    Image.radial_gradient("L").save("my-digits/blob.png")


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


# What there is before the commands of a section, besides finished runs; a newer run that was
# stopped is what `--resume latest` finds.
SECTIONS: dict[str, tuple[Callable[[dict[str, str]], None], ...]] = {
    "Configurations": (write_configuration,),
    "Stop and resume": (stop_a_run,),
    "Several seeds": (write_configuration,),
    "Several devices": (),
    "Use a trained model": (write_picture,),
    "Weights & Biases": (),
    "Sweeps": (),
    "Compare and report": (),
    "Labs": (),
}


def test_every_command_of_the_readme_belongs_to_a_section_that_is_run() -> None:
    found = commands_by_section()
    assert [line for commands in found.values() for line in commands] == shell_lines(README)
    assert set(shell_lines(README)) >= ELSEWHERE
    assert {title for title, lines in found.items() if not ELSEWHERE.issuperset(lines)} == set(
        SECTIONS
    )


PROGRAMS = {"mnist-wandb": "mnist_wandb", "torchrun": "torch.distributed.run"}


@pytest.mark.parametrize(
    "section",  # test_lab runs the commands of the labs too
    [pytest.param(s, marks=pytest.mark.slow) if s == "Labs" else s for s in SECTIONS],
)
def test_every_command_of_the_readme_runs_as_written(section: str, runs_dir: Path) -> None:
    folder = Path("bin")
    folder.mkdir()
    for name, module in PROGRAMS.items():
        script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    path = f"{folder.absolute()}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    for prepare in SECTIONS[section]:
        prepare(environment)
    for command in commands_by_section()[section]:
        if command in ELSEWHERE:
            continue
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


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


def table_rows(name: str) -> list[dict[str, str]]:
    """The rows of the README's table between the markers of a name, by heading."""
    (text,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, flags=re.S)
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_table_of_the_zoo_has_every_model_sorted_by_validation_with_n() -> None:
    rows = table_rows("zoo")
    assert sorted(row["model"] for row in rows) == sorted(ZOO)
    scores = [float(row["best/val_accuracy ± std"].split()[0]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    seeds: dict[str, int] = {}
    for name in ("architectures", "architectures_slow", "architectures_slowest"):
        sweep = load_sweep(name)
        for index in range(sweep.grid_size or 0):
            model = sweep.nest(sweep.grid_point(index))["config"]  # a preset is named as its model
            seeds[model] = seeds.get(model, 0) + 1
    for row in rows:
        assert 1 <= int(row["n"]) <= seeds[row["model"]], row
        if int(row["n"]) > 2:  # the preset's header says the same
            header = (ROOT / "mnist_wandb" / "configs" / f"{row['model']}.yaml").read_text()
            said = f"{row['test/accuracy ± std']} (mean ± std of {row['n']} seeds"
            assert f"# Measured: test accuracy {said}" in header, row


NOT_MEASURED = {"lab_fashion_resnet"}
IN_OTHER_TABLES = {"lab_data_size", "lab_overfit", "lab_regularise", "lab_shortcut"}
"""Without a row of their own among the known results."""


def test_every_preset_states_what_it_is_where_from_and_what_was_measured() -> None:
    results = (ROOT / "docs" / "results.md").read_text()
    for name in preset_names():
        header = (ROOT / "mnist_wandb" / "configs" / f"{name}.yaml").read_text()
        for line in (r"^# What: \S", r"^# From: \S"):
            assert re.search(line, header, flags=re.M), (name, line)
        if name in NOT_MEASURED:
            assert re.search(r"^# Measured: not yet; a run takes ", header, flags=re.M), name
            continue
        if name.startswith("lab_"):
            form = (
                r"^# Measured: test accuracy (0\.\d{4}), loss (0\.\d{3}) \(seed 0, (\d+) epochs\)"
            )
            found = re.search(form, header, flags=re.M)
            assert found, name
            row = re.search(rf"^\| `{name}` .*", results, flags=re.M)
            assert (row is None) == (name in IN_OTHER_TABLES), name
            assert row is None or f"| {found[1]} / {found[2]} | {found[3]} " in row[0], name
            continue
        assert re.search(r"^# Measured: test accuracy 0\.\d{4}", header, flags=re.M), name
        for fact in ("seed", "epochs", " s ", "cores"):
            assert fact in header, (name, fact)
