from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.optim import lr_scheduler

from mnist_wandb.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mnist_wandb.config import (
    VARIANTS,
    AugmentConfig,
    ConstantConfig,
    CosineConfig,
    OneCycleConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StepConfig,
)
from mnist_wandb.data import Splits, batch_indices, load_dataset
from mnist_wandb.errors import CheckpointError, ConfigError, DivergedError
from mnist_wandb.loading import override_config, validate
from mnist_wandb.models import build_model
from mnist_wandb.optim import load_optimizer, lr_factor, make_optimizer
from mnist_wandb.train import (
    CheckpointReady,
    Event,
    Logged,
    StepDone,
    TrainResult,
    Validated,
    check_batches,
    count_steps,
    train,
)


def section(path: str, **fields: Any) -> str:
    """An override that gives several fields of a section."""
    return f"{path}={json.dumps(fields)}"


BASE = validate({"data": {"dataset": "digits"}, "tracking": {"mode": "disabled"}, "device": "cpu"})
"""The defaults, apart from any preset's tuning."""


def make_config(*overrides: str) -> RunConfig:
    return override_config(BASE, overrides)


SMALL = ("data.train_size=200", "training.epochs=2")
TINY = (*SMALL, "data.train_size=100", "training.batch_size=16", "tracking.log_every_steps=3")
"""Seven steps an epoch, the last on four images; log points that are not the epochs' ends."""
EVERYTHING_ON = (
    *TINY,
    section("model", name="mlp", hidden_sizes=[24, 16], dropout=0.3, batch_norm=True),
    section("data.augment", rotation_degrees=15, translate_pixels=2, erase_fraction=0.1),
    section("optimizer", name="sgd", lr=0.1, momentum=0.9),
    "training.ema_decay=0.8",
    "training.epochs=3",
)


@dataclass
class Trained:
    """One training run and what it told."""

    model: nn.Module
    result: TrainResult
    events: list[Event]
    weights_by_epoch: list[dict[str, Tensor]] = field(default_factory=list)

    def rows(self, key: str) -> list[Logged]:
        return [e for e in self.events if isinstance(e, Logged) and key in e.values]

    def values(self, key: str) -> list[float]:
        return [row.values[key] for row in self.rows(key)]


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def datasets() -> dict[str, Splits]:
    return {}


@pytest.fixture
def run(datasets: dict[str, Splits]) -> Callable[..., Trained]:
    """Train a configuration on the digits, given as overrides."""

    def call(
        *overrides: str,
        model: nn.Module | None = None,
        model_seed: int | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        **arguments: Any,
    ) -> Trained:
        config = make_config(*overrides)
        splits = load(datasets, config)
        if model is None:
            model_seed = config.seed if model_seed is None else model_seed
            model = build_model(config.model, seed=model_seed)
        trained = Trained(model, None, [])  # type: ignore[arg-type]

        def emit(event: Event) -> None:
            on_event(event)
            if isinstance(event, CheckpointReady):
                weights = {k: v.clone() for k, v in event.checkpoint.weights.items()}
                trained.weights_by_epoch.append(weights)
            trained.events.append(event)

        trained.result = train(model, splits, config, emit=emit, **arguments)
        return trained

    return call


def load(datasets: dict[str, Splits], config: RunConfig) -> Splits:
    key = config.data.model_dump_json()
    if key not in datasets:
        datasets[key] = load_dataset(config.data)
    return datasets[key]


def stop_after(steps: int) -> Callable[[], bool]:
    asked = iter(range(10**6))
    return lambda: next(asked) >= steps


def assert_same_weights(model: nn.Module, other: nn.Module | dict[str, Tensor]) -> None:
    expected = other.state_dict() if isinstance(other, nn.Module) else other
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)


# ── optimizer ────────────────────────────────────────────────────────────────────────────────

PLAIN = {"foreach": False}
OPTIMIZERS = [
    (
        {"name": "sgd", "lr": 0.1, "momentum": 0, "nesterov": False},
        lambda p: torch.optim.SGD(p, 0.1, **PLAIN),
    ),
    (
        {"name": "sgd", "lr": 0.1, "momentum": 0.8, "nesterov": False},
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, **PLAIN),
    ),
    (
        {"name": "sgd", "lr": 0.1, "weight_decay": 0.2},
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.2, **PLAIN),
    ),
    (
        {"name": "rmsprop", "lr": 0.01, "momentum": 0.7, "alpha": 0.9, "weight_decay": 0.1},
        lambda p: torch.optim.RMSprop(
            p, 0.01, alpha=0.9, momentum=0.7, weight_decay=0.1, eps=1e-8, **PLAIN
        ),
    ),
    (
        {"name": "adagrad", "lr": 0.05, "weight_decay": 0.1, "eps": 1e-06},
        lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=0.1, eps=1e-6, **PLAIN),
    ),
    (
        {"name": "adam", "lr": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.1, "eps": 0.001},
        lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.95), 1e-3, 0.1, **PLAIN),
    ),
    (
        {"name": "adamw", "lr": 0.01},
        lambda p: torch.optim.AdamW(p, 0.01, (0.9, 0.999), 1e-8, 0.01, **PLAIN),
    ),
    (
        {"name": "nadam", "lr": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.1},
        lambda p: torch.optim.NAdam(p, 0.01, (0.8, 0.95), 1e-8, 0.1, **PLAIN),
    ),
]


@pytest.mark.parametrize(("fields", "plain"), OPTIMIZERS)
def test_make_optimizer_steps_like_plain_torch(
    fields: dict[str, Any], plain: Callable[[Any], torch.optim.Optimizer]
) -> None:
    config = TypeAdapter(OptimizerConfig).validate_python(fields)
    model, reference = nn.Linear(7, 5), nn.Linear(7, 5)
    reference.load_state_dict(model.state_dict())
    optimizer, expected = make_optimizer(config, model), plain(reference.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        expected.step()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("fields", "plain"), OPTIMIZERS)
