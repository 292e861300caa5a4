"""Do seeds train faster together than one after the other? Training steps only, on copied digits.

    uv run python benchmarks/seeds.py [NET…] [--device cpu] [--precision fp32] [--seeds 5 10]

Both sides are the program's own loops (`train` and `train_together`) on the same configuration and
in turns, so that a drift of the machine meets both alike. A case is `--seconds` of steps of one
seed (3 to 250 steps, within one epoch). Printed are medians: milliseconds of one step of all seeds,
and the ratio (above 1: together is faster). The load that other processes put on the machine is
reported: it makes the times worthless, and the ratios uncertain.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from dataclasses import replace

import torch
from machine import StepWatch

from mnist_wandb.config import RunConfig
from mnist_wandb.data import Splits, load_dataset
from mnist_wandb.device import choose_plan, device_name
from mnist_wandb.ensemble import train_together, why_apart
from mnist_wandb.experiment import processor_name
from mnist_wandb.loading import load_config
from mnist_wandb.models import build_model
from mnist_wandb.train import train

NETS = ("linear", "mlp_128", "mlp_64x3", "mlp_pyramid", "mlp_small", "cnn_small")
BATCH_SIZES = (32, 64, 256)
COPIES = 60
"""Of each training image, for an epoch as long as MNIST's: nothing but steps is measured."""
MIN_STEPS, MAX_STEPS = 3, 250
WARM_UP_STEPS = 3
"""In the first ones buffers are allocated and CUDA graphs recorded."""


def make_configs(
    net: str, batch_size: int, seeds: int, device: str, precision: str
) -> list[RunConfig]:
    """The quickstart's recipe without augmentation, of one net."""
    overrides = [
        *(f"model.name={net}", f"training.batch_size={batch_size}", f"device={device}"),
        *("data.augment.rotation_degrees=0", "data.augment.translate_pixels=0"),
        *(
            "data.augment.zoom=0",
            f"training.precision={precision}",
            "tracking.log_every_steps=1000000",
        ),
    ]
    return [load_config("quickstart", [*overrides, f"seed={seed}"]) for seed in range(seeds)]


def load_copies(device: torch.device) -> Splits:
    """The digits with each training image many times."""
    splits = load_dataset(load_config("quickstart").data, device=device)
    train_split = splits.train
    copied = replace(
        train_split,
        images=train_split.images.repeat(COPIES, 1, 1, 1),
        labels=train_split.labels.repeat(COPIES),
        ids=train_split.ids.repeat(COPIES),
    )
    return replace(splits, train=copied)


def build(config: RunConfig) -> torch.nn.Module:
    """A fresh model of a configuration."""
    return build_model(config.model, seed=config.seed)


def time_apart(configs: list[RunConfig], splits: Splits, steps: int) -> float:
    """Seconds of a step of all seeds, each trained by itself."""
    seconds = 0.0
    for config in configs:
        watch = StepWatch(steps, warm_up=WARM_UP_STEPS)
        train(build(config), splits, config, emit=watch.take, should_stop=watch.is_over)
        seconds += watch.seconds
    return seconds / steps


def time_together(configs: list[RunConfig], splits: Splits, steps: int) -> float:
    """Seconds of a step of all seeds as one batched model."""
    watch = StepWatch(steps, warm_up=WARM_UP_STEPS)
    train_together(
        [build(config) for config in configs],
        splits,
        configs,
        plan=choose_plan(configs[0]),
        emit=lambda position, event: watch.take(event) if position == 0 else None,
        should_stop=watch.is_over,
    )
    return watch.seconds / steps


def measure(
    configs: list[RunConfig], splits: Splits, seconds: float, repeats: int
) -> tuple[float, float]:
    """Median seconds of a step of all seeds, apart and together."""
    steps = round(seconds / time_apart(configs[:1], splits, MIN_STEPS))
    steps = max(MIN_STEPS, min(MAX_STEPS, steps))
    found = [
        (time_apart(configs, splits, steps), time_together(configs, splits, steps))
        for _ in range(repeats)
    ]
    apart, together = zip(*found, strict=True)
    return statistics.median(apart), statistics.median(together)


def main() -> None:
    """Measure the cases, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nets", nargs="*", default=NETS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5)
    options = parser.parse_args()
    plan = choose_plan(load_config("quickstart", [f"device={options.device}"]))
    splits = load_copies(plan.device)
    loads = [os.getloadavg()[0]]
    name = processor_name() if plan.device.type == "cpu" else device_name(plan.device)
    print(
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, Python"
        f" {platform.python_version()}, torch {torch.__version__}; medians of {options.repeats}"
    )
    print("| net | batch size | seeds | apart, ms | together, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for net in options.nets:
        for batch_size in options.batch_sizes:
            for seeds in options.seeds:
                configs = make_configs(net, batch_size, seeds, options.device, options.precision)
                reason = why_apart(configs[0], choose_plan(configs[0]))
                if reason is not None:
                    raise SystemExit(f"{net}: cannot be trained together: {reason}")
                apart, together = measure(configs, splits, options.seconds, options.repeats)
                print(
                    f"| {net} | {batch_size} | {seeds} | {apart * 1e3:.2f} |"
                    f" {together * 1e3:.2f} | {apart / together:.2f} |",
                    flush=True,
                )
                loads.append(os.getloadavg()[0])
    print(f"load before {loads[0]:.1f}, at most {max(loads):.1f} (this process alone makes 1 to 2)")


if __name__ == "__main__":
    main()
