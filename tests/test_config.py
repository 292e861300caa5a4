"""Every setting: what is accepted, what is rejected in which words, and where values come from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from mnist_wandb.config import VARIANTS, ZOO, RunConfig, Section
from mnist_wandb.errors import ConfigError
from mnist_wandb.layers import parse_yaml, read_yaml
from mnist_wandb.loading import (
    PRESETS_DIR,
    ResolvedConfig,
    find_config,
    json_schema,
    load_config,
    override_config,
    preset_names,
    resolve_config,
    to_yaml,
    validate,
)

fuzz = settings(max_examples=150, deadline=None, database=None)

VARIANT_OVERRIDES = (
    *(f"model.name={name}" for name in (*ZOO, *VARIANTS["model"])),
    *(f"optimizer.name={name}" for name in VARIANTS["optimizer"]),
    *(f"schedule.name={name}" for name in VARIANTS["schedule"]),
)


def resolve(text: str = "", *overrides: str, sweep: str | None = None) -> ResolvedConfig:
    """Resolve a file of that text, sweep parameters and a command line."""
    Path("f.yaml").write_text(text, encoding="utf-8")
    parameters = None
    if sweep is not None:
        parameters = Path("sweep.yaml")
        parameters.write_text(sweep, encoding="utf-8")
    return resolve_config("f.yaml", overrides, sweep_parameters=parameters)


def load(text: str = "", *overrides: str, sweep: str | None = None) -> RunConfig:
    return resolve(text, *overrides, sweep=sweep).config


def problems(text: str = "", *overrides: str, sweep: str | None = None) -> list[str]:
    """The lines of the error."""
    with pytest.raises(ConfigError) as caught:
        resolve(text, *overrides, sweep=sweep)
    return str(caught.value).splitlines()


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ── what is rejected, and how ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # unknown keys, at every depth, with the nearest known one
        ("trainig: {}", "f.yaml:1:1: trainig: unknown key; did you mean 'training'?; known: name,"),
        (
            "training: {epoch: 3}",
            "f.yaml:1:12: training.epoch: unknown key; did you mean 'epochs'?; known: epochs,",
        ),
        (
            "data:\n  augment:\n    rotate: 3",
            "f.yaml:3:5: data.augment.rotate: unknown key; did you mean 'rotation_degrees'?",
        ),
        (
            "model: {name: cnn, blocks: [{channels: 3, poool: 2}]}",
            "f.yaml:1:43: model.blocks.0.poool: unknown key; did you mean 'pool'?",
        ),
        (
            "training: {early_stopping: {patence: 1}}",
            "f.yaml:1:29: training.early_stopping.patence: unknown key; did you mean 'patience'?",
        ),
        ("optimizer: {learn_rate: 1}", "f.yaml:1:13: optimizer.learn_rate: unknown key"),
        ("xyzzy: 1", "f.yaml:1:1: xyzzy: unknown key; known: name, seed, device, data,"),
        ("1: 2", "f.yaml:1:1: 1: unknown key; known: name,"),
        # known keys in the wrong place
        ("epochs: 3", "f.yaml:1:1: epochs: unknown key; did you mean 'training.epochs'?"),
        ("lr: 3", "f.yaml:1:1: lr: unknown key; did you mean 'optimizer.lr'?"),
        ("hidden_sizes: [3]", "f.yaml:1:1: hidden_sizes: unknown key; did you mean 'model.hidden_"),
        ("config: quickstart", "f.yaml:1:1: config: unknown key"),
        ("dataset: mnist", "f.yaml:1:1: dataset: unknown key; did you mean 'data.dataset'?"),
        ("training: {lr: 3}", "f.yaml:1:12: training.lr: unknown key; did you mean 'optimizer.lr'"),
        ("batchsize: 1", "f.yaml:1:1: batchsize: unknown key; did you mean 'training.batch_size'?"),
        # dotted keys, which only the command line and sweeps have
        (
            "training.epochs: 3",
            "f.yaml:1:1: training.epochs: unknown key; in a file write training: {epochs: …}",
        ),
        (
            "data.augment.zoom: 3",
            "data.augment.zoom: unknown key; in a file write data: {augment: {zoom: …}}",
        ),
        # keys that are not plain words
        ('"a\\nb": 1', "f.yaml:1:1: 'a\\nb': unknown key; known: name,"),
        (
            'training: {"a\\u2028b": 1}',
            "f.yaml:1:12: training.'a\\u2028b': unknown key; known: epochs",
        ),
        # wrong types
        ("training: {epochs: many}", "training.epochs: got the text 'many', expected a number"),
        ("training: {epochs: null}", "training.epochs: got null, expected a number"),
        ("training: {epochs: '3'}", "training.epochs: got the text '3', expected a number"),
        ("seed: 1.0", "f.yaml:1:1: seed: got 1.0, expected a whole number"),
        ("seed: [1]", "f.yaml:1:1: seed: got the list [1], expected a whole number"),
        ("seed: {a: 1}", "f.yaml:1:1: seed: got a mapping, expected a whole number"),
        ("name: 3", "f.yaml:1:1: name: got 3, expected text (put it in quotes)"),
        ("tracking: {notes: 1e-3}", "tracking.notes: got 0.001, expected text (put it in quotes)"),
        ("tracking: {tags: x}", "tracking.tags: got the text 'x', expected a list like"),
        ("tracking: {tags: [x, 3]}", "f.yaml:1:22: tracking.tags.1: got 3, expected text"),
        ("model: {name: mlp, hidden_sizes: 3}", "model.hidden_sizes: got 3, expected a list like"),
        ("model: {name: mlp, hidden_sizes: [1, x]}", "f.yaml:1:38: model.hidden_sizes.1: got the"),
        ("model: {name: cnn, dropout: [0.1]}", "model.dropout: got the list [0.1], expected a num"),
        ("data: {augment: {translate_pixels: 1.5}}", "got 1.5, expected a whole number"),
        # true is not 1, 1 is not true, yes is a text
        ("seed: true", "f.yaml:1:1: seed: got true, expected a whole number"),
        ("training: {epochs: true}", "training.epochs: got true, expected a number"),
        ("model: {name: mlp, dropout: true}", "model.dropout: got true, expected a list like"),
        ("training: {deterministic: 1}", "training.deterministic: got 1, expected true or false"),
        (
            "training: {deterministic: yes}",
            "training.deterministic: got the text 'yes', expected true or false",
        ),
        ("training: {compile: 1}", "training.compile: got 1, expected true, false or auto"),
        ("training: {compile: on}", "training.compile: got the text 'on', expected true, false or"),
        ("training: {compile: null}", "training.compile: got null, expected true, false or auto"),
        # out of range
        ("training: {epochs: -1}", "f.yaml:1:12: training.epochs: got -1, expected greater than 0"),
        ("training: {batch_size: 0}", "got 0, expected greater than or equal to 1"),
        ("seed: -1", "f.yaml:1:1: seed: got -1, expected greater than or equal to 0"),
        ("seed: 4294967296", "f.yaml:1:1: seed: got 4294967296, expected less than 4294967296"),
        ("data: {val_fraction: 1}", "data.val_fraction: got 1, expected less than or equal to 0.9"),
        ("data: {train_size: 0}", "data.train_size: got 0, expected greater than or equal to 1"),
        ("optimizer: {lr: 0}", "optimizer.lr: got 0, expected greater than 0"),
        (
            "optimizer: {betas: [0.9, 1.0]}",
            "f.yaml:1:26: optimizer.betas.1: got 1.0, expected less",
        ),
        (
            "model: {name: mlp, hidden_sizes: [0]}",
            "f.yaml:1:35: model.hidden_sizes.0: got 0, expec",
        ),
        ("model: {name: mlp, dropout: 1}", "model.dropout: got 1, expected less than 1"),
        # not finite
        ("optimizer: {lr: .inf}", "f.yaml:1:13: optimizer.lr: got inf, expected a finite number"),
        ("optimizer: {lr: -.inf}", "optimizer.lr: got -inf, expected a finite number"),
        ("training: {epochs: .nan}", "training.epochs: got nan, expected a finite number"),
        ("training: {epochs: 1e400}", "training.epochs: got inf, expected a finite number"),
        ("model: {name: mlp, dropout: .nan}", "model.dropout: got nan, expected a finite number"),
        # choices
        (
            "training: {loss: msee}",
            "training.loss: got the text 'msee', allowed: cross_entropy, mse; did you mean 'mse'?",
        ),
        ("data: {dataset: fashion}", "got the text 'fashion', allowed: digits, mnist, fashion_mn"),
        ("data: {dataset: fashion}", "did you mean 'fashion_mnist'?"),
        ("tracking: {mode: onlin}", "allowed: auto, online, offline, disabled; did you mean 'onli"),
        ("device: gpu", "device: got the text 'gpu', allowed: auto, cpu, cuda, cuda:N, mps"),
        ("device: cuda:x", "device: got the text 'cuda:x', allowed: auto, cpu, cuda, cuda:N, mps"),
        (
            "optimizer: {name: sgdd}",
            "f.yaml:1:13: optimizer.name: got the text 'sgdd', allowed: sgd, rmsprop, adagrad,"
            " adam, adamw, nadam; did you mean 'sgd'?",
        ),
        ("schedule: {name: onecycle}", "allowed: constant, step, cosine, one_cycle; did you mean"),
        (
            "model: {name: mlp_smal}",
            "f.yaml:1:9: model.name: got the text 'mlp_smal', allowed: lin",
        ),
        ("model: {name: mlp_smal}", "did you mean 'mlp_small'?"),
        ("tracking: {mode: null}", "mode: got null, allowed: auto, online, offline, disabled"),
        ("tracking: {log_model: 3}", "tracking.log_model: got 3, allowed: best, every_epoch"),
        ("optimizer: {name: null}", "optimizer.name: got null, allowed: sgd,"),
        ("model: {name: [mlp]}", "model.name: got the list ['mlp'], allowed: linear,"),
        ("model: {name: 3}", "model.name: got 3, allowed: linear,"),
        # a field of another variant
        (
            "optimizer: {name: adam, momentum: 0.9}",
            "f.yaml:1:25: optimizer.momentum: optimizer 'adam' has no such field (it belongs to"
            " sgd, rmsprop); adam has: name, lr, weight_decay, betas, eps",
        ),
        (
            "schedule: {name: constant, gamma: 0.1}",
            "f.yaml:1:28: schedule.gamma: schedule 'constant' has no such field (it belongs to"
            " step); constant has: name",
        ),
        (
            "model: {name: mlp_small, widths: [1]}",
            "f.yaml:1:26: model.widths: model 'mlp_small' has no such field (it belongs to"
            " resnet); mlp_small has: name, hidden_sizes, dropout, activation, batch_norm",
        ),
        (
            "model: {name: linear, hidden_sizes: [3]}",
            "model 'linear' has no such field (it belongs to mlp, cnn); linear has: name",
        ),
        # a scalar, null or a list for a section
        *(
            (f"{section}: {value}", f"f.yaml:1:1: {section}: got {found}, expected a section")
            for section in ("data", "model", "optimizer", "schedule", "training", "tracking")
            for value, found in (
                ("3", "3"),
                ("sgd", "the text 'sgd'"),
                ("null", "null"),
                ("[]", "the list []"),
            )
        ),
        ("optimizer: adam", "expected a section; write optimizer.name=…"),
        ("data: {augment: null}", "f.yaml:1:8: data.augment: got null, expected a section"),
        ("training: {early_stopping: 3}", "training.early_stopping: got 3, expected a section"),
        ("training: {early_stopping: true}", "training.early_stopping: got true, expected a sec"),
        ("model: {name: cnn, blocks: [3]}", "f.yaml:1:29: model.blocks.0: got 3, expected a secti"),
        ("model: {name: cnn, blocks: {channels: 3}}", "model.blocks: got a mapping, expected a li"),
        # lists of the wrong length
        (
            "model: {name: mlp, hidden_sizes: [1, 2], dropout: [0.1]}",
            "f.yaml:1:1: model: dropout has 1 values for 2 hidden layers; give one number, or one"
            " per layer",
        ),
        (
            "model: {name: resnet, blocks_per_stage: [1]}",
            "f.yaml:1:1: model: blocks_per_stage has 1 stages, widths 3; give one number per stage",
        ),
        (
            "model: {name: mlp, hidden_sizes: [], dropout: []}",
            "model.hidden_sizes: got the list []",
        ),
        ("model: {name: cnn, blocks: []}", "model.blocks: got the list [], expected at least one"),
        ("optimizer: {betas: [0.9]}", "f.yaml:1:13: optimizer.betas"),
        (
            "optimizer: {betas: [0.9, 0.9, 0.9]}",
            "f.yaml:1:13: optimizer.betas: got the list [0.9, 0.9, 0.9], expected at most 2 items",
        ),
        ("model: {name: cnn, blocks: [{kernel_size: 3}]}", "model.blocks.0.channels: is missing"),
        # values that do not go together
        (
            "model: {name: cnn, blocks: [{channels: 1, kernel_size: 4}]}",
            "f.yaml:1:1: model: blocks.0: an even kernel_size (4) needs a padding",
        ),
        (
            "model: {name: cnn, blocks: [{channels: 1, pool: 14}, {channels: 1, pool: 14}]}",
            "model: blocks.1: nothing is left of a 2×2 input (kernel_size 3, pool 14); pool less",
        ),
        (
            "model: {name: cnn, blocks: [{channels: 1, pool: 14},"
            " {channels: 1, kernel_size: 5, padding: 0}]}",
            "model: blocks.1: nothing is left of a 2×2 input (kernel_size 5, pool None); pool less",
        ),
        (
            "optimizer: {name: sgd, momentum: 0}",
            "f.yaml:1:1: optimizer: nesterov needs momentum > 0; set nesterov: false for plain SGD",
        ),
        (
            "training: {loss: mse, label_smoothing: 0.1}",
            "f.yaml:1:1: training: label_smoothing belongs to cross_entropy; set it to 0 with loss:"
            " mse",
        ),
        # texts
        ('name: ""', "f.yaml:1:1: name: got the text ''"),
        ('name: "a\\nb"', "name: got the text 'a\\nb', allowed: text without control characters"),
        ('name: "a\\n"', "name: got the text 'a\\n', allowed: text without control characters"),
        ("tracking: {project: a/b}", "allowed: text without control characters or / \\ # ? % :"),
        ('data: {dir: ""}', "f.yaml:1:8: data.dir: got the text ''"),
        # YAML itself
        ("seed: 1\nseed: 2", "f.yaml:2:1: not valid YAML: duplicate key 'seed' (first in line 1)"),
        ("seed: [1", "f.yaml:1:9: not valid YAML: expected ',' or ']'"),
        ("- seed", "f.yaml: found the list ['seed'], expected sections like `training: {…}`"),
    ],
)
def test_load_config_rejects_in_one_line_that_says_where_and_what(text: str, line: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert line in found[0]
    assert found[0].startswith("f.yaml:")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.epoch=3", "command line: training.epoch: unknown key; did you mean 'epochs'?"),
        ("epochs=3", "command line: epochs: unknown key; did you mean 'training.epochs'?"),
        ("seed=x", "command line: seed: got the text 'x', expected a whole number"),
        ("seed=True", "command line: seed: got true, expected a whole number"),
        ("training.epochs=nan", "command line: training.epochs: got nan, expected a finite number"),
        ("training.epochs=1e999", "command line: training.epochs: got inf, expected a finite num"),
        ("optimizer.lr=-inf", "command line: optimizer.lr: got -inf, expected a finite number"),
        ("training.epochs=[!!bool x]", "command line: training.epochs: got the text '[!!bool x]'"),
        (".".join(["a"] * 1500) + "=1", "command line: cannot read 'a.a.a.a.a"),
        ("tracking.tags=[lab, 3]", "command line: tracking.tags.1: got 3, expected text"),
        ("training=null", "command line: training: got null, expected a section"),
        ("optimizer=sgd", "command line: optimizer: got the text 'sgd', expected a section; write"),
        ("optimizer.momentum=0.5", "command line: optimizer.momentum: optimizer 'adamw' has no su"),
        ("optimizer.name=sgdd", "command line: optimizer.name: got the text 'sgdd', allowed: sgd,"),
        ("model.name.x=1", "command line: model.name: got a mapping, allowed: linear,"),
        ("data.augment.zoom.x=1", "command line: data.augment.zoom: got a mapping, expected a nu"),
        ("seed=" + "9" * 400, "command line: seed: got 99999"),
        ("seed=" + "9" * 4500, "command line: seed: got the text '99999"),
        ("training.epochs=" + "9" * 400, "command line: training.epochs: got 99999"),
        ("seed=" + "[" * 900 + "]" * 900, "command line: seed: got "),
        ("name=", "command line: name: got the text ''"),
        ('name="\\ud800"', "command line: name: got the text '\\ud800'"),
        ("config=3", "command line: config: expected a preset name"),
        ("config=quickstrat", "--config quickstrat: no such preset or file; did you mean 'quick"),
        ("quickstart", "command line: cannot read 'quickstart'; write section.field=value"),
    ],
    ids=lambda v: v[:30],
)
def test_load_config_rejects_an_override_and_names_the_command_line(
    override: str, line: str
) -> None:
    found = problems("", override)
    assert len(found) == 1
    assert found[0].startswith(line)
    assert len(found[0]) < 400


def test_load_config_says_every_problem_in_a_line_of_its_own() -> None:
    text = "training: {epochs: 0, batch_size: x, loos: 3}\noptimizer: {name: adam, momentum: 1}\n"
    assert sorted(line.split(": ")[1] for line in problems(text, "seed=q")) == [
        "optimizer.momentum",
        "seed",
        "training.batch_size",
        "training.epochs",
        "training.loos",
    ]


def test_load_config_names_the_layer_that_said_the_wrong_value() -> None:
    found = problems("training:\n  epochs: 0\nseed: 1", "seed=x", sweep="optimizer.lr: {value: 0}")
    assert sorted(line.partition(": got")[0] for line in found) == [
        "command line: seed",
        "f.yaml:2:3: training.epochs",
        "sweep parameters: optimizer.lr",
    ]


def test_a_later_layer_mends_a_wrong_value() -> None:
    assert load("seed: x\ntraining: {epochs: 0}", "seed=2", "training.epochs=3").seed == 2


@pytest.mark.parametrize("text", ['"\\ud800": 1', 'training: {"\\ud800": 1}', 'name: "\\ud800"'])
def test_half_a_character_in_a_file_is_a_config_error(text: str) -> None:
    (line,) = problems(text)
    assert line.startswith("f.yaml:1:")


def test_many_unknown_keys_are_explained_at_once() -> None:
    keys = [f"a_key_that_is_not_known_{i}" for i in range(10)]
    begun = time.process_time()
    found = problems("\n".join(f"{key}: 1" for key in keys))
    assert time.process_time() - begun < 2
    assert [line.split(": ")[1] for line in found] == keys


def test_validate_names_no_layer_where_there_is_none() -> None:
    with pytest.raises(ConfigError) as caught:
        validate({"seed": "x"})
    assert str(caught.value) == "seed: got the text 'x', expected a whole number"


# ── what is accepted ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("seed: 010", "seed", 10),
        ("training: {epochs: 3}", "training.epochs", 3),
        ("training: {epochs: .5}", "training.epochs", 0.5),
        ("optimizer: {lr: 1e-3}", "optimizer.lr", 0.001),
        ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
        ("optimizer: {betas: [0, 0.5]}", "optimizer.betas", [0.0, 0.5]),
        ("training: {compile: true}", "training.compile", True),
        ("training: {early_stopping: {}}", "training.early_stopping.patience", 3),
        ("name: no", "name", "no"),
        ("device: cuda:1", "device", "cuda:1"),
        ("tracking: {tags: [a, on]}", "tracking.tags", ["a", "on"]),
        ("model: {name: mlp, hidden_sizes: [8, 4], dropout: 0.5}", "model.dropout", 0.5),
        ("model: {name: mlp_64x3, dropout: 0}", "model.dropout", 0),
        ("model: {name: mlp_dropout}", "model.dropout", [0.4, 0.3]),
        ("model: {name: mlp_small, hidden_sizes: [9]}", "model.hidden_sizes", [9]),
        ("model: {name: cnn_valid}", "model.hidden_sizes", [128]),
        ("model: {name: mlp, hidden_sizes: [8, 4], dropout: [0.5, 0.5]}", "model.dropout", 0.5),
        ("optimizer: {name: sgd, momentum: 0, nesterov: false}", "optimizer.nesterov", False),
        ("schedule: {name: one_cycle, warmup_fraction: 0}", "schedule.warmup_fraction", 0),
    ],
)
def test_load_config_reads_values_as_people_mean_them(text: str, path: str, value: Any) -> None:
    assert dict(leaves(load(text).model_dump(mode="json")))[path] == value


def test_an_empty_file_is_the_default_configuration() -> None:
    assert load("") == RunConfig()
    assert set(resolve("").origins.values()) == {"default", "zoo cnn_large"}


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().training.epochs = 3  # type: ignore[misc]


def test_a_run_is_named_after_data_set_and_model_unless_it_has_a_name() -> None:
    assert load("model: {name: mlp_small}").run_name == "mnist-mlp_small"
    assert load("name: mine").run_name == "mine"


@pytest.mark.parametrize("name", ZOO)
def test_every_zoo_name_is_a_valid_model_of_its_family(name: str) -> None:
    model = load(f"model: {{name: {name}}}").model
    assert isinstance(model, VARIANTS["model"][ZOO[name].family])
    assert model.name == name
    assert ZOO[name].source
    dump = model.model_dump(mode="json")
    for field, value in ZOO[name].fields.items():
        if field == "blocks":
            assert [
                {k: b[k] for k in said} for b, said in zip(dump[field], value, strict=True)
            ] == (value)
        else:
            assert dump[field] == value


@pytest.mark.parametrize("family", VARIANTS["model"])
def test_every_family_is_a_model_by_itself(family: str) -> None:
    assert load(f"model: {{name: {family}}}").model.name == family


# ── layers ───────────────────────────────────────────────────────────────────────────────────


def test_later_layers_win() -> None:
    text, sweep = "training: {epochs: 3}", "training.epochs: {value: 4}"
    assert load(text).training.epochs == 3
    assert load(text, sweep=sweep).training.epochs == 4
    assert load(text, "training.epochs=5", sweep=sweep).training.epochs == 5


def test_layers_merge_deeply() -> None:
    augment = load("data: {augment: {zoom: 0.5}}", 'data.augment={"elastic": 1}').data.augment
    assert (augment.zoom, augment.elastic) == (0.5, 1)


def test_lists_of_a_later_layer_replace() -> None:
    assert load("tracking: {tags: [a, b]}", 'tracking.tags=["c"]').tracking.tags == ("c",)


@pytest.mark.parametrize(
    ("text", "overrides", "section", "expected"),
    [
        (  # shared fields stay, the others go
            "optimizer: {name: adam, lr: 0.5, betas: [0.1, 0.1]}",
            ["optimizer.name=sgd"],
            "optimizer",
            {"name": "sgd", "lr": 0.5, "weight_decay": 0, "momentum": 0.9, "nesterov": True},
        ),
        (  # also from the default variant
            "optimizer: {lr: 0.5, betas: [0.1, 0.1]}",
            ["optimizer.name=adagrad"],
            "optimizer",
            {"name": "adagrad", "lr": 0.5, "weight_decay": 0, "eps": 1e-10},
        ),
        (  # written as a mapping
            "optimizer: {name: sgd, lr: 0.5, momentum: 0.1}",
            ['optimizer={"name": "adagrad"}'],
            "optimizer",
            {"name": "adagrad", "lr": 0.5, "weight_decay": 0, "eps": 1e-10},
        ),
        (
            "optimizer: {name: sgd, momentum: 0.1}",
            ["optimizer.name=rmsprop", "optimizer.momentum=0.2"],
            "optimizer",
            {
                "name": "rmsprop",
                "lr": 0.001,
                "weight_decay": 0,
                "alpha": 0.99,
                "momentum": 0.2,
                "eps": 1e-8,
            },
        ),
        (
            "schedule: {name: step, gamma: 0.1}",
            ["schedule.name=constant"],
            "schedule",
            {"name": "constant"},
        ),
        (
            "schedule: {name: cosine, warmup_fraction: 0.1}",
            ["schedule.name=one_cycle", "schedule.anneal=linear"],
            "schedule",
            {
                "name": "one_cycle",
                "warmup_fraction": 0.1,
                "start_fraction": 0.04,
                "final_fraction": 4e-6,
                "anneal": "linear",
            },
        ),
        (  # of a model nothing stays: its fields mean something else there
            "model: {name: cnn_small, dropout: 0.5, activation: tanh}",
            ["model.name=linear"],
            "model",
            {"name": "linear"},
        ),
        (
            "model: {name: mlp, hidden_sizes: [3], dropout: 0.5, activation: tanh}",
            ["model.name=mlp_64x3", "model.batch_norm=true"],
            "model",
            {
                "name": "mlp_64x3",
                "hidden_sizes": [64, 64, 64],
                "dropout": 0,
                "activation": "relu",
                "batch_norm": True,
            },
        ),
        (  # the same name again changes nothing
            "model: {name: mlp, hidden_sizes: [3]}",
            ["model.name=mlp", "model.dropout=0.5"],
            "model",
            {
                "name": "mlp",
                "hidden_sizes": [3],
                "dropout": 0.5,
                "activation": "relu",
                "batch_norm": False,
            },
        ),
        (  # even what was wrong goes
            "optimizer: {name: adamm, bets: 3}",
            ["optimizer.name=adagrad"],
            "optimizer",
            {"name": "adagrad", "lr": 0.001, "weight_decay": 0, "eps": 1e-10},
        ),
    ],
)
def test_a_later_name_drops_what_earlier_layers_said_about_other_fields(
    text: str, overrides: list[str], section: str, expected: dict[str, Any]
) -> None:
    assert load(text, *overrides).model_dump(mode="json")[section] == expected


def test_a_sweep_over_the_optimizer_starts_from_any_file() -> None:
    text = "optimizer: {name: sgd, momentum: 0.5, lr: 0.5}"
    assert load(text, sweep="optimizer.name: {value: adagrad}").optimizer.lr == 0.5
    config = load(text, "optimizer.name=sgd", sweep="optimizer.name: {value: adam}")
    assert config.optimizer == load("optimizer: {name: sgd, lr: 0.5}").optimizer


@pytest.mark.parametrize(
    ("text", "overrides", "sweep", "line"),
    [
        (
            "optimizer: {name: adam, momentum: 0.5}",
            ["seed=1"],
            None,
            "f.yaml:1:25: optimizer.momentum: optimizer 'adam' has no such field",
        ),
        (
            "",
            ["optimizer.name=sgd", "optimizer.betas=[0.9, 0.9]"],
            None,
            "command line: optimizer.betas: optimizer 'sgd' has no such field",
        ),
        (
            "optimizer: {name: adam, betas: [0.1, 0.1]}",
            [],
            "optimizer.name: {value: sgd}\noptimizer.betas: {value: [0.2, 0.2]}",
            "sweep parameters: optimizer.betas: optimizer 'sgd' has no such field",
        ),
        (
            "optimizer: {name: adam}",
            ["optimizer.momentum=0.5"],
            None,
            "command line: optimizer.momentum: optimizer 'adam' has no such field",
        ),
        (
            "model: {name: cnn_large}",
            ["model.name=mlp_small", "model.widths=[3]"],
            None,
            "command line: model.widths: model 'mlp_small' has no such field",
        ),
    ],
)
def test_a_misfit_within_one_layer_is_an_error(
    text: str, overrides: list[str], sweep: str | None, line: str
) -> None:
    found = problems(text, *overrides, sweep=sweep)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_a_sweep_may_vary_the_preset() -> None:
    resolved = resolve("seed: 7", sweep="config: {value: quickstart}\nseed: {value: 8}")
    assert resolved.preset == "quickstart"
    assert resolved.config == load_config("quickstart", ["seed=8"])


def test_the_command_line_may_vary_the_preset_last() -> None:
    Path("mine.yaml").write_text("seed: 9")
    resolved = resolve("seed: 7", "config=mine.yaml", sweep="config: {value: quickstart}")
    assert (resolved.preset, resolved.config.seed) == ("mine.yaml", 9)


def test_a_sweep_that_names_no_preset_is_rejected() -> None:
    assert problems(sweep="config: {value: 3}") == [
        "sweep parameters: config: expected a preset name"
    ]


# ── where values come from ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "overrides", "sweep", "origins"),
    [
        (
            "",
            [],
            None,
            {"seed": "default", "model.name": "default", "model.blocks": "zoo cnn_large"},
        ),
        (
            "seed: 1\ntraining: {epochs: 3}",
            ["seed=2"],
            "training.batch_size: {value: 4}",
            {
                "seed": "command line",
                "training.epochs": "f.yaml",
                "training.batch_size": "sweep parameters",
                "training.loss": "default",
            },
        ),
        (
            "seed: 1",
            ["seed=3"],
            "seed: {value: 2}",
            {"seed": "command line"},
        ),
        (
            "model: {name: cnn_large}",
            [],
            None,
            {
                "model.name": "f.yaml",
                "model.blocks": "zoo cnn_large",
                "model.hidden_sizes": "default",
                "model.dropout": "default",
            },
        ),
        (
            "model: {name: cnn_large, dropout: 0.5}",
            ["model.name=mlp_dropout", "model.dropout=0.1"],
            None,
            {
                "model.name": "command line",
                "model.hidden_sizes": "zoo mlp_dropout",
                "model.dropout": "command line",
                "model.activation": "default",
            },
        ),
        (
            "optimizer: {name: adam, lr: 0.5, betas: [0.1, 0.1]}",
            ["optimizer.name=nadam"],
            None,
            {
                "optimizer.name": "command line",
                "optimizer.lr": "f.yaml",
                "optimizer.betas": "f.yaml",
                "optimizer.eps": "default",
            },
        ),
        (
            "data: {augment: {zoom: 0.1}}",
            ["data.augment.elastic=1"],
            None,
            {
                "data.augment.zoom": "f.yaml",
                "data.augment.elastic": "command line",
                "data.augment.shear_degrees": "default",
            },
        ),
        (
            "training: {early_stopping: {patience: 7}}",
            ["training.early_stopping=null"],
            None,
            {"training.early_stopping": "command line", "training.epochs": "default"},
        ),
        (
            "training: {early_stopping: null}",
            ["training.early_stopping.min_delta=0.5"],
            None,
            {
                "training.early_stopping.patience": "default",
                "training.early_stopping.min_delta": "command line",
            },
        ),
        (
            "model: null",
            ["model.name=mlp"],
            None,
            {
                "model.name": "command line",
                "model.hidden_sizes": "default",
                "model.dropout": "default",
            },
        ),
        (
            "optimizer: {}\ntraining: {early_stopping: {}}",
            [],
            None,
            {
                "optimizer.name": "default",
                "optimizer.lr": "default",
                "training.early_stopping.patience": "default",
            },
        ),
        (
            "training: {early_stopping: {patience: 7}}",
            ["training.early_stopping.min_delta=0.5"],
            "training.early_stopping: {value: {}}",
            {
                "training.early_stopping.patience": "f.yaml",
                "training.early_stopping.min_delta": "command line",
            },
        ),
    ],
)
def test_origins_name_the_layer_that_decided(
    text: str, overrides: list[str], sweep: str | None, origins: dict[str, str]
) -> None:
    found = resolve(text, *overrides, sweep=sweep).origins
    assert {path: found[path] for path in origins} == origins


def test_origins_name_a_preset_by_its_file() -> None:
    origins = resolve_config("quickstart").origins
    assert (origins["data.dataset"], origins["device"]) == ("quickstart.yaml", "default")


def test_origins_have_every_value_and_nothing_else() -> None:
    resolved = resolve("training: {early_stopping: {patience: 7}}", "model.name=resnet")
    assert list(resolved.origins) == [p for p, _ in leaves(resolved.config.model_dump())]


# ── presets and files ────────────────────────────────────────────────────────────────────────


def test_preset_names_are_the_shipped_files_sorted() -> None:
    assert preset_names() == sorted(p.stem for p in PRESETS_DIR.iterdir() if p.suffix == ".yaml")
    assert "quickstart" in preset_names()


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_loads_and_says_what_it_is(name: str) -> None:
    assert isinstance(load_config(name), RunConfig)
    text = (PRESETS_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    assert [word for word in ("What", "From", "Measured") if f"# {word}: " not in text] == []


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_survives_its_dump(name: str) -> None:
    resolved = resolve_config(name)
    assert load(to_yaml(resolved.config)) == resolved.config
    assert load(to_yaml(resolved.config, resolved.origins)) == resolved.config


def test_the_default_preset_is_quickstart() -> None:
    assert load_config() == load_config("quickstart")
    assert resolve_config().preset == "quickstart"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_find_config_finds_a_preset_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, Path("/")):
        monkeypatch.chdir(folder)
        assert find_config(name) == PRESETS_DIR / "quickstart.yaml"


def test_find_config_finds_a_file_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sub").mkdir()
    Path("sub/mine.txt").write_text("seed: 5")
    Path.home().joinpath("home.yaml").write_text("seed: 6")
    assert load_config("sub/mine.txt").seed == 5
    assert load_config(str(Path("sub/mine.txt").absolute())).seed == 5
    assert load_config("~/home.yaml").seed == 6
    assert resolve_config("sub/mine.txt").preset == "sub/mine.txt"
    monkeypatch.chdir("sub")
    assert load_config("mine.txt").seed == 5


def test_find_config_takes_ones_own_file_before_a_preset() -> None:
    Path("quickstart.yaml").write_text("seed: 77")
    assert load_config("quickstart.yaml").seed == 77
    assert load_config("quickstart").seed != 77


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "quickstrat",
            "--config quickstrat: no such preset or file; did you mean 'quickstart'?;"
            " `mnist-wandb configs` lists the presets",
        ),
        ("quickstart.yml", "--config quickstart.yml: no such preset or file; did you mean 'quick"),
        (
            "zzzz",
            "--config zzzz: no such preset or file; `mnist-wandb configs` lists the presets",
        ),
        ("here/mine.yaml", "--config here/mine.yaml: no such file"),
        ("~nosuchuser/x.yaml", "--config ~nosuchuser/x.yaml: no such file"),
        (".", "--config .: is a folder, expected a YAML file"),
        ("sub/", "--config sub/: is a folder, expected a YAML file"),
        ("x" * 5000, "--config xxx"),
        ("x\x00y", "--config x\x00y: no such preset or file"),
    ],
    ids=lambda v: ascii(v)[:20],
)
def test_find_config_rejects_what_it_cannot_find(source: str, message: str) -> None:
    Path("sub").mkdir()
    with pytest.raises(ConfigError) as caught:
        find_config(source)
    assert str(caught.value).startswith(message)


def test_load_config_rejects_a_file_that_is_not_text() -> None:
    Path("f.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"^f\.yaml: not a text file in UTF-8$"):
        load_config("f.yaml")


# ── override_config ──────────────────────────────────────────────────────────────────────────


def test_override_config_replaces_values_and_keeps_the_rest() -> None:
    before = load("seed: 3\nmodel: {name: mlp, hidden_sizes: [9]}")
    after = override_config(before, ["model.dropout=0.5", "training.epochs=2"])
    assert before.model_dump()["model"]["dropout"] == 0.0
    assert after == load(
        "seed: 3\nmodel: {name: mlp, hidden_sizes: [9], dropout: 0.5}\ntraining: {epochs: 2}"
    )
    assert override_config(before, []) == before


def test_override_config_may_change_the_number_of_layers_where_all_have_one_dropout() -> None:
    for dropout in ("", ", dropout: 0.5", ", dropout: [0.5]"):
        before = load(f"model: {{name: mlp, hidden_sizes: [9]{dropout}}}")
        after = override_config(before, ["model.hidden_sizes=[3, 4]"])
        kept = before.model_dump()["model"]["dropout"]
        assert after == load(f"model: {{name: mlp, hidden_sizes: [3, 4], dropout: {kept}}}")
    with pytest.raises(ConfigError, match=r"^command line: model: dropout has 2 values for 3 hid"):
        override_config(load("model: {name: mlp_dropout}"), ["model.hidden_sizes=[3, 4, 5]"])


def test_override_config_switches_variants() -> None:
    after = override_config(load("optimizer: {name: adam, lr: 0.5}"), ["optimizer.name=sgd"])
    assert after == load("optimizer: {name: sgd, lr: 0.5}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=x", "command line: seed: got the text 'x', expected a whole number"),
        ("training.epoch=1", "command line: training.epoch: unknown key; did you mean 'epochs'?"),
        ("config=quickstart", "command line: config: unknown key"),
        ("nonsense", "command line: cannot read 'nonsense'; write section.field=value"),
    ],
)
def test_override_config_names_the_command_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override_config(load(), [override])
    assert str(caught.value).startswith(message)


# ── dumps ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("override", VARIANT_OVERRIDES)
def test_every_variant_survives_its_dump(override: str) -> None:
    resolved = resolve("", override)
    assert load(to_yaml(resolved.config)) == resolved.config
    assert load(to_yaml(resolved.config, resolved.origins)) == resolved.config


def test_to_yaml_says_where_each_value_comes_from() -> None:
    resolved = resolve("seed: 3", "name=mine", "model.name=mlp_small")
    lines = to_yaml(resolved.config, resolved.origins).splitlines()
    found = {tuple(part.strip() for part in line.split("  # ")) for line in lines}
    assert ("name: mine", "command line") in found
    assert ("seed: 3", "f.yaml") in found
    assert ("device: auto", "default") in found
    assert ("hidden_sizes: [512, 512]", "zoo mlp_small") in found
    assert "#" not in to_yaml(resolved.config)


def test_to_yaml_keeps_whole_numbers_whole() -> None:
    assert "epochs: 10\n" in to_yaml(load("training: {epochs: 10}"))
    assert "epochs: 0.5\n" in to_yaml(load("training: {epochs: .5}"))


@pytest.mark.parametrize(
    "text",
    [
        *("yes", "on", "true", "null", "~", "1", "1.5", ".inf", "1:30", "2020-01-01", "0x1F"),
        *("a: b", "- a", "#", "a #b", " a ", "'", '"', "\\", "%", "@", "{", "[a", "a,b", "=", "<<"),
        *("1e-3", "1e5", "09", "-.5", "+1", "1.", "1_000", "0o7", "No", "y"),
        *("---", "...", "é", "😀", "\x7f", "\x85", "\u2028", "\ufeff", "\uffff", "\xa0"),
    ],
    ids=ascii,
)
def test_a_text_survives_its_dump(text: str) -> None:
    values = {"name": text, "tracking": {"notes": f"{text}\n\n {text}\n", "tags": [text]}}
    config = validate(values)
    assert load(to_yaml(config)) == config


unit = st.floats(0, 1, exclude_max=True)
texts = st.text(min_size=1, max_size=30) | st.from_regex(r"[-+.0-9e_:]{1,8}", fullmatch=True)
names = st.from_regex(r"[^/\\#?%:\x00-\x1f]{1,20}|[-+.0-9e_]{1,8}", fullmatch=True)
sizes = st.lists(st.integers(1, 65_536), min_size=1, max_size=4)


def fields(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A mapping that has some of the fields."""
    return st.fixed_dictionaries({}, optional=strategies)