def test_a_loaded_optimizer_computes_in_its_own_way(
    fields: dict[str, Any], plain: Callable[[Any], torch.optim.Optimizer]
) -> None:
    config = TypeAdapter(OptimizerConfig).validate_python(fields)
    model = nn.Linear(7, 5)
    optimizer = make_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    stored = copy.deepcopy(optimizer.state_dict())
    for group in stored["param_groups"]:  # as of a run on a GPU
        changes = {"fused": False, "foreach": True, "capturable": True, "lr": torch.tensor(7.0)}
        group.update({name: value for name, value in changes.items() if name in group})
    other = nn.Linear(7, 5)
    other.load_state_dict(model.state_dict())
    loaded = make_optimizer(config, other)
    load_optimizer(loaded, stored)
    assert loaded.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for parameters in (model.parameters(), other.parameters()):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    loaded.step()
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_optimizer_cases_name_every_optimizer() -> None:
    assert {fields["name"] for fields, _ in OPTIMIZERS} == set(VARIANTS["optimizer"])


# ── schedule ─────────────────────────────────────────────────────────────────────────────────


def torch_curve(
    make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], total: int, lr: float = 1.0
) -> list[float]:
    """Learning rates that a torch scheduler, stepped once an update, gives."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    scheduler = make(optimizer)
    rates = []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    return rates


def our_curve(config: ScheduleConfig, total: int, steps_per_epoch: int = 7) -> list[float]:
    return [lr_factor(config, step, total, steps_per_epoch) for step in range(total)]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 57])
@pytest.mark.parametrize("anneal", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.12, 0.3, 0.77])
@pytest.mark.parametrize(("start", "final"), [(0.04, 4e-6), (0.5, 0.01)])
def test_one_cycle_is_that_of_torch(
    total: int, anneal: str, warmup: float, start: float, final: float
) -> None:
    config = OneCycleConfig(
        anneal=anneal, warmup_fraction=warmup, start_fraction=start, final_fraction=final
    )
    expected = torch_curve(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=1.0,
            total_steps=total,
            pct_start=warmup,
            anneal_strategy="cos" if anneal == "cosine" else "linear",
            cycle_momentum=False,
            div_factor=1 / start,
            final_div_factor=start / final,
        ),
        total,
    )
    assert our_curve(config, total) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("anneal", ["cosine", "linear"])
@pytest.mark.parametrize("total", [1, 2, 3, 57])
def test_one_cycle_without_warmup_starts_at_the_peak_and_only_falls(
    total: int, anneal: str
) -> None:
    curve = our_curve(OneCycleConfig(warmup_fraction=0, anneal=anneal), total)
    assert curve[0] == 1
    assert curve == sorted(curve, reverse=True)
    assert total == 1 or curve[-1] == pytest.approx(4e-6)


@pytest.mark.parametrize("total", [1, 2, 3, 40])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_without_warmup_is_that_of_torch(total: int, final: float) -> None:
    expected = torch_curve(
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=total, eta_min=final),
        total,
    )
    ours = our_curve(CosineConfig(final_fraction=final), total)
    assert ours == pytest.approx(expected, rel=1e-9)


def test_cosine_warms_up_linearly_then_follows_torch_over_the_rest() -> None:
    curve = our_curve(CosineConfig(warmup_fraction=0.25), 40)
    assert curve[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    rest = torch_curve(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=30), 30)
    assert curve[10:] == pytest.approx(rest)


@pytest.mark.parametrize(("every", "gamma"), [(1, 0.5), (2, 0.75), (3, 1.0)])
def test_step_is_that_of_torch(every: int, gamma: float) -> None:
    steps_per_epoch, epochs = 7, 8
    by_epoch = torch_curve(lambda o: lr_scheduler.StepLR(o, every, gamma), epochs)
    expected = [rate for rate in by_epoch for _ in range(steps_per_epoch)]
    config = StepConfig(every_epochs=every, gamma=gamma)
    assert our_curve(config, epochs * steps_per_epoch) == pytest.approx(expected)


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize(
    "config",
    [
        ConstantConfig(),
        StepConfig(every_epochs=1),
        CosineConfig(),
        CosineConfig(warmup_fraction=0.5),
        CosineConfig(warmup_fraction=0.99),
        OneCycleConfig(),
        OneCycleConfig(warmup_fraction=0),
        OneCycleConfig(warmup_fraction=0.5),
        OneCycleConfig(warmup_fraction=0.99, anneal="linear"),
    ],
    ids=str,
)
def test_schedules_of_a_few_steps_stay_above_zero_and_below_the_peak(
    config: ScheduleConfig, total: int
) -> None:
    curve = our_curve(config, total, steps_per_epoch=1)
    assert all(0 < rate <= 1 for rate in curve), curve


@pytest.mark.parametrize(
    ("epochs", "num_images", "batch_size", "steps"),
    [
        (1, 100, 16, 7),
        (0.4, 100, 16, 3),
        (0.1, 300, 10, 3),  # 0.1 · 30 is a little more than 3 in binary fractions
        (0.7, 1000, 100, 7),
        (2.5, 8, 4, 5),
        (0.001, 10, 10, 1),
        (3, 5, 100, 3),
    ],
)
def test_count_steps_counts_fractions_of_an_epoch(
    epochs: float, num_images: int, batch_size: int, steps: int
) -> None:
    overrides = (f"training.epochs={epochs}", f"training.batch_size={batch_size}")
    assert count_steps(make_config(*overrides), num_images) == steps


# ── a whole run against a plain loop ─────────────────────────────────────────────────────────


@dataclass
class Reference:
    """What a plain PyTorch loop measured, by step and by epoch."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    val_accuracies: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)


