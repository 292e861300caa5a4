from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REAL_DATA_DIR, Finished
from torch import Tensor, nn

from mnist_wandb import train
from mnist_wandb.checks import (
    CHECKS,
    Recipe,
    build_configured,
    check_batch_independence,
    check_capacity,
    check_initial_loss,
    check_input_matters,
    check_one_batch,
    check_recipe,
    check_repeatable_evaluation,
    check_same_preprocessing,
    check_shuffled_labels,
    take_images,
)
from mnist_wandb.config import RunConfig
from mnist_wandb.data import Preprocessing, Split, Splits, load_dataset
from mnist_wandb.errors import DivergedError
from mnist_wandb.evaluate import compute_loss, evaluate
from mnist_wandb.loading import load_config, preset_names
from mnist_wandb.metrics import EvalResult

Cli = Callable[..., Finished]
Build = Callable[[RunConfig, Splits], nn.Module]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """A sound one: an MLP with dropout on the embedded digits."""
    config = load_config("mlp_dropout", ["data.dataset=digits"])
    return Recipe(config, take_images(load_dataset(config.data)))


def change(recipe: Recipe, *overrides: str, **parts: Any) -> Recipe:
    config = load_config("mlp_dropout", ["data.dataset=digits", *overrides])
    return replace(recipe, config=config, **parts)


# ── each planted fault is caught ─────────────────────────────────────────────────────────────


def test_labels_that_do_not_belong_to_the_images_are_caught(recipe: Recipe) -> None:
    labels = recipe.splits.train.labels
    shuffled = labels[torch.randperm(len(labels), generator=torch.manual_seed(0))]
    splits = replace(recipe.splits, train=replace(recipe.splits.train, labels=shuffled))
    assert not check_input_matters(change(recipe, splits=splits)).passed


@pytest.mark.parametrize("model", ["mlp_dropout", "cnn_batchnorm"])
def test_evaluation_without_eval_mode_is_caught(model: str, recipe: Recipe) -> None:
    def evaluate_in_training_mode(
        model: nn.Module, split: Split, preprocessing: Preprocessing
    ) -> EvalResult:
        with torch.no_grad():
            logits = model(preprocessing(split.images))
        result = evaluate(model, split, preprocessing)
        loss = float(compute_loss(logits, split.labels))
        return replace(result, loss=loss, probabilities=logits.softmax(dim=1).numpy())

    faulty = change(recipe, f"model.name={model}", evaluate=evaluate_in_training_mode)
    assert not check_repeatable_evaluation(faulty).passed
    assert check_repeatable_evaluation(change(recipe, f"model.name={model}")).passed


def test_a_reshape_that_mixes_the_batch_is_caught(recipe: Recipe) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(784, 10)

        def forward(self, images: Tensor) -> Tensor:
            pixels = images.flatten(1)
            return self.layer(pixels.reshape(pixels.shape[1], pixels.shape[0]).T)

    result = check_batch_independence(change(recipe, build=lambda *_: Mixing()))
    assert not result.passed
    assert result.measured.startswith("15 others")


def test_an_output_that_ignores_its_own_input_is_caught(recipe: Recipe) -> None:
    def build(config: RunConfig, splits: Splits) -> nn.Module:
        model = build_configured(config, splits)
        return nn.Sequential(
            nn.Flatten(), nn.Threshold(1e9, 0.0), nn.Unflatten(1, (1, 28, 28)), model
        )

    result = check_batch_independence(change(recipe, build=build))
    assert (result.passed, result.measured) == (False, "0 others, not its own")


def test_other_preprocessing_in_evaluation_is_caught(recipe: Recipe) -> None:
    def evaluate_raw(model: nn.Module, split: Split, _: Preprocessing) -> EvalResult:
        return evaluate(model, split, Preprocessing(1 / 255, 0.0))

    result = check_same_preprocessing(change(recipe, evaluate=evaluate_raw))
    assert not result.passed
    assert result.measured.startswith("different (mean 0.")


def test_augmented_validation_images_are_caught(recipe: Recipe) -> None:
    def evaluate_shifted(
        model: nn.Module, split: Split, preprocessing: Preprocessing
    ) -> EvalResult:
        return evaluate(model, replace(split, images=split.images.roll(1, 3)), preprocessing)

    assert not check_same_preprocessing(change(recipe, evaluate=evaluate_shifted)).passed


def test_an_output_layer_that_begins_far_too_large_is_caught(recipe: Recipe) -> None:
    def build(config: RunConfig, splits: Splits) -> nn.Module:
        model = build_configured(config, splits)
        with torch.no_grad():
            list(model.parameters())[-2].mul_(30)
        return model

    result = check_initial_loss(change(recipe, build=build))
    assert not result.passed
    assert float(result.measured) > 3


def test_a_model_too_small_is_caught(recipe: Recipe) -> None:
    small = ("model.name=mlp", "model.hidden_sizes=[1]", "model.dropout=0")
    assert not check_one_batch(change(recipe, *small)).passed


