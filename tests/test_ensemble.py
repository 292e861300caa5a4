"""Seeds that train together come to the numbers of separate runs, but for float rounding."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mnist_wandb.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mnist_wandb.config import ZOO, RunConfig
from mnist_wandb.data import Splits, load_dataset
from mnist_wandb.device import choose_plan
from mnist_wandb.ensemble import pays, train_together, why_apart
from mnist_wandb.errors import DivergedError
from mnist_wandb.loading import override_config, validate
from mnist_wandb.models import build_model
from mnist_wandb.train import (
    CheckpointReady,
    Event,
    Logged,
    StepDone,
    TrainResult,
    Validated,
    train,
)

BASE = validate({"data": {"dataset": "digits"}, "tracking": {"mode": "disabled"}, "device": "cpu"})
TINY = (
    *("data.train_size=100", "training.epochs=3", "training.batch_size=16"),
    "tracking.log_every_steps=3",
)
"""Seven steps an epoch, the last on four images; log points that are not the epochs' ends."""
SEEDS = (3, 4, 5)


def section(path: str, **fields: Any) -> str:
    return f"{path}={json.dumps(fields)}"


MODELS = {
    "linear": "model.name=linear",
    "mlp": "model.name=mlp_64x3",
    "tanh": section("model", name="mlp", hidden_sizes=[16], activation="tanh"),
    "cnn": section(
        "model",
        name="cnn",
        blocks=[
            {"channels": 4, "kernel_size": 5, "pool": 2},
            {"channels": 6, "kernel_size": 3, "padding": 0, "pool": 2},
        ],
        hidden_sizes=[12],
    ),
}
OPTIMIZERS = {
    "sgd": section("optimizer", name="sgd", lr=0.05, weight_decay=0.01),
    "plain_sgd": section("optimizer", name="sgd", lr=0.05, momentum=0, nesterov=False),
    "rmsprop": section("optimizer", name="rmsprop", lr=0.001, momentum=0.5, eps=0.001),
    "adagrad": section("optimizer", name="adagrad", lr=0.01),
    "adam": section("optimizer", name="adam", lr=0.002, weight_decay=0.01),
    "adamw": section("optimizer", name="adamw", lr=0.002),
    "nadam": section("optimizer", name="nadam", lr=0.002),
}
OPTIONS = {
    "clip": ("training.grad_clip_norm=0.5",),
    "ema": ("training.ema_decay=0.8",),
    "mse": ("training.loss=mse",),
    "smoothing": ("training.label_smoothing=0.1",),
    "cosine": (section("schedule", name="cosine", warmup_fraction=0.3),),
    "step": (section("schedule", name="step", every_epochs=1, gamma=0.5),),
    "fraction": ("training.epochs=1.4",),
    "not_deterministic": ("training.deterministic=false",),
}
CASES = {
    **{name: (model,) for name, model in MODELS.items()},
    **{name: (MODELS["mlp"], optimizer) for name, optimizer in OPTIMIZERS.items()},
    **{name: (MODELS["linear"], *options) for name, options in OPTIONS.items()},
    "ema_cnn": (MODELS["cnn"], *OPTIONS["ema"], OPTIMIZERS["sgd"]),
    "early_stopping": (MODELS["mlp"], "training.epochs=9", "training.early_stopping.patience=1"),
}


@dataclass
class Told:
    """What one seed's training has told, and how it ended."""

    model: nn.Module
    events: list[Event] = field(default_factory=list)
    checkpoints: list[tuple[Checkpoint, bool, bool]] = field(default_factory=list)
    result: TrainResult | None = None
    error: DivergedError | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, CheckpointReady):
            path = Path(f"{id(self)}.pt")
            save_checkpoint(event.checkpoint, path)  # as it is now
            stored = load_checkpoint(path)
            self.checkpoints.append((stored, event.best, event.end_of_epoch))
        self.events.append(event)

    @property
    def rows(self) -> list[Logged]:
        return [event for event in self.events if isinstance(event, Logged)]