def cross_entropy(smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=smoothing)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    one_hot = torch.eye(10)[labels]
    return ((logits.softmax(1) - one_hot) ** 2).mean()


def train_plainly(
    model: nn.Module,
    splits: Splits,
    config: RunConfig,
    optimizer: torch.optim.Optimizer,
    scheduler: lr_scheduler.LRScheduler | None,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    clip: float | None = None,
    ema_decay: float | None = None,
) -> Reference:
    """The loop as PyTorch's tutorials write it: float inputs, one step after the other."""
    found = Reference()
    inputs = {}
    for split in (splits.train, splits.val):
        pixels = split.images.float() / 255
        inputs[split.name] = (pixels - splits.mean) / splits.std
    averaged: dict[str, Tensor] = {}
    torch.manual_seed(config.seed)
    for epoch in range(int(config.training.epochs)):
        model.train()
        size = config.training.batch_size
        for index in batch_indices(len(splits.train), size, seed=config.seed, epoch=epoch):
            found.rates.append(optimizer.param_groups[0]["lr"])
            labels = splits.train.labels[index]
            optimizer.zero_grad()
            logits = model(inputs["train"][index])
            loss = loss_of(logits, labels)
            loss.backward()
            norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
            if clip is not None and norm > clip:
                for parameter in model.parameters():
                    parameter.grad *= clip / norm
            optimizer.step()
            if scheduler is not None and scheduler.last_epoch < config_steps(config, splits) - 1:
                scheduler.step()
            if ema_decay is not None:
                for name, value in model.state_dict().items():
                    if name not in averaged or not value.is_floating_point():
                        averaged[name] = value.clone()
                    else:
                        averaged[name] = ema_decay * averaged[name] + (1 - ema_decay) * value
            found.losses.append(loss.item())
            found.accuracies.append((logits.argmax(1) == labels).float().mean().item())
            found.norms.append(norm)
            found.sizes.append(len(index))
        latest = copy_weights(model)
        if ema_decay is not None:
            model.load_state_dict(averaged)
        found.weights.append(copy_weights(model))
        model.eval()
        with torch.no_grad():
            logits = model(inputs["val"])
        plain_loss = squared_error if loss_of is squared_error else F.cross_entropy
        found.val_losses.append(plain_loss(logits, splits.val.labels).item())
        found.val_accuracies.append((logits.argmax(1) == splits.val.labels).float().mean().item())
        model.load_state_dict(latest)
    return found


def config_steps(config: RunConfig, splits: Splits) -> int:
    return math.ceil(len(splits.train) / config.training.batch_size) * int(config.training.epochs)


WHOLE_RUNS: dict[str, tuple[tuple[str, ...], Any, Any, dict[str, Any]]] = {
    "softmax regression, plain sgd": (
        (
            "model.name=linear",
            section("optimizer", name="sgd", lr=0.05, weight_decay=0, momentum=0, nesterov=False),
            "schedule.name=constant",
        ),
        lambda p: torch.optim.SGD(p, 0.05, **PLAIN),
        lambda o: None,
        {},
    ),
    "dropout, label smoothing, adamw, one cycle": (
        (
            section("model", name="mlp", hidden_sizes=[32], dropout=0.3),
            section("optimizer", name="adamw", lr=0.01),
            "schedule.name=one_cycle",
            "training.label_smoothing=0.1",
        ),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.01, **PLAIN),
        lambda o: lr_scheduler.OneCycleLR(
            o, 0.01, total_steps=26, cycle_momentum=False, div_factor=25, final_div_factor=1e4
        ),
        {"loss_of": cross_entropy(0.1)},
    ),
    "squared error, clipped, rmsprop, cosine": (
        (
            section("model", name="mlp", hidden_sizes=[32], activation="tanh"),
            section("optimizer", name="rmsprop", lr=0.003, weight_decay=0, momentum=0.5),
            section("schedule", name="cosine", warmup_fraction=0, final_fraction=0),
            "training.loss=mse",
            "training.grad_clip_norm=0.02",
        ),
        lambda p: torch.optim.RMSprop(p, 0.003, momentum=0.5, **PLAIN),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=26),
        {"loss_of": squared_error, "clip": 0.02},
    ),
    "convolution, batch norm, momentum, step, mean of weights": (
        (
            section(
                "model",
                name="cnn",
                blocks=[{"channels": 4, "kernel_size": 3, "pool": 4, "batch_norm": True}],
            ),
            section("optimizer", name="sgd", lr=0.02, momentum=0.9, weight_decay=0.01),
            section("schedule", name="step", every_epochs=1, gamma=0.5),
            "training.ema_decay=0.9",
        ),
        lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True, weight_decay=0.01, **PLAIN),
        lambda o: lr_scheduler.MultiStepLR(o, [13], gamma=0.5),
        {"ema_decay": 0.9},
    ),
}


