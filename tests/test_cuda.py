"""What holds on a CUDA device; all of it is skipped where there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mnist_wandb.checkpoint import load_checkpoint, save_checkpoint
from mnist_wandb.config import ZOO, RunConfig
from mnist_wandb.data import Splits, batch_indices, load_dataset
from mnist_wandb.device import choose_plan, numeric_mode
from mnist_wandb.ensemble import _Ensemble, train_together
from mnist_wandb.loading import override_config, validate
from mnist_wandb.models import build_model
from mnist_wandb.runs import RunFolder
from mnist_wandb.stepgraph import make_step
from mnist_wandb.train import CheckpointReady, Event, Logged, Loop, StepDone, make_state, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

BASE = validate({"data": {"dataset": "digits"}, "tracking": {"mode": "disabled"}})
TINY = (
    *("device=cuda", "data.train_size=200", "training.batch_size=32", "training.epochs=3"),
    *("tracking.log_every_steps=3", "training.precision=fp32"),
)
"""Seven steps an epoch, the last on eight images; some of them log."""
OPTIMIZERS = ("sgd", "rmsprop", "adagrad", "adam", "adamw", "nadam")
ALL_CHANGES = (
    *("data.augment.rotation_degrees=10", "data.augment.translate_pixels=2"),
    *("data.augment.zoom=0.1", "data.augment.elastic=0.7", "data.augment.erase_fraction=0.1"),
)
CASES = {
    **{name: (f"model.name={name}",) for name in ZOO},
    **{name: (f"optimizer={json.dumps({'name': name})}",) for name in OPTIMIZERS},
    "bf16": ("model.name=cnn_small", "training.precision=bf16"),
    "tf32": ("model.name=cnn_small", "training.precision=tf32"),
    "clip": ("training.grad_clip_norm=0.5",),
    "ema": ("model.name=cnn_batchnorm", "training.ema_decay=0.9"),
    "mse": ("training.loss=mse",),
    "smoothing": ("training.label_smoothing=0.1",),
    "shift": ("data.augment.translate_pixels=2",),
    "augment": ALL_CHANGES,
    "fast": ("model.name=cnn_small", "training.deterministic=false"),
}
cases = pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)


def config_of(*overrides: str) -> RunConfig:
    return override_config(BASE, (*TINY, *overrides))


def load(config: RunConfig, device: str = "cuda:0") -> Splits:
    return load_dataset(config.data, device=device)


@pytest.fixture
def waiting_is_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def make_loop(config: RunConfig, splits: Splits, *, records: bool) -> Loop:
    plan = replace(choose_plan(config), cuda_graph=records)
    model = build_model(config.model, seed=config.seed)
    state = make_state(model, config, replace(plan, cuda_graph=choose_plan(config).cuda_graph))
    torch.manual_seed(config.seed)
    model.train()
    return Loop(state, splits, config, plan, lambda event: None, lambda: False)


def batches_of(config: RunConfig, splits: Splits, steps: int) -> list[tuple[int, Tensor]]:
    """The number and the batch of each step; an epoch's batches reach the device as one."""
    count, size = len(splits.train), config.training.batch_size
    batches: list[Tensor] = []
    for epoch in range(math.ceil(steps * size / count) + 1):
        batches += batch_indices(count, size, seed=0, epoch=epoch, device="cuda:0")
    return list(enumerate(batches[:steps], 1))


def numbers(config: RunConfig) -> Any:
    return numeric_mode(choose_plan(config), deterministic=config.training.deterministic)


def test_a_step_that_waits_is_seen(waiting_is_allowed_again: None) -> None:
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.zeros(3, device="cuda").sum().item()


@cases
@pytest.mark.usefixtures("waiting_is_allowed_again")
def test_no_step_waits_for_the_device(overrides: tuple[str, ...]) -> None:
    config = config_of(*overrides)
    splits = load(config)
    loop = make_loop(config, splits, records=choose_plan(config).cuda_graph)
    batches = batches_of(config, splits, 40)
    do_step = make_step(loop.compute_step, loop.plan)
    with numbers(config):
        for step, index in batches:
            loop.state.step = step
            if step == 4:  # libraries are loaded
                torch.cuda.set_sync_debug_mode("error")
            do_step(index, 1e-3, step % 3 == 0)
            if step > 30:
                loop.compute_step(index, 1e-3, step % 3 == 0)
    torch.cuda.set_sync_debug_mode("default")
    assert loop.state.is_finite()


