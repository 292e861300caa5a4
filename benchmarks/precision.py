"""Training images per second on a GPU: formats of numbers, with and without CUDA graphs.

    uv run python benchmarks/precision.py [--repeats 3] [--compile] [NET...]

All is the program's own loop (`train`) on MNIST, batches of 256, AdamW, without augmentation and
recording, from the 60th step on, when libraries are loaded and graphs recorded, to the 200th,
before the epoch ends. What is fastest here is what `training.precision: auto` chooses (device.py).
`--compile` adds torch.compile.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from machine import StepWatch, median, print_conditions, print_table, watching_others

from mnist_wandb.data import Splits, load_dataset
from mnist_wandb.device import choose_plan
from mnist_wandb.loading import load_config
from mnist_wandb.models import build_model
from mnist_wandb.settings import load_settings
from mnist_wandb.train import train

NETS = ("linear", "mlp_small", "mlp_dropout", "cnn_small", "cnn_batchnorm", "cnn_large", "resnet")
FORMATS = ("fp32", "tf32", "bf16")
WARM_UP_STEPS = 60
STEPS = 140


def time_training(net: str, precision: str, way: str, splits: Splits) -> float:
    """Images per second; `way` is eager, graph or compile."""
    config = load_config(
        None,
        [
            *("data.dataset=mnist", f"model.name={net}", "device=cuda"),
            *(f"training.precision={precision}", f"training.compile={way == 'compile'}"),
            "tracking.log_every_steps=20",  # a kind of step of its own, recorded by the 40th
        ],
    )
    plan = replace(choose_plan(config), cuda_graph=way == "graph")
    watch = StepWatch(STEPS, warm_up=WARM_UP_STEPS)
    model = build_model(config.model)
    train(model, splits, config, plan=plan, emit=watch.take, should_stop=watch.is_over)
    return STEPS * config.training.batch_size / watch.seconds


def main() -> None:
    """Measure in turns; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("nets", nargs="*", metavar="NET", help=", ".join(NETS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    nets = options.nets or NETS
    ways = ("eager", "graph", "compile") if options.compile else ("eager", "graph")
    data = load_config(None, ["data.dataset=mnist"]).data
    splits = load_dataset(data, data_dir=load_settings().data_dir, device="cuda:0")
    found: dict[tuple[str, str, str], list[float]] = {}
    with watching_others() as others:
        for _ in range(options.repeats):
            for net in nets:
                for precision in FORMATS:
                    for way in ways:
                        value = time_training(net, precision, way, splits)
                        found.setdefault((net, precision, way), []).append(value)
    rows = [
        (f"`{net}`", *(f"{median(found[net, p, w]):,.0f}" for p in FORMATS for w in ways))
        for net in nets
    ]
    print_table(("net", *(f"{p}, {w}" for p in FORMATS for w in ways)), rows)
    print_conditions(options.repeats, others[0], "cuda:0")


if __name__ == "__main__":
    main()