def variant(name: str, **strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return fields(**strategies).map(lambda values: {"name": name, **values})


adam = {
    "lr": st.floats(0, 1e3, exclude_min=True),
    "weight_decay": st.floats(0, 10) | st.integers(0, 10),
    "betas": st.tuples(unit, unit).map(list),
    "eps": st.floats(0, 1, exclude_min=True),
}
valid_configs = fields(
    name=names,
    seed=st.integers(0, 2**32 - 1),
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:3", "mps"]),
    data=fields(
        dataset=st.sampled_from(["digits", "mnist", "fashion_mnist", "kmnist", "qmnist"]),
        dir=texts | st.none(),
        train_size=st.none() | st.integers(1, 10**6),
        val_fraction=st.floats(0, 0.9, exclude_min=True),
        augment=fields(
            rotation_degrees=st.floats(0, 180) | st.integers(0, 180),
            translate_pixels=st.integers(0, 14),
            elastic=st.floats(0, 10),
        ),
    ),
    model=st.one_of(
        st.sampled_from(sorted(ZOO)).map(lambda name: {"name": name}),
        sizes.flatmap(
            lambda s: variant(
                "mlp",
                dropout=unit | st.lists(unit, min_size=len(s), max_size=len(s)),
                batch_norm=st.booleans(),
            ).map(lambda values: {**values, "hidden_sizes": s})
        ),
        variant(
            "cnn",
            blocks=st.lists(
                st.builds(
                    lambda c, k, b: {"channels": c, "kernel_size": 2 * k + 1, "batch_norm": b},
                    st.integers(1, 65_536),
                    st.integers(0, 13),
                    st.booleans(),
                ),
                min_size=1,
                max_size=3,
            ),
            hidden_sizes=st.just([]) | sizes,
            activation=st.sampled_from(["relu", "gelu", "tanh"]),
        ),
        sizes.map(lambda s: {"name": "resnet", "widths": s, "blocks_per_stage": [1] * len(s)}),
    ),
    optimizer=st.one_of(
        variant("adamw", **adam), variant("nadam", **adam), variant("sgd", lr=adam["lr"])
    ),
    schedule=st.one_of(
        variant("constant"),
        variant("step", gamma=st.floats(0, 1, exclude_min=True)),
        variant("cosine", warmup_fraction=unit, final_fraction=unit),
    ),
    training=fields(
        epochs=st.floats(0, 1e5, exclude_min=True) | st.integers(1, 100_000),
        early_stopping=st.none() | fields(patience=st.integers(1, 100), min_delta=unit),
        compile=st.sampled_from([True, False, "auto"]),
        ema_decay=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    ),
    tracking=fields(
        project=names,
        notes=texts | st.none(),
        tags=st.lists(texts, max_size=3),
        log_model=st.sampled_from([None, "best"]),
    ),
)


@fuzz
@given(valid_configs)
def test_any_valid_configuration_survives_its_dump(values: dict[str, Any]) -> None:
    config = validate(values)
    assert load(to_yaml(config)) == config
    assert load(to_yaml(config, resolve("").origins)) == config
    assert validate(config.model_dump(mode="json")) == config


# ── any input ────────────────────────────────────────────────────────────────────────────────

known_paths = sorted(
    {p for o in VARIANT_OVERRIDES for p, _ in leaves(load_config(None, [o]).model_dump())}
)
known_keys = st.sampled_from(sorted({part for path in known_paths for part in path.split(".")}))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.sampled_from(["mlp", "cnn_large", "sgd", "adam", "cosine", "mse", "auto", "2020-01-01"]),
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(known_keys, inner, max_size=4),
    max_leaves=12,
)
any_mapping = st.dictionaries(st.text(max_size=10), anything, max_size=1)


