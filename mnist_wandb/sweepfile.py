"""W&B sweep files: found, read with positions, checked, and their points enumerated or drawn.

Source of the format: https://docs.wandb.ai/models/sweeps/sweep-config-keys.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mnist_wandb.config import DEFAULT_METRIC
from mnist_wandb.distributions import (
    ALIASES,
    EDGE,
    FIELDS,
    GRID_KINDS,
    KINDS,
    MOST_GRID_VALUES,
    Distribution,
    find_problems,
    infer_kind,
    is_number,
    make_distribution,
)
from mnist_wandb.errors import ConfigError, SweepError
from mnist_wandb.hyperband import Hyperband
from mnist_wandb.layers import KeyPath, Layer, describe_value, look_up, parse_yaml, set_path
from mnist_wandb.sweepyaml import Problem, reading_problems

_INSTALLED = Path(__file__).parent / "sweeps"
SWEEPS_DIR = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "sweeps"
"""Where the shipped sweep files lie: in the installed package, else beside it in a checkout."""

METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
LOGGED_METRICS = (
    "best/val_accuracy",
    "best/epoch",
    "val/accuracy",
    "val/loss",
    "val/macro_f1",
    "train/accuracy",
    "train/loss",
    "train/grad_norm",
    "train/images_per_second",
    "train/lr",
)
"""What every run logs while it trains; a test compares it with a run."""

TOP_KEYS = (
    "method",
    "metric",
    "parameters",
    "early_terminate",
    "run_cap",
    "command",
    "program",
    "name",
    "description",
    "project",
    "entity",
)
IGNORED_TOP_KEYS = ("apiVersion", "kind", "controller", "settings")
METRIC_KEYS = ("name", "goal", "target", "impute")
HYPERBAND_KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")
DECIDING_KEYS = ("method", "metric", "parameters", "early_terminate", "command", "program")
"""What makes a sweep another sweep; a changed `run_cap` goes on with the same one."""


@dataclass(frozen=True)
class Metric:
    """What a sweep is about."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = None

    @property
    def maximize(self) -> bool:
        """Whether larger is better."""
        return self.goal == "maximize"

    def reached(self, value: float) -> bool:
        """Whether a value is at the target or beyond."""
        if self.target is None:
            return False
        return value >= self.target if self.maximize else value <= self.target


@dataclass(frozen=True)
class Parameter:
    """One leaf of `parameters`.

    Attributes:
        path: keys from the top; a key may itself be dotted ("model.dropout").
        distribution: what its values are drawn from.
        position: line and column (from 1) in the sweep file.
    """

    path: tuple[str, ...]
    distribution: Distribution
    position: tuple[int, int]

    @property
    def name(self) -> str:
        """The dotted name."""
        return ".".join(self.path)


@dataclass(frozen=True)
class SweepFile:
    """A valid sweep file.

    Attributes:
        label: how messages call it.
        text: its content.
        name: the `name` in it, else the file's.
        method: grid | random | bayes.
        metric: what is optimised, or None (then nothing is compared).
        parameters: the leaves, in the order of W&B's grid.
        hyperband: early termination, or None.
        run_cap: largest number of runs, or None.
        command: the `command` list, or None where the file has none.
        program: the `program`, or None.
        project, entity: of W&B, or None.
        digest: tells sweeps apart: 8 hexadecimal digits over everything that decides the points.
    """

    label: str
    text: str
    name: str
    method: str
    metric: Metric | None
    parameters: tuple[Parameter, ...]
    hyperband: Hyperband | None
    run_cap: int | None
    command: tuple[str, ...] | None
    program: str | None
    project: str | None
    entity: str | None
    digest: str

    @property
    def objective(self) -> Metric:
        """What trials are listed by; accuracy on validation where the file names no metric."""
        return self.metric or Metric(DEFAULT_METRIC, "maximize")

    @functools.cached_property
    def grid_columns(self) -> list[list[Any]]:
        """The values of each parameter of a grid."""
        columns = []
        for parameter in self.parameters:
            # A value that is there twice is one point, as for W&B.
            values = {json.dumps(v): v for v in parameter.distribution.grid() or []}
            columns.append(list(values.values()))
        return columns

    @property
    def grid_size(self) -> int | None:
        """Number of points of a grid; None for random and bayes, which have no end."""
        return math.prod(len(c) for c in self.grid_columns) if self.method == "grid" else None

    @property
    def num_points(self) -> int | None:
        """How many runs the sweep has: the grid, `run_cap`, or the smaller; None: no end."""
        limits = [n for n in (self.grid_size, self.run_cap) if n is not None]
        return min(limits) if limits else None

    def grid_point(self, index: int) -> list[Any]:
        """The values of one grid point, in the order of `parameters`; the last varies fastest."""
        values = []
        for column in reversed(self.grid_columns):
            index, position = divmod(index, len(column))
            values.append(column[position])
        return values[::-1]

    def quantiles(self, index: int, seed: int = 0) -> list[float]:
        """The seeded quantiles of the index-th random point, one for each parameter."""
        rng = random.Random(f"{seed}-{index}")
        return [rng.uniform(EDGE, 1 - EDGE) for _ in self.parameters]

    def sample(self, index: int, seed: int = 0) -> list[Any]:
        """The index-th random point; a grid's is one of its points."""
        if self.method == "grid":
            return self.grid_point(random.Random(f"{seed}-{index}").randrange(self.grid_size or 1))
        quantiles = self.quantiles(index, seed)
        return [p.distribution.at(u) for p, u in zip(self.parameters, quantiles, strict=True)]

    def nest(self, values: Sequence[Any]) -> dict[str, Any]:
        """Values as an agent hands them over: nested as in the file, with its dotted keys."""
        nested: dict[str, Any] = {}
        for parameter, value in zip(self.parameters, values, strict=True):
            set_path(nested, parameter.path, value)
        return nested

    def layer(self, parameters: Mapping[str, Any]) -> Layer:
        """Nested parameters as a layer of the configuration, with their places in this file."""
        values: dict[str, Any] = {}
        for key, value in parameters.items():
            set_path(values, key.split("."), value)
        marks: dict[KeyPath, tuple[int, int]] = {}
        for parameter in self.parameters:
            path = tuple(parameter.name.split("."))
            for end in range(1, len(path) + 1):
                marks.setdefault(path[:end], parameter.position)
            marks[path] = parameter.position
        return Layer(self.label, values, marks)