def test_validation_on_training_images_is_caught(recipe: Recipe) -> None:
    def train_and_cheat(model: nn.Module, splits: Splits, config: RunConfig, **rest: Any) -> Any:
        return train(model, replace(splits, val=splits.train), config, **rest)

    faulty = change(recipe, "model.name=mlp_small", train=train_and_cheat)
    assert not check_shuffled_labels(faulty).passed


def test_capacity_that_is_not_used_is_caught(recipe: Recipe) -> None:
    def build_narrow(config: RunConfig, splits: Splits) -> nn.Module:
        narrow = load_config(None, ["model.name=mlp", "model.hidden_sizes=[2]"]).model
        return build_configured(config.model_copy(update={"model": narrow}), splits)

    assert not check_capacity(change(recipe, build=build_narrow)).passed


def test_training_that_diverges_is_a_failed_check(recipe: Recipe) -> None:
    def diverge(*_: Any, **__: Any) -> Any:
        raise DivergedError("training diverged at step 1: training loss is nan", step=1)

    results = {r.name: r for r in check_recipe(change(recipe, train=diverge))}
    assert len(results) == len(CHECKS)
    failed = results["one_batch"]
    assert (failed.passed, failed.expected) == (False, "training that converges")
    assert failed.measured == "training diverged at step 1: training loss is nan"
    assert results["initial_loss"].passed


# ── sound recipes pass ───────────────────────────────────────────────────────────────────────

HEAVY = {"cnn_large", "cnn_valid", "cnn_batchnorm", "mlp_large", "resnet"}
RECIPES = {name: load_config(name) for name in preset_names()}
QUICK = list(
    {
        (repr(config.model), config.data.scaling, config.training.loss): name
        for name, config in RECIPES.items()
        if config.model.name not in HEAVY and name != "best_cnn_gpu"
    }.values()
)
"""One preset of each architecture, scaling and loss."""


@pytest.mark.parametrize("preset", QUICK)
def test_presets_pass_on_the_embedded_digits(preset: str) -> None:
    config = load_config(preset, ["data.dataset=digits"])
    results = check_recipe(Recipe(config, take_images(load_dataset(config.data))))
    assert [result for result in results if not result.passed] == []


@pytest.mark.slow
@pytest.mark.parametrize("preset", RECIPES)
def test_every_preset_passes_on_its_own_data(preset: str, real_data: Path) -> None:
    config = RECIPES[preset]
    folder = Path(config.data.dataset.replace("fashion_mnist", "FashionMNIST"))
    if folder.name == "FashionMNIST" and not (REAL_DATA_DIR / folder).is_dir():
        pytest.skip("needs Fashion-MNIST")
    splits = load_dataset(config.data, data_dir=real_data)
    results = check_recipe(Recipe(config, take_images(splits)))
    assert [result for result in results if not result.passed] == []


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_small_sets_with_any_loss_can_be_checked(loss: str, recipe: Recipe) -> None:
    splits = take_images(recipe.splits, count=40)
    assert [len(splits.train), len(splits.val)] == [32, 32]
    results = check_recipe(change(recipe, f"training.loss={loss}", splits=splits))
    assert {r.name for r in results if not r.passed} <= {"input_matters"}


# ── the command ──────────────────────────────────────────────────────────────────────────────


def test_check_prints_expected_measured_and_verdict_and_records_them(cli: Cli) -> None:
    done = cli("check", "model.name=mlp_128", "tracking.mode=offline", "--json")
    assert done.code == 0, done.err
    assert "ok      one_batch: 0.0" in done.err
    facts = json.loads(done.out)
    assert facts["passed"] is True
    assert [set(r) for r in facts["results"]] == [
        {"name", "about", "expected", "measured", "passed"}
    ] * len(CHECKS)
    folder = Path(facts["folder"])
    stored = json.loads((folder / "check.json").read_text())
    assert stored == {"protocol": facts["protocol"], "results": facts["results"]}
    (record,) = (folder / "wandb").glob("offline-run-*")
    (path,) = record.glob("files/media/table/check/results*")
    rows = json.loads(path.read_text())["data"]
    assert [row[0] for row in rows] == [r["name"] for r in facts["results"]]
    assert {row[4] for row in rows} == {"ok"}
    inspected = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (run,) = [
        r["run"] for line in inspected.splitlines() if (r := json.loads(line))["type"] == "run"
    ]
    assert run["job_type"] == "check"


def test_check_exits_1_when_one_fails(cli: Cli) -> None:
    small = ("model.name=mlp", "model.hidden_sizes=[1]", "tracking.mode=disabled")
    done = cli("check", "-q", *small)
    assert (done.code, done.err) == (1, "")
    assert "FAILED" in done.out
    assert "up to 256 training and 256 validation images, Adam with lr 0.001" in done.out
    (folder,) = Path("runs").iterdir()
    results = json.loads((folder / "check.json").read_text())["results"]
    assert "one_batch" in {r["name"] for r in results if not r["passed"]}


def test_check_of_bad_input_leaves_nothing(cli: Cli) -> None:
    done = cli("check", "--config", "quickstrat")
    assert (done.code, done.out) == (2, "")
    assert "no such preset or file; did you mean 'quickstart'" in done.err
    assert not Path("runs").exists()