def any_section(section: str) -> st.SearchStrategy[Any]:
    """What a section may be given: mostly some of its own keys."""
    keys = sorted({p.split(".")[1] for p in known_paths if p.startswith(f"{section}.")})
    own = st.dictionaries(st.sampled_from([*keys, "x"]), anything, max_size=4)
    named = st.builds(
        lambda values, name: {**values, "name": name},
        own,
        st.sampled_from([*VARIANTS.get(section, [""]), ""]),
    )
    return st.one_of(own, named if section in VARIANTS else own, anything)


any_sections = fields(
    seed=anything,
    name=anything,
    **{s: any_section(s) for s in sorted({p.split(".")[0] for p in known_paths if "." in p})},
)


@fuzz
@given(st.builds(lambda said, more: {**more, **said}, any_sections, any_mapping))
def test_any_mapping_in_a_file_is_a_configuration_or_a_config_error(values: dict[str, Any]) -> None:
    message = "f.yaml"
    try:
        load(yaml.safe_dump(values, allow_unicode=True))
    except ConfigError as error:
        message = str(error)
    assert message.startswith("f.yaml")


@fuzz
@given(
    st.lists(
        st.one_of(
            st.text(max_size=20),
            st.builds("{}={}".format, st.sampled_from(known_paths), scalars),
            st.builds("--{}={}".format, st.sampled_from(known_paths), anything.map(json.dumps)),
            st.builds("{}.{}={}".format, st.sampled_from(known_paths), known_keys, scalars),
            any_sections.map(json.dumps),
            any_sections.map(str),
            st.integers(1, 3000).map(lambda depth: "data=" + '{"a":' * depth + "1" + "}" * depth),
        ),
        max_size=3,
    )
)
def test_any_command_line_is_a_configuration_or_a_config_error(overrides: list[str]) -> None:
    message = ""
    try:
        load("", *overrides)
    except ConfigError as error:
        message = str(error)
    assert not message or "command line" in message or message.startswith("--config ")


