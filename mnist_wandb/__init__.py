"""Train, track and compare image classifiers on MNIST-like data.

The names that need torch are imported when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "checkpoint",
    "ConfigError": "errors",
    "EvalResult": "metrics",
    "MnistWandbError": "errors",
    "Preprocessing": "data",
    "RunConfig": "config",
    "RunFolder": "runs",
    "build_model": "models",
    "evaluate": "evaluate",
    "load_checkpoint": "checkpoint",
    "load_config": "loading",
    "load_dataset": "data",
    "load_settings": "settings",
    "run_experiment": "experiment",
    "run_seeds": "seeds",
    "train": "train",
}

__all__ = [
    "Checkpoint",
    "ConfigError",
    "EvalResult",
    "MnistWandbError",
    "Preprocessing",
    "RunConfig",
    "RunFolder",
    "build_model",
    "evaluate",
    "load_checkpoint",
    "load_config",
    "load_dataset",
    "load_settings",
    "run_experiment",
    "run_seeds",
    "train",
]

if TYPE_CHECKING:
    from mnist_wandb.checkpoint import Checkpoint, load_checkpoint
    from mnist_wandb.config import RunConfig
    from mnist_wandb.data import Preprocessing, load_dataset
    from mnist_wandb.errors import ConfigError, MnistWandbError
    from mnist_wandb.evaluate import evaluate
    from mnist_wandb.experiment import run_experiment
    from mnist_wandb.loading import load_config
    from mnist_wandb.metrics import EvalResult
    from mnist_wandb.models import build_model
    from mnist_wandb.runs import RunFolder
    from mnist_wandb.seeds import run_seeds
    from mnist_wandb.settings import load_settings
    from mnist_wandb.train import train


class _Package(ModuleType):
    """Keeps `mnist_wandb.train` and `.evaluate` the functions, though modules have these names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
