"""Time to 99 % test accuracy on MNIST: the preset `speedrun`, and a tutorial's loop.

    uv run python benchmarks/time_to_99.py [--seeds 10] [--tutorial] [--device cuda]

The preset runs once a seed as a process of its own, tracked offline, from the shell to the prompt;
"training" is the time of its steps. `--tutorial` adds what a user would write instead: the network
of PyTorch's MNIST example in a `DataLoader` loop with Adam, scored on the test images after each
epoch until it has 99 % (which chooses by the test split, as tutorials do; the preset never does).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

import torch
from machine import median, print_conditions, print_table, run_json, run_program, watching_others
from torch import nn

from mnist_wandb.loading import load_config
from mnist_wandb.models import build_model
from mnist_wandb.settings import load_settings

TARGET = 0.99
PRESET = "speedrun"


def run_tutorial(device: str) -> tuple[float, float, int]:
    """Seconds of training, test accuracy and epochs until the target is reached."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    torch.manual_seed(0)
    folder = load_settings().data_dir
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    train = DataLoader(datasets.MNIST(folder, True, transform), batch_size=64, shuffle=True)
    test = DataLoader(datasets.MNIST(folder, False, transform), batch_size=1000)
    model = build_model(load_config(None, ["model.name=cnn_valid", "model.dropout=0.25"]).model).to(
        device
    )
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()
    seconds, epochs, accuracy = 0.0, 0, 0.0
    while accuracy < TARGET:
        started = time.perf_counter()
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            criterion(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        seconds += time.perf_counter() - started
        epochs += 1
        model.eval()
        with torch.no_grad():
            hits = sum(
                (model(images.to(device)).argmax(1).cpu() == labels).sum().item()
                for images, labels in test
            )
        accuracy = hits / 10_000
    return seconds, accuracy, epochs


def main() -> None:
    """Measure; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tutorial", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    data = f"data.dir={load_settings().data_dir.absolute()}"
    training, whole, accuracies = [], [], []
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with watching_others() as others, tempfile.TemporaryDirectory() as folder:
        run_program("run", "--quiet", "training.epochs=0.1", folder=folder)  # fills the caches
        for seed in range(options.seeds):
            seconds, summary = run_json(
                "run", "--config", PRESET, f"seed={seed}", data, "tracking.mode=offline",
                f"device={options.device}", folder=folder,
            )  # fmt: skip
            whole.append(seconds)
            training.append(summary["training_seconds"])
            accuracies.append(summary["metrics"]["test/accuracy"])
        mean = sum(accuracies) / len(accuracies)
        rows = [
            (
                f"`{PRESET}`, {options.seeds} seeds",
                f"{mean:.4f} ({min(accuracies):.4f} to {max(accuracies):.4f})",
                f"{median(training):.2f}",
                f"{median(whole):.2f}",
            )
        ]
        if options.tutorial:
            started = time.perf_counter()
            seconds, accuracy, epochs = run_tutorial(options.device)
            name = f"tutorial, {epochs} epochs, once"
            rows.append(
                (name, f"{accuracy:.4f}", f"{seconds:.1f}", f"{time.perf_counter() - started:.1f}")
            )
    print_table(("", "test accuracy", "training, seconds", "whole process, seconds"), rows)
    print_conditions(options.seeds, others[0], options.device)


if __name__ == "__main__":
    main()