# ── documentation ────────────────────────────────────────────────────────────────────────────


def sections(root: type[Section] = Section) -> list[type[Section]]:
    found = [cls for sub in root.__subclasses__() for cls in (sub, *sections(sub))]
    return [cls for cls in dict.fromkeys(found) if not cls.__name__.startswith("_")]


@pytest.mark.parametrize("cls", sections(), ids=lambda cls: cls.__name__)
def test_every_field_has_a_line_of_documentation(cls: type[Section]) -> None:
    assert str(cls.__doc__).splitlines()[0].endswith(".")
    for name, field in cls.model_fields.items():
        assert str(field.description).endswith("."), name
        assert "\n" not in str(field.description), name


def numbers() -> Iterator[tuple[str, str]]:
    """Each number of each variant, behind the override that makes the variant."""
    shared = "training.early_stopping.patience=1"
    for override in (shared, *VARIANT_OVERRIDES):
        for path, value in leaves(load_config("quickstart", [override]).model_dump()):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            section = path.partition(".")[0]
            if is_number and (section not in VARIANTS or override.startswith(section)):
                yield (override if section in VARIANTS else shared), path


@pytest.mark.parametrize(("override", "path"), sorted(set(numbers())))
def test_every_number_has_bounds(override: str, path: str) -> None:
    for huge in (10**12, -(10**12)):
        (line,) = problems("", override, f"{path}={huge}")
        assert line.startswith(f"command line: {path}: got {huge}, expected ")


