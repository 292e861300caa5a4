"""Training images per second: a tutorial's loop, a bare fast loop, and the complete program.

    uv run python benchmarks/throughput.py [--repeats 5] [--device cuda] [NET...]

The same nets, batch size (256), optimizer (AdamW) and MNIST images on all three sides, without
augmentation:

- tutorial: `torchvision.datasets.MNIST` with ToTensor and Normalize in a `DataLoader`, as tutorials
  write it;
- bare: the fastest loop we know, nothing but training: the split as uint8 in memory, batches by
  index, channels-last, a fused optimizer, freed memory kept in the process;
- program: `mnist-wandb run` with its run folder and W&B offline; images and seconds are those of
  its summary, with metrics and their recording.

Each measurement is a process of its own, in turns. "of peak" is what the program's multiplications
and additions make of the fastest matrix product (float32, 2048 × 2048) measured in between.

On a GPU the tutorial moves each batch there, and the bare loop has the whole split there. All three
compute in the format that the program chooses for the net (`training.precision: auto`), for which
"of peak" is not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import (
    median,
    print_conditions,
    print_table,
    run_json,
    wait_for_device,
    watching_others,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mnist_wandb.data import Preprocessing, batch_indices, load_dataset
from mnist_wandb.device import choose_precision, keep_freed_memory
from mnist_wandb.loading import load_config
from mnist_wandb.models import build_model
from mnist_wandb.settings import load_settings

BATCH_SIZE = 256
LR = 1e-3
NETS = {
    "linear": 6000,
    "mlp_small": 1000,
    "mlp_dropout": 2000,
    "cnn_small": 200,
    "cnn_batchnorm": 100,
    "cnn_large": 40,
}
"""Steps of one measurement, some 15 seconds each."""
GPU_STEPS = {"tutorial": 40, "bare": 1000, "program": 8000}
"""On a GPU, where the program's first steps load CUDA's libraries, half a second."""
TUTORIAL_STEPS = 40
WARM_UP_STEPS = 2
"""Of the two plain loops; torch imports more, and allocates, in the first. The program has none."""


def use_precision(net: str, device: str) -> Any:
    """The autocast of the program's precision; TF32 is switched on where that is chosen."""
    config = load_config(None, ["data.dataset=mnist", f"model.name={net}", f"device={device}"])
    precision = choose_precision(config, torch.device(device))
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16")


def now() -> float:
    """The clock, when the device has done its work."""
    wait_for_device()
    return time.perf_counter()