RECORDED = {name: overrides for name, overrides in CASES.items() if name != "adagrad"}


@pytest.mark.parametrize("overrides", RECORDED.values(), ids=RECORDED)
def test_replayed_steps_are_the_steps_bit_for_bit(overrides: tuple[str, ...]) -> None:
    config = config_of(*overrides)
    assert choose_plan(config).cuda_graph
    splits = load(config)
    found = []
    for records in (False, True):
        loop = make_loop(config, splits, records=records)
        lr = torch.zeros((), device="cuda:0")
        results: list[Tensor] = []
        with numbers(config):
            do_step = make_step(loop.compute_step, loop.plan)
            for step, index in batches_of(config, splits, 30):
                loop.state.step = step
                rate = 1e-3 / step
                with_norms = step % 3 == 0
                results += (
                    do_step(index, rate, with_norms)
                    if records
                    else loop.compute_step(index, lr.fill_(rate), with_norms)
                )
        found.append((loop, [float(result) for result in results]))
    (plain, expected), (recorded, results) = found
    tolerance = 0.0 if config.training.deterministic else 1e-3
    torch.testing.assert_close(
        torch.tensor(results), torch.tensor(expected), rtol=tolerance, atol=tolerance
    )
    for ours, theirs in zip(
        recorded.state.scored_model.state_dict().values(),
        plain.state.scored_model.state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in ZOO if "dropout" not in name])
def test_a_model_learns_as_on_the_cpu(name: str) -> None:
    losses = []
    for device in ("cpu", "cuda:0"):
        config = config_of(f"model.name={name}", f"device={device}", "training.epochs=1")
        splits = load(config, device)
        model = build_model(config.model, seed=0)
        rows: list[float] = []

        def take(event: Event, rows: list[float] = rows) -> None:
            rows += (
                [event.values["train/loss"]] if "train/loss" in getattr(event, "values", {}) else []
            )

        train(model, splits, config, emit=take)
        losses.append(rows)
    # Batch normalisation makes more of rounding errors.
    assert losses[1] == pytest.approx(losses[0], rel=0.03 if name == "resnet" else 2e-3)


def weights_after(
    config: RunConfig, splits: Splits, path: Path | None = None, stop: int = 1000
) -> nn.Module:
    """A trained model; of a run stopped after so many steps, the last checkpoint goes to a path."""
    model = build_model(config.model, seed=config.seed)
    done = 0

    def take(event: Event) -> None:
        nonlocal done
        done += isinstance(event, StepDone)
        if isinstance(event, CheckpointReady) and path is not None:
            save_checkpoint(event.checkpoint, path)

    train(model, splits, config, emit=take, should_stop=lambda: done >= stop)
    return model


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


RESUMED = {
    name: CASES[name] for name in (*OPTIMIZERS, "mlp_dropout", "resnet", "ema", "augment", "bf16")
}