@pytest.mark.parametrize("case", WHOLE_RUNS.values(), ids=WHOLE_RUNS)
def test_train_equals_a_plain_pytorch_loop(
    case: Any, run: Callable[..., Trained], datasets: dict[str, Splits]
) -> None:
    overrides, optimizer_of, scheduler_of, arguments = case
    overrides = (*SMALL, "training.batch_size=16", "tracking.log_every_steps=1", *overrides)
    config = make_config(*overrides)
    splits = load(datasets, config)
    trained = run(*overrides)
    reference = build_model(config.model, seed=config.seed)
    optimizer = optimizer_of(list(reference.parameters()))
    expected = train_plainly(
        reference, splits, config, optimizer, scheduler_of(optimizer), **arguments
    )
    assert min(expected.sizes) < max(expected.sizes)  # the last batch is smaller
    assert trained.values("train/loss") == pytest.approx(expected.losses, rel=1e-4)
    assert trained.values("train/accuracy") == pytest.approx(expected.accuracies)
    assert trained.values("train/grad_norm") == pytest.approx(expected.norms, rel=1e-3)
    assert trained.values("train/lr") == pytest.approx(expected.rates)
    assert trained.values("val/loss") == pytest.approx(expected.val_losses, rel=1e-4)
    assert trained.values("val/accuracy") == pytest.approx(expected.val_accuracies)
    best = int(np.argmax(expected.val_accuracies))
    assert trained.result.best_epoch == best + 1
    assert trained.values("best/epoch")[-1] == best + 1
    assert trained.result.best_accuracy == pytest.approx(max(expected.val_accuracies))
    torch.testing.assert_close(
        {k: v for k, v in trained.model.state_dict().items() if v.is_floating_point()},
        {k: v for k, v in expected.weights[best].items() if v.is_floating_point()},
        rtol=1e-3,
        atol=1e-5,
    )


@pytest.mark.parametrize("every", [1, 3, 5, 1000])
def test_logged_training_values_are_means_over_images(
    every: int, run: Callable[..., Trained]
) -> None:
    each = run(*TINY, "model.name=linear", "tracking.log_every_steps=1")
    losses, accuracies = each.values("train/loss"), each.values("train/accuracy")
    sizes = [16, 16, 16, 16, 16, 16, 4] * 2
    assert len(losses) == len(sizes)
    trained = run(*TINY, "model.name=linear", f"tracking.log_every_steps={every}")
    since = 0
    for row in trained.rows("train/loss"):
        part = slice(since, row.step)
        images = sum(sizes[part])
        for name, values in (("train/loss", losses), ("train/accuracy", accuracies)):
            total = sum(v * n for v, n in zip(values[part], sizes[part], strict=True))
            assert row.values[name] == pytest.approx(total / images, rel=1e-6)
        since = row.step
        assert row.images_used == sum(sizes[:since])
    assert since == len(sizes)
    assert_same_weights(trained.model, each.model)


@pytest.mark.parametrize("batch_size", [1, 33, 99])
def test_a_batch_of_one_image_is_refused_where_batch_norm_needs_two(
    batch_size: int, run: Callable[..., Trained]
) -> None:
    overrides = (*TINY, f"training.batch_size={batch_size}", "training.epochs=1")
    events: list[Event] = []
    model = section("model", name="mlp", hidden_sizes=[8], batch_norm=True)
    with pytest.raises(ConfigError) as caught:
        run(*overrides, model, on_event=events.append)
    assert str(caught.value) == (
        f"training.batch_size: {batch_size} leaves a batch of one of the 100 training images, and"
        " batch normalisation needs two; choose another size"
    )
    assert events == []
    plain = section("model", name="mlp", hidden_sizes=[8])
    assert run(*overrides, plain).result.status == "finished"


BATCH_NORM = section("model", name="mlp", hidden_sizes=[8], batch_norm=True)


@pytest.mark.parametrize(
    ("overrides", "num_images", "message"),
    [
        (("training.batch_size=3",), 90, "3 images cannot be shared by 4 processes"),
        ((BATCH_NORM, "training.batch_size=7"), 70, "gets 1, and batch normalisation needs 2"),
        ((BATCH_NORM, "training.batch_size=8"), 75, "gets 0, and batch normalisation needs 2"),
        (("model.name=cnn_batchnorm", "training.batch_size=8"), 75, "normalisation needs 1"),
        (("model.name=resnet", "training.batch_size=8"), 75, "normalisation needs 1"),
    ],
)
def test_batches_too_small_for_several_processes_are_refused(
    overrides: tuple[str, ...], num_images: int, message: str
) -> None:
    config = make_config(*overrides)
    with pytest.raises(ConfigError, match=message):
        check_batches(config, num_images, 4)
    check_batches(config, num_images)


@pytest.mark.parametrize(
    ("overrides", "num_images"),
    [
        (("model.name=cnn_small", "training.batch_size=8"), 73),
        ((BATCH_NORM, "training.batch_size=8"), 80),
        (("model.name=cnn_batchnorm", "training.batch_size=8"), 76),
    ],
)
def test_batches_that_several_processes_can_share_are_accepted(
    overrides: tuple[str, ...], num_images: int
) -> None:
    check_batches(make_config(*overrides), num_images, 4)


# ── loss, precision, input ───────────────────────────────────────────────────────────────────

ONE_STEP = (*TINY, "training.batch_size=1000", "training.epochs=1", "schedule.name=constant")


def first_logits(splits: Splits, config: RunConfig) -> Tensor:
    model = build_model(config.model, seed=config.seed).eval()
    with torch.no_grad():
        return model((splits.train.images.float() / 255 - splits.mean) / splits.std)


def test_label_smoothing_follows_its_formula(
    run: Callable[..., Trained], datasets: dict[str, Splits]
) -> None:
    overrides = (*ONE_STEP, "model.name=linear", "training.label_smoothing=0.2")
    trained = run(*overrides)
    config = make_config(*overrides)
    splits = load(datasets, config)
    log_p = first_logits(splits, config).double().log_softmax(1)
    truth = log_p[torch.arange(100), splits.train.labels]
    expected = -(0.8 * truth + 0.2 * log_p.mean(1)).mean()
    assert trained.values("train/loss") == pytest.approx([float(expected)], rel=1e-5)