def configs_of(*overrides: str, seeds: tuple[int, ...] = SEEDS) -> list[RunConfig]:
    config = override_config(BASE, (*TINY, *overrides))
    return [config.model_copy(update={"seed": seed}) for seed in seeds]


def apart(splits: Splits, configs: list[RunConfig], **arguments: Any) -> list[Told]:
    found = []
    for config in configs:
        told = Told(build_model(config.model, seed=config.seed))
        try:
            told.result = train(told.model, splits, config, emit=told.take, **arguments)
        except DivergedError as error:
            told.error = error
        found.append(told)
    return found


def together(
    splits: Splits,
    configs: list[RunConfig],
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Told]:
    found = [Told(build_model(config.model, seed=config.seed)) for config in configs]
    plan = choose_plan(configs[0])
    assert why_apart(configs[0], plan) is None
    train_together(
        [told.model for told in found],
        splits,
        configs,
        plan=plan,
        emit=lambda position, event: found[position].take(event),
        should_stop=should_stop,
    )
    return found


def assert_close_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=1e-3, atol=2e-4)


def assert_alike(one: Told, other: Told) -> None:
    """Same events in the same order; same rows, weights and states within tolerance."""
    assert [type(e) for e in one.events] == [type(e) for e in other.events]
    for ours, theirs in zip(one.events, other.events, strict=True):
        if isinstance(ours, StepDone):
            assert ours == theirs
        if isinstance(ours, Validated):
            assert isinstance(theirs, Validated)
            assert (ours.step, ours.epoch, ours.improved) == (
                theirs.step,
                theirs.epoch,
                theirs.improved,
            )
    for ours, theirs in zip(one.rows, other.rows, strict=True):
        assert (ours.step, ours.epoch, ours.images_used) == (
            theirs.step,
            theirs.epoch,
            theirs.images_used,
        )
        assert list(ours.values) == list(theirs.values)
        for name, value in ours.values.items():
            if name != "train/images_per_second":
                assert value == pytest.approx(theirs.values[name], rel=1e-3, abs=1e-5), name
    for (mine, *flags), (its, *other_flags) in zip(one.checkpoints, other.checkpoints, strict=True):
        assert flags == other_flags
        assert_close_weights(mine.weights, its.weights)
        assert mine.training is not None
        assert its.training is not None
        assert_close_weights(mine.training["best_weights"], its.training["best_weights"])
        assert mine.training.keys() == its.training.keys()
        states = mine.training["optimizer"], its.training["optimizer"]
        assert states[0]["param_groups"] == states[1]["param_groups"]
        for index, values in states[1]["state"].items():
            assert states[0]["state"][index].keys() == values.keys()


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_dataset(configs_of()[0].data)


@pytest.mark.parametrize("case", CASES)
def test_seeds_trained_together_equal_separate_runs(case: str, splits: Splits) -> None:
    configs = configs_of(*CASES[case])
    for ours, theirs in zip(together(splits, configs), apart(splits, configs), strict=True):
        assert_alike(ours, theirs)


def test_seeds_that_stop_early_or_diverge_leave_the_others_alone(splits: Splits) -> None:
    configs = configs_of(MODELS["tanh"], "training.early_stopping.patience=1", "training.epochs=8")
    alone = apart(splits, configs)
    ends = [told.rows[-1].step for told in alone]
    assert len(set(ends)) > 1  # they stop at different epochs
    for ours, theirs in zip(together(splits, configs), alone, strict=True):
        assert_alike(ours, theirs)


@pytest.mark.parametrize("options", [(), ("training.ema_decay=0.8",), OPTIONS["clip"]])
@pytest.mark.parametrize("optimizer", ["sgd", "nadam"])
def test_a_seed_that_diverges_ends_there_and_the_others_go_on(
    options: tuple[str, ...], optimizer: str, splits: Splits
) -> None:
    configs = configs_of(MODELS["mlp"], OPTIMIZERS[optimizer], *options)
    alone = apart(splits, configs)
    found = [Told(build_model(config.model, seed=config.seed)) for config in configs]
    with torch.no_grad():
        next(found[1].model.parameters()).mul_(1e30)
    train_together(
        [told.model for told in found],
        splits,
        configs,
        plan=choose_plan(configs[0]),
        emit=lambda position, event: found[position].take(event),
    )
    assert found[1].checkpoints == []
    assert [event for event in found[1].events if isinstance(event, Logged)] == []
    for position in (0, 2):
        assert_alike(found[position], alone[position])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "nadam"])