def sweep_names() -> list[str]:
    """Names of the shipped sweep files, sorted."""
    return sorted(path.stem for path in SWEEPS_DIR.glob("*.yaml"))


def find_sweep(source: str) -> Path:
    """Find a file of one's own, else a shipped one by name (with or without `.yaml`).

    Raises:
        SweepError: neither exists; names the nearest shipped ones.
    """
    path, is_folder = look_up(source)
    if path is not None:
        return path
    name = source.removesuffix(".yaml")
    if name in sweep_names():
        return SWEEPS_DIR / f"{name}.yaml"
    if is_folder:
        raise SweepError(f"{source}: is a folder, expected a sweep file")
    near = difflib.get_close_matches(name, sweep_names(), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise SweepError(f"{source}: no such sweep file{hint}; shipped are: {', '.join(sweep_names())}")


def load_sweep(source: str) -> SweepFile:
    """Find and read a sweep file.

    Raises:
        SweepError: with one line for each error, by file, line and column.
    """
    sweep, problems = read_sweep(find_sweep(source))
    errors = [str(problem) for problem in problems if problem.is_error]
    if errors or sweep is None:
        raise SweepError("\n".join(errors))
    return sweep


def read_sweep(path: Path) -> tuple[SweepFile | None, list[Problem]]:
    """Read a sweep file and tell all that is wrong with it by itself (not with its runs).

    Returns:
        The sweep, None where it has errors; and errors and warnings in the file's order.

    Raises:
        SweepError: it cannot be read at all.
    """
    label = f"{path.parent.name}/{path.name}" if path.parent == SWEEPS_DIR else str(path)
    try:
        text = path.read_text(encoding="utf-8")
        layer = parse_yaml(text, label)
    except UnicodeDecodeError:
        raise SweepError(f"{label}: not a text file in UTF-8") from None
    except OSError as error:
        raise SweepError(f"{label}: cannot be read: {error.strerror or error}") from None
    except ConfigError as error:
        raise SweepError(str(error)) from None
    reader = _Reader(layer)
    sweep = reader.read(text, path.stem)
    problems = sorted(
        {str(p): p for p in [*reader.problems, *reading_problems(text, layer)]}.values(),
        key=lambda problem: problem.position,
    )
    return (None if any(p.is_error for p in problems) else sweep), problems


class _Reader:
    """Reads the parts of one file; what is wrong is collected, so that all of it can be told."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.problems: list[Problem] = []

    def add(self, path: KeyPath, text: str, *, is_error: bool = True) -> None:
        self.problems.append(
            Problem.at(self.layer, path, f"{_dotted(path)}: {text}" if path else text, is_error)
        )

    def check_keys(self, path: KeyPath, values: Mapping[str, Any], known: Iterable[str]) -> None:
        known = list(known)
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                self.add((*path, key), f"unknown key{hint}; known: {', '.join(known)}")

    def read(self, text: str, stem: str) -> SweepFile | None:
        values = self.layer.values
        self.check_keys((), values, (*TOP_KEYS, *IGNORED_TOP_KEYS))
        method = self.read_method()
        metric = self.read_metric()
        hyperband = self.read_hyperband(metric)
        if method == "bayes" and "metric" not in values:
            self.add(("method",), "bayes needs a `metric` to optimise")
        parameters: list[Parameter] = []
        if "parameters" in values:
            self.read_parameters(("parameters",), (), parameters)
        else:
            self.add((), "`parameters` is missing")
        if method == "grid":
            self.check_grid(parameters)
        strings = {key: self.read_text(key) for key in ("name", "program", "project", "entity")}
        self.read_text("description")
        run_cap, command = self.read_run_cap(), self.read_command()
        if any(problem.is_error for problem in self.problems):
            return None
        deciding = {key: values[key] for key in DECIDING_KEYS if key in values}
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:8]
        return SweepFile(
            label=self.layer.label,
            text=text,
            name=strings["name"] or stem,
            method=method,
            metric=metric,
            parameters=tuple(parameters),
            hyperband=hyperband,
            run_cap=run_cap,
            command=command,
            program=strings["program"],
            project=strings["project"],
            entity=strings["entity"],
            digest=digest,
        )

    def read_method(self) -> str:
        if "method" not in self.layer.values:
            self.add((), f"`method` is missing; allowed: {', '.join(METHODS)}")
            return "random"
        method = self.layer.values["method"]
        if method not in METHODS:
            self.add(("method",), f"got {describe_value(method)}, allowed: {', '.join(METHODS)}")
        return str(method)

    def read_text(self, key: str) -> str | None:
        value = self.layer.values.get(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            self.add((key,), f"got {describe_value(value)}, expected text")
            return None
        return value

    def read_run_cap(self) -> int | None:
        cap = self.layer.values.get("run_cap")
        if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
            self.add(("run_cap",), f"got {describe_value(cap)}, expected a whole number ≥ 1")
            return None
        return cap

    def read_command(self) -> tuple[str, ...] | None:
        command = self.layer.values.get("command")
        if command is None:
            return None
        if not isinstance(command, list) or not command:
            self.add(("command",), f"got {describe_value(command)}, expected a list")
            return None
        for index, item in enumerate(command):
            if not isinstance(item, str | int | float) or isinstance(item, bool):
                self.add(("command", index), f"got {describe_value(item)}, expected text")
        return tuple(map(str, command))

    def read_metric(self) -> Metric | None:
        values = self.layer.values.get("metric")
        if values is None:
            return None
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            self.add(("metric",), "expected a mapping with `name` and `goal`")
            return None
        self.check_keys(("metric",), values, METRIC_KEYS)
        name, goal = values["name"], values.get("goal", "minimize")
        if name not in LOGGED_METRICS:
            self.add(("metric", "name"), self.explain_metric(name))
        if goal not in GOALS:
            self.add(("metric", "goal"), f"got {describe_value(goal)}, allowed: {', '.join(GOALS)}")
        elif (goal == "minimize") == name.endswith(("accuracy", "macro_f1")):
            said = "goal" in values
            text = f"{name} is better when it is larger; write goal: maximize"
            text = text if said else f"{text} (W&B minimizes by default)"
            self.add(("metric", "goal") if said else ("metric",), text, is_error=False)
        target = values.get("target")
        if target is not None and not is_number(target):
            self.add(("metric", "target"), f"got {describe_value(target)}, expected a number")
            target = None
        return Metric(name, "maximize" if goal == "maximize" else "minimize", target)

    def explain_metric(self, name: str) -> str:
        if name.startswith("test/"):
            return (
                f"{name!r}: choosing by the test split would make its score worthless;"
                " use best/val_accuracy"
            )
        near = difflib.get_close_matches(name, LOGGED_METRICS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{name!r} is never logged{hint}; logged are: {', '.join(LOGGED_METRICS)}"

    def read_hyperband(self, metric: Metric | None) -> Hyperband | None:
        path: KeyPath = ("early_terminate",)
        values = self.layer.values.get("early_terminate")
        if values is None:
            return None
        if not isinstance(values, dict) or values.get("type") != "hyperband":
            self.add(path, "expected a mapping with `type: hyperband`")
            return None
        before = len(self.problems)
        self.check_keys(path, values, HYPERBAND_KEYS)
        if "metric" not in self.layer.values:
            self.add(path, "needs a `metric` to compare runs by")
        if ("min_iter" in values) == ("max_iter" in values):
            self.add(path, "give either min_iter, or max_iter with s")
        elif ("max_iter" in values) != ("s" in values):
            self.add(path, "max_iter and s belong together")
        for key in ("min_iter", "max_iter", "s"):
            value = values.get(key, 1)
            if not is_number(value) or value != int(value) or value < 1:
                self.add((*path, key), f"got {describe_value(value)}, expected a whole number ≥ 1")
        eta = values.get("eta", 3)
        if not is_number(eta) or eta <= 1:
            self.add((*path, "eta"), f"got {describe_value(eta)}, expected a number > 1")
        if not isinstance(values.get("strict", False), bool):
            self.add((*path, "strict"), "expected true or false")
        if len(self.problems) > before or metric is None:
            return None
        hyperband = Hyperband.from_fields(values)
        if not hyperband.bands:
            self.add(path, "has no band: max_iter / eta is below 1; raise max_iter")
        return hyperband

    def read_parameters(
        self, path: KeyPath, above: tuple[str, ...], found: list[Parameter]
    ) -> None:
        """Read one level of `parameters`, sorted as W&B does."""
        values: Any = self.layer.values
        for part in path:
            values = values[part]
        if not isinstance(values, dict) or not values:
            self.add(path, f"got {describe_value(values)}, expected at least one parameter")
            return
        for key in sorted(values):
            spec, here = values[key], (*path, key)
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", key):
                self.add(here, "not a setting; expected a key like model.dropout")
            elif not isinstance(spec, dict):
                self.add(
                    here,
                    f"got {describe_value(spec)}, expected `value: …`, `values: […]` or limits",
                )
            elif "parameters" in spec:
                self.check_keys(here, spec, ("parameters",))
                self.read_parameters((*here, "parameters"), (*above, key), found)
            else:
                distribution = self.read_distribution(here, spec)
                if distribution is not None:
                    position = self.layer.marks.get(here, (1, 1))
                    found.append(Parameter((*above, key), distribution, position))

    def read_distribution(self, path: KeyPath, spec: dict[str, Any]) -> Distribution | None:
        before = len(self.problems)
        kind = spec.get("distribution", infer_kind(spec))
        kind = ALIASES.get(str(kind), kind)
        if kind is None:
            self.check_keys(path, spec, FIELDS)
            if len(self.problems) == before:
                self.add(path, "expected `value`, `values`, `min` and `max`, or a `distribution`")
            return None
        if kind not in KINDS:
            near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            text = f"got {describe_value(kind)}{hint}; known: {', '.join(KINDS)}"
            self.add((*path, "distribution"), text)
            return None
        own = ["distribution", *KINDS[kind].required, *KINDS[kind].defaults]
        own += ["probabilities"] if kind == "categorical" else []
        for key in spec:
            if key in FIELDS and key not in own:
                self.add((*path, key), f"does not belong to {kind}, which has: {', '.join(own)}")
        self.check_keys(path, {k: v for k, v in spec.items() if k not in FIELDS}, own)
        if len(self.problems) > before:
            return None
        for field, text in find_problems(kind, spec):
            self.add((*path, field) if field in spec else path, text)
        if len(self.problems) > before:
            return None
        self.warn_about(path, kind, spec)
        return make_distribution(kind, spec)

    def warn_about(self, path: KeyPath, kind: str, spec: Mapping[str, Any]) -> None:
        """What is possible and hardly meant."""
        if kind.endswith("log_uniform") and 0 < spec["min"] < spec["max"] <= 1:
            low, high = math.exp(spec["min"]), math.exp(spec["max"])
            self.add(
                path,
                f"{kind} takes exponents: this is {low:.3g} … {high:.3g}; for limits of the value"
                f" itself write distribution: {kind}_values",
                is_error=False,
            )
        values = spec.get("values", [])
        if len({json.dumps(value) for value in values}) < len(values):
            self.add((*path, "values"), "has a value twice", is_error=False)

    def check_grid(self, parameters: Sequence[Parameter]) -> None:
        for parameter in parameters:
            path: KeyPath = ("parameters", *_between(parameter.path, "parameters"))
            distribution = parameter.distribution
            if "probabilities" in distribution.fields:
                self.add(path, "a grid takes each value once; leave out `probabilities`")
            elif distribution.kind not in GRID_KINDS:
                self.add(
                    path,
                    f"a grid cannot cover the continuous range of {distribution.kind}; list"
                    " `values`, use q_uniform, or method: random",
                )
            elif distribution.has_huge_grid:
                self.add(path, f"has more than {MOST_GRID_VALUES:,} values; list some `values`")


def _between(parts: Sequence[str], separator: str) -> list[str]:
    """a, b → a, separator, b: the way to a nested parameter in the file."""
    return [item for part in parts for item in (separator, part)][1:]


def _dotted(path: KeyPath) -> str:
    shown = [str(part) for i, part in enumerate(path) if part != "parameters" or i == 0]
    text = ".".join(shown[1:] if len(shown) > 1 and shown[0] == "parameters" else shown)
    return text if text.isprintable() else repr(text)