@pytest.mark.parametrize("overrides", RESUMED.values(), ids=RESUMED)
def test_a_run_repeats_and_resumes_bit_for_bit(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = config_of(*overrides)
    splits = load(config)
    whole, again = weights_after(config, splits), weights_after(config, splits)
    assert_same(whole, again)
    path = tmp_path / "last.pt"
    for stop in (9, 13):
        weights_after(config, splits, path, stop)
        resumed = build_model(config.model, seed=config.seed)
        train(resumed, splits, config, resume=load_checkpoint(path))
        assert_same(resumed, whole)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("devices", [("cuda:0", "cpu"), ("cpu", "cuda:0")])
def test_a_run_goes_on_on_another_device(
    devices: tuple[str, str], name: str, tmp_path: Path
) -> None:
    path = tmp_path / "last.pt"
    overrides = CASES[name]
    config = config_of(*overrides, f"device={devices[0]}")
    weights_after(config, load(config, devices[0]), path, stop=9)
    there = config_of(*overrides, f"device={devices[1]}")
    moved = build_model(config.model)
    result = train(moved, load(config, devices[1]), there, resume=load_checkpoint(path))
    assert result.steps == 21
    stayed = build_model(config.model)
    train(stayed, load(config, devices[0]), config, resume=load_checkpoint(path))
    for ours, theirs in zip(moved.parameters(), stayed.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=0.02, atol=2e-3)


TOGETHER = {
    **{name: ("model.name=mlp_64x3", *CASES[name]) for name in (*OPTIMIZERS, "clip", "mse")},
    **{name: CASES[name] for name in ("linear", "mlp_small", "cnn_small", "cnn_valid")},
    "tf32": CASES["tf32"],
    "mean": ("model.name=mlp_64x3", "training.ema_decay=0.9"),
}


@pytest.mark.parametrize("overrides", TOGETHER.values(), ids=TOGETHER)
def test_seeds_together_come_to_the_numbers_of_separate_runs(overrides: tuple[str, ...]) -> None:
    configs = [config_of(*overrides, f"seed={seed}") for seed in (3, 4, 5)]
    splits = load(configs[0])
    apart: dict[int, list[dict[str, float]]] = {}
    together: dict[int, list[dict[str, float]]] = {}

    def take(position: int, event: Event, rows: dict[int, list[dict[str, float]]]) -> None:
        if isinstance(event, Logged):
            names = ("train/loss", "train/lr", "val/loss")
            values = {name: event.values[name] for name in names if name in event.values}
            rows.setdefault(position, []).append(values)

    for position, config in enumerate(configs):
        model = build_model(config.model, seed=config.seed)
        train(model, splits, config, emit=partial(take, position, rows=apart))
    models = [build_model(config.model, seed=config.seed) for config in configs]
    plan = choose_plan(configs[0])
    train_together(models, splits, configs, plan=plan, emit=partial(take, rows=together))
    rel = 2e-3 if plan.precision == "fp32" else 2e-2
    assert sorted(together) == sorted(apart)
    for position, rows in apart.items():
        assert together[position] == [pytest.approx(row, rel=rel, abs=1e-4) for row in rows]


@pytest.mark.usefixtures("waiting_is_allowed_again")
def test_no_step_of_seeds_together_waits_for_the_device() -> None:
    configs = [config_of("model.name=cnn_small", f"seed={seed}") for seed in (3, 4)]
    splits = load(configs[0])
    plan = choose_plan(configs[0])
    loops = []
    for config in configs:
        state = make_state(build_model(config.model, seed=config.seed), config, plan)
        loops.append(Loop(state, splits, config, plan, lambda event: None, lambda: False))
    ensemble = _Ensemble(loops, lambda: False)
    with numbers(configs[0]):
        batches = batches_of(configs[0], splits, 30)
        do_step = make_step(ensemble.compute_step, plan)
        for step, index in batches:
            ensemble.state.step = step
            if step == 4:
                torch.cuda.set_sync_debug_mode("error")
            do_step(torch.stack([index, index]), 1e-3, step % 3 == 0)
    torch.cuda.set_sync_debug_mode("default")
    assert ensemble.state.is_finite()


def test_a_seed_that_leaves_does_not_change_the_others() -> None:
    overrides = ("model.name=linear", "training.epochs=8", "training.early_stopping.patience=1")
    configs = [config_of(*overrides, f"seed={seed}") for seed in (3, 4, 5)]
    splits = load(configs[0])
    steps = {}
    for config in configs:
        model = build_model(config.model, seed=config.seed)
        steps[config.seed] = train(model, splits, config).steps
    assert len(set(steps.values())) > 1
    last: dict[int, int] = {}

    def take(position: int, event: Event) -> None:
        if isinstance(event, StepDone):
            last[configs[position].seed] = event.step

    models = [build_model(config.model, seed=config.seed) for config in configs]
    train_together(models, splits, configs, plan=choose_plan(configs[0]), emit=take)
    assert last == steps


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_precision_of_float32_products_is_what_is_said(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 512, 512, generator=generator)
    images, kernels = left.view(1, 64, 64, 64), right.view(-1, 64, 4, 4)[:64]
    exact = [left.double() @ right.double()]
    exact.append(torch.conv2d(images.double(), kernels.double()))
    plan = choose_plan(config_of(f"training.precision={precision}"))
    with numeric_mode(plan, deterministic=True):
        found = [left.cuda() @ right.cuda(), torch.conv2d(images.cuda(), kernels.cuda())]
    for ours, theirs in zip(found, exact, strict=True):
        error = (ours.cpu() - theirs).norm() / theirs.norm()
        assert (error > 1e-4) == (precision == "tf32")
        assert error < 1e-3


def test_a_whole_run_on_a_gpu(program: Any) -> None:
    done = program("run", "training.epochs=2", "device=cuda", "--json", WANDB_MODE="offline")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["device"] == "cuda:0"
    assert summary["metrics"]["test/accuracy"] > 0.5
    facts = RunFolder(Path(summary["run_dir"])).read_environment()
    assert facts["device_name"] == torch.cuda.get_device_name(0)
    assert facts["cuda_graph"] is True
