"""The command that `wandb agent` builds from a sweep file, and the configuration it leads to.

Source: `wandb/wandb_agent.py` and `wandb/sdk/launch/sweeps/utils.py` of wandb 0.31.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from mnist_wandb.errors import ConfigError, SweepError
from mnist_wandb.layers import Layer, parse_overrides, parse_value, read_yaml
from mnist_wandb.loading import ResolvedConfig, resolve_layers
from mnist_wandb.sweepfile import SweepFile, read_sweep
from mnist_wandb.sweepyaml import Problem

DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
ARGS_MACROS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "args": lambda p: [f"--{k}={v}" for k, v in p.items()],
    "args_no_equals": lambda p: [word for k, v in p.items() for word in (f"--{k}", str(v))],
    "args_no_hyphens": lambda p: [f"{k}={v}" for k, v in p.items()],
    "args_no_boolean_flags": lambda p: [
        f"--{k}" if v is True else f"--{k}={v}" for k, v in p.items() if v is not False
    ],
    "args_json": lambda p: [json.dumps(p)],
    "args_json_file": lambda p: ["wandb/sweep-ID/config-ID.json"],
    "args_append_hydra": lambda p: [f"+{k}={v}" for k, v in p.items()],
    "args_override_hydra": lambda p: [f"++{k}={v}" for k, v in p.items()],
}
"""What stands for the parameters; W&B replaces a macro only as a whole item of the list."""
OTHER_MACROS = {"env": "/usr/bin/env", "interpreter": "python"}
MACROS = (*OTHER_MACROS, "program", *ARGS_MACROS, "envvar:NAME")
PROGRAM_NAMES = ("mnist-wandb", "mnist-wandb.exe", "mnist_wandb", "mnist_wandb.__main__")
FLAGS = ("--json", "--quiet", "-q")
"""Options of `run` that change nothing in a run itself."""


@dataclass(frozen=True)
class RunCommand:
    """What a sweep file's command says about each run, besides the parameters.

    Attributes:
        config: of `--config`, or None.
        before: overrides that the parameters win over.
        after: overrides that win over the parameters.
    """

    config: str | None = None
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def example_command(sweep: SweepFile, parameters: Mapping[str, Any]) -> list[str]:
    """The command line that `wandb agent` starts for a point (on Linux and macOS)."""
    words: list[str] = []
    for item in sweep.command or DEFAULT_COMMAND:
        macro = re.fullmatch(r"\$\{(.*)\}", item)
        name = macro.group(1) if macro else ""
        if name in ARGS_MACROS:
            words += ARGS_MACROS[name](dict(sorted(parameters.items())))
        elif name in OTHER_MACROS:
            words.append(OTHER_MACROS[name])
        elif name == "program":
            words.append(sweep.program or "")
        else:
            words.append(item)
    return words


def read_command(sweep: SweepFile) -> RunCommand:
    """Understand a sweep's command as a call of `mnist-wandb run`.

    A file with neither `command` nor `program` stands for `mnist-wandb run` with the parameters.

    Raises:
        SweepError: it starts another program or command, or an option cannot be used in a sweep.
    """
    if sweep.command is None and sweep.program is None:
        return RunCommand()
    items = [
        sweep.program or "" if item == "${program}" else item
        for item in sweep.command or DEFAULT_COMMAND
    ]
    start = next((i for i, item in enumerate(items) if _is_this_program(item)), None)
    shown = " ".join(items)
    if start is None:
        raise SweepError(
            f"starts another program ({shown}); to sweep with mnist-wandb write"
            ' command: ["${env}", mnist-wandb, run, "${args_no_hyphens}"]'
        )
    if items[start + 1 : start + 2] != ["run"]:
        raise SweepError(f"expected `run` behind {items[start]} ({shown})")
    return _split(items[start + 2 :])


def _is_this_program(item: str) -> bool:
    path = PurePath(item)
    return path.name in PROGRAM_NAMES or path.parts[-2:] == ("mnist_wandb", "__main__.py")


def _split(words: Sequence[str]) -> RunCommand:
    config: str | None = None
    sides: tuple[list[str], list[str]] = ([], [])
    passed = False
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if _macro(word) in ARGS_MACROS:
            passed = True
        elif word in ("--config", "-c") and pending:
            config = pending.pop(0)
        elif word.startswith("--config="):
            config = word.partition("=")[2]
        elif word.split("=")[0] in ("--resume", "--dry-run", "--seeds"):
            raise SweepError(f"{word.split('=')[0]} cannot be used in a sweep")
        elif word not in FLAGS:
            sides[passed].append(word)
    # Without a macro the parameters come from a file, which every override wins over.
    before, after = sides if passed else ([], sides[0])
    return RunCommand(config, tuple(before), tuple(after))


def _macro(item: str) -> str:
    found = re.fullmatch(r"\$\{(.*)\}", item)
    return found.group(1) if found else ""


def resolve_point(
    sweep: SweepFile, command: RunCommand, parameters: Mapping[str, Any]
) -> ResolvedConfig:
    """The configuration of one point, as a run that an agent starts would resolve it.

    Args:
        sweep: the sweep file; its name becomes the runs' group unless they have one.
        command: see `read_command`.
        parameters: nested, as `SweepFile.nest` gives them.

    Raises:
        ConfigError: no run accepts them; one line for each problem, with its place in the file.
    """
    said = {key: _as_argument(value) for key, value in parameters.items()}
    layers = [
        parse_overrides(command.before, "command"),
        sweep.layer(said),
        parse_overrides(command.after, "command"),
    ]
    tracking = {"group": re.sub(r"[/\\#?%:\x00-\x1f]+", "-", sweep.name)[:128]}
    tracking |= {"project": sweep.project} if sweep.project else {}
    tracking |= {"entity": sweep.entity} if sweep.entity else {}
    return resolve_layers(command.config, layers, lowest=Layer("sweep", {"tracking": tracking}))


def _as_argument(value: Any) -> Any:
    """A value as it arrives: agents write texts without quotes."""
    if isinstance(value, dict):
        return {key: _as_argument(item) for key, item in value.items()}
    return parse_value(value) if isinstance(value, str) else value


# ── checks ───────────────────────────────────────────────────────────────────────────────────


def command_problems(sweep: SweepFile, layer: Layer) -> list[Problem]:
    """What is wrong with `command` and `program`."""
    problems = []
    for index, item in enumerate(sweep.command or ()):
        for name in re.findall(r"\$\{([^}]*)\}?", item):
            text = _explain_macro(name, item)
            if text:
                problems.append(Problem.at(layer, ("command", index), f"command: {text}"))
    if sweep.command is None and sweep.program is None:
        text = (
            "neither `command` nor `program`: `wandb agent` would not know what to start; write"
            ' command: ["${env}", mnist-wandb, run, "${args_no_hyphens}"]'
        )
        problems.append(Problem(layer.label, text, is_error=False))
    else:
        try:
            read_command(sweep)
        except SweepError as error:
            key = "program" if sweep.command is None else "command"
            problems.append(Problem.at(layer, (key,), f"{key}: {error}"))
    return problems


def _explain_macro(name: str, item: str) -> str:
    if name.startswith("envvar:"):
        valid = re.fullmatch(r"envvar:[A-Z0-9_]+", name)
        return "" if valid else f"{item!r}: expected ${{envvar:NAME}} with a name in capitals"
    if name not in MACROS:
        near = difflib.get_close_matches(name, MACROS, n=1, cutoff=0.5)
        hint = f"; did you mean ${{{near[0]}}}?" if near else ""
        return f"unknown macro ${{{name}}} (W&B drops it){hint}; known: {', '.join(MACROS)}"
    if _macro(item) != name:
        return f"{item!r}: W&B replaces ${{{name}}} only where it is a whole item of the list"
    return ""


@dataclass(frozen=True)
class SampleCheck:
    """How the samples of a sweep went through the configuration's validation.

    Attributes:
        num_samples: how many were tried.
        is_complete: whether these were all points of a grid.
        problems: each distinct problem once, with the first point that has it.
        points: nested parameters of a few points.
    """

    num_samples: int
    is_complete: bool
    problems: list[Problem]
    points: list[dict[str, Any]]


def check_samples(sweep: SweepFile, count: int = 100, num_points: int = 3) -> SampleCheck:
    """Resolve and validate the configurations of all points of a small grid, else of samples."""
    size = sweep.grid_size
    is_complete = size is not None and size <= count
    if is_complete and size is not None:
        drawn = [sweep.grid_point(i) for i in range(size)]
    else:
        drawn = [sweep.sample(i) for i in range(count)]
    points = [sweep.nest(values) for values in drawn]
    command = read_command(sweep)
    found: dict[str, Problem] = {}
    for point in points:
        try:
            resolve_point(sweep, command, point)
        except ConfigError as error:
            for line in str(error).splitlines():
                if line.startswith(f"{sweep.label}:"):
                    place, _, text = line.removeprefix(f"{sweep.label}:").partition(": ")
                    where, position = f"{sweep.label}:{place}", _position(place)
                else:
                    where, text, position = sweep.label, line, (0, 0)
                text = f"no run accepts {json.dumps(point)}: {text}"
                key = re.sub(r"got .*?(?=, |$)", "", text.partition("}: ")[2])
                found.setdefault(f"{where} {key}", Problem(where, text, position=position))
    problems = sorted(found.values(), key=lambda problem: problem.position)
    return SampleCheck(len(points), is_complete, problems, points[:num_points])


def _position(place: str) -> tuple[int, int]:
    numbers = [int(part) for part in place.split(":") if part.isdecimal()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def check_sweep(path: Path) -> tuple[SweepFile | None, list[Problem], SampleCheck | None]:
    """Everything that is wrong with a sweep file: by itself, its command, and its points' runs."""
    sweep, problems = read_sweep(path)
    if sweep is None:
        return None, problems, None
    layer = read_yaml(path, sweep.label)
    problems = [*problems, *command_problems(sweep, layer)]
    if any(problem.is_error for problem in problems):
        return sweep, problems, None
    samples = check_samples(sweep)
    return sweep, [*problems, *samples.problems], samples