def test_mse_is_the_squared_distance_to_the_one_hot_target(
    run: Callable[..., Trained], datasets: dict[str, Splits]
) -> None:
    overrides = (*ONE_STEP, "model.name=linear", "training.loss=mse")
    trained = run(*overrides)
    config = make_config(*overrides)
    splits = load(datasets, config)
    p = first_logits(splits, config).double().softmax(1).numpy()
    target = np.eye(10)[splits.train.labels.numpy()]
    assert trained.values("train/loss") == pytest.approx([((p - target) ** 2).mean()], rel=1e-5)


@pytest.mark.parametrize("clip", ["1e-3", "1000"])
def test_clipping_bounds_the_update_and_reports_the_whole_norm(
    clip: str, run: Callable[..., Trained]
) -> None:
    overrides = (
        *ONE_STEP,
        "model.name=linear",
        section("optimizer", name="sgd", lr=0.5, weight_decay=0, momentum=0, nesterov=False),
    )
    start = build_model(make_config(*overrides).model, seed=0)
    free, clipped = run(*overrides), run(*overrides, f"training.grad_clip_norm={clip}")
    norm = free.values("train/grad_norm")[0]
    assert clipped.values("train/grad_norm") == pytest.approx([norm])
    share = min(1.0, float(clip) / norm)
    before, after, bounded = (m.state_dict() for m in (start, free.model, clipped.model))
    for name in before:
        step = (bounded[name] - before[name], (after[name] - before[name]) * share)
        torch.testing.assert_close(*step, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", AugmentConfig.model_fields)
def test_every_augmentation_changes_the_training_input_only(
    name: str, run: Callable[..., Trained]
) -> None:
    base = (*ONE_STEP, "model.name=linear", "optimizer.lr=1e-9")
    value = 2 if AugmentConfig.model_fields[name].annotation is int else 0.3
    plain, augmented = run(*base), run(*base, f"data.augment.{name}={value}")
    assert math.isfinite(augmented.values("train/loss")[0])
    assert augmented.values("train/loss") != plain.values("train/loss")
    assert augmented.values("val/loss") == pytest.approx(plain.values("val/loss"), rel=1e-5)


@pytest.mark.parametrize(
    ("scaling", "scale"),
    [
        ("unit", lambda pixels, splits: pixels),
        ("symmetric", lambda pixels, splits: 2 * pixels - 1),
        ("standardize", lambda pixels, splits: (pixels - pixels_mean(splits)) / pixels_std(splits)),
    ],
)
def test_every_scaling_is_applied_to_training_and_validation(
    scaling: str,
    scale: Callable[[Tensor, Splits], Tensor],
    run: Callable[..., Trained],
    datasets: dict[str, Splits],
) -> None:
    overrides = (*ONE_STEP, "model.name=linear", "optimizer.lr=1e-9", f"data.scaling={scaling}")
    trained = run(*overrides)
    config = make_config(*overrides)
    splits = load(datasets, config)
    model = build_model(config.model, seed=config.seed)
    for split in (splits.train, splits.val):
        logits = model(scale(split.images / 255, splits))
        expected = F.cross_entropy(logits, split.labels).item()
        assert trained.values(f"{split.name}/loss") == pytest.approx([expected], rel=1e-5)


def pixels_mean(splits: Splits) -> float:
    return float((splits.train.images.double() / 255).mean())


def pixels_std(splits: Splits) -> float:
    return float((splits.train.images.double() / 255).std(correction=0))


def test_bf16_computes_in_bf16_and_keeps_float32_weights(run: Callable[..., Trained]) -> None:
    overrides = (*TINY, section("model", name="mlp", hidden_sizes=[32]))
    exact, rounded = run(*overrides), run(*overrides, "training.precision=bf16")
    assert rounded.values("val/loss") != exact.values("val/loss")
    assert rounded.values("val/loss") == pytest.approx(exact.values("val/loss"), rel=0.05)
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C compiler (gcc)")
def test_a_compiled_model_trains_like_the_plain_one(
    run: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    overrides = (*TINY, section("model", name="mlp", hidden_sizes=[32]))
    plain, compiled = run(*overrides), run(*overrides, "training.compile=true")
    assert compiled.values("train/loss") == pytest.approx(plain.values("train/loss"), rel=1e-3)
    torch.testing.assert_close(
        compiled.model.state_dict(), plain.model.state_dict(), rtol=1e-3, atol=1e-4
    )


# ── events ───────────────────────────────────────────────────────────────────────────────────


def test_train_tells_each_step_log_point_and_epoch_in_order(run: Callable[..., Trained]) -> None:
    trained = run(*TINY, "model.name=linear")
    expected: list[tuple[type, int]] = []
    for step in range(1, 15):
        if step in (3, 6, 7, 9, 12, 14):
            expected.append((Logged, step))
        expected.append((StepDone, step))
        if step in (7, 14):
            expected += [(Logged, step), (Validated, step), (CheckpointReady, step)]
    found = [
        (type(e), e.checkpoint.step if isinstance(e, CheckpointReady) else e.step)
        for e in trained.events
    ]
    assert found == expected
    assert [e for e in trained.events if isinstance(e, StepDone)][8] == StepDone(9, 14, 1, 2, 7)
    assert {row.step: row.epoch for row in trained.rows("train/loss")} == {
        3: pytest.approx(3 / 7, abs=1e-6),
        6: pytest.approx(6 / 7, abs=1e-6),
        7: 1,
        9: pytest.approx(9 / 7, abs=1e-6),
        12: pytest.approx(12 / 7, abs=1e-6),
        14: 2,
    }
    train_names = ("loss", "accuracy", "lr", "grad_norm", "images_per_second")
    assert set(trained.rows("train/loss")[0].values) == {f"train/{name}" for name in train_names}
    assert set(trained.rows("val/loss")[0].values) == {
        *("val/loss", "val/accuracy", "val/macro_f1"),
        *("best/val_accuracy", "best/epoch"),
    }
    assert trained.result.status == "finished"
    assert (trained.result.steps, trained.result.epochs) == (14, 2)
    seconds = trained.result.training_seconds
    assert trained.result.images_per_second == pytest.approx(200 / seconds)


def test_a_checkpoint_after_each_epoch_says_whether_it_is_the_best(
    run: Callable[..., Trained],
) -> None:
    trained = run(*TINY, "model.name=linear", "training.epochs=8", "optimizer.lr=0.3")
    accuracies = trained.values("val/accuracy")
    improved = [a > max([-1.0, *accuracies[:i]]) for i, a in enumerate(accuracies)]
    assert {True, False} == set(improved)
    ready = [e for e in trained.events if isinstance(e, CheckpointReady)]
    validated = [e for e in trained.events if isinstance(e, Validated)]
    assert [e.best for e in ready] == [e.improved for e in validated] == improved
    assert all(e.end_of_epoch for e in ready)
    assert [e.checkpoint.epoch for e in ready] == list(range(1, 9))
    assert [e.result.accuracy for e in validated] == accuracies


def test_a_fraction_of_an_epoch_trains_so_many_steps_and_validates_once(
    run: Callable[..., Trained],
) -> None:
    trained = run(*TINY, "model.name=linear", "training.epochs=1.4")
    assert trained.result.steps == 10
    assert trained.result.epochs == pytest.approx(10 / 7, abs=1e-6)
    assert [row.step for row in trained.rows("val/loss")] == [7, 10]
    assert [row.step for row in trained.rows("train/loss")] == [3, 6, 7, 9, 10]


def test_training_is_in_train_mode_again_after_each_validation(
    run: Callable[..., Trained],
) -> None:
    config = make_config(*EVERYTHING_ON)
    model = build_model(config.model)
    modes: list[tuple[type, bool]] = []
    run(
        *EVERYTHING_ON,
        model=model,
        on_event=lambda e: modes.append((type(e), all(m.training for m in model.modules()))),
    )
    assert {is_training for kind, is_training in modes if kind is StepDone} == {True}


# ── best weights, early stopping ─────────────────────────────────────────────────────────────

RESTLESS = (*TINY, "model.name=linear", "optimizer.lr=0.3", "schedule.name=constant")


def test_the_model_holds_the_best_weights_afterwards(run: Callable[..., Trained]) -> None:
    trained = run(*RESTLESS, "training.epochs=8")
    accuracies = trained.values("val/accuracy")
    best = int(np.argmax(accuracies))  # the first of equals
    assert best < len(accuracies) - 1, "choose a run whose last epoch is not the best"
    assert trained.result.best_epoch == best + 1
    assert trained.result.best_accuracy == max(accuracies)
    assert_same_weights(trained.model, trained.weights_by_epoch[best])


def test_the_earliest_of_equally_good_epochs_is_the_best(run: Callable[..., Trained]) -> None:
    trained = run(*TINY, "model.name=linear", "optimizer.lr=1e-12", "training.epochs=4")
    assert len(set(trained.values("val/accuracy"))) == 1
    assert trained.result.best_epoch == 1
    assert trained.values("best/epoch") == [1, 1, 1, 1]
    assert_same_weights(trained.model, trained.weights_by_epoch[0])


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_early_stopping_waits_for_its_patience(patience: int, run: Callable[..., Trained]) -> None:
    trained = run(
        *(*TINY, "model.name=linear", "optimizer.lr=1e-12", "training.epochs=20"),
        f"training.early_stopping.patience={patience}",
    )
    assert trained.result.status == "early_stopped"
    assert trained.result.epochs == 1 + patience


@pytest.mark.parametrize(("patience", "min_delta"), [(1, 0.0), (2, 0.0), (1, 0.02), (3, 0.2)])
def test_early_stopping_counts_only_gains_above_min_delta(
    patience: int, min_delta: float, run: Callable[..., Trained]
) -> None:
    accuracies = run(*RESTLESS, "training.epochs=12").values("val/accuracy")
    reference, waited, stop = -1.0, 0, 0
    for epoch, accuracy in enumerate(accuracies, start=1):
        if accuracy > reference + min_delta:
            reference, waited = accuracy, 0
        else:
            waited += 1
        if waited == patience:
            stop = epoch
            break
    assert 0 < stop < 12, "choose a run that stalls"
    trained = run(
        *(*RESTLESS, "training.epochs=12"),
        section("training.early_stopping", patience=patience, min_delta=min_delta),
    )
    assert (trained.result.status, trained.result.epochs) == ("early_stopped", stop)
    assert trained.values("val/accuracy") == accuracies[:stop]
    best = int(np.argmax(accuracies[:stop]))
    assert_same_weights(trained.model, trained.weights_by_epoch[best])


def test_a_patience_that_ends_with_the_last_epoch_has_stopped_nothing(
    run: Callable[..., Trained],
) -> None:
    trained = run(
        *(*TINY, "model.name=linear", "optimizer.lr=1e-12", "training.epochs=3"),
        "training.early_stopping.patience=2",
    )
    assert (trained.result.status, trained.result.epochs) == ("finished", 3)


def test_a_model_that_keeps_getting_better_is_not_stopped(run: Callable[..., Trained]) -> None:
    trained = run(*TINY, "model.name=linear", "training.early_stopping.patience=1", "seed=1")
    assert trained.values("val/accuracy") == sorted(set(trained.values("val/accuracy")))
    assert (trained.result.status, trained.result.epochs) == ("finished", 2)


# ── interrupt and resume ─────────────────────────────────────────────────────────────────────


def comparable(events: list[Event]) -> Iterator[tuple[int, float, dict[str, float], int]]:
    for event in events:
        if isinstance(event, Logged):
            values = {k: v for k, v in event.values.items() if k != "train/images_per_second"}
            yield event.step, event.epoch, values, event.images_used


def interrupt(
    run: Callable[..., Trained], path: Path, steps: int, *overrides: str, **arguments: Any
) -> Trained:
    """Train until so many steps of this session are done; the checkpoint goes to a file."""

    def save(event: Event) -> None:
        if isinstance(event, CheckpointReady):
            save_checkpoint(event.checkpoint, path)

    return run(*overrides, on_event=save, should_stop=stop_after(steps), **arguments)


@pytest.mark.parametrize("position", [0, 1, 3, 5, 7, 9, 14, 20])
def test_an_interrupted_run_resumes_bit_for_bit(
    position: int, run: Callable[..., Trained], tmp_path: Path
) -> None:
    whole = run(*EVERYTHING_ON)
    path = tmp_path / "last.pt"
    first = interrupt(run, path, position, *EVERYTHING_ON)
    assert (first.result.status, first.result.steps) == ("interrupted", position)
    last = first.events[-1]
    assert isinstance(last, CheckpointReady)
    assert (last.best, last.end_of_epoch) == (False, False)
    assert load_checkpoint(path).step == position
    torch.rand(7)  # another process has another random state, and other fresh weights
    second = run(*EVERYTHING_ON, resume=load_checkpoint(path), model_seed=99)
    rows = [*comparable(first.events), *comparable(second.events)]
    assert rows == list(comparable(whole.events))
    assert_same_weights(second.model, whole.model)
    assert [getattr(second.result, name) for name in UNTIMED] == [
        getattr(whole.result, name) for name in UNTIMED
    ]


UNTIMED = ("status", "steps", "epochs", "best_epoch", "best_accuracy")


@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad", "adam", "adamw", "nadam"])
def test_every_optimizer_resumes_bit_for_bit_even_twice(
    optimizer: str, run: Callable[..., Trained], tmp_path: Path
) -> None:
    overrides = (*TINY, "model.name=linear", section("optimizer", name=optimizer, lr=0.01))
    path = tmp_path / "last.pt"
    whole = run(*overrides)
    first = interrupt(run, path, 4, *overrides)
    second = interrupt(run, path, 5, *overrides, resume=load_checkpoint(path))
    assert second.result.steps == 9
    third = run(*overrides, resume=load_checkpoint(path))
    rows = [row for session in (first, second, third) for row in comparable(session.events)]
    assert rows == list(comparable(whole.events))
    assert_same_weights(third.model, whole.model)


@pytest.mark.parametrize("steps", [1, 4, 5, 6])
def test_an_interrupted_run_counts_all_images_that_it_used(
    steps: int, run: Callable[..., Trained]
) -> None:
    stopped = run(*TINY, "model.name=linear", should_stop=stop_after(steps)).result
    used = stopped.images_per_second * stopped.training_seconds
    assert used == pytest.approx(steps * 16)


def test_a_run_interrupted_before_its_first_validation_has_no_scores_yet(
    run: Callable[..., Trained],
) -> None:
    stopped = run(*TINY, "model.name=linear", should_stop=stop_after(4))
    (ready,) = [e for e in stopped.events if isinstance(e, CheckpointReady)]
    assert ready.checkpoint.metrics == {}
    assert (stopped.result.best_epoch, stopped.result.best_accuracy) == (0, 0)


def test_an_interrupted_model_holds_the_last_weights(
    run: Callable[..., Trained], tmp_path: Path
) -> None:
    overrides = (*RESTLESS, "training.epochs=8")
    whole = run(*overrides)
    best = int(whole.result.best_epoch)
    assert best < 8
    stopped = interrupt(run, tmp_path / "last.pt", best * 7 + 10, *overrides)
    assert stopped.result.best_epoch == best
    assert_same_weights(stopped.model, stopped.weights_by_epoch[-1])
    best_weights = stopped.weights_by_epoch[best - 1]
    assert any(not torch.equal(v, best_weights[k]) for k, v in stopped.model.state_dict().items())


def test_a_run_that_has_stopped_early_does_not_train_on_when_resumed(
    run: Callable[..., Trained], tmp_path: Path
) -> None:
    overrides = (
        *(*TINY, "model.name=linear", "optimizer.lr=1e-12", "training.epochs=20"),
        "training.early_stopping.patience=2",
    )
    path = tmp_path / "last.pt"
    stopped = interrupt(run, path, 10**6, *overrides)
    resumed = run(*overrides, resume=load_checkpoint(path), model_seed=99)
    assert resumed.events == []
    assert (resumed.result.status, resumed.result.steps) == ("early_stopped", 21)
    assert_same_weights(resumed.model, stopped.model)


def test_a_finished_run_does_not_train_on_when_resumed(
    run: Callable[..., Trained], tmp_path: Path
) -> None:
    path = tmp_path / "last.pt"
    finished = interrupt(run, path, 10**6, *EVERYTHING_ON)
    resumed = run(*EVERYTHING_ON, resume=load_checkpoint(path), model_seed=99)
    assert resumed.events == []
    assert resumed.result == finished.result
    assert_same_weights(resumed.model, finished.model)


def test_a_long_epoch_is_saved_within_and_resumes_from_there(
    run: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["mnist_wandb.train"], "CHECKPOINT_SECONDS", 0.0)
    overrides = (*EVERYTHING_ON, "training.epochs=2")
    saved: list[tuple[int, bool]] = []

    def save(event: Event) -> None:
        if isinstance(event, CheckpointReady):
            save_checkpoint(event.checkpoint, tmp_path / f"{event.checkpoint.step}.pt")
            saved.append((event.checkpoint.step, event.end_of_epoch))

    whole = run(*overrides, on_event=save)
    assert saved == [(step, step in (7, 14)) for step in range(1, 15)]
    expected = list(comparable(whole.events))
    for step in (2, 10, 13):
        resumed = run(*overrides, resume=load_checkpoint(tmp_path / f"{step}.pt"), model_seed=99)
        assert list(comparable(resumed.events)) == [row for row in expected if row[0] > step]
        assert_same_weights(resumed.model, whole.model)


@pytest.fixture
def stopped_checkpoint(run: Callable[..., Trained], tmp_path: Path) -> Checkpoint:
    interrupt(run, tmp_path / "last.pt", 4, *TINY, "model.name=linear")
    return load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("model.name=mlp_128",), "this state cannot be continued"),
        (("training.ema_decay=0.9",), "this state cannot be continued"),
        (
            ("optimizer.name=sgd",),
            "this state is of optimizer 'adamw', the configuration has 'sgd'",
        ),
    ],
)
def test_a_state_of_another_configuration_is_refused(
    overrides: tuple[str, ...],
    text: str,
    run: Callable[..., Trained],
    stopped_checkpoint: Checkpoint,
) -> None:
    with pytest.raises(CheckpointError, match=text):
        run(*TINY, "model.name=linear", *overrides, resume=stopped_checkpoint)