def time_tutorial(net: str, steps: int, device: str) -> float:
    """Images per second of a loop as tutorials have it."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    data = datasets.MNIST(load_settings().data_dir, train=True, transform=transform)
    loader = DataLoader(data, batch_size=BATCH_SIZE, shuffle=True)
    model = build_model(load_config(None, [f"model.name={net}"]).model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    autocast = use_precision(net, device)
    criterion = nn.CrossEntropyLoss()
    model.train()
    done, started = -WARM_UP_STEPS, 0.0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        with autocast:
            loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        done += 1
        if done == 0:
            started = now()
        if done == min(steps, TUTORIAL_STEPS):
            break
    return done * BATCH_SIZE / (now() - started)


def time_bare(net: str, steps: int, device: str) -> float:
    """Images per second of a loop that only trains."""
    config = load_config(None, ["data.dataset=mnist", f"model.name={net}"])
    splits = load_dataset(config.data, data_dir=load_settings().data_dir, device=device)
    keep_freed_memory()
    images, labels = splits.train.images, splits.train.labels
    preprocessing = Preprocessing.fit("standardize", splits.mean, splits.std)
    model = build_model(config.model).to(device)
    memory_format = torch.channels_last if "cnn" in net else torch.contiguous_format
    model.to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    autocast = use_precision(net, device)
    model.train()
    done, epoch, num_images, started = -WARM_UP_STEPS, 0, 0, 0.0
    while done < steps:
        batches = batch_indices(len(labels), BATCH_SIZE, seed=0, epoch=epoch, device=device)
        for index in batches[: steps - done]:
            if done == 0:
                num_images, started = 0, now()
            inputs = preprocessing(images[index]).contiguous(memory_format=memory_format)
            with autocast:
                loss = F.cross_entropy(model(inputs), labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            num_images += len(index)
        epoch += 1
    return num_images / (now() - started)


def time_program(net: str, steps: int, device: str, folder: str) -> float:
    """Images per second of `mnist-wandb run` with a configuration of nothing but these facts."""
    config = {
        "device": device,
        "data": {"dataset": "mnist", "dir": str(load_settings().data_dir.absolute())},
        "model": {"name": net},
        "optimizer": {"name": "adamw", "lr": LR},
        "training": {"batch_size": BATCH_SIZE, "epochs": steps / 211},
        "tracking": {"mode": "offline"},
    }
    path = Path(folder, f"{net}.yaml")
    path.write_text(json.dumps(config))  # JSON is YAML
    _, summary = run_json("run", "--config", str(path), folder=folder)
    return float(summary["images_per_second"])


def time_peak(device: str) -> float:
    """Floating-point operations per second of the fastest of 30 matrix products."""
    left, right = torch.randn(2, 2048, 2048, device=device)
    fastest = float("inf")
    for _ in range(30):
        started = now()
        left @ right
        fastest = min(fastest, now() - started)
    return float(2 * 2048**3 / fastest)


def count_operations(net: str) -> float:
    """Floating-point operations of one image, forward and backward (products and sums)."""
    model = build_model(load_config(None, [f"model.name={net}"]).model)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(
            model(torch.zeros(8, 1, 28, 28)), torch.zeros(8, dtype=torch.int64)
        ).backward()
    return counter.get_total_flops() / 8


def measure(*words: str) -> float:
    """One measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(json.loads(done.stdout))


def main() -> None:
    """Measure in turns, so that a drift of the machine meets all sides alike; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("nets", nargs="*", metavar="NET", help=", ".join(NETS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        side, *rest = options.measure
        sides: dict[str, Any] = {"tutorial": time_tutorial, "bare": time_bare, "peak": time_peak}
        print(json.dumps(sides[side](*(int(w) if w.isdigit() else w for w in rest))))
        return
    nets = options.nets or list(NETS)
    found: dict[tuple[str, str], list[float]] = {}
    with watching_others() as others, tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            found.setdefault(("", "peak"), []).append(measure("peak", options.device))
            for net in nets:
                on_gpu = options.device != "cpu"
                steps = GPU_STEPS if on_gpu else dict.fromkeys(GPU_STEPS, NETS[net])
                values = {
                    "tutorial": measure("tutorial", net, str(steps["tutorial"]), options.device),
                    "bare": measure("bare", net, str(steps["bare"]), options.device),
                    "program": time_program(net, steps["program"], options.device, folder),
                }
                for side, value in values.items():
                    found.setdefault((net, side), []).append(value)
    peak = max(found["", "peak"])
    rows = []
    for net in nets:
        tutorial, bare, program = (median(found[net, s]) for s in ("tutorial", "bare", "program"))
        ratio = median(
            [p / b for p, b in zip(found[net, "program"], found[net, "bare"], strict=True)]
        )
        share = program * count_operations(net) / peak
        rows.append(
            (f"`{net}`", f"{tutorial:,.0f}", f"{bare:,.0f}", f"{program:,.0f}", f"{ratio:.2f}",
             f"{program / tutorial:.1f}", f"{share:.0%}" if options.device == "cpu" else "–")
        )  # fmt: skip
    print_table(
        ("net", "tutorial, images/s", "bare", "program", "program / bare", "program / tutorial",
         "of peak"),
        rows,
    )  # fmt: skip
    print(f"\npeak {peak / 1e9:.0f} GFLOP/s; batch size {BATCH_SIZE}")
    print_conditions(options.repeats, others[0], options.device)


if __name__ == "__main__":
    main()