@pytest.mark.parametrize(
    "override",
    [
        *("training.grad_clip_norm", "training.ema_decay", "data.train_size"),
        *("model.hidden_sizes.0", "model.blocks.0.channels", "model.blocks.0.kernel_size"),
        *("model.blocks.0.padding", "model.blocks.0.pool", "optimizer.betas.1"),
    ],
)
def test_numbers_that_are_null_or_in_a_list_have_bounds(override: str) -> None:
    parts = override.split(".")
    for huge in (10**12, -(10**12)):
        value: Any = huge
        for part in reversed(parts):
            value = [0.5, value] if part == "1" else [value] if part == "0" else {part: value}
        if "blocks" in parts:
            value["model"]["blocks"][0].setdefault("channels", 1)
        if override == "data.train_size" and huge > 0:
            continue  # how many there are, the data set knows
        (line,) = problems(json.dumps(value))
        assert f" {override}: got {huge}, expected " in line


# ── JSON schema ──────────────────────────────────────────────────────────────────────────────

SCHEMA = json_schema()


def schema_errors(values: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(values)]


def test_the_schema_is_a_valid_json_schema() -> None:
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize("name", preset_names())
def test_the_schema_accepts_every_shipped_preset(name: str) -> None:
    assert schema_errors(read_yaml(PRESETS_DIR / f"{name}.yaml").values) == []