def test_a_checkpoint_without_training_state_is_refused(
    run: Callable[..., Trained], stopped_checkpoint: Checkpoint
) -> None:
    with pytest.raises(CheckpointError, match="no training state to continue from"):
        run(*TINY, "model.name=linear", resume=replace(stopped_checkpoint, training=None))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    run: Callable[..., Trained],
) -> None:
    first, second, other = run(*EVERYTHING_ON), run(*EVERYTHING_ON), run(*EVERYTHING_ON, "seed=1")
    assert list(comparable(first.events)) == list(comparable(second.events))
    assert_same_weights(first.model, second.model)
    assert first.values("train/loss") != other.values("train/loss")


@pytest.mark.parametrize("enabled", [True, False])
def test_train_puts_torchs_global_switches_back(enabled: bool, run: Callable[..., Trained]) -> None:
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    during = []
    run(
        *(*TINY, "model.name=linear", f"training.deterministic={str(enabled).lower()}"),
        on_event=lambda e: during.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert set(during) == {enabled}
    assert before == (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
    )


# ── divergence, convergence ──────────────────────────────────────────────────────────────────

EXPLOSIVE = (
    *(*TINY, "model.name=mlp_64x3", "schedule.name=constant", "training.epochs=3"),
    section("optimizer", name="sgd", lr=100),
)


@pytest.mark.parametrize("every", [1, 3, 1000])
def test_a_run_that_diverges_says_at_which_step_and_after_which_loss(
    every: int, run: Callable[..., Trained], datasets: dict[str, Splits]
) -> None:
    overrides = (*EXPLOSIVE, f"tracking.log_every_steps={every}")
    config = make_config(*overrides)
    reference = build_model(config.model, seed=config.seed)
    optimizer = make_optimizer(config.optimizer, reference)
    losses = train_plainly(reference, load(datasets, config), config, optimizer, None).losses
    broken = next(i for i, loss in enumerate(losses, start=1) if not math.isfinite(loss))
    assert 1 < broken < 7
    events: list[Event] = []
    with pytest.raises(DivergedError) as caught:
        run(*overrides, on_event=events.append)
    assert caught.value.step == broken
    text = str(caught.value)
    assert f"training diverged at step {broken}: training loss is" in text
    assert "(lr 100, last finite loss " in text
    last = float(text.partition("last finite loss ")[2].partition(")")[0])
    assert last == pytest.approx(losses[broken - 2], rel=0.01)
    assert "try a smaller optimizer.lr or training.grad_clip_norm=1" in text
    assert not [e for e in events if isinstance(e, CheckpointReady | Validated)]


def test_a_run_asked_to_stop_after_it_diverged_saves_nothing(run: Callable[..., Trained]) -> None:
    events: list[Event] = []
    with pytest.raises(DivergedError, match="weights or loss is nan") as caught:
        run(
            *(*EXPLOSIVE, "tracking.log_every_steps=1000"),
            on_event=events.append,
            should_stop=stop_after(6),
        )
    assert caught.value.step == 6
    assert not [e for e in events if isinstance(e, CheckpointReady)]


def test_every_checkpoint_of_a_diverging_run_is_finite(run: Callable[..., Trained]) -> None:
    finite: list[bool] = []

    def check(event: Event) -> None:
        if isinstance(event, CheckpointReady):
            tensors = [*event.checkpoint.weights.values()]
            finite.append(all(bool(t.isfinite().all()) for t in tensors))

    schedule = section("schedule", name="one_cycle", warmup_fraction=0.9, start_fraction=0.0001)
    with pytest.raises(DivergedError):
        run(*EXPLOSIVE, schedule, "training.epochs=20", "optimizer.lr=3", on_event=check)
    assert finite
    assert all(finite)


def test_a_small_mlp_learns_the_digits_in_a_few_seconds(run: Callable[..., Trained]) -> None:
    trained = run(
        *("tracking.mode=disabled", section("model", name="mlp", hidden_sizes=[64])),
        *("training.epochs=6", "training.batch_size=64", "optimizer.lr=0.01"),
    )
    assert trained.result.best_accuracy > 0.9
    assert trained.values("train/loss")[-1] < 0.2
