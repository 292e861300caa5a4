"""The lab is executed: block by block, in its order, in one folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Finished
from PIL import Image

Cli = Callable[..., Finished]
DOCS = Path(__file__).parents[1] / "docs"
LAB = (DOCS / "lab.md").read_text()
BLOCKS = re.findall(r"^```(\w+)( mnist)?\n(.*?)^```", LAB, flags=re.M | re.S)
PICTURES = sorted(set(re.findall(r"!\[[^\]]+\]\((pictures/[^)]+)\)", LAB)))


def shorten(text: str) -> str:
    """Fewer epochs: the blocks still have to run, not to reach anything."""
    return re.sub(r"(epochs[=:] ?)\d+", r"\g<1>2", text)


def run_block(
    kind: str, text: str, command: Callable[[str], None], scope: dict[str, object]
) -> None:
    if kind == "yaml":
        name = re.match(r"# (\S+\.yaml)\n", text)
        assert name, "a configuration says its file's name in the first line"
        Path(name[1]).write_text(text)
    elif kind == "python":
        exec(compile(text, "docs/lab.md", "exec"), scope)
    else:
        assert kind == "sh"
        for line in text.splitlines():
            command(line)


def test_the_lab_has_blocks_of_every_kind() -> None:
    kinds = [kind + mnist for kind, mnist, _ in BLOCKS]
    assert {"sh", "sh mnist", "python", "yaml"} == set(kinds)
    assert kinds.count("python") >= 5
    assert len(re.findall("^```", LAB, flags=re.M)) == 2 * len(BLOCKS)


def test_every_block_of_the_lab_runs_with_fewer_epochs(
    cli: Cli, mnist_like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    scope: dict[str, object] = {}

    def command(line: str) -> None:
        program, *arguments = shlex.split(line)
        assert program == "mnist-wandb"
        done = cli(*arguments)
        assert done.code == 0, f"{line}\n{done.err}"

    for kind, mnist, text in BLOCKS:
        if mnist:  # noise in MNIST's files, 300 images of it
            monkeypatch.setenv("MNIST_WANDB_DATA_DIR", str(mnist_like))
            text = text.replace("lab_overfit", "lab_overfit data.train_size=100")
        run_block(kind, shorten(text), command, scope)
    assert Path("docs/pictures/grid.png").is_file()


@pytest.mark.slow
def test_every_block_of_the_lab_runs_as_written(
    real_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNIST_WANDB_DATA_DIR", str(real_data))
    folder = Path("bin").absolute()
    folder.mkdir()
    program = folder / "mnist-wandb"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mnist_wandb "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def command(line: str) -> None:
        done = subprocess.run(line, shell=True, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"

    scope: dict[str, object] = {}
    for kind, _, text in BLOCKS:
        run_block(kind, text, command, scope)
    said = capsys.readouterr().out
    assert "others, and its own - FAILED" in said  # the planted fault
    (chosen,) = re.findall(r"lr 0\.01: best val accuracy (0\.\d+)", said)
    assert float(chosen) > 0.95
    line = "mnist-wandb compare lr.yaml --json"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    groups = json.loads(done.stdout)["groups"]
    means = {group["parameters"]["optimizer.lr"]: group["mean"] for group in groups}
    assert means[0.1] < 0.2 < means[0.0001] < min(means[0.001], means[0.01])


@pytest.mark.parametrize("picture", PICTURES)
def test_pictures_of_the_lab_are_those_that_its_command_makes(picture: str, cli: Cli) -> None:
    assert "mnist-wandb explore --pictures docs/pictures" in LAB
    assert cli("explore", "-q", "--pictures", "made", "tracking.mode=disabled").code == 0
    with Image.open(DOCS / picture) as shown, Image.open(Path("made") / Path(picture).name) as made:
        assert shown.size == made.size
        difference = np.asarray(shown, np.float32) - np.asarray(made, np.float32)
    assert np.abs(difference).mean() < 2  # another release of Pillow may draw letters otherwise