@pytest.mark.parametrize(
    "override", [*VARIANT_OVERRIDES, "training.early_stopping.patience=3", "training.compile=true"]
)
def test_the_schema_accepts_every_dump(override: str) -> None:
    assert schema_errors(load("", override).model_dump(mode="json")) == []


@pytest.mark.parametrize(
    "text",
    [
        *("optimizer: {lr: 0.1}", "model: {dropout: 0.1}", "schedule: {}", "optimizer: {}"),
        *("model: {name: mlp, dropout: 0.1}", "model: {name: mlp, dropout: [0.1]}", "model: {}"),
    ],
)
def test_the_schema_accepts_a_file_that_leaves_out_names_and_lists(text: str) -> None:
    assert isinstance(load(text), RunConfig)
    assert schema_errors(parse_yaml(text, "f.yaml").values) == []


@pytest.mark.parametrize(
    "text",
    [
        "trainig: {}",
        "training: {epoch: 3}",
        "data: {augment: {rotate: 3}}",
        "training: {early_stopping: {patence: 3}}",
        "model: {name: mlp, blocks: []}",
        "model: {name: cnn, blocks: [{channels: 1, poool: 1}]}",
        "model: {name: mlp, dropout: [2]}",
        "model: {name: mlp, dropout: 2}",
        "optimizer: {name: adam, momentum: 0.5}",
        "optimizer: {betas: [0.9, 0.9, 0.9]}",
        "schedule: {name: nonsense}",
        "training: {epochs: 0}",
        "training: {compile: 3}",
        "seed: 1.5",
        "seed: x",
        "device: gpu",
    ],
)
def test_the_schema_rejects_what_load_config_rejects(text: str) -> None:
    assert problems(text)
    assert schema_errors(parse_yaml(text, "f.yaml").values) != []


def test_the_schema_describes_every_property() -> None:
    for title, definition in [("RunConfig", SCHEMA), *SCHEMA["$defs"].items()]:
        assert definition["description"].endswith("."), title
        for name, entry in definition["properties"].items():
            described = entry | (
                SCHEMA["$defs"][entry["$ref"].split("/")[-1]] if "$ref" in entry else {}
            )
            assert described.get("description", "").endswith("."), (title, name)


def test_the_schema_keeps_the_defaults() -> None:
    training = SCHEMA["$defs"]["TrainingConfig"]["properties"]
    assert training["epochs"]["default"] == RunConfig().training.epochs
    assert math.isclose(SCHEMA["$defs"]["AdamwConfig"]["properties"]["lr"]["default"], 1e-3)
