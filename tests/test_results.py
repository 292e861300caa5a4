"""Known results, reproduced by the presets of the labs. They take minutes each: all are slow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REAL_DATA_DIR, Finished

from mnist_wandb.loading import load_config, preset_names

Cli = Callable[..., Finished]

LEAST_ACCURACY = {
    "lab_softmax": 0.923,
    "lab_dropout_mlp": 0.976,
    "lab_pyramid": 0.974,
    "lab_pyramid_rotated": 0.979,
    "lab_64x3": 0.967,
    "lab_fashion_128": 0.865,
    "lab_step_mlp_small": 0.980,
    "lab_step_mlp_large": 0.980,
    "lab_step_cnn_small": 0.988,
    "lab_step_cnn_large": 0.986,
    "lab_fashion_batchnorm": 0.875,
    "lab_data_size": 0.880,
    "lab_overfit": 0.890,
    "lab_regularise": 0.950,
    "lab_shortcut": 0.870,
}
"""Below the measured test accuracy (docs/results.md) by a few standard errors."""
HOURS_WITHOUT_A_GPU = {"lab_fashion_resnet"}


def test_every_preset_of_the_labs_has_a_known_result() -> None:
    names = {name for name in preset_names() if name.startswith("lab_")}
    assert names == set(LEAST_ACCURACY) | HOURS_WITHOUT_A_GPU


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(LEAST_ACCURACY))
def test_preset_reaches_its_known_result(preset: str, cli: Cli, real_data: Path) -> None:
    if (
        load_config(preset).data.dataset == "fashion_mnist"
        and not (REAL_DATA_DIR / "FashionMNIST" / "raw").is_dir()
    ):
        pytest.skip("needs Fashion-MNIST")
    where = (f"data.dir={real_data}", "tracking.mode=disabled")
    done = cli("run", "--config", preset, "-q", "--json", *where)
    assert done.code == 0, done.err
    assert json.loads(done.out)["metrics"]["test/accuracy"] >= LEAST_ACCURACY[preset]


def run_test_accuracy(cli: Cli, *arguments: str) -> dict[str, float]:
    done = cli("run", "-q", "--json", "tracking.mode=disabled", *arguments)
    assert done.code == 0, done.err
    return dict(json.loads(done.out)["metrics"])


@pytest.mark.slow
def test_accuracy_falls_the_more_the_shortcut_is_right_in_training(
    cli: Cli, real_data: Path
) -> None:
    accuracies = []
    for match in (0.1, 0.8, 0.99):
        where = (f"data.dir={real_data}", f"data.shortcut.train_match={match}")
        metrics = run_test_accuracy(cli, "--config", "lab_shortcut", *where)
        accuracies.append(metrics["test/accuracy"])
    assert accuracies[0] > accuracies[1] > accuracies[2]
    assert metrics["test/accuracy_shortcut_agrees"] > metrics["test/accuracy_shortcut_disagrees"]


@pytest.mark.slow
def test_more_data_and_regularisation_narrow_the_gap_of_overfitting(
    cli: Cli, real_data: Path
) -> None:
    where = f"data.dir={real_data}"
    few = run_test_accuracy(cli, "--config", "lab_overfit", where)
    more = run_test_accuracy(cli, "--config", "lab_overfit", where, "data.train_size=5000")
    regularised = run_test_accuracy(cli, "--config", "lab_regularise", where)
    assert few["train/accuracy"] == 1.0
    assert few["test/accuracy"] < more["test/accuracy"]
    assert few["test/accuracy"] < regularised["test/accuracy"]
