"""Sweep files: what is read, what is refused and where, grids and draws, the shipped files."""

from __future__ import annotations

import importlib.metadata
import json
import re
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mnist_wandb.agent import (
    check_samples,
    check_sweep,
    example_command,
    read_command,
    resolve_point,
)
from mnist_wandb.config import ZOO, RunConfig
from mnist_wandb.data import load_dataset
from mnist_wandb.errors import SweepError
from mnist_wandb.experiment import run_experiment
from mnist_wandb.loading import load_config, parse_overrides, resolve_layers
from mnist_wandb.settings import load_settings
from mnist_wandb.sweepfile import (
    LOGGED_METRICS,
    SWEEPS_DIR,
    SweepFile,
    find_sweep,
    load_sweep,
    read_sweep,
    sweep_names,
)
from mnist_wandb.sweepschema import sweep_schema

COMMAND = 'command: ["${env}", mnist-wandb, run, "${args_no_hyphens}"]\n'
HEAD = f"method: random\nmetric: {{name: val/loss, goal: minimize}}\n{COMMAND}"


def write(text: str, name: str = "mine.yaml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def sweep_of(parameters: str, head: str = HEAD) -> SweepFile:
    return load_sweep(str(write(f"{head}parameters:\n{parameters}")))


def problems_of(text: str) -> list[str]:
    return [str(problem) for problem in check_sweep(write(text))[1]]


# ── reading ──────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_file_is_read_into_its_parts() -> None:
    sweep = load_sweep("mlp_bayes")
    assert (sweep.name, sweep.method, sweep.run_cap) == ("mlp_bayes", "bayes", 60)
    assert sweep.metric is not None
    assert (sweep.metric.name, sweep.metric.maximize) == ("best/val_accuracy", True)
    assert sweep.hyperband is not None
    assert sweep.hyperband.bands[:3] == (2, 6, 18)
    assert [p.name for p in sweep.parameters][:3] == [
        "model.batch_norm", "model.dropout", "model.hidden_sizes",
    ]  # fmt: skip
    assert sweep.grid_size is None
    assert sweep.num_points == 60


def test_the_target_is_reached_in_the_direction_of_the_goal() -> None:
    text = "method: grid\nmetric: {name: NAME, goal: GOAL, target: 0.5}\nparameters: {seed: {value: 0}}"
    for name, goal, reached in (("val/loss", "minimize", 0.4), ("val/accuracy", "maximize", 0.6)):
        metric = load_sweep(str(write(text.replace("NAME", name).replace("GOAL", goal)))).metric
        assert metric is not None
        assert metric.reached(reached)
        assert metric.reached(0.5)
        assert not metric.reached(1 - reached)


def test_what_decides_the_points_decides_the_digest() -> None:
    first = sweep_of("  seed: {values: [0, 1]}\n")
    same = sweep_of("  seed:\n    values: [0, 1]  # a comment\n", f"run_cap: 7\n{HEAD}")
    other = sweep_of("  seed: {values: [0, 2]}\n")
    assert first.digest == same.digest != other.digest


@pytest.mark.parametrize("source", ["quick", "quick.yaml"])
def test_a_shipped_file_is_found_by_name_from_anywhere(source: str) -> None:
    assert find_sweep(source).name == "quick.yaml"


def test_a_missing_file_names_the_nearest_shipped_ones() -> None:
    with pytest.raises(SweepError, match=r"quik: no such sweep file; did you mean 'quick'\?"):
        find_sweep("quik")
    with pytest.raises(SweepError, match="is a folder, expected a sweep file"):
        find_sweep(".")
    with pytest.raises(SweepError, match="no such sweep file; shipped are: architectures,"):
        find_sweep("\0")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method: [", "mine.yaml:1:10: not valid YAML"),
        ("method: grid\nmethod: grid", "mine.yaml:2:1: not valid YAML: duplicate key 'method'"),
        ("- a", "mine.yaml: found the list"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(text: str, expected: str) -> None:
    with pytest.raises(SweepError, match=re.escape(expected)):
        load_sweep(str(write(text)))


PARAMETERS = "parameters: {seed: {values: [0]}}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "mine.yaml: `method` is missing; allowed: grid, random, bayes"),
        ("method: gird\n" + PARAMETERS, "mine.yaml:1:1: method: got the text 'gird', allowed: grid"),
        ("method: grid\n", "mine.yaml: `parameters` is missing"),
        ("method: grid\nparameters: {}\n", "mine.yaml:2:1: parameters: got a mapping, expected at least"),
        ("metod: grid\n", "mine.yaml:1:1: metod: unknown key; did you mean 'method'?; known: method,"),
        (HEAD + "run_cap: 0\n" + PARAMETERS, "run_cap: got 0, expected a whole number ≥ 1"),
        (HEAD + "name: 3\n" + PARAMETERS, "name: got 3, expected text"),
        ("method: bayes\n" + PARAMETERS, "method: bayes needs a `metric` to optimise"),
        ("method: grid\nmetric: {name: val/acuracy}\n" + PARAMETERS,
         "mine.yaml:2:10: metric.name: 'val/acuracy' is never logged; did you mean 'val/accuracy'?"),
        ("method: grid\nmetric: {name: test/accuracy, goal: maximize}\n" + PARAMETERS,
         "choosing by the test split would make its score worthless; use best/val_accuracy"),
        ("method: grid\nmetric: {name: val/loss, gaol: minimize}\n" + PARAMETERS,
         "metric.gaol: unknown key; did you mean 'goal'?"),
        ("method: grid\nmetric: {name: val/loss, goal: min}\n" + PARAMETERS,
         "metric.goal: got the text 'min', allowed: minimize, maximize"),
        ("method: grid\nmetric: {name: val/accuracy}\n" + PARAMETERS,
         "mine.yaml:2:1: warning: metric: val/accuracy is better when it is larger; write goal: maximize"
         " (W&B minimizes by default)"),
        ("method: grid\nmetric: {name: val/loss, target: soon}\n" + PARAMETERS,
         "metric.target: got the text 'soon', expected a number"),
        (HEAD + "early_terminate: {type: median}\n" + PARAMETERS,
         "early_terminate: expected a mapping with `type: hyperband`"),
        (HEAD + "early_terminate: {type: hyperband}\n" + PARAMETERS,
         "early_terminate: give either min_iter, or max_iter with s"),
        (HEAD + "early_terminate: {type: hyperband, max_iter: 9}\n" + PARAMETERS,
         "early_terminate: max_iter and s belong together"),
        (HEAD + "early_terminate: {type: hyperband, max_iter: 2, s: 1}\n" + PARAMETERS,
         "early_terminate: has no band"),
        (HEAD + "early_terminate: {type: hyperband, min_iter: 0}\n" + PARAMETERS,
         "early_terminate.min_iter: got 0, expected a whole number ≥ 1"),
        (HEAD + "early_terminate: {type: hyperband, min_iter: 1, eta: 1}\n" + PARAMETERS,
         "early_terminate.eta: got 1, expected a number > 1"),
        (HEAD + "parameters: {lr: 0.1}\n", "mine.yaml:4:14: lr: got 0.1, expected `value: …`"),
        (HEAD + "parameters:\n  seed: {valeus: [1]}\n",
         "mine.yaml:5:10: seed.valeus: unknown key; did you mean 'values'?"),
        (HEAD + "parameters:\n  seed: {values: [1], min: 2}\n",
         "mine.yaml:5:23: seed.min: does not belong to categorical"),
        (HEAD + "parameters:\n  seed: {}\n", "seed: expected `value`, `values`, `min` and `max`"),
        (HEAD + "parameters:\n  optimizer.lr: {distribution: loguniform, min: 1, max: 2}\n",
         "optimizer.lr.distribution: got the text 'loguniform'; did you mean 'log_uniform'?"),
        (HEAD + "parameters:\n  optimizer.lr: {min: 2.0, max: 1.0}\n",
         "mine.yaml:5:18: optimizer.lr.min: 2.0 is not less than max 1.0"),
        (HEAD + "parameters:\n  optimizer:\n    parameters:\n      lr: {min: 2.0, max: 1.0}\n",
         "mine.yaml:7:12: optimizer.lr.min: 2.0 is not less than max 1.0"),
        (HEAD + "parameters:\n  optimizer.lr: {distribution: log_uniform, min: 0.001, max: 0.1}\n",
         "warning: optimizer.lr: log_uniform takes exponents: this is 1 … 1.11; for limits"),
        (HEAD + "parameters:\n  seed: {values: [1, 1]}\n", "warning: seed.values: has a value twice"),
        (HEAD + "parameters:\n  learning-rate: {value: 1}\n",
         "learning-rate: not a setting; expected a key like model.dropout"),
        ("method: grid\nparameters:\n  optimizer.lr: {min: 0.1, max: 0.2}\n",
         "mine.yaml:3:3: optimizer.lr: a grid cannot cover the continuous range of uniform"),
        ("method: grid\nparameters:\n  seed: {values: [0, 1], probabilities: [0.5, 0.5]}\n",
         "seed: a grid takes each value once; leave out `probabilities`"),
        ("method: grid\nparameters:\n  seed: {min: 0, max: 4000000000}\n",
         "seed: has more than 100,000 values"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(text: str, expected: str) -> None:
    assert any(expected in problem for problem in problems_of(text)), problems_of(text)


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = (
        "method: grid\nmetric: {name: loss}\nparameters:\n  seed: {min: 0.5, max: 1.5}\n  lr: {}\n"
    )
    lines = [problem.split(":")[1] for problem in problems_of(text)]
    assert lines == ["2", "4", "5"]


# ── YAML as W&B reads it ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("scalar", "advice"),
    [
        ("1e-3", "W&B reads 1e-3 as text; write 1.0e-3"),
        ("1e5", "W&B reads 1e5 as text; write 1.0e+5"),
        ("1.5e5", "W&B reads 1.5e5 as text; write 1.5e+5"),
        ("on", "W&B reads on as true or false; put it into quotes"),
        ("1:30", "W&B reads 1:30 as a number; put it into quotes"),
        ("010", "W&B reads 010 as an octal number"),
        ("2026-01-01", "W&B reads 2026-01-01 as a date"),
        ("'0.001'", "the text '0.001' looks like a number; write 0.001 without quotes"),
        ("'True'", "the text 'True' looks like true or false; write true without quotes"),
        ("'None'", "the text 'None' looks like null; write null without quotes"),
    ],
)
def test_values_that_wandb_reads_as_something_else_are_told(scalar: str, advice: str) -> None:
    loader = yaml.SafeLoader
    text = f"{HEAD}parameters:\n  optimizer.lr:\n    values: [{scalar}]\n"
    assert f"mine.yaml:6:14: {advice}" in "\n".join(problems_of(text))
    assert isinstance(yaml.load(scalar, loader), str) == ("as text" in advice or "looks" in advice)


@pytest.mark.parametrize("scalar", ["0.001", "1.0e-3", "adam", "true", "null", "'adam'", "-3"])
def test_values_that_everybody_reads_alike_are_left_alone(scalar: str) -> None:
    text = f"{HEAD}parameters:\n  optimizer.lr:\n    values: [{scalar}]\n"
    assert read_sweep(write(text))[1] == []


def test_a_number_in_quotes_is_fine_where_text_is_meant() -> None:
    assert read_sweep(write(f"{HEAD}parameters:\n  name: {{values: ['1', '2']}}\n"))[1] == []


# ── points ───────────────────────────────────────────────────────────────────────────────────

GRID = """
  optimizer:
    parameters:
      name: {values: [sgd, adam]}
      lr: {value: 0.1}
  data.train_size: {distribution: q_uniform, min: 100, max: 400, q: 100}
  model.name: {values: [linear, mlp_128]}
  seed: {min: 3, max: 4}
"""


def test_the_grid_is_that_of_the_engine_of_wandb() -> None:
    with warnings.catch_warnings(action="ignore"):
        from sweeps.grid_search import grid_search_next_runs
    sweep = sweep_of(GRID, "method: grid\n" + COMMAND)
    assert sweep.grid_size == 3 * 2 * 2 * 2
    config = yaml.safe_load(sweep.text)
    expected = grid_search_next_runs([], config, n=24)
    for index, run in enumerate(expected):
        assert run is not None
        wanted = {key: entry["value"] for key, entry in run.config.items()}
        assert sweep.nest(sweep.grid_point(index)) == wanted


def test_a_repeated_value_is_one_grid_point() -> None:
    assert sweep_of("  seed: {values: [0, 1, 0]}\n", "method: grid\n").grid_size == 2


def test_run_cap_bounds_a_grid_and_a_random_search() -> None:
    assert sweep_of("  seed: {values: [0, 1, 2]}\n", "method: grid\nrun_cap: 2\n").num_points == 2
    assert sweep_of("  seed: {values: [0, 1]}\n", "method: grid\nrun_cap: 9\n").num_points == 2
    assert sweep_of("  seed: {values: [0, 1]}\n", "method: random\n").num_points is None


def test_draws_are_a_function_of_seed_and_number() -> None:
    sweep = sweep_of("  optimizer.lr: {min: 0.1, max: 0.2}\n  seed: {min: 0, max: 9}\n")
    assert sweep.sample(3) == sweep.sample(3)
    assert len({json.dumps(sweep.sample(i)) for i in range(50)}) == 50
    assert sweep.sample(3, seed=1) != sweep.sample(3)


# ── commands ─────────────────────────────────────────────────────────────────────────────────


def agent_words(macro: str, parameters: dict[str, Any]) -> list[str]:
    """What W&B's own code makes of a macro."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    arguments = {"args": {key: {"value": value} for key, value in sorted(parameters.items())}}
    return list(create_sweep_command_args(arguments)[macro])


POINT = {"model": {"name": "mlp", "batch_norm": True}, "seed": 3, "training.ema_decay": None,
         "optimizer.lr": 1e-05, "training.deterministic": False, "name": "a b"}  # fmt: skip


@pytest.mark.parametrize(
    "macro",
    ["args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags", "args_json",
     "args_append_hydra", "args_override_hydra"],
)  # fmt: skip
def test_example_commands_are_those_of_the_agent(macro: str) -> None:
    head = f'method: random\ncommand: ["${{env}}", "${{interpreter}}", -m, mnist_wandb, run, "${{{macro}}}"]\n'
    sweep = sweep_of("  seed: {value: 3}\n", head)
    words = example_command(sweep, POINT)
    assert words[:5] == ["/usr/bin/env", "python", "-m", "mnist_wandb", "run"]
    assert words[5:] == agent_words(macro, POINT)
    # What the command line makes of them is what the local sweep runs.
    point = {key: value for key, value in POINT.items() if macro != "args_no_boolean_flags"}
    arrived = resolve_layers(None, [parse_overrides(example_command(sweep, point)[5:])])
    local = resolve_point(sweep, read_command(sweep), point).config
    tracking = {"group": "mine"}
    assert local.model_dump() | {"tracking": 0} == arrived.config.model_dump() | {"tracking": 0}
    assert local.tracking.group == tracking["group"]


def test_the_command_says_config_and_overrides_and_which_of_them_win() -> None:
    head = (
        "method: random\ncommand: [uv, run, mnist-wandb, run, --config, mlp_128, training.epochs=3,"
        ' "${args}", --json, seed=9]\n'
    )
    sweep = sweep_of("  training.epochs: {value: 7}\n  seed: {value: 1}\n", head)
    config = resolve_point(sweep, read_command(sweep), {"training.epochs": 7, "seed": 1}).config
    assert (config.model.name, config.training.epochs, config.seed) == ("mlp_128", 7, 9)


def test_without_a_macro_every_override_wins_as_for_an_agent() -> None:
    sweep = sweep_of(
        "  seed: {value: 1}\n", "method: random\ncommand: [mnist-wandb, run, seed=9]\n"
    )
    assert resolve_point(sweep, read_command(sweep), {"seed": 1}).config.seed == 9


def test_project_entity_and_group_of_the_file_are_below_everything() -> None:
    head = "method: random\nname: a/b\nproject: p\nentity: e\n"
    sweep = sweep_of("  seed: {value: 1}\n", head)
    tracking = resolve_point(
        sweep, read_command(sweep), {"tracking.project": "mine"}
    ).config.tracking
    assert (tracking.project, tracking.entity, tracking.group) == ("mine", "e", "a-b")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('command: [python, train.py, "${args}"]', "command: starts another program (python train.py"),
        ("program: train.py", "program: starts another program (${env} ${interpreter} train.py"),
        ("command: [mnist-wandb, evaluate]", "command: expected `run` behind mnist-wandb"),
        ("command: [mnist-wandb, run, --resume, x]", "command: --resume cannot be used in a sweep"),
        ('command: [mnist-wandb, run, "${arg}"]',
         "mine.yaml:2:29: command: unknown macro ${arg} (W&B drops it); did you mean ${args}?"),
        ('command: [mnist-wandb, run, "--x=${args}"]', "replaces ${args} only where it is a whole item"),
        ('command: [mnist-wandb, run, "${envvar:home}"]', "expected ${envvar:NAME}"),
        ("command: mnist-wandb run", "command: got the text 'mnist-wandb run', expected a list"),
        ("run_cap: 3", "warning: neither `command` nor `program`"),
    ],
)  # fmt: skip
def test_commands_that_cannot_work_are_told(line: str, expected: str) -> None:
    found = problems_of(f"method: random\n{line}\nparameters: {{seed: {{value: 1}}}}\n")
    assert any(expected in problem for problem in found), found


def test_an_environment_variable_may_stand_in_a_command() -> None:
    line = 'command: [mnist-wandb, run, "data.dir=${envvar:DATA}", "${args}"]'
    assert problems_of(f"method: random\n{line}\nparameters: {{seed: {{value: 1}}}}\n") == []


# ── the configurations ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("  model.dropoutt: {value: 0.1}\n  model.name: {value: mlp_128}\n",
         "mine.yaml:5:3: no run accepts {\"model.dropoutt\": 0.1, \"model.name\": \"mlp_128\"}:"
         " model.dropoutt: unknown key; did you mean 'dropout'?"),
        ("  learning_rate: {min: 0.1, max: 0.2}\n", "learning_rate: unknown key"),
        ("  lr: {min: 0.1, max: 0.2}\n", "lr: unknown key; did you mean 'optimizer.lr'?"),
        ("  optimizer.lr: {distribution: normal}\n", "mine.yaml:5:3: no run accepts"),
        ("  config: {values: [mlp_128, mlp_129]}\n", "no such preset or file; did you mean 'mlp_128'"),
        ("  model:\n    parameters:\n      name: {values: [mlp, cnn]}\n      blocks: {value: []}\n",
         "model 'mlp' has no such field (it belongs to cnn)"),
    ],
)  # fmt: skip
def test_parameters_that_no_run_accepts_are_told_with_their_place(
    parameters: str, expected: str
) -> None:
    found = problems_of(f"{HEAD}parameters:\n{parameters}")
    assert any(expected in problem for problem in found), found
    assert len(found) < 5


def test_a_small_grid_is_validated_completely_and_a_large_one_by_samples() -> None:
    small = check_samples(sweep_of("  seed: {min: 1, max: 7}\n", "method: grid\n"))
    assert (small.num_samples, small.is_complete, len(small.points)) == (7, True, 3)
    large = check_samples(sweep_of("  seed: {min: 1, max: 700}\n", "method: grid\n"))
    assert (large.num_samples, large.is_complete) == (100, False)


def test_every_metric_that_a_sweep_may_name_is_logged_by_a_run(digits_config: RunConfig) -> None:
    logged: set[str] = set()
    run_experiment(
        digits_config,
        load_settings(),
        emit=lambda event: logged.update(getattr(event, "values", {})),
    )
    assert set(LOGGED_METRICS) == logged


# ── the shipped files ────────────────────────────────────────────────────────────────────────


def schema_of_wandb() -> dict[str, Any]:
    """The schema in W&B's open-source engine, from 2022: it does not know `run_cap` yet.

    The wandb package itself ships none; its server checks, and its `sweeps` extra is this engine.
    """
    files = importlib.metadata.files("sweeps") or []
    (path,) = [file for file in files if file.name == "schema.json"]
    schema = json.loads(path.locate().read_text())
    schema["properties"]["run_cap"] = {"type": "integer", "minimum": 1}
    return dict(schema)


every_file = pytest.mark.parametrize("name", sweep_names())


def test_the_shipped_files_are_those_that_are_promised() -> None:
    assert sweep_names() == [
        "architectures", "architectures_slow", "architectures_slowest", "cnn_random", "data_size", "mlp_bayes", "optimizers",
        "preprocessing", "quick", "regularisation", "shortcut",
    ]  # fmt: skip


@every_file
def test_a_shipped_file_is_valid_by_the_schema_of_wandb(name: str) -> None:
    content = yaml.safe_load((SWEEPS_DIR / f"{name}.yaml").read_text())
    jsonschema.Draft7Validator(schema_of_wandb()).validate(content)
    for parameter in content["parameters"].values():
        assert "parameters" in parameter or parameter


@every_file
def test_a_shipped_file_has_no_problem_and_only_valid_points(name: str) -> None:
    sweep, problems, _ = check_sweep(find_sweep(name))
    assert problems == []
    assert sweep is not None
    assert sweep.name == name
    assert sweep.metric is not None
    assert (sweep.metric.name, sweep.metric.goal) == ("best/val_accuracy", "maximize")
    assert sweep.num_points is not None
    checked = check_samples(sweep, count=max(200, sweep.grid_size or 0))
    assert checked.problems == []
    assert checked.is_complete == (sweep.method == "grid")


@every_file
def test_a_shipped_file_says_its_question_its_cost_and_how_to_run_it(name: str) -> None:
    text = (SWEEPS_DIR / f"{name}.yaml").read_text()
    assert text.startswith("# Question: ")
    assert re.search(r"^# Cost: +\S", text, flags=re.M)
    assert f"mnist-wandb sweep run {name}\n" in text
    assert f"wandb sweep sweeps/{name}.yaml" in text


def test_the_architectures_are_the_zoo_with_fewer_seeds_for_what_takes_long() -> None:
    seeds: dict[str, set[int]] = {}
    numbers = {"architectures": 5, "architectures_slow": 3, "architectures_slowest": 1}
    for name, number in numbers.items():
        sweep = load_sweep(name)
        for index in range(sweep.grid_size or 0):
            point = sweep.nest(sweep.grid_point(index))
            seeds.setdefault(load_config(point["config"]).model.name, set()).add(point["seed"])
            assert point["seed"] in range(number)
    assert set(seeds) == set(ZOO)
    counts = sorted(len(found) for found in seeds.values())
    assert counts == [1, 1, 3, 3] + [5] * 8


def test_quick_needs_no_download() -> None:
    sweep = load_sweep("quick")
    for index in range(sweep.grid_size or 0):
        config = resolve_point(
            sweep, read_command(sweep), sweep.nest(sweep.grid_point(index))
        ).config
        assert config.data.dataset == "digits"
    load_dataset(config.data)


# ── the schema for editors ───────────────────────────────────────────────────────────────────


def test_the_schema_accepts_every_shipped_file_and_refuses_what_the_checks_refuse() -> None:
    validator = jsonschema.Draft202012Validator(sweep_schema())
    validator.check_schema(sweep_schema())
    for name in sweep_names():
        validator.validate(yaml.safe_load((SWEEPS_DIR / f"{name}.yaml").read_text()))
    for text in (
        "method: gird\nparameters: {seed: {value: 1}}",
        "method: grid\nparameters: {seed: {valeu: 1}}",
        "method: grid\nparameters: {seed: {distribution: uniform, min: 0}}",
        "method: grid\nmetric: {name: test/accuracy}\nparameters: {seed: {value: 1}}",
    ):
        assert not validator.is_valid(yaml.safe_load(text)), text
    keys = sweep_schema()["$defs"]["parameters"]["properties"]
    assert {"optimizer.lr", "model.dropout", "seed", "config"} <= set(keys)