@pytest.mark.parametrize("steps", [0, 1, 3, 9])
def test_each_seed_goes_on_alone_from_where_all_were_stopped(
    steps: int, optimizer: str, splits: Splits
) -> None:
    configs = configs_of(MODELS["cnn"], OPTIMIZERS[optimizer], "training.ema_decay=0.8")
    asked = iter(range(1000))
    stopped = together(splits, configs, should_stop=lambda: next(asked) >= steps)
    for config, told, whole in zip(configs, stopped, apart(splits, configs), strict=True):
        last, best, end_of_epoch = told.checkpoints[-1]
        assert (last.step, best, end_of_epoch) == (steps, False, False)
        told.result = train(told.model, splits, config, resume=last, emit=told.take)
        assert (told.result.status, told.result.steps) == ("finished", 21)
        assert whole.result is not None
        assert told.result.images_used == whole.result.images_used
        values = [row.values for row in told.rows], [row.values for row in whole.rows]
        for ours, theirs in zip(*values, strict=True):
            for name in ours.keys() - {"train/images_per_second"}:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name


def test_a_checkpoint_has_one_seeds_tensors_only(splits: Splits) -> None:
    configs = configs_of(MODELS["mlp"], "training.epochs=1")
    alone, *_ = apart(splits, configs[:1])
    size = Path(f"{id(alone)}.pt").stat().st_size
    for told in together(splits, configs):
        assert abs(Path(f"{id(told)}.pt").stat().st_size - size) < size // 20


def test_the_seconds_of_the_seeds_sum_to_those_that_have_passed(splits: Splits) -> None:
    started = time.perf_counter()
    found = together(splits, configs_of(MODELS["mlp"]))
    passed = time.perf_counter() - started
    seconds = [told.rows[-1].training_seconds for told in found]
    assert max(seconds) == pytest.approx(min(seconds), rel=0.2)
    assert 0 < sum(seconds) < passed


@pytest.mark.parametrize(
    ("overrides", "parameters", "expected"),
    [
        (("model.name=linear",), 7_850, True),
        (("model.name=mlp_128",), 101_770, True),
        (("model.name=mlp_small",), 669_706, False),
        (("model.name=cnn_small",), 28_938, False),
    ],
)
def test_auto_follows_the_measurement_on_a_cpu(
    overrides: tuple[str, ...], parameters: int, expected: bool
) -> None:
    config = override_config(BASE, overrides)
    assert pays(config, choose_plan(config), parameters)[0] is expected


@pytest.mark.parametrize(
    ("device", "name", "parameters", "expected"),
    [
        ("cuda:0", "linear", 7_850, True),
        ("cuda:0", "mlp_small", 669_706, True),
        ("cuda:0", "mlp_large", 8_400_000, False),
        ("cuda:0", "cnn_small", 28_938, False),
        ("mps", "linear", 7_850, False),
    ],
)
def test_auto_follows_the_measurement_on_a_gpu(
    device: str, name: str, parameters: int, expected: bool
) -> None:
    config = override_config(BASE, (f"model.name={name}",))
    plan = replace(choose_plan(config), device=torch.device(device))
    assert pays(config, plan, parameters)[0] is expected


@pytest.mark.parametrize("name", ZOO)
def test_why_apart_names_all_that_is_not_exact(name: str) -> None:
    config = override_config(BASE, (f"model.name={name}",))
    reason = why_apart(config, choose_plan(config))
    assert (reason is None) == (name not in ("mlp_dropout", "cnn_batchnorm", "resnet"))
